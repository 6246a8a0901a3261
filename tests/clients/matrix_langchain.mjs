// LangChain's wrapper for images in JavaScript in the matrix. Arguments: the address of HTTP and an API key.
import { DallEAPIWrapper } from "@langchain/openai";
import assert from "node:assert";
import { SIZE, checkBase64, checkLink, http, key, print, refused, run, versionOf } from "./matrix_steps.mjs";

versionOf("@langchain/openai");
const wrapper = (more) => new DallEAPIWrapper({ baseUrl: `${http}/v1`, apiKey: key, model: "demo", size: SIZE, ...more });

await run("text to image", async () => checkBase64(await wrapper({ dallEResponseFormat: "b64_json" }).invoke("a red circle")));
await run("several images", async () => {
  const found = await wrapper({ n: 2 }).invoke("a red circle");
  assert.equal(found.length, 2);
  await checkLink(found[1].image_url);
});
await run("link", async () => checkLink(await wrapper().invoke("a red circle")));
await refused("errors", "size: width must be a multiple of 8", () => wrapper({ size: "65x64" }).invoke("a"));
print();
