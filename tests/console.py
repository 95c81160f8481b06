"""`mtl-dist`, on a fork that has its imports: see `warm.py`."""

import sys

from mtl_dist.cli import main

sys.exit(main())
