"""Figures and tables: the numbers behind them by hand, and each is drawn, or refused.

    pytest tests/test_analyze.py
"""
import io
import json
import sys

import pytest
import torch
from PIL import Image
from torch.testing import assert_close

import analyze
from conftest import cloud, write_textures
from model import VisionTransformer


def test_angles_of_the_3_4_5_triangle():
    x = torch.tensor([[0., 0], [3, 0], [0, 4]])  # each angle is seen from both sides
    assert_close(analyze.angles(x).sort().values, torch.tensor([0, 0, 0.6, 0.6, 0.8, 0.8]))


def test_ridge_reads_what_is_linear_half_of_what_is_half_noise_and_no_noise():
    x, parts = cloud(6000, 5), torch.arange(6000).split([3000, 500, 2500])
    linear, noise = (x[:, :1] - x[:, 1:2]) / 2**0.5 + 3, cloud(6000, 1, seed=2)
    found = analyze.ridge(x, torch.cat([linear, linear + noise, noise], 1), parts)
    assert found.tolist() == pytest.approx([1, 0.5, 0], abs=0.04)


def write_run(root, knn=(), evals=(), **options):
    """The folder of a run: k-NN of the steps 0, 2, 4 .., and what the evaluations printed."""
    place = root / f"run{len(list(root.iterdir()))}"
    place.mkdir()
    args = dict(loss="dino", data="textures", data_path=None, seed=0, batch_size=10, mask="random",
                mask_ratio=0.75, teacher="ema", pull_weight=0.05, out_dir=str(place)) | options
    rows = [dict(step=2 * i, knn_top1=value, loss=2.0 / (1 + i), effective_rank=30 + 2 * i,
                 images_per_second=5) for i, value in enumerate(knn or [1.0])]
    (place / "args.json").write_text(json.dumps(args))
    (place / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (place / "evals.jsonl").write_text("".join(json.dumps(row) + "\n" for row in evals))
    return place


def cells(line):
    return [x.strip() for x in line.strip().strip("|").split("|")]


def rows_of(runs):
    """The table as {name of a column: cell} per row."""
    head, _, *rows = analyze.table(runs).splitlines()
    return [dict(zip(cells(head), cells(row))) for row in rows]


def test_the_table_has_mean_and_deviation_of_the_evaluations_else_of_the_logs_last_row(tmp_path):
    evals = [[dict(knn_top1=knn, k=20), dict(knn_top1=2.0, center=True), dict(linear_top1=linear),
              dict(knn_top1=3.0, whiten=0.75), dict(linear_top1=1.0, shots=5),
              dict(knn_top1=1.0, data="cifar10", shots=1), dict(knn_top1=1.0, shift="blur")]
             for knn, linear in ((51.0, 60.0), (57.0, 64.0))]
    runs = [write_run(tmp_path, (30, 40, 50), evals[seed], loss="rkd", seed=seed)
            for seed in (0, 1)]
    runs.append(write_run(tmp_path, (30, 35, 45), mask_ratio=0.0))
    with open(runs[0] / "log.jsonl", "a") as file:
        file.write('12\n[3]\n"x"\n{"knn_top1": 9.0}\n{"step": 6, "knn_t')  # no rows of a log
    (runs[0] / "evals.jsonl").write_bytes(b"\xff\n   k   held out\n  20     51.00\n12\n"
                                          + (runs[0] / "evals.jsonl").read_bytes())
    found, other = rows_of(runs)
    assert found["run"] == "RKD, masked" and found["n"] == "2" and found["mask"] == "random, 75%"
    assert found["k-NN, %"] == "54.0 ± 4.2" and found["linear, %"] == "62.0 ± 2.8"
    assert found["centred, %"] == "2.0" and found["whitened, %"] == "3.0"
    assert found["effective rank"] == "30 → 34"
    assert found["steps"] == "4" and found["seconds"] == "8"  # ten images a step, five per second
    assert other["k-NN, %"] == "45.0" and other["linear, %"] == "" and other["mask"] == "none"


@pytest.mark.parametrize("options, name", [
    (dict(loss="rkd"), "RKD, masked"),
    (dict(loss="rkd", mask_ratio=0.0), "RKD, unmasked"),
    (dict(loss="rkd", mask_ratio=0.5), "RKD, 50 % masked"),
    (dict(loss="rkd", mask_ratio=0.0, distance_power=0.0, angle_weight=0.0),
     "RKD, unmasked, all distances equal"),
    (dict(loss="rkd", distance_power=0.0), "RKD, masked, distance power 0.0"),
    (dict(loss="rkd", angle_weight=0.0, pull_weight=0.2),
     "RKD, masked, pull weight 0.2, distances only"),
    (dict(loss="dino", mask_ratio=0.0, pull_weight=0.0), "DINO"),
    (dict(loss="dino+5*rkd", mask_ratio=0.0), "DINO + RKD (weight 5)"),
    (dict(loss="0.5*moco+rkd", mask_ratio=0.0, pull_weight=0.0),
     "MoCo v3 (weight 0.5) + RKD, no pull"),
    (dict(loss="mae"), "MAE"),
    (dict(loss="rkd", lr=0.0), "untrained")])
def test_a_run_is_named_by_its_loss_its_mask_and_its_unusual_options(options, name, tmp_path):
    [run] = analyze.read_runs([write_run(tmp_path, **options)])
    assert analyze.name_of(run) == name


def test_of_other_options_those_are_named_that_fewer_runs_of_the_loss_have(tmp_path):
    runs = [write_run(tmp_path, mask_ratio=0.0, image_size=64, lr=0.1),
            *(write_run(tmp_path, mask_ratio=0.0, image_size=32, lr=lr) for lr in (0.1, 0.1, 0.2)),
            write_run(tmp_path, loss="rkd", image_size=64, weak_teacher=True),
            write_run(tmp_path, loss="rkd", image_size=64)]
    assert [(row["run"], row["n"]) for row in rows_of(runs)] == [
        ("DINO, image size 64", "1"), ("DINO", "2"), ("DINO, lr 0.2", "1"),
        ("RKD, masked, weak teacher", "1"), ("RKD, masked", "1")]


def test_names_that_would_be_alike_have_the_folder_and_one_colour(tmp_path):
    runs = analyze.read_runs([write_run(tmp_path, loss=loss, mask_ratio=0.0, lr=lr) for loss, lr in
                              (("dino", 0.1), ("dino", 0.1), ("dino+rkd", 0.1), ("moco", 0.1),
                               ("dino", 0.0))])
    assert analyze.names_of(runs) == ["DINO (run0)", "DINO (run1)", "DINO + RKD", "MoCo v3",
                                      "untrained"]
    first, *others, moco, _ = map(analyze.color_of, runs)
    assert {first} == {*others} != {moco}


def test_curves_take_mean_and_deviation_of_the_steps_that_all_seeds_have(tmp_path):
    runs = [write_run(tmp_path, knn, seed=knn[1]) for knn in ((30, 40, 50), (30, 44, 56, 90))]
    [group] = analyze.grouped(analyze.read_runs(runs)).values()
    found = analyze.over_seeds(group, "knn_top1")
    assert found == ([0, 2, 4], [30, 42, 53], pytest.approx([0, 8 ** 0.5, 18 ** 0.5]))


@pytest.mark.parametrize("first, second, alike", [
    (("a/images", "11aa"), ("b/images/", "22bb"), False),
    (("a/images", "11aa"), ("b/moved", "11aa"), True),
    (("a/images", None), ("b/images", "22bb"), False),
    (("a/images", None), ("b/images", None), True)])
def test_folders_are_told_apart_by_fingerprint_which_makes_no_other_system(first, second, alike,
                                                                           tmp_path):
    runs = analyze.read_runs(
        write_run(tmp_path, data="folder", data_path=path, data_fingerprint=own, seed=seed)
        for seed, (path, own) in enumerate((first, second)))
    if alike:
        assert len(analyze.grouped(runs)) == 1
    else:
        with pytest.raises(ValueError, match="different data sets: run0, run1"):
            analyze.grouped(runs)


def test_a_kept_run_is_one_line_of_about_20_rows_and_has_the_table_of_its_folder(tmp_path):
    runs = [write_run(tmp_path, (30, 40, 50), [dict(linear_top1=40.0 + seed)], seed=seed, lr=0.5)
            for seed in (0, 1)]
    with open(runs[0] / "log.jsonl", "a") as file:
        file.writelines(json.dumps(dict(step=200 + i, effective_rank=float(i))) + "\n"
                        for i in range(100))
    other = write_run(tmp_path, (5,), loss="rkd", data_fingerprint="11aa")
    study, defaults = tmp_path / "runs.jsonl", json.loads((runs[0] / "args.json").read_text())
    study.write_text(json.dumps(dict(defaults=defaults | dict(lr=0.1))) + "\n")
    analyze.keep(analyze.read_runs([*runs, other]), study)
    _, first, second, third = map(json.loads, study.read_text().splitlines())
    assert 15 < len(first["rows"]) < 25
    assert first["options"] == dict(lr=0.5) and second["options"] == dict(lr=0.5, seed=1)
    assert third["options"] == dict(loss="rkd", data_fingerprint="11aa")
    assert analyze.table([study], ["run0", "run1"]) == analyze.table(runs)
    with pytest.raises(ValueError, match="run9"):
        analyze.table([study], ["run9"])


# ---------- the pictures ----------

@pytest.fixture(scope="module")
def trained(checkpoint, folder):  # the words that name a run and its images
    return [checkpoint.parent, "--data-path", folder]


def draw(monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", ["analyze.py", *map(str, words)])
    analyze.main()


@pytest.mark.parametrize("name", ["curves", "masks", "relations", *analyze.OF_NETWORKS])
def test_each_picture_is_drawn_from_a_run_and_of_two(name, trained, tmp_path, monkeypatch):
    draw(monkeypatch, name, *trained, "--out", tmp_path / "one.png")
    with Image.open(tmp_path / "one.png") as image:
        assert image.width >= 200 and len(image.convert("L").getcolors()) > 20
    if name not in ("masks", "factors"):
        draw(monkeypatch, name, trained[0], *trained, "--out", tmp_path / "two.png")
        assert (tmp_path / "two.png").read_bytes() != (tmp_path / "one.png").read_bytes()


def test_weights_that_do_not_say_their_data_ask_for_it_and_arch_is_for_foreign_ones(
        trained, tmp_path, monkeypatch, capsys):
    state = torch.load(trained[0] / "checkpoint.pt", weights_only=True)
    args = {name: state["args"][name] for name in ("arch", "image_size", "patch_size", "fixed_pos")}
    torch.save(dict(student=state["teacher"], args=args), tmp_path / "weights.pt")
    foreign = VisionTransformer(image_size=32, patch_size=16, embed_dim=192, num_heads=3)
    torch.save(foreign.state_dict(), tmp_path / "foreign.pt")
    with pytest.raises(SystemExit) as end:
        draw(monkeypatch, "pca", tmp_path / "weights.pt")
    assert end.value.code == 2 and "add --data" in capsys.readouterr().err
    draw(monkeypatch, "pca", tmp_path / "weights.pt", trained[0], tmp_path / "foreign.pt",
         "--arch", "vit_tiny", "--data", "folder", *trained[1:])
    assert (tmp_path / "pca.png").exists()  # beside the weights


@pytest.mark.parametrize("kind, tests, names", [
    ("one test image", 1, "masks relations similarity spectrum"),
    ("equal images", 5, "masks relations attention pca similarity spectrum"),
    ("no test set", 0, "masks pca")])
def test_each_picture_is_drawn_of_odd_data(kind, tests, names, trained, tmp_path, monkeypatch):
    write_textures(tmp_path, 20, tests)
    for path in tmp_path.rglob("*.png") if kind == "equal images" else ():
        Image.new("RGB", (32, 32), "teal").save(path)
    for name in names.split():
        draw(monkeypatch, name, trained[0], "--data-path", tmp_path)
        assert (trained[0] / f"{name}.png").stat().st_size > 2000


def test_curves_without_a_test_set_name_all_groups(tmp_path, monkeypatch):
    legends = []
    monkeypatch.setattr("matplotlib.figure.Figure.legend",
                        lambda figure, lines, labels, **_: legends.extend(labels))
    runs = [write_run(tmp_path, loss=loss) for loss in ("dino", "rkd")]
    for run in runs:
        (run / "log.jsonl").write_text('{"step": 0, "loss": 1.0, "effective_rank": 9.0}\n')
        analyze.curves(run)
    analyze.curves(runs)
    assert legends == ["DINO, masked (n = 1)", "RKD, masked (n = 1)"]


def test_a_table_is_printed_by_a_terminal_that_lacks_its_characters(tmp_path, monkeypatch):
    for encoding, arrow in dict(ascii=b"\\u2192", cp1252=b"\\u2192", utf8="→".encode()).items():
        out = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
        monkeypatch.setattr(sys, "stdout", out)
        draw(monkeypatch, "table", write_run(tmp_path))
        out.flush()
        assert arrow in out.buffer.getvalue()


def test_without_matplotlib_the_error_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ValueError, match="pip install matplotlib"):
        analyze.curves(write_run(tmp_path))
