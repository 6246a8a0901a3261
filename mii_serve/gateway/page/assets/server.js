// The server's calls. The API key, where one is wanted, lives in this tab's session storage and goes out as a header only.

const KEY = "mii_serve.api_key";

export class ServerError extends Error {
  constructor(error, status) {
    super(error.message);
    this.status = status;
    this.code = error.code;
    this.field = error.field ?? null;
    this.rule = error.rule ?? error.message;
    this.retryAfter = error.retry_after_s ?? null;
  }
}

export function rememberKey(key) {
  if (key) sessionStorage.setItem(KEY, key);
  else sessionStorage.removeItem(KEY);
}

export const hasKey = () => sessionStorage.getItem(KEY) !== null;

function headers(more = {}) {
  const key = sessionStorage.getItem(KEY);
  return key === null ? more : { ...more, authorization: `Bearer ${key}` };
}

async function refused(answer) {
  let error = { code: "UNKNOWN", message: `the server answered ${answer.status}` };
  try {
    error = (await answer.json()).error ?? error;
  } catch {
    // not ours: a proxy in between has answered
  }
  return new ServerError(error, answer.status);
}

export async function ask(path) {
  const answer = await fetch(path, { headers: headers(), signal: AbortSignal.timeout(15000) });
  if (!answer.ok) throw await refused(answer);
  return answer.json();
}

export async function post(path) {
  const answer = await fetch(path, { method: "POST", headers: headers(), signal: AbortSignal.timeout(15000) });
  if (!answer.ok) throw await refused(answer);
  return answer.json();
}

// JSON alone, or a form with it and the files of a request that starts from an image.
function bodyOf(request, files) {
  const json = JSON.stringify(request);
  if (files === null) return { headers: headers({ "content-type": "application/json" }), body: json };
  const body = new FormData();
  body.append("request", json);
  for (const [name, file] of Object.entries(files)) body.append(name, file, `${name}.png`);
  return { headers: headers({ "x-mii-page": "1" }), body };
}

// Calls `tell(name, value)` for every event. Aborting the signal closes the connection, and that cancels the work.
export async function generate(request, files, signal, tell) {
  const answer = await fetch("/ui/generate", { method: "POST", ...bodyOf(request, files), signal });
  if (!answer.ok) throw await refused(answer);
  let isDone = false;
  for await (const [name, value] of events(answer.body)) {
    if (name === "error") throw new ServerError(value, 200);
    tell(name, value);
    isDone = name === "done";
  }
  if (!isDone) throw new ServerError({ code: "UNAVAILABLE", message: "the connection to the server was lost" }, 0);
}

// Server-Sent Events as they come out of a stream of bytes, cut anywhere.
async function* events(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let parts = [];
  try {
    for (;;) {
      const { done, value } = await reader.read();
      if (done) return;
      // Only the newest piece is searched, so that a picture in a hundred pieces is not searched a hundred times.
      const seam = (parts.at(-1) ?? "").slice(-1);
      if (!(seam + value).includes("\n\n")) {
        parts.push(value);
        continue;
      }
      const blocks = (parts.join("") + value).split("\n\n");
      parts = [blocks.pop()];
      for (const block of blocks) {
        const event = parsed(block);
        if (event !== null) yield event;
      }
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}

function parsed(block) {
  let name = "";
  let data = "";
  for (const line of block.split("\n")) {
    if (line.startsWith("event: ")) name = line.slice(7);
    else if (line.startsWith("data: ")) data += line.slice(6);
  }
  return name ? [name, JSON.parse(data)] : null;
}

export function pngUrl(base64) {
  const bytes = Uint8Array.from(atob(base64), (character) => character.charCodeAt(0));
  return URL.createObjectURL(new Blob([bytes], { type: "image/png" }));
}
