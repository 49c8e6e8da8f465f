"""The bench: every plain reference does what it is compared with, and the table says what it found.

    pytest tests/test_bench.py          # nothing here depends on time
"""
import json
import sys

import pytest
import torch
from torch.testing import assert_close

import bench
from losses import rkd_angle_loss, rkd_distance_loss
from model import ema_update

torch.set_num_threads(1)


def cloud(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# ---------- the references ----------

@pytest.mark.parametrize("ours, dense", [(rkd_distance_loss, bench.dense_distance),
                                         (rkd_angle_loss, bench.dense_angle)])
def test_dense_relations_are_ours(ours, dense):
    found = []
    for loss in (ours, dense):
        student = cloud(20, 6).double().requires_grad_()
        value = loss(student, cloud(20, 5, seed=1).double())
        value.backward()
        found.append((value.float(), student.grad))
    assert_close(*found, rtol=1e-5, atol=1e-8)


def system_of(loss):
    """A small system whose every weight and centre was moved, its views, its masks."""
    sizes = {"head-hidden": 24, "prototypes": 16, "projection": 8}
    system, views, mask = bench.training_system(loss, "vit_tiny", "cpu", 3, size=64, **sizes)
    random = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for x in system.parameters():
            x += 0.1 * torch.randn(x.shape, generator=random)
    system.state = {name: 0.05 * torch.randn(x.shape, generator=random)
                    for name, x in system.state.items()}
    return system, views, mask


@pytest.mark.parametrize("loss", ["dino", "ibot"])
def test_the_plain_step_has_our_loss_gradient_and_centres(loss):
    found = []
    for plain in (True, False):
        system, views, mask = system_of(loss)
        value = bench.plain_dino(system, views, mask) if plain else system(views, views, mask)[0]
        value.backward()
        found.append((value, [p.grad for p in system.student.parameters()
                                      if p.grad is not None], system.state))
    (a, their_gradients, their_state), (b, gradients, state) = found
    assert_close(a, b, rtol=1e-5, atol=0)
    assert len(gradients) == len(their_gradients) > 100
    for x, y in zip(gradients, their_gradients):
        assert (x - y).norm() <= 1e-4 * y.norm() + 1e-6
    assert_close(state, their_state, rtol=1e-4, atol=1e-6)


def test_the_plain_moving_average_is_ours():
    found = []
    for average in (bench.plain_ema, ema_update):
        system, _, _ = system_of("dino")
        average(system.teacher, system.student, 0.9)
        found.append(system.teacher.state_dict())
    assert_close(*found)


def test_plain_knn_has_our_scores():
    plain, ours = bench.knn(300, 40, ks=(5, 20), D=8, classes=7)
    for a, b in zip(plain(), ours().values()):
        assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_ten_plain_probes_are_our_ten_heads():
    plain, ours = bench.probe(300, 3, D=6, classes=4)
    heads = ours()
    for layer, weight, bias in zip(plain(), *heads.parameters):
        assert_close(layer.weight.detach().T, weight, rtol=1e-4, atol=1e-5)
        assert_close(layer.bias.detach(), bias.flatten(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("make, hidden", [(bench.block_masks, 78), (bench.random_masks, 147)])
def test_plain_masks_hide_as_many(make, hidden):
    for masks in (run().flatten(1) for run in make(30)):
        assert masks.dtype == torch.bool and masks.sum(1).tolist() == [hidden] * 30


def test_our_colours_are_those_of_pil_to_little_more_than_a_grey_level():
    files = bench.photographs(2)
    assert bench.grey_levels(files) < 1.5  # its hue has 256 steps, and it always rounds
    plain, ours = bench.views(files)
    for a, b in zip(plain(), ours()):
        assert a.shape == b.shape and a.dtype == b.dtype == torch.float32


# ---------- the table ----------

def test_the_peak_of_memory_is_that_of_the_tensors():
    peak = bench.peak_memory(lambda: torch.ones(2**22) + torch.ones(2**22), "cpu")  # three of 16 MB
    assert peak is None or 0.9 < peak / (3 * 2**24) < 1.2


def called(monkeypatch, capsys, *words):
    monkeypatch.setattr(sys, "argv", ["bench.py", "--device", "cpu", *words])
    monkeypatch.setattr(bench.time, "monotonic", iter(range(0, 10**6, 100)).__next__)
    bench.main()
    return [json.loads(line) for line in capsys.readouterr().out.splitlines() if line[0] == "{"]


def test_one_row_of_json_for_each_of_the_table(monkeypatch, capsys):
    rows = called(monkeypatch, capsys, "--quick", "--only", "random", "angle 64")
    assert [row["row"] for row in rows] == ["angle 64", "random masks"]
    for row in rows:
        low, high = row["ratio_quartiles"]
        assert low <= row["ratio"] <= high and row["repetitions"] == 3 and row["seconds"] > 0
    assert rows[1]["items_per_second"] == pytest.approx(1024 / rows[1]["seconds"], rel=0.1)


def test_a_row_that_is_not_there_is_refused(monkeypatch, capsys):
    with pytest.raises(SystemExit) as end:
        called(monkeypatch, capsys, "--only", "tables")
    error = capsys.readouterr().err
    assert end.value.code == 2 and "--only tables" in error and "angle" in error
