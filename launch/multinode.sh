#!/usr/bin/env bash
# usage: NNODES=N HEAD=host:port bash launch/multinode.sh ENGINE CONFIG [key=value ...]
#
# Trains on several machines. Run the same line on each of them, in any order: they meet at HEAD (torchrun's c10d
# rendezvous), which must be one of them, and agree on ranks there.
#
#   NNODES=2 HEAD=node0:29500 bash launch/multinode.sh zero2 configs/recipe/multi_digits.yaml
#   NNODES=4 HEAD=10.0.0.1:29500 NPROC_PER_NODE=8 MIXED_PRECISION=bf16 bash launch/multinode.sh fsdp2 CONFIG
#
# ENGINE, CONFIG  as in launch/node.sh
#
# NNODES                how many machines, all with as many processes
# HEAD                  host:port of one of them, reachable from all; the port must be free there
# NPROC_PER_NODE        processes a machine (every visible GPU; 2 on a CPU)
# MIXED_PRECISION, CUDA_VISIBLE_DEVICES, MTL_DIST_PYTHON  as in launch/node.sh
#
# Every machine needs this repository at the same commit, with the same settings. output_dir must be on a file system
# that all of them see: rank 0 writes metrics and summary there, every rank its part of a checkpoint.
# A run that starts other than NNODES x NPROC_PER_NODE processes is refused. When one machine fails all end.

set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/_setup.sh"
source "$(dirname "${BASH_SOURCE[0]}")/_launch.sh"

manual "${BASH_SOURCE[0]}" 2 "$@"
case "${NNODES:-}" in '' | *[!0-9]* | 0 | 1) fail "NNODES='${NNODES:-}': how many machines? (one: launch/node.sh)" ;; esac
case "${HEAD:-}" in ?*:[0-9]*) ;; *) fail "HEAD='${HEAD:-}': name host:port of one of the machines, as HEAD=node0:29500" ;; esac
find_engine "$1"
shift
setup "$EXTRA"
check_settings "$@"
choose_device
if [ "$NUM_GPUS" = 0 ]; then NUM_GPUS=2; fi
export MTL_DIST_NUM_PROCESSES="$((NNODES * ${NPROC_PER_NODE:-$NUM_GPUS}))"
# the machines' ranks come from the rendezvous; --machine_rank is without meaning here, and 0 would only make
# Accelerate refuse a machine on which the rendezvous has opened the port already
start --num_machines "$NNODES" --machine_rank 1 --rdzv_backend c10d \
  --main_process_ip "${HEAD%:*}" --main_process_port "${HEAD##*:}" -- "$@"
