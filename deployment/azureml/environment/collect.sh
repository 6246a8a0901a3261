#!/bin/sh
# Fill build/azureml with what the image of batch jobs is built from: this Dockerfile, the versions and the wheel of this checkout.
# Argument: a Python with the package build, `python3` if left out.
set -eu
here=$(cd "$(dirname "$0")" && pwd)
root=$(cd "$here/../../.." && pwd)
context="$root/build/azureml"
rm -rf "$context"
mkdir -p "$context"
cp "$here/Dockerfile" "$here/conda.yaml" "$root/constraints.txt" "$context"
"${1:-python3}" -m build --wheel --outdir "$context" "$root"
rm -f "$context/.gitignore"
