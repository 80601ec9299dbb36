#!/usr/bin/env bash
# Which learning rate and rank? Four trials on Ray Tune; the one with the lowest held-out loss is published.
#
#   bash examples/sweep.sh my.jsonl tone
#   bash examples/sweep.sh my.jsonl tone --dry-run      # check and plan the trials, start none
set -euo pipefail

data=$1
name=$2
shift 2

# With evaluation.interval_steps, trials that fall behind are stopped early.
loray sweep --base "${MODEL:-smollm2}" --method lora --data "$data" --name "$name" \
  --set num_epochs=10 --set evaluation.interval_steps=5 \
  --grid optimizer.learning_rate=3e-4,1e-3 \
  --grid adapter.rank=8,16 \
  "$@"
