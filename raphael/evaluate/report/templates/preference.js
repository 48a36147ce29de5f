// Two questions an item, one step each: step 2 i + q is question q of item i. Answers are sides, never models: the page
// does not know whose image is where.
"use strict";
const {study, questions, items} = JSON.parse(document.getElementById("content").textContent);
const names = questions.map(([name]) => name);
const last = items.length * names.length;
const keys = {ArrowLeft: "left", ArrowDown: "tie", ArrowRight: "right", 1: "left", 2: "tie", 3: "right"};
const $ = (id) => document.getElementById(id);
let rater = "", answers = [], seconds = [], at = 0, shown = -1, since = 0;

const store = {  // localStorage throws where a browser forbids it
  get(key) { try { return localStorage.getItem(key); } catch { return null; } },
  set(key, value) { try { localStorage.setItem(key, value); return true; } catch { return false; } },
};
const home = () => `raphael-preference:${study}:${rater}`;

function begin(name) {
  rater = name;
  const kept = JSON.parse(store.get(home()) || "{}");
  answers = kept.answers || [];
  seconds = kept.seconds || [];
  at = Math.min(kept.at || 0, last);
  store.set(`raphael-preference:${study}`, rater);
  show();
}

function answer(value) {
  if (at >= last) return;
  const item = Math.floor(at / names.length);
  const now = performance.now();
  seconds[item] = Math.round(((seconds[item] || 0) + (now - since) / 1000) * 10) / 10;  // step backs add up
  since = now;
  answers[at] = value;
  at += 1;
  keep();
  show();
}

function back() {
  if (at > 0) at -= 1;
  keep();
  show();
}

function keep() { store.set(home(), JSON.stringify({answers, seconds, at})); }

function show() {
  $("start").hidden = true;
  $("trial").hidden = at >= last;
  $("done").hidden = at < last;
  document.querySelector("#progress i").style.width = `${100 * at / last}%`;
  $("progress").setAttribute("aria-valuenow", at);
  $("progress").setAttribute("aria-valuemax", last);
  if (at >= last) {
    shown = -1;
    $("summary").textContent = `All ${items.length} answered. Save the results file and send it to whoever gave you this page.`;
    return;
  }
  const place = Math.floor(at / names.length), item = items[place];
  if (place !== shown) {
    shown = place;
    since = performance.now();
    $("place").textContent = `${place + 1} of ${items.length}`;
    $("prompt").textContent = item.prompt;
    for (const side of ["left", "right"]) fill($(side), item[side]);
    for (const next of items.slice(place + 1, place + 2)) for (const file of [...next.left, ...next.right]) new Image().src = file;
  }
  document.querySelectorAll("fieldset").forEach((field, q) => {
    field.classList.toggle("active", q === at % names.length);
    const given = answers[place * names.length + q];
    field.querySelectorAll("button").forEach((b) => b.setAttribute("aria-pressed", b.dataset.answer === given));
  });
  $("back").disabled = at === 0;
}

function fill(figure, files) {
  const columns = Math.ceil(Math.sqrt(files.length));
  figure.style.setProperty("--columns", columns);
  figure.style.setProperty("--rows", Math.ceil(files.length / columns));
  figure.replaceChildren(...files.map((file) => Object.assign(new Image(), {src: file, alt: "", draggable: false})));
}

function csv() {
  const quoted = (text) => `"${String(text ?? "").replaceAll('"', '""')}"`;
  const rows = items.map((item, i) => [study, rater, item.id, ...names.map((_, q) => answers[i * names.length + q]), seconds[i]]);
  const begun = rows.filter((row) => row.slice(3, 3 + names.length).some(Boolean));
  return [["study", "rater", "item", ...names, "seconds"], ...begun].map((row) => row.map(quoted).join(",")).join("\r\n") + "\r\n";
}

function save() {
  const url = URL.createObjectURL(new Blob([csv()], {type: "text/csv"}));
  const file = `preference-${study}-${rater.replace(/[^\p{L}\p{N}-]+/gu, "_")}.csv`;
  Object.assign(document.createElement("a"), {href: url, download: file}).click();
  setTimeout(() => URL.revokeObjectURL(url), 10000);
}

document.querySelector("form").addEventListener("submit", (event) => {
  event.preventDefault();
  const name = $("rater").value.trim();
  $("rater").blur();
  if (name) begin(name);
});
document.querySelectorAll("fieldset").forEach((field, q) => field.addEventListener("click", (event) => {
  const button = event.target.closest("button");
  if (!button) return;
  button.blur();  // or Enter and Space would press it again
  const step = Math.floor(at / names.length) * names.length + q;
  if (step <= at || answers[step - 1]) { at = step; answer(button.dataset.answer); }
}));
$("back").addEventListener("click", back);
$("return").addEventListener("click", back);
document.querySelectorAll("[data-save]").forEach((button) => button.addEventListener("click", save));
document.addEventListener("keydown", (event) => {
  // a held key would answer a hundred questions
  if (event.repeat || event.ctrlKey || event.metaKey || event.altKey || !$("start").hidden) return;
  if (event.key === "Backspace") { event.preventDefault(); back(); }
  else if (at >= last && event.key === "Enter" && event.target === document.body) save();
  else if (at < last && event.key in keys) { event.preventDefault(); answer(keys[event.key]); }
});
$("rater").value = store.get(`raphael-preference:${study}`) || "";
$("unkept").hidden = store.set("raphael-preference", "kept");
$("rater").focus();
