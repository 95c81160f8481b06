"""The functional Adam against `torch.optim.Adam`."""

from __future__ import annotations

import pytest
import torch

from mtl_dist.weighting.adam import Adam

CPU = torch.device("cpu")
ALL = torch.ones(3, dtype=torch.bool)


def gradients(steps, scale=1.0):
    rng = torch.Generator().manual_seed(3)
    return scale * torch.randn(steps, 3, generator=rng, dtype=torch.float64)


def reference(steps, **settings):
    theta = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.Adam([theta], **settings)
    for gradient in steps:
        theta.grad = gradient.clone()
        optimizer.step()
    return theta.detach()


def ours(steps, active=None, **settings):
    adam, theta = Adam(**settings), torch.zeros(3, dtype=torch.float64)
    state = adam.init(3, CPU)
    for step, gradient in enumerate(steps):
        theta, state = adam.step(theta, gradient, ALL if active is None else active[step], state)
    return theta


@pytest.mark.parametrize("weight_decay", [0.0, 1e-3])
@pytest.mark.parametrize("eps", [0.0, 1e-8])
@pytest.mark.parametrize("lr", [1e-3, 0.025])
def test_the_same_as_torch_over_many_steps(lr, eps, weight_decay):
    settings = {"lr": lr, "eps": eps, "weight_decay": weight_decay}
    steps = gradients(200)
    torch.testing.assert_close(ours(steps, **settings), reference(steps, **settings), rtol=1e-12, atol=0)


def test_a_task_left_out_is_as_if_the_step_had_not_been():
    steps = gradients(9)
    active = torch.ones(9, 3, dtype=torch.bool)
    active[2:5, 1] = False
    active[0, 2] = False
    got = ours(steps, active, lr=0.01)
    for task in range(3):
        alone = reference(steps[active[:, task]], lr=0.01)
        torch.testing.assert_close(got[task], alone[task], rtol=1e-12, atol=0)


def test_without_eps_the_path_does_not_depend_on_the_gradients_scale():
    expected = ours(gradients(20), lr=0.01, eps=0.0)
    for scale in (1e-12, 1e12):
        got = ours(gradients(20, scale), lr=0.01, eps=0.0)
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=0)
    assert not torch.allclose(ours(gradients(20, 1e-12), lr=0.01), expected, rtol=1e-2)


def test_without_eps_and_gradient_nothing_moves():
    assert ours(torch.zeros(4, 3, dtype=torch.float64), lr=0.01, eps=0.0).tolist() == [0.0] * 3
