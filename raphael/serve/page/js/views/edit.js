// Edit: an image changed while it is generated, beside its source and the same without the edit.

import { run } from "../api.js";
import { el, fill } from "../dom.js";
import { take } from "../parts/actions.js";
import { Fields } from "../parts/fields.js";
import { frame } from "../parts/frame.js";
import { Painter } from "../parts/painter.js";
import { Picker } from "../parts/picker.js";
import { Regions } from "../parts/regions.js";
import { resultsOf } from "../parts/results.js";
import { SamplingPanel, promptSpec, seedField } from "../parts/sampling.js";
import { Work } from "../parts/work.js";
import { change, changes, modelOf, randomSeed, samplingOf, state } from "../state.js";
import { KINDS, bodyOfFields, fieldsOf, isExamplePrompt, startOf } from "./kinds.js";

const MASK = { name: "the mask", colour: [214, 52, 98], hatched: true };

export function editView() {
  const submit = el("button", { type: "submit", class: "primary" }, "Apply");
  const work = new Work(submit);
  const kindsNav = el("nav", { class: "kinds", "aria-label": "Kinds of edit" });
  const form = el("form", { class: "panel", novalidate: true, "aria-label": "The edit" });
  const bench = el("section", { class: "bench", "aria-label": "To begin from" });
  const stage = el("section", { class: "stage", "aria-label": "Result" });
  const node = el(
    "div",
    { class: "view two edit" },
    el("div", {}, kindsNav, form),
    el("div", { class: "wide" }, bench, stage),
  );

  const painter = new Painter("Canvas");
  const regions = new Regions(painter);
  const seed = seedField((some) => change(some));
  const sampling = new SamplingPanel((name, value) => change({ [name]: value }), { size: false });
  const picker = new Picker((element) => showBench(element));
  let kind = null;
  let prompt = null;
  let own = null;
  let built = "";

  const needs = (what) => kind.needs.includes(what);
  const bodyHasImage = () => needs("image") || needs("maybe image");

  function build(model) {
    kindsNav.replaceChildren(...kindLinks(model));
    if (kind.prompt && !model.labels && isExamplePrompt(state.values.prompt, model)) change({ prompt: kind.prompt });
    const text = state.values.prompt;
    prompt = new Fields([{ ...promptSpec(model), rows: 2 }], { prompt: text }, (_, value) => {
      change({ prompt: value });
      own.byName.get("words")?.words(value);
    });
    own = new Fields(fieldsOf(kind, model, state.limits), startOf(kind, model, text));
    own.byName.get("words")?.words(text);
    picker.fit(model.size);
    picker.optional = needs("maybe image");
    picker.label.textContent = picker.optional ? "Image, if not one that is generated" : "Image";
    const more = el(
      "details",
      { class: "more" },
      el("summary", {}, "Seed, sampler, steps, guidance"),
      seed.node,
      sampling.node,
    );
    fill(
      form,
      el("div", { class: "intro" }, el("h2", {}, kind.title), el("p", {}, kind.text)),
      bodyHasImage() && picker.node,
      prompt.nodes,
      needs("regions") && regions.node,
      own.nodes,
      el("div", { class: "row ask" }, submit),
      work.node,
      more,
    );
    fill(stage);
    if (needs("regions")) regions.begin(model.labels ? [""] : phrasesFor(text));
    if (needs("mask")) painter.setLayers([MASK]);
    showBench(bodyHasImage() ? picker.element : null);
  }

  /** The example's phrases where the prompt is the example's, else one that is yet to be named. */
  function phrasesFor(text) {
    return text === kind.prompt ? kind.phrases : [""];
  }

  function showBench(element) {
    if (!kind) return;
    const [height, width] = picker.size;
    const paints = needs("mask") || needs("regions");
    bench.hidden = !paints && !(bodyHasImage() && element);
    if (paints && needs("image") && !element) {
      bench.hidden = false;
      fill(bench, el("p", { class: "empty" }, "Choose an image: then paint over what shall change."));
    } else if (paints) {
      painter.begin({ width, height, ground: element });
      fill(bench, painter.node);
    } else if (element) {
      const one = frame({ width, height, alt: "the image to begin from" });
      one.show(element.src);
      fill(bench, one.node);
    }
  }

  function kindLinks(model) {
    const there = KINDS.filter(({ id }) => model.edits.includes(id));
    const groups = [...new Set(there.map(({ group }) => group))];
    return groups.map((group) =>
      el(
        "div",
        { class: "kindgroup" },
        el("h2", {}, group),
        el(
          "ul",
          {},
          there.filter((one) => one.group === group).map((one) => el("li", {}, kindLink(one))),
        ),
      ),
    );
  }

  function kindLink({ id, title }) {
    return el("a", { href: `#/edit/${id}`, "aria-current": id === kind.id ? "true" : null }, title);
  }

  /** The first fault that can be told without asking the server, shown at its field; whether there is none. */
  function complete() {
    if (needs("image") && !picker.value) return faultAt(picker, "Choose an image first.");
    if (needs("mask") && !painter.maskOf(0)) return faultAt(picker, "Paint over the part that shall change.");
    const missing = needs("regions") ? regions.missing(state.values.prompt) : "";
    if (missing) return faultAt(regions, missing);
    const factors = own.byName.get("words");
    if (factors && !Object.keys(factors.get()).length) return faultAt(factors, "Move the weight of at least one word.");
    return true;
  }

  function faultAt(place, text) {
    place.fail(text);
    place.focus?.();
    return false;
  }

  function body() {
    const values = samplingOf(state.values);
    const asked = { ...values, prompt: state.values.prompt, ...bodyOfFields(kind, own.values) };
    if (bodyHasImage() && picker.value) asked.image = picker.value;
    if (needs("mask")) asked.mask = painter.maskOf(0);
    if (needs("regions")) asked.regions = regions.value;
    return asked;
  }

  async function apply() {
    if (work.busy || !complete()) return;
    if (!state.values.locked && !bodyHasImage() && kind.id !== "vary") change({ seed: randomSeed() });
    const asked = body();
    const values = { ...state.values };
    const [height, width] = picker.size;
    const forming = frame({ width, height, alt: "forming" });
    forming.noise();
    forming.wait(true);
    fill(stage, forming.node);
    const edit = kind;
    const result = await work.do(
      (signal, watchOf) => {
        const watch = watchOf(0, 1, (job) => job.previews?.length && forming.show(previewOf(job.previews)));
        return run(`v1/edits/${edit.id}`, asked, { signal, watch });
      },
      { what: "the edit", show: mark },
    );
    if (edit !== kind) return; // the person is at another kind by now
    if (result) fill(stage, await resultsOf(result, { kind: edit, values }));
    else fill(stage);
  }

  function mark(problem) {
    const places = new Map([
      ["seed", seed],
      ["image", picker],
      ["mask", picker],
      ["regions", regions],
    ]);
    const place = places.get(problem.field?.split(/[.[]/)[0]);
    place?.fail(problem.message);
    return Boolean(place) || prompt.show(problem) || own.show(problem) || sampling.fields.show(problem);
  }

  function showSettings() {
    if (state.view !== "edit" || !prompt) return;
    prompt.set({ prompt: state.values.prompt });
    seed.set(state.values);
    sampling.show(modelOf(), state.values);
  }

  form.addEventListener("submit", (event) => {
    event.preventDefault();
    apply();
  });
  changes.addEventListener("settings", showSettings);

  return {
    node,
    title: "Edit",
    async show() {
      const model = modelOf();
      const there = KINDS.filter(({ id }) => model.edits.includes(id));
      if (!there.length) return fill(node, el("p", { class: "empty" }, "This model has no edits."));
      const wanted = there.find(({ id }) => id === state.kind) ?? there[0];
      const { image, run: atOnce } = take();
      if (built !== `${model.id} ${wanted.id}`) {
        kind = wanted;
        built = `${model.id} ${wanted.id}`;
        build(model);
      } else kindsNav.replaceChildren(...kindLinks(model));
      showSettings();
      if (image && bodyHasImage()) await picker.take(image.png, image);
      if (atOnce) apply();
      return undefined;
    },
  };
}

/** Of the rows of an edit (sources, results, results without it) the first result where there are so many. */
function previewOf(previews) {
  return previews.length >= 3 && previews.length % 3 === 0 ? previews[previews.length / 3] : previews[0];
}
