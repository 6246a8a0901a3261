"""deployment/azureml/notebooks.py against a stub of Azure, with the real azure-ai-ml. Only names are resolved differently:
every host is the stub, so all addresses stay Azure's own, and TLS is checked.

Arguments: the folder of notebooks.py, the stub's port, and JSON with `is_safe`, `changes`, `folder`, `prompts`, `request`. The
stub's certificate authority is in REQUESTS_CA_BUNDLE. Prints a JSON object with the online answers and the rows of the batch.
"""

import contextlib
import io
import json
import logging
import socket
import sys
from pathlib import Path

folder, port, asked = sys.argv[1], int(sys.argv[2]), json.loads(sys.argv[3])
resolve = socket.getaddrinfo


def to_the_stub(host, wanted, *more, **settings):
    if wanted == 443:
        host, wanted = "127.0.0.1", port
    return resolve(host, wanted, *more, **settings)


socket.getaddrinfo = to_the_stub
sys.path.insert(0, folder)

from azure.core.credentials import AccessToken  # noqa: E402
from notebooks import connect  # noqa: E402

logging.disable(logging.WARNING)


class Credential:
    def get_token(self, *scopes, **settings):
        return AccessToken(f"token for {' '.join(scopes)}", 2**31)


with contextlib.redirect_stdout(io.StringIO()) as said:
    notebooks = connect(Credential(), "subscription", "group", "workspace", is_safe=asked["is_safe"], changes=asked["changes"])
    told = {}
    work = Path(asked["folder"])
    notebooks.deploy_online()
    told["online"] = notebooks.score(Path(asked["request"]), work / "online")
    notebooks.deploy_batch()
    told["batch"] = notebooks.run_batch(asked["prompts"], work / "batch")
    notebooks.delete()
told["said"] = said.getvalue()
print(json.dumps(told))
