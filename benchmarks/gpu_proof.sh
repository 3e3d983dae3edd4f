#!/usr/bin/env bash
# The proof on a GPU, in one command and under nine minutes: builds the extension, checks every kernel, runs every test
# that needs a GPU, compute-sanitizer on the CUDA tests, tunes, and runs the quick benchmarks; logs, JSON, the table for
# cnkernels/tuning and summary.txt go into one folder.
#
#   bash benchmarks/gpu_proof.sh FOLDER
#
# Needs torch, triton, pytest; for the CUDA kernels nvcc, pybind11 and ninja. No network. What is missing is a line of
# the summary; so is a step that fails or runs out of time, and the steps after it run all the same. The exit status is
# 0 if no step failed. Without a GPU everything else is rehearsed: the build for one architecture, the tests of what a
# CPU runs, the selection of the sanitizer's tests, and the benchmarks at small sizes.
#
# Limits in seconds, each from the environment: TOTAL_SECONDS of all, and BUILD_SECONDS, CHECK_SECONDS, TESTS_SECONDS,
# GATE_SECONDS, TUNE_SECONDS, SANITIZER_SECONDS and BENCH_SECONDS of one step.
set -uo pipefail
out=${1:?usage: bash benchmarks/gpu_proof.sh FOLDER}
mkdir -p "$out" && out=$(cd "$out" && pwd) || exit 2
cd "$(dirname "$0")/.." || exit 2
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
export CNKERNELS_CACHE=$out/cache # what check and tune find, and nothing from before
python=${PYTHON:-python3}
summary=$out/summary.txt
failed=0
: >"$summary"

has() { "$python" -c "import importlib.util as u; raise SystemExit(u.find_spec('$1') is None)" 2>/dev/null; }

tell() { # tell NAME STATUS SECONDS NOTE: one line of the summary
    printf '%-10s %-8s %5s s  %s\n' "$1" "$2" "$3" "$4" | tee -a "$summary"
}

skip() { tell "$1" skipped 0 "$2"; }

step() { # step NAME SECONDS COMMAND...: runs it within the limit, keeps its output in NAME.log, tells how it ended
    local name=$1 limit=$2 left=$((TOTAL_SECONDS - SECONDS)) begin=$SECONDS
    shift 2
    if [ "$left" -le 0 ]; then
        tell "$name" LEFT-OUT 0 "the $TOTAL_SECONDS s of the whole are spent"
        failed=1
        return 0
    fi
    [ "$limit" -le "$left" ] || limit=$left
    timeout -k 10 "$limit" "$@" >"$out/$name.log" 2>&1
    local code=$? status=FAILED note
    note=$(grep -v '^[[:space:]]*$' "$out/$name.log" | tail -n 1 | cut -c 1-150)
    case $code in
        0) status=ok ;;
        124 | 137) status=TIMEOUT note="stopped after its $limit s; $note" ;;
        *) note="exit $code; $note" ;;
    esac
    [ $code -eq 0 ] || failed=1
    tell "$name" "$status" $((SECONDS - begin)) "$note"
}

if "$python" -c 'import torch; raise SystemExit(not torch.cuda.is_available())' 2>"$out/gpu.log"; then
    gpu=1
    : "${TOTAL_SECONDS:=530}" "${BUILD_SECONDS:=150}" "${TESTS_SECONDS:=150}" "${GATE_SECONDS:=90}"
    : "${CHECK_SECONDS:=90}" "${TUNE_SECONDS:=45}" "${SANITIZER_SECONDS:=90}" "${BENCH_SECONDS:=215}"
    # Those that compile or emulate without a GPU run on any machine, and take minutes.
    tests=(tests/cnkernels tests/benchmarks)
    for file in test_aot test_cuda_resources test_host_execution test_mutations; do
        tests+=("--ignore=tests/cnkernels/$file.py")
    done
else
    gpu=0
    tell gpu skipped 0 "no GPU: torch.cuda.is_available() is False; everything else is rehearsed"
    : "${TOTAL_SECONDS:=1500}" "${BUILD_SECONDS:=700}" "${TESTS_SECONDS:=300}" "${GATE_SECONDS:=200}"
    : "${CHECK_SECONDS:=200}" "${TUNE_SECONDS:=200}" "${SANITIZER_SECONDS:=60}" "${BENCH_SECONDS:=300}"
    export CNKERNELS_ARCHS=${CNKERNELS_ARCHS:-90a} OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
    tests=(tests/benchmarks tests/cnkernels/test_dispatch.py)
    for op in attention group_norm_silu zero_conv_add geglu; do
        tests+=("tests/cnkernels/test_$op.py")
    done
    tests+=(-k "not triton and not cuda")
fi

workers=() # a process for every second core compiles Triton's kernels at the same time as the others
if [ $gpu = 1 ] && has xdist; then
    workers=(-n 8)
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-2}
fi

