"""Objectives: every term against its paper written out plainly, two processes against one, sums.

The plain versions read the weights by their names. They take the losses between points as
test_losses.py writes them out, and share the Vision Transformer and the decoder with the source:
test_model.py specifies these. B images, N patches, D width, K prototypes.
"""
from copy import deepcopy
from datetime import timedelta
from functools import partial
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.testing import assert_close

import objectives
import train
from conftest import cloud
from model import ARCHS, Decoder
from objectives import OBJECTIVES, System, defaults, parse_loss
from test_losses import (angle_definition, byol_definition, cka_definition, distance_definition,
                         info_nce_definition, nt_xent_definition, pull_definition,
                         ressl_definition)

torch.set_num_threads(1)
SMALL = ("--arch vit_micro --image-size 16 --patch-size 4 --batch-size 8 --prototypes 24 "
         "--projection 12 --head-hidden 20 --decoder 64 1").split()
WARMING = "--teacher-temperature 0.04 0.07 --teacher-warmup 0.3 --no-head-batchnorm"
PROGRESS = 0.12  # of the run, 0.4 of this warm-up: the teacher's temperature is 0.052
CASES = {  # --loss: more options
    "rkd": "--head 12 --pull-weight 0.3 --local-crops 1 --angle-vertices 5",
    "ressl": "--pool cls --mask-ratio 0 --temperature 0.2 " + WARMING,
    "cka": "--hide token", "feature": "", "simclr": "--pool cls+mean", "moco": "--pool cls",
    "dino": "--pool cls --local-crops 2 --temperature 0.2 " + WARMING,
    "ibot": "--pool cls --local-crops 1", "beit": "--global-crops 1",
    "simmim": "", "mae": "", "byol": "--weak-teacher", "dbot": "--weak-teacher",
    "dino+rkd": "--distance-power 2 --angle-weight 0 --head 12 --head-batchnorm",
    "ibot+0.5*rkd": "--distance-weight 0 --pull-weight 0 --no-head-batchnorm",
}
each_case = pytest.mark.parametrize("loss", dict.fromkeys([*OBJECTIVES, *CASES]))  # all terms
direction = partial(F.normalize, dim=-1)


def brightness(images):
    """Another tokenizer: the word of a patch is its brightness."""
    return (20 * F.avg_pool2d(images.mean(1), 4)).long().flatten(1) % 24


def args_of(loss, words=""):
    return train.parse([*SMALL, "--loss", loss, *words.split()])


def build(loss, words=None):
    """A system in which every weight, of student and teacher, and every centre was moved."""
    system = System(args_of(loss, CASES[loss] if words is None else words))
    if loss == "beit":
        system.tokenizer.forward = brightness
    random = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for x in [*system.parameters(), *system.state.values()]:
            x += 0.1 * torch.randn(x.shape, generator=random)
    return system


