// What can be done with an image that is there.

import { button, el, say } from "../dom.js";
import { go, hasOwnSize, linkOf, modelOf, state } from "../state.js";

export const handed = { image: null, run: false }; // from one view to the next, which takes it

/** What was handed over; the next one who asks gets nothing. */
export function take() {
  const taken = { ...handed };
  Object.assign(handed, { image: null, run: false });
  return taken;
}

/** Buttons of an image; again(image) generates it anew. `only`: the edits' results, of which a seed is not all. */
export function actionsOf(image, { again } = {}) {
  const model = modelOf(image.values.model);
  const fixed = { ...image.values, locked: true, n: 1 };
  const edits = new Set(model?.edits ?? []);
  const plain = image.kind === "images"; // made by prompt and seed alone
  const inOwnSize = plain && hasOwnSize(image.values);
  const act = (text, title, press, there = true) => there && button(text, press, { title });
  const onwards = (view, kind, run) => () => {
    Object.assign(handed, { image, run });
    go(view, kind, fixed);
  };
  const editing = ["inpaint", "image", "outpaint"].find((kind) => edits.has(kind));
  return el(
    "div",
    { class: "actions", role: "group", "aria-label": "Of this image" },
    act("Again", "The same settings and seed", () => again(image), plain && again && model),
    act("Vary", "Images like this one", onwards("edit", "vary", true), inOwnSize && edits.has("vary")),
    act("Edit this", "Change a part of it, or generate from it", onwards("edit", editing, false), Boolean(editing)),
    act("Look inside", "What the network did", onwards("inside", null, true), inOwnSize && model?.inside),
    act("Compare", "The same seed by other settings", onwards("compare", null, false), plain && Boolean(model)),
    el("a", { class: "button", href: image.png, download: fileName(image) }, "Download"),
    act("Copy link", "An address that restores these settings", () => copyLink(fixed), plain),
  );
}

/** The settings of an image as a line of text. */
export function captionOf({ values, seconds }) {
  const { seed, num_inference_steps: steps, sampler, guidance_scale: scale, width, height } = values;
  const parts = [`seed ${seed}`, `${steps} steps`, sampler, `guidance ${scale}`, `${width} × ${height} px`];
  if (state.models.length > 1) parts.unshift(values.model);
  if (seconds) parts.push(`${seconds.toFixed(seconds < 10 ? 1 : 0)} s`);
  return parts.join(" · ");
}

export function fileName({ prompt, values, kind }) {
  const words = (prompt || "image")
    .toLowerCase()
    .replace(/[^\p{L}\p{N}]+/gu, "-")
    .replace(/^-|-$/g, "")
    .slice(0, 48);
  return `${words || "image"}-${kind === "images" ? "" : `${kind}-`}seed${values.seed}.png`;
}

async function copyLink(values) {
  const link = linkOf(values);
  try {
    await navigator.clipboard.writeText(link);
    say("Link copied.");
  } catch {
    window.prompt("Copy this link:", link); // where the browser gives no clipboard: plain http beyond loopback
  }
}
