// An image at a whole number of screen pixels each, and the noise that stands in its place until there is one.

import { el } from "../dom.js";

const observers = new WeakMap(); // by element: one each
const SMOOTH_FROM = 256; // px; larger images are photographs to the eye and may be scaled as such

/** A place for an image of width x height px: {node, img, show(source), noise(), wait(on)}. */
export function frame({ width, height, alt = "" }) {
  const img = el("img", { width, height, alt, decoding: "async" });
  const node = el("div", { class: "frame" }, img);
  crisp(node, img, width);
  const show = (source, text = alt) => {
    img.src = source;
    img.alt = text;
  };
  return {
    node,
    img,
    show,
    noise: () => show(noiseOf(width, height), "noise"),
    wait: (on) => node.classList.toggle("waiting", on),
  };
}

/** Keeps an element as wide as fits, each of its `width` columns whole screen pixels. */
export function crisp(node, inner, width) {
  inner.classList.toggle("pixelated", width < SMOOTH_FROM);
  const size = () => {
    const zoom = node.clientWidth / width;
    const whole = width < SMOOTH_FROM && zoom >= 1 ? Math.floor(zoom) : Math.min(zoom, 2);
    if (node.clientWidth) inner.style.width = `${whole * width}px`;
  };
  observers.get(node)?.disconnect();
  const observer = new ResizeObserver(size);
  observer.observe(node);
  observers.set(node, observer);
  size();
}

/** Soft grey noise as a data URI. */
export function noiseOf(width, height) {
  const canvas = el("canvas", { width, height });
  const context = canvas.getContext("2d");
  const pixels = context.createImageData(width, height);
  for (let at = 0; at < pixels.data.length; at += 4) {
    const value = 128 + (Math.random() + Math.random() + Math.random() - 1.5) * 90;
    pixels.data.set([value, value, value, 255], at);
  }
  context.putImageData(pixels, 0, 0);
  return canvas.toDataURL();
}

/** An image of a source, once it is decoded. Rejects for what is no image. */
export async function decoded(source) {
  const img = new Image();
  img.src = source;
  await img.decode();
  return img;
}

export function pngUri(base64) {
  return base64.startsWith("data:") ? base64 : `data:image/png;base64,${base64}`;
}
