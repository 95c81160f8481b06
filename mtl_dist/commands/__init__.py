"""The sub-commands of `mtl-dist` without a room of their own: `add_arguments` and `run_command` of each."""
