// Hugging Face's client for JavaScript in the matrix. Arguments: the address of HTTP and an API key.
import { InferenceClient } from "@huggingface/inference";
import { SIZE, aPng, checkPng, http, key, print, refused, run, same, versionOf } from "./matrix_steps.mjs";

versionOf("@huggingface/inference");
const [width, height] = SIZE.split("x").map(Number);
const few = { width, height, num_inference_steps: 3, negative_prompt: "blurry" };
const client = (path = "") => new InferenceClient(key, { endpointUrl: `${http}${path}` });
const draw = async (parameters, path) =>
  checkPng(await (await client(path).textToImage({ inputs: "a red circle", parameters: { ...few, ...parameters } })).arrayBuffer());

await run("text to image", () => draw());
await same("own parameters", () => draw({ seed: 5 }));
await run("model in the address", () => draw({}, "/models/demo"));
await run("image to image", async () => {
  const inputs = new Blob([aPng()], { type: "image/png" });
  checkPng(await (await client().imageToImage({ inputs, parameters: { prompt: "a yellow star" } })).arrayBuffer());
});
await refused("errors", "parameters.width: must be a multiple of 8", () => draw({ width: 65 }));
print();
