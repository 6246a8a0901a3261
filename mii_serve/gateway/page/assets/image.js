// The image that a request starts from, its mask and its strength: chosen, dropped, pasted, or a finished picture.

import * as brush from "./brush.js";
import { byId } from "./words.js";

const STRENGTH = { whole: "0.8", masked: "1" }; // the server's own defaults
const [LEAST_PX, MOST_PX] = [256, 400]; // how wide it is shown at least, and how high at most
const GROUND = "#fff"; // what is transparent is put on it

let limits = null;
let needsMask = false; // the model repaints a part of an image, and does nothing else
let isChosen = false;
let isStrengthTheUsers = false;
let onSize = () => {};

export function fill(info) {
  limits = info.limits;
  needsMask = info.needs_mask;
  if (needsMask) byId("start-hint").textContent = "this model repaints a part of one";
}

// Names of fields beside the declared parameters that an error of the server may name.
export const FIELDS = ["image", "mask_image", "strength"];

export function clearErrors() {
  for (const name of FIELDS) byId(`${name}-error`).textContent = "";
  for (const id of ["image-file", "strength"]) byId(id).removeAttribute("aria-invalid");
}

export function showError({ field, rule }) {
  const label = { image: "The image", mask_image: "The mask", strength: "Strength" }[field];
  byId(`${field}-error`).textContent = `${label} ${rule}`;
  const input = byId(isChosen ? { strength: "strength", mask_image: "mask-paint" }[field] ?? "image-file" : "image-file");
  if (input.type !== "button") input.setAttribute("aria-invalid", "true");
  input.focus();
}

// ---- choosing --------------------------------------------------------------------------------------------------------

// Both sides within the model's range, multiples of 8, in the proportions of the image as far as that goes.
function fitted(width, height) {
  const { min_size_px: least, max_size_px: most } = limits;
  const scale = Math.min(Math.max(1, least / Math.min(width, height)), most / Math.max(width, height));
  return [width, height].map((side) => Math.max(least, Math.floor((side * scale) / 8) * 8));
}

// The browser decodes it: turned as its EXIF says, on a white ground, with 8 bits a channel. What it shows is what is sent.
async function load(url) {
  const image = new Image();
  image.src = url;
  await image.decode();
  const { naturalWidth: width, naturalHeight: height } = image;
  const scale = Math.min(1, limits.max_size_px / Math.max(width, height));
  const canvas = byId("image-shown");
  [canvas.width, canvas.height] = [width, height].map((side) => Math.max(1, Math.round(side * scale)));
  const context = canvas.getContext("2d");
  context.fillStyle = GROUND;
  context.fillRect(0, 0, canvas.width, canvas.height);
  context.drawImage(image, 0, 0, canvas.width, canvas.height);
  return fitted(canvas.width, canvas.height);
}

export async function take(url, name) {
  clearErrors();
  let size;
  try {
    size = await load(url);
  } catch {
    showError({ field: "image", rule: `cannot be read by this browser (${name})` });
    return;
  }
  isChosen = true;
  isStrengthTheUsers = false;
  setStrength(needsMask ? STRENGTH.masked : STRENGTH.whole);
  const shown = byId("image-shown");
  shown.setAttribute("aria-label", `The image to start from: ${name}`);
  shown.classList.toggle("tiny", Math.max(shown.width, shown.height) <= LEAST_PX);
  shown.style.width = `${Math.min((MOST_PX * shown.width) / shown.height, Math.max(shown.width, LEAST_PX))}px`;
  brush.begin(shown.width, shown.height, needsMask);
  byId("start-chosen").hidden = false;
  onSize(...size);
}

async function takeFile(file) {
  const url = URL.createObjectURL(file);
  await take(url, file.name || "a pasted image");
  URL.revokeObjectURL(url);
}

export function remove() {
  isChosen = false;
  byId("image-file").value = "";
  byId("start-chosen").hidden = true;
  brush.end();
  clearErrors();
}

const imageOf = (data) => [...(data?.files ?? [])].find((file) => file.type.startsWith("image/"));

// ---- the request -----------------------------------------------------------------------------------------------------

function setStrength(text) {
  byId("strength").value = byId("strength-slide").value = text;
}

const blobOf = (canvas) => new Promise((resolve) => canvas.toBlob(resolve, "image/png"));

// Of a picture whose settings are used again, if there is an image.
export function apply(params) {
  if (!isChosen || params.strength == null) return;
  isStrengthTheUsers = true;
  setStrength(String(params.strength));
}

export const strength = () => (isChosen ? byId("strength") : null);

// The files of a request as it stands, by their names; null without an image.
export async function files() {
  if (!isChosen) return null;
  const made = { image: await blobOf(byId("image-shown")) };
  const mask = brush.mask();
  if (mask !== null) made.mask_image = await blobOf(mask);
  return made;
}

// `say` is called with what happens, `size` with the width and the height that go with an image.
export function listen(say, size) {
  onSize = (width, height) => {
    size(width, height);
    say("The image is the start of the next picture.");
  };
  byId("image-file").addEventListener("change", ({ target }) => target.files[0] && takeFile(target.files[0]));
  byId("image-remove").addEventListener("click", () => {
    remove();
    byId("image-file").focus();
  });
  byId("strength").addEventListener("input", () => {
    isStrengthTheUsers = true;
    byId("strength-slide").value = byId("strength").value;
  });
  byId("strength-slide").addEventListener("input", () => {
    isStrengthTheUsers = true;
    byId("strength").value = byId("strength-slide").value;
    byId("strength-error").textContent = "";
  });
  brush.listen((isMasked) => {
    if (!isStrengthTheUsers) setStrength(isMasked || needsMask ? STRENGTH.masked : STRENGTH.whole);
  });
  document.addEventListener("paste", (event) => {
    const file = imageOf(event.clipboardData);
    if (!file || limits === null || event.clipboardData.types.includes("text/plain")) return; // text goes where the cursor is
    event.preventDefault();
    takeFile(file);
  });
  const start = byId("start");
  document.addEventListener("dragover", (event) => {
    if (!event.dataTransfer?.types.includes("Files")) return;
    event.preventDefault(); // otherwise the browser leaves the page for the file
    start.classList.add("over");
  });
  for (const name of ["dragleave", "drop"]) document.addEventListener(name, () => start.classList.remove("over"));
  document.addEventListener("drop", (event) => {
    if (!event.dataTransfer?.types.includes("Files")) return;
    event.preventDefault();
    const file = imageOf(event.dataTransfer);
    if (file && limits !== null) takeFile(file);
    else showError({ field: "image", rule: "must be an image file" });
  });
}
