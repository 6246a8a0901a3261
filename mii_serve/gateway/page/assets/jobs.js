// The caller's batch jobs, where the server keeps any: how far each is, cancelling, and what it has put out.

import * as server from "./server.js";
import { byId, counted, element } from "./words.js";

const OPEN_MS = 2000; // while a job is open
const IDLE_MS = 15000;
const CANCELLABLE = ["validating", "in_progress"];
const STATUS = {
  validating: "checking the input",
  in_progress: "running",
  finalizing: "finishing",
  cancelling: "being cancelled",
};

const list = byId("jobs");
const shown = new Map(); // by id: the elements of a job, so that what has the focus keeps it
let say = () => {};

function made(job) {
  const place = element("li", "job");
  const top = element("div", "pair");
  const name = element("h3");
  const status = element("p", "quiet");
  top.append(name, status);
  const bar = element("progress");
  const text = element("p", "quiet");
  const problem = element("p", "error");
  const actions = element("div", "actions");
  const cancel = element("button", "plain small", "Cancel");
  cancel.type = "button";
  cancel.addEventListener("click", () => stop(job.id));
  actions.append(cancel);
  place.append(top, bar, text, problem, actions);
  return { place, name, status, bar, text, problem, actions, cancel, files: [], last: job };
}

function show(one, job) {
  const title = job.name || job.id.slice(0, 18);
  one.name.textContent = title;
  const when = new Date(1000 * job.created_at).toLocaleString();
  one.status.textContent = `${STATUS[job.status] ?? job.status} · ${when}`;
  one.bar.hidden = !job.is_open;
  one.bar.max = Math.max(1, job.total);
  one.bar.value = job.completed + job.failed;
  one.bar.setAttribute("aria-label", `Progress of ${title}`);
  const failed = job.failed ? `, ${job.failed} failed` : "";
  one.text.textContent = job.total ? `${job.completed} of ${counted(job.total, "row")} made${failed}` : "";
  one.problem.textContent = job.problem;
  one.cancel.hidden = !CANCELLABLE.includes(job.status);
  one.cancel.setAttribute("aria-label", `Cancel ${title}`);
  if (one.files.join() !== job.files.map((file) => file.id).join()) {
    one.files = job.files.map((file) => file.id);
    one.actions.replaceChildren(one.cancel, ...job.files.map((file) => link(file, title)));
  }
  if (one.last.is_open && !job.is_open) say(`Batch job ${title}: ${job.status}.`);
  one.last = job;
}

// A link cannot send the key that a server wants; then the program that is shown instead can.
function link(file, title) {
  const path = `/v1/files/${file.id}/content`;
  if (server.hasKey()) {
    const command = `curl -o ${file.name} -H "authorization: Bearer $MII_SERVE_API_KEY" ${location.origin}${path}`;
    const box = element("details", "job-file");
    const code = element("code", "", command);
    code.tabIndex = 0;
    box.append(element("summary", "quiet", `Download ${file.kind}`), code);
    return box;
  }
  const made = element("a", "button plain small", `Download ${file.kind}`);
  made.href = path;
  made.download = file.name;
  made.setAttribute("aria-label", `Download ${file.kind} of ${title}`);
  return made;
}

async function stop(id) {
  try {
    await server.post(`/v1/batches/${id}/cancel`);
    await ask();
  } catch (error) {
    byId("jobs-error").textContent = error.message;
  }
}

async function ask() {
  const { jobs, num_jobs: count } = await server.ask("/ui/jobs");
  byId("jobs-error").textContent = "";
  byId("jobs-count").textContent = count ? String(count) : "";
  byId("jobs-empty").hidden = count > 0;
  const ids = new Set(jobs.map((job) => job.id));
  for (const [id, one] of shown) {
    if (ids.has(id)) continue;
    one.place.remove();
    shown.delete(id);
  }
  jobs.forEach((job, index) => {
    if (!shown.has(job.id)) {
      const one = made(job);
      shown.set(job.id, one);
      list.insertBefore(one.place, list.children[index] ?? null);
    }
    show(shown.get(job.id), job);
  });
  return jobs.some((job) => job.is_open);
}

export async function follow(announce) {
  say = announce;
  byId("jobs-card").hidden = false;
  for (;;) {
    let isOpen = false;
    if (!document.hidden) {
      try {
        isOpen = await ask();
      } catch (error) {
        byId("jobs-error").textContent = error.message;
      }
    }
    await new Promise((resolve) => setTimeout(resolve, isOpen ? OPEN_MS : IDLE_MS));
  }
}
