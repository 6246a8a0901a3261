// The live strip: how busy the server is, asked once a second while the page is visible.

import { ask } from "./server.js";
import { byId, element } from "./words.js";

const EVERY_MS = 1000;
const MAX_CELLS = 32;
const NUM_POINTS = 40;

let before = null;
const rates = [];

function showSlots(state) {
  byId("slots-text").textContent = `${state.num_running} of ${state.max_slots}`;
  const cells = byId("slots");
  const count = Math.min(state.max_slots, MAX_CELLS);
  while (cells.childElementCount > count) cells.lastChild.remove();
  while (cells.childElementCount < count) cells.append(element("i"));
  const filled = Math.ceil((state.num_running / Math.max(1, state.max_slots)) * count);
  [...cells.children].forEach((cell, index) => cell.classList.toggle("on", index < filled));
}

function showRate(state) {
  const passed = before === null ? 0 : state.uptime_s - before.uptime_s;
  if (before === null || passed < 0) before = state;
  if (passed <= 0) return;
  const rate = Math.max(0, state.num_steps - before.num_steps) / passed;
  before = state;
  rates.push(rate);
  if (rates.length > NUM_POINTS) rates.shift();
  byId("rate-text").textContent = rate < 10 ? rate.toFixed(1) : String(Math.round(rate));
  const top = Math.max(1, ...rates);
  const first = NUM_POINTS - rates.length;
  const points = rates.map((value, index) => `${first + index},${19 - 18 * (value / top)}`);
  byId("rate").firstElementChild.setAttribute("points", points.join(" "));
}

function showHealth(text, kind) {
  byId("health").textContent = text;
  byId("health").className = `health ${kind}`;
}

export function show(state) {
  showSlots(state);
  showRate(state);
  byId("waiting-text").textContent = String(state.num_waiting);
  const { num_replicas: all, num_replicas_ready: ready } = state;
  if (all > 1) showHealth(`${ready} of ${all} replicas`, ready === all ? "good" : "bad");
  else showHealth("ready", "good");
}

export async function follow(onKeyWanted) {
  for (;;) {
    if (!document.hidden) {
      try {
        show(await ask("/ui/state"));
      } catch (error) {
        if (error.status === 401) {
          showHealth("wants a key", "bad");
          await onKeyWanted();
          continue;
        }
        showHealth(error.status === 503 ? "not ready" : "out of reach", "bad");
      }
    }
    await new Promise((resolve) => setTimeout(resolve, EVERY_MS));
  }
}
