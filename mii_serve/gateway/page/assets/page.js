// The page: one request at a time, from the form to the gallery.

import * as form from "./form.js";
import * as gallery from "./gallery.js";
import * as start from "./image.js";
import * as inspector from "./inspector.js";
import * as jobs from "./jobs.js";
import * as server from "./server.js";
import * as stage from "./stage.js";
import { follow } from "./strip.js";
import { byId, counted, heldBack, seconds, took } from "./words.js";

const AGAIN_MS = 2000;
const TITLE = document.title;
const FLAGGED_PREVIEW = "The safety checker flagged this preview, so it is black. The finished picture is looked at by itself.";

let info = null;
let running = null; // what is known of the request that runs
let shown = null;

const place = () => ({
  http: location.origin,
  grpc: `${location.hostname}:${info.grpc_port ?? 50050}`,
  isTls: location.protocol === "https:",
  wantsKey: server.hasKey(),
  model: info.model,
  names: info.parameters.map((parameter) => parameter.name),
});

function say(text) {
  byId("live").textContent = text;
}

function sides(name) {
  for (const id of ["welcome", "running", "inspector"]) byId(id).hidden = id !== name;
}

// ---- the key -------------------------------------------------------------------------------------------------------

let keyGiven = null; // resolved when one has been typed
const whenKeyGiven = Promise.withResolvers ? () => Promise.withResolvers() : () => {
  const made = {};
  made.promise = new Promise((resolve) => (made.resolve = resolve));
  return made;
};

function wantKey() {
  if (keyGiven === null) {
    keyGiven = whenKeyGiven();
    byId("key-error").textContent = server.hasKey() ? "The server does not know this key." : "";
    byId("key-form").hidden = false;
    byId("key").focus();
  }
  return keyGiven.promise;
}

byId("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  const key = byId("key").value.trim();
  if (key === "") return;
  if (!/^[\x21-\x7e]+$/.test(key)) {
    byId("key-error").textContent = "A key has letters, digits and signs of ASCII only.";
    return;
  }
  server.rememberKey(key);
  byId("key").value = "";
  byId("key-form").hidden = true;
  keyGiven?.resolve();
  keyGiven = null;
});

// ---- what the server is ------------------------------------------------------------------------------------------

async function learn() {
  while (info === null) {
    try {
      info = await server.ask("/ui/info");
    } catch (error) {
      if (error.status === 401) await wantKey();
      else {
        byId("model").textContent = error.status === 503 ? "the server is loading its model…" : "the server does not answer…";
        await new Promise((resolve) => setTimeout(resolve, AGAIN_MS));
      }
    }
  }
  byId("model").textContent = `${info.model} · ${info.engine} ${info.dtype} on ${info.device}`;
  byId("facts").textContent = info.has_safety_checker
    ? "A safety checker looks at every picture."
    : "This server runs without a safety checker.";
  form.fill(info);
  if (info.has_jobs) jobs.follow(say);
  if (running === null && shown === null) stage.idle(info.defaults.width, info.defaults.height);
}

// ---- one request -----------------------------------------------------------------------------------------------------

function progress() {
  const parts = running.parts;
  const all = parts.reduce((sum, part) => sum + part.numSteps, 0);
  const made = parts.reduce((sum, part) => sum + part.step, 0);
  byId("count-step").textContent = String(made);
  byId("count-of").textContent = all ? `of ${counted(all, "step")}` : "";
  byId("progress").value = all ? made / all : 0;
  document.title = all ? `${made}/${all} · ${TITLE}` : TITLE;
  const quarter = all ? Math.floor((4 * made) / all) : 0;
  if (quarter > running.quarter && quarter < 4) {
    running.quarter = quarter;
    say(`${quarter * 25} percent`);
  }
}

const onEvent = {
  queued({ num_samples_ahead: ahead, estimated_wait_s: wait }) {
    if (running.isStarted) return;
    const text = ahead ? `${counted(ahead, "picture")} ahead` : "next";
    byId("where").textContent = wait ? `${text}, starts in ${seconds(wait)}` : text;
    byId("left").textContent = "Queued";
    say(`Queued: ${byId("where").textContent}`);
  },
  started({ image_index: index }) {
    running.isStarted = true;
    stage.started(index);
    const waiting = running.parts.length - (running.numStarted += 1);
    byId("where").textContent = waiting > 0 ? `${counted(waiting, "picture")} still queued` : "";
    if (running.numStarted === 1) byId("left").textContent = "Drawing";
  },
  step({ image_index: index, step, num_steps: numSteps, estimated_left_s: left }) {
    const part = running.parts[index];
    Object.assign(part, { step, numSteps, left });
    for (const other of running.parts) other.numSteps ||= numSteps;
    stage.stepped(index, step, numSteps);
    const longest = Math.max(...running.parts.map((one) => one.left ?? 0));
    byId("left").textContent = step < numSteps && longest > 0 ? `${seconds(longest)} left` : "Finishing";
    progress();
  },
  preview({ image_index: index, step, png, nsfw_content_detected: isFlagged }) {
    stage.previewed(index, step, server.pngUrl(png), isFlagged === true);
    if (!isFlagged && !running.hasFlaggedPreview) return;
    byId("where").textContent = isFlagged ? FLAGGED_PREVIEW : "\u00a0";
    if (isFlagged && !running.hasFlaggedPreview) say(FLAGGED_PREVIEW);
    running.hasFlaggedPreview = true;
  },
  image({ image_index: index, png, ...image }) {
    const { preview_every: _, num_images_per_prompt: __, ...asked } = running.request;
    const params = { ...asked, seed: image.seed, width: image.width, height: image.height };
    const files = Object.entries(running.files ?? {}).map(([name, file]) => [name, URL.createObjectURL(file)]);
    const picture = { ...image, url: server.pngUrl(png), params, files, shots: null, numSteps: 0 };
    running.pictures[index] = picture;
    stage.finished(index, picture, choose);
    gallery.hang(picture, choose);
  },
  restarted({ image_indexes: indexes }) {
    for (const index of indexes) running.parts[index].step = 0;
    stage.restarted(indexes);
    progress();
    byId("where").textContent = "A replica was lost; its part is made again.";
    say(byId("where").textContent);
  },
  done({ parameters, queued_s, total_s }) {
    for (const picture of running.pictures) {
      picture.params = { ...parameters, seed: picture.seed, num_images_per_prompt: 1 };
      Object.assign(picture, { queued_s, total_s });
    }
    const held = running.pictures.map(heldBack);
    const texts = { flagged: "flagged by the safety checker", blocked: "blocked by content safety" };
    const ends = Object.entries(texts).map(([name, words]) => [held.filter((one) => one === name).length, words]);
    const end = ends.filter(([count]) => count).map(([count, words]) => ` ${counted(count, "picture")} ${words}.`).join("");
    say(`Finished: ${counted(running.pictures.length, "picture")} in ${took(total_s)}.${end}`);
  },
};

