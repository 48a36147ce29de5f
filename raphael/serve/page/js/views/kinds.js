// The table of edits. `fields` carry the API's names; forms, checks and requests are made from here and nowhere else.
// needs: "image" (one to begin from), "maybe image", "mask" (painted over it), "regions" (painted for phrases).
// against: what a result is shown over first, where that is not its source.

import { promptSpec } from "../parts/sampling.js";

const share = (name, label, hint) => ({ name, label, kind: "range", min: 0, max: 1, step: 0.05, shown: percent, hint });
const several = (n, hint) => ({
  name: "n",
  label: "Images",
  kind: "range",
  min: n,
  max: "n",
  start: Math.max(n, 4),
  hint,
});

const STAYS = share("cross", "Layout kept", "Share of the steps that look where the source looked.");
const BLEND = {
  name: "blend",
  label: "Change only at these words",
  kind: "list",
  optional: true,
  placeholder: "red, green",
};

export const KINDS = [
  {
    id: "inpaint",
    title: "Inpaint",
    group: "An image",
    text: "Paint over a part: it is generated anew. Say what the whole shall show; to remove a thing, all but it.",
    needs: ["image", "mask"],
    fields: [{ name: "feather", label: "Soft edge, px", kind: "range", min: 0, max: 16, start: 4 }],
  },
  {
    id: "outpaint",
    title: "Outpaint",
    group: "An image",
    text: "Generates what lies around an image.",
    needs: ["image"],
    fields: [{ name: "margins", label: "Added, px", kind: "margins", start: [0, 16, 0, 16], max: 512, step: "px" }],
  },
  {
    id: "image",
    title: "From an image",
    group: "An image",
    text: "The image, noised and generated again as the prompt says.",
    needs: ["image"],
    fields: [{ ...share("strength", "Strength", "0 % keeps the image, 100 % the prompt alone."), start: 0.6 }],
  },
  {
    id: "reconstruct",
    title: "Invert",
    group: "An image",
    text: "Finds the noise that an image comes from, and generates it again: how edits of real images begin.",
    needs: ["image"],
    fields: [],
  },
  {
    id: "replace",
    title: "Replace words",
    group: "Words",
    text: "Words exchanged one for one; the layout stays.",
    needs: ["maybe image"],
    prompt: "a red heart on white",
    fields: [
      { name: "target", label: "Prompt after the edit", kind: "prompt", start: "a green heart on white" },
      { ...STAYS, start: 1, hint: `${STAYS.hint} All for another colour, fewer for another shape.` },
      BLEND,
    ],
  },
  {
    id: "refine",
    title: "Add words",
    group: "Words",
    text: "Words added or taken away; the layout stays.",
    needs: ["maybe image"],
    prompt: "a red heart on white",
    fields: [
      { name: "target", label: "Prompt after the edit", kind: "prompt", start: "a striped red heart on white" },
      { ...STAYS, start: 0.8 },
      BLEND,
    ],
  },
  {
    id: "reweight",
    title: "Weigh words",
    group: "Words",
    text: "Words of a prompt, louder or softer.",
    needs: [],
    fields: [
      {
        name: "words",
        label: "Weight of each word",
        kind: "factors",
        min: -2,
        max: 4,
        step: 0.25,
        shown: (x) => `× ${x}`,
      },
    ],
  },
  {
    id: "switch",
    title: "Switch the prompt",
    group: "Words",
    text: "One prompt for the first steps, another for the rest.",
    needs: [],
    prompt: "a red circle on a blue background",
    fields: [
      {
        name: "then",
        label: "Prompt of the later steps",
        kind: "prompt",
        start: "a yellow star on a green background",
      },
      { ...share("share", "Switching point", "Share of the steps that see the first prompt."), start: 0.3 },
    ],
  },
  {
    id: "paint",
    title: "Paint with words",
    group: "Words",
    text: "Paint where phrases of the prompt shall be.",
    needs: ["regions"],
    prompt: "a red circle and a blue star on white",
    phrases: ["red circle", "blue star"],
    against: "without",
    fields: [
      {
        name: "weight",
        label: "Weight",
        kind: "range",
        min: 0,
        max: 2,
        step: 0.05,
        start: 0.5,
        hint: "0 is no painting.",
      },
      {
        name: "away",
        label: "Less elsewhere",
        kind: "range",
        min: 0,
        max: 3,
        step: 0.1,
        start: 1,
        hint: "How much less a phrase is looked at outside of its region.",
      },
      {
        name: "arrange",
        label: "Noise arranged, steps",
        kind: "range",
        min: 0,
        max: 10,
        start: 3,
        hint: "Of 12 arrangements of the seed's noise the one that fits is taken, after so many steps; 0: none.",
      },
    ],
  },
  {
    id: "vary",
    title: "Vary",
    group: "Ways between",
    text: "Images like the seed's own.",
    needs: [],
    fields: [
      { ...share("strength", "Distance", "0 % is the image itself, 100 % another one."), start: 0.3 },
      several(1),
    ],
  },
  {
    id: "interpolate",
    title: "Interpolate",
    group: "Ways between",
    text: "Images on the way from one prompt to another.",
    needs: [],
    prompt: "a red circle on blue",
    fields: [
      { name: "to", label: "The other prompt", kind: "prompt", start: "a yellow star on green" },
      several(2, "Both ends are among them."),
    ],
  },
  {
    id: "styles",
    title: "Styles",
    group: "Ways between",
    text: "One prompt and one seed in every style.",
    needs: [],
    prompt: "a yellow heart on white",
    fields: [
      {
        name: "styles",
        label: "Styles, with commas between",
        kind: "list",
        rows: 2,
        start: ["pixel art", "outline drawing", "ink drawing"],
      },
    ],
  },
];

/** The fields of a kind for a model: bounds that are words become its numbers, further prompts its kind of prompt. */
export function fieldsOf(kind, model, limits) {
  const numbers = { n: Math.min(limits.n ?? 4, 8), px: model.multiple_px ?? 8 };
  return kind.fields.map((spec) => {
    if (spec.kind === "prompt") return { ...spec, ...promptSpec(model, spec.name, spec.label) };
    return { ...spec, max: numbers[spec.max] ?? spec.max, step: numbers[spec.step] ?? spec.step };
  });
}

/** Where the fields of a kind begin: a further prompt as its example beside the example prompt, else as the prompt. */
export function startOf(kind, model, prompt) {
  const isExample = !model.labels && prompt === kind.prompt;
  const start = ({ kind: type, start: given }) => (type === "prompt" && !isExample ? prompt : given);
  return Object.fromEntries(kind.fields.map((spec) => [spec.name, start(spec)]));
}

/** Whether a prompt is one of the page's own, which another kind of edit may exchange for its own. */
export function isExamplePrompt(prompt, model) {
  return [...KINDS, ...(model.examples ?? [])].some((one) => one.prompt === prompt);
}

/** What a kind's fields hold, as the API takes it: what is optional and empty is left out. */
export function bodyOfFields(kind, values) {
  const body = {};
  for (const { name, optional } of kind.fields) {
    const value = values[name];
    const empty = value === "" || value === null || (Array.isArray(value) && !value.length);
    if (!(optional && empty)) body[name] = value;
  }
  return body;
}

function percent(value) {
  return `${Math.round(value * 100)} %`;
}
