"""Objectives: every term against its paper written out plainly, two processes against one, batch
normalisation, the words of --loss, teachers and stages, the words of patches.

    pytest tests/test_objectives.py

The plain versions compute everything for every token, one view at a time, with torch.nn.functional
alone, from the weights by their names. Letters: B images, N patches, D width, K prototypes.
"""
import os
import subprocess
import sys
from copy import deepcopy
from functools import partial
from itertools import permutations
from math import isfinite
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.testing import assert_close

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # torchrun starts this file too: see the end

import objectives
import train
from launch import leave_by
from model import ARCHS, VisionTransformer, ema_update
from objectives import OBJECTIVES, System, defaults, parse_loss

torch.set_num_threads(1)
NANO = partial(VisionTransformer, embed_dim=16, depth=2, num_heads=2)
WIDER = partial(VisionTransformer, embed_dim=24, depth=1, num_heads=3)
SMALL = ("--arch vit_nano --image-size 16 --patch-size 4 --batch-size 8 --prototypes 24 "
         "--projection 12 --head-hidden 20 --decoder 64 1").split()  # 64: two heads of 32
WARMING = "--no-head-batchnorm --teacher-temperature 0.04 0.07 --teacher-warmup 0.3"
PROGRESS = 0.12  # of the run: 0.4 of the way, at 0.052
CASES = {  # --loss: more options
    "rkd": "--head 12 --predictor --patch-weight 0.5 --pull-weight 0.3 --local-crops 1",
    "ressl": "--pool cls --mask-ratio 0 --temperature 0.2 " + WARMING,
    "cka": "--hide token", "feature": "", "simclr": "--pool cls+mean", "moco": "--pool cls",
    "dino": "--pool cls --local-crops 2 " + WARMING,
    "ibot": "--pool cls --local-crops 1 --temperature 0.2 " + WARMING,
    "beit": "--mask-spread 0.3 --global-crops 1", "simmim": "--mask-spread 0.3", "mae": "",
    "byol": "--weak-teacher", "dbot": "--weak-teacher",
    "dino+rkd": "--no-head-batchnorm --teacher-temperature 0.04 0.04",
    "ibot+0.5*rkd": "--no-head-batchnorm --teacher-temperature 0.04 0.04 --patch-weight 1",
}
NORMED = {"ibot+dino": ""}  # BatchNorm in the heads, over unequal numbers of hidden patches
each_case = pytest.mark.parametrize("loss", CASES)


@pytest.fixture(autouse=True)
def small_networks(monkeypatch):
    monkeypatch.setitem(ARCHS, "vit_nano", NANO)
    monkeypatch.setitem(ARCHS, "vit_wider", WIDER)


