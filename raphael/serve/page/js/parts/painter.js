// A canvas on which masks are painted, by pointer or by keys: one layer for each name, over an image or blank ground.

import { button, el, fill, say } from "../dom.js";
import { crisp } from "./frame.js";

const MOST_UNDO = 30;
const LAYER_ALPHA = 0.62;
const AREAS = {
  "Left half": (x) => x < 0.5,
  "Right half": (x) => x >= 0.5,
  "Top half": (x, y) => y < 0.5,
  "Bottom half": (x, y) => y >= 0.5,
  Middle: (x, y) => Math.hypot(x - 0.5, y - 0.5) < 0.32,
};
const HELP =
  "Arrow keys move the brush, with Shift by one pixel; Space paints, E changes to erasing and back, Z undoes.";

export class Painter {
  /** label: what is painted. changed: told after each stroke. */
  constructor(label, changed = () => {}) {
    this.changed = changed;
    this.layers = [];
    this.active = 0;
    this.undone = [];
    this.cursor = { x: 0, y: 0 };
    this.erasing = false;
    this.ground = null;
    const help = el("p", { class: "hint", id: `help-${label.replaceAll(" ", "-")}` }, HELP);
    this.canvas = el("canvas", { tabindex: 0, role: "application", "aria-label": label, "aria-describedby": help.id });
    this.ring = el("div", { class: "ring", hidden: true });
    this.plate = el("div", { class: "plate" }, this.canvas, this.ring);
    this.frame = el("div", { class: "frame" }, this.plate);
    this.brush = el("input", { type: "range", min: 1, max: 16, step: 1, value: 5, "aria-label": "Brush, px" });
    this.eraser = button("Erase", () => this.erase(!this.erasing), { class: "small", "aria-pressed": "false" });
    const tool = (text, act) => button(text, act, { class: "small" });
    const areas = Object.entries(AREAS).map(([name, inside]) => tool(name, () => this.paintArea(name, inside)));
    this.tools = el(
      "div",
      { class: "tools", role: "toolbar", "aria-label": "Brush" },
      el("label", { class: "brush" }, "Brush", this.brush),
      this.eraser,
      tool("Undo", () => this.undo()),
      tool("Clear", () => this.clear()),
      areas,
    );
    this.node = el("div", { class: "painter" }, this.frame, this.tools, help);
    this.brush.addEventListener("input", () => this.moveRing());
    this.listen();
  }

  /** A new sheet of width x height px. ground: an image element to paint over, or null. */
  begin({ width, height, ground = null }) {
    Object.assign(this.canvas, { width, height });
    Object.assign(this, { width, height, ground, undone: [] });
    this.cursor = { x: width / 2, y: height / 2 };
    this.layers = this.layers.map((layer) => ({ ...layer, bits: new Uint8Array(width * height) }));
    fill(this.plate, this.canvas, this.ring);
    crisp(this.frame, this.plate, width);
    this.plate.style.aspectRatio = `${width} / ${height}`;
    this.draw();
  }

  /** The layers that there are, [{name, colour, hatched?}]; those that were there keep what is painted. */
  setLayers(wanted, active = 0) {
    const blank = () => new Uint8Array((this.width ?? 0) * (this.height ?? 0));
    this.layers = wanted.map((layer, place) => ({ ...layer, bits: this.layers[place]?.bits ?? blank() }));
    this.active = Math.min(active, this.layers.length - 1);
    this.draw();
  }

  removeLayer(place) {
    this.layers.splice(place, 1);
    this.undone = [];
  }

  /** A layer as a PNG's data URI, white where it is painted; "" where nothing is. */
  maskOf(place = 0) {
    const layer = this.layers[place];
    if (!layer?.bits.includes(1)) return "";
    const canvas = el("canvas", { width: this.width, height: this.height });
    const context = canvas.getContext("2d");
    const pixels = context.createImageData(this.width, this.height);
    layer.bits.forEach((bit, at) => pixels.data.set([bit * 255, bit * 255, bit * 255, 255], at * 4));
    context.putImageData(pixels, 0, 0);
    return canvas.toDataURL("image/png");
  }

  erase(on) {
    this.erasing = on;
    this.eraser.setAttribute("aria-pressed", String(on));
    say(on ? "Erasing." : "Painting.");
  }

  undo() {
    const last = this.undone.pop();
    if (last && this.layers[last.place]) this.layers[last.place].bits = last.bits;
    this.done("Undone.");
  }

  clear() {
    this.remember();
    this.layers[this.active]?.bits.fill(0);
    this.done("Cleared.");
  }

  paintArea(name, inside) {
    this.remember();
    const { bits } = this.layers[this.active];
    bits.forEach((_, at) => {
      const x = ((at % this.width) + 0.5) / this.width;
      const y = (Math.floor(at / this.width) + 0.5) / this.height;
      if (inside(x, y)) bits[at] = this.erasing ? 0 : 1;
    });
    this.done(`${name} ${this.erasing ? "erased" : "painted"}.`);
  }

