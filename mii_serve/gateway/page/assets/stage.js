// The frames: noise at first, previews while a request runs, the finished pictures, or one picture of the gallery.

import * as film from "./film.js";
import { noise } from "./noise.js";
import { byId, element, heldBack } from "./words.js";

const SMALL_PX = 256;
const NUM_GRAINS = 64;
const FLAGGED_PREVIEW = "preview flagged";

const frames = byId("frames");

let made = []; // one per image of the running request: its element, and what was seen of it
let salt = 1;

function frame(width, height, { name = "div", clears = false } = {}) {
  const box = element(name, "frame");
  if (name === "button") box.type = "button";
  box.style.setProperty("--shape", `${width} / ${height}`);
  box.classList.toggle("tiny", Math.max(width, height) <= SMALL_PX);
  const bar = element("span", "bar");
  const tag = element("span", "tag");
  const scale = NUM_GRAINS / Math.max(width, height, 1);
  const grain = noise(Math.ceil(width * scale) || 1, Math.ceil(height * scale) || 1, salt, clears);
  salt += 1;
  box.append(grain, bar, tag);
  return { box, bar, tag, picture: null };
}

function put(seen, url, alt) {
  if (seen.picture === null) {
    seen.picture = element("img");
    seen.box.querySelector("canvas")?.replaceWith(seen.picture);
  }
  seen.picture.alt = alt;
  seen.picture.src = url;
}

function lay(count) {
  frames.classList.toggle("many", count > 1);
  frames.style.setProperty("--columns", Math.ceil(Math.sqrt(count)));
}

export function idle(width, height) {
  salt = 1;
  lay(1);
  frames.replaceChildren(frame(width, height, { clears: true }).box);
  film.hide();
}

export function begin(request, width, height) {
  forget();
  const count = Math.min(64, Math.max(1, Number(request.num_images_per_prompt) || 1));
  lay(count);
  made = Array.from({ length: count }, () => ({
    ...frame(width, height, { name: count > 1 ? "button" : "div" }),
    prompt: request.prompt,
    every: request.preview_every,
    shots: [],
    isOver: false,
    result: null,
  }));
  for (const seen of made) {
    seen.tag.textContent = "queued";
    if (count > 1) seen.box.disabled = true;
  }
  frames.replaceChildren(...made.map((seen) => seen.box));
  film.hide();
}

export function started(index) {
  made[index].tag.textContent = "starting";
}

export function restarted(indexes) {
  for (const index of indexes) {
    const seen = made[index];
    seen.box.style.setProperty("--part", 0);
    seen.tag.textContent = "again from the start";
    seen.shots.forEach((shot) => URL.revokeObjectURL(shot.url));
    seen.shots = [];
    if (index === 0) film.hide();
  }
}

export function stepped(index, step, numSteps) {
  const seen = made[index];
  if (seen.isOver) return;
  if (index === 0 && made.length === 1 && byId("film").hidden) film.open(Math.floor(numSteps / seen.every) + 1);
  seen.numSteps = numSteps;
  seen.box.style.setProperty("--part", step / numSteps);
  const count = made.length > 1 ? `${step} / ${numSteps}` : "";
  seen.tag.textContent = [count, seen.shots.at(-1)?.isFlagged ? FLAGGED_PREVIEW : ""].filter(Boolean).join(" · ");
}

export function previewed(index, step, url, isFlagged) {
  const seen = made[index];
  if (seen.isOver) {
    URL.revokeObjectURL(url);
    return;
  }
  const shot = { step, url, isFlagged };
  put(seen, url, altOfPreview(seen.prompt, shot));
  seen.shots.push(shot);
  if (isFlagged) seen.tag.textContent = FLAGGED_PREVIEW;
  if (made.length === 1) film.add(seen.shots.at(-1));
}

// The picture takes its shots with it; they are kept until the next request begins.
export function finished(index, picture, onChosen) {
  const seen = made[index];
  seen.isOver = true;
  seen.result = picture;
  put(seen, picture.url, picture.params.prompt);
  seen.box.classList.add("done");
  seen.bar.remove();
  seen.tag.textContent = heldBack(picture);
  picture.numSteps = seen.numSteps ?? 0;
  picture.shots = [...seen.shots, { step: picture.numSteps, url: picture.url }];
  if (made.length > 1) {
    seen.box.disabled = false;
    seen.box.addEventListener("click", () => onChosen(picture));
  }
}

export function ended(text) {
  for (const seen of made.filter((one) => !one.isOver)) {
    seen.box.classList.add("ended");
    seen.tag.textContent = text;
  }
}

// One picture large, or, where it is one of the frames that hang there, that frame marked.
export function show(picture) {
  const index = made.findIndex((seen) => seen.picture !== null && seen.isOver && seen.picture.src === picture.url && seen.box.isConnected);
  if (index >= 0 && made.length > 1) {
    made.forEach((seen, at) => seen.box.classList.toggle("chosen", at === index));
    film.show(picture.shots, picture.numSteps, (shot) => look(made[index], picture, shot));
    return;
  }
  const one = frame(picture.width, picture.height);
  one.bar.remove();
  one.tag.textContent = heldBack(picture);
  put(one, picture.url, picture.params.prompt);
  lay(1);
  frames.replaceChildren(one.box);
  if (picture.shots === null || heldBack(picture)) film.hide();
  else film.show(picture.shots, picture.numSteps, (shot) => look(one, picture, shot));
}

function look(at, picture, shot) {
  const isPicture = shot.url === picture.url;
  put(at, shot.url, isPicture ? picture.params.prompt : altOfPreview(picture.params.prompt, shot));
  at.tag.textContent = isPicture ? heldBack(picture) : shot.isFlagged ? FLAGGED_PREVIEW : "";
}

function altOfPreview(prompt, shot) {
  return `${prompt} (unfinished, step ${shot.step}${shot.isFlagged ? ", black: flagged by the safety checker" : ""})`;
}

// The previews of the last request go; its pictures stay in the gallery, without their film.
function forget() {
  for (const seen of made) {
    for (const shot of seen.shots) URL.revokeObjectURL(shot.url);
    if (seen.result) seen.result.shots = null;
  }
  made = [];
}
