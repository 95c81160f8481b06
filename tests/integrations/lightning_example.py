"""Lightning with a balancer; started by test_lightning.py, quoted in docs/engines.md.

lightning_example.py OUT NUM_PROCESSES
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import lightning
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from mtl_dist import Balancer
from mtl_dist.integrations.lightning import attach
from mtl_dist.weighting import MGDA, Smooth

BATCH = 8  # over all ranks


class Model(lightning.LightningModule):
    """Size and sign of a mean, from one trunk."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(4, 8), nn.Tanh())
        self.size, self.sign = nn.Linear(8, 1), nn.Linear(8, 2)
        self.balancer = Balancer(("size", "sign"), Smooth(MGDA(), 0.5))

    def training_step(self, batch: list[Tensor], index: int) -> Tensor:
        x, y = batch
        return self.balancer(
            self.trunk(x),
            {
                "size": lambda z: F.mse_loss(self.size(z).squeeze(-1), y),
                "sign": lambda z: F.cross_entropy(self.sign(z), (y > 0).long()),
            },
        )

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Data(lightning.LightningDataModule):
    """The same global batches in the same order on any number of ranks."""

    def train_dataloader(self) -> DataLoader:
        x = torch.randn(32, 4, generator=torch.Generator().manual_seed(1))
        data = TensorDataset(x, x.mean(1))
        ranks, rank = self.trainer.world_size, self.trainer.global_rank
        sampler = DistributedSampler(data, ranks, rank, shuffle=False)
        return DataLoader(data, batch_size=BATCH // ranks, sampler=sampler)


class Diary(lightning.Callback):
    """Weights of every step."""

    def __init__(self) -> None:
        self.rows: list[list[float]] = []

    def on_train_batch_end(self, trainer: object, module: Model, *args: object) -> None:
        self.rows.append(module.balancer.report.weight_vector.tolist())


def fit(num_processes: int, epochs: int, folder: str, resume: str | None = None) -> tuple[Model, dict]:
    lightning.seed_everything(0, verbose=False)
    model, diary = Model(), Diary()
    before = torch.cat([p.detach().flatten() for p in model.parameters()])
    trainer = lightning.Trainer(
        accelerator="cpu",
        devices=num_processes,
        strategy="ddp" if num_processes > 1 else "auto",
        max_epochs=epochs,
        default_root_dir=folder,
        callbacks=[diary],
        use_distributed_sampler=False,  # it would shuffle, and the test compares batches
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    attach(model.balancer, trainer)
    trainer.fit(model, Data(), ckpt_path=resume, weights_only=None if resume is None else True)
    after = torch.cat([p.detach().flatten() for p in model.parameters()])
    facts = {
        "world_size": trainer.world_size,
        "strategy": type(trainer.strategy).__name__,
        "step": model.balancer.step,
        "weights": diary.rows,
        "moved": (after - before).tolist(),
        "checkpoint": trainer.checkpoint_callback.best_model_path,
    }
    return model, facts


def main() -> None:
    out, num_processes = sys.argv[1], int(sys.argv[2])
    torch.set_num_threads(1)
    _, whole = fit(num_processes, 3, out)
    _, half = fit(num_processes, 2, f"{out}.half")
    model, resumed = fit(num_processes, 3, f"{out}.resumed", resume=half["checkpoint"])
    Path(f"{out}.{model.global_rank}").write_text(json.dumps({"whole": whole, "resumed": resumed}))


if __name__ == "__main__":
    main()
