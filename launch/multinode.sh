#!/usr/bin/env bash
# usage: NNODES=N HEAD=host:port bash launch/multinode.sh ENGINE CONFIG [key=value ...]
#
# Trains on several machines. Run the same command on each of them, in any order. They connect to HEAD (the c10d
# rendezvous of torchrun), which must be one of them, and get their ranks there.
#
#   NNODES=2 HEAD=node0:29500 bash launch/multinode.sh zero2 configs/recipe/multi_digits.yaml
#   NNODES=4 HEAD=10.0.0.1:29500 NPROC_PER_NODE=8 MIXED_PRECISION=bf16 bash launch/multinode.sh fsdp2 CONFIG
#
# ENGINE, CONFIG  as in launch/node.sh
#
# NNODES                number of machines; all have the same number of processes
# HEAD                  host:port of one of them; all must reach it, and the port must be free
# NPROC_PER_NODE        processes per machine (default: one per visible GPU; 2 on a CPU)
# MIXED_PRECISION, MAX_RESTARTS, CUDA_VISIBLE_DEVICES, MTL_DIST_PYTHON  as in launch/node.sh
#
# Before it starts, the machines compare what they have (mtl-dist doctor), and print what is wrong with what cures it.
# NO_CHECK=1 leaves that out; WAIT_MINUTES is how long they wait for each other (default: 10).
#
# Every machine needs this repository at the same commit, with the same settings. output_dir must be on a file system
# that all machines share: rank 0 writes metrics and summary, and every rank writes its part of a checkpoint.
# The training stops with an error unless NNODES x NPROC_PER_NODE processes run. If one machine fails, all stop.

set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/_setup.sh"
source "$(dirname "${BASH_SOURCE[0]}")/_launch.sh"

manual "${BASH_SOURCE[0]}" 2 "$@"
case "${NNODES:-}" in '' | *[!0-9]* | 0 | 1) fail "NNODES='${NNODES:-}': give the number of machines, 2 or more (for one: launch/node.sh)" ;; esac
case "${HEAD:-}" in ?*:[0-9]*) ;; *) fail "HEAD='${HEAD:-}': give host:port of one of the machines, such as HEAD=node0:29500" ;; esac
find_engine "$1"
shift
setup "$EXTRA"
check_settings "$@"
choose_device
if [ "$NUM_GPUS" = 0 ]; then NUM_GPUS=2; fi
export MTL_DIST_NUM_PROCESSES="$((NNODES * ${NPROC_PER_NODE:-$NUM_GPUS}))"
if [ -z "${NO_CHECK:-}" ]; then
  "$VENV/bin/python" -m mtl_dist.doctor --machines "$NNODES" --head "$HEAD" --engine "$ENGINE_FILE" \
    --num-processes "$MTL_DIST_NUM_PROCESSES" --wait-minutes "${WAIT_MINUTES:-10}" "$@" >&2 || exit 1
fi
# the rendezvous assigns the machine ranks, so --machine_rank has no meaning here; with 0, Accelerate would stop on the
# machine on which the rendezvous has already opened the port
start --num_machines "$NNODES" --machine_rank 1 --rdzv_backend c10d \
  --main_process_ip "${HEAD%:*}" --main_process_port "${HEAD##*:}" -- "$@"
