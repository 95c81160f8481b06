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
# Trains on the machines of a SLURM job: one task a machine, which starts a process for each of its GPUs. Submit it in
# the repository, on a file system that all machines see; options of sbatch come before the script and win over the
# #SBATCH lines above.
#
#   sbatch launch/slurm.sh zero2 configs/recipe/multi_digits.yaml output_dir=runs/zero2
#   sbatch --nodes 4 --gpus-per-node 4 --partition gpu launch/slurm.sh fsdp2 configs/recipe/multi_digits.yaml
#   sbatch --export=ALL,MIXED_PRECISION=bf16 launch/slurm.sh fsdp2 configs/recipe/multi_digits.yaml
#   sbatch launch/slurm.sh ddp configs/recipe/multi_digits.yaml resume_from=latest      goes on where a job ended
#
# ENGINE, CONFIG  as in launch/node.sh
#
# PORT             of the rendezvous on the first machine (29500 + the job's number modulo 1000)
# NPROC_PER_NODE   processes a machine (every GPU that SLURM gives)
# MIXED_PRECISION  no, bf16 or fp16
# Where machines cannot reach the Internet, run the set-up on the login node first: bash launch/node.sh --setup ENGINE

set -euo pipefail
# sbatch runs a copy of this file, from its spool: the repository is where the job was submitted
cd "${SLURM_SUBMIT_DIR:-$(dirname "${BASH_SOURCE[0]}")/..}"
if [ ! -f launch/_setup.sh ]; then
  printf 'error: submit this job in the repository; %s is not it\n' "$PWD" >&2
  exit 1
fi
source launch/_setup.sh
source launch/_launch.sh

manual "${BASH_SOURCE[0]}" 2 "$@"
[ -n "${SLURM_JOB_ID:-}" ] || fail "this is no SLURM job; submit it: sbatch launch/slurm.sh $*"
find_engine "$1"
setup "$EXTRA" # once, on the first machine, before all of them look at it

export NNODES="$SLURM_JOB_NUM_NODES"
nodes="$(scontrol show hostnames "$SLURM_JOB_NODELIST")"
first="${nodes%%$'\n'*}" # a pipe to head would end the job where scontrol still writes
export HEAD="$first:${PORT:-$((29500 + SLURM_JOB_ID % 1000))}"
if [ "$NNODES" = 1 ]; then script=node.sh; else script=multinode.sh; fi
# one machine's failure ends the job, rather than leaving the others to wait for it
exec srun --kill-on-bad-exit=1 bash "launch/$script" "$@"
