// Compare: one prompt and the same seeds, by two models or two settings, side by side.

import { run } from "../api.js";
import { el, fill } from "../dom.js";
import { take } from "../parts/actions.js";
import { Fields } from "../parts/fields.js";
import { decoded, frame, pngUri } from "../parts/frame.js";
import { SamplingPanel, promptSpec, seedField } from "../parts/sampling.js";
import { slider } from "../parts/slider.js";
import { Work } from "../parts/work.js";
import { bodyOf, change, changes, defaultsOf, modelOf, state } from "../state.js";

const SAMPLING = ["sampler", "num_inference_steps", "guidance_scale", "guidance_rescale", "eta", "long_prompts"];
const OWN = ["model", ...SAMPLING, "width", "height"];

export function compareView() {
  const submit = el("button", { type: "submit", class: "primary" }, "Compare");
  const work = new Work(submit);
  const form = el("form", { class: "panel", novalidate: true, "aria-label": "What to compare" });
  const stage = el("section", { class: "stage", "aria-label": "Side by side" });
  const node = el("div", { class: "view two" }, form, el("div", { class: "wide" }, stage));
  const seed = seedField((some) => change(some));
  const sides = ["A", "B"].map((name) => new Side(name));
  let fields = null;
  let built = "";

  function build(model) {
    built = model.id;
    const specs = [promptSpec(model), { name: "n", label: "Seeds", kind: "range", min: 1, max: 4 }];
    fields = new Fields(specs, state.values, (name, value) => change({ [name]: value }));
    const [prompt, n] = fields.nodes;
    sides[0].take(state.values);
    sides[1].take({ ...state.values, guidance_scale: state.values.guidance_scale > 1 ? 1 : 3 });
    fill(
      form,
      prompt,
      el("div", { class: "row ask" }, submit),
      work.node,
      seed.node,
      n,
      sides.map((side) => side.node),
    );
    fill(
      stage,
      el(
        "p",
        { class: "empty" },
        "Change A or B: another model, another sampler, fewer steps. Both get the same noise.",
      ),
    );
  }

  async function compare() {
    if (work.busy) return;
    const { prompt, negative_prompt, n } = state.values;
    const both = sides.map((side) => ({ ...side.values, prompt, negative_prompt }));
    const seeds = Array.from({ length: n }, (_, place) => state.values.seed + place);
    const rows = seeds.map(() => both.map((values) => frame(values)));
    for (const one of rows.flat()) one.noise();
    const heads = sides.map((side) => el("p", { class: "side" }, el("b", {}, side.name), ` ${side.summary}`));
    fill(
      stage,
      el(
        "div",
        { class: "versus" },
        heads,
        rows.flat().map((one) => one.node),
      ),
    );
    const made = [];
    const done = await work.do(
      async (signal, watchOf) => {
        for (const [at, one] of seeds.entries()) {
          for (const [place, values] of both.entries()) {
            const target = rows[at][place];
            target.wait(true);
            const watch = watchOf(
              2 * at + place,
              2 * n,
              (job) => job.previews?.[0] && target.show(job.previews[0], "forming"),
            );
            const result = await run("v1/images", bodyOf({ ...values, seed: one }), { signal, watch });
            target.wait(false);
            target.show(pngUri(result.images[0].b64_png), `${sides[place].name}: ${prompt}, seed ${one}`);
            made.push(target.img);
          }
        }
        return true;
      },
      { what: "both sides", show: mark, done: () => "Both sides are there." },
    );
    if (done) stage.append(await verdicts(made, seeds, both));
  }

  /** For each seed how far apart the two are, and one over the other where they have the same size. */
  async function verdicts(made, seeds, [first, second]) {
    if (first.width !== second.width || first.height !== second.height)
      return el("p", { class: "meta" }, "The sizes differ.");
    const pairs = seeds.map((one, at) => [one, made[2 * at].src, made[2 * at + 1].src]);
    const rows = await Promise.all(
      pairs.map(async ([one, a, b]) => {
        const apart = difference(await decoded(a), await decoded(b));
        const halves = slider({ before: { src: a, label: "A" }, after: { src: b, label: "B" }, ...first });
        return el(
          "figure",
          {},
          halves,
          el("figcaption", {}, `seed ${one}: ${apart.toFixed(1)} of 255 apart in the mean`),
        );
      }),
    );
    return el("section", {}, el("h2", {}, "One over the other"), el("div", { class: "trio large" }, rows));
  }

  function mark(problem) {
    if (problem.field === "seed") seed.fail(problem.message);
    return problem.field === "seed" || fields.show(problem) || sides.some((side) => side.panel.fields.show(problem));
  }

  function showSettings() {
    if (state.view !== "compare" || !fields) return;
    fields.set(state.values);
    seed.set(state.values);
  }

  form.addEventListener("submit", (event) => {
    event.preventDefault();
    compare();
  });
  changes.addEventListener("settings", showSettings);

  return {
    node,
    title: "Compare",
    show() {
      const { image } = take();
      if (built !== state.values.model) build(modelOf());
      else if (image) sides[0].take(image.values);
      showSettings();
    },
  };
}

/** A or B: a model and how it samples. */
class Side {
  constructor(name) {
    this.name = name;
    this.panel = new SamplingPanel((field, value) => this.set({ [field]: value }));
    this.model = el("select", { "aria-label": `Model of ${name}` });
    this.model.addEventListener("change", () => this.take(defaultsOf(modelOf(this.model.value))));
    this.node = el("fieldset", { class: "sidebox" }, el("legend", {}, name), this.model, this.panel.node);
  }

  take(values) {
    this.values = Object.fromEntries(OWN.map((name) => [name, values[name]]));
    fill(
      this.model,
      state.models.map(({ id }) => el("option", { value: id, selected: id === values.model }, id)),
    );
    this.panel.show(modelOf(values.model), this.values);
  }

  set(some) {
    this.values = { ...this.values, ...some };
    this.panel.show(modelOf(this.values.model), this.values);
  }

  get summary() {
    const { model, sampler, num_inference_steps: steps, guidance_scale: scale } = this.values;
    const parts = [`${steps} steps`, sampler, `guidance ${scale}`];
    return [...(state.models.length > 1 ? [model] : []), ...parts].join(" · ");
  }
}

/** The mean of |a - b| over pixels and channels. */
function difference(a, b) {
  const [first, second] = [a, b].map((image) => {
    const canvas = el("canvas", { width: image.naturalWidth, height: image.naturalHeight });
    const context = canvas.getContext("2d", { willReadFrequently: true });
    context.drawImage(image, 0, 0);
    return context.getImageData(0, 0, canvas.width, canvas.height).data;
  });
  let sum = 0;
  for (let at = 0; at < first.length; at += 1) if (at % 4 < 3) sum += Math.abs(first[at] - second[at]);
  return sum / ((first.length * 3) / 4);
}
