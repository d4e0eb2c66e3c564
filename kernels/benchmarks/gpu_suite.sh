#!/usr/bin/env bash
# Everything that needs an NVIDIA GPU, in pieces of a few minutes: tests, compiles, tuning, operators, whole steps, the bank.
#
#   kernels/benchmarks/gpu_suite.sh [PIECE...]      all pieces, or these: tests compile tune kernels sd15 sdxl bank
#
# Results go to kernels/benchmarks/results/GPU-NAME/, and the table that kernels are chosen by to LIT_KERNELS_TABLES, or
# to kernels/lit_kernels/tables/GPU-NAME.json, from where later pieces take it: commit it with the results. What is there
# is not measured again: the same command goes on after an interruption, and a piece can be run by itself where time is
# short. PYTHON names the interpreter.
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
      # Whole UNets are compared on the CPU, in the interpreter. A failure is kept, and the other pieces go on.
      [ -e "$out/tests.txt" ] || {
        whole=$(printf 'tests/kernels/lit_kernels/test_%s.py ' patching training frozen)
        "$PYTHON" -m pytest -q tests/kernels $(printf -- '--ignore %s ' $whole) > "$out/tests.tmp" 2>&1 || true
        TRITON_INTERPRET=1 CUDA_VISIBLE_DEVICES= "$PYTHON" -m pytest -q $whole >> "$out/tests.tmp" 2>&1 || true
        mv "$out/tests.tmp" "$out/tests.txt"
        grep -E '^(FAILED|ERROR|[0-9]+ (passed|failed))' "$out/tests.txt" || tail -n 30 "$out/tests.txt"
      }
      ;;
    compile) "$PYTHON" -m lit_personalize profile compile --out "$out" ;;
    tune)
      # A batch has 26 cases, and the bank's two come once: 2 of text_kv with 5 + 3 tiles, 6 of short_key_attention with 1
      # or 2 + 3, 6 of frozen_geglu with 2 + 2, 6 of absorbed_attention with 3, 6 of bank_lora with 2 + 2. With both paths
      # at the end that is some 160 do_bench of some 0.3 s: about a minute a batch, and forms are compiled once, in the first.
      for batch in 1 2 4 8 16; do
        "$PYTHON" -m lit_personalize profile kernels --tune --batch "$batch"
      done
      ;;
    kernels)
      # torch.compile of up to 140 slices takes its minutes: each operator is a piece of its own.
      for batch in 1 2 4 8 16; do
        for operator in text_kv short_key_attention bank_lora frozen_geglu absorbed_attention bank_adamw; do
          to="$out/batch$batch/$operator"
          [ -e "$to/kernels.png" ] || "$PYTHON" -m lit_personalize profile kernels --batch "$batch" --only "$operator" --out "$to"
        done
      done
      ;;
    sd15 | sdxl)
      for batch in 1 4 2 8 16; do
        for targets in attention key_value full_key_value none; do
          "$PYTHON" kernels/benchmarks/step.py --size "$1" --targets "$targets" --batch "$batch" --out "$out"
        done
      done
      ;;
    bank) "$PYTHON" benchmarks/bank_hours.py --out "$out/bank_hours.json" ;;
    *)
      echo "unknown piece $1: tests compile tune kernels sd15 sdxl bank" >&2
      exit 2
      ;;
  esac
}

for each in "${@:-tests compile tune kernels sd15 sdxl bank}"; do
  for one in $each; do piece "$one"; done
done
