// Elements without markup: whatever a person or a server wrote becomes text or an attribute, never HTML.

const PROPERTIES = new Set(["value", "checked", "disabled", "hidden", "selected", "indeterminate", "htmlFor"]);

let counter = 0;

/** An id that no other element has. */
export function uniqueId(name) {
  counter += 1;
  return `${name}-${counter}`;
}

/**
 * An element. `on`: listeners by event; `vars`: CSS custom properties; other options are attributes, where null and
 * false leave one out. Children are nodes or text; null and false are left out.
 */
export function el(tag, { on = {}, vars = {}, ...attributes } = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (PROPERTIES.has(name)) node[name] = value;
    else if (value !== null && value !== false && value !== undefined)
      node.setAttribute(name, value === true ? "" : value);
  }
  for (const [name, value] of Object.entries(vars)) node.style.setProperty(name, value);
  for (const [name, listener] of Object.entries(on)) node.addEventListener(name, listener);
  node.append(...present(children));
  return node;
}

/** Children of an element exchanged for others. */
export function fill(node, ...children) {
  node.replaceChildren(...present(children));
  return node;
}

export function button(text, onClick, attributes = {}) {
  return el("button", { type: "button", on: { click: onClick }, ...attributes }, text);
}

/** Says a thing to those who listen instead of looking; each call replaces what was said before. */
export function say(text) {
  document.getElementById("status").textContent = text;
}

function present(children) {
  return children.flat(Infinity).filter((child) => child !== null && child !== undefined && child !== false);
}
