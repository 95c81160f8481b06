"""Sub-commands of `mtl-dist` without a package of their own: each has `add_arguments` and `run_command`."""
