"""on_nonfinite="skip": a skipped call adds exactly zero to every gradient, and touches no other graph."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mtl_dist import Balancer
from mtl_dist.weighting import MGDA, Equal
from tests.faults.small import Net, assert_same, bad_batch, batch, gradients, net


def skipping() -> Net:
    return net(MGDA(), on_nonfinite="skip")


def plain_gradients(model: Net) -> dict[str, Tensor]:
    sum(model.losses(model.trunk(batch()).tanh()).values()).backward()
    return gradients(model)


@pytest.mark.parametrize("with_backward", [True, False])
def test_a_skipped_step_leaves_no_trace_on_later_losses(with_backward: bool) -> None:
    model, expected = skipping(), plain_gradients(skipping())
    kept = model(bad_batch())
    if with_backward:
        kept.backward()
        assert all(g.eq(0).all() for g in gradients(model).values())
    for _ in range(3):
        assert_same(plain_gradients(model), expected)
    del kept
    assert_same(plain_gradients(model), expected)


@pytest.mark.parametrize("order", ["bad first", "good first"])
def test_two_calls_before_one_backward_give_the_gradient_of_the_good_one(order: str) -> None:
    model = skipping()
    model(batch()).backward()
    expected = gradients(model)
    inputs = [bad_batch(), batch()] if order == "bad first" else [batch(), bad_batch()]
    sum(model(x) for x in inputs).backward()
    assert_same(gradients(model), expected)


def test_a_second_balancer_of_the_model_trains_on() -> None:
    torch.manual_seed(0)
    first, second = nn.Linear(4, 8), nn.Linear(8, 8)
    heads = nn.ModuleList([nn.Linear(8, 1) for _ in range(4)])
    everything = nn.ModuleList([first, second, heads])

    def losses(bad: bool) -> tuple[Tensor, Tensor]:
        one = Balancer(["a", "b"], MGDA(), on_nonfinite="skip")
        two = Balancer(["c", "d"], MGDA(), on_nonfinite="skip")
        z = first(batch()).tanh()
        factor = torch.tensor(torch.inf if bad else 1.0)
        a = one(
            z,
            {
                "a": lambda z: heads[0](z).square().mean() * factor,
                "b": lambda z: heads[1](z).square().mean(),
            },
        )
        y = second(z).tanh()
        b = two(y, {"c": lambda z: heads[2](z).square().mean(), "d": lambda z: heads[3](z).square().mean()})
        return a, b

    losses(bad=False)[1].backward()
    expected = gradients(everything)
    sum(losses(bad=True)).backward()
    assert_same(gradients(everything), expected)


def test_a_generator_that_skips_leaves_the_discriminator_alone() -> None:
    """The generator's bad graph goes through the discriminator's parameters."""
    model, critic = skipping(), nn.Linear(8, 1)

    def generator_loss(x: Tensor) -> Tensor:
        z = model.trunk(x).tanh()
        heads = {"a": lambda z: critic(z).square().mean(), "b": lambda z: (z - 1).square().mean()}
        return model.balancer(z, heads)

    def critic_gradient() -> Tensor:
        critic.zero_grad()
        critic(batch(3, 6) @ torch.ones(4, 8)).mean().backward()
        return critic.weight.grad.clone()

    expected = critic_gradient()
    generator_loss(bad_batch()).backward()
    assert torch.equal(critic_gradient(), expected)


def test_losses_without_features_are_zeroed_too() -> None:
    model = net(Equal(), on_nonfinite="skip")
    losses = model.losses(model.trunk(bad_batch()).tanh())
    model.balancer(losses).backward()
    assert all(g.eq(0).all() for g in gradients(model).values())


@pytest.mark.parametrize("where", ["trunk", "head"])
def test_what_a_reentrant_checkpoint_hides_is_refused(where: str) -> None:
    model = net(Equal(), on_nonfinite="skip")
    x = bad_batch().requires_grad_()
    z = checkpoint(model.trunk, x, use_reentrant=True) if where == "trunk" else model.trunk(x)

    def head(z: Tensor) -> Tensor:
        return checkpoint(model.heads["a"], z, use_reentrant=True).square().mean()

    other = {"b": lambda z: model.heads["b"](z).square().mean()}
    with pytest.raises(ValueError, match="use_reentrant=False"):
        model.balancer(z, {"a": head if where == "head" else lambda z: z.square().mean(), **other})


def test_a_model_is_copied_and_saved_after_a_skipped_call() -> None:
    model = skipping()
    kept = model(bad_batch())
    assert torch.isfinite(copy.deepcopy(model)(batch()))
    torch.save(model, file := io.BytesIO())
    file.seek(0)
    assert torch.isfinite(torch.load(file, weights_only=False)(batch()))
    assert kept == 0
