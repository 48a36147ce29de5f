// the film of sample grids: one frame at a time under a slider; without script all frames stand in a row
for (const film of document.querySelectorAll("[data-film]")) {
  const frames = [...film.children];
  if (frames.length < 2) continue;
  const slider = Object.assign(document.createElement("input"), {type: "range", min: 0, max: frames.length - 1, value: frames.length - 1});
  slider.setAttribute("aria-label", "images seen");
  slider.addEventListener("input", () => frames.forEach((frame, i) => frame.classList.toggle("on", i === +slider.value)));
  film.classList.add("live");
  film.after(slider);
}
