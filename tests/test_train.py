"""Training: schedules, order of the images, masks, the log, and steps written out plainly."""
import ast
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.testing import assert_close

import train
from conftest import call, parse, run, write_textures
from model import ema_update
from objectives import System

OPTIONS_ARE_READ_IN = "train.py objectives.py".split()
FILES = "args.json checkpoint.pt curves.png lock log.jsonl masks.png previous.pt".split()
CPU = "--data folder --batch-size 8 --device cpu --workers 0 --log-every 2".split()


def masks(args, step=0, piece=0, views=None, system=None):
    """The masks of the global views of a step's piece, (views · images, patches)."""
    return train.draw_masks(args, system or System(args), step, piece, views)


def order(rank=0, world=1, pieces=1, start=0, seed=0):
    """(epoch, indices) of every piece of six steps with 6 of 18 images."""
    args = SimpleNamespace(batch_size=6, grad_accum=pieces, seed=seed)
    return [(epoch, x.tolist()) for epoch, x in train.sample_order(18, start, 6, args, rank, world)]


@pytest.mark.parametrize("step, expected", [
    (0, [0, 0.04, 0.9]), (9, [2, 0.047, 0.902]), (55, [1, 0.248, 0.958]), (100, [0, 0.4, 1])])
def test_lr_warms_up_in_a_line_and_lr_decay_and_momentum_follow_a_cosine(step, expected):
    args = SimpleNamespace(lr=2.0, min_lr=0.0, warmup=0.1, weight_decay=[0.04, 0.4], momentum=0.9)
    assert train.schedules(step, 100, args) == pytest.approx(expected, abs=6e-4)


def test_each_index_comes_once_per_epoch_and_a_resume_continues_the_order():
    first, second = (sum((index for epoch, index in order() if epoch == e), []) for e in (0, 1))
    assert sorted(first) == sorted(second) == list(range(18)) and first != second
    assert order() != order(seed=1) and order(start=4) == order()[4:]


@pytest.mark.parametrize("world, pieces", [(2, 1), (1, 3), (3, 2)])
def test_processes_and_pieces_cut_the_batch_of_one_process_in_order(world, pieces):
    ranks = [order(rank, world, pieces) for rank in range(world)]
    joined = [index for cut in zip(*ranks) for _, index in cut]
    assert joined == torch.tensor([x for _, x in order()]).view(-1, 6 // world // pieces).tolist()


def test_masks_hide_their_share_and_repeat_only_for_the_same_step_and_piece():
    mask = masks(parse())
    assert mask.dtype == torch.bool and mask.sum(1).tolist() == [12] * 2 * 128  # 3/4 of 4 x 4
    assert mask.equal(masks(parse())) and not mask[:128].equal(mask[128:])  # the two views differ
    for other in masks(parse(), step=1), masks(parse(), piece=1), masks(parse("--seed", 1)):
        assert not mask.equal(other)


def test_ibots_masks_hide_nothing_in_half_of_the_views_and_else_a_tenth_to_a_half():
    counts = torch.cat([masks(parse("--loss", "ibot"), step).sum(1) for step in range(4)])
    assert set(counts.tolist()) == {0, *range(2, 9)}  # 1.6 .. 8 of 16 patches
    assert 0.45 < counts.eq(0).double().mean() < 0.55


def test_attention_masks_hide_what_the_teacher_attends_to_most():
    args, views = parse("--mask", "attention"), [*torch.randn(2, 16, 3, 32, 32)]
    system = System(args)
    attention = system.teacher.backbone.last_attention(torch.cat(views)).mean(1)  # (32, 16)
    assert masks(args, 0, 0, views, system).equal(attention.argsort(descending=True).argsort() < 12)


def test_every_declared_option_is_read():
    folder, declared = Path(train.__file__).parent, set(vars(parse()))
    trees = [ast.parse((folder / name).read_text()) for name in OPTIONS_ARE_READ_IN]
    read = {node.attr for tree in trees for node in ast.walk(tree)
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load)
            and ast.unparse(node.value).endswith(("args", "parse_args(words)"))}
    assert len(declared) > 30 and declared - read == set()


