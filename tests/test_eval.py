"""Evaluation: k-NN vote and linear heads against their definitions, then both command lines.

    pytest tests/test_eval.py
"""
import json
import signal
import sys

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch.testing import assert_close

import eval_knn
import eval_linear
import train
from data import Folder, Images, eval_batches, load_data, normalize, textures
from eval_knn import extract_features, held_out, knn_predict, knn_scores, knn_top1, whitening
from eval_linear import Heads
from model import ARCHS, open_backbone

torch.set_num_threads(1)


def cloud(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def call(script, *options):
    """main() of a script, as from the command line."""
    handlers = {name: signal.getsignal(name) for name in (signal.SIGTERM, signal.SIGINT)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [f"{script.__name__}.py", *map(str, options)])
        try:
            return script.main()
        finally:
            for name, handler in handlers.items():
                signal.signal(name, handler)


def write_images(root, train, val, classes=5, broken=()):
    """Textures of 32 px under root/train/CLASS and root/val/CLASS."""
    for i, pixels in enumerate(textures(train + val, 0)[0].images):
        place = root / ("train" if i < train else "val") / f"class{i % classes}"
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(place / f"{i:03}.png")
        if i in broken:
            (place / f"{i:03}.png").write_bytes(b"no image")
    return root


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp("images"), 40, 20)