def batch(args, rank=0, world=1):
    """This process's share of eight images: strong views, weak views, masks."""
    mine = slice(rank * 8 // world, (rank + 1) * 8 // world)
    sides = [16] * args.global_crops + [8] * args.local_crops
    strong, weak = ([cloud(8, 3, side, side, seed=seed + i)[mine] for i, side in enumerate(sides)]
                    for seed in (0, 50))
    count = 12 if args.hide == "drop" else torch.arange(8).view(8, 1)  # hidden, of each image
    mask = cloud(args.global_crops, 8, 16).argsort(-1) < count
    return strong, weak, mask[:, mine].flatten(0, 1) if args.mask_ratio else None


def step(loss, rank=0, world=1):
    """Loss, gradients, centres and points of one step on this process's share of the images."""
    system = build(loss)
    assert (system.teacher is None) == (loss in ("simclr", "beit", "mae", "simmim"))
    network = nn.parallel.DistributedDataParallel(system, broadcast_buffers=False) \
        if world > 1 else system
    value, logs, points = network(*batch(system.args, rank, world), PROGRESS)
    value.backward()
    assert_close(value, sum(weight * logs[name] for name, weight in parse_loss(loss).items()))
    assert not system.teacher or all(p.grad is None for p in system.teacher.parameters())
    gradients = {name: p.grad for name, p in system.student.named_parameters() if p.requires_grad}
    return objectives.gather(value.detach().view(1)).mean(), gradients, system.state, points


def agree(found, expected):
    """Gradients may differ by 1e-4 of their norm, or by 1e-6 of the largest gradient's norm."""
    loss, gradients, centers, points = found
    assert_close(loss, expected[0], rtol=1e-5, atol=0)
    longest = max(expected[1][name].norm() for name in gradients)
    for name, x in gradients.items():
        allowed = 1e-4 * torch.maximum(expected[1][name].norm(), longest / 100)
        assert (x - expected[1][name]).norm() < allowed, name
    assert_close(centers, expected[2])
    assert_close(points, expected[3])


# ---------- each paper written out: (weights of student and teacher, data) -> loss ----------

def call(network, w, name, *inputs):
    """The network with the weights that start with this name."""
    own = {key[len(name) + 1:]: x for key, x in w.items() if key.startswith(f"{name}.")}
    return torch.func.functional_call(network, own, inputs)


def encode(w, images, mask=None, drop=False, norm=True):
    vit = ARCHS["vit_micro"](image_size=16, patch_size=4)
    return call(vit, w, "backbone", images, mask, drop, norm)


def linear(w, name, x):
    return F.linear(x, w[f"{name}.weight"], w.get(f"{name}.bias"))


def batch_norm(w, name, x):
    weights = w.get(f"{name}.weight"), w.get(f"{name}.bias")
    return F.batch_norm(x.flatten(0, -2), None, None, *weights, training=True).view_as(x)


def mlp(w, name, x, layers=2, norm=batch_norm, activation=F.relu, last=False):
    """Linear, norm, activation, .., linear; `last`: normalised once more, without scale."""
    width = 3 if norm else 2
    for i in range(0, width * (layers - 1), width):
        x = linear(w, f"{name}.{i}", x)
        x = activation(norm(w, f"{name}.{i + 1}", x) if norm else x)
    x = linear(w, f"{name}.{width * (layers - 1)}", x)
    return batch_norm({}, "", x) if last else x


def normalized(x):
    return (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True) + 1e-6) ** 0.5


def cross_views(loss, student, teacher):
    """Mean over all pairs of a student's view and another view of the teacher, never the same."""
    values = [loss(q, p) for i, p in enumerate(teacher) for j, q in enumerate(student) if i != j]
    return sum(values) / len(values)


def plain_rkd(s, t, d):
    student, teacher = d.student, d.teacher
    if d.args.head:
        kind = dict(last=True) if d.args.head_batchnorm else dict(
            norm=partial(call, nn.LayerNorm(20)), activation=F.gelu)
        student, teacher = ([mlp(w, "heads.rkd", x, **kind) for x in views]
                            for w, views in ((s, student), (t, teacher)))

    def relations(s, t):
        s, t = s.double(), t.double()
        return (d.args.distance_weight * distance_definition(s, t, d.args.distance_power)
                + d.args.angle_weight * angle_definition(s, t, d.args.angle_vertices))

    return (cross_views(relations, student, teacher)
            + d.args.pull_weight * cross_views(pull_definition, student, teacher))


def plain_cka(s, t, d):
    return cross_views(cka_definition, [x.double() for x in d.student],
                       [x.double() for x in d.teacher])


def plain_ressl(s, t, d):
    loss = partial(ressl_definition, student_temperature=0.2, teacher_temperature=d.temperature)
    return cross_views(loss, d.student, d.teacher)


def plain_feature(s, t, d):
    student = [linear(s, "predictors.feature", x) for x in d.student]
    return cross_views(F.huber_loss, student, [F.layer_norm(x, (64,)) for x in d.teacher])


def plain_simclr(s, t, d):
    return nt_xent_definition(*(mlp(s, "heads.simclr", x, last=True) for x in d.student), 0.1)


def plain_moco(s, t, d):
    """Algorithm 1: ctr(q1, k2) + ctr(q2, k1), at temperature 0.2."""
    q1, q2 = (mlp(s, "predictors.moco", mlp(s, "heads.moco", x, 3, last=True), last=True)
              for x in d.student)
    k1, k2 = (mlp(t, "heads.moco", x, 3, last=True) for x in d.teacher)
    return 2 * 0.2 * (info_nce_definition(q1, k2) + info_nce_definition(q2, k1))


