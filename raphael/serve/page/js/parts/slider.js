// Before and after: two images in one place, and a divider that pointer and arrow keys move.

import { el } from "../dom.js";
import { crisp } from "./frame.js";

/** before, after: {src, label}; both of width x height px. */
export function slider({ before, after, width, height }) {
  const image = (side, name) =>
    el("img", { src: side.src, alt: side.label, class: name, width, height, draggable: "false" });
  const plate = el(
    "div",
    { class: "plate halves", vars: { "--at": "50%" } },
    image(after, "after"),
    image(before, "before"),
    el("div", { class: "divider" }),
    el("span", { class: "tag left", "aria-hidden": "true" }, before.label),
    el("span", { class: "tag right", "aria-hidden": "true" }, after.label),
  );
  plate.style.aspectRatio = `${width} / ${height}`;
  const range = el("input", {
    type: "range",
    min: 0,
    max: 100,
    value: 50,
    class: "over",
    "aria-label": "Before and after",
  });
  const move = () => {
    plate.style.setProperty("--at", `${range.value}%`);
    const text = { 0: `only ${after.label}`, 100: `only ${before.label}` }[range.value];
    range.setAttribute("aria-valuetext", text ?? `${range.value} % ${before.label}, then ${after.label}`);
  };
  range.addEventListener("input", move);
  move();
  plate.append(range);
  const frame = el("div", { class: "frame" }, plate);
  crisp(frame, plate, width);
  return frame;
}
