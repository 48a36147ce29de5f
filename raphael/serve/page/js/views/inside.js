// Look inside: what the network did while it generated one image. A word shows where it looks and which experts it
// takes, an expert which words it serves, the slider when.

import { run } from "../api.js";
import { el, fill } from "../dom.js";
import { take } from "../parts/actions.js";
import { Fields } from "../parts/fields.js";
import { frame } from "../parts/frame.js";
import { insideOf } from "../parts/inside_view.js";
import { SamplingPanel, promptSpec, seedField } from "../parts/sampling.js";
import { Work } from "../parts/work.js";
import { change, changes, modelOf, samplingOf, state } from "../state.js";

export function insideView() {
  const submit = el("button", { type: "submit", class: "primary" }, "Look inside");
  const work = new Work(submit);
  const form = el("form", { class: "panel", novalidate: true, "aria-label": "What to look into" });
  const stage = el("section", { class: "stage", "aria-label": "Inside" });
  const node = el("div", { class: "view two" }, form, el("div", { class: "wide" }, stage));
  const seed = seedField((some) => change(some));
  const sampling = new SamplingPanel((name, value) => change({ [name]: value }), { size: false });
  let prompt = null;
  let built = "";

  function build(model) {
    built = model.id;
    prompt = new Fields([promptSpec(model)], state.values, (name, value) => change({ [name]: value }));
    const more = el("details", { class: "more" }, el("summary", {}, "Sampler, steps, guidance"), sampling.node);
    const intro = el(
      "p",
      { class: "hint" },
      "Generates the image of this seed, and keeps what the network did at every step.",
    );
    fill(form, prompt.nodes, seed.node, el("div", { class: "row ask" }, submit), work.node, intro, more);
    fill(stage, el("p", { class: "empty" }, "Attention, experts, regions and the forming image come here."));
  }

  async function look() {
    if (work.busy) return;
    const values = { ...state.values };
    const [height, width] = modelOf().size;
    const forming = frame({ width, height, alt: "forming" });
    forming.noise();
    forming.wait(true);
    fill(stage, forming.node);
    const result = await work.do(
      (signal, watchOf) => {
        const watch = watchOf(0, 1, (job) => job.previews?.[0] && forming.show(job.previews[0]));
        return run("v1/inside", { ...samplingOf(values), prompt: values.prompt }, { signal, watch });
      },
      { what: "the image and what is behind it", show: mark, done: () => "Done: choose a word." },
    );
    if (result) fill(stage, await insideOf(result, { width, height }));
    else fill(stage);
  }

  function mark(problem) {
    if (problem.field === "seed") seed.fail(problem.message);
    return problem.field === "seed" || prompt.show(problem) || sampling.fields.show(problem);
  }

  function showSettings() {
    if (state.view !== "inside" || !prompt) return;
    prompt.set(state.values);
    seed.set(state.values);
    sampling.show(modelOf(), state.values);
  }

  form.addEventListener("submit", (event) => {
    event.preventDefault();
    look();
  });
  changes.addEventListener("settings", showSettings);

  return {
    node,
    title: "Look inside",
    show() {
      const model = modelOf();
      const { run: atOnce } = take();
      if (built !== model.id) build(model);
      submit.disabled = !model.inside;
      if (!model.inside)
        fill(
          stage,
          el("p", { class: "empty" }, "This model reads no words: there is no attention of words to look at."),
        );
      showSettings();
      if (atOnce && model.inside) look();
    },
  };
}
