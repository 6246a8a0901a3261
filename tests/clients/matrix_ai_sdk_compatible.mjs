// Vercel's AI SDK with its provider for servers like OpenAI's in the matrix. Arguments: the address of HTTP and an API key.
import { generateImage } from "ai";
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { FEW, SIZE, aPng, checkPng, http, key, print, refused, run, same, versionOf } from "./matrix_steps.mjs";

versionOf("@ai-sdk/openai-compatible");
const provider = createOpenAICompatible({ name: "pictures", baseURL: `${http}/v1`, apiKey: key });
const generate = (more) => generateImage({ model: provider.imageModel("demo"), prompt: "a red circle", size: SIZE, maxRetries: 0, ...more });

await run("text to image", async () => checkPng((await generate()).image.uint8Array));
await run("several images", async () => checkPng((await generate({ n: 2 })).images[1].uint8Array));
await same("own parameters", async () => checkPng((await generate({ providerOptions: { pictures: FEW } })).image.uint8Array));
await run("image to image", async () => checkPng((await generate({ prompt: { text: "a yellow star", images: [aPng()] } })).image.uint8Array));
await refused("errors", "size: width must be a multiple of 8", () => generate({ size: "65x64" }));
print();
