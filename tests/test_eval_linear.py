"""Linear probe: its steps are SGD's, learning rates do not mix, and the command line."""
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch.testing import assert_close

import eval_linear
from conftest import cloud, write_textures
from eval_knn import held_out
from eval_linear import Heads
from test_eval_knn import evaluate


def start(lrs, width=6, classes=3):
    heads = Heads(lrs, width, classes)
    for parameter, seed in zip(heads.parameters, (1, 2)):
        parameter.copy_(cloud(1, *parameter.shape[1:], seed=seed).expand_as(parameter))
    return heads


def test_steps_are_those_of_sgd_with_momentum_on_the_cross_entropy():
    heads, x, labels = start([0.5]), cloud(20, 6), torch.arange(20) % 3
    W, b = (parameter[0].clone().requires_grad_() for parameter in heads.parameters)
    sgd = torch.optim.SGD([W, b], momentum=0.9)
    for progress, lr in ((0, 0.5), (0.5, 0.25), (2 / 3, 0.125)):  # a cosine down to 0
        heads.step(x, labels, progress)
        sgd.param_groups[0]["lr"] = lr
        sgd.zero_grad()
        F.cross_entropy(x @ W + b, labels).backward()
        sgd.step()
    for ours, theirs in zip(heads.parameters, (W, b)):
        assert_close(ours[0], theirs.detach(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("classes", [3, 20000])  # 20,000: two heads at a time
def test_learning_rates_side_by_side_equal_each_alone(classes):
    lrs, x, labels = [0.0, 0.1, 1.0], cloud(20, 6), torch.arange(20) % 3
    together, *alone = (start(own, classes=classes) for own in (lrs, *([lr] for lr in lrs)))
    for heads in (together, *alone):
        for step in range(4):
            heads.step(x, labels, step / 4)
    expected = torch.cat([heads.logits(x) for heads in alone])
    assert_close(together.logits(x), expected, rtol=1e-4, atol=1e-5)
    right = (expected.argmax(2) == labels).double().mean(1) * 100
    assert together.accuracy(x, labels) == pytest.approx(right.tolist(), abs=0.01)


# ---------- the command line ----------

@pytest.mark.parametrize("augment", [[], ["--augment"]])
def test_linear_prints_a_row_per_learning_rate_and_a_percentage(folder, checkpoint, augment):
    table, result = evaluate(eval_linear, checkpoint, folder, "--epochs", 3,
                             "--lrs", 0.01, 0.1, *augment)
    tests = {float(row.split()[0]): float(row.split()[2]) for row in table[-2:]}
    assert list(tests) == [0.01, 0.1] and 0 <= result["linear_top1"] <= 100
    assert result["linear_top1"] == pytest.approx(tests[result["lr"]], abs=0.01)


def test_the_learning_rate_is_chosen_on_held_out_images(folder, checkpoint, monkeypatch):
    right = {4: [10., 90], 20: [80., 20]}  # percent, of 4 held-out images and of 20 tests
    monkeypatch.setattr(Heads, "accuracy", lambda self, x, y: right[len(x)])
    _, found = evaluate(eval_linear, checkpoint, folder, "--epochs", 1, "--lrs", 0.01, 0.1)
    assert found["lr"] == 0.1 and found["linear_top1"] == 20


def test_augmented_crops_are_those_of_readable_images_that_are_not_held_out(
        checkpoint, tmp_path, monkeypatch):
    images = write_textures(tmp_path, 20, 5)
    broken, *others = sorted(images.glob("train/*/*.png"))  # four of each class
    Image.new("RGB", (32, 33)).save(others[0])  # of two sizes: the set stays on disk
    broken.write_bytes(b"no image")
    seen = []
    monkeypatch.setattr(Heads, "step", lambda self, x, labels, _: seen.extend(labels.tolist()))
    evaluate(eval_linear, checkpoint, images, "--epochs", 1, "--augment")
    labels = (torch.arange(20) // 4)[1:]
    assert sorted(seen) == sorted(labels[held_out(19)[0]].tolist())
