// The settings of sampling as fields, for whichever model is chosen.

import { button, el, uniqueId } from "../dom.js";
import { LARGEST_SEED, hasEta, randomSeed, state } from "../state.js";
import { Fields } from "./fields.js";

const MOST_STEPS = 150; // of the slider, where the server allows even more

/** Rows for `Fields`: sampler, steps, guidance and what else a model lets one set. */
export function samplingSpecs(model, values) {
  const { limits } = state;
  const two = (number) => number.toFixed(2);
  return [
    { name: "sampler", label: "Sampler", kind: "choice", options: model.samplers },
    {
      name: "num_inference_steps",
      label: "Steps",
      kind: "range",
      min: 1,
      max: Math.min(limits.steps ?? 100, MOST_STEPS),
    },
    { name: "guidance_scale", label: "Guidance", kind: "range", min: 0, max: 10, step: 0.1, shown: guidance },
    { name: "guidance_rescale", label: "Guidance rescale", kind: "range", min: 0, max: 1, step: 0.05, shown: two },
    hasEta(values.sampler) && {
      name: "eta",
      label: "Eta",
      kind: "range",
      min: 0,
      max: 1,
      step: 0.05,
      shown: two,
    },
  ].filter(Boolean);
}

/** How a prompt is read that is longer than the model's context, of a model that has a choice. */
export function readingSpecs(model) {
  const texts = { cut: "cut, with a warning", chunks: "read part by part" };
  const options = (model.long_prompts ?? []).map((value) => ({ value, text: texts[value] ?? value }));
  return options.length > 1 ? [{ name: "long_prompts", label: "Long prompts", kind: "choice", options }] : [];
}

/** Width and height, in the steps and bounds of the model. */
export function sizeSpecs(model) {
  const step = model.multiple_px ?? 8;
  const most = Math.min(model.max_px ?? 1024, state.limits.size_px ?? Infinity);
  const bounds = { kind: "number", min: step, max: most, step };
  return [
    { name: "width", label: "Width, px", ...bounds },
    { name: "height", label: "Height, px", ...bounds },
  ];
}

/** What the image shall show: words, or one of the classes that a model knows. */
export function promptSpec(model, name = "prompt", label = "Prompt") {
  const max = state.limits.prompt_chars ?? 1000;
  if (!model.labels) return { name, label, kind: "area", rows: 3, max };
  return { name, label: "Class", kind: "choice", options: [...model.labels, { value: "", text: "any" }] };
}

/**
 * A panel of sampling fields; it is built anew for another model, or a sampler with other settings. size: with those
 * that images alone have, not edits and looks inside.
 */
export class SamplingPanel {
  constructor(changed, { size = true } = {}) {
    this.node = el("div", { class: "stack" });
    this.changed = changed;
    this.size = size;
    this.made = "";
  }

  show(model, values) {
    const wanted = `${model.id} ${hasEta(values.sampler)}`;
    if (wanted === this.made) return this.fields.set(values);
    this.made = wanted;
    this.fields = new Fields(samplingSpecs(model, values), values, this.changed);
    this.sizes = new Fields(this.size ? sizeSpecs(model) : [], values, this.changed);
    this.reading = new Fields(this.size ? readingSpecs(model) : [], values, this.changed);
    this.node.replaceChildren(...this.fields.nodes);
    if (this.size) this.node.append(el("div", { class: "pair" }, this.sizes.nodes), ...this.reading.nodes);
    const more = [...this.sizes.byName, ...this.reading.byName];
    this.fields.byName = new Map([...this.fields.byName, ...more]);
  }
}

/** The seed: a number that can be locked, and exchanged for another. */
export function seedField(changed) {
  const id = uniqueId("seed");
  const fault = el("p", { class: "fault", id: `${id}-fault`, hidden: true });
  const attributes = { id, name: "seed", type: "number", min: 0, max: LARGEST_SEED, step: 1, inputmode: "numeric" };
  const input = el("input", { ...attributes, "aria-describedby": fault.id });
  const lock = button("Lock", () => show(!locked(), true), {
    class: "small",
    title: "Keep this seed for the next image",
  });
  const shuffle = button("Shuffle", () => take(randomSeed()), { class: "small" });
  const locked = () => lock.getAttribute("aria-pressed") === "true";

  function show(on, told = false) {
    lock.setAttribute("aria-pressed", String(on));
    if (told) changed({ locked: on });
  }

  function take(seed) {
    input.value = seed;
    fail("");
    changed({ seed });
  }

  function fail(text) {
    fault.textContent = text;
    fault.hidden = !text;
    input.setAttribute("aria-invalid", String(Boolean(text)));
  }

  input.addEventListener("input", () => {
    fail("");
    if (input.value !== "") changed({ seed: Number(input.value), locked: true });
    if (input.value !== "") show(true); // whoever types a seed wants that one
  });
  const node = el(
    "div",
    { class: "field seed", "data-field": "seed" },
    el("div", { class: "named" }, el("label", { htmlFor: id }, "Seed")),
    el("div", { class: "row" }, input, lock, shuffle),
    fault,
  );
  const set = (values) => {
    if (Number(input.value) !== values.seed || input.value === "") input.value = values.seed ?? "";
    show(Boolean(values.locked));
  };
  return { node, set, fail, focus: () => input.focus() };
}

function guidance(value) {
  if (value === 0) return "0, prompt ignored";
  return value === 1 ? "1, none" : value.toFixed(1);
}
