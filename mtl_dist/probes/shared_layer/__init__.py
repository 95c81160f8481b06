"""SharedLayerProbe, and the gradients of one linear layer or convolution as rows."""

from __future__ import annotations

from mtl_dist.probes.shared_layer.probe import SharedLayerProbe

__all__ = ["SharedLayerProbe"]
