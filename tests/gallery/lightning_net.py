"""Lightning's Trainer: `training_step` returns the balancer's scalar."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor
from torch.utils.data import DataLoader

from mtl_dist import Rule
from mtl_dist.integrations.lightning import attach
from tests.gallery import fabric
from tests.gallery.run import DEVICE, SAVED, WORLD_SIZE, flat, mine

PLAIN, RULE = fabric.PLAIN, fabric.RULE
LINES = 3


class Module(lightning.LightningModule):
    def __init__(self, rule: Rule | None) -> None:
        super().__init__()
        self.net = fabric.Net(rule)
        self.losses: list[float] = []

    def training_step(self, batch: Tensor) -> Tensor:
        loss = self.net(batch)
        self.losses.append(loss.item() if WORLD_SIZE == 1 else 0.0)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)


def train(rule: Rule | None, folder: Path, steps: int, resume: bool) -> dict[str, Any]:
    torch.manual_seed(0)
    module = Module(rule)
    batches = torch.randn(6, 8, 6, generator=torch.Generator().manual_seed(1))
    # 6 batches an epoch, so epochs end inside an accumulation
    loader = DataLoader([mine(batch) for batch in batches], batch_size=None)
    trainer = lightning.Trainer(
        accelerator=DEVICE,
        devices=WORLD_SIZE,
        strategy="ddp" if WORLD_SIZE > 1 else "auto",
        max_steps=steps,
        accumulate_grad_batches=4,
        default_root_dir=folder,
        enable_progress_bar=False,
        enable_model_summary=False,
        logger=False,
        use_distributed_sampler=False,
        callbacks=[ModelCheckpoint(folder, "at-{step}", every_n_train_steps=SAVED, save_top_k=-1)],
    )
    if rule is not None:
        attach(module.net.balancer, trainer)  # +
    trainer.fit(module, loader, ckpt_path=folder / f"at-step={SAVED}.ckpt" if resume else None)
    return {"parameters": flat(module), "losses": module.losses}
