# shellcheck shell=bash
# Functions for the scripts in launch/ that train. Source this file after _setup.sh.

# SIGUSR1 asks the training processes to save (launch/slurm.sh). Whoever stands between, as launchers do, would die of it
trap '' USR1

# For -h and --help, prints the usage: the comment at the top of a script, up to the first empty line. Stops with an
# error if arguments are missing.
manual() { # script minimum given...
  local script="$1" minimum="$2"
  shift 2
  case "${1:-}" in -h | --help)
    sed -n -e '/^#SBATCH/d' -e '2,/^$/s/^# \{0,1\}//p' "$script"
    exit 0
    ;;
  esac
  [ "$#" -ge "$minimum" ] || fail "what to train is missing; see bash launch/$(basename "$script") --help"
}

engines() {
  local file names=""
  for file in "$ROOT"/configs/engine/*.yaml; do
    case "$file" in *_cpu.yaml) continue ;; esac
    names="$names${names:+, }$(basename "$file" .yaml)"
  done
  printf '%s' "$names"
}

# Sets ENGINE_FILE and EXTRA (what to install) from the name of an engine or the path of a file.
find_engine() { # engine
  ENGINE="$1"
  # shellcheck disable=SC2034 # read by the scripts
  EXTRA=recipes
  case "$ENGINE" in
    *.yaml) ENGINE_FILE="$ENGINE" ;;
    *) ENGINE_FILE="$ROOT/configs/engine/$ENGINE.yaml" ;;
  esac
  [ -f "$ENGINE_FILE" ] ||
    fail "no engine '$ENGINE'; choose one of $(engines), or give a file for accelerate launch --config_file"
  # shellcheck disable=SC2034
  if grep -q '^distributed_type: *DEEPSPEED' "$ENGINE_FILE"; then EXTRA=recipes,deepspeed; fi
}

# What a first training would do: installs, and compiles where DeepSpeed will run on the CPU.
prepare() {
  local has_gpu='import sys, torch; sys.exit(not torch.cuda.is_available())'
  setup "$EXTRA"
  case "$EXTRA" in
    *deepspeed*) if has_compiler && ! "$VENV/bin/python" -c "$has_gpu"; then compile_deepspeed; fi ;;
  esac
}

# Checks the settings in one process, because a launcher would hide the message. Sets NUM_GPUS.
check_settings() { # config key=value...
  local program='import sys, torch; from mtl_dist.train import main; print(torch.cuda.device_count()); sys.exit(main(sys.argv[1:]))'
  case "${ACCELERATE_USE_CPU:-}" in 1 | true | yes) export CUDA_VISIBLE_DEVICES="" ;; esac
  NUM_GPUS="$("$VENV/bin/python" -c "$program" --check "$@")" || exit 2
  export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
}

# Without a GPU, chooses the engine's file for CPU processes and sets the variables that it needs.
choose_device() {
  [ "$NUM_GPUS" = 0 ] || return 0
  unset ACCELERATE_USE_CPU # with it, Accelerate would silently replace DeepSpeed by plain data parallelism
  if [ "$ENGINE_FILE" = "$ROOT/configs/engine/$ENGINE.yaml" ] && [ -f "${ENGINE_FILE%.yaml}_cpu.yaml" ]; then
    ENGINE_FILE="${ENGINE_FILE%.yaml}_cpu.yaml"
  fi
  case "$(sed -n 's/^distributed_type: *//p' "$ENGINE_FILE")" in
    DEEPSPEED*)
      export DS_ACCELERATOR=cpu
      has_compiler ||
        fail "DeepSpeed on a CPU compiles an operator, but finds no '${CXX:-c++}'; install one (apt install g++)"
      compile_deepspeed
      ;;
    FSDP*) fail "no GPU is visible, and Accelerate runs FSDP only on accelerators; to debug on a CPU, use zero3" ;;
    *) export ACCELERATE_USE_CPU=true ;;
  esac
}

# Replaces this shell by `accelerate launch`. The training compares MTL_DIST_NUM_PROCESSES with the real number.
start() { # accelerate's options, --, config key=value...
  local options=()
  while [ "$1" != -- ]; do
    options+=("$1")
    shift
  done
  shift
  if [ -n "${MAX_RESTARTS:-}" ]; then
    options+=(--max_restarts "$MAX_RESTARTS")
    export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 # or new ranks read the addresses of dead ones (torch 2.13)
  fi
  if [ -n "${MIXED_PRECISION:-}" ]; then options+=(--mixed_precision "$MIXED_PRECISION"); fi
  if [ "$MTL_DIST_NUM_PROCESSES" = 1 ] && ! grep -qE '^distributed_type: *(DEEPSPEED|FSDP)' "$ENGINE_FILE"; then
    export ACCELERATE_MIXED_PRECISION="${MIXED_PRECISION:-no}" # Accelerate's launcher cannot start a single process
    exec "$VENV/bin/python" -m mtl_dist.train "$@"
  fi
  exec "$VENV/bin/accelerate" launch --config_file "$ENGINE_FILE" --num_processes "$MTL_DIST_NUM_PROCESSES" \
    "${options[@]+"${options[@]}"}" -m mtl_dist.train "$@"
}
