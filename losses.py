"""Relations instead of instances: distances and angles among points, and losses that match them.

Relational knowledge distillation (Park, Kim, Lu, Cho 2019, arXiv 1904.05068). A student places N
points s_1..s_N, a teacher t_1..t_N (one point an image, or one a patch). The student is not asked
to put s_i where t_i is, only to keep the teacher's *relations* (section 3.2):

    distance   psi_D(i, j)    = |x_i - x_j| / mean over pairs of |x_a - x_b|              (eq. 5, 6)
    angle      psi_A(i, j, k) = cos of the angle at x_j between x_i and x_k               (eq. 8)
    loss       mean of huber(psi(student) - psi(teacher))                                 (eq. 7, 9)
               huber(e) = e²/2 for |e| <= 1, |e| - 1/2 beyond                             (eq. 4)

What the relations do not see: both are unchanged when all points are shifted, rotated, mirrored or
scaled together. So student and teacher may differ in width, and no head is needed to align them;
but a network whose outputs shrink towards one point keeps a low loss all the way down. The loss
cannot report that collapse: watch `panel` beside it, as train.py does. And nothing here ties the
two views of one image to each other: that is what the small `pull_loss` of `rkd` adds.

Letters: N points, D width, ... any leading dimensions (separate sets of points, averaged).
Left out: sampling of triplets (the mean below is exact), L2 normalisation (the caller's choice).
"""
import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable


def squared_distance(x):
    """Squared distances |x_i - x_j|²: (..., N, D) -> (..., N, N), float64 (float32 on MPS).

    |a - b|² = |a|² + |b|² - 2ab costs one matrix product, but cancels: in float32 it keeps no digit
    of points closer than 3e-4 of their norm, in bf16 it fails at a tenth. Hence centre first, then
    float64. What is left below rounding is set to the zero that it is, and gets no gradient.
    """
    with torch.autocast(x.device.type, enabled=False):
        exact = x.device.type != "mps"  # MPS has no float64
        x = x.double() if exact else x.float()
        x = x - x.mean(-2, keepdim=True)
        gram = x @ x.mT  # (..., N, N)
        norms = gram.diagonal(dim1=-2, dim2=-1)
        scale = norms.unsqueeze(-1) + norms.unsqueeze(-2)
        squares = scale - 2 * gram
        return squares.masked_fill(squares <= (1e-13 if exact else 1e-6) * scale, 0)


def pairwise_distance(x):
    """Euclidean distances |x_i - x_j|: (..., N, D) -> (..., N, N), float32, zero diagonal.

    Blind to shifts and rotations. The gradient is finite everywhere: 0 for rows that coincide,
    where the square root has no slope. O(N²) memory.
    """
    squares = squared_distance(x)
    apart = squares > 0
    return (torch.where(apart, squares, 1).sqrt() * apart).float()


def rkd_distance_loss(student, teacher):
    """RKD-D (Park et al. 2019, eq. 5-7): (..., N, Ds), (..., N, Dt) -> float32 scalar.

    Huber (beta = 1) between the two distance matrices, each divided by its own mean over the N(N-1)
    pairs i != j; mean over those pairs. The gradient flows through the student's mean too. The
    original code also averages the N zeros of the diagonal: times N / (N-1) gives ours. Blind to
    shift, rotation and scale of either side. N < 2 raises ValueError.
    """
    check_points(student, teacher, 2)
    N = student.shape[-2]

    def normalized(x):
        distances = pairwise_distance(x)
        mean = distances.sum((-2, -1), keepdim=True) / (N * (N - 1))
        return distances / torch.where(mean > 0, mean, 1)  # all points equal: zeros, not 0 / 0

    with torch.no_grad():
        target = normalized(teacher)
    return F.smooth_l1_loss(normalized(student), target) * N / (N - 1)  # the diagonal adds zeros


def rkd_angle_loss(student, teacher):
    """RKD-A (Park et al. 2019, eq. 8-9): (..., N, Ds), (..., N, Dt) -> float32 scalar.

    Huber (beta = 1) between the cosines at vertex j of every triplet of distinct points; exact mean
    over those N(N-1)(N-2) triplets. The original code averages all N³ entries, also those that are
    zero by construction: times N² / ((N-1)(N-2)) gives ours. A side of length zero counts as cosine
    0. Blind to shift, rotation and scale. O(N³) time, O(N²) memory, forward and backward. N < 3
    raises ValueError.
    """
    check_points(student, teacher, 3)

    def squares(x):  # (sets, N, N), largest 1: angles do not see scale, float32 does
        x = squared_distance(x)
        largest = x.detach().amax((-2, -1), keepdim=True)
        return (x / torch.where(largest > 0, largest, 1)).float().reshape(-1, *x.shape[-2:])

    with torch.no_grad():
        target = squares(teacher)
    return AngleHuber.apply(squares(student), target)


