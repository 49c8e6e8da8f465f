"""The bench: every reference computes what it is compared with; the table has every row.

    pytest tests/test_bench.py          # nothing here depends on time
"""
import io
import json

import pytest
import torch
import torchvision.transforms.functional as change
from PIL import Image
from torch.testing import assert_close

import bench
from conftest import call
from data import COLOUR_DRAWS, colour
from losses import rkd_angle_loss, rkd_distance_loss
from model import ema_update


@pytest.mark.parametrize("ours, original", [(rkd_distance_loss, bench.original_distance),
                                            (rkd_angle_loss, bench.original_angle)])
def test_the_relations_of_the_original_code_are_ours(ours, original):
    points = torch.randn(2, 20, 6, generator=torch.Generator().manual_seed(0)).double()
    student, found = points[0].requires_grad_(), []
    for loss in (ours, original):
        value = loss(student, points[1])
        found.append((value.float(), *torch.autograd.grad(value, student)))
    assert_close(*found, rtol=1e-5, atol=1e-8)


def stepped(loss, original, **options):
    """Loss, gradients, centres and averaged teacher of a small system with moved weights."""
    sizes = {"head-hidden": 24, "prototypes": 16, "projection": 8} | options
    torch.manual_seed(0)
    system, views, mask = bench.training_system(loss, "vit_tiny", "cpu", 3, size=112, **sizes)
    random = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for x in system.parameters():
            x += 0.1 * torch.randn(x.shape, generator=random)
    system.state = {name: 0.05 * torch.randn(x.shape, generator=random)
                    for name, x in system.state.items()}
    value = (bench.original_loss(system, views, mask) if original
             else system(views, views, mask)[0])
    value.backward()
    (bench.original_ema if original else ema_update)(system.teacher, system.student, 0.9)
    gradients = [p.grad for p in system.student.parameters() if p.grad is not None]
    return value.detach(), gradients, system.state, system.teacher.state_dict()


@pytest.mark.parametrize("loss, options", [("dino", {"local-crops": 3}), ("ibot", {})])
def test_the_original_step_has_our_loss_gradients_centres_and_teacher(loss, options):
    (a, original, *theirs), (b, gradients, *ours) = (stepped(loss, x, **options)
                                                     for x in (True, False))
    assert_close(a, b, rtol=1e-5, atol=0)
    assert len(gradients) == len(original) > 100
    for x, y in zip(gradients, original):
        assert (x - y).norm() <= 1e-4 * y.norm() + 1e-6
    assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


def test_the_original_search_and_probes_give_our_numbers():
    original, ours = bench.knn(300, 40, ks=(5, 20), D=8, classes=7)
    assert_close(original(), list(ours().values()), rtol=1e-4, atol=1e-4)
    original, ours = bench.probe(300, 4, epochs=3, D=6)
    for layer, weight, bias in zip(original(), *ours().parameters, strict=True):
        assert_close(layer.weight.detach().T, weight, rtol=1e-4, atol=1e-5)
        assert_close(layer.bias.detach(), bias.flatten(), rtol=1e-4, atol=1e-5)


def test_block_masks_hide_75_patches_and_those_of_beits_generator_about_as_many():
    original, ours = (run().flatten(1).sum(1).float() for run in bench.block_masks(400))
    assert ours.eq(75).all() and original.max() == 75
    assert original.mean().item() == pytest.approx(74.5, abs=0.5)  # it may find no last rectangle


def by_pil(pixels, draw):
    """An image (3, S, S) with the colours of one row of draws, by torchvision's PIL functions."""
    image = change.to_pil_image(pixels)
    if draw[0] < 0.8:
        bright, contrast, saturation = (1 + 0.4 * (2 * x - 1) for x in draw[1:4])
        image = change.adjust_contrast(change.adjust_brightness(image, bright), contrast)
        image = change.adjust_saturation(image, (1 + saturation) / 2)
        image = change.adjust_hue(image, 0.1 * (2 * draw[4] - 1))
    image = change.rgb_to_grayscale(image, 3) if draw[5] < 0.2 else image
    return change.pil_to_tensor(image) / 255


def test_our_colours_are_those_of_pil_to_little_more_than_a_grey_level():
    file = io.BytesIO(bench.photographs(1)[0])
    pixels = change.pil_to_tensor(Image.open(file).convert("RGB"))[None, :, :96, :96] / 255
    draws = torch.rand(40, COLOUR_DRAWS, generator=torch.Generator().manual_seed(0))
    ours = colour(pixels.expand(40, -1, -1, -1).clone(), draws, 0.4, 0.1, blur_probability=0)
    theirs = torch.stack([by_pil(pixels[0], draw) for draw in draws.tolist()])
    assert 255 * (ours - theirs).abs().mean() < 1.5  # PIL's hue has 256 steps, and it rounds


def test_the_table_has_one_row_of_json_per_row(monkeypatch, capsys):
    monkeypatch.setattr(bench.time, "monotonic", iter(range(0, 10**6, 100)).__next__)
    call("--device", "cpu", "--quick", "--only", "block", "distance", main=bench.main)
    rows = [json.loads(x) for x in capsys.readouterr().out.splitlines() if x.startswith("{")]
    assert [row["row"] for row in rows] == ["distance 256", "block masks"]
    for row in rows:
        low, high = row["ratio_quartiles"]
        assert low <= row["ratio"] <= high and row["repetitions"] == 3
