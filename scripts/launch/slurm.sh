#!/usr/bin/env bash
# A training job under SLURM that is requeued until it is finished: sbatch [SBATCH OPTIONS] scripts/launch/slurm.sh OVERRIDE ...,
#   sbatch --nodes=2 --gpus-per-node=8 --ntasks-per-node=8 --time=12:00:00 scripts/launch/slurm.sh name=long model=1b zero=2 dtype=bf16
# One task a GPU, started by srun without torchrun, which would give the ranks 30 seconds from the signal to their end. Five
# minutes before the time limit, and on preemption, every rank finishes its step, saves and exits; the job then goes back
# into the queue under its number, and resume=auto (the default) goes on from there.
#SBATCH --job-name=sieve
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:USR1@300
set -uo pipefail
export MASTER_ADDR=${MASTER_ADDR:-$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)}
export MASTER_PORT=${MASTER_PORT:-$((20000 + SLURM_JOB_ID % 20000))}
again=0
ranks=
stop() {
    again=1
    [ -n "$ranks" ] && kill -TERM "$ranks" # srun passes it on to every rank
}
trap stop USR1 TERM
# shellcheck disable=SC2016 # each task expands its own variables
srun --kill-on-bad-exit=1 bash -c '
    export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$SLURM_NTASKS
    exec "${PYTHON:-python}" -m sieve.train "$@"' rank "$@" &
ranks=$!
status=0
while :; do # a signal ends a wait, not the ranks
    wait "$ranks"
    status=$?
    kill -0 "$ranks" 2>/dev/null || break
done
if [ "$status" -gt 128 ]; then # they may have ended right behind the signal: their own status is still to be had
    wait "$ranks"
    last=$?
    [ "$last" -ne 127 ] && status=$last
fi
[ "$again" -eq 1 ] && [ "$status" -eq 0 ] && exec scontrol requeue "$SLURM_JOB_ID"
exit "$status"
