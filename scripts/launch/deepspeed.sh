#!/usr/bin/env bash
# One machine, gradients and optimizer spread by DeepSpeed's ZeRO-2, a whole student and teacher on each GPU.
#   pip install deepspeed; bash scripts/launch/deepspeed.sh 8 --student Qwen/Qwen2.5-1.5B --teacher Qwen/Qwen2.5-7B
set -euo pipefail
gpus=$1
python scripts/scale_text.py --strategy deepspeed --devices "$gpus" --precision bf16-mixed --teacher-dtype bfloat16 \
  "${@:2}"
