"""The catalogue of systems: each is one short function with its idea, equation and paper.

    s_i = student(view of image i, perhaps masked)     t_i = teacher(another, whole view of image i)

A system is a term: a function of a `Batch` that returns its loss and a dict of parts to log. Its
entry in OBJECTIVES, with heads and default options, stands under the function: a new system needs
no other place. `--loss` takes a term or a weighted sum of terms, as `dino+0.5*rkd`.

All terms share these, also where a paper has it otherwise: Xavier initialisation and MAE's tokens,
warm-up from 0, colours after the crop (data.py), images rotated as their EXIF tag says; without a
recipe also bilinear crops, Adam's eps 1e-6 and weight decay of matrices only. Docstrings list the
other deviations.
Letters: B images of this rank (world·B after `gather`), N patches, V visible patches, G global
views, D width, K prototypes or words, M hidden patches.
"""
import copy
import math
import tomllib
from dataclasses import dataclass, field
from functools import cached_property, partial
from itertools import combinations
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from losses import (byol_loss, cka_loss, cosines, dino_loss, feature_loss, info_nce_loss,
                    masked_patch_loss, masked_token_loss, move_center, nt_xent_loss, pixel_loss,
                    pull_loss, ressl_loss, rkd_angle_loss, rkd_distance_loss, standardize)
from model import ARCHS, Decoder, PrototypeHead, mlp_head, patchify, pool_tokens, to_device
from randomness import fold
from weights import listed, misfits, open_backbone


# ---- over processes ----------------------------------------------------------------------------

class Gather(torch.autograd.Function):
    """Rows of all processes, in order of rank, with gradient.

    Every process computes the whole loss, so a row receives its gradient once from each process.
    The sum is `world` times the true gradient, and DDP's mean over processes divides by `world`.
    """

    @staticmethod
    def forward(ctx, x):
        parts = [torch.empty_like(x) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, x.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx, gradient):
        gradient = gradient.contiguous()
        dist.all_reduce(gradient)
        return gradient.chunk(dist.get_world_size())[dist.get_rank()]


def gather(x):
    """(B, ..) of this process -> (world·B, ..) of all; the same x where there is one process."""
    return Gather.apply(x) if dist.is_initialized() else x


class BatchNorm(nn.Module):
    """Batch normalisation of (.., D) by the rows of all ranks; no running statistics.

    torch's SyncBatchNorm runs on GPUs only. Plain BatchNorm would differ between one rank and two.
    """

    def __init__(self, dim, affine=True):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim)) if affine else None
        self.bias = nn.Parameter(torch.zeros(dim)) if affine else None

    def forward(self, x):
        def mean_over_ranks(x):  # they may have unequal numbers of rows
            rows = x.flatten(0, -2)
            sums = torch.cat([rows.sum(0), rows.new_full((1,), len(rows))])
            sums = gather(sums.unsqueeze(0)).sum(0)
            return sums[:-1] / sums[-1].clamp_min(1)

        x = x.float()
        x = x - mean_over_ranks(x)
        x = x * (mean_over_ranks(x.square()) + 1e-5).rsqrt()
        return x if self.weight is None else x * self.weight + self.bias


# ---- a batch, as both networks see it ----------------------------------------------------------

class Network(nn.Module):
    """A backbone, and the head and the predictor of each term, by the term's name."""

    def __init__(self, backbone, heads=(), predictors=()):
        super().__init__()
        self.backbone = backbone
        self.heads, self.predictors = nn.ModuleDict(heads), nn.ModuleDict(predictors)

    def freeze_prototypes(self):
        """Remove the gradients of the prototypes (DINO freezes them in the first epoch)."""
        for head in self.heads.values():
            if isinstance(head, PrototypeHead):
                head.prototypes.grad = None


