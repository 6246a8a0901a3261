// How numbers and names are said to people.

export function seconds(value) {
  if (value == null) return "";
  if (value < 0.95) return "under a second";
  if (value < 90) return `about ${Math.round(value)} s`;
  return `about ${Math.round(value / 60)} min`;
}

export function took(value) {
  return value < 10 ? `${value.toFixed(2)} s` : `${value.toFixed(1)} s`;
}

export function counted(count, one, many = `${one}s`) {
  return `${count} ${count === 1 ? one : many}`;
}

export function fileName(prompt, seed) {
  const words = prompt.toLowerCase().replace(/[^\p{L}\p{N}]+/gu, "-").replace(/^-+|-+$/g, "").slice(0, 40);
  return `${words || "picture"}-${seed}.png`;
}

// What became of a picture that is black on purpose; empty for any other.
export function heldBack(picture) {
  if (picture.moderation_blocked) return "blocked";
  return picture.nsfw_content_detected ? "flagged" : "";
}

// An element with its classes and text; text is only ever text here, never HTML.
export function element(name, className = "", text = "") {
  const made = document.createElement(name);
  if (className) made.className = className;
  if (text) made.textContent = text;
  return made;
}

export const byId = (id) => document.getElementById(id);
