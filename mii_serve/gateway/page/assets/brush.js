// The mask: painted with a pointer or the keyboard. In a colour on nothing while it is painted, white on black when it is sent.

import { byId } from "./words.js";

const COLOUR = "#ff4d00";
const STEPS = 24; // of the arrow keys, across the longer side

const canvas = byId("mask");
const ring = byId("brush");
const context = canvas.getContext("2d", { willReadFrequently: true });

let at = null; // where the brush is, in pixels of the image
let isDown = false;
let isEmpty = true;
let onChange = () => {};

const isErasing = () => byId("mask-erase").getAttribute("aria-pressed") === "true";
const radius = () => (Number(byId("brush-size").value) / 100) * Math.max(canvas.width, canvas.height) * 0.5;

export function begin(width, height, isPainting) {
  [canvas.width, canvas.height] = [width, height];
  at = [width / 2, height / 2];
  isEmpty = true;
  setPainting(isPainting);
}

export function end() {
  isEmpty = true;
  setPainting(false);
}

// The mask as a canvas, white where the image is repainted; null where nothing is painted.
export function mask() {
  if (isEmpty || !context.getImageData(0, 0, canvas.width, canvas.height).data.some((value, i) => i % 4 === 3 && value > 127)) return null;
  const made = document.createElement("canvas");
  [made.width, made.height] = [canvas.width, canvas.height];
  const drawn = made.getContext("2d");
  drawn.drawImage(canvas, 0, 0);
  for (const [operation, colour] of [["source-in", "#fff"], ["destination-over", "#000"]]) {
    drawn.globalCompositeOperation = operation;
    drawn.fillStyle = colour;
    drawn.fillRect(0, 0, made.width, made.height);
  }
  return made;
}

function setPainting(is) {
  byId("mask-paint").setAttribute("aria-pressed", String(is));
  byId("mask-erase").setAttribute("aria-pressed", "false");
  for (const id of ["mask-erase", "brush-size-field"]) byId(id).hidden = !is;
  canvas.classList.toggle("still", !is);
  canvas.tabIndex = is ? 0 : -1;
  ring.hidden = true;
  show();
}

function show() {
  canvas.hidden = isEmpty && byId("mask-paint").getAttribute("aria-pressed") === "false";
  byId("mask-clear").hidden = isEmpty;
}

function paint(from, to) {
  context.globalCompositeOperation = isErasing() ? "destination-out" : "source-over";
  context.strokeStyle = COLOUR;
  context.lineCap = context.lineJoin = "round";
  context.lineWidth = Math.max(1, 2 * radius());
  context.beginPath();
  context.moveTo(...from);
  context.lineTo(to[0] + 0.01, to[1]); // a line of no length is not drawn
  context.stroke();
  const wasEmpty = isEmpty;
  if (!isErasing()) isEmpty = false;
  if (wasEmpty !== isEmpty) onChange(!isEmpty);
  show();
}

function clear() {
  context.clearRect(0, 0, canvas.width, canvas.height);
  isEmpty = true;
  onChange(false);
  show();
}

function moveRing() {
  ring.hidden = false;
  ring.style.left = `${(100 * at[0]) / canvas.width}%`;
  ring.style.top = `${(100 * at[1]) / canvas.height}%`;
  ring.style.width = `${(200 * radius()) / canvas.width}%`;
}

function pointed({ clientX, clientY }) {
  const box = canvas.getBoundingClientRect();
  return [((clientX - box.left) / box.width) * canvas.width, ((clientY - box.top) / box.height) * canvas.height];
}

function typed(event) {
  const step = Math.max(canvas.width, canvas.height) / STEPS;
  const move = { ArrowLeft: [-step, 0], ArrowRight: [step, 0], ArrowUp: [0, -step], ArrowDown: [0, step] }[event.key];
  if (event.key !== " " && move === undefined) return;
  event.preventDefault();
  const before = at;
  if (move) at = [0, 1].map((i) => Math.min([canvas.width, canvas.height][i], Math.max(0, at[i] + move[i])));
  if (event.key === " " || event.shiftKey) paint(before, at);
  moveRing();
}

// `changed` is called with whether there is a mask, whenever that changes.
export function listen(changed) {
  onChange = changed;
  canvas.addEventListener("pointerdown", (event) => {
    if (event.button !== 0) return;
    canvas.setPointerCapture(event.pointerId);
    isDown = true;
    at = pointed(event);
    paint(at, at);
  });
  canvas.addEventListener("pointermove", (event) => {
    const before = at;
    at = pointed(event);
    if (isDown) paint(before, at);
    moveRing();
  });
  for (const name of ["pointerup", "pointercancel"]) canvas.addEventListener(name, () => (isDown = false));
  for (const name of ["pointerleave", "blur"]) canvas.addEventListener(name, () => (ring.hidden = true));
  canvas.addEventListener("focus", moveRing);
  canvas.addEventListener("keydown", typed);
  byId("mask-paint").addEventListener("click", () => {
    const isPainting = byId("mask-paint").getAttribute("aria-pressed") === "true";
    setPainting(!isPainting);
    if (!isPainting) canvas.focus();
  });
  byId("mask-erase").addEventListener("click", () => byId("mask-erase").setAttribute("aria-pressed", String(!isErasing())));
  byId("mask-clear").addEventListener("click", () => {
    clear();
    byId("mask-paint").focus();
  });
}