class Batch:
    """Views, mask, and the outputs of both networks, each computed when a term first reads it.

    Lists hold one tensor per view, global views first. `progress`: share of the stage that is done.
    """

    def __init__(self, system, strong, weak, mask, progress):
        self.args, self.student, self.teacher = system.args, system.student, system.teacher
        self.state, self.tokenizer, self.cls_only = system.state, system.tokenizer, system.cls_only
        self.strong, self.mask, self.progress, G = strong, mask, progress, system.args.global_crops
        self.globals = torch.cat(strong[:G])  # (G·B, 3, S, S)
        self.whole = torch.cat(weak[:G]) if self.args.weak_teacher else self.globals

    @cached_property
    def tokens(self):
        """Student's tokens of the global views: (G·B, 1 + N, D); (.., 1 + V, D) where dropped."""
        return self.student.backbone(self.globals, self.mask, self.args.hide == "drop",
                                     cls_only=self.cls_only)

    @cached_property
    def features(self):
        """Student's feature of each view: list of (B, D)."""
        G, pool = self.args.global_crops, self.args.pool
        features = [*pool_tokens(self.tokens, pool).chunk(G)]
        if self.strong[G:]:
            local = self.student.backbone(torch.cat(self.strong[G:]), cls_only=pool == "cls")
            features += pool_tokens(local, pool).chunk(len(self.strong) - G)
        return features

    @cached_property
    @torch.no_grad()
    def unnormed(self):
        """Teacher's tokens of the whole global views, before the last norm: (G·B, 1 + N, D)."""
        return self.teacher.backbone(self.whole, norm=False, cls_only=self.cls_only)

    @cached_property
    @torch.no_grad()
    def teacher_tokens(self):
        return self.teacher.backbone.norm(self.unnormed)

    @cached_property
    def teacher_features(self):
        return pool_tokens(self.teacher_tokens, self.args.pool).chunk(self.args.global_crops)

    def student_points(self, term):
        points = on_views(self.student.heads[term], self.features)
        return [self.student.predictors[term](x) for x in points]

    @torch.no_grad()
    def teacher_points(self, term):
        return on_views(self.teacher.heads[term], self.teacher_features)

    @cached_property
    def hidden(self):
        return places(self.mask, self.globals.device)

    def at_hidden(self, x):
        """(G·B, N, ..) -> its rows at the hidden patches, (M, ..)."""
        return x.flatten(0, 1)[self.hidden]

    @property
    def temperatures(self):
        """(student's, teacher's); the teacher's moves linearly over `teacher_warmup` of a run."""
        start, end = self.args.teacher_temperature
        warm = min(1, self.progress / max(1e-9, self.args.teacher_warmup))
        return self.args.temperature or 0.1, start + (end - start) * warm

    def center(self, name, batch_mean):
        """The centre before this batch; the batch mean over all processes moves the next one."""
        center, means = self.state[name], gather(batch_mean.float().unsqueeze(0))
        self.state[name] = move_center(center, means.mean(0))
        return center

    def pairs(self, term):
        """[(student's points, teacher's points), ..] of different views: (world·B, D) each."""
        student = [gather(x.float()) for x in self.student_points(term)]
        teacher = [gather(x.float()) for x in self.teacher_points(term)]
        return different_views(student, teacher)

    def points(self):
        """Input of `panel`, (world·B, D) each: the student's features of the first view (None if
        there is one view only), and the evaluated network's features of the other view."""
        theirs = self.teacher_features if self.args.teacher == "ema" else self.features
        if self.args.global_crops == 1:
            return None, gather(theirs[0].detach().float())
        return gather(self.features[0].detach().float()), gather(theirs[1].detach().float())


def places(mask, device):
    """Indices of True in a flattened mask on the CPU: (M,) int64 on the device."""
    return to_device(mask.flatten().nonzero().flatten(), device)


def on_views(head, views):
    """A head on the features (B, D) of each view; BatchNorm normalises each view separately.

    A `PrototypeHead` gets all views in one call, as in DINO's code, so its BatchNorm normalises
    them together. This way it normalises its prototypes once, which costs more than its MLP.
    """
    if isinstance(head, PrototypeHead):
        return head(torch.cat(views)).chunk(len(views))
    return [head(x) for x in views]


def different_views(student, teacher):
    """[(s, t), ..]: each of the student's views with each other view of the teacher's."""
    return [(s, t) for i, s in enumerate(student) for j, t in enumerate(teacher) if i != j]


def mean(values):
    values = list(values)
    return sum(values) / len(values)


# ---- the table of systems, and heads that several share ----------------------------------------

@dataclass
class Term:
    """A system: its loss, its requirements, its heads and its default options."""
    loss: callable
    teacher: bool = True  # does it read a teacher?
    through_head: bool = False  # .. through a head, which a given backbone lacks?
    views: int = 2  # global views per image, at least
    least: int = 1  # images per batch, at least
    hide: str = None  # --hide, where it predicts hidden patches
    centers: tuple = ()  # names of its running means of teacher logits, (K,) each
    defaults: dict = field(default_factory=dict)  # options when it runs alone
    # makers of modules, called with (args, vit, width of a feature, width of the teacher)
    head: callable = nn.Identity  # of both networks
    predictor: callable = nn.Identity  # of the student only


