#!/usr/bin/env bash
# Check one GPU: a sweep of 4 trials at the 1.1B shape with ASHA, one trial at the 7B shape, and the demo twice.
#
#   scripts/gpu_check.sh GSM8K_FOLDER OUT
#
# GSM8K_FOLDER contains train.jsonl with the fields question and answer. The bases have random weights
# (scripts/make_base.py), so only time, memory use and the absence of errors are meaningful. The last lines are a summary
# of all trials, as in docs/log.md.
set -euo pipefail
data=$(realpath "${1:?usage: gpu_check.sh GSM8K_FOLDER OUT}")/train.jsonl
out=$(realpath -m "${2:?usage: gpu_check.sh GSM8K_FOLDER OUT}")
cd "$(dirname "$0")/.."
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1
orchestrator() { python3 -m orchestrator "$@"; }
bases=$(mktemp -d); trap 'rm -rf "$bases"' EXIT
template='<s>[INST] {question} [/INST] {answer} </s>'

python3 scripts/make_base.py 1.1b "$bases/1.1b" --text "$data"
time orchestrator sweep experiments/tinyllama-gsm8k.yaml --output "$out" --name sweep-1.1b \
  --set base.model="$bases/1.1b" --set data.source="$data" --set data.config=null \
  --set 'data.held_out={count: 100}' --set evaluation.metrics=[] --set search.num_trials=4 --set search.seed=3 \
  --set training.batch_size=4 --set training.steps=90 --set training.eval_steps=30 --set scheduler.grace_steps=30
orchestrator best "$out/sweep-1.1b" --json

python3 scripts/make_base.py 7b "$bases/7b" --text "$data"
time orchestrator trial experiments/llama2-7b-chat.yaml --output "$out" --name trial-7b \
  --set base.model="$bases/7b" --set data.source="$data" --set data.format=template --set "data.template='$template'" \
  --set 'data.held_out={count: 100}' --set training.epochs=null --set training.steps=40 --set training.eval_steps=20 --set scheduler.grace_steps=20

time orchestrator demo --output "$out" --name demo
time orchestrator demo --output "$out" --name demo-4-a-gpu --set resources.trials_per_gpu=4

python3 - "$out" <<'PYTHON'
import sys
from orchestrator import open_sweep
for name in ("sweep-1.1b", "trial-7b", "demo", "demo-4-a-gpu"):
    for trial in open_sweep(name, sys.argv[1]).trials():
        print(name, trial.trial_id, trial.state, f"step {trial.step}", f"loss {trial.best.value:.4f}" if trial.best else "",
              f"{trial.tokens_per_second} tok/s", f"{trial.peak_memory_gib} GiB", f"{trial.gpu_seconds} GPU s", trial.device)
PYTHON
