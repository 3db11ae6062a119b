#!/usr/bin/env bash
# Slurm: one process a GPU, requeued until it is done.   sbatch --nodes=2 launch/slurm.sh train recipe=anime_a14b
#SBATCH --job-name=wantrain
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --signal=USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm-%j.out
# Slurm sends SIGUSR1 five minutes before the time ends, up to one minute earlier (take more, if a step takes longer),
# straight to the processes: no torchrun stands between, which would die of it and turn every exit code into 1.
set -uo pipefail
MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export MASTER_ADDR MASTER_PORT=$((20000 + SLURM_JOB_ID % 20000))
# ZeRO-3 in place of DDP: export ACCELERATE_USE_DEEPSPEED=true ACCELERATE_DEEPSPEED_ZERO_STAGE=3
srun --kill-on-bad-exit=1 bash -c '
    export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$SLURM_NTASKS
    export LOCAL_WORLD_SIZE=$((SLURM_NTASKS / SLURM_NNODES))
    exec python -m wantrain "$@"' wantrain "$@"
code=$?
# 130: stopped by the signal, and saved; 138: the signal came before the first step, or in a verb that keeps what it has
# finished; 75: a process was lost or stood still; 137, 143: killed with its machine.
# 2 is a fault that a person must mend, and would come again.
case $code in 75 | 130 | 137 | 138 | 143) scontrol requeue "$SLURM_JOB_ID" ;; esac
exit $code