def plain_byol(s, t, d):
    p1, p2 = (mlp(s, "predictors.byol", mlp(s, "heads.byol", x)) for x in d.student)
    z1, z2 = (mlp(t, "heads.byol", x) for x in d.teacher)
    return byol_definition(p1, z2) + byol_definition(p2, z1)


def prototypes(w, name, x, d):
    """DINO's head; its weight-normed last layer has g = 1."""
    z = mlp(w, f"{name}.mlp", x, 3, batch_norm if d.args.head_batchnorm else None, F.gelu)
    return direction(z) @ direction(w[f"{name}.prototypes"]).T


def soft(student, teacher, center, d):
    p = ((teacher - center) / d.temperature).softmax(-1)
    return -(p * (student / (d.args.temperature or 0.1)).log_softmax(-1)).sum(-1)


def plain_dino(s, t, d, name="dino"):
    student, teacher = (  # BatchNorm over all views of a network together
        prototypes(w, f"heads.{name}", torch.cat(views), d).chunk(len(views))
        for w, views in ((s, d.student), (t, d.teacher)))
    d.moved[name] = 0.9 * d.centers[name] + 0.1 * torch.cat(teacher).mean(0)
    return cross_views(lambda q, p: soft(q, p, d.centers[name], d).mean(), student, teacher)


def plain_ibot(s, t, d):
    center, each = d.centers["ibot_patch"], torch.zeros(d.mask.shape)
    ours, theirs = (prototypes(w, "heads.ibot", x, d)
                    for w, x in ((s, d.tokens[d.mask]), (t, d.theirs)))
    each[d.mask] = soft(ours, theirs[d.mask], center, d)
    d.moved["ibot_patch"] = 0.9 * center + 0.1 * theirs.mean((0, 1))
    return plain_dino(s, t, d, "ibot") + (each.sum(1) / d.mask.sum(1).clamp(min=1)).mean()


def plain_beit(s, t, d):
    logits = linear(s, "predictors.beit", d.tokens[d.mask])
    return F.cross_entropy(logits, brightness(d.images)[d.mask])


def plain_simmim(s, t, d):
    return (linear(s, "predictors.simmim", d.tokens[d.mask]) - d.pixels[d.mask]).abs().mean()


def decode(s, name, d, out):
    """MAE's light decoder from the visible patches alone: (2·B, 1 + N, out)."""
    tokens = encode(s, d.images, d.mask, True)
    return call(Decoder((4, 4), 64, out, 64, 1), s, f"predictors.{name}", tokens, d.mask)


def plain_mae(s, t, d):
    return ((decode(s, "mae", d, 48)[:, 1:] - normalized(d.pixels))[d.mask] ** 2).mean()


def plain_dbot(s, t, d):
    """Smooth L1 with beta 2 to the teacher's tokens before its last norm, CLS among them."""
    target, places = normalized(encode(t, d.whole, norm=False)), F.pad(d.mask, (1, 0), value=True)
    return F.smooth_l1_loss(decode(s, "dbot", d, 64)[places], target[places], beta=2.0)


def pooled(tokens, args):
    parts = dict(cls=tokens[:, 0], mean=tokens[:, 1:].mean(1))
    return torch.cat([parts[name] for name in args.pool.split("+")], 1)


def plain(loss):
    """Loss, gradients by name, centres and points of a step, by the plain versions above."""
    system, total = build(loss), 0
    (strong, weak, mask), args, G = batch(system.args), system.args, system.args.global_crops
    s = {name: x.clone().requires_grad_() for name, x in system.student.state_dict().items()}
    t = system.teacher.state_dict() if system.teacher else s
    d = SimpleNamespace(
        args=args, mask=mask, centers=system.state, moved={}, images=torch.cat(strong[:G]),
        whole=torch.cat((weak if args.weak_teacher else strong)[:G]),
        temperature=0.052 if WARMING in CASES[loss] else args.teacher_temperature[0])
    ours, theirs = encode(s, d.images, mask, args.hide == "drop"), encode(t, d.whole).detach()
    d.tokens, d.theirs, d.pixels = ours[:, 1:], theirs[:, 1:], F.unfold(d.images, 4, stride=4).mT
    d.student = [pooled(x, args) for x in [*ours.chunk(G), *(encode(s, x) for x in strong[G:])]]
    d.teacher = [pooled(x, args) for x in theirs.chunk(G)]
    for name, weight in parse_loss(loss).items():
        total = total + weight * globals()[f"plain_{name}"](s, t, d)
    gradients = torch.autograd.grad(total, [*s.values()], allow_unused=True)
    kept = d.teacher if args.teacher == "ema" else d.student
    points = (d.student[0].detach() if G == 2 else None), kept[G - 1].detach()
    return total.detach().float(), dict(zip(s, gradients)), d.moved, points


