"""KL balancing on two ranks: on global losses it is one process, on local ones it is not. Run by
tests/recipes/test_hierarchical_vae.py."""

import torch
import torch.distributed as dist
from ranks import start, stop

from mtl_dist import Balancer
from mtl_dist.recipes import ImageVAE
from mtl_dist.stats import TaskStats
from mtl_dist.weighting import KLBalance

RULE = KLBalance({"kl_0": 1.0, "kl_1": 1.0, "kl_2": 4.0, "kl_3": 4.0}, warmup=10, floor=0.1)
RECIPE = ImageVAE(num_train=64, channels=8, latents=2, spectral=0.0)


class Recorder(torch.nn.Module):
    """Keeps the losses in a balancer's place."""

    def forward(self, losses, counts):
        self.losses = list(losses.values())
        return sum(self.losses)


def weights_of(losses):
    """The rule's weights, as the published code has them: from whatever losses one has."""
    values = torch.stack(losses).detach().double()
    stats = TaskStats(values, torch.ones(len(values), dtype=torch.bool), None, torch.ones(len(values)))
    return RULE.update(stats, RULE.init(RECIPE.tasks, values.device))[0]


def gradient(loss, net):
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(net.parameters()))]).double()


def averaged(vector):
    dist.all_reduce(vector)
    return vector / dist.get_world_size()


rank, world_size = start()
torch.manual_seed(0)
net = RECIPE.model(Balancer(RECIPE.tasks, RULE)).double()
batch = RECIPE.data(0)[0].__getitems__(range(64))
order = batch["image"].sum((1, 2)).argsort()  # one rank has the thin digits, the other the thick ones
batch = {name: field[order] for name, field in batch.items()}
batch["noise"] = batch["noise"].double()
mine = {name: field.chunk(world_size)[rank] for name, field in batch.items()}

global_form = averaged(gradient(net(**mine), net))
used = torch.tensor([net.balancer.report.weights[task] for task in RECIPE.tasks], dtype=torch.float64)

net.balancer = recorder = Recorder()
net(**batch)
expected = weights_of(recorder.losses)
loss = sum(w * value for w, value in zip(expected, recorder.losses, strict=True))
whole = gradient(loss, net)

net(**mine)
local = weights_of(recorder.losses)
loss = sum(w * value for w, value in zip(local, recorder.losses, strict=True))
local_form = averaged(gradient(loss, net))

torch.testing.assert_close(used, expected, rtol=1e-9, atol=1e-12)
torch.testing.assert_close(global_form, whole, rtol=1e-7, atol=1e-10)
spread = averaged((local - averaged(local.clone())).abs() / expected).max()
error = (local_form - whole).norm() / whole.norm()
if rank == 0:
    print(f"local weights differ by {spread:.6f} and the gradient by {error:.6f}")
del net, recorder
stop()
