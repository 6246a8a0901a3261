"""LitServe with its own dynamic batching: up to eight requests that come within 50 ms. Arguments: folder, port."""

# LitServe reads the signature of `decode_request` and cannot use a postponed annotation: there are none here.

import sys
from typing import Any

import litserve
from pipeline import answer, draw, load


class Images(litserve.LitAPI):
    def setup(self, device):
        self.pipeline = load(sys.argv[1])

    def decode_request(self, request):
        return request

    def batch(self, inputs):
        return inputs

    def predict(self, inputs):
        return draw(self.pipeline, inputs)

    def unbatch(self, output):
        return output

    def encode_response(self, output) -> dict[str, Any]:
        return answer(output)


if __name__ == "__main__":
    api = Images(max_batch_size=8, batch_timeout=0.05, api_path="/v1/images/generations")
    server = litserve.LitServer(api, accelerator="cpu", workers_per_device=1)
    server.run(host="127.0.0.1", port=int(sys.argv[2]), num_api_servers=1, log_level="warning", generate_client_file=False)
