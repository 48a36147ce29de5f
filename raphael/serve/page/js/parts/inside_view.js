// The inside of one image, to be walked through.

import { button, el, fill, say, uniqueId } from "../dom.js";
import { crisp, decoded, pngUri } from "./frame.js";
import { GRADIENT, blocksOf, mapOf, meanOf, paintMap, placeOf } from "./maps.js";

const PLAY_MS = 260;
const LAYERS = { cross: "Attention", masks: "Regions", edges: "Edges", none: "The image alone" };
const TOLD = {
  cross: "Where the chosen word is looked at: bright is much.",
  masks: "The region in which the chosen word's expert works.",
  edges: "Edges that the block predicts, of the image as a whole.",
  none: "The estimate of the finished image at this step.",
};

/** A node for an answer of `v1/inside`; the image is of width x height px. */
export async function insideOf(told, { width, height }) {
  const images = await Promise.all(told.steps.map(({ x0 }) => decoded(pngUri(x0))));
  return new Inside(told, images, { width, height }).node;
}

class Inside {
  constructor(told, images, size) {
    this.told = told;
    this.images = images;
    this.size = size;
    this.blocks = blocksOf(told.blocks);
    this.step = images.length - 1;
    this.layer = "cross";
    this.block = null; // null: the mean of all
    this.expert = null; // {block, expert}
    this.word = Math.max(
      0,
      told.words.findIndex(({ text }) => text.length > 2),
    );
    this.caption = el("p", { class: "meta" });
    this.main = el("canvas", { ...size, role: "img" });
    this.frame = el("div", { class: "frame" }, this.main);
    crisp(this.frame, this.main, size.width);
    const parts = [this.wordButtons(), this.picture(), this.blockButtons(), this.expertTable(), this.timeTable()];
    this.node = el("div", { class: "inside" }, parts);
    this.show();
  }

  /** Tokens that are looked at: those of the chosen word, or of all words that the chosen expert serves. */
  get tokens() {
    const words = this.expert ? this.servedBy(this.expert) : [this.word];
    return words.flatMap((word) => this.tokensOf(word));
  }

  get chosen() {
    return this.expert
      ? `expert ${this.expert.expert + 1} of ${this.blocks[this.expert.block].name}`
      : this.nameOf(this.word);
  }

  nameOf(word) {
    return `“${this.told.words[word]?.text ?? ""}”`;
  }

  tokensOf(word) {
    const { first = 0, last = 0 } = this.told.words[word] ?? {};
    return Array.from({ length: last - first }, (_, at) => first + at);
  }

  /** Experts that a word's tokens take in a block, counted from 0. */
  expertsOf(word, block) {
    return [...new Set(this.tokensOf(word).map((token) => this.blocks[block].space?.[token]))].filter(
      (one) => one !== undefined,
    );
  }

  servedBy({ block, expert }) {
    return this.told.words.map((_, word) => word).filter((word) => this.expertsOf(word, block).includes(expert));
  }

  mapOf(block) {
    return mapOf(this.blocks[block], this.layer, this.step, this.tokens);
  }

  wordButtons() {
    this.words = this.told.words.map(({ text }, word) =>
      button(text, () => this.choose({ word, expert: null }), { class: "word" }),
    );
    return el("div", { class: "words", role: "group", "aria-label": "Words of the prompt" }, this.words);
  }

  picture() {
    const name = uniqueId("layer");
    const there = Object.keys(LAYERS).filter(
      (layer) => layer === "none" || this.blocks.some((block) => block[layer]?.shape.every(Boolean)),
    );
    const layers = there.map((layer) => {
      const press = { change: () => this.choose({ layer }) };
      return el(
        "label",
        {},
        el("input", { type: "radio", name, checked: layer === this.layer, on: press }),
        LAYERS[layer],
      );
    });
    const id = uniqueId("step");
    this.slider = el("input", { id, type: "range", min: 0, max: this.images.length - 1, step: 1, value: this.step });
    this.slider.addEventListener("input", () => this.choose({ step: this.slider.valueAsNumber }));
    this.stepText = el("output", { htmlFor: id });
    this.play = button("Play", () => this.run(), { class: "small" });
    this.hint = el("p", { class: "hint" });
    this.most = el("span");
    const ramp = el("span", { class: "ramp", vars: { "--ramp": GRADIENT } });
    this.scale = el("p", { class: "scale meta" }, "0", ramp, this.most);
    const controls = el(
      "div",
      { class: "stack" },
      el("fieldset", { class: "choices column" }, el("legend", {}, "Show"), layers),
      this.hint,
      this.scale,
      el(
        "div",
        { class: "field" },
        el("div", { class: "named" }, el("label", { htmlFor: id }, "Step"), this.stepText),
        this.slider,
      ),
      el("div", { class: "row" }, this.play),
      this.caption,
    );
    return el("div", { class: "beside" }, this.frame, controls);
  }

  blockButtons() {
    this.tiles = this.blocks.map((block, place) => {
      const canvas = el("canvas", { ...this.size, class: "pixelated", "aria-hidden": "true" });
      const experts = el("span", { class: "meta" });
      const press = () => this.choose({ block: this.block === place ? null : place });
      const text = el("span", {}, block.name, el("span", { class: "meta" }, ` ${block.height} × ${block.width}`));
      return {
        canvas,
        experts,
        node: el("button", { type: "button", class: "tile", on: { click: press } }, canvas, text, experts),
      };
    });
    const grid = el(
      "div",
      { class: "tiles", role: "group", "aria-label": "Blocks" },
      this.tiles.map(({ node }) => node),
    );
    return el(
      "section",
      {},
      el("h2", {}, "Block by block"),
      el("p", { class: "hint" }, "Press a block to see it large; again for the mean of all."),
      grid,
    );
  }

