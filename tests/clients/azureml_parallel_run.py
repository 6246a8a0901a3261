"""A stand-in for the driver of Azure ML's batch deployments, which comes with the job and is on no index.

It does what Azure's documentation and samples say of it: `init()` once, `run()` for each mini-batch of paths, `shutdown()` at
the end. A mini-batch whose `run()` raises is tried again, files of mini-batches that failed for good are counted against the
error threshold, and what `run()` returns is appended to the output file as `parallel_run_step.settings.json` beside the script
says, without a header. It leaves out: several workers and nodes, time limits, and what Azure does with a worker that ends.

Arguments: the script, the folder with the input, the folder for the output, and JSON with `mini_batch_size`, `max_retries`,
`error_threshold`, `output_file_name`. Prints a JSON object with the numbers of files and tries, the errors, and the output file
as the notebook of Azure's catalog reads it.
"""

import importlib.util
import json
import os
import sys
from pathlib import Path

import pandas as pd

script, source, target = (Path(argument).resolve() for argument in sys.argv[1:4])
settings = json.loads(sys.argv[4])
size, max_retries = settings.get("mini_batch_size", 10), settings.get("max_retries", 3)
predictions_file = target / settings.get("output_file_name", "predictions.csv")
how = {"sep": " ", "index": False}
if (stated := script.with_name("parallel_run_step.settings.json")).exists():
    how |= json.loads(stated.read_text())["append_row"]["pandas.DataFrame.to_csv"]

target.mkdir(parents=True, exist_ok=True)
os.environ["AZUREML_BI_OUTPUT_PATH"] = str(target)
spec = importlib.util.spec_from_file_location("entry_script", script)
entry = importlib.util.module_from_spec(spec)
spec.loader.exec_module(entry)
entry.init()

files = sorted(str(path) for path in source.iterdir() if path.is_file())
num_failed, num_tries, errors = 0, 0, []
for first in range(0, len(files), size):
    mini_batch = files[first : first + size]
    for _ in range(max_retries + 1):
        num_tries += 1
        try:
            returned = entry.run(list(mini_batch))
        except Exception as error:  # noqa: BLE001 - whatever a script raises
            errors.append(str(error))
        else:
            with predictions_file.open("a", newline="") as file:
                pd.DataFrame(returned).to_csv(file, header=False, **how)
            break
    else:
        num_failed += len(mini_batch)
    if 0 <= settings.get("error_threshold", -1) < num_failed:
        errors.append(f"the job has failed: {num_failed} files failed, the error threshold is {settings['error_threshold']}")
        break

entry.shutdown()

read = []
if predictions_file.exists():
    score_df = pd.read_csv(
        predictions_file,
        header=None,
        names=["row_number_per_file", "prompt", "generated_image", "nsfw_content_detected", "input_csv_name"],
    )
    read = json.loads(score_df.to_json(orient="records"))
print(json.dumps({"num_files": len(files), "num_failed": num_failed, "num_tries": num_tries, "errors": errors, "read": read}))
