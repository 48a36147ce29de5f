// The page: the four views, which of them is shown, the model, and the door where the server asks for a token.

import { models, onTokenNeeded } from "./api.js";
import { button, el, fill, say } from "./dom.js";
import { images, openStore } from "./parts/store.js";
import { begin, change, changes, modelOf, readAddress, state } from "./state.js";
import { compareView } from "./views/compare.js";
import { createView } from "./views/create.js";
import { editView } from "./views/edit.js";
import { insideView } from "./views/inside.js";

const VIEWS = { create: createView, edit: editView, inside: insideView, compare: compareView };

const main = document.getElementById("main");
const made = {};
let shown = null;

/** The view that the address names; each is made when it is first seen, and keeps what is in it. */
function show(first = false) {
  made[state.view] ??= VIEWS[state.view]();
  const view = made[state.view];
  if (shown !== view) fill(main, el("h1", { class: "unseen" }, view.title), view.node);
  document.title = `${view.title} · RAPHAEL`;
  for (const link of document.querySelectorAll("[data-view]")) {
    const here = link.dataset.view === state.view;
    if (here) link.setAttribute("aria-current", "page");
    else link.removeAttribute("aria-current");
  }
  if (shown && shown !== view) {
    main.focus({ preventScroll: true });
    scrollTo(0, 0);
    say(view.title);
  }
  shown = view;
  view.show({ first });
}

function showModel() {
  const place = document.getElementById("model");
  const model = modelOf();
  if (state.models.length === 1) {
    if (place.textContent !== model.id) fill(place, el("span", { class: "meta" }, model.id));
    return;
  }
  if (!place.firstChild) {
    const select = el("select", { "aria-label": "Model", on: { change: () => chooseModel(select.value) } });
    for (const { id } of state.models) select.append(el("option", { value: id }, id));
    place.append(select);
  }
  place.firstChild.value = model.id;
}

function chooseModel(id) {
  change({ model: id });
  show();
}

let asking = null;

/** A dialog for the server's token; null when it is closed without one. Several requests share one dialog. */
function askToken(wasWrong) {
  asking ??= new Promise((resolve) => {
    const input = el("input", { id: "token", type: "password", autocomplete: "current-password", required: true });
    const form = el(
      "form",
      { class: "stack" },
      el("h2", {}, "This server asks for its token"),
      el(
        "p",
        { class: "hint" },
        wasWrong ? "That was another one." : "Whoever started it has it. It is kept until this tab closes.",
      ),
      el("label", { htmlFor: "token" }, "Token"),
      input,
      el(
        "div",
        { class: "row" },
        el("button", { type: "submit", class: "primary" }, "Go on"),
        button("Cancel", () => dialog.close()),
      ),
    );
    const dialog = el("dialog", { "aria-label": "Token" }, form);
    form.addEventListener("submit", (event) => {
      event.preventDefault();
      dialog.close(input.value);
    });
    dialog.addEventListener("close", () => {
      dialog.remove();
      asking = null;
      resolve(dialog.returnValue || null);
    });
    document.body.append(dialog);
    dialog.showModal();
  });
  return asking;
}

async function start() {
  onTokenNeeded(askToken);
  const linked = location.hash.includes("?");
  try {
    const [answer] = await Promise.all([models(), openStore()]);
    begin(answer);
  } catch (problem) {
    fill(
      main,
      el("p", { class: "notice", role: "alert" }, problem.message),
      button("Try again", () => location.reload()),
    );
    return;
  }
  changes.addEventListener("place", () => show());
  changes.addEventListener("settings", showModel);
  addEventListener("popstate", () => readAddress());
  showModel();
  show(!linked && !images.length);
}

start();