def cloud(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def build(loss, *words):
    """A system in which every weight, of student and teacher, and every centre was moved."""
    system = System(train.parse([*SMALL, "--loss", loss, *words]))
    random = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for x in [*system.parameters(), *system.state.values()]:
            x += 0.2 * torch.randn(x.shape, generator=random)
    return system


def batch(system, rank=0, world=1):
    """This process's share of eight images: strong and weak views, masks as train.py draws them."""
    args, mine = system.args, slice(rank * 8 // world, (rank + 1) * 8 // world)
    sides = [16] * args.global_crops + [8] * args.local_crops
    strong, weak = ([cloud(8, 3, side, side, seed=seed + i)[mine] for i, side in enumerate(sides)]
                    for seed in (0, 50))
    run = SimpleNamespace(args=args, system=system, rank=rank, world=world,
                          device=torch.device("cpu"))
    return strong, weak, train.draw_masks(run, 0, 0, weak)


def gradients_of(student):
    return {name: p.grad for name, p in student.named_parameters() if p.requires_grad}


def compare(found, expected):
    """Every gradient to 1e-4 of its length, to 1e-6 of the longest where it is next to nothing."""
    longest = max(expected[name].norm() for name in found)
    for name, x in found.items():
        allowed = 1e-4 * torch.maximum(expected[name].norm(), longest / 100)
        assert (x - expected[name]).norm() < allowed, name


# ---------- plain: the Vision Transformer ----------

def linear(w, name, x):
    return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]


def layer_norm(w, name, x, eps=1e-6):
    return F.layer_norm(x, x.shape[-1:], w[f"{name}.weight"], w[f"{name}.bias"], eps)


def direction(x):
    return x / x.norm(dim=-1, keepdim=True)


def block(w, name, x):
    B, N, D = x.shape
    qkv = linear(w, f"{name}.attn.qkv", layer_norm(w, f"{name}.norm1", x))
    q, k, v = (y.view(B, N, 2, D // 2).transpose(1, 2) for y in qkv.chunk(3, -1))  # two heads
    attention = (q @ k.transpose(2, 3) / (D // 2) ** 0.5).softmax(-1)
    x = x + linear(w, f"{name}.attn.proj", (attention @ v).transpose(1, 2).reshape(B, N, D))
    y = F.gelu(linear(w, f"{name}.mlp.fc1", layer_norm(w, f"{name}.norm2", x)))
    return x + linear(w, f"{name}.mlp.fc2", y)


def take(x, places):
    return x.gather(1, places.unsqueeze(-1).expand(-1, -1, x.shape[-1]))


def vit(w, images, mask=None, kept=None):
    """Tokens before the last norm: mask tokens under `mask`, or only the patches of `kept`."""
    proj, pos = "backbone.patch_embed.proj", w["backbone.pos_embed"]
    x = F.conv2d(images, w[f"{proj}.weight"], w[f"{proj}.bias"], stride=4).flatten(2).mT
    cls, patches = w["backbone.cls_token"] + pos[:, :1], pos[:, 1:]
    if x.shape[1] == 4:  # a local view of 2 x 2 patches
        patches = F.interpolate(patches.mT.view(1, 16, 4, 4), (2, 2), mode="bicubic").flatten(2).mT
    if mask is not None:
        hidden = mask.unsqueeze(-1).float()
        x = x * (1 - hidden) + w["backbone.mask_token"] * hidden
    x = x + patches if kept is None else take(x + patches, kept)
    x = torch.cat([cls.expand(len(x), -1, -1), x], 1)
    return block(w, "backbone.blocks.1", block(w, "backbone.blocks.0", x))


def encode(w, *images_mask_kept):
    return layer_norm(w, "backbone.norm", vit(w, *images_mask_kept))


def shuffle(mask):
    """MAE's random order, the visible patches first: (those kept, the way back)."""
    order = (torch.rand(mask.shape) + mask).argsort(1)
    return order[:, :int((~mask[0]).sum())], order.argsort(1)


def student_tokens(s, d):
    """Of each view: the global ones under their masks, dropped or as tokens; local ones whole."""
    return [encode(s, view, None, kept) if kept is not None else encode(s, view, mask)
            for view, mask, kept in zip(d.views, d.masks, d.kept)]


def pooled(tokens, d):
    both = [(x[:, 0], x[:, 1:].mean(1)) for x in tokens]
    return [dict(cls=cls, mean=mean).get(d.args.pool, torch.cat([cls, mean], 1))
            for cls, mean in both]


def features(s, t, d):
    return pooled(student_tokens(s, d), d), pooled([encode(t, x) for x in d.whole], d)


# ---------- plain: a step of each paper, (student's weights, teacher's, data) -> loss, centres ----

def cross_views(loss, student, teacher):
    """Mean over all pairs of a student's and a teacher's view, but those of one and the same."""
    values = [loss(q, p) for i, p in enumerate(teacher) for j, q in enumerate(student) if i != j]
    return sum(values) / len(values)


def huber(e):
    return torch.where(e.abs() <= 1, e**2 / 2, e.abs() - 0.5)


def relations(s, t):
    """Distance + 2 · angle (Park et al., eq. 4-9) over lists of all pairs and triplets."""
    def cosine(x, i, j, k):
        return (direction(x[i] - x[j]) * direction(x[k] - x[j])).sum(1)

    s, t = s.double(), t.double()
    i, j = torch.tensor(list(permutations(range(len(s)), 2))).T
    a, b = ((x[i] - x[j]).norm(dim=1) for x in (s, t))
    triplet = torch.tensor(list(permutations(range(len(s)), 3))).T
    return (huber(a / a.mean() - b / b.mean()).mean()
            + 2 * huber(cosine(s, *triplet) - cosine(t, *triplet)).mean())


def plain_rkd(s, t, d):
    def head(w, name, views):
        return [linear(w, f"{name}.3", F.gelu(layer_norm(
            w, f"{name}.1", linear(w, f"{name}.0", x), 1e-5))) for x in views]

    student, teacher = features(s, t, d)
    if d.args.head:
        student = head(s, "predictors.rkd", head(s, "heads.rkd", student))
        teacher = head(t, "heads.rkd", teacher)
    loss = cross_views(relations, student, teacher) + d.args.pull_weight * cross_views(
        lambda p, q: ((direction(p - p.mean(0)) - direction(q - q.mean(0))) ** 2).sum(1).mean(),
        student, teacher)
    if d.args.patch_weight:  # among the patches of one crop, image by image
        each = []
        for tokens, view, kept in zip(student_tokens(s, d), d.whole, d.kept):
            target = encode(t, view)[:, 1:]
            target = target if kept is None else take(target, kept)
            each += [relations(p, q) for p, q in zip(tokens[:, 1:], target)]
        loss = loss + d.args.patch_weight * sum(each) / len(each)
    return loss, {}


def plain_cka(s, t, d):
    def loss(p, q):
        p, q = (x @ x.T for x in (p - p.mean(0), q - q.mean(0)))
        return 1 - (p * q).sum() / (p.norm() * q.norm())

    return cross_views(loss, *features(s, t, d)), {}


def plain_ressl(s, t, d):
    def loss(p, q):
        def others(x, temperature):
            return [torch.cat([row[:i], row[i + 1:]]).softmax(0) for i, row in enumerate(
                direction(x) @ direction(x).T / temperature)]

        pairs = list(zip(others(p, d.args.temperature or 0.1), others(q, d.temperature)))
        return sum((b * (b / a).log()).sum() for a, b in pairs) / len(pairs)

    return cross_views(loss, *features(s, t, d)), {}


def plain_feature(s, t, d):
    def loss(p, q):
        q = (q - q.mean(1, keepdim=True)) / (q.var(1, correction=0, keepdim=True) + 1e-5).sqrt()
        return huber(linear(s, "predictors.feature", p) - q).mean()

    return cross_views(loss, *features(s, t, d)), {}


def bn_mlp(w, name, x, layers, last):
    """Linear, batch normalisation, ReLU, .., linear; `last`: normalised once more, no scale."""
    for i in range(0, 3 * (layers - 1), 3):
        x = F.batch_norm(x @ w[f"{name}.{i}.weight"].T, None, None, w[f"{name}.{i + 1}.weight"],
                         w[f"{name}.{i + 1}.bias"], training=True).relu()
    x = x @ w[f"{name}.{3 * (layers - 1)}.weight"].T
    return F.batch_norm(x, None, None, training=True) if last else x


def plain_simclr(s, t, d):
    """Eq. 1 for each of the 2N views in turn."""
    z = torch.cat([bn_mlp(s, "heads.simclr", x, 2, True)
                   for x in pooled(student_tokens(s, d), d)])
    N, e = len(z) // 2, (direction(z) @ direction(z).T / (d.args.temperature or 0.1)).exp()
    losses = [-(e[i, (i + N) % (2 * N)] / sum(e[i, k] for k in range(2 * N) if k != i)).log()
              for i in range(2 * N)]
    return sum(losses) / (2 * N), {}


def plain_moco(s, t, d):
    """Algorithm 1: ctr(q1, k2) + ctr(q2, k1)."""
    temperature = d.args.temperature or 0.2

    def ctr(q, k):
        p = (direction(q) @ direction(k).T / temperature).softmax(1)
        return 2 * temperature * -p.diagonal().log().mean()

    student, teacher = features(s, t, d)
    q1, q2 = (bn_mlp(s, "predictors.moco", bn_mlp(s, "heads.moco", x, 3, True), 2, True)
              for x in student)
    k1, k2 = (bn_mlp(t, "heads.moco", x, 3, True) for x in teacher)
    return ctr(q1, k2) + ctr(q2, k1), {}


def plain_byol(s, t, d):
    student, teacher = features(s, t, d)
    ours = [bn_mlp(s, "heads.byol", x, 2, False) for x in student]
    p1, p2 = (direction(bn_mlp(s, "predictors.byol", x, 2, False)) for x in ours)
    z1, z2 = (direction(bn_mlp(t, "heads.byol", x, 2, False)) for x in teacher)
    return (((p1 - z2) ** 2).sum(1) + ((p2 - z1) ** 2).sum(1)).mean(), {}


def prototypes(w, name, x):
    """DINO's head; its weight-normed last layer has g = 1."""
    for i in (0, 2):
        x = F.gelu(linear(w, f"{name}.mlp.{i}", x))
    return direction(linear(w, f"{name}.mlp.4", x)) @ direction(w[f"{name}.prototypes"]).T


def soft(student, teacher, center, d):
    p = ((teacher - center) / d.temperature).softmax(-1)
    return -(p * (student / (d.args.temperature or 0.1)).log_softmax(-1)).sum(-1)


def plain_dino(s, t, d, name="dino"):
    student, teacher = ([prototypes(w, f"heads.{name}", x) for x in views]
                        for w, views in zip((s, t), features(s, t, d)))
    center = d.centers[name]
    loss = cross_views(lambda q, p: soft(q, p, center, d).mean(), student, teacher)
    return loss, {name: 0.9 * center + 0.1 * torch.cat(teacher).mean(0)}


def plain_ibot(s, t, d):
    loss, centers = plain_dino(s, t, d, "ibot")
    center, theirs = d.centers["ibot_patch"], []
    for tokens, view, mask in zip(student_tokens(s, d), d.whole, d.masks):
        student = prototypes(s, "heads.ibot", tokens[:, 1:])
        theirs.append(prototypes(t, "heads.ibot", encode(t, view)[:, 1:]))  # (B, N, K)
        each = (soft(student, theirs[-1], center, d) * mask).sum(1) / mask.sum(1).clamp(min=1)
        loss = loss + each.mean() / 2
    return loss, centers | dict(ibot_patch=0.9 * center + 0.1 * torch.cat(theirs).mean((0, 1)))


def plain_beit(s, t, d):
    p = []
    for view, mask in zip(d.views, d.masks):
        each = linear(s, "predictors.beit", encode(s, view, mask)[:, 1:]).softmax(-1)  # (B, N, K)
        p.append(each.gather(2, d.tokenizer(view).unsqueeze(-1)).squeeze(-1)[mask])
    return -torch.cat(p).log().mean(), {}


def plain_simmim(s, t, d):
    """In the space of images: 1 x 1 convolution and pixel shuffle, L1 over the hidden pixels."""
    total = count = 0
    for view, mask in zip(d.views, d.masks):
        z = encode(s, view, mask)[:, 1:].mT.unflatten(2, (4, 4))
        image = F.pixel_shuffle(F.conv2d(z, s["predictors.simmim.weight"][:, :, None, None],
                                         s["predictors.simmim.bias"]), 4)
        hidden = mask.view(-1, 1, 4, 4).repeat_interleave(4, 2).repeat_interleave(4, 3)
        total, count = total + ((image - view).abs() * hidden).sum(), count + hidden.sum()
    return total / count / 3, {}


def sines(side, dim):
    """MAE's fixed positions, place by place: sin and cos of the column, then of the row."""
    frequency = 10000 ** -(torch.arange(dim // 4) * 4 / dim)
    return torch.stack([torch.zeros(dim)] + [
        torch.cat([f(x * frequency) for x in (place % side, place // side)
                   for f in (torch.sin, torch.cos)]) for place in range(side * side)])


def decode(s, name, view, mask):
    """MAE's encoder and light decoder: mask tokens appended, all put back by ids_restore."""
    kept, restore = shuffle(mask)
    x = linear(s, f"{name}.embed", encode(s, view, None, kept))
    hidden = s[f"{name}.mask_token"].expand(len(x), 17 - x.shape[1], -1)
    x = torch.cat([x[:, :1], take(torch.cat([x[:, 1:], hidden], 1), restore)], 1) + sines(4, 64)
    return linear(s, f"{name}.pred", layer_norm(s, f"{name}.norm", block(s, f"{name}.blocks.0", x)))


def normalized(x):
    return (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True) + 1e-6) ** 0.5


def plain_mae(s, t, d):
    total = count = 0
    for view, mask in zip(d.views, d.masks):
        target = normalized(F.unfold(view, 4, stride=4).mT)  # (B, N, 3·4·4)
        error = ((decode(s, "predictors.mae", view, mask)[:, 1:] - target) ** 2).mean(-1)
        total, count = total + (error * mask).sum(), count + mask.sum()
    return total / count, {}


def plain_dbot(s, t, d):
    total = count = 0
    for view, whole, mask in zip(d.views, d.whole, d.masks):
        error = (decode(s, "predictors.dbot", view, mask) - normalized(vit(t, whole))).abs()
        error = torch.where(error < 2, error**2 / 4, error - 1).mean(-1)  # smooth L1, beta 2
        hidden = torch.cat([torch.ones(len(mask), 1), mask], 1)  # CLS counts
        total, count = total + (error * hidden).sum(), count + hidden.sum()
    return total / count, {}


def plain(system, strong, weak, mask):
    """Loss, gradients by name and centres of a step, by the plain versions above."""
    args, G = system.args, system.args.global_crops
    s = {name: x.clone().requires_grad_() for name, x in system.student.state_dict().items()}
    t = system.teacher.state_dict() if system.teacher else None
    masks = ([*mask.chunk(G)] if mask is not None else [None] * G) + [None] * args.local_crops
    d = SimpleNamespace(
        args=args, views=strong, whole=(weak if args.weak_teacher else strong)[:G], masks=masks,
        kept=[shuffle(x)[0] if x is not None and args.hide == "drop" else None for x in masks],
        temperature=0.052 if "0.07" in CASES[args.loss] else 0.04, tokenizer=system.tokenizer,
        centers={name: x.clone() for name, x in system.state.items()})
    loss, centers = 0, {}
    for piece in args.loss.split("+"):
        weight, name = piece.split("*") if "*" in piece else (1, piece)
        value, moved = globals()[f"plain_{name}"](s, t, d)
        loss, centers = loss + float(weight) * value, centers | moved
    gradients = torch.autograd.grad(loss, [*s.values()], allow_unused=True)
    return loss.detach().float(), dict(zip(s, gradients)), centers


@each_case
def test_loss_gradients_and_centres_are_those_of_the_paper_written_out(loss):
    system = build(loss, *CASES[loss].split())
    data = batch(system)
    expected, gradients, centers = plain(system, *data)
    value, _, _ = system(*data, PROGRESS)
    value.backward()
    assert_close(value.detach(), expected, rtol=1e-5, atol=0)
    compare(gradients_of(system.student), gradients)
    assert system.teacher is None or all(p.grad is None for p in system.teacher.parameters())
    assert_close(system.state, centers)


def test_the_masks_of_ibot_differ_in_count_and_one_hides_nothing():
    counts = batch(build("ibot"))[2].sum(1).tolist()
    assert 0 in counts and len({*counts}) > 3


# ---------- two processes ----------

def step(loss, rank=0, world=1):
    """Of this process's share of the images: loss, gradients, centres and points."""
    system = build(loss, *(CASES | NORMED)[loss].split())
    strong, weak, mask = batch(system, rank, world)
    network = nn.parallel.DistributedDataParallel(system, broadcast_buffers=False) \
        if world > 1 else system
    value, _, points = network(strong, weak, mask, PROGRESS)
    value.backward()
    value = value.detach().clone()
    if world > 1:
        dist.all_reduce(value)
    return dict(loss=value / world, gradients=gradients_of(system.student), centers=system.state,
                points=points, hidden=mask.sum() if mask is not None else 0)


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    """What two processes found, loss by loss."""
    path = tmp_path_factory.mktemp("two") / "found.pt"
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
         __file__, path], env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True,
        text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return torch.load(path, weights_only=True)


@pytest.mark.parametrize("loss", CASES | NORMED)
def test_two_processes_give_loss_gradients_centres_and_points_of_one(loss, two_processes):
    found, expected = two_processes[loss], step(loss)
    assert_close(found["loss"], expected["loss"], rtol=1e-5, atol=0)
    compare(found["gradients"], expected["gradients"])
    assert_close(found["centers"], expected["centers"])
    assert_close(found["points"], expected["points"])


def test_every_term_was_compared_those_of_hidden_patches_with_unequal_counts(two_processes):
    assert set(OBJECTIVES) <= set(two_processes)
    for loss in ("ibot", "beit", "simmim"):
        assert 2 * two_processes[loss]["hidden"] != step(loss)["hidden"]


# ---------- batch normalisation ----------

@pytest.mark.parametrize("affine", [True, False])
def test_batch_norm_is_that_of_torch_in_training(affine):
    ours, theirs = objectives.BatchNorm(5, affine), nn.BatchNorm1d(5, affine=affine)
    x, y = (3 * cloud(7, 5) + 2).requires_grad_(), (3 * cloud(7, 5) + 2).requires_grad_()
    if affine:
        for network in (ours, theirs):
            network.load_state_dict(dict(weight=cloud(5, seed=1), bias=cloud(5, seed=2)), False)
    for network, points in ((ours, x), (theirs, y)):
        (network(points) * cloud(7, 5, seed=3)).sum().backward()
    assert_close(ours(x), theirs(y))
    assert_close([x.grad, *(p.grad for p in ours.parameters())],
                 [y.grad, *(p.grad for p in theirs.parameters())])


def test_batch_norm_of_patches_counts_every_row_alike():
    x = cloud(4, 3, 5) * 2 + 1
    expected = nn.BatchNorm1d(5)(x.flatten(0, 1)).view_as(x)
    assert_close(objectives.BatchNorm(5)(x), expected)
    assert objectives.BatchNorm(5)(x[:0]).shape == (0, 3, 5)


def test_batch_norm_takes_bfloat16_and_answers_in_float32():
    x = (cloud(7, 5) + 100).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        assert_close(objectives.BatchNorm(5)(x), objectives.BatchNorm(5)(x.float()))


# ---------- MoCo's order ----------

def test_moving_the_teacher_after_a_step_is_moving_it_before_the_next_keys():
    ours = System(train.parse([*SMALL, "--loss", "moco"]))
    published, data, losses = deepcopy(ours), batch(ours), []
    for system in (ours, published):
        optimizer = torch.optim.SGD(system.student.parameters(), lr=0.1)
        for _ in range(3):
            if system is published:  # builder.py: update the momentum encoder, then the keys
                ema_update(system.teacher, system.student, 0.7)
            loss, _, _ = system(*data)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if system is ours:
                ema_update(system.teacher, system.student, 0.7)
            losses.append(loss.item())
    assert losses[:3] == pytest.approx(losses[3:], rel=1e-6) and losses[0] != losses[1]


# ---------- the words of --loss ----------

@pytest.mark.parametrize("text, terms", [
    ("dino", dict(dino=1)), ("dino+0.5*rkd", dict(dino=1, rkd=0.5)),
    (" 2 * mae + 1e-2*rkd", dict(mae=2, rkd=0.01)), ("rkd+cka+ressl", dict(rkd=1, cka=1, ressl=1)),
])
def test_a_sum_is_its_terms_and_weights(text, terms):
    assert parse_loss(text) == terms


@pytest.mark.parametrize("text, value", [
    ("", "''"), ("dino+", "''"), ("+dino", "''"), ("dinov2", "'dinov2'"), ("rkd-dino", "rkd-dino"),
    ("0*dino", "'0'"), ("-1*dino", "'-1'"), ("nan*dino", "'nan'"), ("inf*dino", "'inf'"),
    ("half*dino", "'half'"), ("2*", "''"), ("dino+rkd+dino", "dino"), ("rkd+2*rkd", "rkd"),
])
def test_a_sum_that_is_none_is_refused_by_what_is_wrong_with_it(text, value):
    with pytest.raises(ValueError, match=value):
        parse_loss(text)


@pytest.mark.parametrize("loss, own", [
    ("rkd", {}), ("rkd+dino", {}), ("simclr+rkd", dict(mask_ratio=0.0)),
    ("dino+rkd", defaults("dino")),
    ("rkd+ibot", defaults("ibot")), ("ibot+rkd", defaults("ibot")),
    ("moco+2*mae", dict(hide="drop", mask="random", mask_ratio=0.75)),
    ("mae+dbot", defaults("dbot")),
    ("beit+simmim", dict(hide="token", mask=None, mask_ratio=None)),
])
def test_defaults_are_those_of_the_terms_that_need_a_mask_else_of_the_first(loss, own):
    assert defaults(loss) == own


def test_two_terms_of_different_masks_work_once_the_user_chose():
    args = train.parse("--loss beit+simmim --mask block --mask-ratio 0.5".split())
    assert (args.mask, args.mask_ratio, args.hide, args.teacher) == ("block", 0.5, "token", "none")


@pytest.mark.parametrize("words, value", [
    ("rkd+mea", "'mea'"), ("rkd+0*mae", "'0'"), ("mae+mae", "mae"), ("mae+simmim", "mae"),
    ("ibot+dbot", "ibot"), ("beit+simmim", "--mask"), ("beit+simmim --mask block", "--mask-ratio"),
    ("dbot --stages 1 --teacher ema", "dbot"), ("rkd --stages 2", "--stages"),
    ("mae --stages 2", "--stages"), ("mae --mask-ratio 0", "--mask-ratio 0"),
    ("ibot --mask-ratio 0", "--mask-ratio 0"), ("beit --mask-ratio 0", "--mask-ratio 0"),
    ("simmim --mask-ratio 0", "--mask-ratio 0"), ("dbot --mask-ratio 0", "--mask-ratio 0"),
    ("ibot --hide drop", "--hide drop"), ("mae --hide token", "--hide token"),
    ("dino --global-crops 1", "--global-crops 1"), ("rkd --global-crops 1", "--global-crops 1"),
    ("dino --teacher-checkpoint x.pt", "--teacher-checkpoint"),
    ("rkd+moco --teacher-checkpoint x.pt", "moco"), ("mae --teacher-checkpoint x.pt", "mae"),
    ("rkd --teacher-checkpoint x.pt --stages 2", "--stages 2"),
    ("rkd --teacher-checkpoint x.pt --teacher ema", "--teacher-checkpoint"),
    ("rkd --teacher-arch vit_tiny", "vit_tiny"), ("mae --mask attention", "--mask attention"),
    ("rkd --distance-weight 0 --angle-weight 0", "--angle-weight 0"),
    ("rkd --mask-spread 0.1", "--mask-spread"), ("beit --mask-spread 0.5", "--mask-spread 0.5"),
    ("beit --mask-unit 2", "--mask-unit 2"),
])
def test_what_cannot_be_asked_of_a_student_ends_with_one_line_that_names_it(words, value, capsys):
    with pytest.raises(SystemExit) as stop:
        train.parse(["--loss", *words.split()])
    [line] = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2 and value in line


# ---------- teachers and stages ----------

@pytest.mark.parametrize("words, heads, predictors, teacher", [
    ("rkd", [], [], "ema"), ("rkd --head 8 --predictor", ["rkd"], ["rkd"], "ema"),
    ("rkd --predictor --teacher frozen", [], ["rkd"], "frozen"), ("cka", [], [], "ema"),
    ("feature", [], ["feature"], "ema"), ("simclr", ["simclr"], [], "none"),
    ("moco", ["moco"], ["moco"], "ema"), ("byol", ["byol"], ["byol"], "ema"),
    ("dino+ibot", ["dino", "ibot"], [], "ema"), ("beit", [], ["beit"], "none"),
    ("mae+simclr", ["simclr"], ["mae"], "none"), ("simmim", [], ["simmim"], "none"),
    ("dbot", [], ["dbot"], "frozen"),
])
def test_heads_stand_on_both_networks_and_predictors_on_the_student(
        words, heads, predictors, teacher):
    system = build(*words.split())
    assert (sorted(system.student.heads), sorted(system.student.predictors)) == (heads, predictors)
    assert system.args.teacher == teacher and (system.teacher is None) == (teacher == "none")
    assert system.kept is (system.teacher if teacher == "ema" else system.student)
    assert {name for name, p in system.student.named_parameters() if not p.requires_grad} <= \
        {"backbone.mask_token"}
    if system.teacher:
        assert (sorted(system.teacher.heads), [*system.teacher.predictors]) == (heads, [])
        assert system.student.training and not system.teacher.training
        assert not any(p.requires_grad for p in system.teacher.parameters())


def test_the_head_of_rkd_with_batchnorm_is_that_of_simclr():
    rkd, simclr = (build(*words.split()).student.heads[words.split()[0]] for words in (
        "rkd --head 12 --head-batchnorm", "simclr --projection 12"))
    assert str(rkd) == str(simclr)


@pytest.mark.parametrize("words, kept", [("rkd", "teacher"), ("simclr", "student"),
                                         ("rkd --teacher frozen", "student")])
def test_the_points_are_the_first_view_of_the_student_and_the_second_of_the_kept(words, kept):
    system = build(*words.split(), "--pool", "cls", "--mask-ratio", "0")
    strong, weak, _ = batch(system)
    _, _, points = system(strong, weak, None)
    networks = system.student, getattr(system, kept)
    assert_close(points, [network.backbone(view)[:, 0].detach()
                          for network, view in zip(networks, strong)])


@pytest.fixture
def given(tmp_path):
    """A teacher of another width in a file, and the words that ask for it."""
    torch.manual_seed(1)
    network, path = WIDER(image_size=16, patch_size=4), tmp_path / "given.pt"
    args = dict(arch="vit_wider", patch_size=4, image_size=16)
    weights = {f"backbone.{name}": x for name, x in network.state_dict().items()}
    torch.save(dict(args=args, teacher=weights), path)
    return weights, ("--teacher-checkpoint", str(path))


@pytest.mark.parametrize("loss", ["rkd", "cka", "ressl", "feature", "dbot --stages 1", "mae+rkd"])
def test_a_given_teacher_of_another_width_teaches_and_stays_what_it_is(loss, given):
    system = System(train.parse([*SMALL, *given[1], "--loss", *loss.split()]))
    loss, _, points = system(*batch(system))
    loss.backward()
    moving = [p for p in system.parameters() if p.requires_grad]
    assert all(p.grad is not None for p in moving) and sum(p.grad.abs().sum() for p in moving) > 0
    torch.optim.SGD(moving, lr=0.1).step()
    assert_close(system.teacher.state_dict(), given[0], rtol=0, atol=0)
    assert system.kept is system.student and points[1].shape == (8, 16)


@pytest.mark.parametrize("words, value", [
    ("--patch-size 8", "--patch-size 4"), ("--pull-weight 0.05", "--pull-weight 0.05"),
    ("--head 8", "--head 8")])
def test_a_given_teacher_that_does_not_fit_is_refused(words, value, given):
    with pytest.raises(ValueError, match=value):
        System(train.parse([*SMALL, "--loss", "rkd", *given[1], *words.split()]))


def test_the_next_stage_has_the_old_student_as_teacher_and_a_fresh_student():
    system = build("rkd", *"--teacher frozen --stages 2 --head 8 --predictor".split())
    old = {name: x.clone() for name, x in system.student.state_dict().items()
           if not name.startswith("predictors.")}
    system.next_stage(1)
    assert_close(system.teacher.state_dict(), old, rtol=0, atol=0)
    first, fresh = (objectives.build_student(system.args, stage=i).state_dict() for i in (0, 1))
    assert_close(system.student.state_dict(), fresh, rtol=0, atol=0)
    for name in ("backbone.blocks.0.attn.qkv.weight", "heads.rkd.0.weight"):
        assert not fresh[name].equal(first[name]) and not fresh[name].equal(old[name])


@pytest.mark.parametrize("words", ["ibot+dino", "mae", "dbot", "rkd --head 8 --teacher frozen"])
def test_a_saved_system_comes_back_bit_for_bit(words, tmp_path):
    system, other = build(*words.split()), System(build(*words.split()).args)
    torch.save(system.save(), tmp_path / "state.pt")
    other.load(torch.load(tmp_path / "state.pt", weights_only=True))
    assert_close(other.state_dict(), system.state_dict(), rtol=0, atol=0)
    assert_close(other.state, system.state, rtol=0, atol=0)
    assert ("teacher" in system.save()) == (system.args.teacher == "ema")
    with pytest.raises(ValueError, match="dino"):
        other.load(system.save() | dict(objective=dict(dino2=torch.zeros(24))))


# ---------- details ----------

def numbers(logs):
    return {name: torch.as_tensor(x() if callable(x) else x).item() for name, x in logs.items()}


@pytest.mark.parametrize("loss, names", [("rkd", ["distance", "angle"]), ("simclr", ["simclr"]),
                                         ("moco", ["moco"]), ("dino", ["dino"])])
def test_the_logged_plateau_is_the_loss_of_a_student_whose_points_are_all_one(loss, names):
    system = build(loss)
    with torch.no_grad():
        for p in system.student.parameters():
            p.zero_()
    strong, weak, mask = batch(system)
    logs = numbers(system([strong[0], strong[0]], weak, mask)[1])
    for name in names:
        assert logs[name] == pytest.approx(logs[f"collapsed_{name}"], rel=1e-5)


@pytest.mark.parametrize("loss", ["ibot", "beit", "simmim"])
def test_a_process_whose_share_hides_nothing_still_has_every_gradient(loss):
    system = build(loss)
    strong, weak, mask = batch(system)
    value, logs, _ = system(strong, weak, torch.zeros_like(mask))
    value.backward()
    assert value.item() == (numbers(logs)["ibot_image"] if loss == "ibot" else 0)
    assert all(x.isfinite().all() for x in gradients_of(system.student).values())
    assert all(isfinite(x) for x in numbers(logs).values())


def words_of(images, *words):
    return objectives.RandomWords(train.parse([*SMALL, *words]))(images)


def test_words_are_a_function_of_the_seed_below_k_and_many():
    images = cloud(64, 3, 16, 16)
    words = words_of(images)
    assert words.equal(words_of(images)) and not words.equal(words_of(images, "--seed", "1"))
    assert words.shape == (64, 16) and 0 <= words.min() and words.max() < 24
    assert len(words.unique()) > 20


def test_words_do_not_see_brightness_and_contrast_of_a_patch():
    images, patch = cloud(64, 3, 16, 16), torch.ones(1, 1, 4, 4)
    contrast, brightness = (torch.kron(cloud(64, 1, 4, 4, seed=i), patch) for i in (1, 2))
    words = words_of(contrast.exp() * images + brightness)
    assert (words == words_of(images)).float().mean() > 0.999
    assert (words_of(-images) != words_of(images)).all()


def test_a_tokenizer_of_the_user_names_the_patches(monkeypatch):
    def make(args):
        return lambda images: torch.full((len(images), 16), 3)

    monkeypatch.setitem(objectives.TOKENIZERS, "mine", make)
    system = build("beit", "--tokenizer", "mine")
    with torch.no_grad():
        system.student.predictors["beit"].weight.zero_()
        system.student.predictors["beit"].bias.copy_(torch.arange(24))
    loss, _, _ = system(*batch(system))  # log of the sum of exp(k), k below 24, over exp(3)
    assert_close(loss.detach(), torch.arange(24.).logsumexp(0) - 3)


@pytest.mark.parametrize("loss", ["dino", "rkd", "simclr", "dino+rkd", "ibot", "rkd+mae"])
def test_patches_that_no_term_reads_are_left_out_of_the_last_block_and_change_nothing(
        loss, monkeypatch):
    def value():
        system = build(loss, "--pool", "cls", "--local-crops", "1")
        return system(*batch(system))[0]

    read, real = [], VisionTransformer.forward

    def forward(self, *args, cls_only=False, **options):
        read.append(cls_only)
        return real(self, *args, cls_only=cls_only and spared, **options)

    monkeypatch.setattr(VisionTransformer, "forward", forward)
    spared = True
    found = value()
    assert False not in read or loss in ("ibot", "rkd+mae") and read.count(True) == 1  # local view
    spared = False
    assert_close(found, value(), rtol=1e-5, atol=1e-6)


def test_resting_prototypes_lose_their_gradient_and_nothing_else_does():
    system = build("dino+ibot+moco")
    system(*batch(system))[0].backward()
    system.student.rest_prototypes()
    resting = {name for name, p in system.student.named_parameters()
               if p.requires_grad and p.grad is None}
    assert resting == {"heads.dino.prototypes", "heads.ibot.prototypes"}


def main():
    """One of two processes: a step of every case."""
    ARCHS["vit_nano"] = NANO
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    dist.init_process_group("gloo", f"file://{sys.argv[1]}.store", rank=rank, world_size=world)
    found = {loss: step(loss, rank, world) for loss in CASES | NORMED}
    if rank == 0:
        torch.save(found, sys.argv[1])
    dist.destroy_process_group()


if __name__ == "__main__":
    leave_by(main)
