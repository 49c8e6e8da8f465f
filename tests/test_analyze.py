"""Pictures and tables: the numbers behind them, by hand; and that each is drawn, or refused.

    pytest tests/test_analyze.py
"""
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch.testing import assert_close

import analyze
from conftest import call
from data import textures
from model import VisionTransformer, pool_tokens

torch.set_num_threads(1)


def cloud(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# ---------- the numbers ----------

def test_angles_of_the_triangle_are_0_6_and_8_tenths_each_from_both_sides():
    found = analyze.angles(torch.tensor([[0., 0], [3, 0], [0, 4]])).sort().values
    assert_close(found, torch.tensor([0, 0, 0.6, 0.6, 0.8, 0.8]), atol=1e-6, rtol=0)


def test_ridge_reads_what_is_linear_and_nothing_else():
    x, parts = cloud(900, 5), torch.arange(900).split([500, 100, 300])
    linear, noise = x @ cloud(5, 1, seed=1) + 3, cloud(900, 1, seed=2)
    seen, unseen = analyze.ridge(x, torch.cat([linear, noise], 1), parts).tolist()
    assert seen > 0.999 and abs(unseen) < 0.05


def test_pixels_tell_the_slope_of_the_light_and_not_the_turn_of_the_texture():
    data, drawn = textures(1500, 2, 16)
    columns, x = analyze.readable(drawn), F.adaptive_avg_pool2d(data.images / 255, 8).flatten(1)
    parts = torch.arange(1500).split([1000, 200, 300])
    assert analyze.ridge(x, columns["illumination"], parts).min() > 0.6
    assert analyze.ridge(x, columns["rotation"], parts).max() < 0.2
    assert [x.shape[1] for x in columns.values()] == [10, 2, 2, 1, 2, 2, 1, 2]


def test_half_of_the_variance_has_r_squared_one_half():
    x, parts = cloud(6000, 1), torch.arange(6000).split([3000, 500, 2500])
    found = analyze.ridge(x, x + cloud(6000, 1, seed=1), parts)
    assert found.item() == pytest.approx(0.5, abs=0.04)


def test_uniform_attention_looks_as_far_as_two_patches_are_apart_on_average():
    vit = VisionTransformer(8, 4, embed_dim=8, depth=2, num_heads=2)
    for block in vit.blocks:
        torch.nn.init.zeros_(block.attn.qkv.weight)
    # four patches in a square: to itself 0, to two 1, to one the diagonal
    expected = (0 + 1 + 1 + 2 ** 0.5) / 4
    for heads in analyze.attention_distances(vit, cloud(3, 3, 8, 8)):
        assert heads == pytest.approx([expected] * 2)


def test_features_of_the_last_block_are_those_of_the_network():
    vit = VisionTransformer(8, 4, embed_dim=8, depth=3, num_heads=2).eval()
    network = analyze.SimpleNamespace(vit=vit, pool="mean")
    first, _, last = analyze.block_features(network, cloud(5, 3, 8, 8))
    assert_close(last, pool_tokens(vit(cloud(5, 3, 8, 8)), "mean"))
    assert first.shape == (5, 8) and not torch.allclose(first, last)


# ---------- logs ----------

def write_run(place, rows, seed=0, evals=None, **options):
    place.mkdir()
    args = dict(loss="rkd", data="textures", data_path=None, seed=seed, out_dir=str(place),
                batch_size=10, mask="random", mask_ratio=0.75, teacher="ema") | options
    (place / "args.json").write_text(json.dumps(args))
    (place / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    if evals:
        (place / "evals.jsonl").write_text("\n".join(map(json.dumps, evals)) + "\n")
    return place


@pytest.fixture
def runs(tmp_path):
    """Two seeds of `rkd`, one of `dino`: k-NN 40 and 44, then 50 and 56."""
    def rows(*values):
        return [dict(step=step, knn_top1=value, loss=2.0 / (1 + step), effective_rank=30 + step,
                     images_per_second=5) for step, value in zip((0, 2, 4), values)]
    return [write_run(tmp_path / "a", rows(30, 40, 50), 0, [dict(knn_top1=51.0, k=20),
                                                            dict(linear_top1=60.0)]),
            write_run(tmp_path / "b", rows(30, 44, 56), 1, [dict(knn_top1=57.0),
                                                            dict(linear_top1=64.0)]),
            write_run(tmp_path / "c", rows(30, 35, 45), loss="dino", mask_ratio=0.0)]


def test_seeds_go_together_and_their_mean_and_spread_are_those_of_the_common_steps(runs):
    with open(runs[1] / "log.jsonl", "a") as file:
        file.write(json.dumps(dict(step=6, knn_top1=90.0)) + "\n")
    groups = analyze.grouped(runs)
    assert [len(members) for members in groups.values()] == [2, 1] and [*groups] == ["rkd", "dino"]
    steps, mean, spread = analyze.over_seeds(groups["rkd"], "step", "knn_top1")
    assert steps == [0, 2, 4] and mean == [30, 42, 53]
    assert spread == pytest.approx([0, 8 ** 0.5, 18 ** 0.5])


def test_what_differs_among_runs_of_one_loss_is_in_their_names(runs, tmp_path):
    other = write_run(tmp_path / "d", [dict(step=1, loss=1.0)], mask_ratio=0.5)
    assert [*analyze.grouped([*runs, other])] == ["rkd, mask_ratio 0.75", "dino",
                                                   "rkd, mask_ratio 0.5"]


def test_images_and_seconds_are_counted_from_the_rows(runs):
    rows = analyze.read_run(runs[0]).rows
    assert [row["images"] for row in rows] == [0, 20, 40]
    assert [row["seconds"] for row in rows] == [0, 4, 8]  # two steps of ten images, five a second


def test_a_line_that_was_cut_is_left_out(runs):
    with open(runs[0] / "log.jsonl", "a") as file:
        file.write('{"step": 6, "knn_t')
    assert [row["step"] for row in analyze.read_run(runs[0]).rows] == [0, 2, 4]


def test_the_table_has_the_evaluations_where_they_are_and_else_the_logs_last_row(runs):
    head, _, rkd, dino = analyze.table(runs).splitlines()
    names, rkd, dino = ([x.strip() for x in line.strip("|").split("|")]
                        for line in (head, rkd, dino))
    found, other = dict(zip(names, rkd)), dict(zip(names, dino))
    assert found["run"] == "`rkd`" and found["n"] == "2" and found["mask"] == "random, 75%"
    assert found["k-NN, %"] == "54.0 ± 4.2" and found["linear, %"] == "62.0 ± 2.8"
    assert found["effective rank"] == "30 → 34" and found["seconds"] == "8"
    assert other["k-NN, %"] == "45.0" and other["linear, %"] == "" and other["mask"] == "none"


def test_each_knn_of_the_table_stands_under_what_was_done_to_the_features(runs, tmp_path):
    lines = [dict(knn_top1=1.0, center=False, whiten=0.0), dict(knn_top1=2.0, center=True),
             dict(knn_top1=3.0, center=False, whiten=0.75)]
    run = write_run(tmp_path / "d", [dict(step=1, knn_top1=9.0, loss=1.0)], evals=lines[::-1])
    head, _, row = analyze.table([run]).splitlines()
    found = dict(zip(*([x.strip() for x in line.split("|")] for line in (head, row))))
    assert [found[f"{name}, %"] for name in ("k-NN", "centred", "whitened")] == ["1.0", "2.0",
                                                                                  "3.0"]


@pytest.fixture
def pairs_of_runs(tmp_path):
    """`dino` with seeds 0, 1, 2, `dino+5*rkd` with 0, 1, `rkd`, and `moco+rkd` without moco."""
    def run(loss, seed, knn, white, linear):
        evals = [dict(knn_top1=knn), dict(knn_top1=white, whiten=0.75), dict(linear_top1=linear)]
        options = dict(pull_weight=0.0 if "rkd" in loss else 0.05)  # of no matter to dino
        return write_run(tmp_path / f"{loss}-{seed}", [dict(step=1, loss=1.0)], seed, evals,
                         loss=loss, **options)
    return [run("dino", 0, 40.0, 48.0, 45.0), run("dino", 1, 42.0, 47.0, 44.0),
            run("dino", 2, 90.0, 90.0, 90.0), run("dino+5*rkd", 0, 45.0, 48.5, 44.0),
            run("dino+5*rkd", 1, 46.0, 46.5, 44.0), run("rkd", 0, 50.0, 51.0, 48.0),
            run("moco+rkd", 0, 50.0, 51.0, 48.0)]


def test_a_pair_is_compared_seed_by_seed_and_a_seed_of_one_alone_is_left_out(pairs_of_runs):
    _, found = analyze.paired(pairs_of_runs)
    assert found == [("dino+5*rkd", "dino", {"knn_top1": [5.0, 4.0], "linear_top1": [-1.0, 0.0],
                                             "knn_top1_whitened": [0.5, -0.5]})]


def test_systems_with_other_options_are_no_pair(pairs_of_runs, tmp_path):
    args = tmp_path / "dino+5*rkd-0" / "args.json"
    args.write_text(json.dumps(json.loads(args.read_text()) | dict(lr=0.5)))
    _, [(_, _, differences)] = analyze.paired(pairs_of_runs)
    assert differences["knn_top1"] == [4.0]


def test_sums_that_differ_in_an_option_of_rkd_say_it(pairs_of_runs, tmp_path):
    args = tmp_path / "moco+rkd-0" / "args.json"
    args.write_text(json.dumps(json.loads(args.read_text()) | dict(pull_weight=0.05)))
    assert [*analyze.grouped(pairs_of_runs)] == [
        "dino", "dino+5*rkd, pull_weight 0.0", "rkd, pull_weight 0.0", "moco+rkd, pull_weight 0.05"]


def test_an_option_of_rkd_parts_no_seeds_of_a_system_without_it(pairs_of_runs, tmp_path):
    args = tmp_path / "dino-1" / "args.json"
    args.write_text(json.dumps(json.loads(args.read_text()) | dict(pull_weight=0.0)))
    assert [run.args["seed"] for run in analyze.grouped(pairs_of_runs)["dino"]] == [0, 1, 2]


def test_the_pairs_are_drawn_and_their_mean_differences_printed(pairs_of_runs, tmp_path):
    text = analyze.pairs(pairs_of_runs, tmp_path / "p.png")
    row = [x.strip() for x in text.splitlines()[-1].strip("|").split("|")]
    assert row == ["textures", "`dino+5*rkd` less `dino`", "+4.5 ± 0.7", "+0.0 ± 0.7",
                   "-0.5 ± 0.7", "2"]
    assert (tmp_path / "p.png").stat().st_size > 5000
    with pytest.raises(ValueError, match=r"X and X\+W\*rkd"):
        analyze.pairs(pairs_of_runs[:3], tmp_path / "q.png")


@pytest.mark.parametrize("values, said", [
    ([4.0, 5.0], "+4.5 ± 0.7"),          # t = 9.0, needed 12.71
    ([4.0, 4.5], "**+4.2 ± 0.4**"),      # t = 17
    ([1.0, 2.0, 3.0], "+2.0 ± 1.0"),     # t = 3.46, needed 4.30
    ([-2.0, -3.0, -4.0], "**-3.0 ± 1.0**"),  # t = 5.2
    ([0.9, 1.1] * 20, "**+1.0 ± 0.1**"), ([7.0], "+7.0"), ([], "")])
def test_a_difference_is_bold_where_its_interval_leaves_out_zero(values, said):
    assert analyze.difference(values) == said


def test_pairs_of_two_data_sets_are_kept_apart(pairs_of_runs, tmp_path):
    for loss, knn in (("dino", 30.0), ("dino+5*rkd", 33.0)):
        pairs_of_runs.append(write_run(tmp_path / f"{loss}-c", [dict(step=1, loss=1.0)], 0,
                                       [dict(knn_top1=knn)], loss=loss, pull_weight=0.0,
                                       data="folder", data_path="some/cifar10/"))
    pairs_of_runs.append(write_run(tmp_path / "e", [dict(step=1, loss=1.0)], data="stl10"))  # bare
    *_, first, second = analyze.pairs(pairs_of_runs, tmp_path / "p.png").splitlines()
    assert first.startswith("| textures |") and "| +4.5 ± 0.7 |" in first
    assert second == "| cifar10 | `dino+5*rkd` less `dino` | +3.0 |  |  | 1 |"


def test_runs_of_two_sets_are_not_compared(runs, tmp_path):
    other = write_run(tmp_path / "d", [dict(step=1)], data="cifar10")
    with pytest.raises(ValueError, match="different data sets.*cifar10.*textures"):
        analyze.table([*runs, other])


# ---------- the pictures ----------

def test_distances_over_their_mean_are_all_one_for_a_simplex_and_see_each_pair_once():
    assert analyze.relative_distances(torch.tensor([[0.], [1], [3]])).tolist() == [0.5, 1.5, 1.0]
    torch.testing.assert_close(analyze.relative_distances(5 * torch.eye(4)), torch.ones(6))


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "tiny"
    assert call("--max-steps", 2, "--batch-size", 16, "--device", "cpu", "--eval-every", 1000,
                "--out-dir", out, "--workers", 0) == 0
    return out


def drawn(monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", ["analyze.py", *map(str, words)])
    analyze.main()


@pytest.mark.parametrize("name", sorted({*analyze.FIGURES} - {"table", "pairs"}))
def test_each_picture_is_drawn_from_a_run(name, trained, tmp_path, monkeypatch):
    out = tmp_path / "picture.png"
    drawn(monkeypatch, name, trained, "--out", out)
    with Image.open(out) as image:
        assert image.width >= 200 and len(image.convert("L").getcolors()) > 20


@pytest.mark.parametrize("name", ["curves", "relations", *analyze.OF_NETWORKS])
def test_several_runs_share_a_picture(name, trained, tmp_path, monkeypatch):
    drawn(monkeypatch, name, trained, trained, "--out", tmp_path / "two.png")
    drawn(monkeypatch, name, trained, "--out", tmp_path / "one.png")
    assert (tmp_path / "two.png").read_bytes() != (tmp_path / "one.png").read_bytes()


def test_of_three_networks_the_title_names_the_two_most_alike(trained):
    options = SimpleNamespace(arch=None, data=None, data_path=None)
    networks = [analyze.open_network(trained, options) for _ in range(3)]
    for network, name in zip(networks, ("one", "two", "other")):
        network.name = name
    torch.nn.init.normal_(networks[2].vit.pos_embed)
    title = analyze.similarity(networks, options).axes[0].get_title()
    assert "most alike: one and two 1.00, least: " in title


def test_a_checkpoint_alone_will_do_and_its_picture_goes_beside_it(trained, monkeypatch):
    drawn(monkeypatch, "spectrum", trained / "checkpoint.pt")
    assert (trained / "spectrum.png").exists()


def test_weights_that_do_not_say_their_data_ask_for_it(trained, tmp_path, monkeypatch, capsys):
    state = torch.load(trained / "checkpoint.pt", weights_only=True)
    args = {name: state["args"][name] for name in ("arch", "image_size", "patch_size", "fixed_pos")}
    torch.save(dict(student=state["teacher"], args=args), tmp_path / "weights.pt")
    with pytest.raises(SystemExit) as end:
        drawn(monkeypatch, "pca", tmp_path / "weights.pt")
    assert end.value.code == 2 and "add --data" in capsys.readouterr().err
    drawn(monkeypatch, "pca", tmp_path / "weights.pt", "--data", "textures")
    assert Path(tmp_path / "pca.png").exists()
