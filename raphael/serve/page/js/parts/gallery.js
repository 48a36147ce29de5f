// Examples that work. Their images are generated here, one at a time, when they come into view and nothing else runs.

import { run } from "../api.js";
import { el, fill } from "../dom.js";
import { bodyOf, defaultsOf } from "../state.js";
import { frame, pngUri } from "./frame.js";

const AGAIN_MS = 400; // how long until it is looked again whether nothing else runs

/** {node, show(model)}. choose(values): told the settings of a pressed example; idle(): whether one may begin. */
export function gallery({ choose, idle }) {
  const list = el("ul", { class: "examples" });
  const node = el("section", {}, el("h2", {}, "Examples"), list);
  let shown = "";
  let waiting = [];
  let drawing = false;

  const seen = new IntersectionObserver((entries) => {
    for (const { isIntersecting, target } of entries) {
      if (!isIntersecting) continue;
      seen.unobserve(target);
      waiting.push(target);
    }
    next();
  });

  /** Ends silently where it is refused: an example without its image still works. */
  async function next() {
    if (drawing || !waiting.length) return;
    if (!idle() || document.hidden || !node.isConnected) {
      setTimeout(next, AGAIN_MS);
      return;
    }
    drawing = true;
    const card = waiting.shift();
    const { values, place } = card;
    try {
      const result = await run("v1/images", bodyOf(values));
      place.show(pngUri(result.images[0].b64_png));
      card.dataset.made = "yes";
    } catch {
      waiting = [];
    } finally {
      drawing = false;
    }
    next();
  }

  function show(model) {
    if (shown === model.id) return;
    shown = model.id;
    waiting = [];
    seen.disconnect();
    const defaults = defaultsOf(model);
    const cards = (model.examples ?? []).map((example) => {
      const values = { ...defaults, prompt: example.prompt, seed: example.seed ?? 0 };
      const place = frame(values);
      place.noise();
      place.img.alt = "";
      const press = { click: () => choose(values) };
      const card = el(
        "button",
        { type: "button", class: "example", "data-made": "no", on: press },
        place.node,
        el("span", {}, example.prompt),
      );
      card.values = values;
      card.place = place;
      seen.observe(card);
      return el("li", {}, card);
    });
    fill(list, cards);
    node.hidden = !cards.length;
  }

  return { node, show };
}