def test_the_log_has_the_promised_steps_and_columns(tmp_path):
    data, out = write_textures(tmp_path / "images", 40, 20), tmp_path / "run"
    assert call(*CPU, "--data-path", data, "--max-steps", 11, "--out-dir", out) == 0
    assert sorted(path.name for path in out.iterdir()) == FILES
    first, *rows = map(json.loads, (out / "log.jsonl").read_text().splitlines())
    assert [row["step"] for row in (first, *rows)] == [0, 1, 2, 4, 6, 8, 10, 11]
    assert first["untrained_knn_top1"] in (first["knn_top1"], first["knn_top1_centered"])
    assert 0 <= first["raw_pixels_knn_top1"] <= 100 and 0 <= rows[-1]["knn_top1"] <= 100
    for row in rows:
        assert {"images_per_second", "data_seconds", "effective_rank", "feature_std"} <= set(row)
        total = row["distance"] + 2 * row["angle"] + 0.05 * row["pull"]
        lr, _, momentum = train.schedules(row["step"] - 1, 11, parse())
        assert [row[name] for name in "loss rkd epoch lr momentum".split()] == pytest.approx(
            [total, total, row["step"] * 8 / 40, lr, momentum], rel=1e-4)


def loop(args, batches):
    """What a checkpoint holds after two plain steps on recorded views, with recorded randomness."""
    system, length = System(args), 2 // args.stages
    moving = [p for p in system.student.parameters() if p.requires_grad]
    decaying = dict(matrices=(2, 4), tokens=(2, 3, 4), all=(1, 2, 3, 4))[args.decay]
    groups = [dict(params=[p for p in moving if (p.dim() in decaying) == yes]) for yes in (1, 0)]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, args.beta2), eps=args.adam_eps, fused=True)
    for step in range(2):
        if step == length:
            system.next_stage(1)
        lr, decay, momentum = train.schedules(step % length, length, args)
        for group, weight_decay in zip(optimizer.param_groups, (decay, 0)):
            group.update(lr=lr, weight_decay=weight_decay)
        for piece in range(args.grad_accum):
            strong, weak, *_, random = batches.pop(0)
            seen = weak if args.weak_teacher else strong  # by the teacher
            mask = masks(args, step, piece, seen, system)
            torch.set_rng_state(random)  # of stochastic depth
            (system(strong, weak, mask, step % length / length)[0] / args.grad_accum).backward()
        for clipped in [[p] for p in moving] if args.clip_each else [moving]:
            torch.nn.utils.clip_grad_norm_(clipped, args.clip_grad or torch.inf)
        if step < 2 * args.freeze_last_layer:
            system.student.heads["dino"].prototypes.grad = None
        optimizer.step()
        optimizer.zero_grad()
        if args.teacher == "ema":
            ema_update(system.teacher, system.student, momentum)
    return system.save()


@pytest.mark.parametrize("options", [
    "--mask-ratio 0 --clip-grad 0", "--hide token", "--local-crops 2", "--mask attention --seed 1",
    "--mask attention --weak-teacher",
    "--mask block --weak-teacher", "--head 16 --beta2 0.5", "--grad-accum 2 --drop-path 0.5",
    "--loss dbot --clip-each --clip-grad 0.001", "--weight-decay 9 5 --pool cls+mean",
    "--loss mae --weight-decay 9 5 --decay tokens", "--weight-decay 9 5 --decay all --adam-eps 1e-3",
    "--loss dino --freeze-last-layer 0.5 --teacher-temperature 0.02 0.2", "--clip-grad 0.01"])
def test_two_steps_without_classes_equal_the_plain_loop(options, tmp_path, monkeypatch, capsys):
    images, out = write_textures(tmp_path / "images", 16, 0, classes=1), tmp_path / "run"
    words = *CPU, "--data-path", images / "train/class0", "--max-steps", 2, *options.split()
    batches, forward = [], System.forward

    def record(*batch):
        batches.append((*batch[1:], torch.get_rng_state()))
        return forward(*batch)

    monkeypatch.setattr(System, "forward", record)
    assert run(out, words) == 0
    assert "no evaluation" in capsys.readouterr().out
    expected = loop(parse(*words), [*batches]) | dict(step=2)
    found = torch.load(out / "checkpoint.pt", weights_only=True)  # plain tensors
    assert_close({name: found[name] for name in expected}, expected, rtol=0, atol=1e-5)


def test_evaluation_draws_its_references_from_the_labelled(monkeypatch):
    labels = torch.full((60_000,), -1)
    labels[::10] = torch.arange(6000) % 3
    sets = [SimpleNamespace(labels=labels), SimpleNamespace(labels=labels[:9])]
    drawn = []

    def extract(vit, data, size, pool, device, indices, *rest):
        drawn.append(indices)
        return torch.eye(3)[data.labels[indices]], data.labels[indices]
    monkeypatch.setattr(train, "extract_features", extract)
    args = SimpleNamespace(image_size=32, workers=0, pool="mean", timeout=0)
    train.evaluate(args, System(parse()), sets)
    assert drawn[0].tolist() == list(range(0, 60_000, 10)) and drawn[1].tolist() == [0]