OBJECTIVES = {}  # name -> Term; filled below, each entry under its function

# default options that several systems share
UNMASKED = dict(mask_ratio=0.0)  # published without a mask
SLOW = dict(momentum=0.99)  # at .95 the teacher moves too fast, and features collapse
WIDE = dict(projection=128, head_hidden=1024)  # a narrower predictor trains unsteadily


def batchnorm_mlp(args, vit, width, teacher_width, out=None, layers=2, last=True, predictor=False):
    """Head of SimCLR, BYOL and MoCo v3; `last`: a BatchNorm without scale after the last layer."""
    out = out or args.projection or 256
    after = partial(BatchNorm, affine=False) if last else None
    return mlp_head(out if predictor else width, args.head_hidden or 4 * width, out, layers,
                    norm=BatchNorm, activation=nn.ReLU, last=after, bias=False)


def decoder(args, vit, out):
    return Decoder(vit.grid, vit.embed_dim, out, *args.decoder, drop_path=args.drop_path)


# ---- relations ---------------------------------------------------------------------------------

def rkd(batch):
    """Masked relational distillation (relations: Park et al. 2019, arXiv 1904.05068).

    w_D · distance(s, t) + w_A · angle(s, t) + w_P · pull(s, t), s and t of different views.
    A rigid motion of all points changes no relation, so only the small pull makes a student's view
    agree with the teacher's view of the same image.
    Angles at all images would cost the cube of their number. Angles at the first `--angle-vertices`
    images are an unbiased estimate, since the order of a batch is random; each rank computes a
    share of them.
    Deviations: the teacher is a moving average and not L2-normalised; the pull is ours.
    """
    args, pairs = batch.args, batch.pairs("rkd")
    weights = dict(distance=args.distance_weight, angle=args.angle_weight, pull=args.pull_weight)

    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    vertices = torch.arange(min(max(args.angle_vertices or 256, world), len(pairs[0][0])))
    share = vertices.tensor_split(world)[rank]
    losses = {}
    if args.distance_weight:
        losses["distance"] = mean(rkd_distance_loss(*pair, args.distance_power) for pair in pairs)
    if args.angle_weight:  # the factor makes the mean over ranks the mean over all vertices
        losses["angle"] = (mean(rkd_angle_loss(*pair, share) for pair in pairs)
                           * (len(share) * world / len(vertices)))
    if args.pull_weight:
        losses["pull"] = mean(pull_loss(*pair) for pair in pairs)
    return sum(weights[name] * loss for name, loss in losses.items()), losses


def rkd_head(args, vit, width, teacher_width):
    if not args.head:
        return nn.Identity()
    if args.head_batchnorm:
        return batchnorm_mlp(args, vit, width, teacher_width, out=args.head)
    return mlp_head(width, args.head_hidden or 4 * width, args.head)

OBJECTIVES["rkd"] = Term(rkd, least=3, head=rkd_head)


def cka(batch):
    """Control: one number for all relations, 1 - CKA (Kornblith et al. 2019, arXiv 1905.00414)."""
    return mean(cka_loss(*pair) for pair in batch.pairs("cka")), {}

OBJECTIVES["cka"] = Term(cka, least=3)


def ressl(batch):
    """Control: relations as sharpened distributions (ReSSL: Zheng et al. 2021, arXiv 2107.09282).

    mean KL(softmax of the teacher's similarities / .04 || softmax of the student's / .1).
    Deviations: the other images of the batch stand for the queue, and the student's points are
    compared with each other, where ReSSL compares them with the teacher's queue; both views are
    students; no head; as for rkd a mask, a fast teacher and coloured teacher's views by default.
    """
    return mean(ressl_loss(*pair, *batch.temperatures) for pair in batch.pairs("ressl")), {}

OBJECTIVES["ressl"] = Term(ressl, least=3)


def feature(batch):
    """Control: features instead of relations (FitNets: Romero et al. 2015, arXiv 1412.6550, eq. 3).

    Smooth L1 between a linear map of s_i and the layer-normalised t_i. Deviations: FitNets has the
    squared error, no normalisation, an inner layer, and the same image for both networks.
    """
    return mean(F.smooth_l1_loss(s, F.layer_norm(t, t.shape[-1:]))
                for s, t in batch.pairs("feature")), {}

