#!/usr/bin/env bash
# The proof on a GPU, in one command: builds the extension, runs every test natively, compute-sanitizer on the CUDA tests, and
# the quick benchmarks; logs and JSON go into one folder. Needs torch, triton, pybind11, ninja, pytest and nvcc; no network.
#   bash benchmarks/gpu_proof.sh FOLDER
set -uo pipefail
cd "$(dirname "$0")/.."
out=${1:?usage: bash benchmarks/gpu_proof.sh FOLDER}
mkdir -p "$out"
export PYTHONPATH=$PWD
failed=()

step() { # step NAME SECONDS COMMAND...: runs it under a time limit, keeps its output, goes on when it fails
    local name=$1 limit=$2
    shift 2
    local begin=$SECONDS
    timeout "$limit" "$@" >"$out/$name.log" 2>&1
    local code=$?
    [ $code -eq 0 ] || failed+=("$name")
    echo "$name: exit $code after $((SECONDS - begin)) s; $(tail -n 1 "$out/$name.log")"
}

python3 -c 'import torch; raise SystemExit(not torch.cuda.is_available())' || {
    echo "no GPU: torch.cuda.is_available() is False. Rehearsing everything but the GPU."
}
step build 240 python3 setup.py build_ext --inplace
step env 60 python3 -m cnkernels.env
step gate 240 python3 -m benchmarks.gate --output "$out/gate.json"
step tests 240 python3 -m pytest -q tests/cnkernels tests/benchmarks
if command -v compute-sanitizer >/dev/null; then
    for tool in memcheck racecheck initcheck; do
        # Without the caching allocator every tensor is an allocation of its own, so that an overrun is seen.
        PYTORCH_NO_CUDA_MEMORY_CACHING=1 step "$tool" 90 compute-sanitizer --tool "$tool" --error-exitcode 9 \
            python3 -m pytest -q tests/cnkernels -k "cuda and equals_pytorch and float16"
    done
else
    echo "compute-sanitizer: not installed, left out"
fi
step bench 280 python3 -m benchmarks.run --quick --gate "$out/gate.json" --output "$out/quick.json"
step report 60 python3 -m benchmarks.report "$out/quick.json"
[ ${#failed[@]} -eq 0 ] || { echo "failed: ${failed[*]}"; exit 1; }
