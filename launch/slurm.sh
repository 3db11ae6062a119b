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
# Slurm sends SIGUSR1 to all processes five minutes before the time ends, or up to one minute earlier (take more, if a
# step takes longer). No torchrun stands between, which would die of it and turn every exit code into 1.
set -uo pipefail
MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export MASTER_ADDR MASTER_PORT=$((20000 + SLURM_JOB_ID % 20000))
# ZeRO-3 in place of DDP: export ACCELERATE_USE_DEEPSPEED=true ACCELERATE_DEEPSPEED_ZERO_STAGE=3
# srun gives the largest code of all tasks, and when one task ends ends the others. So what a person must mend (2, and 1, a
# fault of ours) is made the largest, and the death of a task that was only ended with the others the least.
srun --kill-on-bad-exit=1 bash -c '
    export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$SLURM_NTASKS
    export LOCAL_WORLD_SIZE=$((SLURM_NTASKS / SLURM_NNODES))
    trap : INT TERM USR1
    python -m wantrain "$@"
    code=$?
    case $code in 1 | 2) exit $((code + 200)) ;; 143) exit 64 ;; *) exit $code ;; esac' wantrain "$@"
code=$?
case $code in 201 | 202) code=$((code - 200)) ;; 64) code=143 ;; esac
# 130: stopped by the signal, and saved; 138: the signal came before the first step, or in a verb that keeps what it has
# finished; 75: a process was lost or stood still; 137, 143: killed with its machine.
case $code in 75 | 130 | 137 | 138 | 143) scontrol requeue "$SLURM_JOB_ID" ;; esac
exit $code
