// Inputs out of a table: a row says name, label, kind and bounds, and becomes a labelled field.

import { el, fill, uniqueId } from "../dom.js";

/**
 * A field: {name, node, get(), set(value), fail(text), focus()}; a field of factors has words(prompt), too.
 *
 * spec: {name, label, kind, hint?, min?, max?, step?, options?, rows?, unit?, optional?}; kinds are the keys of KINDS.
 * changed: told the new value when a person changes it. fail("") takes the message away again.
 */
export function field(spec, value, changed = () => {}) {
  const id = uniqueId(spec.name);
  const made = KINDS[spec.kind](spec, id, (given) => {
    fail("");
    changed(given);
  });
  const hint = spec.hint && el("p", { class: "hint", id: `${id}-hint` }, spec.hint);
  const fault = el("p", { class: "fault", id: `${id}-fault`, hidden: true });
  const node = el(
    made.group ? "fieldset" : "div",
    { class: `field ${spec.kind}`, "data-field": spec.name },
    made.group
      ? el("legend", {}, spec.label)
      : el("div", { class: "named" }, el("label", { htmlFor: id }, spec.label), made.output),
    made.node,
    hint,
    fault,
  );
  const inputs = made.group ? [] : [made.input];
  for (const input of inputs) input.setAttribute("aria-describedby", [hint?.id, fault.id].filter(Boolean).join(" "));

  function fail(text) {
    fault.textContent = text;
    fault.hidden = !text;
    for (const input of inputs) input.setAttribute("aria-invalid", String(Boolean(text)));
  }

  made.set(value);
  const { get, set, words } = made;
  return { name: spec.name, node, get, set, words, fail, focus: () => made.input.focus() };
}

/** Fields by name, and what they hold together. problem.field marks the one that is meant. */
export class Fields {
  constructor(specs, values, changed = () => {}) {
    this.fields = specs.map((spec) => field(spec, values[spec.name], (value) => changed(spec.name, value)));
    this.byName = new Map(this.fields.map((one) => [one.name, one]));
  }

  get nodes() {
    return this.fields.map((one) => one.node);
  }

  get values() {
    return Object.fromEntries(this.fields.map((one) => [one.name, one.get()]));
  }

  set(values) {
    for (const [name, value] of Object.entries(values)) this.byName.get(name)?.set(value);
  }