def pull_loss(student, teacher):
    """Mean |s - t|² between the directions of two views of an image: (N, D), (N, D) -> scalar.

    Directions from the centre of the batch: seen from the origin, a large common offset would
    satisfy the pull at no cost, as relations do not see one. 2 for unrelated views, 0 for equal.
    """
    check_points(student, teacher, 2)
    s, t = (F.normalize(x.float() - x.float().mean(0), dim=-1) for x in (student, teacher.detach()))
    return (s - t).square().sum(-1).mean()


class AngleHuber(torch.autograd.Function):
    """Mean Huber between the angles of two (B, N, N) squared-distance matrices S (law of cosines):

        c_ik = cos at j = (S_ji + S_jk - S_ik) / (2 d_ji d_jk)
        dc_ik / dS_ik = -1 / (2 d_ji d_jk)
        dc_ik / dS_ji = 1 / (2 d_ji d_jk) - c_ik / (2 S_ji)         (and S_jk alike)

    The loss is a scalar, so its gradient is summed up in the forward pass, some vertices j at a
    time: nothing of size N³ is ever kept for the backward pass.
    """

    @staticmethod
    def forward(ctx, student, teacher):
        B, N, _ = student.shape
        inverse_s, inverse_t = (torch.where(x > 0, x, torch.inf).rsqrt()  # 1 / d, 0 where d = 0
                                for x in (student, teacher))
        same = torch.eye(N, dtype=torch.bool, device=student.device)  # i = k is no triplet
        total, gradient = student.new_zeros(()), torch.zeros_like(student)
        chunk = max(1, (2**17 if student.device.type == "cpu" else 2**23) // (B * N * N))

        def cosine(squares, inverse, j):
            half = 0.5 * inverse[:, j, :, None] * inverse[:, j, None, :]  # 1 / (2 d_ji d_jk)
            return half, (squares[:, j, :, None] + squares[:, j, None, :] - squares[:, None]) * half

        for start in range(0, N, chunk):
            j = slice(start, start + chunk)
            half, cos = cosine(student, inverse_s, j)  # (B, chunk, N, N)
            error = (cos - cosine(teacher, inverse_t, j)[1]).masked_fill_(same, 0)
            slope = error.clamp(-1, 1)  # huber'(e)
            total += (slope * (error - 0.5 * slope)).sum()  # = huber(e), inside and outside
            push = half.mul_(slope)
            gradient -= push.sum(1)
            gradient[:, j] += 2 * push.sum(-1) - cos.mul_(slope).sum(-1) * inverse_s[:, j].square()
        triplets = B * N * (N - 1) * (N - 2)
        ctx.save_for_backward(gradient / triplets)
        return total / triplets

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_output):
        return grad_output * ctx.saved_tensors[0], None


def check_points(student, teacher, least):
    """Refuse what has no relation: sets of different size, or of fewer than `least` points."""
    if student.dim() < 2 or student.shape[:-1] != teacher.shape[:-1]:
        raise ValueError(f"student {tuple(student.shape)}, teacher {tuple(teacher.shape)}: both "
                         "must be (..., N, D) with the same N points; only the width D may differ")
    if student.shape[-2] < least:
        raise ValueError(f"{student.shape[-2]} point(s): this relation needs at least {least}; "
                         "use a larger batch")


# ---- what the losses cannot see ----------------------------------------------------------------

def effective_rank(x):
    """exp of the entropy of the normalised singular values of centred (N, D) (Roy & Vetterli 2007).

    Between 1 and min(N, D); falls towards 1 when the features collapse onto a line.
    """
    values = torch.linalg.svdvals((x - x.mean(0)).float().cpu())
    p = values / values.sum().clamp_min(1e-12)
    return torch.exp(-(p * p.clamp_min(1e-12).log()).sum()).item()


def panel(student, teacher):
    """What the losses cannot see, from the points (N, D) of two views, as four numbers.

    effective_rank, of the teacher's points. feature_std: spread of a dimension of the normalised
    points, times sqrt(D): 1 if isotropic, 0 for one point. alignment: mean |s - t|² of two views of
    an image. uniformity: log mean exp(-2|t_i - t_j|²), 0 for one point, lower is more uniform
    (both: Wang & Isola 2020, arXiv 2005.10242).
    """
    s, t = F.normalize(student.detach()), F.normalize(teacher)
    others = (t @ t.T)[~torch.eye(len(t), dtype=torch.bool, device=t.device)]  # cos, i != j
    return dict(effective_rank=effective_rank(teacher),
                feature_std=t.std(0).mean().item() * t.shape[1] ** 0.5,
                alignment=(s - t).square().sum(1).mean().item(),
                uniformity=(4 * others - 4).exp().mean().log().item())
