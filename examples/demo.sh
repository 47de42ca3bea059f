#!/usr/bin/env bash
# The whole path once, with the command line a user would type: corpus -> dense recogniser -> pruning with one shared
# mask and with one pathway per language -> packed files -> table and report. Run it again after an interruption: every
# training run goes on from its last checkpoint, finished steps are not repeated.
#
#   examples/demo.sh [FOLDER]        default runs/demo
set -euo pipefail
run=${1:-runs/demo}
mkdir -p "$run"

step() { printf '\n\033[1m[%2d:%02d] %s\033[0m\n' $((SECONDS / 60)) $((SECONDS % 60)) "$*"; }
# Two processes with one thread each learn from twice as many utterances per step as one process with two threads.
train() { OMP_NUM_THREADS=1 torchrun --standalone --nproc-per-node 2 --no-python -- sparse-pathways "$@" --threads 1; }

step "1/6  Speech: four languages, spoken by espeak-ng"
[ -e "$run/data/manifest.jsonl" ] || sparse-pathways data synthetic --out "$run/data"

step "2/6  Dense recogniser"
[ -e "$run/dense/model.pt" ] || train train --data "$run/data" --out "$run/dense"

step "3/6  Pruning to 70 % and on to 90 %: one mask for all languages (lap), one pathway per language (dynamic)"
from=dense
for method in lap dynamic; do
  [ "$method" = lap ] && name=lap || name=dynamic_asr_pathways
  from=dense
  for sparsity in 70 90; do
    out=$run/$method$sparsity
    [ -e "$out/model.pt" ] ||
      train prune --data "$run/data" --start "$run/$from" --out "$out" --method "$name" --sparsity "0.$sparsity" --steps 260
    from=$method$sparsity
  done
done

step "4/6  Packing"
for model in lap70 dynamic70 lap90 dynamic90; do
  sparse-pathways pack "$run/$model" --out "$run/$model.safetensors"
done

step "5/6  Word error rates, latency, operators"
sparse-pathways evaluate dense="$run/dense" lap70="$run/lap70" dynamic70="$run/dynamic70" \
  lap90="$run/lap90" dynamic90="$run/dynamic90" --data "$run/data" --out "$run/results.json"

step "6/6  Report"
sparse-pathways report "$run" --out "$run/report.html"

step "Done: open $run/report.html, and try
  $(dirname "$(command -v sparse-pathways)")/sparse-pathways transcribe $run/dynamic70.safetensors --language fr some.wav"
