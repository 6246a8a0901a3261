// The form: filled from the server's defaults, read as it stands. The server alone knows the rules; its errors go to their fields.

import { byId, element } from "./words.js";

const FIELDS = [
  "prompt",
  "negative_prompt",
  "num_inference_steps",
  "guidance_scale",
  "seed",
  "width",
  "height",
  "num_images_per_prompt",
  "scheduler",
];
const NUMBERS = new Set(["num_inference_steps", "guidance_scale", "width", "height", "num_images_per_prompt"]);
const NUM_PREVIEWS = 20;

const EXAMPLES = {
  demo: ["a red circle on a blue background", "a yellow star above a green house", "two white hearts on a black background"],
  other: ["a photograph of an astronaut riding a horse", "a lighthouse in a storm, oil painting", "a fox in the snow, golden hour"],
};

export function fill(info) {
  const { defaults, limits } = info;
  for (const name of ["num_inference_steps", "guidance_scale", "width", "height"]) {
    const input = byId(name);
    if (!input.value) input.value = defaults[name];
  }
  const schedulers = byId("scheduler");
  const chosen = schedulers.value || defaults.scheduler;
  schedulers.replaceChildren(...info.schedulers.map((name) => new Option(name, name)));
  schedulers.value = chosen;
  byId("num_inference_steps").min = 1;
  byId("num_inference_steps").max = limits.max_num_inference_steps;
  byId("guidance_scale").min = 0;
  byId("guidance_scale").max = limits.max_guidance_scale;
  for (const name of ["width", "height"]) {
    byId(name).min = limits.min_size_px;
    byId(name).max = limits.max_size_px;
  }
  byId("num_images_per_prompt").max = limits.max_images_per_prompt;
  byId("steps-slide").max = Math.min(100, limits.max_num_inference_steps);
  byId("guidance-slide").max = Math.min(20, limits.max_guidance_scale);
  follow("num_inference_steps");
  follow("guidance_scale");
  const examples = info.model === "demo" ? EXAMPLES.demo : EXAMPLES.other;
  byId("examples").replaceChildren(
    ...examples.map((text) => {
      const chip = element("button", "", text);
      chip.type = "button";
      chip.addEventListener("click", () => {
        byId("prompt").value = text;
        byId("prompt").focus();
      });
      return chip;
    }),
  );
}

const SLIDES = { num_inference_steps: "steps-slide", guidance_scale: "guidance-slide" };

function follow(name) {
  byId(SLIDES[name]).value = byId(name).value;
}

export function pairSliders() {
  for (const [name, slide] of Object.entries(SLIDES)) {
    byId(slide).addEventListener("input", () => {
      byId(name).value = byId(slide).value;
      clearError(name);
    });
    byId(name).addEventListener("input", () => follow(name));
  }
  for (const name of FIELDS) byId(name).addEventListener("input", () => clearError(name));
}

// What was typed, as it was typed: a field that is not a number goes out as text, and the server says so.
export function read() {
  const request = {};
  for (const name of FIELDS) {
    const input = byId(name);
    if (input.validity.badInput) {
      request[name] = "not a number";
      continue;
    }
    const text = name === "prompt" || name === "negative_prompt" ? input.value : input.value.trim();
    if (name !== "prompt" && text === "") continue;
    request[name] = NUMBERS.has(name) ? Number(text) : text;
  }
  const steps = Number(request.num_inference_steps);
  request.preview_every = steps >= 1 && steps <= 1000 ? Math.ceil(steps / NUM_PREVIEWS) : 1;
  return request;
}

export function apply(params) {
  for (const name of FIELDS) {
    byId(name).value = name === "num_images_per_prompt" ? 1 : params[name] ?? "";
    clearError(name);
  }
  follow("num_inference_steps");
  follow("guidance_scale");
}

function clearError(name) {
  byId(name).removeAttribute("aria-invalid");
  byId(`${name}-error`).textContent = "";
}

export function clearErrors() {
  FIELDS.forEach(clearError);
  byId("form-error").textContent = "";
}

const labelOf = (name) => byId(name).labels[0].firstChild.textContent.trim();

export function showError(error) {
  if (FIELDS.includes(error.field)) {
    byId(`${error.field}-error`).textContent = `${labelOf(error.field)} ${error.rule}`;
    const input = byId(error.field);
    input.setAttribute("aria-invalid", "true");
    input.focus();
    return;
  }
  const again = error.retryAfter ? ` It is worth another try in ${Math.max(1, Math.round(error.retryAfter))} s.` : "";
  byId("form-error").textContent = error.message + again;
}
