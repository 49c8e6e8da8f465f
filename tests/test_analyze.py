"""Figures and tables: the numbers behind them by hand, and each is drawn, or refused.

    pytest tests/test_analyze.py
"""
import json
import sys

import pytest
import torch
from PIL import Image
from torch.testing import assert_close

import analyze
from conftest import call, write_textures
from model import VisionTransformer


def cloud(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_angles_and_relative_distances_of_the_3_4_5_triangle():
    x = torch.tensor([[0., 0], [3, 0], [0, 4]])  # each angle is seen from both sides
    assert_close(analyze.angles(x).sort().values, torch.tensor([0, 0, 0.6, 0.6, 0.8, 0.8]))
    assert_close(analyze.relative_distances(x), torch.tensor([0.75, 1.0, 1.25]))  # over 4


def test_ridge_reads_what_is_linear_half_of_what_is_half_noise_and_no_noise():
    x, parts = cloud(6000, 5), torch.arange(6000).split([3000, 500, 2500])
    linear, noise = (x[:, :1] - x[:, 1:2]) / 2**0.5 + 3, cloud(6000, 1, seed=2)
    found = analyze.ridge(x, torch.cat([linear, linear + noise, noise], 1), parts)
    assert found.tolist() == pytest.approx([1, 0.5, 0], abs=0.04)


# ---------- the pictures ----------

@pytest.fixture(scope="module")
def trained(tmp_path_factory):  # -> the words that name a run and its images
    out, images = tmp_path_factory.mktemp("runs"), tmp_path_factory.mktemp("images")
    where = ["--data-path", write_textures(images, 40, 60)]
    assert call("--data", "folder", *where, "--max-steps", 2, "--batch-size", 16, "--workers", 0,
                "--device", "cpu", "--eval-every", 1000, "--out-dir", out) == 0
    return [out, *where]


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


def test_weights_that_do_not_say_their_data_ask_for_it(trained, tmp_path, monkeypatch, capsys):
    state = torch.load(trained[0] / "checkpoint.pt", weights_only=True)
    args = {name: state["args"][name] for name in ("arch", "image_size", "patch_size", "fixed_pos")}
    torch.save(dict(student=state["teacher"], args=args), tmp_path / "weights.pt")
    with pytest.raises(SystemExit) as end:
        draw(monkeypatch, "pca", tmp_path / "weights.pt")
    assert end.value.code == 2 and "add --data" in capsys.readouterr().err
    draw(monkeypatch, "pca", tmp_path / "weights.pt", "--data", "folder", *trained[1:])
    assert (tmp_path / "pca.png").exists()  # beside the weights
