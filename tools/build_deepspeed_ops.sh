#!/usr/bin/env bash
# Builds a wheel of DeepSpeed that holds the CUDA extensions of the engine `deepspeed`. Needs nvcc, but no GPU.
#
#   tools/build_deepspeed_ops.sh [--python PYTHON] [--torch VERSION] [--arch LIST] [--out FOLDER] [--venv FOLDER]
#
# The extensions belong to one Python, one torch (major.minor) and one CUDA (major.minor): build with those you will run with.
#   --python  the interpreter to build for, default python3
#   --torch   the torch to build for, default 2.13.0; installed from the registry, several gigabytes with its CUDA libraries
#   --arch    compute capabilities, default 8.0;9.0+PTX: A100, A10 and RTX 30/40 (which run 8.0 code), H100, and later by PTX
#   --out     where the wheel goes, default dist/
#   --venv    an environment to build in, kept afterwards; by default one is made and removed
# MAX_JOBS bounds the compilers at work, default one for each core.
set -euo pipefail

deepspeed=0.19.8
python=python3 torch=2.13.0 arch="8.0;9.0+PTX" out=dist venv=
while (($#)); do
  case "$1" in
    --python) python=$2 ;;
    --torch) torch=$2 ;;
    --arch) arch=$2 ;;
    --out) out=$2 ;;
    --venv) venv=$2 ;;
    *) sed -n '2,12s/^# \{0,1\}//p' "$0" >&2; exit 2 ;;
  esac
  shift 2
done

fail() { echo "error: $*" >&2; exit 1; }

nvcc=${CUDA_HOME:+$CUDA_HOME/bin/nvcc}
nvcc=${nvcc:-$(command -v nvcc || true)}
[[ -x $nvcc ]] || fail "no nvcc: install the CUDA toolkit of the torch build's CUDA version, and set CUDA_HOME to it"
command -v g++ >/dev/null || fail "no g++: install a C++ compiler (apt install g++)"

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
venv=${venv:-$work/venv}
[[ -x $venv/bin/python ]] || "$python" -m venv "$venv"
pip() { "$venv/bin/python" -m pip --disable-pip-version-check -q "$@"; }
# Three equals signs: the version as written, and not a build like 2.13.0+cpu that some mirrors prefer.
pip install "torch===$torch" setuptools wheel
# DeepSpeed's own needs; its set-up imports itself. Without extensions here: those are what we build.
DS_BUILD_OPS=0 pip install "deepspeed==$deepspeed"

read -r torch_cuda purelib < <("$venv/bin/python" -c '
import sysconfig, torch
print(torch.version.cuda, sysconfig.get_paths()["purelib"])')
[[ $torch_cuda != None ]] || fail "torch $torch of this registry is a CPU build; the extensions need one with CUDA"
nvcc_cuda=$("$nvcc" --version | sed -n 's/.*release \([0-9.]*\),.*/\1/p')
[[ ${nvcc_cuda%%.*} == "${torch_cuda%%.*}" ]] || fail "nvcc is of CUDA $nvcc_cuda and torch of CUDA $torch_cuda"

# nvcc itself says where it lies: what the path finds may be a link or a script.
toolkit=$(realpath "$("$nvcc" --dryrun -x cu -c /dev/null -o /dev/null 2>&1 | sed -n 's/^#\$ _HERE_=//p')/..")
[[ -e $toolkit/include/crt/host_defines.h ]] || fail "no CUDA headers in $toolkit/include"

# torch brings the libraries, but their names end in a version that the linker does not look for, and their headers lie beside.
libraries=$purelib/nvidia/cu${torch_cuda%%.*}
mkdir "$work/lib"
for name in cublas cublasLt curand cudart cusparse cusolver; do
  found=("$libraries/lib/lib$name.so".*)
  [[ -e ${found[0]} ]] || fail "torch $torch brings no lib$name in $libraries/lib"
  ln -s "${found[0]}" "$work/lib/lib$name.so"
done

pip download --no-deps --no-binary deepspeed --no-build-isolation -d "$work" "deepspeed==$deepspeed"
tar -xzf "$work/deepspeed-$deepspeed.tar.gz" -C "$work"
mkdir -p "$out"
out=$(realpath "$out")
cd "$work/deepspeed-$deepspeed"
# DS_ACCELERATOR: without a GPU it would note the extensions down as those of a CPU, and compile them again when they are used.
CUDA_HOME=$toolkit CPATH=$libraries/include LIBRARY_PATH=$work/lib PATH=$venv/bin:$PATH \
  TORCH_CUDA_ARCH_LIST=$arch DS_ACCELERATOR=cuda DS_ENABLE_NINJA=1 DS_NVCC_THREADS=1 MAX_JOBS=${MAX_JOBS:-$(nproc)} \
  DS_BUILD_OPS=0 DS_BUILD_TRANSFORMER_INFERENCE=1 DS_BUILD_SPATIAL_INFERENCE=1 \
  "$venv/bin/python" -m pip --disable-pip-version-check wheel --no-build-isolation --no-deps -w "$out" . >"$out/build.log" 2>&1 \
  || { grep -m 20 -E "error|Error" "$out/build.log" >&2; fail "the build failed, see above and $out/build.log"; }

wheel=$(ls -t "$out"/deepspeed-"$deepspeed"*.whl | head -n 1)
pip install --force-reinstall --no-deps "$wheel"
# Loading resolves every symbol; it takes no GPU as long as nothing is called.
cd "$work" && DS_ACCELERATOR=cuda "$venv/bin/python" -c '
from deepspeed.ops.op_builder import InferenceBuilder, SpatialInferenceBuilder
assert InferenceBuilder().load().linear_layer_fp16 and SpatialInferenceBuilder().load().nhwc_bias_add_add' >&2 \
  || fail "$wheel cannot be loaded"
echo "$wheel"
