// Vercel's AI SDK with its provider for OpenAI in the matrix. Arguments: the address of HTTP and an API key.
import { generateImage } from "ai";
import { createOpenAI } from "@ai-sdk/openai";
import { FEW, SIZE, aPng, checkPng, http, key, print, refused, run, same, versionOf } from "./matrix_steps.mjs";

versionOf("ai");
const provider = createOpenAI({ baseURL: `${http}/v1`, apiKey: key });
const generate = (more) => generateImage({ model: provider.image("demo"), prompt: "a red circle", size: SIZE, maxRetries: 0, ...more });

await run("text to image", async () => checkPng((await generate()).image.uint8Array));
await run("several images", async () => checkPng((await generate({ n: 2 })).images[1].uint8Array));
await same("own parameters", async () => checkPng((await generate({ providerOptions: { openai: FEW } })).image.uint8Array));
await run("image to image", async () => checkPng((await generate({ prompt: { text: "a yellow star", images: [aPng()] } })).image.uint8Array));
await refused("errors", "size: width must be a multiple of 8", () => generate({ size: "65x64" }));
print();
