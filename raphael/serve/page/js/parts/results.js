// What an edit returns: result against source or against the same without the edit, and all of them in a row.

import { el, fill, uniqueId } from "../dom.js";
import { actionsOf } from "./actions.js";
import { decoded, frame, pngUri } from "./frame.js";
import { slider } from "./slider.js";
import { keep } from "./store.js";
import { thumbs } from "./thumbs.js";

/** Nodes for a result of `v1/edits/<kind>`. Its images go to the history. */
export async function resultsOf(result, { kind, values }) {
  const [source, made, without] = result.labels ?? ["source", "result", "without"];
  const rows = await Promise.all(result.images.map((image, place) => rowOf(image, place, result, { kind, values })));
  for (const row of [...rows].reverse()) await keep(row.kept);
  const view = el("div", { class: "stack" });

  function show(row) {
    const [width, height] = row.size;
    const against = (src, label) => () => {
      fill(halves, slider({ before: { src, label }, after: { src: row.result, label: made }, width, height }));
    };
    const halves = el("div");
    const choices = [
      [source, against(row.source, source)],
      row.without && [without, against(row.without, without)],
    ].filter(Boolean);
    const first = kind.against === "without" && choices.length > 1 ? 1 : 0;
    const all = [[source, row.source], [made, row.result], [without, row.without], ...row.shown].filter(
      ([, src]) => src,
    );
    fill(
      view,
      row.title && el("p", { class: "quote" }, row.title),
      halves,
      choices.length > 1 && pairChoice(choices, first),
      el(
        "div",
        { class: "trio" },
        all.map(([name, src]) => labelled(name, src, row.size)),
      ),
      actionsOf(row.kept),
    );
    choices[first][1]();
  }

  const many = rows.length > 1 && thumbs("Results", (_, place) => show(rows[place]));
  many?.show?.(rows.map(({ kept }) => kept));
  show(rows[0]);
  return el("div", { class: "stack" }, many && many.node, view, factsOf(result.facts));
}

async function rowOf(image, place, result, { kind, values }) {
  const uri = (base64) => (base64 ? pngUri(base64) : "");
  const png = uri(image.result);
  const { naturalWidth, naturalHeight } = await decoded(png);
  const shown = Object.entries(result.shown ?? {}).map(([name, list]) => [name, uri(list[place])]);
  const facts = { ...values, width: naturalWidth, height: naturalHeight };
  return {
    title: result.rows?.[place] ?? "",
    source: uri(image.source),
    result: png,
    without: uri(image.without),
    shown,
    size: [naturalWidth, naturalHeight],
    kept: { kind: kind.id, prompt: values.prompt, values: facts, png },
  };
}

function pairChoice(choices, first) {
  const name = uniqueId("pair");
  return el(
    "fieldset",
    { class: "choices" },
    el("legend", {}, "Beside the result"),
    choices.map(([label, press], place) =>
      el("label", {}, el("input", { type: "radio", name, checked: place === first, on: { change: press } }), label),
    ),
  );
}

function labelled(name, src, [width, height]) {
  const one = frame({ width, height, alt: name });
  one.show(src);
  return el("figure", {}, one.node, el("figcaption", {}, name));
}

function factsOf(facts) {
  if (!facts) return null;
  const told = Object.entries(facts).map(([name, value]) => {
    const text = typeof value === "object" ? JSON.stringify(value) : String(value);
    return [el("dt", {}, name), el("dd", {}, text)];
  });
  return el("details", { class: "more" }, el("summary", {}, "How it was made"), el("dl", { class: "facts" }, told));
}
