// What a client of the matrix does, step by step. Each works or ends with an error, and all are printed as one JSON object.
import { readFileSync } from "node:fs";
import { deflateSync, crc32 } from "node:zlib";
import assert from "node:assert";

export const SIZE = "64x96"; // width and height of every image
export const FEW = { num_inference_steps: 3, seed: 5, negative_prompt: "blurry" }; // what OpenAI's API does not have
export const [http, key] = process.argv.slice(2);

const seen = { version: null, steps: {} };

export function versionOf(name) {
  const file = new URL(`node_modules/${name}/package.json`, import.meta.url);
  seen.version = JSON.parse(readFileSync(file)).version;
}

export async function run(what, call) {
  try {
    const value = await call();
    seen.steps[what] = null;
    return value;
  } catch (error) {
    seen.steps[what] = `${error.name}: ${error.message}`.slice(0, 400);
    return null;
  }
}

export function refused(what, said, call) {
  return run(what, async () => {
    try {
      await call();
    } catch (error) {
      if ([error.message, JSON.stringify(error), error.cause?.message, error.httpResponse?.body?.error].join(" ").includes(said)) return;
      throw error;
    }
    throw new Error("it was not refused");
  });
}

export function print() {
  console.log(JSON.stringify(seen));
}

export function checkPng(file) {
  const bytes = Buffer.from(file);
  assert.equal(bytes.subarray(0, 8).toString("hex"), "89504e470d0a1a0a");
  assert.equal(`${bytes.readUInt32BE(16)}x${bytes.readUInt32BE(20)}`, SIZE);
  return bytes.toString("base64");
}

export function checkBase64(text) {
  return checkPng(Buffer.from(text, "base64"));
}

export async function checkLink(url) {
  assert.match(url, /^http:\/\/127\.0\.0\.1:/);
  return checkPng(await (await fetch(url)).arrayBuffer());
}

// A step that works if the seed has an effect: what is made twice is the same.
export function same(what, call) {
  return run(what, async () => assert.equal(await call(), await call(), "two different images with the same seed"));
}

export function aPng() {
  const [width, height] = SIZE.split("x").map(Number);
  const rows = Buffer.alloc(height * (1 + width * 3));
  for (let y = 0; y < height; y++)
    for (let x = 0; x < width; x++) rows.set([(x * 4) % 256, (y * 2) % 256, 90], y * (1 + width * 3) + 1 + x * 3);
  const chunk = (kind, data) => {
    const body = Buffer.concat([Buffer.from(kind), data]);
    const out = Buffer.alloc(8 + body.length);
    out.writeUInt32BE(data.length, 0);
    body.copy(out, 4);
    out.writeUInt32BE(crc32(body), 4 + body.length);
    return out;
  };
  const header = Buffer.from([0, 0, 0, width, 0, 0, 0, height, 8, 2, 0, 0, 0]);
  const signature = Buffer.from("89504e470d0a1a0a", "hex");
  return Buffer.concat([signature, chunk("IHDR", header), chunk("IDAT", deflateSync(rows)), chunk("IEND", Buffer.alloc(0))]);
}