step env 60 "$python" -m cnkernels.env
if [ -z "$(command -v "${CUDA_HOME:+$CUDA_HOME/bin/}nvcc")" ]; then
    skip build "nvcc is neither on PATH nor in CUDA_HOME: no CUDA kernels"
elif ! has pybind11 || ! has ninja; then
    skip build "pybind11 or ninja is not installed: no CUDA kernels"
else
    step build "$BUILD_SECONDS" "$python" setup.py build_ext --inplace
fi

step check "$CHECK_SECONDS" "$python" -m cnkernels.check --report "$out/check.json"

if has pytest; then
    left=$((TOTAL_SECONDS - SECONDS))
    [ $left -ge "$TESTS_SECONDS" ] || TESTS_SECONDS=$left
    # No test begins in the last seconds; the limit is for a test that hangs.
    step tests "$TESTS_SECONDS" "$python" -m pytest --continue-on-collection-errors -p benchmarks.deadline \
        --end $(($(date +%s) + TESTS_SECONDS - 15)) "${workers[@]}" "--junitxml=$out/tests.xml" "${tests[@]}"
    [ $gpu = 0 ] || has xdist || skip xdist "pytest-xdist is not installed: the tests ran in one process"
else
    skip tests "pytest is not installed, so no row of ours can be shown: benchmarks without tests are refused"
fi
if [ $gpu = 1 ] && has pytest; then # apart from the others, because its models' tests want diffusers
    step graphs 60 "$python" -m pytest tests/controlnet/test_cuda_graph.py
fi
report=()
[ ! -s "$out/tests.xml" ] || report=(--report "$out/tests.xml") # else the gate runs the tests of the ops itself
step gate "$GATE_SECONDS" "$python" -m benchmarks.gate "${report[@]}" --output "$out/gate.json"

tune=(--shapes sd15 --batch 1 --rounds 1) # a rehearsal
[ $gpu = 0 ] || tune=(--shapes sd15,sdxl --training --ship "$out")
step tune "$TUNE_SECONDS" "$python" -m cnkernels.tune "${tune[@]}"

left=$((TOTAL_SECONDS - SECONDS - 10)) # the report comes after
[ $left -ge "$BENCH_SECONDS" ] || BENCH_SECONDS=$((left > 1 ? left : 1))
budget=$((BENCH_SECONDS > 40 ? BENCH_SECONDS - 15 : BENCH_SECONDS)) # it stops by itself; the limit is for a hang
gate=()
[ ! -s "$out/gate.json" ] || gate=(--gate "$out/gate.json")
step bench "$BENCH_SECONDS" "$python" -m benchmarks.run --quick --budget $budget "${gate[@]}" --output "$out/quick.json"
step report 20 "$python" -m benchmarks.report "$out/quick.json"

# Small shapes of every CUDA kernel. A tool slows launches down tens to hundreds of times: few tests, all tools at once.
sanitized=(tests/cnkernels/test_{cuda_attention,group_norm_silu,zero_conv_add}.py)
chosen="equals_pytorch and cuda and float16 and not bfloat16 and (text or primes or 160-channels or 10-channel)"
chosen=${SANITIZER_TESTS:-$chosen}
for tool in memcheck racecheck initcheck; do
    extra=() # PyTorch asks CUDA some things that CUDA refuses, and goes on: those are no faults of a kernel
    [ $tool != memcheck ] || extra=(--report-api-errors no)
    if ! has pytest; then
        skip $tool "pytest is not installed"
    elif [ $gpu = 0 ]; then
        step $tool "$SANITIZER_SECONDS" "$python" -m pytest --collect-only "${sanitized[@]}" -k "$chosen"
        echo "           (the tests that $tool would run on a GPU, collected only)" | tee -a "$summary"
    elif ! command -v compute-sanitizer >/dev/null; then
        skip $tool "compute-sanitizer is not installed"
    else
        # Without the caching allocator every tensor is an allocation of its own, so that an overrun is seen.
        PYTORCH_NO_CUDA_MEMORY_CACHING=1 step $tool "$SANITIZER_SECONDS" \
            compute-sanitizer --tool $tool "${extra[@]}" --target-processes all --launch-timeout 60 --error-exitcode 9 \
            --print-limit 20 "$python" -m pytest -p no:cacheprovider "${sanitized[@]}" -k "$chosen" &
    fi
done
wait
# A step in the background has a copy of `failed`; its line in the summary does not.
! grep -qE '^(memcheck|racecheck|initcheck) +(FAILED|TIMEOUT|LEFT-OUT)' "$summary" || failed=1

verdict=ok
[ $failed = 0 ] || verdict=FAILED
tell total $verdict $SECONDS "$(grep -cE ' (FAILED|TIMEOUT|LEFT-OUT) ' "$summary") steps failed; everything is in $out"
exit $failed