@pytest.fixture(scope="module")
def checkpoint(folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("run")
    assert call(train, "--data", "folder", "--data-path", folder, "--max-steps", 3, "--workers", 0,
                "--batch-size", 16, "--device", "cpu", "--out-dir", out) == 0
    return out / "checkpoint.pt"


def evaluate(script, checkpoint, *options):
    data = json.loads((checkpoint.parent / "args.json").read_text())["data_path"]
    return call(script, "--checkpoint", checkpoint, "--data-path", data, "--workers", 0,
                "--device", "cpu", *options)


def last_line(capsys):
    return json.loads(capsys.readouterr().out.splitlines()[-1])


# ---------- the k-NN vote ----------

def vote(train_features, train_labels, x, num_classes, k, temperature):
    """Scores of one test row, written out."""
    cos = [(F.cosine_similarity(x, row, dim=0).item(), label)
           for row, label in zip(train_features.double(), train_labels.tolist())]
    scores = [0.0] * num_classes
    for value, label in sorted(cos, reverse=True)[:k]:
        scores[label] += torch.tensor(value / temperature).exp().item()
    return torch.tensor(scores)


@pytest.mark.parametrize("k, temperature", [(1, 0.07), (5, 0.07), (20, 0.5), (999, 1.0)])
def test_scores_are_the_votes_of_the_nearest_weighted_by_similarity(k, temperature):
    references, labels, queries = cloud(50, 8), torch.arange(50) % 4, cloud(6, 8, seed=1)
    expected = [vote(references, labels, x.double(), 4, k, temperature) for x in queries]
    scores = knn_predict(references, labels, queries, 4, k, temperature)
    assert_close(scores, torch.stack(expected), rtol=1e-4, atol=1e-4)


def test_three_references_on_a_circle_vote_as_worked_out_by_hand():
    references, labels = torch.tensor([[1., 0], [0, 1], [-1, 0]]), torch.tensor([0, 1, 1])
    scores = knn_predict(references, labels, torch.tensor([[0., 7]]), 2, k=3, temperature=1.0)
    assert_close(scores, torch.tensor([[1.0, torch.e + 1]]))  # cosines 0, 1, 0
    one = knn_predict(references, labels, torch.tensor([[0., 7]]), 2, k=1, temperature=1.0)
    assert_close(one, torch.tensor([[0.0, torch.e]]))


def test_the_length_of_features_does_not_matter():
    references, labels, queries = cloud(50, 8), torch.arange(50) % 4, cloud(6, 8, seed=1)
    longer = references * torch.linspace(0.1, 9, 50).view(-1, 1)
    assert_close(knn_predict(longer, labels, 100 * queries, 4),
                 knn_predict(references, labels, queries, 4), rtol=1e-4, atol=1e-3)


def test_several_k_of_one_search_equal_single_searches():
    references, labels, queries = cloud(50, 8), torch.arange(50) % 4, cloud(6, 8, seed=1)
    together = knn_scores(references, labels, queries, 4, [20, 1, 7])
    assert sorted(together) == [1, 7, 20]
    for k, scores in together.items():
        assert_close(scores, knn_predict(references, labels, queries, 4, k))


def test_accuracy_is_the_percentage_of_right_votes():
    references = torch.eye(3), torch.tensor([0, 1, 2])
    queries = torch.eye(3)[[0, 1, 2, 2]], torch.tensor([0, 1, 2, 0])
    assert knn_top1(references, queries, k=1) == 75


def test_centring_sees_what_a_common_offset_hides():
    references, queries = torch.tensor([[9.], [11.]]), torch.tensor([[8.], [12.]])
    both = (references, torch.tensor([0, 1])), (queries, torch.tensor([0, 1]))
    assert knn_top1(*both, k=1, center=True) == 100
    assert knn_top1(*both, k=1) == 50  # seen from 0, all four lie in one direction


def test_centred_accuracy_ignores_a_common_offset():
    labels = torch.arange(200) % 4
    points = F.one_hot(labels, 8) + 0.7 * cloud(200, 8)
    near, far = (((x[:150], labels[:150]), (x[150:], labels[150:])) for x in (points, points + 50))
    assert 30 < knn_top1(*near, center=True) < 95
    assert knn_top1(*far, center=True) == knn_top1(*near, center=True)


@pytest.mark.parametrize("power", [0, 0.5, 1])
def test_whitened_features_vary_in_each_direction_as_their_std_to_what_is_left(power):
    x = cloud(500, 6) @ cloud(6, 6, seed=1) + 7
    mean, matrix = whitening(x, power, floor=0)
    before, after = (torch.linalg.svdvals((y - y.mean(0)) / 500 ** 0.5)
                     for y in (x, (x - mean) @ matrix))
    assert_close(after, before ** (1 - power), rtol=1e-3, atol=1e-4)


def test_whitening_finds_a_class_that_wide_and_empty_directions_hide():
    labels = torch.arange(400) % 2
    x = torch.cat([100 * cloud(400, 4), labels.view(-1, 1) + 0.01 * cloud(400, 1, seed=1)], 1)
    mean, matrix = whitening(x[:300])
    plain, white = (knn_top1((y[:300], labels[:300]), (y[300:], labels[300:]))
                    for y in (x, (x - mean) @ matrix))
    assert plain < 75 and white > 85


def test_a_direction_of_mere_rounding_is_not_blown_up():
    x = torch.cat([cloud(100, 3), 1e-5 * cloud(100, 1, seed=1)], 1)
    mean, matrix = whitening(x)
    assert torch.linalg.svdvals((x - mean) @ matrix)[-1] < 0.02  # the others: about 10
    assert whitening(torch.ones(5, 3))[1].isfinite().all()


def test_a_tenth_is_held_out_and_nothing_is_lost():
    fit, choose = held_out(50)
    assert len(choose) == 5 and sorted([*fit.tolist(), *choose.tolist()]) == list(range(50))
    assert choose.tolist() != [0, 1, 2, 3, 4] and held_out(50)[1].equal(choose)


# ---------- features ----------

def test_images_without_a_label_have_no_features():
    data = Images(textures(6, 0)[0].images, torch.tensor([0, -1, 1, -1, 0, 1]), list("ab"))
    vit = ARCHS["vit_micro"](image_size=32, patch_size=8)
    features, labels = extract_features(vit, data, 32, "pixels")
    assert labels.tolist() == [0, 1, 0, 1] and features.shape == (4, 3 * 32 * 32)
    [(third, _)] = eval_batches(data, [2], 32, torch.device("cpu"))
    assert_close(features[1], third.flatten())


def test_features_are_the_pooled_tokens_of_a_network_left_as_it_was():
    data = textures(4, 0)[0]
    vit = ARCHS["vit_micro"](image_size=32, patch_size=8, drop_path=0.9)
    cls, mean = (extract_features(vit, data, 32, pool)[0] for pool in ("cls", "mean"))
    tokens = vit.eval()(normalize(data.images / 255))
    assert_close(cls, tokens[:, 0].detach(), rtol=1e-4, atol=1e-4)
    assert_close(mean, tokens[:, 1:].mean(1).detach(), rtol=1e-4, atol=1e-4)
    vit.train(), extract_features(vit, data, 32)
    assert vit.training


def test_a_last_batch_that_is_only_broken_adds_nothing(tmp_path):
    write_images(tmp_path, 20, 5, broken=[4])
    files = sorted(str(path) for path in (tmp_path / "train").glob("*/*.png"))
    bad = [i for i, name in enumerate(files) if name.endswith("004.png")]
    vit = ARCHS["vit_micro"](image_size=32, patch_size=8)
    data = Folder(files, [0] * 20, ["only"])
    features, labels = extract_features(vit, data, 32, indices=torch.tensor(bad))
    assert len(features) == len(labels) == 0


# ---------- linear heads ----------

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
        sgd.zero_grad(), F.cross_entropy(x @ W + b, labels).backward(), sgd.step()
    assert_close(heads.parameters[0][0], W.detach(), rtol=1e-4, atol=1e-5)
    assert_close(heads.parameters[1][0], b.detach(), rtol=1e-4, atol=1e-5)


def test_learning_rates_side_by_side_equal_each_alone():
    lrs, x, labels = [0.01, 0.1, 1.0], cloud(20, 6), torch.arange(20) % 3
    together, alone = start(lrs), [start([lr]) for lr in lrs]
    for heads in (together, *alone):
        for step in range(4):
            heads.step(x, labels, step / 4)
    expected = torch.cat([heads.logits(x) for heads in alone])
    assert_close(together.logits(x), expected, rtol=1e-4, atol=1e-5)
    assert together.accuracy(x, labels) == [heads.accuracy(x, labels)[0] for heads in alone]


def test_separable_features_are_told_apart_and_a_head_that_rests_is_not():
    labels = torch.arange(90) % 3
    x = F.one_hot(labels, 6) + 0.05 * cloud(90, 6)
    heads = Heads([0.0, 1.0], 6, 3)
    for step in range(50):
        heads.step(x, labels, step / 50)
    assert heads.accuracy(x, labels) == pytest.approx([100 / 3, 100], abs=0.01)


# ---------- the command lines ----------

def features_of(checkpoint, folder):
    vit, options = open_backbone(checkpoint)
    sets = load_data("folder", folder)
    return [extract_features(vit, data, 32, options["pool"]) for data in sets]


def test_knn_prints_the_accuracy_of_the_features_for_each_k(folder, checkpoint, capsys):
    evaluate(eval_knn, checkpoint, "--k", 1, 5)
    result, features = last_line(capsys), features_of(checkpoint, folder)
    for k in (1, 5):
        assert result[f"knn_top1_k{k}"] == pytest.approx(knn_top1(*features, k=k), abs=0.01)
    assert result["knn_top1"] in (result["knn_top1_k1"], result["knn_top1_k5"])
    assert 0 <= result["knn_top1"] <= 100


def test_center_on_the_command_line_is_the_centred_accuracy(folder, checkpoint, capsys):
    evaluate(eval_knn, checkpoint, "--k", 5, "--center")
    expected = knn_top1(*features_of(checkpoint, folder), k=5, center=True)
    assert last_line(capsys)["knn_top1"] == pytest.approx(expected, abs=0.01)


def test_whiten_on_the_command_line_is_the_whitened_accuracy(folder, checkpoint, capsys):
    evaluate(eval_knn, checkpoint, "--k", 5, "--whiten", 0.75)
    train, test = features_of(checkpoint, folder)
    mean, matrix = whitening(train[0], 0.75)
    expected = knn_top1(*(((x - mean) @ matrix, y) for x, y in (train, test)), k=5)
    result = last_line(capsys)
    assert result["knn_top1"] == pytest.approx(expected, abs=0.01) and result["whiten"] == 0.75


def test_the_best_k_is_chosen_on_held_out_references_and_not_on_the_test(
        checkpoint, capsys, monkeypatch):
    labels = (torch.arange(40) % 5 < 2).long()  # 24 in one direction, 16 in another
    references = torch.eye(2)[labels], labels
    tests = torch.eye(2)[[1, 1]], torch.tensor([0, 0])  # nearest wrong, majority right
    monkeypatch.setattr(eval_knn, "labelled_features", lambda *_: [references, tests])
    evaluate(eval_knn, checkpoint, "--k", 1, 36, "--temperature", 1e6)
    result = last_line(capsys)
    assert [result[name] for name in ("knn_top1_k1", "knn_top1_k36")] == [0, 100]
    assert result["k"] == 1 and result["knn_top1"] == 0


@pytest.mark.parametrize("augment", [[], ["--augment"]])
def test_linear_prints_a_row_for_each_learning_rate_and_a_percentage(checkpoint, capsys, augment):
    evaluate(eval_linear, checkpoint, "--epochs", 3, "--lrs", 0.01, 0.1, *augment)
    *_, first, second, line = capsys.readouterr().out.splitlines()
    table = {float(row.split()[0]): float(row.split()[2]) for row in (first, second)}
    result = json.loads(line)
    assert list(table) == [0.01, 0.1] and 0 <= result["linear_top1"] <= 100
    assert result["linear_top1"] == pytest.approx(table[result["lr"]], abs=0.01)


def test_the_learning_rate_is_chosen_on_held_out_images_and_not_on_the_test(
        checkpoint, capsys, monkeypatch):
    right = {4: [10., 90], 20: [80., 20]}  # percent, of 4 held-out images and of 20 tests
    monkeypatch.setattr(Heads, "accuracy", lambda self, x, y: right[len(x)])
    evaluate(eval_linear, checkpoint, "--epochs", 1, "--lrs", 0.01, 0.1)
    result = last_line(capsys)
    assert result["lr"] == 0.1 and result["linear_top1"] == 20


def test_features_from_the_cache_are_the_features(checkpoint, tmp_path, capsys, monkeypatch):
    evaluate(eval_knn, checkpoint, "--k", 5)
    without = last_line(capsys)
    evaluate(eval_knn, checkpoint, "--k", 5, "--cache", tmp_path / "cache")
    assert last_line(capsys) == without
    monkeypatch.delattr(eval_knn, "extract_features")  # the network rests
    evaluate(eval_knn, checkpoint, "--k", 5, "--cache", tmp_path / "cache")
    assert last_line(capsys) == without


def test_the_cache_tells_features_of_other_options_apart(checkpoint, tmp_path, capsys):
    for pool in ("mean", "cls", "mean"):
        evaluate(eval_linear, checkpoint, "--epochs", 1, "--cache", tmp_path, "--pool", pool)
    assert len(list(tmp_path.iterdir())) == 2


def test_a_cache_serves_augmented_crops_of_a_folder_with_a_broken_file(
        checkpoint, tmp_path, capsys):
    images = write_images(tmp_path / "images", 20, 5, broken=[4])
    for path in images.glob("*/*/*[02468].png"):
        if path.name != "004.png":
            Image.open(path).resize((32, 33)).save(path)  # of two sizes: the set stays on disk
    for _ in range(2):
        evaluate(eval_linear, checkpoint, "--data-path", images, "--epochs", 1, "--augment",
                 "--cache", tmp_path / "cache")
    assert last_line(capsys)["tests"] == 5


WRONG = [(script, *row) for script in (eval_knn, eval_linear) for row in (
    ("--arch vit_tiny", "vit_tiny"), ("--arch vit_huge", "vit_huge"), ("--image-size 30", "30"),
    ("--data-path /no/such/place", "/no/such/place"), ("--cache {file}", "{file}"),
    ("--checkpoint {file}.none", "{file}.none"), ("--checkpoint {file}", "{file}"))]
WRONG += [(eval_knn, "--k 0", "0"), (eval_linear, "--epochs 0", "0"),
          (eval_knn, "--temperature 0", "0"), (eval_knn, "--temperature nan", "nan"),
          (eval_linear, "--lrs 0.1 -1", "-1"), (eval_linear, "--lrs nan", "nan")]


@pytest.mark.parametrize("script, option, value", WRONG)
def test_a_wrong_option_ends_with_status_2_and_one_line_that_names_it(
        script, option, value, checkpoint, tmp_path, capsys):
    (tmp_path / "text").write_text("words")
    with pytest.raises(SystemExit) as stop:
        evaluate(script, checkpoint, *option.format(file=tmp_path / "text").split())
    [line] = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2 and value.format(file=tmp_path / "text") in line


def test_a_set_without_classes_cannot_be_measured_by(checkpoint, tmp_path, capsys):
    textures_only = write_images(tmp_path, 4, 0, classes=1) / "train" / "class0"
    with pytest.raises(SystemExit) as stop:
        evaluate(eval_knn, checkpoint, "--data-path", textures_only)
    [line] = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2 and str(textures_only) in line
