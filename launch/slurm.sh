#!/usr/bin/env bash
#SBATCH --job-name=mtl_dist
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=04:00:00
#SBATCH --output=%x-%j.log
# usage: sbatch [--nodes N ...] launch/slurm.sh ENGINE CONFIG [key=value ...]
#
# Trains on the machines of a SLURM job. SLURM starts one task per machine, and the task starts one process per GPU.
# Submit the job in the repository, on a file system that all machines share. Options of sbatch go before the script
# and override the #SBATCH lines above.
#
#   sbatch launch/slurm.sh zero2 configs/recipe/multi_digits.yaml output_dir=runs/zero2
#   sbatch --nodes 4 --gpus-per-node 4 --partition gpu launch/slurm.sh fsdp2 configs/recipe/multi_digits.yaml
#   sbatch --export=ALL,MIXED_PRECISION=bf16 launch/slurm.sh fsdp2 configs/recipe/multi_digits.yaml
#   sbatch launch/slurm.sh ddp configs/recipe/multi_digits.yaml resume_from=latest      continues an earlier job
#
# ENGINE, CONFIG  as in launch/node.sh
#
# PORT             port of the rendezvous on the first machine (default: 29500 + job number modulo 1000)
# NPROC_PER_NODE   processes per machine (default: one per GPU of the job)
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

export NNODES="$SLURM_JOB_NUM_NODES"
nodes="$(scontrol show hostnames "$SLURM_JOB_NODELIST")"
first="${nodes%%$'\n'*}" # a pipe to head would end the job where scontrol still writes
export HEAD="$first:${PORT:-$((29500 + SLURM_JOB_ID % 1000))}"
if [ "$NNODES" = 1 ]; then script=node.sh; else script=multinode.sh; fi
# if one machine fails, the job ends; the others do not wait for it
exec srun --kill-on-bad-exit=1 bash "launch/$script" "$@"
