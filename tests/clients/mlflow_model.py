"""Export a model with `mii_serve export-mlflow`, load it with MLflow, and run it with `mlflow models predict`.

Arguments: the folder of the package's source, for the export alone, and a folder to work in. Prints a JSON object with what the
export wrote, the rows, the errors and what the command printed.
"""

import contextlib
import io
import json
import os
import subprocess
import sys
import warnings
from pathlib import Path

import mlflow
import pandas as pd
from mlflow.cli import cli
from mlflow.exceptions import MlflowException

source, work = sys.argv[1], Path(sys.argv[2])
model = work / "exported"
command = [sys.executable, "-m", "mii_serve", "export-mlflow", "demo", str(model)]
exported = subprocess.run(command, env={**os.environ, "PYTHONPATH": source}, capture_output=True, text=True, check=True)
told = {"out": exported.stdout, "err": exported.stderr}
told["files"] = sorted(str(path.relative_to(model)) for path in model.rglob("*") if path.is_file())

warnings.simplefilter("ignore")
loaded = mlflow.pyfunc.load_model(str(model))
told["signature"] = loaded.metadata.signature.to_dict()
told["code"] = sys.modules["mii_serve"].__file__
frame = pd.DataFrame({"prompt": ["a red circle", "a skull"], "row": [1, 2]})
params = {"num_inference_steps": 2, "seed": 3}
told["rows"] = json.loads(loaded.predict(frame, params=params).to_json(orient="records"))
told["two each"] = [*loaded.predict(frame[:1], params={**params, "num_images_per_prompt": 2})["generated_image"]]
told["errors"] = []
for given, more in (
    (frame, {"num_inference_steps": 0}),
    (frame, {"num_inference_steps": "x"}),
    (pd.DataFrame({"text": ["a"]}), {}),
):
    try:
        loaded.predict(given, params=more)
    except MlflowException as error:
        told["errors"].append([error.error_code, error.message])

os.environ["AZUREML_BI_OUTPUT_PATH"] = str(work / "pictures")
(work / "input.json").write_text(json.dumps({"dataframe_split": frame.to_dict(orient="split"), "params": params}))
arguments = ["models", "predict", "-m", str(model), "-i", str(work / "input.json"), "-o", str(work / "output.json")]
with contextlib.redirect_stdout(io.StringIO()):
    cli([*arguments, "-t", "json", "--env-manager", "local"], standalone_mode=False)
told["predicted"] = json.loads((work / "output.json").read_text())
print(json.dumps(told))
os._exit(0)  # two models have their threads here
