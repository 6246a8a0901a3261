// The strip of film below a picture: its previews from noise to the end, and a slider to go through them.

import { byId, element } from "./words.js";

const film = byId("film");
const pictures = byId("film-pictures");
const slider = byId("film-step");

let shots = [];
let onShot = () => {};

export function hide() {
  film.hidden = true;
  shots = [];
  pictures.replaceChildren();
}

// Room for `count` shots of a picture that is being made; the slider waits for its end.
export function open(count) {
  hide();
  film.hidden = false;
  slider.hidden = true;
  for (let at = 0; at < count; at += 1) pictures.append(element("i"));
}

export function add(shot) {
  const picture = element("img");
  picture.alt = "";
  picture.src = shot.url;
  const place = pictures.children[shots.length];
  if (place) place.replaceWith(picture);
  else pictures.append(picture);
  shots.push(shot);
}

// A finished picture's shots; `choose` is called with each that is looked at.
export function show(all, numSteps, choose) {
  hide();
  if (all.length < 2) return;
  all.forEach(add);
  film.hidden = false;
  slider.hidden = false;
  slider.max = all.length - 1;
  slider.value = all.length - 1;
  onShot = choose;
  mark(numSteps);
  slider.oninput = () => {
    mark(numSteps);
    onShot(shots[slider.valueAsNumber]);
  };
}

function mark(numSteps) {
  const chosen = slider.valueAsNumber;
  [...pictures.children].forEach((picture, index) => picture.classList.toggle("on", index === chosen));
  slider.setAttribute("aria-valuetext", `step ${shots[chosen].step} of ${numSteps}${shots[chosen].isFlagged ? ", flagged by the safety checker" : ""}`);
}

pictures.addEventListener("click", (event) => {
  const index = [...pictures.children].indexOf(event.target);
  if (index < 0 || slider.hidden) return;
  slider.value = index;
  slider.dispatchEvent(new Event("input"));
});
