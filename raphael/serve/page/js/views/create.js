// Create: words become images. Several images are several seeds, one after the other: each can be made again alone.

import { run } from "../api.js";
import { button, el, fill } from "../dom.js";
import { actionsOf, captionOf, take } from "../parts/actions.js";
import { Fields } from "../parts/fields.js";
import { frame, pngUri } from "../parts/frame.js";
import { gallery } from "../parts/gallery.js";
import { SamplingPanel, promptSpec, seedField } from "../parts/sampling.js";
import { clear, images, keep, kept } from "../parts/store.js";
import { thumbs } from "../parts/thumbs.js";
import { Work } from "../parts/work.js";
import { bodyOf, change, changes, modelOf, randomSeed, state } from "../state.js";

export function createView() {
  const submit = el("button", { type: "submit", class: "primary" }, "Generate");
  const work = new Work(submit);
  const form = el("form", { class: "panel", novalidate: true, "aria-label": "What to generate" });
  const stage = el("section", { class: "stage", "aria-label": "Images" });
  const past = thumbs("Images of before", (image) => showOne(image));
  const history = el(
    "section",
    { class: "history" },
    el(
      "div",
      { class: "titled" },
      el("h2", {}, "History"),
      button("Clear", () => clear(), { class: "small" }),
    ),
    past.node,
  );
  const examples = gallery({ choose: (values) => draw({ ...values, n: 1 }), idle: () => !work.busy });
  const node = el("div", { class: "view two" }, form, el("div", { class: "wide" }, stage, history, examples.node));

  const seed = seedField((some) => change(some));
  const sampling = new SamplingPanel((name, value) => change({ [name]: value }));
  let fields = new Fields([], {});
  let built = "";

  function build(model) {
    const specs = [
      promptSpec(model),
      !model.labels && { name: "negative_prompt", label: "Negative prompt", kind: "text", placeholder: "nothing" },
      { name: "n", label: "Images", kind: "range", min: 1, max: Math.min(state.limits.n ?? 4, 8) },
    ].filter(Boolean);
    fields = new Fields(specs, state.values, (name, value) => change({ [name]: value }));
    const [prompt, ...others] = fields.nodes;
    const settings = el("div", { class: "stack" }, others, seed.node, sampling.node);
    const more = el("details", { class: "more" }, el("summary", {}, "Settings"), settings);
    more.open = matchMedia("(min-width: 52rem)").matches; // where the images stand beside, not below
    fill(form, prompt, el("div", { class: "row ask" }, submit), work.node, more);
  }

  function showSettings() {
    const model = modelOf();
    if (built !== model.id) build(model);
    built = model.id;
    fields.set(state.values);
    seed.set(state.values);
    sampling.show(model, state.values);
  }

  function mark(problem) {
    fields.byName.set("seed", seed);
    return fields.show(problem) || sampling.fields.show(problem);
  }

  /** Generates what the values say, n seeds of it, and shows it as it forms. */
  async function draw(values) {
    if (work.busy) return;
    change(values);
    fields.clear();
    const seeds = Array.from({ length: values.n }, (_, place) => values.seed + place);
    const frames = seeds.map(() => frame(values));
    fill(stage, gridOf(frames.map((one) => one.node)));
    for (const one of frames) one.noise();
    const made = [];
    await work.do(
      async (signal, watchOf) => {
        for (const [place, one] of seeds.entries()) {
          const watch = watchOf(
            place,
            seeds.length,
            (job) => job.previews?.[0] && frames[place].show(job.previews[0], "forming"),
          );
          frames[place].wait(true);
          const result = await run("v1/images", bodyOf({ ...values, seed: one }), { signal, watch });
          frames[place].wait(false);
          made.push(await keep(imageOf(values, one, result)));
          frames[place].show(made[place].png, values.prompt || "image");
        }
      },
      { what: seeds.length > 1 ? `${seeds.length} images` : "an image", show: mark, done: () => toldOf(made) },
    );
    if (made.length) showMany(made);
    else if (images.length) showOne(images[0]);
    else fill(stage, empty("Nothing was generated."));
  }

  function showOne(image) {
    showMany([image]);
    stage.scrollIntoView({ block: "nearest" });
  }

  function showMany(made, chosen = 0) {
    const below = el("div", { class: "below" });
    const choose = (place) => {
      for (const [at, cell] of [...grid.children].entries()) cell.setAttribute("aria-pressed", String(at === place));
      fill(below, captioned(made[place]), actionsOf(made[place], { again }));
    };
    const cells = made.map((image, place) => {
      const one = frame({ ...image.values, alt: image.prompt || "image" });
      one.show(image.png);
      const press = { type: "button", class: "cell", on: { click: () => choose(place) } };
      return made.length > 1 ? el("button", press, one.node) : one.node;
    });
    const grid = gridOf(cells);
    fill(stage, grid, below);
    if (made.length > 1) choose(chosen);
    else fill(below, captioned(made[0]), actionsOf(made[0], { again }));
  }

  function showHistory() {
    past.show(images);
    history.hidden = !images.length;
  }

  function again(image) {
    draw({ ...image.values, locked: true, n: 1 });
  }

  form.addEventListener("submit", (event) => {
    event.preventDefault();
    const { locked, seed: old } = state.values;
    draw({ ...state.values, seed: locked ? old : randomSeed() });
  });
  kept.addEventListener("change", showHistory);
  changes.addEventListener("settings", showSettings);
  showHistory();

  return {
    node,
    title: "Create",
    show({ first }) {
      take();
      showSettings();
      examples.show(modelOf());
      if (stage.childElementCount) return;
      if (first && modelOf().examples?.length) draw(state.values);
      else if (images.length) showOne(images[0]);
      else fill(stage, empty("Your images come here. “Generate”, or the Enter key, begins."));
    },
  };
}

function imageOf(values, seed, result) {
  const settings = Object.fromEntries(Object.entries(result.settings ?? {}).filter(([name]) => name in values));
  const resolved = { ...values, ...settings, model: values.model, prompt: values.prompt, seed, n: 1 };
  const png = pngUri(result.images[0].b64_png);
  return { kind: "images", prompt: values.prompt, values: resolved, png, seconds: result.seconds?.generate };
}

function captioned(image) {
  return el(
    "div",
    { class: "caption" },
    el("p", { class: "quote" }, image.prompt || "No prompt"),
    el("p", { class: "meta" }, captionOf(image)),
  );
}

function empty(text) {
  return el("p", { class: "empty" }, text);
}

function gridOf(cells) {
  const columns = cells.length === 1 ? 1 : Math.max(2, Math.ceil(Math.sqrt(cells.length)));
  return el("div", { class: columns === 1 ? "grid one" : "grid", vars: { "--columns": columns } }, cells);
}

function toldOf(made) {
  const seconds = made.reduce((sum, one) => sum + (one.seconds ?? 0), 0);
  return `${made.length === 1 ? "One image" : `${made.length} images`} in ${seconds.toFixed(1)} seconds.`;
}
