// A job that runs: how far it is, and how it is cancelled (the button, or Escape).

import { Problem } from "../api.js";
import { button, el, fill, say } from "../dom.js";

export class Work {
  /** starter: the button that begins it; never disabled, which would take the focus from it, and Escape with it. */
  constructor(starter) {
    this.starter = starter;
    this.bar = el("progress", { max: 1, value: 0, "aria-label": "Progress" });
    this.text = el("p", { class: "told" });
    this.cancelButton = button("Cancel", () => this.cancel(), { class: "small", "aria-keyshortcuts": "Escape" });
    this.running = el("div", { class: "running", hidden: true }, this.bar, this.cancelButton, this.text);
    this.fault = el("p", { class: "notice", role: "alert", hidden: true });
    this.warnings = el("div", { role: "status" }); // never hidden: what is put into a region that listens is told
    this.node = el("div", { class: "work" }, this.running, this.fault, this.warnings);
    this.controller = null;
    document.addEventListener("keydown", (event) => {
      const elsewhere = !this.node.isConnected || document.querySelector("dialog[open]");
      if (event.key === "Escape" && this.busy && !elsewhere) this.cancel();
    });
  }

  get busy() {
    return this.controller !== null;
  }

  cancel() {
    this.controller?.abort();
  }

  /**
   * Runs task(signal, watchOf) to its end; resolves with what it returns, undefined where it was cancelled or failed.
   * watchOf(part, parts, onStep) is what `run` takes as `watch` for one of several jobs. show(problem): whether it
   * was shown at a field, so that it needs no place here.
   */
  async do(task, { what = "images", show = () => false, done = () => "Done." } = {}) {
    if (this.busy) return undefined;
    this.controller = new AbortController();
    this.fault.hidden = true;
    fill(this.warnings);
    this.running.hidden = false;
    this.starter.setAttribute("aria-disabled", "true");
    this.at(0, "Asking");
    say(`Generating ${what}.`);
    try {
      const result = await task(this.controller.signal, (...part) => this.watch(...part));
      say(done(result));
      return result;
    } catch (error) {
      if (error.name === "AbortError") say("Cancelled.");
      else this.fail(error, show);
      return undefined;
    } finally {
      this.controller = null;
      this.running.hidden = true;
      this.starter.removeAttribute("aria-disabled");
    }
  }

  watch(part, parts, onStep = () => {}) {
    const of = parts > 1 ? `Image ${part + 1} of ${parts}: ` : "";
    return {
      queued: ({ position }) =>
        this.at(part / parts, `${of}${position > 0 ? `queued, ${position} before it` : "queued"}`),
      waiting: (seconds) => this.at(part / parts, `${of}the server is busy; asked again in ${seconds} s`),
      step: (job) => {
        const told = job.steps ? `step ${job.step} of ${job.steps}` : "at work";
        this.at((part + (job.progress ?? 0)) / parts, `${of}${told}`);
        onStep(job);
      },
      warned: (texts) => this.warn(texts),
    };
  }

  /** Lines below the button, each text once, until the next job. */
  warn(texts) {
    const there = new Set([...this.warnings.children].map((line) => line.textContent));
    const lines = texts.map((text) => text.charAt(0).toUpperCase() + text.slice(1));
    for (const line of lines) if (!there.has(line)) this.warnings.append(el("p", { class: "notice" }, line));
  }

  at(share, text) {
    this.bar.value = share;
    this.text.textContent = text.charAt(0).toUpperCase() + text.slice(1);
  }

  fail(error, show) {
    if (error instanceof Problem && show(error)) {
      say(error.message);
      return;
    }
    this.fault.textContent = error.message;
    this.fault.hidden = false;
  }
}
