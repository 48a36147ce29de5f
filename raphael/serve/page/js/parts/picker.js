// An image to begin from: a file, one that is dropped or pasted, or one of the history.

import { button, el, uniqueId } from "../dom.js";
import { decoded } from "./frame.js";
import { images, kept } from "./store.js";
import { thumbs } from "./thumbs.js";

const TYPES = ["image/png", "image/jpeg", "image/webp"];

export class Picker {
  /** changed(image element or null): told of another image, scaled and cropped to the model's size. */
  constructor(changed) {
    this.changed = changed;
    this.element = null;
    const id = uniqueId("image");
    this.file = el("input", { id, type: "file", accept: TYPES.join(","), "aria-describedby": `${id}-fault` });
    this.fault = el("p", { class: "fault", id: `${id}-fault`, hidden: true });
    this.past = thumbs("Images of the history", (image) => this.take(image.png, image));
    this.label = el("label", { htmlFor: id }, "Image");
    this.none = button("Without an image", () => this.drop(), { class: "small", hidden: true });
    this.node = el(
      "div",
      { class: "field picker", "data-field": "image" },
      el("div", { class: "named" }, this.label, this.none),
      this.file,
      el("p", { class: "hint" }, "A file, dropped, pasted, or one of the history:"),
      this.past.node,
      this.fault,
    );
    this.file.addEventListener("change", () => this.file.files[0] && this.read(this.file.files[0]));
    this.node.addEventListener("dragover", (event) => event.preventDefault());
    this.node.addEventListener("drop", (event) => this.given(event, event.dataTransfer));
    document.addEventListener("paste", (event) => this.node.isConnected && this.given(event, event.clipboardData));
    kept.addEventListener("change", () => this.past.show(images));
    this.past.show(images);
  }

  given(event, data) {
    const file = [...(data?.files ?? [])].find((one) => TYPES.includes(one.type));
    if (!file) return;
    event.preventDefault();
    this.read(file);
  }

  async read(file) {
    const source = URL.createObjectURL(file);
    await this.take(source);
    URL.revokeObjectURL(source);
  }

  /** An image's source; of: the image of the history that it is. */
  async take(source, of = null) {
    try {
      const element = await decoded(source);
      this.element = await decoded(cropped(element, this.size));
      this.of = of;
      this.fail("");
      this.none.hidden = !this.optional;
      this.changed(this.element, of);
    } catch {
      this.fail("That is no image which can be read here: PNG, JPEG or WebP.");
    }
  }

  /** size: [height, width] px; an image of another size goes. */
  fit(size) {
    if (this.size && String(size) !== String(this.size)) this.element = null;
    this.size = size;
  }

  drop() {
    this.element = null;
    this.file.value = "";
    this.none.hidden = true;
    this.changed(null, null);
  }

  /** The image as a PNG's data URI, "" without one. */
  get value() {
    return this.element ? this.element.src : "";
  }

  fail(text) {
    this.fault.textContent = text;
    this.fault.hidden = !text;
    this.file.setAttribute("aria-invalid", String(Boolean(text)));
  }

  focus() {
    this.file.focus();
  }
}

/** Scaled to cover [height, width] px and cropped about the middle, as the server would: here, so that masks fit. */
function cropped(element, [height, width]) {
  const canvas = el("canvas", { width, height });
  const context = canvas.getContext("2d");
  const scale = Math.max(width / element.naturalWidth, height / element.naturalHeight);
  const [across, down] = [element.naturalWidth * scale, element.naturalHeight * scale];
  context.imageSmoothingQuality = "high";
  context.drawImage(element, (width - across) / 2, (height - down) / 2, across, down);
  return canvas.toDataURL("image/png");
}
