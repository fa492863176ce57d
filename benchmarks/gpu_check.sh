#!/usr/bin/env bash
# Builds with nvcc, tests and measures on the GPU of this machine, and says at the end what failed. Needs no network and
# no .venv: PYTHON (python3) must have torch, triton, pybind11, cmake, ninja, setuptools, pytest, pytest-benchmark and
# hypothesis. STAGES chooses some of: build tests memcheck racecheck initcheck bench memory, and models (steps of large
# models, for which BUDGET has no room beside the others). RESULTS is where the figures go. What has not ended after BUDGET
# seconds in all is interrupted, and has failed.
set -uo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
STAGES=${STAGES:-build tests memcheck racecheck initcheck bench memory}
BUDGET=${BUDGET:-530}
# cmake and ninja may be where PYTHON is. CUDAARCHS: machine code for this GPU is enough here.
beside=$("$PYTHON" -c "import os, sys; print(os.path.dirname(sys.executable))")
export PATH="$beside:$PATH:/usr/local/cuda/bin" CUDAARCHS="${CUDAARCHS:-native}"
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
failed=()

stage() { # name, seconds it may take, command
  local name=$1 limit=$2 began=$SECONDS left=$((BUDGET > SECONDS ? BUDGET - SECONDS : 1))
  shift 2
  [[ " $STAGES " == *" $name "* ]] || return 0
  echo "---- $name"
  # An interrupted pytest still reports, and saves, what it has.
  if timeout --signal=INT --kill-after=10 $((limit < left ? limit : left)) "$@"; then
    echo "---- $name: passed in $((SECONDS - began)) s"
  else
    echo "---- $name: FAILED ($?) after $((SECONDS - began)) s"
    failed+=("$name")
  fi
}

sanitize() { # tool, further options
  # One allocation per tensor: then the sanitizer sees where each ends.
  stage "$1" 60 env PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool "$1" --error-exitcode 9 \
    --print-limit 20 "${@:2}" "$PYTHON" tests/gpu/sanitize.py
}

stage build 240 "$PYTHON" setup.py --quiet build_ext --inplace
"$PYTHON" - <<'END' || { echo "no CUDA backend to check"; exit 1; }
import sys
import igb_kernels as igb
for name, availability in igb.backends().items():
    print(f"{name}: {availability}")
sys.exit(not igb.backends()["cuda"])
END

parallel=()
"$PYTHON" -c "import xdist" 2>/dev/null && parallel=(-n 4)
stage tests 210 "$PYTHON" -m pytest tests/gpu -m gpu -p no:cacheprovider --tb=short --maxfail=40 "${parallel[@]}"
sanitize memcheck
sanitize racecheck
sanitize initcheck

device=$("$PYTHON" -c "import re, torch; print(re.sub(r'\W+', '-', torch.cuda.get_device_name().lower()))")
results=${RESULTS:-benchmarks/results/$device-$(date +%Y-%m-%d).json}
stage bench 180 "$PYTHON" -m pytest benchmarks --ignore benchmarks/test_models.py --gpu --seconds 0.1 \
  --results "$results" -p no:cacheprovider --tb=short
stage models 300 "$PYTHON" -m pytest benchmarks/test_models.py --gpu --results "${results%.json}-models.json" \
  -p no:cacheprovider --tb=short
stage memory 60 "$PYTHON" -m benchmarks.memory --gpu --without-peers --json "${results%.json}-memory.json"

if ((${#failed[@]})); then
  echo "FAILED: ${failed[*]} (after $SECONDS s)"
  exit 1
fi
echo "all passed in $SECONDS s; figures in $results"
