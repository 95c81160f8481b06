"""The layer's Gram and the mixture objective on 1, 2 and 4 ranks: explicit autograd on the whole batch."""

from __future__ import annotations

import pytest
from launcher import succeed


@pytest.mark.timeout(400)
@pytest.mark.parametrize("num_processes", [1, 2, 4])
def test_ranks_measure_what_one_process_would(num_processes: int) -> None:
    out = succeed("shared_layer.py", num_processes, timeout=380)
    assert f"162 comparisons on {num_processes} ranks" in out
