#!/usr/bin/env bash
# One machine, a whole student and teacher on each GPU. Lightning starts the other processes itself.
#   bash scripts/launch/ddp.sh 8 --student Qwen/Qwen2.5-0.5B --teacher Qwen/Qwen2.5-7B --files corpus.txt
set -euo pipefail
gpus=$1
python scripts/scale_text.py --strategy ddp --devices "$gpus" --precision bf16-mixed --teacher-dtype bfloat16 "${@:2}"