  expertTable() {
    const rows = this.blocks.flatMap((block, place) => (block.space ? [this.expertRow(block, place)] : []));
    if (!rows.length) return el("p", { class: "hint" }, "This model has no space experts.");
    return el(
      "section",
      {},
      el("h2", {}, "Experts of words"),
      el(
        "p",
        { class: "hint" },
        "Press an expert to see its words. A route follows from a word's encoding alone, not from the step.",
      ),
      el(
        "div",
        { class: "scrolled", tabindex: 0, role: "group", "aria-label": "Experts of words" },
        el("table", { class: "experts" }, rows),
      ),
    );
  }

  expertRow(block, place) {
    const cells = Array.from({ length: block.num_space }, (_, expert) => {
      const words = this.servedBy({ block: place, expert }).map((word) => this.told.words[word].text);
      const same = () => this.expert?.block === place && this.expert?.expert === expert;
      const press = () => this.choose({ expert: same() ? null : { block: place, expert } });
      const one = button("", press, { class: "expert", disabled: !words.length });
      one.append(
        el("span", { class: "unseen" }, `${block.name}, expert `),
        el("span", { class: "number" }, String(expert + 1)),
        el("span", { class: "unseen" }, ": "),
        el("span", {}, words.length ? words.join(" · ") : "–"),
      );
      one.show = () => one.setAttribute("aria-pressed", String(same()));
      this.expertButtons = [...(this.expertButtons ?? []), one];
      return el("td", {}, one);
    });
    return el("tr", {}, el("th", { scope: "row" }, block.name), cells);
  }

  timeTable() {
    const there = this.blocks.filter((block) => block.time);
    if (!there.length) return el("p", { class: "hint" }, "This model has no time experts.");
    this.timeCells = [];
    const rows = there.map((block) => {
      const cells = block.time.map((expert, step) => {
        const hue = Math.round((360 * expert) / block.num_time + 215) % 360;
        const cell = el("td", { vars: { "--hue": hue } }, String(expert + 1));
        (this.timeCells[step] ??= []).push(cell);
        return cell;
      });
      return el("tr", {}, el("th", { scope: "row" }, block.name), cells);
    });
    const head = el(
      "tr",
      {},
      el("th", { scope: "col" }, "Step"),
      this.told.steps.map(({ step }) => el("th", { scope: "col" }, String(step + 1))),
    );
    return el(
      "section",
      {},
      el("h2", {}, "Experts of steps"),
      el("p", { class: "hint" }, "Which time expert works on the whole image at each step."),
      el(
        "div",
        { class: "scrolled", tabindex: 0, role: "group", "aria-label": "Experts of steps" },
        el("table", { class: "times" }, el("thead", {}, head), el("tbody", {}, rows)),
      ),
    );
  }

  choose(some) {
    Object.assign(this, some);
    this.show();
  }

  show() {
    const all = this.blocks.map((_, place) => (this.layer === "none" ? null : this.mapOf(place)));
    const map = this.block === null ? meanOf(all) : all[this.block];
    const image = this.images[this.step];
    paintMap(this.main, image, map);
    const where = this.block === null ? "the mean of all blocks" : this.blocks[this.block].name;
    const what =
      this.layer === "edges" || this.layer === "none" ? LAYERS[this.layer] : `${LAYERS[this.layer]} of ${this.chosen}`;
    const { step, sigma } = this.told.steps[this.step];
    const seen = map
      ? `${what}, ${where}: mostly ${placeOf(map)}`
      : this.layer === "none"
        ? what
        : `${what}: not in ${where}`;
    this.main.setAttribute("aria-label", `${seen}; step ${step + 1}`);
    this.caption.textContent = `${seen}.`;
    this.scale.hidden = !map;
    this.most.textContent = map && (this.block === null || map.max === 1 ? "most" : map.max.toFixed(2));
    this.hint.textContent = TOLD[this.layer];
    this.slider.value = this.step;
    const noise = sigma === null ? "pure noise" : `noise σ ${sigma < 10 ? sigma.toFixed(2) : Math.round(sigma)}`;
    this.stepText.textContent = `${this.step + 1} of ${this.images.length}, ${noise}`;
    this.slider.setAttribute("aria-valuetext", this.stepText.textContent);
    this.showChoices(all, image);
  }

  showChoices(all, image) {
    const served = this.expert ? this.servedBy(this.expert) : [];
    this.words.forEach((node, word) => {
      node.setAttribute("aria-pressed", String(this.expert ? served.includes(word) : word === this.word));
    });
    this.tiles.forEach(({ canvas, experts, node }, place) => {
      paintMap(canvas, image, all[place]);
      node.setAttribute("aria-pressed", String(this.block === place));
      const own = this.expert ? [] : this.expertsOf(this.word, place);
      experts.textContent = own.length
        ? `expert ${own.map((one) => one + 1).join(", ")} of ${this.blocks[place].num_space}`
        : "";
    });
    for (const one of this.expertButtons ?? []) one.show();
    (this.timeCells ?? []).forEach((cells, step) => {
      for (const cell of cells) cell.classList.toggle("now", step === this.step);
    });
  }

  /** From the first step to the last, once. */
  run() {
    if (this.timer) return this.stop();
    fill(this.play, "Stop");
    this.choose({ step: 0 });
    this.timer = setInterval(() => {
      if (this.step + 1 >= this.images.length || !this.node.isConnected) this.stop();
      else this.choose({ step: this.step + 1 });
    }, PLAY_MS);
    return undefined;
  }

  stop() {
    clearInterval(this.timer);
    this.timer = 0;
    fill(this.play, "Play");
    say(this.caption.textContent);
  }
}
