"""One image by the OpenAI client, unmodified, from the server whose address is the argument; prints what it saw as JSON."""

import base64
import json
import sys

import openai

client = openai.OpenAI(base_url=f"{sys.argv[1]}/v1", api_key="not-needed", timeout=240, max_retries=0)
made = client.images.generate(prompt="a red circle", extra_body={"seed": 5, "num_inference_steps": 3})
events = client.images.generate(prompt="a red circle", stream=True, extra_body={"seed": 5, "num_inference_steps": 3})
try:
    client.images.generate(prompt="a red circle", size="99x99")
    error = None
except openai.BadRequestError as refused:
    error = [refused.status_code, refused.param]
seen = {
    "signature": base64.b64decode(made.data[0].b64_json)[:4].hex(),
    "seed": made.data[0].seed,
    "events": [event.type for event in events],
    "error": error,
}
print(json.dumps(seen))
