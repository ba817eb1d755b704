#!/usr/bin/env bash
# All cards of this machine. From the top of the repository:
#   bash examples/launch/torchrun_single_node.sh [CONFIG] [KEY=VALUE ...]
set -euo pipefail

config=${1:-lavis/projects/instruction_tuning/train_3090x4.yaml}
cards=${CARDS:-4} # edit: processes, one for each card

python -m torch.distributed.run --standalone --nproc_per_node="$cards" \
    train.py --cfg-path "$config" ${2:+--options "${@:2}"}