OBJECTIVES["feature"] = Term(  # --pool cls+mean doubles the width of both features
    feature, predictor=lambda args, vit, width, teacher_width: nn.Linear(
        width, teacher_width * width // vit.embed_dim))


# ---- contrast ----------------------------------------------------------------------------------

def simclr(batch):
    """SimCLR (Chen et al. 2020, arXiv 2002.05709): find the other view among all; no teacher.

    NT-Xent, (2N - 1)-way, over the images of all ranks; projection head.
    Deviations: AdamW for LARS; BatchNorm over each view by itself, the last one without scale.
    """
    points = [gather(x.float()) for x in batch.student_points("simclr")]
    return mean(nt_xent_loss(a, b, batch.args.temperature or 0.1)
                for a, b in combinations(points, 2)), {}

OBJECTIVES["simclr"] = Term(
    simclr, teacher=False, least=2, defaults=UNMASKED,
    head=lambda args, *sizes: batchnorm_mlp(args, *sizes, out=args.projection or 128))


def moco(batch):
    """MoCo v3 (Chen, Xie, He 2021, arXiv 2104.02057): find the teacher's view of the same image.

    ctr(q_1, k_2) + ctr(q_2, k_1), ctr = 2·temperature · InfoNCE over the images of all ranks;
    q = predictor(head(s)), k = head(t). Deviation: the teacher moves at the end of a step, not
    before its keys are computed, so the schedule of the momentum is one step late.
    """
    temperature = batch.args.temperature or 0.2
    loss = mean(info_nce_loss(*pair, temperature) for pair in batch.pairs("moco"))
    return 2 * 2 * temperature * loss, {}  # two directions

OBJECTIVES["moco"] = Term(
    moco, through_head=True, least=2, defaults=UNMASKED | SLOW | WIDE,
    head=partial(batchnorm_mlp, layers=3), predictor=partial(batchnorm_mlp, predictor=True))


# ---- self-distillation -------------------------------------------------------------------------

def byol(batch):
    """BYOL (Grill et al. 2020, arXiv 2006.07733): predict the teacher's projection of another view.

    |p_1 - z_2|² + |p_2 - z_1|², all of length 1. There are no negatives: the predictor and the
    moving average prevent collapse. Deviations: AdamW for LARS; colours of torchvision (data.py).
    """
    return 2 * mean(byol_loss(*pair) for pair in batch.pairs("byol")), {}  # two directions

OBJECTIVES["byol"] = Term(
    byol, through_head=True, least=2, defaults=UNMASKED | WIDE | dict(momentum=0.996),
    head=partial(batchnorm_mlp, last=False),
    predictor=partial(batchnorm_mlp, last=False, predictor=True))


def dino(batch, name="dino"):
    """DINO (Caron et al. 2021, arXiv 2104.14294): predict the teacher's choice of K prototypes.

    Cross-entropy of softmax(s / .1) against softmax((t - centre) / teacher temperature).
    Deviations: the teacher temperature moves each step, not each epoch; prototypes always have
    length 1; positions of local crops are interpolated to their exact grid, without DINO's + .1;
    without a recipe, BatchNorm in the head and a teacher temperature of .02.
    """
    student, teacher = batch.student_points(name), batch.teacher_points(name)
    center = batch.center(name, torch.cat(teacher).float().mean(0))
    return mean(dino_loss(*pair, center, *batch.temperatures)
                for pair in different_views(student, teacher)), {}


def prototype_head(args, vit, width, teacher_width):
    return PrototypeHead(width, args.head_hidden or 4 * width, args.projection or 256,
                         args.prototypes, BatchNorm if args.head_batchnorm else None)

SHARP = SLOW | dict(pool="cls", lr=1e-3, head_batchnorm=True, teacher_temperature=[0.02, 0.02])

OBJECTIVES["dino"] = Term(dino, through_head=True, centers=("dino",), head=prototype_head,
                          defaults=UNMASKED | SHARP)


def ibot(batch):
    """iBOT (Zhou et al. 2022, arXiv 2111.07832): DINO on the image and on each hidden patch.

    The target of a hidden patch is the teacher's output for that patch of the same view, by the
    same head. Logits are computed at hidden patches only; the centre is the mean over all patches,
    computed from their mean embedding (logits are linear in it).
    Deviations: as DINO's; masks hide exactly their share.
    """
    image, _ = dino(batch, "ibot")
    head, theirs = batch.student.heads["ibot"], batch.teacher.heads["ibot"]
    with torch.no_grad():
        z = theirs.embed(batch.teacher_tokens[:, 1:])  # (G·B, N, bottleneck)
        target = theirs.logits(batch.at_hidden(z))  # (M, K)
        center = batch.center("ibot_patch", theirs.logits(z.float().mean((0, 1))))
    logits = head(batch.at_hidden(batch.tokens[:, 1:]))
    patch = masked_patch_loss(logits, target, batch.mask, center, *batch.temperatures)
    return image + patch, {"ibot_image": image, "ibot_patch": patch}

OBJECTIVES["ibot"] = Term(
    ibot, through_head=True, hide="token", centers=("ibot", "ibot_patch"), head=prototype_head,
    defaults=SHARP | dict(mask="block", mask_ratio=0.3, mask_spread=0.2, mask_probability=0.5))


# ---- masked prediction -------------------------------------------------------------------------

def per_patch(loss, mask):
    """A mean over this rank's hidden patches -> a term whose mean over ranks, as DDP takes it, is
    the mean over all hidden patches. (`mae` hides equally many in each image.)"""
    hidden = loss.new_full((), int(mask.sum()))
    mean_hidden = gather(hidden.unsqueeze(0)).mean()
    return loss * torch.where(mean_hidden > 0, hidden / mean_hidden, 1)


def beit(batch):
    """BEiT (Bao et al. 2021, arXiv 2106.08254): name the visual word of each hidden patch.

    Cross-entropy over K words. Deviations: the words are those of `RandomWords`, since
    BEiT's own is an external network (DALL-E's); absolute positions, no LayerScale; no weight
    decay of the mask token.
    """
    words = batch.at_hidden(batch.tokenizer(batch.globals))  # (M,)
    logits = batch.student.predictors["beit"](batch.at_hidden(batch.tokens[:, 1:]))  # (M, K)
    return per_patch(masked_token_loss(logits, words, batch.mask), batch.mask), {}

OBJECTIVES["beit"] = Term(
    beit, teacher=False, views=1, hide="token", defaults=dict(mask="block", mask_ratio=0.4),
    predictor=lambda args, vit, *_: nn.Linear(vit.embed_dim, args.prototypes))


class RandomWords(nn.Module):
    """A substitute for BEiT's tokenizer: images (B, 3, S, S) -> words (B, N) in 0 .. K - 1.

    BEST-RQ's quantizer (Chiu et al. 2022, arXiv 2202.01855): a frozen random projection of the
    standardised patch, then the nearest of K random codes by cosine. Depends on the seed only.
    """

    def __init__(self, args, width=16):
        super().__init__()
        self.patch_size, random = args.patch_size, torch.Generator().manual_seed(args.seed)
        for name, rows in (("projection", 3 * args.patch_size ** 2), ("codes", args.prototypes)):
            value = torch.randn(rows, width, generator=random)
            self.register_buffer(name, value, persistent=False)

    @torch.no_grad()
    def forward(self, images):
        patches = standardize(patchify(images, self.patch_size).flatten(2))  # (B, N, 3·P·P)
        points = (patches @ self.projection).flatten(0, 1)
        return cosines(points, self.codes).argmax(1).view(patches.shape[:2])


def mae(batch):
    """MAE (He et al. 2021, arXiv 2111.06377): paint the hidden patches; the ViT sees the others.

    Mean squared error of a light decoder's pixels, each patch standardised. Deviation: the number
    of hidden patches is rounded, where MAE rounds up (at .9 of 196 patches 177, here 176).
    """
    patches = batch.at_hidden(patchify(batch.globals, batch.args.patch_size).flatten(2))
    prediction = batch.student.predictors["mae"](batch.tokens, batch.mask)[:, 1:]
    return pixel_loss(batch.at_hidden(prediction), patches, batch.mask), {}  # (M, 3·P·P)

OBJECTIVES["mae"] = Term(
    mae, teacher=False, views=1, hide="drop", defaults=dict(mask="random", mask_ratio=0.75),
    predictor=lambda args, vit, *_: decoder(args, vit, 3 * args.patch_size ** 2))


def simmim(batch):
    """SimMIM (Xie et al. 2021, arXiv 2111.09886): paint the hidden patches by one linear layer.

    Mean absolute error of the pixels, predicted at mask tokens.
    Deviations: absolute positions, no LayerScale; a cosine schedule, not a step at 7/8; no weight
    decay of the mask token; without the recipe .6 of 49 squares are 29, where SimMIM hides 30.
    """
    patches = batch.at_hidden(patchify(batch.globals, batch.args.patch_size).flatten(2))
    tokens = batch.at_hidden(batch.tokens[:, 1:])
    prediction = batch.student.predictors["simmim"](tokens)  # (M, 3·P·P)
    loss = pixel_loss(prediction, patches, batch.mask, normalize=False, p=1)
    return per_patch(loss, batch.mask), {}

OBJECTIVES["simmim"] = Term(
    simmim, teacher=False, views=1, hide="token", defaults=dict(mask="random", mask_ratio=0.6),
    predictor=lambda args, vit, *_: nn.Linear(vit.embed_dim, 3 * args.patch_size ** 2))


def dbot(batch):
    """dBOT (Liu et al. 2022, arXiv 2209.03917): predict a frozen teacher's features where hidden.

    Smooth L1 (beta 2) at hidden patches and CLS, the target standardised before the teacher's last
    norm. After each stage the student becomes the teacher and a fresh student starts
    (`System.next_stage`), with the optimizer kept, as in its code. Deviation: its code also keeps
    the bias of the patch embedding.
    """
    mask = F.pad(batch.mask, (1, 0), value=True)  # with CLS
    at = places(mask, batch.globals.device)
    target = standardize(batch.unnormed.flatten(0, 1)[at])  # (G·B + M, D)
    prediction = batch.student.predictors["dbot"](batch.tokens, batch.mask).flatten(0, 1)[at]
    return feature_loss(prediction, target, mask, beta=2.0), {}

OBJECTIVES["dbot"] = Term(
    dbot, views=1, hide="drop",
    defaults=dict(mask="random", mask_ratio=0.75, teacher="frozen", stages=2),
    predictor=lambda args, vit, width, teacher_width: decoder(args, vit, teacher_width))


# ---- sums --------------------------------------------------------------------------------------

def parse_loss(text):
    """`dino+0.5*rkd` -> {"dino": 1.0, "rkd": 0.5}; ValueError names what is wrong."""
    terms = {}
    for piece in text.split("+"):
        weight, star, name = (part.strip() for part in piece.rpartition("*"))
        if name not in OBJECTIVES:
            raise ValueError(f"{name!r} in {text!r} is no term: choose from "
                             f"{', '.join(OBJECTIVES)}, summed as in dino+0.5*rkd")
        try:
            value = float(weight if star else 1)
        except ValueError:
            value = math.nan
        if not 0 < value < math.inf:
            raise ValueError(f"weight {weight!r} in {text!r} must be a number above 0")
        if name in terms:
            raise ValueError(f"{name} stands twice in {text!r}: give it one weight")
        terms[name] = value
    return terms


def defaults(loss):
    """Default options of a sum: those of its terms that predict hidden patches, else of the first.

    An option that two terms want differently is None: the user has to choose.
    """
    names = [*parse_loss(loss)]
    masked = {name: OBJECTIVES[name].hide for name in names if OBJECTIVES[name].hide}
    ways = {*masked.values()}
    if len(ways) > 1:
        needs = ", ".join(f"{name} needs --hide {way}" for name, way in masked.items())
        raise ValueError(f"--loss {loss}: {needs}; one student cannot do both: leave one out")
    found = {}
    for term in [*masked] or names[:1]:
        for name, value in OBJECTIVES[term].defaults.items():
            found[name] = value if found.get(name, value) == value else None
    return found | {"hide": way for way in ways}


# ---- student and teacher -----------------------------------------------------------------------

def build_student(args, teacher_width=None, stage=0):
    """The student of these options: the same weights in every process, others in each stage."""
    torch.manual_seed(fold(args.seed, 5, stage) if stage else args.seed)
    vit = ARCHS[args.arch](image_size=args.image_size, patch_size=args.patch_size,
                           drop_path=args.drop_path, fixed_pos=args.fixed_pos)
    width = vit.embed_dim * (2 if args.pool == "cls+mean" else 1)
    sizes, heads, predictors = (vit, width, teacher_width or vit.embed_dim), {}, {}
    for name in parse_loss(args.loss):
        heads[name] = OBJECTIVES[name].head(args, *sizes)
        predictors[name] = OBJECTIVES[name].predictor(args, *sizes)
    if args.hide == "drop" or not args.mask_ratio:
        vit.mask_token.requires_grad_(False)  # unused: DDP would wait for it
    if args.freeze_patch_embed:
        vit.patch_embed.requires_grad_(False)
    return Network(vit, heads, predictors)


class System(nn.Module):
    """Student, teacher and terms: `system(strong, weak, mask)` is the loss of one batch."""

    def __init__(self, args):
        super().__init__()
        self.args, self.terms, self.teacher = args, parse_loss(args.loss), None
        self.cls_only = args.pool == "cls" and not any(  # no term reads more than the feature
            OBJECTIVES[name].hide for name in self.terms)
        given = None
        if args.teacher_checkpoint:
            try:
                given, _ = open_backbone(args.teacher_checkpoint, args.teacher_arch)
            except ValueError as error:
                text = str(error).replace("--arch", "--teacher-arch")
                raise ValueError(f"--teacher-checkpoint: {text}") from error
            if given.patch_size != args.patch_size:
                raise ValueError(f"--teacher-checkpoint {args.teacher_checkpoint} has patches of "
                                 f"{given.patch_size} pixels, the student of {args.patch_size}: "
                                 f"take --patch-size {given.patch_size}")
        self.student = build_student(args, given and given.embed_dim)
        vit = self.student.backbone
        if given and given.embed_dim != vit.embed_dim and "rkd" in self.terms and args.pull_weight:
            raise ValueError(f"--pull-weight {args.pull_weight} pulls points together, and the "
                             f"teacher's are {given.embed_dim} wide, the student's "
                             f"{vit.embed_dim}: --pull-weight 0")
        if args.teacher != "none":
            heads = {name: nn.Identity() for name in self.terms} if given else self.student.heads
            self.teacher = copy.deepcopy(Network(given or vit, heads)).requires_grad_(False).eval()
        self.state = {center: torch.zeros(args.prototypes)  # saved in checkpoints
                      for name in self.terms for center in OBJECTIVES[name].centers}
        self.tokenizer = RandomWords(args) if "beit" in self.terms else None

    def to(self, device):
        self.state = {name: x.to(device) for name, x in self.state.items()}
        return super().to(device)

    @property
    def eval_network(self):
        """The network to evaluate: the moving average where there is one, else the student."""
        return self.teacher if self.args.teacher == "ema" else self.student

    def forward(self, strong, weak, mask, progress=0.0):
        """Views as lists of (B, 3, S, S), bool mask (G·B, N) or None -> loss, logs, points."""
        batch, loss, logs = Batch(self, strong, weak, mask, progress), 0.0, {}
        for name, weight in self.terms.items():
            value, more = OBJECTIVES[name].loss(batch)
            loss = loss + weight * value
            logs |= {name: value.detach(), **more}
        return loss, logs, batch.points()

    def next_stage(self, stage):
        """The student becomes the frozen teacher and a fresh student starts (dBOT)."""
        self.teacher.load_state_dict(self.student.state_dict(), strict=False)  # no predictor
        self.student.load_state_dict(build_student(self.args, stage=stage).state_dict())

    def parts(self):
        """Networks by their names in a checkpoint: an EMA is `teacher`, any other `frozen`."""
        name = "teacher" if self.args.teacher == "ema" else "frozen"
        return {"student": self.student} | ({name: self.teacher} if self.teacher else {})

    def save(self):
        networks = {name: part.state_dict() for name, part in self.parts().items()}
        return dict(networks, objective=self.state)

    def load(self, state):
        """Load what `save` returned; ValueError lists what does not fit, and nothing is loaded."""
        wrong = [f"{name}: {text}" for name, expected in self.save().items()
                 for text in misfits(expected, state.get(name))]
        if wrong:
            raise ValueError(listed(wrong))
        for name, part in self.parts().items():
            part.load_state_dict(state[name])
        self.state = {name: x.to(self.state[name]) for name, x in state["objective"].items()}


# ---- published recipes -------------------------------------------------------------------------

# --recipe NAME reads recipes/NAME.toml: published options, the source of each in a comment
RECIPES = {path.stem: tomllib.loads(path.read_text(encoding="utf-8"))
           for path in sorted(Path(__file__).parent.glob("recipes/*.toml"))}
