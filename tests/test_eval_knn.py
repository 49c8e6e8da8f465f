"""k-NN: the weighted vote against its definition, frozen features, and the command line."""
import io
import json
import shutil
import statistics
from contextlib import redirect_stdout

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

import eval_knn
import eval_linear
from conftest import call, cloud
from data import MEAN, SHIFTS, STD, Images, eval_batches, load_data, normalize, shifted
from eval_knn import (draw_labelled, extract_features, few_label_top1, held_out, knn_predict,
                      knn_scores, knn_top1, whitening)
from model import ARCHS
from textures import textures
from weights import open_backbone


def evaluate(script, checkpoint, folder, *options):
    """main() of a script as from the command line -> the lines of its table, its JSON object."""
    words = ["--checkpoint", checkpoint, "--data-path", folder, "--workers", 0, "--device", "cpu"]
    with redirect_stdout(io.StringIO()) as said:
        call(*words, *options, main=script.main)
    *table, result = said.getvalue().splitlines()
    return table, json.loads(result)


@pytest.mark.parametrize("k, temperature", [(1, 0.07), (20, 0.5), (50, 1.0)])
def test_scores_are_the_votes_of_the_nearest_weighted_by_similarity(k, temperature):
    references, labels, queries = 3 * cloud(50, 8), torch.arange(50) % 4, cloud(6, 8, seed=1)
    cos = F.cosine_similarity(queries.unsqueeze(1), references, dim=2)
    rank = cos.argsort(1, descending=True).argsort(1)
    expected = (cos / temperature).exp() * (rank < k) @ F.one_hot(labels, 4).float()
    scores = knn_scores(references, labels, queries, 4, [7, k], temperature)[k]
    assert_close(scores, expected, rtol=1e-4, atol=1e-4)
    scores = torch.autocast("cpu")(knn_predict)(references, labels, queries, 4, k, temperature)
    assert_close(scores, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("temperature", [0.001, 0.005, 0.011])
def test_a_low_temperature_lets_the_nearest_decide(temperature):
    references, labels, queries = cloud(50, 8), torch.arange(50) % 4, cloud(20, 8, seed=1)
    nearest = F.cosine_similarity(queries.unsqueeze(1), references, dim=2).argmax(1)
    alike = torch.cat([queries, references])  # cosines of 1: exp(1 / .005) overflows
    scores = knn_predict(references, labels, alike, 4, 20, temperature / 10)
    assert scores.argmax(1).tolist() == [*labels[nearest].tolist(), *labels.tolist()]
    assert knn_predict(references, labels, alike, 4, 20, temperature).isfinite().all()


def test_accuracy_is_the_percentage_of_right_votes_and_centring_removes_an_offset():
    references, queries = torch.tensor([[9.], [11.]]), torch.tensor([[8.], [12.], [13.], [14.]])
    both = (references, torch.tensor([0, 1])), (queries, torch.tensor([0, 1, 1, 0]))
    assert knn_top1(*both, k=1, center=True) == 75
    assert knn_top1(*both, k=1) == 50  # seen from 0, all lie in one direction: one class for all


@pytest.mark.parametrize("power", [0, 0.5, 1])
def test_whitening_divides_each_principal_direction_by_its_std_to_a_power(power):
    x = cloud(500, 6) @ cloud(6, 6, seed=1) + 7
    mean, matrix = whitening(x, power, floor=0)
    before, after = (torch.linalg.svdvals((y - y.mean(0)) / 500 ** 0.5)
                     for y in (x, (x - mean) @ matrix))
    assert_close(after, before ** (1 - power), rtol=1e-3, atol=1e-4)


def test_whitening_does_not_blow_up_a_direction_of_mere_rounding():
    x = torch.cat([cloud(100, 3), 1e-5 * cloud(100, 1, seed=1)], 1)
    assert torch.linalg.svdvals(x @ whitening(x)[1])[-1] < 0.02  # the others: about 10


def test_a_tenth_is_held_out_and_nothing_is_lost():
    fit, choose = held_out(50)
    assert len(choose) == 5 and sorted([*fit.tolist(), *choose.tolist()]) == list(range(50))
    assert choose.tolist() != [0, 1, 2, 3, 4] and held_out(50)[1].equal(choose)


def test_features_are_the_pooled_tokens_of_a_network_left_as_it_was():
    data = Images(textures(6, 0)[0], torch.tensor([0, -1, 1, 0, -1, 1]), list("ab"))
    vit = ARCHS["vit_micro"](image_size=32, patch_size=8, drop_path=0.9).eval()
    images = normalize(data.images[[0, 2, 3, 5]] / 255)  # an image without a label is left out
    tokens = vit(images).detach()
    pools = dict(cls=tokens[:, 0], mean=tokens[:, 1:].mean(1), pixels=images.flatten(1))
    for pool, expected in pools.items():
        features, labels = extract_features(vit.train(), data, 32, pool)
        assert_close(features, expected, rtol=1e-4, atol=1e-4)
        assert vit.training and labels.tolist() == [0, 1, 0, 1]


@pytest.mark.parametrize("words, change", [
    ([], lambda x, known: x), (["--center"], lambda x, known: x - known.mean(0)),
    (["--whiten", 0.75], lambda x, known: (x - known.mean(0)) @ whitening(known, 0.75)[1])])
def test_knn_prints_the_accuracy_of_the_features_per_k(folder, checkpoint, words, change):
    _, result = evaluate(eval_knn, checkpoint, folder, "--k", 1, 5, 20, *words)
    vit, options = open_backbone(checkpoint)
    known, test = (extract_features(vit, data, 32, options["pool"])
                   for data in load_data("folder", folder))
    both = [(change(x, known[0]), y) for x, y in (known, test)]
    for k in (1, 5, 20):
        assert result[f"knn_top1_k{k}"] == pytest.approx(knn_top1(*both, k=k), abs=0.01)
    assert result["knn_top1"] == result[f"knn_top1_k{result['k']}"]


def test_the_best_k_is_chosen_on_held_out_references(folder, checkpoint, monkeypatch):
    labels = (torch.arange(40) % 5 < 2).long()  # 24 in one direction, 16 in another
    tests = torch.eye(2)[[1, 1]], torch.tensor([0, 0])  # nearest wrong, majority right
    features = [(torch.eye(2)[labels], labels), tests]
    monkeypatch.setattr(eval_knn, "cached_features", lambda *_: features.pop(0))
    _, found = evaluate(eval_knn, checkpoint, folder, "--k", 1, 36, "--temperature", 1e6)
    assert (found["knn_top1_k1"], found["knn_top1_k36"]) == (0, 100)
    assert found["k"] == 1 and found["knn_top1"] == 0  # not the k that is best on the test


def test_features_from_the_cache_are_the_features(folder, checkpoint, tmp_path, monkeypatch):
    found = []
    for pool in ("cls", "mean", "cls", "mean"):
        found.append(evaluate(eval_knn, checkpoint, folder, "--cache", tmp_path, "--pool", pool))
        if len(found) == 2:
            monkeypatch.delattr(eval_knn, "extract_features")  # the network rests
    assert found[:2] == found[2:] and len(list(tmp_path.iterdir())) == 4


def test_the_cache_never_serves_features_of_other_images(folder, checkpoint, tmp_path):
    images, cache = shutil.copytree(folder, tmp_path / "images"), ("--cache", tmp_path / "cache")
    first = evaluate(eval_knn, checkpoint, images, *cache)
    old = sorted((images / "train" / "class0").iterdir())[0]
    old.rename(images / "train" / "class1" / old.name)  # relabelled
    evaluate(eval_knn, checkpoint, images, *cache)
    (images / "train" / "class1" / old.name).unlink()
    removed = evaluate(eval_knn, checkpoint, images, *cache)
    assert len(list((tmp_path / "cache").iterdir())) == 4  # three training sets, one test set
    images.rename(tmp_path / "moved")
    assert removed[1]["references"] == first[1]["references"] - 1
    moved = evaluate(eval_knn, checkpoint, tmp_path / "moved", *cache)
    assert moved[1] == removed[1] | {"data": "moved"}


# ---------- few labels, shifted images ----------

def test_a_draw_has_as_many_random_images_of_each_class():
    labels = torch.arange(60) % 4
    labels[labels == 3] = 7  # classes need not be consecutive
    drawn_twice = [draw_labelled(labels, 5, 0, draw) for draw in (0, 0, 1)]
    assert drawn_twice[0].equal(drawn_twice[1]) and not drawn_twice[0].equal(drawn_twice[2])
    assert len(drawn_twice[0].unique()) == 20  # no image twice
    assert all(labels[row].tolist() == [0, 1, 2, 7] for row in drawn_twice[0])


@pytest.mark.parametrize("shots", [2, 3, 12])
def test_the_labelled_images_alone_choose_the_setting(shots):
    labels = torch.arange(60) % 4
    train, test = (cloud(60, 3), labels), (cloud(9, 3, seed=1), torch.full((9,), 2))
    labelled, asked = draw_labelled(labels, shots, 0), []

    def scores(x, y, queries, settings):  # "good" knows the labelled images, "bad" the test images
        known = {tuple(row.tolist()): y for row, y in zip(train[0], labels)}
        asked.append((len(x), len(queries)))
        assert y.bincount().unique().tolist() == [len(y) // 4]  # as many of each class
        assert not (queries.unsqueeze(1) == x).all(2).any()  # a fold does not see its answers
        good = torch.tensor([known.get(tuple(row.tolist()), 0) for row in queries])
        return {name: F.one_hot(good if name == "good" else torch.full_like(good, 2), 4)
                for name in settings}

    top1, best = few_label_top1(train, [test], labelled, ["bad", "good"], scores)
    assert best == "good" and top1 == [0]
    assert sum(count for _, count in asked[:-1]) == 4 * shots  # each labelled image asked once
    assert asked[-1] == (4 * shots, 9)


def test_one_label_per_class_takes_the_first_setting():
    labels = torch.arange(20) % 4
    top1, best = few_label_top1(
        (F.one_hot(labels, 4).float(), labels), [(torch.eye(4), torch.arange(4))],
        draw_labelled(labels, 1, 0), [3, 1, 2],
        lambda x, y, queries, ks: knn_scores(x, y, queries, 4, ks))
    assert best == 3 and top1 == [100]


@pytest.mark.parametrize("script, name", [(eval_knn, "knn_top1"), (eval_linear, "linear_top1")])
def test_few_labels_print_the_mean_and_deviation_over_draws(folder, checkpoint, script, name):
    table, result = evaluate(script, checkpoint, folder, "--shots", 2, "--draws", 3)
    each = [float(row.split()[2]) for row in table[-3:]]
    assert len(each) == 3 and (result["shots"], result["draws"]) == (2, 3)
    assert result[name] == pytest.approx(statistics.mean(each), abs=0.01)
    assert result[f"{name}_std"] == pytest.approx(statistics.stdev(each), abs=0.01)
    again = evaluate(script, checkpoint, folder, "--shots", 2, "--draws", 3)
    assert again == (table, result)
    assert evaluate(script, checkpoint, folder, "--shots", 2, "--draws", 3, "--seed", 1) != again


@pytest.mark.parametrize("script, name", [(eval_knn, "knn_top1"), (eval_linear, "linear_top1")])
@pytest.mark.parametrize("few", [[], ["--shots", 2]])
def test_a_shift_counts_the_mean_of_its_five_strengths(folder, checkpoint, script, name, few):
    short = ["--epochs", 1] if script is eval_linear and not few else []
    _, plain = evaluate(script, checkpoint, folder, *few, *short)
    _, found = evaluate(script, checkpoint, folder, *few, *short, "--shift", "contrast")
    each = [found[f"{name} contrast {x:g}"] for x in SHIFTS["contrast"]]
    assert found[f"{name} test"] == plain[name]  # as they are
    assert found[name] == pytest.approx(statistics.mean(each), abs=1e-3)


def test_shifted_features_are_those_of_changed_test_images(folder, checkpoint):
    vit, options = open_backbone(checkpoint)
    test = load_data("folder", folder)[1]
    batches = eval_batches(test, range(len(test)), 32, torch.device("cpu"))
    images, index = torch.cat([x for x, _ in batches]), torch.arange(len(test))
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in (MEAN, STD))
    for name, strength in (("rotate", 20), ("noise", 0.1)):
        changed = normalize(shifted(images * std + mean, index, name, strength))
        expected = vit.eval()(changed)[:, 1:].mean(1).detach()
        found, _ = extract_features(vit, test, 32, "mean", shift=(name, strength))
        assert_close(found, expected, rtol=1e-3, atol=1e-3)
