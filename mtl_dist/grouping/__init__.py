"""Groups of tasks: how their gradients agree, and which tasks belong together.

`Affinities` holds what a run recorded about pairs of tasks. `find_groups` looks for the groups with the least
`codelength`, in the sense of the map equation. `mtl-dist groups RUN_DIR` does both for a run, and the HTML
report draws the result.

Links of the map equation are >= 0. So a conflict, a negative cosine, is no link: the search can tell tasks
that help each other from tasks that do not, but a conflict separates no more than indifference does. The
cosines between groups tell the two apart, so look at them too.
"""

from __future__ import annotations

from mtl_dist.grouping.affinity import Affinities, Agreement
from mtl_dist.grouping.map_equation import Groups, codelength
from mtl_dist.grouping.search import find_groups

__all__ = ["Affinities", "Agreement", "Groups", "codelength", "find_groups"]