@each_case
def test_loss_gradients_centres_and_points_are_those_of_the_paper_written_out(loss):
    agree(step(loss), plain(loss))


# ---------- two processes, and the parts of a system ----------

def one_of_two(rank, path):
    dist.init_process_group("gloo", f"file://{path}.store", timedelta(seconds=120), 2, rank)
    found = {loss: step(loss, rank, 2) for loss in CASES}
    if rank == 0:
        torch.save(found, path)
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    """What two processes found, loss by loss."""
    path = tmp_path_factory.mktemp("two") / "found.pt"
    torch.multiprocessing.start_processes(one_of_two, (path,), 2, start_method="forkserver")
    return torch.load(path, weights_only=True)


@each_case
def test_two_processes_give_loss_gradients_centres_and_points_of_one(loss, two_processes):
    agree(two_processes[loss], step(loss))


def test_batch_norm_is_that_of_torch_over_all_rows_and_in_float32():
    ours, theirs, x = objectives.BatchNorm(5), nn.BatchNorm1d(5), 3 * cloud(7, 3, 5) + 2
    assert_close(ours(x), theirs(x.flatten(0, 1)).view_as(x))
    assert ours(x[:0]).shape == (0, 3, 5)
    x = (x + 100).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        assert_close(ours(x), ours(x.float()))


@pytest.mark.parametrize("loss", ["ibot", "beit", "simmim"])
def test_a_process_whose_share_hides_nothing_still_has_every_gradient(loss):
    system = build(loss)
    strong, weak, mask = batch(system.args)
    value, logs, _ = system(strong, weak, torch.zeros_like(mask))
    value.backward()
    assert value.item() == (logs["ibot_image"].item() if loss == "ibot" else 0)
    assert all(p.grad.isfinite().all() for p in system.student.parameters() if p.requires_grad)


@pytest.mark.parametrize("loss, tokens", [("dino", {1}), ("dino+rkd", {1}), ("ibot", {17, 1}),
                                          ("rkd+mae", {5, 1})])  # 1: of a local view
def test_patches_that_no_term_reads_are_left_out_of_the_last_block(loss, tokens):
    system, found = build(loss, "--pool cls --local-crops 1"), set()
    system.student.backbone.blocks[-1].register_forward_hook(lambda *io: found.add(io[2].shape[1]))
    system(*batch(system.args))
    assert found == tokens


def test_resting_prototypes_lose_their_gradient_and_nothing_else_does():
    system = build("dino+ibot+moco", "")
    system(*batch(system.args))[0].backward()
    system.student.freeze_prototypes()
    assert {name for name, p in system.student.named_parameters() if p.grad is None} == {
        "heads.dino.prototypes", "heads.ibot.prototypes"}


def test_random_words_are_a_function_of_the_seed_and_blind_to_brightness_and_contrast():
    tokenizer, other = (objectives.RandomWords(args_of("beit", f"--seed {i}")) for i in (0, 1))
    images, patch = cloud(64, 3, 16, 16), torch.ones(1, 1, 4, 4)
    contrast, shift = (torch.kron(cloud(64, 1, 4, 4, seed=i), patch) for i in (1, 2))
    words = tokenizer(images)
    assert words.shape == (64, 16) and set(words.unique().tolist()) == set(range(24))
    assert (tokenizer(contrast.exp() * images + shift) == words).float().mean() > 0.999
    assert (tokenizer(-images) != words).all() and not other(images).equal(words)


@pytest.mark.parametrize("text, terms", [
    ("dino", dict(dino=1)), ("dino+0.5*rkd", dict(dino=1, rkd=0.5)),
    (" 2 * mae + 1e-2*rkd", dict(mae=2, rkd=0.01))])
