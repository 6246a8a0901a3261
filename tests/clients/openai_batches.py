"""The OpenAI client, unmodified: the life of files and batches; prints what it saw as one JSON object.

openai_batches.py ADDRESS KEY begin             upload, refuse, create; prints the batch's id
openai_batches.py ADDRESS KEY end BATCH         wait for its end, read everything, delete everything
"""

import base64
import json
import sys
import time

import openai

address, key, part, *more = sys.argv[1:]
client = openai.OpenAI(base_url=f"{address}/v1", api_key=key, timeout=30)
ENDPOINT = "/v1/images/generations"


def line(number, **body):
    members = {"model": "fake", "prompt": f"a circle, number {number}", "n": 1, **body}
    return json.dumps({"custom_id": f"row-{number}", "method": "POST", "url": ENDPOINT, "body": members}) + "\n"


def uploaded(*lines, purpose="batch"):
    return client.files.create(file=("in.jsonl", "".join(lines).encode()), purpose=purpose)


def created(file_id):
    return client.batches.create(input_file_id=file_id, endpoint=ENDPOINT, completion_window="24h", metadata={"a": "b"})


def ended(batch_id):
    for _ in range(1200):
        batch = client.batches.retrieve(batch_id)
        if batch.status in ("completed", "failed", "cancelled", "expired"):
            return batch
        time.sleep(0.1)
    raise SystemExit("it does not end")


def failed(call):
    try:
        call()
    except openai.APIStatusError as error:
        return [type(error).__name__, error.status_code, error.code]
    return None


def begin():
    seen = {}
    file = uploaded(*(line(n, seed=n, n=1 + n % 2) for n in range(20)), line(20, scheduler="lcm", num_inference_steps=60))
    seen["file"] = [file.object, file.purpose, file.filename, client.files.wait_for_processing(file.id).status]
    batch = created(file.id)
    seen["status"], seen["batch"], seen["counts"] = batch.status, batch.id, batch.request_counts is not None
    wrong = ended(created(uploaded(line(0), line(1, height=65), line(0), "{\n", line(4, model="other")).id).id)
    seen["failed"] = [wrong.status, [[error.code, error.line] for error in wrong.errors.data], wrong.output_file_id]
    seen["errors"] = {
        "purpose": failed(lambda: uploaded(line(0), purpose="assistants")),
        "no file": failed(lambda: created("file-x")),
        "no batch": failed(lambda: client.batches.retrieve("batch_x")),
        "endpoint": failed(
            lambda: client.batches.create(input_file_id=file.id, endpoint="/v1/embeddings", completion_window="24h")
        ),
    }
    return seen


def end(batch_id):
    seen = {}
    batch = ended(batch_id)
    counts = batch.request_counts
    seen["status"] = [batch.status, counts.total, counts.completed, counts.failed, batch.metadata]
    text = client.files.content(batch.output_file_id).text
    lines = [json.loads(one) for one in text.splitlines()]
    seen["bytes"] = client.files.retrieve(batch.output_file_id).bytes == len(text.encode())
    with client.files.with_streaming_response.content(batch.output_file_id) as answer:
        seen["streamed"] = sum(1 for _ in answer.iter_lines())
    seen["lines"] = [
        [one["custom_id"], one["response"]["status_code"], [image["seed"] for image in one["response"]["body"]["data"]]]
        for one in lines
    ]
    starts = {base64.b64decode(image["b64_json"])[:4].hex() for one in lines for image in one["response"]["body"]["data"]}
    seen["pictures"] = sorted(starts)
    errors = [json.loads(one) for one in client.files.content(batch.error_file_id).text.splitlines()]
    seen["errors"] = [[one["custom_id"], one["response"]["status_code"]] for one in errors]
    seen["listed"] = [batch_id in [one.id for one in client.batches.list(limit=1)], len(list(client.files.list()))]
    seen["cancel"] = client.batches.cancel(batch_id).status
    stranger = openai.OpenAI(base_url=f"{address}/v1", api_key="other-key-0123456789")
    seen["stranger"] = [len(list(stranger.batches.list())), len(list(stranger.files.list()))]
    for file in list(client.files.list()):
        client.files.delete(file.id)
    seen["left"] = len(list(client.files.list()))
    seen["gone"] = failed(lambda: client.files.content(batch.output_file_id))
    return seen


print(json.dumps(begin() if part == "begin" else end(*more)))
