// The form: filled from the parameters' declarations, read as it stands. Only the server checks the rules; its errors go to their fields.

import * as image from "./image.js";
import { byId, element } from "./words.js";

let parameters = []; // as the server declares them
const NUM_PREVIEWS = 20;

const EXAMPLES = {
  demo: ["a red circle on a blue background", "a yellow star above a green house", "two white hearts on a black background"],
  other: ["a photograph of an astronaut riding a horse", "a lighthouse in a storm, oil painting", "a fox in the snow, golden hour"],
};

export function fill(info) {
  const { defaults, limits } = info;
  parameters = info.parameters;
  image.fill(info);
  for (const parameter of parameters) {
    if (byId(parameter.name) === null) addControl(parameter);
    const input = byId(parameter.name);
    if (input.type !== "number") continue;
    if (parameter.least !== null) [input.min, input.max] = [parameter.least, parameter.most];
    if (!input.value && parameter.default !== null) input.value = parameter.default;
  }
  const schedulers = byId("scheduler");
  const chosen = schedulers.value || defaults.scheduler;
  schedulers.replaceChildren(...info.schedulers.map((name) => new Option(name, name)));
  schedulers.value = chosen;
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

// A control for a parameter that the page knows only from its declaration.
function addControl({ name, type, help, multiple_of: step }) {
  const words = name.replaceAll("_", " ");
  const label = element("label", "", words[0].toUpperCase() + words.slice(1));
  label.htmlFor = name;
  const input = element("input");
  input.id = input.name = name;
  input.type = type === "string" ? "text" : "number";
  input.step = step ?? (type === "integer" ? 1 : "any");
  input.title = help;
  input.autocomplete = "off";
  input.setAttribute("aria-describedby", `${name}-error`);
  const error = element("p", "error");
  error.id = `${name}-error`;
  const field = element("div", "field");
  field.append(label, input, error);
  byId("more-fields").append(field);
  byId("more").hidden = false;
}

const SLIDES = { num_inference_steps: "steps-slide", guidance_scale: "guidance-slide" };

function follow(name) {
  byId(SLIDES[name]).value = byId(name).value;
}

export function listen(say) {
  for (const [name, slide] of Object.entries(SLIDES)) {
    byId(slide).addEventListener("input", () => {
      byId(name).value = byId(slide).value;
      clearError(name);
    });
    byId(name).addEventListener("input", () => follow(name));
  }
  byId("form").addEventListener("input", (event) => event.target.name && clearError(event.target.name));
  image.listen(say, (width, height) => {
    [byId("width").value, byId("height").value] = [width, height];
    for (const name of ["width", "height"]) clearError(name);
  });
}

// What was typed, as it was typed: a field that is not a number goes out as text, and the server says so.
export function read() {
  const request = {};
  const declared = parameters.map(({ name, type }) => [byId(name), name, type]);
  const strength = image.strength();
  for (const [input, name, type] of strength === null ? declared : [...declared, [strength, "strength", "number"]]) {
    if (input.validity.badInput) {
      request[name] = "not a number";
      continue;
    }
    const text = type === "string" ? input.value : input.value.trim();
    if (name !== "prompt" && text === "") continue;
    request[name] = input.type === "number" ? Number(text) : text;
  }
  const steps = Number(request.num_inference_steps);
  request.preview_every = steps >= 1 && steps <= 1000 ? Math.ceil(steps / NUM_PREVIEWS) : 1;
  return request;
}

export function apply(params) {
  image.apply(params);
  for (const { name } of parameters) {
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
  for (const { name } of parameters) clearError(name);
  image.clearErrors();
  byId("form-error").textContent = "";
}

const labelOf = (name) => byId(name).labels[0].firstChild.textContent.trim();

export function showError(error) {
  if (image.FIELDS.includes(error.field)) {
    image.showError(error);
    return;
  }
  if (parameters.some(({ name }) => name === error.field)) {
    byId(`${error.field}-error`).textContent = `${labelOf(error.field)} ${error.rule}`;
    const input = byId(error.field);
    input.setAttribute("aria-invalid", "true");
    input.closest("details")?.setAttribute("open", "");
    input.focus();
    return;
  }
  const again = error.retryAfter ? ` It is worth another try in ${Math.max(1, Math.round(error.retryAfter))} s.` : "";
  byId("form-error").textContent = error.message + again;
}