  done(text) {
    this.draw();
    const { bits, name } = this.layers[this.active] ?? { bits: [], name: "" };
    const share = bits.length ? Math.round((100 * bits.reduce((sum, bit) => sum + bit, 0)) / bits.length) : 0;
    say(`${text} ${name}: ${share} % of the image.`);
    this.changed();
  }

  remember() {
    const layer = this.layers[this.active];
    if (layer) this.undone.push({ place: this.active, bits: layer.bits.slice() });
    this.undone.splice(0, this.undone.length - MOST_UNDO);
  }

  /** A dab of the brush, a disc of its radius in px. */
  dab(x, y) {
    const { bits } = this.layers[this.active];
    const radius = this.brush.valueAsNumber;
    for (let row = Math.max(0, Math.floor(y - radius)); row < Math.min(this.height, y + radius); row += 1) {
      for (let column = Math.max(0, Math.floor(x - radius)); column < Math.min(this.width, x + radius); column += 1) {
        if (Math.hypot(column + 0.5 - x, row + 0.5 - y) <= radius)
          bits[row * this.width + column] = this.erasing ? 0 : 1;
      }
    }
  }

  listen() {
    let last = null;
    const at = (event) => {
      const box = this.canvas.getBoundingClientRect();
      const x = ((event.clientX - box.left) / box.width) * this.width;
      return { x, y: ((event.clientY - box.top) / box.height) * this.height };
    };
    this.canvas.addEventListener("pointerdown", (event) => {
      if (event.button || !this.layers.length) return;
      this.canvas.setPointerCapture(event.pointerId);
      this.remember();
      last = at(event);
      this.dab(last.x, last.y);
      this.draw();
    });
    this.canvas.addEventListener("pointermove", (event) => {
      this.cursor = at(event);
      this.moveRing();
      if (!last) return;
      const far = Math.max(1, Math.ceil(Math.hypot(this.cursor.x - last.x, this.cursor.y - last.y)));
      for (let part = 1; part <= far; part += 1) {
        this.dab(last.x + ((this.cursor.x - last.x) * part) / far, last.y + ((this.cursor.y - last.y) * part) / far);
      }
      last = this.cursor;
      this.draw();
    });
    for (const name of ["pointerup", "pointercancel"]) {
      this.canvas.addEventListener(name, () => {
        if (last) this.done("Painted.");
        last = null;
      });
    }
    this.canvas.addEventListener("keydown", (event) => this.key(event));
    for (const name of ["focus", "pointerenter"]) this.canvas.addEventListener(name, () => this.moveRing(true));
    for (const name of ["blur", "pointerleave"]) this.canvas.addEventListener(name, () => (this.ring.hidden = true));
  }

  key(event) {
    if (event.ctrlKey || event.metaKey || event.altKey || !this.layers.length) return;
    const by = event.shiftKey ? 1 : Math.max(2, Math.round(this.width / 16));
    const ways = { ArrowLeft: [-by, 0], ArrowRight: [by, 0], ArrowUp: [0, -by], ArrowDown: [0, by] };
    const way = ways[event.key];
    if (way) {
      const within = (value, most) => Math.min(Math.max(value, 0), most);
      this.cursor = { x: within(this.cursor.x + way[0], this.width), y: within(this.cursor.y + way[1], this.height) };
      say(`${Math.round(this.cursor.x)}, ${Math.round(this.cursor.y)}`);
    } else if (event.key === " ") {
      this.remember();
      this.dab(this.cursor.x, this.cursor.y);
      this.done(this.erasing ? "Erased." : "Painted.");
    } else if (event.key.toLowerCase() === "e") this.erase(!this.erasing);
    else if (event.key.toLowerCase() === "z") this.undo();
    else return;
    event.preventDefault();
    this.moveRing(true);
  }

  moveRing(shown = !this.ring.hidden) {
    const across = `${(200 * this.brush.valueAsNumber) / this.width}%`;
    const { style } = this.ring;
    [style.left, style.top] = [`${(100 * this.cursor.x) / this.width}%`, `${(100 * this.cursor.y) / this.height}%`];
    style.width = across;
    this.ring.hidden = !shown;
  }

  draw() {
    const context = this.canvas.getContext("2d");
    if (!this.width) return;
    context.fillStyle = "#f4f1ec";
    context.fillRect(0, 0, this.width, this.height);
    if (this.ground) context.drawImage(this.ground, 0, 0, this.width, this.height);
    const pixels = context.getImageData(0, 0, this.width, this.height);
    for (const { colour, bits, hatched } of this.layers) {
      bits.forEach((bit, at) => {
        if (!bit) return;
        for (let part = 0; part < 3; part += 1) {
          const under = pixels.data[at * 4 + part];
          const over = hatched && (at + Math.floor(at / this.width)) % 4 < 2 ? 255 : colour[part]; // seen on any image
          pixels.data[at * 4 + part] = under + (over - under) * LAYER_ALPHA;
        }
      });
    }
    context.putImageData(pixels, 0, 0);
  }
}
