// What the page knows: the models that the server has, and the settings that a drawing is made by.
// Settings live in the address behind the #, so that a link restores them all and Back goes back.

/** Each setting: how it is read from an address, and the name that the API gives it where it is sent. */
const SETTINGS = {
  model: { read: String },
  prompt: { read: String, sent: true },
  negative_prompt: { read: String, sent: true },
  seed: { read: Number, sent: true },
  locked: { read: (text) => text === "1" },
  n: { read: Number },
  sampler: { read: String, sent: true },
  num_inference_steps: { read: Number, sent: true },
  guidance_scale: { read: Number, sent: true },
  guidance_rescale: { read: Number, sent: true },
  eta: { read: Number, sent: true },
  long_prompts: { read: String },
  width: { read: Number },
  height: { read: Number },
};
const OTHERWISE = { negative_prompt: "", guidance_rescale: 0, eta: 0 }; // of a model that does not say
const SAMPLERS_WITH_ETA = ["ddim"];
export const LARGEST_SEED = Number.MAX_SAFE_INTEGER;

// colours: of painted phrases, [red, green, blue], the server's own
export const state = { models: [], limits: {}, colours: [], values: {}, view: "create", kind: null };
export const changes = new EventTarget(); // "settings": values changed; "place": another view or kind of edit

export function randomSeed() {
  return crypto.getRandomValues(new Uint32Array(1))[0] % 1_000_000; // short enough to be told on the telephone
}

/** A model by its id; without one that of the settings. Undefined for an id that the server does not have. */
export function modelOf(id = state.values.model) {
  return state.models.find((model) => model.id === id);
}

/** Settings as a model wants them where nobody says otherwise. */
export function defaultsOf(model) {
  const [height, width] = model.size;
  const example = model.examples?.[0] ?? { prompt: model.labels?.[0] ?? "" };
  return {
    model: model.id,
    prompt: example.prompt,
    seed: example.seed ?? 0,
    locked: false,
    n: 1,
    sampler: model.samplers[0],
    ...OTHERWISE,
    ...known(model.defaults ?? {}),
    width,
    height,
  };
}

/** Takes the server's answer to "which models". */
export function begin({ models, limits = {}, region_colours: colours }) {
  if (!models?.length) throw new Error("The server has no model.");
  state.models = models;
  state.limits = limits;
  state.colours = colours;
  readAddress();
}

/** Some settings changed. Another model brings its own sampling and size, and keeps prompt and seed. */
export function change(some) {
  const before = state.values;
  const own = modelOf(some.model);
  if (own && own.id !== before.model) {
    const { prompt, seed, locked, n, negative_prompt } = before;
    const words = own.labels ? {} : { prompt, negative_prompt };
    state.values = { ...defaultsOf(own), ...words, seed, locked, n };
  }
  state.values = { ...state.values, ...some };
  if (!SAMPLERS_WITH_ETA.includes(state.values.sampler)) state.values.eta = 0;
  writeAddress();
  changes.dispatchEvent(new Event("settings"));
}

export function hasEta(sampler) {
  return SAMPLERS_WITH_ETA.includes(sampler);
}

/** What is posted for one image of these settings. */
export function bodyOf(values) {
  const { width, height, long_prompts } = values;
  return { ...samplingOf(values), width, height, ...(long_prompts && { long_prompts }) };
}

/** The same where the model's own size is used: edits, and looks inside. */
export function samplingOf(values) {
  const body = { model: values.model };
  for (const [name, { sent }] of Object.entries(SETTINGS)) {
    const value = values[name];
    if (sent && value !== undefined && value !== null) body[name] = value;
  }
  return body;
}

/** Whether these are of the size that edits and looks inside use. */
export function hasOwnSize(values) {
  const [height, width] = modelOf(values.model)?.size ?? [];
  return values.height === height && values.width === width;
}

/** The whole address that restores these settings in a view. */
export function linkOf(values, view = "create", kind = null) {
  return `${location.href.split("#")[0]}${hashOf(values, view, kind)}`;
}

export function hashOf(values, view, kind = null) {
  const told = new URLSearchParams();
  for (const name of Object.keys(SETTINGS)) {
    const value = values[name];
    if (value === undefined || value === null || value === "" || value === false) continue;
    told.set(name, value === true ? "1" : String(value));
  }
  return `#/${kind ? `${view}/${kind}` : view}?${told}`;
}

/** Settings of an address; what it leaves out or has wrong is the model's own. */
export function parseHash(hash) {
  const [place, query = ""] = hash.replace(/^#\/?/, "").split("?");
  const [view, kind = null] = place.split("/");
  const values = {};
  for (const [name, text] of new URLSearchParams(query)) {
    const value = SETTINGS[name]?.read(text);
    if (value !== undefined && !Number.isNaN(value)) values[name] = value;
  }
  return { view, kind, values };
}

/** Goes to another view, with a new entry in the browser's history. */
export function go(view, kind = null, some = {}) {
  change(some);
  history.pushState(null, "", hashOf(state.values, view, kind));
  readAddress();
}

export function readAddress() {
  const { view, kind, values } = parseHash(location.hash);
  const model = modelOf(values.model) ?? modelOf() ?? state.models.find((one) => one.default) ?? state.models[0];
  const before = state.values.model === model.id ? state.values : defaultsOf(model);
  state.values = { ...before, ...values, model: model.id };
  state.view = ["create", "edit", "inside", "compare"].includes(view) ? view : "create";
  state.kind = kind;
  changes.dispatchEvent(new Event("place"));
  changes.dispatchEvent(new Event("settings"));
}

let writing = 0;

/** Not at every key: browsers refuse hundreds of changes of the address within seconds. */
function writeAddress() {
  clearTimeout(writing);
  writing = setTimeout(() => history.replaceState(null, "", hashOf(state.values, state.view, state.kind)), 200);
}

function known(some) {
  return Object.fromEntries(Object.entries(some).filter(([name]) => name in SETTINGS));
}
