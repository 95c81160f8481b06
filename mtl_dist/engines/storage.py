"""Parameters whose memory an engine frees between two traversals of one graph."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor


@contextmanager
def kept(parameters: Sequence[Tensor]) -> Iterator[Callable[[], None]]:
    """Gives a function that restores the memory of those parameters that have memory now.

    At the end of every traversal FSDP2 frees the parameters that belong to no unit below the root. It gathers
    them again only at the root's own backward, which comes later. They are copied here once. After the block
    their memory is free again, as FSDP2 believes it to be.
    """
    copies = [(p, p.detach().clone(), p.untyped_storage().size()) for p in parameters if is_there(p)]

    @torch.no_grad()
    def restore() -> None:
        for parameter, copy, size in copies:
            if not is_there(parameter):
                parameter.untyped_storage().resize_(size)
                parameter.data.copy_(
                    copy
                )  # `.data`, because the graph has saved this version of the parameter
                freed.append(parameter)

    freed: list[Tensor] = []
    try:
        yield restore
    finally:
        for parameter in freed:
            parameter.untyped_storage().resize_(0)


def is_there(parameter: Tensor) -> bool:
    """Whether a parameter's memory is allocated."""
    return parameter.untyped_storage().size() > 0
