"""The catalogue of objectives: which network sees which view, and what is asked of it.

`rkd`, masked relational knowledge distillation (relations: Park et al. 2019, arXiv 1904.05068):

    s_i = student(view 1 of image i, masked)          t_i = teacher(view 2 of image i, whole)
    loss = w_D · distance(s, t) + w_A · angle(s, t) + w_P · pull(s, t)             + views swapped

Relations are those among students and among teachers of the *other* view, never from a student
to a teacher. They are blind to any rigid motion, so nothing in them ties the two views of one image
together; the small `pull` does. Terms come back with their weights; train.py adds and logs them.

Letters: B images of this process (world·B after `gather`), N patches, V views, D width.
"""
import torch
import torch.distributed as dist
from torch import nn

from losses import pull_loss, rkd_angle_loss, rkd_distance_loss
from model import ARCHS, mlp_head, pool_tokens


class Network(nn.Module):
    """Backbone, pooled feature, what makes it a point: nothing, a head, a head and a predictor."""

    def __init__(self, backbone, pool="mean", head=0, predictor=False):
        super().__init__()
        width = backbone.embed_dim * (2 if pool == "cls+mean" else 1)
        self.backbone, self.pool = backbone, pool
        out = head or width
        self.head = mlp_head(width, 4 * width, out) if head else nn.Identity()
        self.predictor = mlp_head(out, 4 * width, out) if predictor else nn.Identity()

    def forward(self, views, mask=None, drop=False):
        """Two global views, then local ones -> points (V·B, D) and global patches (2B, N, D)."""
        tokens = self.backbone(torch.cat(views[:2]), mask, drop)
        features = pool_tokens(tokens, self.pool)
        if len(views) > 2:
            local = self.backbone(torch.cat(views[2:]))
            features = torch.cat([features, pool_tokens(local, self.pool)])
        return self.predictor(self.head(features)), tokens[:, 1:]


class Gather(torch.autograd.Function):
    """Rows of all processes, in order, with gradient.

    Every process computes the whole loss, so each row's gradient arrives once from each: their sum
    is `world` times the true one, which is what DDP's mean over processes divides by.
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
    """(B, D) of this process -> (world·B, D) of all; the same x where there is one process."""
    return Gather.apply(x) if dist.is_initialized() else x


def build_network(args):
    """The student as the options describe it; the same in every process, for every objective."""
    torch.manual_seed(args.seed)
    vit = ARCHS[args.arch](image_size=args.image_size, patch_size=args.patch_size,
                           drop_path=args.drop_path)
    return Network(vit, args.pool, args.head, args.predictor)


def relations(student, teacher, args):
    """The two relational losses between points (..., N, D); a weight of 0 is not computed."""
    losses = {}
    if args.distance_weight:
        losses["distance"] = rkd_distance_loss(student, teacher)
    if args.angle_weight:
        losses["angle"] = rkd_angle_loss(student, teacher)
    return losses


def rkd(student, teacher, strong, weak, mask, args):
    """-> terms {name: (weight, value)}, and the points (student, teacher) of one pair of views."""
    with torch.no_grad():
        theirs, their_patches = teacher(weak[:2] if args.weak_teacher else strong[:2])
    points, patches = student(strong, mask, drop=args.hide == "drop")
    s = [gather(x.float()) for x in points.chunk(len(strong))]
    t = [gather(x.float()) for x in theirs.chunk(2)]
    pairs = [(s[i], t[j]) for i in range(len(s)) for j in range(2) if i != j]  # never the same view

    weights, terms = dict(distance=args.distance_weight, angle=args.angle_weight), {}
    each = [relations(*pair, args) for pair in pairs]
    for name in each[0]:
        terms[name] = weights[name], sum(losses[name] for losses in each) / len(pairs)
    if args.pull_weight:
        pull = sum(pull_loss(*pair) for pair in pairs) / len(pairs)
        terms["pull"] = args.pull_weight, pull
    if args.patch_weight:  # patch i of a view is patch i of the same crop, whole, at the teacher
        if mask is not None and args.hide == "drop":
            their_patches = their_patches[~mask.to(their_patches.device)].view_as(patches)
        for name, loss in relations(patches, their_patches, args).items():
            terms[f"patch_{name}"] = args.patch_weight * weights[name], loss
    return terms, pairs[0]


def collapsed(pair, args):
    """Each relational loss for a student whose points are all one: a plateau to recognise."""
    with torch.no_grad():
        losses = relations(torch.zeros_like(pair[0]), pair[1], args)
    return {f"collapsed_{name}": value.item() for name, value in losses.items()}


OBJECTIVES = dict(rkd=rkd)
