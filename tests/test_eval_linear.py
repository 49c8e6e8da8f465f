"""Linear probe: learning rates do not mix, the command line, few labels. test_bench.py: its steps."""
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch.testing import assert_close

import eval_linear
from conftest import cloud, write_textures
from eval_knn import held_out
from eval_linear import STRENGTHS, Heads, ridge_scores
from test_eval_knn import evaluate


def test_learning_rates_side_by_side_equal_each_alone():  # 20,000 classes: two heads at a time
    lrs, x, labels = [0.01, 0.1, 1.0], cloud(20, 6), torch.arange(20) % 3
    together, *alone = (Heads(own, 6, 20000) for own in (lrs, *([lr] for lr in lrs)))
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


# ---------- few labels ----------

def test_ridge_scores_solve_the_normal_equations_of_standardised_features():
    x, y, queries = 3 * cloud(30, 5) + 7, torch.arange(30) % 3, cloud(8, 5, seed=1)
    mean, std = x.mean(0), x.std(0, unbiased=False)
    z, q = (F.pad((a - mean) / std, (0, 1), value=1.0).double() for a in (x, queries))
    for strength, scores in ridge_scores(x, y, queries, [0.01, 1.0], 3).items():
        penalty = torch.diag(torch.tensor([30.0 * strength] * 5 + [0])).double()  # none on the bias
        W = torch.linalg.solve(z.T @ z + penalty, z.T @ F.one_hot(y, 3).double())
        assert_close(scores, q @ W, rtol=1e-5, atol=1e-5)


def test_ridge_of_fewer_images_than_dimensions_is_scikit_learns():
    linear_model = pytest.importorskip("sklearn.linear_model")
    x, y, queries = cloud(10, 40), torch.arange(10) % 5, cloud(8, 40, seed=1)
    mean, std = x.mean(0), x.std(0, unbiased=False)
    for strength, scores in ridge_scores(x, y, queries, STRENGTHS, 5).items():
        theirs = linear_model.Ridge(10 * strength).fit((x - mean) / std, F.one_hot(y, 5))
        expected = torch.from_numpy(theirs.predict((queries - mean) / std)).double()
        assert_close(scores, expected, rtol=1e-4, atol=1e-4)


def test_a_feature_that_is_constant_among_few_labels_does_not_count():
    x, queries = torch.cat([cloud(6, 3), torch.ones(6, 1)], 1), cloud(4, 4, seed=1)
    alone = ridge_scores(x[:, :3], torch.arange(6) % 2, queries[:, :3], [0.1], 2)[0.1]
    assert_close(ridge_scores(x, torch.arange(6) % 2, queries, [0.1], 2)[0.1], alone)
