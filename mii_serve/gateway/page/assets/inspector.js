// All about one picture: what it was really made with, whether it was flagged, and the code that makes it again.

import { LANGUAGES } from "./code.js";
import { byId, element, fileName, heldBack, took } from "./words.js";

const HELD_BACK = {
  flagged:
    "The safety checker flagged this picture, so the server made it entirely black. Another seed or other words may give one that passes.",
  blocked:
    "Content safety blocked this picture, so the server made it entirely black. Another seed or other words may give one that passes.",
};

let code = {};
let language = "python";

const SHOWN = ["prompt", "num_images_per_prompt", "num_inference_steps", "guidance_scale", "scheduler", "width", "height", "seed", "negative_prompt"];

function facts(picture, place) {
  const { params } = picture;
  const isBlocked = picture.moderation_blocked;
  const checked = { true: "flagged", false: "passed" }[picture.nsfw_content_detected] ?? "this model has none";
  return [
    ["Steps", params.num_inference_steps],
    ["Guidance", params.guidance_scale],
    ["Scheduler", params.scheduler],
    ["Strength", params.strength],
    ["Mask", params.strength != null && params.has_mask && "painted parts only"],
    ["Size", `${params.width} × ${params.height}`],
    ["Seed", params.seed],
    ["Safety checker", isBlocked && checked === "passed" ? "" : checked], // the last word is not "passed" on a black picture
    ["Content safety", { true: "blocked", false: "passed" }[isBlocked]],
    ["Negative prompt", params.negative_prompt, "wide"],
    ...place.names.filter((name) => !SHOWN.includes(name)).map((name) => [name, params[name]]),
    ["Made by", params.engine && `${params.engine} ${params.dtype} on ${params.device}`],
    ["Took, and queued", picture.total_s == null ? "" : `${took(picture.total_s)}, ${took(picture.queued_s)}`],
  ].filter(([, value]) => value !== "" && value != null && value !== false);
}

function note(id, text) {
  byId(id).textContent = text;
  byId(id).hidden = text === "";
}

export function show(picture, place) {
  const { params } = picture;
  note("flagged", HELD_BACK[heldBack(picture)] ?? "");
  const dropped = [params.dropped_prompt, params.dropped_negative_prompt].filter(Boolean).join(" … ");
  note("dropped", dropped && `These words did not fit into the text encoder and were not used: ${dropped}`);
  byId("said").textContent = params.prompt;
  byId("parameters").replaceChildren(
    ...facts(picture, place).map(([name, value, className]) => {
      const row = element("div", className ?? "");
      row.append(element("dt", "", name), element("dd", "", String(value)));
      return row;
    }),
  );
  byId("files").hidden = picture.files.length === 0;
  byId("file-mask-part").hidden = picture.files.length < 2;
  for (const [name, url] of picture.files) byId(`file-${name}`).href = url;
  byId("download").href = picture.url;
  byId("download").download = fileName(params.prompt, params.seed);
  code = Object.fromEntries(Object.entries(LANGUAGES).map(([name, write]) => [name, write(params, place)]));
  choose(language);
}

function choose(name) {
  language = name;
  for (const tab of document.querySelectorAll('[role="tab"]')) {
    const isChosen = tab.id === `tab-${name}`;
    tab.setAttribute("aria-selected", String(isChosen));
    tab.tabIndex = isChosen ? 0 : -1;
  }
  byId("code-panel").setAttribute("aria-labelledby", `tab-${name}`);
  byId("code").textContent = code[name] ?? "";
}

// Over plain HTTP from another machine browsers have no clipboard for pages, only for selections.
async function copied(text) {
  try {
    await navigator.clipboard.writeText(text);
    return true;
  } catch {
    const range = document.createRange();
    range.selectNodeContents(byId("code"));
    getSelection().removeAllRanges();
    getSelection().addRange(range);
    return document.execCommand("copy");
  }
}

export function listen() {
  const tabs = [...document.querySelectorAll('[role="tab"]')];
  tabs.forEach((tab, index) => {
    tab.addEventListener("click", () => choose(tab.id.slice(4)));
    tab.addEventListener("keydown", (event) => {
      const move = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
      if (move === undefined) return;
      const next = tabs[(index + move + tabs.length) % tabs.length];
      choose(next.id.slice(4));
      next.focus();
    });
  });
  byId("copy").addEventListener("click", async () => {
    byId("copy").textContent = (await copied(code[language])) ? "Copied" : "Press Ctrl C";
    setTimeout(() => (byId("copy").textContent = "Copy"), 1600);
  });
}
