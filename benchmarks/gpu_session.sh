#!/usr/bin/env bash
# The first session on a GPU, in one command: is what the kernels compute right, is it the same each time, is it safe,
# and how fast is it. Nothing is benchmarked while an earlier step is red.
#
#     benchmarks/gpu_session.sh [REPORT_DIRECTORY]
#
# PYTHON names the interpreter (python by default). Exit status: 0 all green, 1 a step failed, 2 no GPU here.
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=${PYTHON:-python}
report=${1:-gpu_session}

if ! "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    echo "gpu_session: torch finds no GPU here; the kernels are checked without one by: make test-slow" >&2
    exit 2
fi
mkdir -p "$report"

# The kernels are compiled, not interpreted.
export TRITON_INTERPRET=0

step() {
    local name=$1
    shift
    echo "== $name"
    if ! "$@" > "$report/$name.txt" 2>&1; then
        tail -n 40 "$report/$name.txt" >&2
        echo "gpu_session: $name failed, see $report/$name.txt" >&2
        exit 1
    fi
    tail -n 3 "$report/$name.txt"
}

step machine "$python" -m torch.utils.collect_env
step budget "$python" -m pytest -q tests/kernels/test_triton_compiled.py
step oracle "$python" benchmarks/gpu_oracle.py --device cuda --repeats 30
if command -v compute-sanitizer > /dev/null; then
    for check in memcheck racecheck initcheck; do
        step "$check" compute-sanitizer --tool "$check" --error-exitcode 1 \
            "$python" benchmarks/gpu_oracle.py --device cuda --repeats 1 --lengths 130 --head-dims 64 128
    done
else
    echo "== sanitizer: compute-sanitizer is not installed, left out" | tee "$report/sanitizer.txt"
fi
step tune "$python" -m mmfuse kernels --tune --device cuda --mask mma --length 4096 --heads 32 --head-dim 128 --dtype bfloat16
step tune64 "$python" -m mmfuse kernels --tune --device cuda --mask mma --length 4096 --heads 32 --head-dim 64 --dtype bfloat16
step tuned_oracle "$python" benchmarks/gpu_oracle.py --device cuda --repeats 30 --head-dims 64 128
step speed "$python" benchmarks/gpu_oracle.py --device cuda --repeats 1 --time --lengths 2048 8192
step benchmark "$python" benchmarks/attention.py --device cuda --lengths 2048 8192 --heads 32 --head-dim 128 --memory
echo "gpu_session: all green, reports in $report/"
