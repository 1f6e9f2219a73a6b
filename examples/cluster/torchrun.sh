#!/usr/bin/env bash
# All GPUs of one machine:  RECIPE=libero_spatial ./torchrun.sh [further options of `vla-oft train`]
set -euo pipefail

RECIPE=${RECIPE:-libero_spatial}
OUT=${OUT:-runs/$RECIPE}
GPUS=${GPUS:-$(nvidia-smi --list-gpus | wc -l)}

export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}             # of each process; torchrun would say so at length
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-300}  # seconds to save in after a SIGTERM (new torch; else 30)

# --resume begins the run where there is none, so the same command goes on after a kill
exec torchrun --standalone --nproc-per-node "$GPUS" -m vla_oft train "$RECIPE" --out "$OUT" --resume "$@"
