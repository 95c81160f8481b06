"""What `balance_loss_dict` takes for the divisor of a detector's losses. With ranks: tests/gallery."""

from __future__ import annotations

import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor
from transformers import RTDetrConfig
from transformers.loss.loss_rt_detr import RTDetrForObjectDetectionLoss

from mtl_dist import Balancer
from mtl_dist.integrations import loss_dict
from mtl_dist.integrations.loss_dict import _by_all_boxes, _warn_of_distillation
from mtl_dist.integrations.transformers import balance_loss_dict
from mtl_dist.weighting import Equal
from tests.integrations.test_own_loss import Detector, detecting

LOSSES = ("loss_vfl", "loss_bbox", "loss_giou")
Images = list[dict[str, Tensor]]


def labels_of(*boxes: int) -> Images:
    draw = torch.Generator().manual_seed(0)
    return [
        {
            "class_labels": torch.randint(3, (number,), generator=draw),
            "boxes": torch.rand(number, 4, generator=draw) * 0.3 + 0.2,
        }
        for number in boxes
    ]


def rt_detr(logits: Tensor, labels: Images, boxes: Tensor) -> Any:
    config = RTDetrConfig(num_labels=3, auxiliary_loss=False)
    return RTDetrForObjectDetectionLoss(logits, labels, "cpu", boxes, config)


@pytest.mark.filterwarnings("ignore::UserWarning")  # of torch, for images without boxes
@pytest.mark.parametrize("boxes", [(1, 2, 3, 1), (0, 0, 2, 1), (0, 0, 0, 0)])
def test_ranks_with_different_boxes_are_one_process(
    boxes: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two ranks with two images each; `vfl` is more than 0 where there is no box."""
    pytest.importorskip("scipy", reason="the matcher of RT-DETR needs it")
    draw = torch.Generator().manual_seed(1)
    logits, places = torch.randn(4, 5, 3, generator=draw), torch.rand(4, 5, 4, generator=draw)
    labels = labels_of(*boxes)
    joined = rt_detr(logits, labels, places)[1]
    total = torch.tensor([sum(boxes), 2.0])
    monkeypatch.setattr(loss_dict, "all_reduce_sum", lambda *_: total)
    balancer = Balancer(LOSSES, Equal())
    ranks = [
        _by_all_boxes(balancer, rt_detr, logits[part], labels[part], places[part])[1]
        for part in (slice(0, 2), slice(2, 4))
    ]
    for name in LOSSES:
        mean = (ranks[0][name] + ranks[1][name]) / 2
        torch.testing.assert_close(mean, joined[name], rtol=1e-6, atol=0)


def test_a_rank_without_boxes_has_denoising_losses_of_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    """They are sums over boxes, and without a box the model does not return them."""
    monkeypatch.setattr(loss_dict, "all_reduce_sum", lambda *_: torch.tensor([4.0, 2.0]))
    balancer = Balancer(["loss_vfl", "loss_vfl_dn_0", "loss_ddf"], Equal())
    leaf = torch.tensor(3.0, requires_grad=True)

    def inner(*_: Any) -> Any:
        return leaf * 2, {"loss_vfl": leaf * 1, "loss_ddf": leaf * 1}

    _, found = _by_all_boxes(balancer, inner, torch.zeros(1), labels_of(0))
    assert {name: loss.item() for name, loss in found.items()} == {
        "loss_vfl": 3.0 * 2 / 4,
        "loss_vfl_dn_0": 0.0,
        "loss_ddf": 3.0,  # no mean over boxes
    }
    assert found["loss_vfl_dn_0"].requires_grad


def test_unknown_divisors_on_several_ranks_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = detecting(tmp_path, Detector())
    monkeypatch.setattr(Accelerator, "num_processes", 2)
    with pytest.raises(
        ValueError, match=r"what the losses of Detector are divided by, and 2 ranks may .*give"
    ):
        balance_loss_dict(trainer, Balancer(["a", "b"], Equal()))
    balance_loss_dict(trainer, Balancer(["a", "b"], Equal()), counts=lambda *_, **__: {})


@pytest.mark.parametrize(
    ("tasks", "ranks", "told"),
    [(["loss_vfl", "loss_ddf_aux_0"], 2, True), (["loss_vfl"], 2, False), (["loss_ddf"], 1, False)],
)
def test_the_distillation_of_d_fine_is_told(
    tasks: list[str], ranks: int, told: bool, caplog: pytest.LogCaptureFixture
) -> None:
    trainer: Any = SimpleNamespace(
        accelerator=SimpleNamespace(num_processes=ranks), args=SimpleNamespace(process_index=0)
    )
    with caplog.at_level(logging.WARNING, "mtl_dist"):
        _warn_of_distillation(trainer, tasks)
    assert bool(caplog.messages) == told
    assert all("loss_ddf_aux_0 of D-FINE is no mean over boxes" in message for message in caplog.messages)
