"use strict";

const {steps, size} = data.pictures;
const SMALL = 200;  // pictures of a gallery that is shown at once
const read = {};

/** The pictures of an evaluation, read when they are first needed. */
const imagesOf = step => read[step] ??= JSON.parse(document.getElementById(`pictures-${step}`).textContent);

function picture(step, place, words) {
  const image = document.createElement("img");
  image.decoding = "async";
  image.src = imagesOf(step)[place];
  image.alt = `${data.prompts[place]}, ${words}`;
  image.draggable = false;
  return image;
}

function captioned(words) {
  const box = document.createElement("figure");
  const caption = document.createElement("figcaption");
  caption.textContent = words;
  return {box, caption};
}

/** Pairs of pictures of two evaluations, of which a slider shows more of the one or of the other. */
function showPairs() {
  const exact = Math.max(...size) <= 64;
  for (const id of ["pictures", "gallery"]) document.getElementById(id).classList.toggle("exact", exact);
  const [left, right, wipe, host] = ["left", "right", "wipe", "pairs"].map(id => document.getElementById(id));
  for (const choice of [left, right])
    for (const step of steps) choice.add(new Option(step === 0 ? "before" : `iteration ${step}`, step));
  left.value = steps[0];
  right.value = steps.at(-1);
  const words = choice => choice.selectedOptions[0].text;
  const place = () => {
    document.documentElement.style.setProperty("--wipe", `${wipe.value}%`);
    wipe.setAttribute("aria-valuetext", `${wipe.value} % ${words(left)}, ${100 - wipe.value} % ${words(right)}`);
  };
  const drag = event => {
    if (!event.buttons) return;
    const {left: edge, width} = event.currentTarget.getBoundingClientRect();
    wipe.value = Math.round(100 * (event.clientX - edge) / width);
    place();
  };
  const fill = () => {
    host.replaceChildren(...data.prompts.map((prompt, number) => {
      const {box, caption} = captioned(prompt), pair = document.createElement("div");
      pair.className = "pair";
      pair.style.aspectRatio = `${size[0]} / ${size[1]}`;
      pair.append(picture(left.value, number, words(left)), picture(right.value, number, words(right)));
      for (const kind of ["pointerdown", "pointermove"]) pair.addEventListener(kind, drag);
      box.append(pair, caption);
      return box;
    }));
    place();
  };
  for (const choice of [left, right]) choice.addEventListener("change", fill);
  wipe.addEventListener("input", place);
  fill();
}

/** A film of each prompt; a film is filled when it comes near to the screen. */
function showGallery() {
  const host = document.getElementById("rows");
  const fill = (film, place) => film.append(...steps.map(step => {
    const words = step === 0 ? "before" : `iteration ${step}`, {box, caption} = captioned(words);
    box.append(picture(step, place, words), caption);
    return box;
  }));
  const near = new IntersectionObserver(seen => seen.filter(entry => entry.isIntersecting).forEach(({target}) => {
    near.unobserve(target);
    fill(target, +target.dataset.place);
  }), {rootMargin: "300px"});
  data.prompts.forEach((prompt, place) => {
    const row = host.appendChild(document.createElement("div")), film = document.createElement("div");
    row.className = "row";
    row.appendChild(document.createElement("h3")).textContent = prompt;
    film.className = "film";
    film.dataset.place = place;
    film.tabIndex = 0;
    film.setAttribute("role", "group");
    film.setAttribute("aria-label", `${prompt}, by iteration`);
    row.append(film);
    if (steps.length * data.prompts.length <= SMALL) fill(film, place);
    else near.observe(film);
  });
}
