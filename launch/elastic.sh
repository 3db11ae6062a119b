#!/usr/bin/env bash
# Several machines that may come and go: the same command on each.
#   NODES=1:4 GPUS=8 HOST=node0 launch/elastic.sh train recipe=anime_a14b
# When a machine is lost or joins, torchrun starts all processes anew with those that are there, and wantrain goes on from
# its newest checkpoint; data.batch_size must be a multiple of micro_batch_size x processes for every number that may occur.
# The run folder has to be one that every machine sees, since the first process may be another's then.
set -euo pipefail
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-600}    # torch below 2.12 waits 30 s, whatever it says
exec torchrun --nnodes "${NODES:-1:2}" --nproc-per-node "${GPUS:-1}" --rdzv-backend c10d --rdzv-id "${ID:-wantrain}" \
    --rdzv-endpoint "${HOST:-localhost}:${PORT:-29500}" --max-restarts "${RESTARTS:-100}" --no-python bash -c '
    trap : INT TERM    # python answers to them; this shell only waits for its code
    python -m wantrain "$@"
    code=$?
    # A fault that a person must mend would come again at every restart: end torchrun.
    if [ $code = 2 ]; then kill $PPID; fi
    exit $code' wantrain "$@"
