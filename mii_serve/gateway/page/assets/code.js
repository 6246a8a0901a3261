// The same picture from code: one picture, all of its parameters, so that it comes out the same.

// Parameters of one picture beside its prompt. `place` is the server that the code is for, with the names of all parameters.
const optionNames = (place) => place.names.filter((name) => name !== "prompt" && name !== "num_images_per_prompt");

// A value as Python and JSON both write it. Seeds are texts of digits here, and numbers there.
function literal(name, value) {
  return name === "seed" ? String(value) : JSON.stringify(value);
}

function named(params, names) {
  return names.filter((name) => params[name] != null && params[name] !== "").map((name) => [name, literal(name, params[name])]);
}

function object(pairs) {
  return `{${pairs.map(([name, value]) => `${JSON.stringify(name)}: ${value}`).join(", ")}}`;
}

// In single quotes a shell reads everything as it stands, but for the single quote.
const shellQuoted = (text) => `'${text.replaceAll("'", "'\\''")}'`;

// Files of the same names as the page's links to them; a picture that starts from no image has no strength.
const startsFromImage = (params) => params.strength != null;

function python(params, place) {
  const options = [];
  if (place.isTls) options.push("credentials=grpc.ssl_channel_credentials()");
  if (place.wantsKey) options.push('api_key=os.environ["MII_SERVE_API_KEY"]');
  const imports = [place.wantsKey ? "import os\n" : "", place.isTls ? "import grpc\n" : ""].join("");
  const more = named(params, optionNames(place));
  if (startsFromImage(params)) {
    more.push(["image", 'Image.open("image.png")']);
    if (params.has_mask) more.push(["mask_image", 'Image.open("mask.png")']);
    more.push(["strength", literal("strength", params.strength)]);
  }
  return `${imports && `${imports}\n`}${startsFromImage(params) ? "from PIL import Image\n\n" : ""}from mii_serve.client import Client

with Client(${[JSON.stringify(place.grpc), ...options].join(", ")}) as client:
    result = client.generate(
        ${literal("prompt", params.prompt)},
${more.map(([name, value]) => `        ${name}=${value},`).join("\n")}
    )
result.images[0].save("picture.png")
`;
}

function curl(params, place) {
  const key = place.wantsKey ? ' \\\n  -H "Authorization: Bearer $MII_SERVE_API_KEY"' : "";
  const call = `curl --fail-with-body ${shellQuoted(`${place.http}/`)} -o picture.png${key} \\
  -H 'Content-Type: application/json' \\
  -d`;
  const options = named(params, optionNames(place));
  if (!startsFromImage(params)) {
    return `${call} ${shellQuoted(`{"inputs": ${literal("prompt", params.prompt)}, "parameters": ${object(options)}}`)}\n`;
  }
  const more = [["prompt", literal("prompt", params.prompt)], ...options, ["strength", literal("strength", params.strength)]];
  const encoded = (file) => `base64 < ${file} | tr -d '\\n'`;
  const parameters = object(more).slice(0, -1) + (params.has_mask ? ', "mask_image": "' : "}}");
  const end = params.has_mask ? `\n  ${encoded("mask.png")}; printf '"}}'` : "";
  return `{
  printf '{"inputs": "'; ${encoded("image.png")}
  printf %s ${shellQuoted(`", "parameters": ${parameters}`)}${end}
} | ${call} @-
`;
}

const OPENAI_MASK = `
# In this API's mask, what is transparent is repainted.
mask = Image.open("mask.png").convert("L")
transparent = mask.convert("RGBA")
transparent.putalpha(ImageOps.invert(mask))
transparent.save("transparent.png")
`;

function openai(params, place) {
  const more = named(params, optionNames(place).filter((name) => name !== "height" && name !== "width"));
  const isEdit = startsFromImage(params);
  if (isEdit) more.push(["strength", literal("strength", params.strength)]);
  const files = isEdit ? ['    image=open("image.png", "rb"),\n', params.has_mask ? '    mask=open("transparent.png", "rb"),\n' : ""] : [];
  return `import base64
${place.wantsKey ? "import os\n" : ""}
from openai import OpenAI
${isEdit && params.has_mask ? `from PIL import Image, ImageOps\n${OPENAI_MASK}` : ""}
client = OpenAI(base_url=${JSON.stringify(`${place.http}/v1`)}, api_key=${place.wantsKey ? 'os.environ["MII_SERVE_API_KEY"]' : '"none"'})
result = client.images.${isEdit ? "edit" : "generate"}(
${files.join("")}    model=${JSON.stringify(params.model ?? place.model)},
    prompt=${literal("prompt", params.prompt)},
    size="${params.width}x${params.height}",
    response_format="b64_json",
    extra_body=${object(more)},
)
with open("picture.png", "wb") as file:
    file.write(base64.b64decode(result.data[0].b64_json))
`;
}

export const LANGUAGES = { python, curl, openai };
