"""The forms in which a balancer can be called, for type checkers."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, overload

from torch import Tensor, nn

from mtl_dist.losses import Counts, HeadFunctions, Losses

Parameters = nn.Module | Tensor | Iterable[Tensor]


class TypedCall(nn.Module):
    """A module whose call is `Balancer.forward`, with one signature for each form of its arguments."""

    if TYPE_CHECKING:

        @overload
        def __call__(
            self, losses: Losses, /, *, counts: Counts | None = None, parameters: Parameters | None = None
        ) -> Tensor: ...

        @overload
        def __call__(
            self,
            losses: Tensor,
            /,
            *,
            task_ids: Tensor,
            mask: Tensor | None = None,
            parameters: Parameters | None = None,
        ) -> Tensor: ...

        @overload
        def __call__(
            self,
            features: Any,
            heads: HeadFunctions,
            *,
            counts: Counts | None = None,
            layer: nn.Module | None = None,
        ) -> Tensor: ...

        @overload
        def __call__(
            self,
            features: Any,
            heads: Callable[[Any], Tensor],
            *,
            layer: nn.Module | None = None,
            task_ids: Tensor,
            mask: Tensor | None = None,
        ) -> Tensor: ...

        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            """See `Balancer.forward`."""