  /** Whether the problem is that of a field here. It then stands there. */
  show(problem) {
    const found = this.byName.get(problem.field?.split(/[.[]/)[0]);
    found?.fail(problem.message);
    found?.focus();
    return Boolean(found);
  }

  clear() {
    for (const one of this.fields) one.fail("");
  }
}

const KINDS = {
  text: (spec, id, changed) => simple(el("input", { id, type: "text", ...plain(spec) }), String, changed),
  number: (spec, id, changed) => simple(el("input", { id, type: "number", ...bounds(spec) }), numberOf, changed),
  area,
  range,
  choice,
  flag,
  list,
  margins,
  factors,
};

function area(spec, id, changed) {
  const input = el("textarea", { id, rows: spec.rows ?? 3, ...plain(spec) });
  input.addEventListener("keydown", (event) => {
    if (spec.many || event.key !== "Enter" || event.shiftKey || event.isComposing) return;
    event.preventDefault(); // a prompt is one line: Enter asks for it
    input.form?.requestSubmit();
  });
  return simple(input, String, changed);
}

function range(spec, id, changed) {
  const input = el("input", { id, type: "range", ...bounds(spec) });
  const output = el("output", { htmlFor: id });
  const shown = () => {
    output.textContent = spec.shown ? spec.shown(Number(input.value)) : `${input.value}${spec.unit ?? ""}`;
  };
  input.addEventListener("input", () => {
    shown();
    changed(Number(input.value));
  });
  const set = (value) => {
    input.value = value ?? spec.min ?? 0;
    shown();
  };
  return { node: input, input, output, get: () => Number(input.value), set };
}

function choice(spec, id, changed) {
  const input = el("select", { id, name: spec.name });
  for (const option of spec.options) {
    const { value, text } = typeof option === "string" ? { value: option, text: option } : option;
    input.append(el("option", { value }, text));
  }
  input.addEventListener("change", () => changed(input.value));
  return { node: input, input, get: () => input.value, set: (value) => (input.value = value ?? input.value) };
}

function flag(spec, id, changed) {
  const input = el("input", { id, type: "checkbox", name: spec.name });
  input.addEventListener("change", () => changed(input.checked));
  return { node: input, input, get: () => input.checked, set: (value) => (input.checked = Boolean(value)) };
}

/** Texts, one a line or between commas. */
function list(spec, id, changed) {
  const made = area({ ...spec, many: true, rows: spec.rows ?? 1 }, id, (text) => changed(texts(text)));
  return { ...made, get: () => texts(made.get()), set: (values) => made.set((values ?? []).join(", ")) };
}

/** Four numbers of px: top, right, bottom, left. */
function margins(spec, id, changed) {
  const inputs = ["Top", "Right", "Bottom", "Left"].map((side) =>
    el("input", {
      id: `${id}-${side}`,
      type: "number",
      min: 0,
      max: spec.max,
      step: spec.step,
      "aria-label": `${side}, px`,
    }),
  );
  const get = () => inputs.map((input) => Number(input.value));
  for (const input of inputs) input.addEventListener("input", () => changed(get()));
  const named = inputs.map((input) =>
    el("label", { htmlFor: input.id }, input.getAttribute("aria-label").split(",")[0], input),
  );
  const set = (values) => inputs.forEach((input, place) => (input.value = values?.[place] ?? 0));
  return { node: el("div", { class: "four" }, named), input: inputs[0], group: true, get, set };
}

/** A slider for each word of a prompt; its value is {word: factor} of those that are not 1. */
function factors(spec, id, changed) {
  const rows = el("div", { class: "factors" });
  let words = [];
  let values = {};
  const get = () => Object.fromEntries(words.filter((word) => values[word] !== 1).map((word) => [word, values[word]]));
  const show = (text) => {
    words = [...new Set(wordsOf(text))];
    values = Object.fromEntries(words.map((word) => [word, values[word] ?? 1]));
    const made = words.map((word) =>
      field({ ...spec, name: `${spec.name}-${word}`, label: word, kind: "range", hint: "" }, values[word], (value) => {
        values[word] = value;
        changed(get());
      }),
    );
    fill(
      rows,
      made.length ? made.map((one) => one.node) : el("p", { class: "hint" }, "Words of the prompt come here."),
    );
  };
  show("");
  const focusable = { focus: () => rows.querySelector("input")?.focus() };
  const set = (given) => {
    values = { ...values, ...given };
    show(words.join(" "));
  };
  return { node: rows, input: focusable, group: true, get, set, words: show };
}

/** A prompt's words apart from its punctuation, as the server counts them. */
export function wordsOf(text) {
  return text.match(/[\p{L}\p{N}]+|[^\s\p{L}\p{N}]/gu) ?? [];
}

function simple(input, read, changed) {
  input.addEventListener("input", () => changed(read(input.value)));
  return { node: input, input, get: () => read(input.value), set: (value) => (input.value = value ?? "") };
}

function plain(spec) {
  return { name: spec.name, maxlength: spec.max ?? null, placeholder: spec.placeholder ?? null, autocomplete: "off" };
}

function bounds(spec) {
  return { name: spec.name, min: spec.min ?? null, max: spec.max ?? null, step: spec.step ?? 1, inputmode: "decimal" };
}

function numberOf(text) {
  return text.trim() === "" ? null : Number(text);
}

function texts(text) {
  return text
    .split(/[,\n]/)
    .map((one) => one.trim())
    .filter(Boolean);
}