function choose(picture) {
  if (running !== null) return;
  for (const one of byId("gallery").children) one.firstElementChild.classList.remove("fresh");
  shown = picture;
  stage.show(picture);
  gallery.mark(picture);
  inspector.show(picture, place());
  byId("seed-reuse").disabled = false;
  byId("use-image").disabled = heldBack(picture) !== "";
  sides("inspector");
}

function busy(is) {
  byId("generate").setAttribute("aria-disabled", String(is));
  byId("generate").textContent = is ? "Drawing…" : "Generate";
  byId("cancel").hidden = !is;
  if (!is) document.title = TITLE;
}

function begin(request) {
  const count = Math.min(64, Math.max(1, Number(request.num_images_per_prompt) || 1));
  running = {
    request,
    stop: new AbortController(),
    files: null,
    parts: Array.from({ length: count }, () => ({ step: 0, numSteps: 0, left: null })),
    pictures: [],
    isStarted: false,
    isShown: false,
    hasFlaggedPreview: false,
    numStarted: 0,
    quarter: 0,
  };
  busy(true);
}

// The stage changes only once the server has taken the request: what it refuses leaves the last picture where it is.
function showRunning() {
  running.isShown = true;
  const { request } = running;
  stage.begin(request, Number(request.width) || info.defaults.width, Number(request.height) || info.defaults.height);
  byId("asked").textContent = request.prompt;
  for (const id of ["left", "where"]) byId(id).textContent = "\u00a0";
  progress();
  gallery.mark(null);
  sides("running");
  if (matchMedia("(max-width: 820px)").matches) byId("stage-title").parentElement.scrollIntoView({ block: "start" });
}

async function run() {
  if (running !== null || info === null) return;
  form.clearErrors();
  begin(form.read());
  const { stop, pictures } = running;
  let failure = null;
  try {
    running.files = await start.files();
    await server.generate(running.request, running.files, stop.signal, (name, value) => {
      if (!running.isShown) showRunning();
      onEvent[name]?.(value);
    });
  } catch (error) {
    failure = error;
  }
  const { isShown } = running;
  running = null;
  busy(false);
  if (failure !== null) explain(failure, stop.signal.aborted, isShown);
  const first = pictures.find(Boolean);
  if (failure === null && first) choose(first);
}

function explain(failure, isCancelled, isShown) {
  if (isShown) {
    stage.ended(isCancelled ? "cancelled" : "not finished");
    shown = null;
    byId("seed-reuse").disabled = true;
    sides("welcome");
  }
  if (isCancelled) {
    say("Cancelled.");
    byId("generate").focus();
  } else if (failure.status === 401) wantKey();
  else if (failure instanceof server.ServerError) form.showError(failure);
  else form.showError({ field: null, message: "The server does not answer.", retryAfter: null });
}

const cancel = () => running?.stop.abort();

byId("form").addEventListener("submit", (event) => {
  event.preventDefault();
  run();
});
byId("cancel").addEventListener("click", cancel);
byId("cancel-here").addEventListener("click", cancel);
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") cancel();
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey) && event.target.form === byId("form")) {
    event.preventDefault();
    run();
  }
});
byId("seed-random").addEventListener("click", () => (byId("seed").value = ""));
byId("seed-reuse").addEventListener("click", () => (byId("seed").value = shown.params.seed));
byId("reuse-all").addEventListener("click", () => {
  form.apply(shown.params);
  byId("prompt").focus();
});

byId("use-image").addEventListener("click", async () => {
  await start.take(shown.url, `${shown.params.prompt}, seed ${shown.params.seed}`);
  byId("start").scrollIntoView({ block: "nearest" });
  byId("mask-paint").focus();
});

form.listen(say);
inspector.listen();
stage.idle(512, 512);
learn();
follow(wantKey);
