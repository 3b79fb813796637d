#!/usr/bin/env bash
# Trains sample_data/tiny-vl from random weights: data, two stages of full training, bfloat16.
# Takes about 20 minutes on two cores; writes to output/base, then to sample_data/tiny-vl.
#
#   bash sample_data/base_recipe.sh [working directory]
set -euo pipefail
cd "$(dirname "$0")/.."
bin=.venv/bin
work=${1:-output/base}
mkdir -p "$work" && rm -rf "$work/stage1" "$work/stage2"

$bin/python sample_data/printed.py "$work/glyphs" --images 24000 --seed 1 \
  --kinds digit letter --questions 1
$bin/python sample_data/printed.py "$work/mix" --images 24000 --seed 0
$bin/python sample_data/tiny_base.py "$work/untrained" --seed 0

# Stage 1, single glyphs at a constant learning rate, so that gradients come to train the tower through
# LLM and aligner. With the random tower frozen, or on all images at once, the loss does not fall in
# this time.
$bin/vlft sft --model "$work/untrained" --dataset "$work/glyphs/train.jsonl" --val-ratio 0.01 \
  --tuner full --train-aligner --train-vision --batch-size 64 --tokens-per-microbatch 1024 \
  --learning-rate 6e-4 --lr-scheduler constant --warmup-ratio 0.12 \
  --num-train-epochs 3 --max-steps 800 --save-steps 400 --logging-steps 20 --output-dir "$work/stage1"

# Stage 2, all images: numbers, words, shapes, colours, counting, dialogues, and text alone.
$bin/vlft sft --model "$work/stage1/untrained/"*/last --dataset "$work/mix/train.jsonl" --val-ratio 0.01 \
  --tuner full --train-aligner --train-vision --batch-size 64 --tokens-per-microbatch 1024 \
  --learning-rate 5e-4 --num-train-epochs 2 --max-steps 1200 --save-steps 400 --logging-steps 20 \
  --output-dir "$work/stage2"

$bin/python sample_data/store_base.py "$work/stage2/last/"*/last sample_data/tiny-vl
