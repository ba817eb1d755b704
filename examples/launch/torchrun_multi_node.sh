#!/usr/bin/env bash
# Several machines. Run the same command on each, from the top of the repository:
#   MASTER_ADDR=first-machine NODES=2 bash examples/launch/torchrun_multi_node.sh [CONFIG] [KEY=VALUE ...]
# cache/ must be on every machine, output/ on a folder that all of them share. A machine that has
# failed joins again, and a run that has ended goes on, by the same command.
set -euo pipefail

config=${1:-lavis/projects/instruction_tuning/train_3090x4.yaml}
: "${MASTER_ADDR:?name of the first machine, as all others reach it}"
nodes=${NODES:-2}               # edit: machines
cards=${CARDS:-4}               # edit: cards of each machine
port=${MASTER_PORT:-29500}      # edit: a port that is open between them
run_id=${RUN_ID:-lavis}         # edit: another name for each run
# edit: if a machine has several networks, or its name leads to 127.0.1.1 (`ip -br address`)
# export GLOO_SOCKET_IFNAME=eth0 NCCL_SOCKET_IFNAME=eth0

# PyTorch's launcher shares its store by default, and a machine that comes back then waits for ever.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1

python -m torch.distributed.run --nnodes="$nodes" --nproc_per_node="$cards" --max-restarts=3 \
    ${LOCAL_ADDR:+--local-addr="$LOCAL_ADDR"} --rdzv-id="$run_id" \
    --rdzv-backend=c10d --rdzv-endpoint="$MASTER_ADDR:$port" \
    train.py --cfg-path "$config" --options run.output_dir="output/$run_id" \
    run.resume_ckpt_path=auto "${@:2}"
