// OpenAI's client for JavaScript in the matrix. Arguments: the address of HTTP and an API key.
import OpenAI, { toFile } from "openai";
import assert from "node:assert";
import { FEW, SIZE, aPng, checkBase64, checkLink, http, key, print, refused, run, same, versionOf } from "./matrix_steps.mjs";

versionOf("openai");
const client = new OpenAI({ baseURL: `${http}/v1`, apiKey: key, timeout: 200_000 });
const images = async (more) =>
  (await client.images.generate({ model: "demo", prompt: "a red circle", size: SIZE, ...more })).data;

await run("text to image", async () => checkBase64((await images({ response_format: "b64_json" }))[0].b64_json));
await run("several images", async () => checkBase64((await images({ n: 2, response_format: "b64_json" }))[1].b64_json));
await run("link", async () => checkLink((await images({ response_format: "url" }))[0].url));
await same("own parameters", async () => checkBase64((await images(FEW))[0].b64_json));
await run("previews", async () => {
  const events = [];
  const stream = await client.images.generate({ model: "demo", prompt: "a", size: SIZE, stream: true, partial_images: 2, ...FEW });
  for await (const event of stream) events.push(event);
  assert.equal(events.at(-1).type, "image_generation.completed");
  checkBase64(events.at(-1).b64_json);
});
await run("image to image", async () => {
  const image = await toFile(aPng(), "start.png", { type: "image/png" });
  checkBase64((await client.images.edit({ model: "demo", image, prompt: "a yellow star", size: SIZE })).data[0].b64_json);
});
await run("variations", async () => {
  const image = await toFile(aPng(), "start.png", { type: "image/png" });
  const answer = await client.images.createVariation({ model: "demo", image, size: SIZE, response_format: "b64_json" });
  checkBase64(answer.data[0].b64_json);
});
await run("models", async () => assert.ok((await client.models.list()).data[0].id.endsWith("demo")));
await refused("errors", "size: width must be a multiple of 8", () => client.images.generate({ prompt: "a", size: "65x64" }));
print();
