"""HF Trainer: the model's forward returns the balancer's scalar as its loss, and `Trainer` is unchanged.

    class Net(PreTrainedModel):
        def forward(self, input_ids, topic, tone):
            z = self.bert(input_ids).last_hidden_state
            return {"loss": self.balancer(z, {"topic": ..., "tone": ...})}

    trainer = Trainer(Net(config), args, train_dataset=table)
    attach(trainer.model.balancer, trainer)
    trainer.train()

Trainer's logs then have weights, losses and norms beside its own loss, `trainer_state.json` in each
checkpoint has the balancer's state, and evaluations have each task's loss and a total in fixed weights. Each
micro-batch updates the rule. With `Balancer(..., window=args.gradient_accumulation_steps)` all micro-batches
of an optimizer step have the same weights.

`balance_by_column` needs no change of the model: tasks are the values of a column of the data set. Nor does
`balance_loss_dict`, for detectors: tasks are the names in the model's own dictionary of losses.
"""

from __future__ import annotations

from mtl_dist.integrations._trainer import attach, detach
from mtl_dist.integrations._trainer_callback import BalancerCallback
from mtl_dist.integrations.by_column import balance_by_column
from mtl_dist.integrations.loss_dict import balance_loss_dict

__all__ = ["BalancerCallback", "attach", "balance_by_column", "balance_loss_dict", "detach"]
