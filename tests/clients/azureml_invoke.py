"""`MLClient.online_endpoints.invoke`, unmodified but for the control plane, which is Azure's and says where the endpoint is.

Arguments: the scoring address, the key, and request files; prints, for each file, the answer or the error as one JSON array.
"""

import json
import logging
import sys
from types import SimpleNamespace

from azure.ai.ml import MLClient
from azure.core.credentials import AccessToken
from azure.core.exceptions import HttpResponseError

logging.disable(logging.CRITICAL)
address, key, *files = sys.argv[1:]


class Credential:
    def get_token(self, *scopes, **settings):
        return AccessToken("none", 2**31)


class ControlPlane:
    """The two answers of Azure's management API that `invoke` asks for."""

    def get(self, **settings):
        return SimpleNamespace(properties=SimpleNamespace(auth_mode="key", scoring_uri=address))

    def list_keys(self, cls, **settings):
        return cls(None, SimpleNamespace(primary_key=key, secondary_key=key), None)


endpoints = MLClient(Credential(), "subscription", "group", "workspace").online_endpoints
endpoints._online_operation = ControlPlane()
endpoints._validate_deployment_name = lambda endpoint_name, deployment_name: None

told = []
for file in files:
    try:
        answer = endpoints.invoke("stable-diffusion", request_file=file, deployment_name="blue")
        told.append({"type": type(answer).__name__, "answer": json.loads(answer)})
    except HttpResponseError as error:
        told.append({"error": type(error).__name__, "status": error.status_code, "message": str(error)})
print(json.dumps(told))
