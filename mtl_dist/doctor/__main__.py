"""`python -m mtl_dist.doctor`, for launchers."""

from __future__ import annotations

import argparse

from mtl_dist.doctor import add_arguments, run_command

if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        prog="python -m mtl_dist.doctor", description="Checks whether this launch trains correctly."
    )
    add_arguments(parser)
    raise SystemExit(run_command(parser.parse_args()))
