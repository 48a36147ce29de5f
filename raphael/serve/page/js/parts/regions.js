// Phrases of a prompt, each with a colour of its own: the one that is chosen is painted.

import { button, el, fill, uniqueId } from "../dom.js";
import { state } from "../state.js";

export class Regions {
  /** painter: whose layers are the phrases. */
  constructor(painter) {
    this.painter = painter;
    this.rows = [];
    this.group = uniqueId("phrase");
    this.list = el("div", { class: "phrases" });
    this.fault = el("p", { class: "fault", hidden: true, role: "alert" });
    this.more = button("Add a phrase", () => this.add("", true), { class: "small" });
    this.node = el(
      "fieldset",
      { class: "field regions", "data-field": "regions" },
      el("legend", {}, "Phrases, each painted where it shall be"),
      this.list,
      this.more,
      this.fault,
    );
  }

  /** Phrases of a prompt for which nothing is painted yet. */
  begin(phrases) {
    this.rows = phrases.map((phrase) => ({ phrase }));
    this.active = 0;
    this.painter.layers = [];
    this.show();
  }

  add(phrase, focused = false) {
    this.rows.push({ phrase });
    this.active = this.rows.length - 1;
    this.show();
    if (focused) this.list.lastElementChild.querySelector("input[type=text]").focus();
  }

  remove(place) {
    this.rows.splice(place, 1);
    this.painter.removeLayer(place);
    this.active = Math.max(0, Math.min(this.active, this.rows.length - 1));
    this.show();
    this.more.focus();
  }

  choose(place) {
    this.active = place;
    this.painter.active = place;
  }

  show() {
    const made = this.rows.map((row, place) => {
      const name = () => row.phrase || `phrase ${place + 1}`;
      const colour = state.colours[place].join(" ");
      const choice = el("input", { type: "radio", name: this.group, checked: place === this.active });
      choice.setAttribute("aria-label", `Paint ${name()}`);
      choice.addEventListener("change", () => this.choose(place));
      const text = el("input", {
        type: "text",
        value: row.phrase,
        maxlength: 100,
        "aria-label": `Phrase ${place + 1}`,
      });
      text.addEventListener("input", () => {
        row.phrase = text.value.trim();
        this.painter.layers[place].name = row.phrase;
        choice.setAttribute("aria-label", `Paint ${name()}`);
        this.fail("");
      });
      text.addEventListener("focus", () => {
        choice.checked = true;
        this.choose(place);
      });
      const gone = button("Remove", () => this.remove(place), { class: "small", "aria-label": `Remove ${name()}` });
      return el(
        "div",
        { class: "phrase", vars: { "--colour": `rgb(${colour})` } },
        choice,
        text,
        this.rows.length > 1 && gone,
      );
    });
    fill(this.list, made);
    this.more.hidden = this.rows.length === state.colours.length;
    this.painter.setLayers(
      this.rows.map(({ phrase }, place) => ({ name: phrase, colour: state.colours[place] })),
      this.active,
    );
  }

  get value() {
    return this.rows.map(({ phrase }, place) => ({ phrase, mask: this.painter.maskOf(place) }));
  }

  /** What is missing before it can be sent, "" for nothing. */
  missing(prompt) {
    for (const { phrase, mask } of this.value) {
      if (!phrase || !prompt.toLowerCase().includes(phrase.toLowerCase()))
        return `“${phrase}” does not stand in the prompt.`;
      if (!mask) return `Nothing is painted for “${phrase}”.`;
    }
    return "";
  }

  fail(text) {
    this.fault.textContent = text;
    this.fault.hidden = !text;
  }
}
