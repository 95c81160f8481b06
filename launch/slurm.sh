#!/usr/bin/env bash
#SBATCH --job-name=mtl_dist
#SBATCH --ntasks-per-node=1
#SBATCH --time=04:00:00
#SBATCH --signal=B:USR1@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
# usage: sbatch [--nodes N --gpus-per-node G ...] launch/slurm.sh ENGINE CONFIG [key=value ...]
#
# Trains on the machines of a SLURM job. SLURM starts one task per machine, and the task starts one process per GPU.
# Submit the job in the repository, on a file system that all machines share. Options of sbatch go before the script
# and add to the #SBATCH lines above, or override them.
#
#   sbatch --gpus-per-node 8 launch/slurm.sh zero2 configs/recipe/multi_digits.yaml output_dir=runs/zero2
#   sbatch --nodes 4 --gpus-per-node 4 --partition gpu launch/slurm.sh fsdp2 configs/recipe/multi_digits.yaml
#   sbatch --gpus-per-node 8 --export=ALL,MIXED_PRECISION=bf16 launch/slurm.sh fsdp2 configs/recipe/multi_digits.yaml
#
# The run goes on by itself (resume_from=auto): after `scontrol requeue`, a preemption or a failed machine it continues
# from its last checkpoint. 120 seconds before the time limit, SLURM sends a signal: all ranks save after their step, and
# the job is queued again. For a large model ask for more time: --signal=B:USR1@600. `scancel` saves too, within the
# 30 seconds that SLURM leaves it (KillWait). A run of other settings in output_dir is refused, as always.
#
# ENGINE, CONFIG  as in launch/node.sh
#
# PORT             port of the rendezvous on the first machine (default: 29500 + job number modulo 1000)
# NPROC_PER_NODE   processes per machine (default: one per GPU of the job; 2 without GPUs)
# MIXED_PRECISION  no, bf16 or fp16
# If the machines have no Internet access, run the set-up on the login node first: bash launch/node.sh --setup ENGINE

set -euo pipefail
# sbatch runs a copy of this file from another folder; the repository is where the job was submitted
cd "${SLURM_SUBMIT_DIR:-$(dirname "${BASH_SOURCE[0]}")/..}"
if [ ! -f launch/_setup.sh ]; then
  printf 'error: submit this job in the repository; %s is not the repository\n' "$PWD" >&2
  exit 1
fi
source launch/_setup.sh
source launch/_launch.sh

manual "${BASH_SOURCE[0]}" 2 "$@"
[ -n "${SLURM_JOB_ID:-}" ] || fail "this is not a SLURM job; submit it: sbatch launch/slurm.sh $*"
find_engine "$1"
setup "$EXTRA" # once, on the first machine, before all machines use it

if [ -z "${SLURM_GPUS_ON_NODE:-}${SLURM_GPUS_PER_NODE:-}" ]; then
  printf 'slurm.sh: this job has no GPUs (sbatch --gpus-per-node G asks for them): training on the CPU\n' >&2
fi
export NNODES="$SLURM_JOB_NUM_NODES"
nodes="$(scontrol show hostnames "$SLURM_JOB_NODELIST")"
first="${nodes%%$'\n'*}" # a pipe to head would end the job where scontrol still writes
export HEAD="$first:${PORT:-$((29500 + SLURM_JOB_ID % 1000))}"
if [ "$NNODES" = 1 ]; then script=node.sh; else script=multinode.sh; fi

stopping=""
# shellcheck disable=SC2329 # the trap calls it
stop() { # the time limit is near: SLURM tells this script only, and not the tasks
  stopping=yes
  scancel --signal=USR1 "$SLURM_JOB_ID" || true
}
trap stop USR1

# if one machine fails, the job ends; the others do not wait for it
srun --kill-on-bad-exit=1 bash "launch/$script" "$1" "$2" resume_from=auto "${@:3}" &
status=0
wait $! || status=$?
while kill -0 $! 2>/dev/null; do # the signal interrupted the wait
  status=0
  wait $! || status=$?
done
if [ -n "$stopping" ] && [ "$status" != 0 ]; then
  printf 'slurm.sh: stopped ahead of the time limit; queued again\n' >&2
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
