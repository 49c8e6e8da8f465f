"""Training: the parts of a run, whole runs, killed and resumed runs, two processes, wrong options.

    pytest tests/test_train.py
"""
import ast
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch.testing import assert_close

ROOT = Path(__file__).resolve().parent.parent
import checkpoint
import objectives
import train
from conftest import call, parse, write_textures
from data import textures
from losses import effective_rank, panel, pull_loss, rkd_angle_loss, rkd_distance_loss
from masking import random_mask

torch.set_num_threads(1)
STEPS = 40
LONG = ("--max-steps", STEPS, "--drop-path", 0.2)  # drop-path draws random numbers in each step


def cloud(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def command(*words):
    return [sys.executable, *map(str, words)]


ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Textures of 32 px: 40 to train by, 20 to measure by, in five classes."""
    return write_textures(tmp_path_factory.mktemp("images"), 40, 20)


@pytest.fixture(scope="module")
def base(folder):
    """Options of a short run; it evaluates at the start and at the end."""
    return ("--data", "folder", "--data-path", folder, "--batch-size", 16, "--device", "cpu",
            "--workers", 0, "--log-every", 2, "--eval-every", 1000)


@pytest.fixture(scope="module")
def whole(base, tmp_path_factory):
    """An uninterrupted run: its folder, and the finished process."""
    out = tmp_path_factory.mktemp("whole")
    done = subprocess.run(command(ROOT / "train.py", *base, *LONG, "--out-dir", out),
                          env=ENVIRONMENT, capture_output=True, text=True)
    return out, done


def rows_of(out):
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def state_of(out):
    return torch.load(out / "checkpoint.pt", weights_only=True)


# ---------- the parts ----------

ARGS = SimpleNamespace(lr=2.0, min_lr=0.0, warmup=0.1, weight_decay=[0.04, 0.4], momentum=0.9)


@pytest.mark.parametrize("step, lr", [(0, 0.2), (4, 1), (9, 2), (10, 2), (55, 1), (100, 0)])
def test_lr_rises_in_a_line_over_a_tenth_and_falls_in_a_cosine(step, lr):
    assert train.schedules(step, 100, ARGS)[0] == pytest.approx(lr)


@pytest.mark.parametrize("step, decay, momentum", [(0, 0.04, 0.9), (50, 0.22, 0.95), (100, 0.4, 1)])
def test_weight_decay_and_momentum_go_from_start_to_end(step, decay, momentum):
    assert train.schedules(step, 100, ARGS)[1:] == pytest.approx((decay, momentum))


def pieces_of(rank=0, world=1, pieces=1, start=0, stop=6, seed=0):
    args = SimpleNamespace(batch_size=6, grad_accum=pieces, seed=seed)
    order = train.sample_order(18, start, stop, args, rank, world)
    return [(epoch, index.tolist()) for epoch, index in order]


def test_each_index_comes_once_an_epoch_and_epochs_differ():
    order = pieces_of()
    assert [epoch for epoch, _ in order] == [0, 0, 0, 1, 1, 1]
    first, second = (sum((index for epoch, index in order if epoch == e), []) for e in (0, 1))
    assert sorted(first) == sorted(second) == list(range(18)) and first != second
    assert order != pieces_of(seed=1) and order == pieces_of()


def test_the_order_goes_on_where_a_run_stopped():
    assert pieces_of(start=4) == pieces_of()[4:]


@pytest.mark.parametrize("world, pieces", [(2, 1), (1, 3), (3, 2)])
def test_processes_and_pieces_cut_the_batch_in_the_order_of_one(world, pieces):
    ranks = [pieces_of(rank, world, pieces) for rank in range(world)]
    joined = sum((index for at_once in zip(*ranks) for _, index in at_once), [])
    assert joined == sum((index for _, index in pieces_of()), [])
    assert len(ranks[0]) == 6 * pieces and len(ranks[0][0][1]) == 6 // world // pieces


def test_effective_rank_counts_the_directions_in_use():
    assert effective_rank(torch.cat([torch.eye(5), -torch.eye(5)])) == pytest.approx(5, abs=1e-4)
    assert effective_rank(cloud(9, 1) * torch.tensor([[1., 2, 3]])) == pytest.approx(1, abs=1e-3)


def test_panel_sees_one_repeated_point_as_no_spread():
    point = torch.tensor([[3., 4]]).expand(6, 2)
    seen = panel(point, point)
    assert seen["feature_std"] == pytest.approx(0, abs=1e-6)
    assert panel(cloud(2000, 16), cloud(2000, 16))["feature_std"] == pytest.approx(1, abs=0.05)


# ---------- the objective ----------

class Fake(torch.nn.Module):
    """A backbone that notes what it is shown; CLS is a function of the pixels."""
    embed_dim = 6

    def __init__(self, points, patches):
        super().__init__()
        self.points, self.patches, self.seen, self.norm = points, patches, [], torch.nn.Identity()

    def forward(self, images, mask=None, drop=False, norm=True, cls_only=False):
        self.seen.append((images, mask))
        patches = self.patches[:len(images)]
        if drop:
            patches = patches[~mask].view(len(images), -1, self.embed_dim)
        return torch.cat([self.points(images).unsqueeze(1), patches], 1)


def one_step(*options, views=2):
    """Parts of `rkd` for four images of six pixels, their sum, and what went in."""
    args = parse("--distance-weight", 3, "--angle-weight", 5, "--pool", "cls", *options)
    mask, patches = random_mask(8, (4, 4), 0.75), cloud(8, 16, 6)
    strong, weak = ([cloud(4, 6, seed=seed + i) for i in range(views)] for seed in (0, 10))
    system = objectives.System(args)
    student, teacher = Fake(lambda x: 2 * x.exp(), patches), Fake(lambda x: x, patches)
    system.student.backbone, system.teacher.backbone = student, teacher
    loss, logs, _ = system(strong, weak, mask)
    return logs, loss, strong, weak, mask, student.seen, teacher.seen


def test_the_teachers_distances_are_read_to_the_power_that_is_asked_for():
    logs, _, strong, *_ = one_step("--distance-power", "2")
    expected = [rkd_distance_loss(2 * strong[i].exp(), strong[1 - i], 2) for i in (0, 1)]
    assert_close(logs["distance"], sum(expected) / 2)


@pytest.mark.parametrize("views, pairs", [(2, [(0, 1), (1, 0)]),
                                          (3, [(0, 1), (1, 0), (2, 0), (2, 1)])])
def test_each_view_is_compared_with_the_other_ones_and_never_with_itself(views, pairs):
    logs, loss, strong, *_ = one_step(views=views)
    total = 0
    for name, weight, function in [("distance", 3, rkd_distance_loss), ("angle", 5, rkd_angle_loss),
                                   ("pull", 0.05, pull_loss)]:
        expected = sum(function(2 * strong[i].exp(), strong[j]) for i, j in pairs) / len(pairs)
        assert_close(logs[name], expected)
        total += weight * expected
    assert_close(loss, total)


def test_the_student_sees_strong_views_through_the_mask_and_the_teacher_two_whole_ones():
    _, _, strong, _, mask, student, [(images, unmasked)] = one_step(views=3)
    assert student[0][0].equal(torch.cat(strong[:2])) and student[0][1] is mask
    assert student[1][0].equal(strong[2]) and student[1][1] is None  # a local view is whole
    assert images.equal(torch.cat(strong[:2])) and unmasked is None


def test_a_weak_teacher_sees_the_weak_views():
    *_, weak, _, student, [(images, _)] = one_step("--weak-teacher")
    assert images.equal(torch.cat(weak)) and not student[0][0].equal(images)


@pytest.mark.parametrize("hide", ["drop", "token"])
def test_a_visible_patch_is_compared_with_the_same_patch_of_the_teacher(hide):
    logs, loss, *_ = one_step("--patch-weight", 0.5, "--hide", hide)  # the fakes' patches are equal
    assert logs["patch_distance"] < 1e-6 and logs["patch_angle"] < 1e-6
    assert_close(loss, one_step("--hide", hide)[1])


def test_a_weight_of_zero_takes_its_term_away():
    logs = one_step("--pull-weight", 0)[0]
    assert [name for name in logs if "collapsed" not in name] == ["rkd", "distance", "angle"]
    args = parse("--distance-weight", 0)
    assert list(objectives.relations(cloud(4, 2), cloud(4, 2), args)) == ["angle"]


@pytest.mark.parametrize("loss", [*objectives.OBJECTIVES, "dino+rkd", "ibot+0.5*rkd"])
def test_a_step_gives_each_parameter_of_the_student_a_gradient_and_the_teacher_none(
        loss, base, tmp_path):
    options = "--head", 8, "--predictor", "--patch-weight", 1, "--angle-weight", 0
    run = train.prepare(parse(*base, *options, "--loss", loss, "--out-dir", tmp_path))
    _, weak, strong = next(run.batches)
    mask = train.draw_masks(run, 0, 0, weak)
    run.network(strong, weak, mask)[0].backward()
    trained = {name: p for name, p in run.system.student.named_parameters() if p.requires_grad}
    assert len(trained) > 30 and [name for name, p in trained.items() if p.grad is None] == []
    if run.system.teacher:
        assert all(p.grad is None and not p.requires_grad for p in run.system.teacher.parameters())
        assert run.system.student.training and not run.system.teacher.training


def test_three_quarters_of_each_of_two_views_are_hidden(base, tmp_path):
    run = train.prepare(parse(*base, "--out-dir", tmp_path))
    assert train.draw_masks(run, 0, 0, None).sum(1).tolist() == [12] * 32  # of 4 x 4, 16 images


def test_ibots_masks_hide_none_or_a_tenth_to_a_half(base, tmp_path):
    run = train.prepare(parse(*base, "--loss", "ibot", "--out-dir", tmp_path))
    counts = torch.cat([train.draw_masks(run, step, 0, None).sum(1) for step in range(20)])
    assert set(counts.tolist()) == {0, *range(2, 9)}  # 1.6 .. 8 of 16 patches
    assert 0.4 < counts.eq(0).double().mean() < 0.6


def test_masks_differ_from_step_to_step_and_piece_to_piece_and_come_back(base, tmp_path):
    run = train.prepare(parse(*base, "--out-dir", tmp_path))
    places = (0, 0), (0, 0), (1, 0), (0, 1)  # step, piece
    first, again, later, other = (train.draw_masks(run, *place, None) for place in places)
    assert first.equal(again) and not first.equal(later) and not first.equal(other)
    assert not first[:16].equal(first[16:])  # the two views of an image


def test_attention_hides_what_the_teacher_attends_to_most(base, tmp_path):
    run = train.prepare(parse(*base, "--mask", "attention", "--out-dir", tmp_path))
    _, weak, _ = next(run.batches)
    attention = run.system.teacher.backbone.last_attention(weak[1]).mean(1)  # (16, 16 patches)
    mask = train.draw_masks(run, 0, 0, weak)[16:]
    assert mask.sum(1).tolist() == [12] * 16
    least_hidden = attention.masked_fill(~mask, torch.inf).amin(1)
    assert (least_hidden >= attention.masked_fill(mask, -torch.inf).amax(1)).all()


def test_every_declared_option_is_read():
    trees = [ast.parse((ROOT / name).read_text())
             for name in ("train.py", "objectives.py", "checkpoint.py")]
    nodes = [node for tree in trees for node in ast.walk(tree) if isinstance(node, ast.Attribute)]
    read = {node.attr for node in nodes if isinstance(node.ctx, ast.Load)
            and ast.unparse(node.value).endswith(("args", "parse_args(words)"))}
    declared = set(vars(parse()))
    assert len(declared) > 30 and declared - read == set()


# ---------- a whole run ----------

def test_a_run_ends_with_status_0_and_its_files(whole):
    out, done = whole
    assert done.returncode == 0, done.stderr
    assert sorted(x.name for x in out.iterdir()) == \
        ["args.json", "checkpoint.pt", "curves.png", "log.jsonl", "masks.png"]
    assert json.loads((out / "args.json").read_text())["max_steps"] == STEPS
    for name in ("curves.png", "masks.png"):
        assert np.asarray(Image.open(out / name).convert("L")).std() > 5


def test_the_log_starts_with_raw_pixels_and_the_untrained_network(whole):
    first, *later = rows_of(whole[0])
    assert first["step"] == 0
    assert 0 <= first["raw_pixels_knn_top1"] <= 100
    assert first["untrained_knn_top1"] in (first["knn_top1"], first["knn_top1_centered"])
    assert [row["step"] for row in later if "knn_top1" in row] == [STEPS]


def test_the_log_has_the_first_the_last_and_every_second_step_once(whole):
    assert [row["step"] for row in rows_of(whole[0])] == [0, 1, *range(2, STEPS + 1, 2)]


def test_a_row_has_what_is_promised_and_its_terms_add_up(whole):
    promised = set("step epoch loss distance angle pull lr momentum images_per_second data_seconds "
                   "effective_rank feature_std".split())
    for row in rows_of(whole[0])[1:]:
        assert promised <= set(row)
        total = row["distance"] + 2 * row["angle"] + 0.05 * row["pull"]
        assert row["loss"] == pytest.approx(total, rel=1e-4)
        assert row["epoch"] == pytest.approx(row["step"] * 16 / 40, rel=1e-4)
        lr, _, momentum = train.schedules(row["step"] - 1, STEPS, parse())
        assert [row["lr"], row["momentum"]] == pytest.approx([lr, momentum], rel=1e-4)


def test_a_checkpoint_holds_plain_tensors_and_the_completed_steps(whole):
    state = state_of(whole[0])
    assert state["step"] == STEPS and state["args"]["seed"] == 0
    assert len(state["optimizer"]["state"]) > 20
    name = "backbone.blocks.0.attn.qkv.weight"
    assert 0 < (state["student"][name] - state["teacher"][name]).abs().max() < 0.1


def test_a_run_killed_before_its_first_checkpoint_starts_a_new_log(tmp_path):
    run = SimpleNamespace(args=SimpleNamespace(out_dir=str(tmp_path)), rank=0, step=0)
    checkpoint.Log(run).write(dict(step=0, knn_top1=25.0))
    assert checkpoint.Log(run).rows == [] and (tmp_path / "log.jsonl").read_text() == ""


def test_a_run_of_other_options_is_not_overwritten(whole, base, capsys):
    before = (whole[0] / "checkpoint.pt").read_bytes()
    with pytest.raises(SystemExit) as stop:
        call(*base, *LONG, "--out-dir", whole[0], "--lr", 0.00123)
    [line] = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2 and "0.00123" in line
    assert (whole[0] / "checkpoint.pt").read_bytes() == before


def test_starting_over_keeps_what_was_there(whole, base, tmp_path):
    out = shutil.copytree(whole[0], tmp_path / "run")
    before = {name: (out / name).read_bytes() for name in ("checkpoint.pt", "log.jsonl")}
    run = train.prepare(parse(*base, "--out-dir", out, "--resume", "none"))
    assert run.step == 0
    for content in before.values():
        assert content in [path.read_bytes() for path in out.iterdir()]


def test_the_optimizer_works_with_the_scheduled_values_and_decays_matrices_only(whole):
    state, (lr, decay, _) = state_of(whole[0]), train.schedules(STEPS - 1, STEPS, parse())
    matrices, vectors = state["optimizer"]["param_groups"]
    assert matrices["lr"] == vectors["lr"] == pytest.approx(lr)
    assert matrices["weight_decay"] == pytest.approx(decay) and vectors["weight_decay"] == 0
    assert len(matrices["params"]) == 2 * 4 + 3  # two blocks' qkv, proj, fc1, fc2; the patches'


# ---------- killed, and started again ----------

@pytest.fixture(scope="module")
def killed(base, tmp_path_factory):
    """A run that got SIGTERM after its first checkpoint: its folder, options and exit status."""
    out = tmp_path_factory.mktemp("killed")
    options = (*base, *LONG, "--save-every", 1, "--out-dir", out)
    process = subprocess.Popen(command(ROOT / "train.py", *options), env=ENVIRONMENT,
                               stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not (out / "checkpoint.pt").exists() and process.poll() is None:
        time.sleep(0.005)
    process.terminate()
    return out, options, process.wait()


def test_sigterm_saves_the_state_and_ends_with_status_143(killed):
    out, _, status = killed
    assert status == 143
    assert 1 <= state_of(out)["step"] < STEPS


def test_a_killed_run_ends_bitwise_as_the_whole_one_with_each_step_once(killed, whole):
    out, options, _ = killed
    resumed = shutil.copytree(out, out.parent / "resumed")
    with open(resumed / "log.jsonl", "a") as file:
        file.write('{"step": 39, "loss": 1.0}\n{"step": 40, "lo')  # logged, but not saved; then cut
    assert call(*options[:-1], resumed) == 0
    a, b = state_of(resumed), state_of(whole[0])
    assert a["step"] == b["step"] == STEPS
    for kind in ("student", "teacher"):
        assert a[kind].keys() == b[kind].keys()
        assert all(a[kind][name].equal(x) for name, x in b[kind].items())
    for index, moments in b["optimizer"]["state"].items():
        assert all(a["optimizer"]["state"][index][k].equal(x) for k, x in moments.items())
    assert [row["step"] for row in rows_of(resumed)] == list(range(STEPS + 1))


@pytest.mark.parametrize("loss", ["dino", "ibot", "moco+rkd", "dbot"])
def test_centres_and_stages_go_on_where_they_were(loss, base, tmp_path):
    options = (*base, "--loss", loss, "--epochs", 3, "--save-every", 1)  # 6 steps, 3 a stage
    assert call(*options, "--out-dir", tmp_path / "whole") == 0
    for stop in (3, 6):
        assert call(*options, "--max-steps", stop, "--out-dir", tmp_path / "parts") == 0
    a, b = state_of(tmp_path / "whole"), state_of(tmp_path / "parts")
    assert a["step"] == b["step"] == 6 and a.keys() == b.keys()
    for kind in {"student", "teacher", "frozen", "objective"} & a.keys():
        assert_close(a[kind], b[kind], rtol=0, atol=0)
    assert (loss == "dbot") == ("frozen" in a) and all(x.any() for x in a["objective"].values())


# ---------- two processes ----------

@pytest.fixture(scope="module")
def two_processes(base, tmp_path_factory):
    """Folder of a run of two processes."""
    out = tmp_path_factory.mktemp("two")
    done = subprocess.run(
        command("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
                ROOT / "train.py", *base, "--epochs", 20, "--max-steps", 10, "--out-dir", out),
        env=ENVIRONMENT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return out


def test_ten_steps_of_two_processes_end_where_those_of_one_do(two_processes, base, tmp_path):
    call(*base, "--epochs", 20, "--max-steps", 10, "--out-dir", tmp_path)  # 4 of 40 steps warm up
    one, two = state_of(tmp_path), state_of(two_processes)
    for name, x in one["student"].items():
        assert_close(two["student"][name], x, rtol=0, atol=1e-4, msg=lambda text: f"{name}: {text}")
    one, two = ([(row["step"], row.get("loss")) for row in rows_of(out)]
                for out in (tmp_path, two_processes))
    assert [step for step, _ in two] == [0, 1, 2, 4, 6, 8, 10]
    assert two[1:] == [(step, pytest.approx(loss, rel=1e-3)) for step, loss in one[1:]]


# ---------- other options ----------

@pytest.mark.parametrize("options, moved", [
    ("--mask-ratio 0", "backbone.pos_embed"),
    ("--hide token", "backbone.mask_token"),
    ("--patch-weight 1 --hide token", "backbone.mask_token"),
    ("--local-crops 2", "backbone.pos_embed"),
    ("--mask attention", "backbone.pos_embed"),
    ("--mask block", "backbone.pos_embed"),
    ("--head 16 --predictor", "predictors.rkd.0.weight"),
    ("--weak-teacher", "backbone.pos_embed"),
    ("--pull-weight 0", "backbone.pos_embed"),
    ("--grad-accum 2 --drop-path 0.5 --pool cls+mean", "backbone.cls_token"),
])
def test_two_steps_move_student_and_teacher_and_stay_finite(options, moved, base, tmp_path):
    start = objectives.System(parse(*options.split())).student.state_dict()
    assert call(*base, *options.split(), "--max-steps", 2, "--out-dir", tmp_path) == 0
    state, weight = state_of(tmp_path), "backbone.blocks.0.attn.qkv.weight"
    assert all(x.isfinite().all() for x in state["student"].values())
    for name in (moved, weight, "backbone.blocks.1.mlp.fc2.weight"):
        assert (start[name] - state["student"][name]).abs().max() > 1e-5
    assert not state["teacher"][weight].equal(start[weight])


def test_a_few_images_without_classes_train_and_it_is_said_that_they_are_not_evaluated(
        tmp_path, capsys):
    for i, pixels in enumerate(textures(4, 0)[0].images):
        Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(tmp_path / f"{i}.png")
    assert call("--data", "folder", "--data-path", tmp_path, "--batch-size", 4, "--max-steps", 2,
                "--device", "cpu", "--out-dir", tmp_path / "run") == 0
    assert f"{tmp_path} has no classes" in capsys.readouterr().out
    rows = rows_of(tmp_path / "run")
    assert [row["step"] for row in rows] == [0, 1, 2] and not any("knn_top1" in row for row in rows)


def test_a_loss_that_is_not_finite_ends_with_status_1_and_saves_nothing(
        base, tmp_path, capsys, monkeypatch):
    def broken(seen):
        loss, logs = objectives.rkd(seen)
        return loss * torch.nan, logs

    monkeypatch.setattr(objectives.OBJECTIVES["rkd"], "loss", broken)
    with pytest.raises(SystemExit) as stop:
        call(*base, "--max-steps", 2, "--out-dir", tmp_path)
    assert stop.value.code == 1 and "not finite" in capsys.readouterr().err
    assert not (tmp_path / "checkpoint.pt").exists()


@pytest.mark.parametrize("options, value", [
    ("--loss nothing", "nothing"), ("--data nowhere", "nowhere"), ("--arch vit_huge", "vit_huge"),
    ("--mask checker", "checker"), ("--hide away", "away"), ("--pool max", "max"),
    ("--unheard-of 3", "--unheard-of"), ("--image-size 30", "30"), ("--image-size 0", "0"),
    ("--patch-size 5", "5"), ("--patch-size 64", "64"),
    ("--mask-ratio 1.5", "1.5"), ("--mask-ratio -0.1", "-0.1"), ("--mask-ratio 1.0", "1.0"),
    ("--momentum 2", "2"), ("--crop-scale 0.9 0.3", "0.9"), ("--crop-scale 0 1", "--crop-scale"),
    ("--lr -1", "-1"), ("--lr nan", "nan"), ("--lr inf", "inf"), ("--lr fast", "fast"),
    ("--batch-size 2", "2"), ("--batch-size 0", "0"), ("--batch-size 64", "64"),
    ("--batch-size 15 --grad-accum 2", "15"),
    ("--patch-weight 1 --mask-ratio 0.9", "--patch-weight"),
    ("--distance-weight 0 --angle-weight 0", "--angle-weight 0"), ("--max-steps 0", "0"),
    ("--epochs 0.01", "0.01"), ("--epochs 0", "0"), ("--save-every 0", "0"), ("--head -1", "-1"),
    ("--workers -1", "-1"), ("--local-crops -1", "-1"),
    ("--data-path /no/such/place", "/no/such/place"), ("--resume {tmp}/none.pt", "{tmp}/none.pt"),
    ("--resume {tmp}/text", "{tmp}/text"), ("--out-dir {tmp}/text/run", "{tmp}/text/run"),
])
def test_a_wrong_option_ends_with_status_2_and_one_line_that_names_it(
        options, value, base, tmp_path, capsys):
    (tmp_path / "text").write_text("words")
    options = options.format(tmp=tmp_path).split()
    with pytest.raises(SystemExit) as stop:
        call(*base, "--max-steps", 2, "--out-dir", tmp_path / "run", *options)
    [line] = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2 and value.format(tmp=tmp_path) in line
    assert not (tmp_path / "run" / "checkpoint.pt").exists()
