"""The YAML of deployment/azureml through azure-ai-ml's own loaders, which need no network.

Argument: JSON, a list of [path, kind, overrides] with the overrides of `--set`. Prints a list with what each was read as, or
its error.
"""

import json
import logging
import sys

from azure.ai.ml import (
    load_batch_endpoint,
    load_compute,
    load_environment,
    load_online_deployment,
    load_online_endpoint,
    load_workspace,
)
from azure.ai.ml.entities._load_functions import load_model_batch_deployment

logging.disable(logging.CRITICAL)
LOADERS = {
    "batch endpoint": load_batch_endpoint,
    "batch deployment": load_model_batch_deployment,
    "compute": load_compute,
    "environment": load_environment,
    "online deployment": load_online_deployment,
    "online endpoint": load_online_endpoint,
    "workspace": load_workspace,
}

told = []
for path, kind, overrides in json.loads(sys.argv[1]):
    try:
        loaded = LOADERS[kind](path, params_override=[{name: value} for name, value in overrides.items()])
        told.append({"read": json.loads(json.dumps(loaded._to_dict(), default=str))})
    except Exception as error:  # noqa: BLE001 - whatever a loader says
        told.append({"error": f"{type(error).__name__}: {error}"})
print(json.dumps(told))
