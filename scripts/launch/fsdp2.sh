#!/usr/bin/env bash
# One machine, the student's weights, gradients and optimizer spread over the GPUs; add --spread-teacher for a teacher
# that does not fit one of them.
#   bash scripts/launch/fsdp2.sh 8 --student Qwen/Qwen2.5-7B --teacher Qwen/Qwen2.5-72B --spread-teacher
set -euo pipefail
gpus=$1
torchrun --standalone --nproc-per-node "$gpus" scripts/scale_text.py --strategy fsdp2 --devices "$gpus" \
  --precision bf16-mixed --teacher-dtype bfloat16 "${@:2}"