def test_a_sum_is_its_terms_and_weights(text, terms):
    assert parse_loss(text) == terms


@pytest.mark.parametrize("loss, own", [
    ("rkd+dino", {}), ("dino+rkd", defaults("dino")), ("rkd+ibot", defaults("ibot")),
    ("moco+2*mae", dict(hide="drop", mask="random", mask_ratio=0.75)),
    ("beit+simmim", dict(hide="token", mask=None, mask_ratio=None))])  # the user has to choose
def test_defaults_are_those_of_the_terms_that_need_a_mask_else_of_the_first(loss, own):
    assert defaults(loss) == own


@pytest.mark.parametrize("loss", ["rkd", "cka", "ressl", "feature", "dbot", "mae+rkd"])
def test_a_given_teacher_of_another_width_teaches_and_stays_what_it_is(loss, tmp_path):
    vit, path = ARCHS["vit_mini"](image_size=16, patch_size=4), tmp_path / "given.pt"
    weights = {f"backbone.{name}": x for name, x in vit.state_dict().items()}
    torch.save(dict(args=dict(arch="vit_mini", patch_size=4, image_size=16), teacher=weights), path)
    system = System(args_of(loss, f"--stages 1 --teacher-checkpoint {path}"))
    value, _, points = system(*batch(system.args))
    value.backward()
    assert all(p.grad.any() for p in system.parameters() if p.requires_grad)
    assert_close(system.teacher.state_dict(), weights, rtol=0, atol=0)
    assert points[1].shape == (8, 64)  # the student's, which is kept


def test_the_next_stage_has_the_old_student_as_teacher_and_a_fresh_student():
    system = build("rkd", "--teacher frozen --stages 2 --head 8")
    old, other = deepcopy(system.student.state_dict()), System(system.args)
    start = deepcopy(other.student.state_dict())
    for x in (system, other):
        x.next_stage(1)
    fresh = system.student.state_dict()
    assert_close(system.teacher.state_dict(), old, rtol=0, atol=0)
    assert_close(fresh, other.student.state_dict(), rtol=0, atol=0)
    for name in ("backbone.blocks.0.attn.qkv.weight", "heads.rkd.0.weight"):
        assert not fresh[name].equal(start[name])


def test_a_saved_system_names_its_teacher_and_takes_no_other_centres():
    for loss in ("ibot", "mae", "dbot"):
        system = build(loss)
        state = system.save()
        assert ("teacher" in state) == (loss == "ibot")
        with pytest.raises(ValueError, match="dino"):
            system.load(state | dict(objective=dict(dino2=torch.zeros(24))))


OPTIONS = [f"--pool {pool}" for pool in ("cls", "cls+mean")] + [
    f"--mask {mask}" for mask in [*train.MASKS, "attention"]] + [
    "--local-crops 2", "--global-crops 1", "--stages 2 --teacher frozen", "--mask-ratio 0",
    "--hide token", "--image-size 4", "--batch-size 2"]


@pytest.mark.parametrize("loss", OBJECTIVES)
def test_every_combination_learns_or_is_refused(loss):
    sums = [f"--loss {loss}+{other}" for other in list(OBJECTIVES)[list(OBJECTIVES).index(loss):]]
    learned = 0
    for words in [f"--loss {loss} {options}" for options in OPTIONS] + sums[1:]:
        try:
            args = train.parse([*SMALL, "--batch-size", "4", *words.split()])
        except SystemExit as refused:
            assert refused.code == 2, words
            continue
        system, B, S = System(args), args.batch_size, args.image_size
        for step in range(2):
            if step and args.stages > 1:
                system.next_stage(1)
            views = [cloud(B, 3, S, S, seed=i) for i in range(args.global_crops)]
            views += [cloud(B, 3, 8, 8, seed=9 + i) for i in range(args.local_crops)]
            value, _, _ = system(views, views, train.draw_masks(args, system, step, 0, views), 0.5)
            value.backward()
            gradients = [p.grad.norm() for p in system.student.backbone.parameters()
                         if p.grad is not None]
            assert value.isfinite() and 1e-6 < torch.stack(gradients).norm() < 1e6, words
            learned += 1
    assert learned > 10
