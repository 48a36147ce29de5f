// What was seen inside a network, as numbers: the server's bytes read back, maps of words, and how they are coloured.

/** {shape, max, data}: uint8 in base64, C order -> {shape, values: Float32Array in 0 .. max}; null of null. */
export function numbersOf(told) {
  if (!told) return null;
  const bytes = Uint8Array.from(atob(told.data), (letter) => letter.charCodeAt(0));
  return { shape: told.shape, values: Float32Array.from(bytes, (byte) => (byte / 255) * told.max) };
}

/** The blocks of `v1/inside`, arrays read: cross (S, N, h, w), masks (S, N, h, w), edges (S, h, w), or null. */
export function blocksOf(told) {
  return told.map((block) => ({
    ...block,
    cross: numbersOf(block.cross),
    masks: numbersOf(block.masks),
    edges: numbersOf(block.edges),
  }));
}

/**
 * A map of one block and step: {height, width, values, max}. layer: "cross": mean over the tokens; "masks": where any
 * token's region is; "edges": the block's own. max is that of all steps, to compare them. Null: it has none.
 */
export function mapOf(block, layer, step, tokens) {
  const all = block[layer];
  if (!all || (layer !== "edges" && !tokens.length)) return null;
  const area = block.height * block.width;
  const read = (at) => {
    if (layer === "edges") return all.values.slice(at * area, (at + 1) * area);
    const values = new Float32Array(area);
    for (const token of tokens) {
      const start = (at * all.shape[1] + token) * area;
      for (let place = 0; place < area; place += 1) {
        const value = all.values[start + place];
        values[place] = layer === "masks" ? Math.max(values[place], value) : values[place] + value / tokens.length;
      }
    }
    return values;
  };
  const most =
    layer === "cross" ? Math.max(...Array.from({ length: all.shape[0] }, (_, at) => Math.max(...read(at)))) : 1;
  return { height: block.height, width: block.width, values: read(step), max: most };
}

/** The mean of maps of several blocks, each enlarged to the largest pixel by pixel. Null of none. */
export function meanOf(maps) {
  const there = maps.filter(Boolean);
  if (!there.length) return null;
  const height = Math.max(...there.map((map) => map.height));
  const width = Math.max(...there.map((map) => map.width));
  const values = new Float32Array(height * width);
  for (const map of there) {
    for (let place = 0; place < values.length; place += 1) {
      const row = Math.floor((Math.floor(place / width) * map.height) / height);
      const column = Math.floor(((place % width) * map.width) / width);
      values[place] += map.values[row * map.width + column] / map.max / there.length || 0;
    }
  }
  return { height, width, values, max: Math.max(...values) || 1 };
}

/** Where a map is above its mean, in words: "top left", "middle". */
export function placeOf({ height, width, values }) {
  let [x, y, whole] = [0, 0, 0];
  const mean = values.reduce((sum, value) => sum + value, 0) / values.length;
  values.forEach((given, at) => {
    const value = Math.max(0, given - mean);
    x += value * ((at % width) + 0.5);
    y += value * (Math.floor(at / width) + 0.5);
    whole += value;
  });
  if (!whole) return "nowhere";
  const third = (share, names) => names[Math.min(2, Math.floor(share * 3))];
  const down = third(y / whole / height, ["top", "", "bottom"]);
  const across = third(x / whole / width, ["left", "", "right"]);
  return [down, across].filter(Boolean).join(" ") || "middle";
}

const RAMP = [
  [13, 8, 40],
  [92, 22, 110],
  [186, 54, 85],
  [249, 140, 20],
  [252, 250, 150],
]; // dark to light, equal steps to the eye

/** The ramp as CSS has it. */
export const GRADIENT = `linear-gradient(to right, ${RAMP.map((colour) => `rgb(${colour.join(" ")})`).join(", ")})`;

/** r, g, b of a share from 0 to 1. */
export function colourOf(share) {
  const at = Math.min(Math.max(share, 0), 1) * (RAMP.length - 1);
  const low = Math.min(Math.floor(at), RAMP.length - 2);
  return RAMP[low].map((value, part) => value + (RAMP[low + 1][part] - value) * (at - low));
}

/** Paints an image and a map over it. The image goes grey under a map, so that colours are the map's alone. */
export function paintMap(canvas, image, map) {
  const context = canvas.getContext("2d");
  context.drawImage(image, 0, 0, canvas.width, canvas.height);
  if (!map) return;
  const pixels = context.getImageData(0, 0, canvas.width, canvas.height);
  for (let at = 0; at < pixels.data.length; at += 4) {
    const place = at / 4;
    const row = Math.floor((Math.floor(place / canvas.width) * map.height) / canvas.height);
    const column = Math.floor(((place % canvas.width) * map.width) / canvas.width);
    const share = map.values[row * map.width + column] / (map.max || 1);
    const grey = 0.3 * pixels.data[at] + 0.59 * pixels.data[at + 1] + 0.11 * pixels.data[at + 2];
    const over = 0.55 + 0.4 * share;
    colourOf(share).forEach((value, part) => (pixels.data[at + part] = grey * (1 - over) + value * over));
  }
  context.putImageData(pixels, 0, 0);
}
