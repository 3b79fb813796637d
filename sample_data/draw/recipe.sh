#!/usr/bin/env bash
# Trains sample_data/draw/tiny-janus from random weights: the VQ model, then the LLM, then bfloat16.
# Takes about 20 minutes of one thread; writes to output/draw-base, then to sample_data/draw/tiny-janus.
#
#   bash sample_data/draw/recipe.sh [working directory]
set -euo pipefail
cd "$(dirname "$0")/../.."
bin=.venv/bin
work=${1:-output/draw-base}
rm -rf "$work" && mkdir -p "$work"

$bin/python sample_data/draw/base.py "$work/base"

# Of the sixteen pairs of colour and shape the base hears four names: red squares, green circles, blue
# triangles, yellow crosses. In them either word alone says all. The others are called figures.
$bin/python sample_data/draw/shapes.py "$work/data" --train 8000 --val 64 --base
$bin/vlft sft --model "$work/base/untrained" --dataset "$work/data/train.jsonl" \
  --val-dataset "$work/data/val.jsonl" --tuner full --train-gen-aligner --train-gen-head \
  --batch-size 32 --learning-rate 2e-3 --num-train-epochs 5 --logging-steps 25 --save-steps 250 \
  --output-dir "$work/llm"

$bin/python sample_data/store_base.py "$work/llm/untrained/"*/last sample_data/draw/tiny-janus
