#!/usr/bin/env bash
# Everything that needs an NVIDIA GPU, in pieces of a few minutes: tests, compiles, operators, whole steps.
#
#   kernels/benchmarks/gpu_suite.sh [PIECE...]      all pieces, or these: tests compile kernels sd15 sdxl
#
# Results go to kernels/benchmarks/results/GPU-NAME/. What is there is not measured again: the same command goes on after
# an interruption, and a piece can be run by itself where time is short. PYTHON names the interpreter.
set -euo pipefail
cd "$(dirname "$0")/../.."
PYTHON=${PYTHON:-python}
export PYTHONPATH="$PWD:$PWD/kernels:$PWD/datamodules:$PWD/callbacks:$PWD/slurm${PYTHONPATH:+:$PYTHONPATH}"
name=$("$PYTHON" -c 'import torch; print(torch.cuda.get_device_name().replace(" ", "-"))')
out=${OUT:-kernels/benchmarks/results/$name}
mkdir -p "$out"

piece() {
  case $1 in
    tests)
      # Two files compare whole UNets on the CPU, in the interpreter. A failure is kept, and the other pieces go on.
      [ -e "$out/tests.txt" ] || {
        "$PYTHON" -m pytest -q tests/kernels --ignore tests/kernels/lit_kernels/test_patching.py \
          --ignore tests/kernels/lit_kernels/test_training.py > "$out/tests.tmp" 2>&1 || true
        mv "$out/tests.tmp" "$out/tests.txt"
        tail -n 30 "$out/tests.txt"
      }
      ;;
    compile) "$PYTHON" -m lit_personalize profile compile --out "$out" ;;
    kernels)
      for batch in 1 2 4 8 16; do
        [ -e "$out/batch$batch/kernels.png" ] || "$PYTHON" -m lit_personalize profile kernels --batch "$batch" --out "$out/batch$batch"
      done
      ;;
    sd15 | sdxl)
      for batch in 1 4 2 8 16; do
        for targets in attention key_value none; do
          "$PYTHON" kernels/benchmarks/step.py --size "$1" --targets "$targets" --batch "$batch" --out "$out"
        done
      done
      ;;
    *)
      echo "unknown piece $1: tests compile kernels sd15 sdxl" >&2
      exit 2
      ;;
  esac
}

for each in "${@:-tests compile kernels sd15 sdxl}"; do
  for one in $each; do piece "$one"; done
done
