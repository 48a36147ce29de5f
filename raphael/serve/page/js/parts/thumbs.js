// A row of small images to choose from: one stop of the Tab key, arrows within.

import { el, fill } from "../dom.js";

/** {node, show(images)}. images: [{png, prompt, values}]; choose(image, place) is told of a press. */
export function thumbs(label, choose) {
  const node = el("ul", { class: "thumbs", "aria-label": label });
  let shown = [];

  node.addEventListener("keydown", (event) => {
    const all = [...node.querySelectorAll("button")];
    const at = all.indexOf(document.activeElement);
    const to = { ArrowRight: at + 1, ArrowLeft: at - 1, Home: 0, End: all.length - 1 }[event.key];
    if (at < 0 || to === undefined || !all[to]) return;
    event.preventDefault();
    all.forEach((one, place) => (one.tabIndex = place === to ? 0 : -1));
    all[to].focus();
  });

  function show(images) {
    shown = images;
    const made = shown.map((image, place) => {
      const title = `${image.prompt || "no prompt"}, seed ${image.values.seed}`;
      const img = el("img", { src: image.png, alt: "", width: 64, height: 64, loading: "lazy", class: "pixelated" });
      const press = { click: () => choose(image, place) };
      return el(
        "li",
        {},
        el("button", { type: "button", "aria-label": title, title, tabindex: place ? -1 : 0, on: press }, img),
      );
    });
    fill(node, made);
  }

  return { node, show };
}
