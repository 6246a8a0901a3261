// The pictures of this session, newest first. They live in this tab only.

import { byId, element, heldBack } from "./words.js";

const MAX_PICTURES = 120;
const SMALL_PX = 256;

const list = byId("gallery");
const hanging = []; // newest first

export function hang(picture, onChosen) {
  const button = element("button", "fresh");
  button.type = "button";
  button.setAttribute("aria-pressed", "false");
  const image = element("img", Math.max(picture.width, picture.height) <= SMALL_PX ? "tiny" : "");
  image.src = picture.url;
  image.alt = picture.params.prompt;
  button.append(image);
  if (heldBack(picture)) button.append(element("span", "", heldBack(picture)));
  button.addEventListener("click", () => onChosen(picture));
  const place = element("li");
  place.append(button);
  list.prepend(place);
  hanging.unshift({ picture, button, place });
  while (hanging.length > MAX_PICTURES) {
    const oldest = hanging.pop();
    oldest.place.remove();
    for (const url of [oldest.picture.url, ...oldest.picture.files.map(([, url]) => url)]) URL.revokeObjectURL(url);
  }
  byId("gallery-empty").hidden = true;
  byId("gallery-count").textContent = String(hanging.length);
}

export function mark(picture) {
  for (const one of hanging) one.button.setAttribute("aria-pressed", String(one.picture === picture));
}
