"""The mathematics of every objective: pure functions of tensors, each beside its equation.

First the relations that this project is about. Relational knowledge distillation (Park, Kim, Lu,
Cho 2019, arXiv 1904.05068): the student has N points s_1..s_N, the teacher t_1..t_N (one point per
image). The student need not place s_i at t_i. It only has to keep the teacher's *relations*
(section 3.2):

    distance   psi_D(i, j)    = |x_i - x_j| / mean over pairs of |x_a - x_b|     (section 3.2.1)
    angle      psi_A(i, j, k) = cos of the angle at x_j between x_i and x_k      (section 3.2.2)
    loss       mean of huber(psi(student) - psi(teacher))
               huber(e) = e²/2 for |e| <= 1, |e| - 1/2 beyond

Both relations are unchanged when all points are shifted, rotated, mirrored or scaled together. So
student and teacher may differ in width, and no head has to align them. But the loss stays low while
all outputs shrink towards one point: watch `panel` for that collapse, as train.py does. And the
relations do not tie the two views of an image to each other: the small `pull_loss` does.

Then the systems that relations are compared with: other relations, contrast, self-distillation,
masked prediction. The teacher's side (teacher, target, key, center, tokens) never gets a gradient.
All losses are computed in float32, also inside autocast.

Letters: N points, D width, B images, K prototypes, M hidden patches, P values in a patch. Masks:
bool (B, N), True = hidden.
Left out: sampling of triplets (the mean below is exact), L2 normalisation (the caller's choice).
"""
import torch
import torch.nn.functional as F


# ---- relations ---------------------------------------------------------------------------------

def squared_distance(x):
    """Squared distances |x_i - x_j|²: (N, D) -> (N, N), float64 (float32 on MPS).

    |a - b|² = |a|² + |b|² - 2ab costs one matrix product, but the difference cancels digits: in
    float32 no digit is left of points closer than 3e-4 of their norm. Hence the points are centred
    and in float64. A square below rounding is set to 0 and gets no gradient.
    """
    with torch.autocast(x.device.type, enabled=False):
        exact = x.device.type != "mps"  # MPS has no float64
        x = x.double() if exact else x.float()
        x = x - x.mean(0)
        gram = x @ x.T  # (N, N)
        norms = gram.diagonal()
        scale = norms.unsqueeze(1) + norms
        squares = torch.sub(scale, gram, alpha=2)
        return squares.masked_fill_(squares <= (1e-13 if exact else 1e-6) * scale, 0)


def pairwise_distance(x):
    """Euclidean distances |x_i - x_j|: (N, D) -> (N, N), float32, zero diagonal.

    Unchanged by shifts and rotations. O(N²) memory. The slope of a square root at 0 is infinite:
    the gradient of a distance of 0 is set to 0 instead. Needs `squared_distance`.
    """
    squares = squared_distance(x)
    apart = squares != 0  # NaN is not 0 and stays NaN
    return torch.where(apart, squares.masked_fill(~apart, 1).sqrt(), 0).float()


def rkd_distance_loss(student, teacher, power=1.0):
    """RKD-D (Park et al. 2019, section 3.2.1): (N, Ds), (N, Dt) -> float32 scalar.

    Huber (beta = 1) between the two distance matrices, each divided by its own mean over the N(N-1)
    pairs i != j; mean over those pairs. The gradient flows through the student's mean too. The
    original code also averages the N zeros of the diagonal: times N / (N-1) gives ours. Unchanged
    by shift, rotation and scale of either side. N < 2 raises ValueError.
    `power` (ours): the teacher's distances are raised to it first. Above 1 it sharpens them. At 0
    all are equal, a control without any knowledge of the teacher.
    Needs `check_points`, `pairwise_distance`, `squared_distance`.
    """
    check_points(student, teacher, 2)
    N = len(student)

    def over_mean(distances):
        mean = distances.sum() / (N * (N - 1))
        return distances / torch.where(mean > 0, mean, 1)  # all points equal: zeros, not 0 / 0

    target = over_mean(pairwise_distance(teacher.detach()))
    if power != 1:
        others = 1 - torch.eye(N, dtype=target.dtype, device=target.device)
        target = over_mean(target ** power * others)  # 0 ** 0 is 1
    loss = F.smooth_l1_loss(over_mean(pairwise_distance(student)), target)
    return loss * N / (N - 1)  # the diagonal adds zeros


def rkd_angle_loss(student, teacher, vertices=None):
    """RKD-A (Park et al. 2019, section 3.2.2): (N, Ds), (N, Dt) -> float32 scalar.

    Huber (beta = 1) between the cosines at vertex j of every triplet of distinct points; exact mean
    over those N(N-1)(N-2) triplets. The original code averages all N³ entries, also those that are
    zero by construction: times N² / ((N-1)(N-2)) gives ours. A side of length zero counts as cosine
    0. Unchanged by shift, rotation and scale. O(N³) time, O(N²) memory, forward and backward.
    `vertices`, a slice or an int64 tensor of distinct indices (K,): only the triplets with such a
    vertex j, O(N²·K) time. Drawn at random their mean is an unbiased estimate; equal parts average
    to the whole, so that processes can share the work. N < 3, or vertices out of range, repeated or
    none, raise ValueError. Needs `check_points`, `angle_vertices`, `squared_distance`,
    `angles_by_squares` and, on a GPU, `angles_by_edges`.
    """
    check_points(student, teacher, 3)
    N, teacher = len(student), teacher.detach()
    vertices = angle_vertices(vertices, N, student.device)

    def squares(x):  # the largest is 1: angles do not depend on scale
        x = squared_distance(x)
        largest = x.detach().max()
        return x / torch.where(largest > 0, largest, 1)

    if student.device.type == "cpu":
        s, t, summed = squares(student), squares(teacher), angles_by_squares
    else:
        s, t, summed = student.float(), teacher.float(), angles_by_edges
    triplets = len(vertices) * (N - 1) * (N - 2)
    loss, gradient = (x / triplets for x in summed(s, t, vertices))
    # the added term is 0, and its gradient by s is `gradient`
    return (loss + (gradient * (s - s.detach())).sum()).float()


def pull_loss(student, teacher):
    """Mean |s - t|² between the directions of two views of an image: (N, D), (N, D) -> scalar.

    Directions are taken from the batch's mean: seen from the origin, a large common offset would
    satisfy the pull at no cost. 2 for unrelated views, 0 for equal ones. Needs `check_pairs`.
    """
    check_pairs(student, teacher, 2)
    s, t = (F.normalize(x.float() - x.float().mean(0), dim=-1) for x in (student, teacher.detach()))
    return (s - t).square().sum(-1).mean()


# ---- other relations: the study's controls -----------------------------------------------------

def cka_loss(student, teacher):
    """1 - linear CKA (Kornblith et al. 2019, arXiv 1905.00414): (N, Ds), (N, Dt) -> scalar.

    CKA = <K_s, K_t> / (|K_s| |K_t|) with K = X Xᵀ of the centred points, between 0 and 1.
    Unchanged by shift, rotation and scale of either side. Needs `check_points`.
    """
    check_points(student, teacher, 2)

    def kernel(x):  # (N·N,), of length 1; all points equal: zeros
        with torch.autocast(x.device.type, enabled=False):
            x = F.normalize((x.float() - x.float().mean(0)).flatten(), dim=0).view_as(x)
            return F.normalize((x @ x.T).flatten(), dim=0)

    return 1 - (kernel(student) * kernel(teacher.detach())).sum()


def ressl_loss(student, teacher, student_temperature=0.1, teacher_temperature=0.04):
    """Sharpened similarities (ReSSL: Zheng et al. 2021, arXiv 2107.09282): (N, Ds), (N, Dt).

    p_i = softmax over j != i of cos(x_i, x_j) / temperature;  mean over i of KL(p_i of the teacher
    || p_i of the student). The batch stands for ReSSL's queue. Needs `check_points`, `cosines`.
    """
    check_points(student, teacher, 3)

    itself = torch.eye(len(student), dtype=torch.bool, device=student.device)

    def log_p(x, temperature):
        return (cosines(x, x) / temperature).masked_fill(itself, -1e4).log_softmax(1)  # exp is 0

    return F.kl_div(log_p(student, student_temperature),
                    log_p(teacher.detach(), teacher_temperature),
                    reduction="batchmean", log_target=True)


# ---- contrast: which of the images of the batch is it? -----------------------------------------

def cosines(a, b):
    """All cosines between rows: (N, D), (M, D) -> (N, M), float32 also inside autocast."""
    with torch.autocast(a.device.type, enabled=False):
        return F.normalize(a.float(), dim=-1) @ F.normalize(b.float(), dim=-1).mT


def info_nce_loss(query, key, temperature):
    """InfoNCE (van den Oord et al. 2018, arXiv 1807.03748, eq. 4): (N, D), (N, D) -> scalar.

    -log exp(q_i·k_i / temperature) / sum over j of exp(q_i·k_j / temperature), rows normalised
    here, mean over i. log N if all rows are equal. Needs `check_pairs`, `cosines`.
    """
    check_pairs(query, key, 2)
    logits = cosines(query, key.detach()) / temperature
    return F.cross_entropy(logits, torch.arange(len(logits), device=logits.device))


def nt_xent_loss(a, b, temperature):
    """NT-Xent (SimCLR: Chen et al. 2020, arXiv 2002.05709, eq. 1): (N, D), (N, D) -> scalar.

    InfoNCE among all 2N views, with gradient to both sides: the positive of a view is the other
    view of its image, the negatives are the 2N - 2 views of other images. log(2N - 1) if all rows
    are equal. Needs `check_pairs`, `cosines`.
    """
    check_pairs(a, b, 2)
    views = torch.cat([a.float(), b.float()])
    itself = torch.eye(len(views), dtype=torch.bool, device=a.device)
    logits = (cosines(views, views) / temperature).masked_fill(itself, -torch.inf)
    return F.cross_entropy(logits, torch.arange(len(views), device=a.device).roll(len(a)))


# ---- self-distillation: what would the teacher say? --------------------------------------------

def byol_loss(prediction, target):
    """Mean 2 - 2 cos(p, z) (Grill et al. 2020, arXiv 2006.07733, eq. 2): (N, D), (N, D) -> scalar.

    Needs `check_pairs`.
    """
    check_pairs(prediction, target, 1)
    p, z = F.normalize(prediction.float(), dim=-1), F.normalize(target.detach().float(), dim=-1)
    return 2 - 2 * (p * z).sum(-1).mean()


def soft_cross_entropy(student_logits, teacher_logits, center, student_temperature,
                       teacher_temperature):
    """-sum over k of p_t log p_s, p_t centred and sharpened: (..., K), (..., K), (K,) -> (...)."""
    shapes = [tuple(x.shape) for x in (student_logits, teacher_logits, center)]
    if shapes[0] != shapes[1] or shapes[2] != shapes[0][-1:]:
        raise ValueError("student logits {}, teacher logits {} and center {} must be (..., K), "
                         "(..., K) and (K,)".format(*shapes))
    target = (teacher_logits.detach().float() - center.detach().float()) / teacher_temperature
    student = (student_logits.float() / student_temperature).log_softmax(-1)
    return -(target.softmax(-1) * student).sum(-1)


def dino_loss(student_logits, teacher_logits, center, student_temperature=0.1,
              teacher_temperature=0.04):
    """DINO (Caron et al. 2021, arXiv 2104.14294, eq. 1 and 2): (N, K), (N, K), (K,) -> scalar.

    Cross-entropy of softmax(student / student_temperature) against
    softmax((teacher - center) / teacher_temperature), mean over N. log K for uniform prototypes.
    The low teacher temperature sharpens; the centre (`move_center`) keeps one prototype from
    winning everywhere. Needs `soft_cross_entropy`.
    """
    return soft_cross_entropy(student_logits, teacher_logits, center, student_temperature,
                              teacher_temperature).mean()


def move_center(center, batch_mean, momentum=0.9):
    """The centre after a batch (DINO, eq. 4): (K,), mean of all teacher logits (K,) -> (K,)."""
    return momentum * center.detach() + (1 - momentum) * batch_mean.detach().float()


def masked_patch_loss(student_logits, teacher_logits, mask, center, student_temperature=0.1,
                      teacher_temperature=0.04):
    """iBOT's patch term (Zhou et al. 2022, arXiv 2111.07832, eq. 3) -> scalar.

    DINO's cross-entropy at the hidden patches: mean over those of an image, then over the images.
    An image that hides nothing counts 0. Logits (B, N, K), or of the hidden patches alone (M, K).
    Needs `hidden_rows`, `soft_cross_entropy`.
    """
    student, teacher = (hidden_rows(x, mask) for x in (student_logits, teacher_logits))
    weight = mask / (mask.sum(1, keepdim=True).clamp_min(1) * len(mask))  # (B, N)
    loss = soft_cross_entropy(student, teacher, center, student_temperature, teacher_temperature)
    weight = weight[mask]  # (M,)
    if loss.is_cuda and not mask.is_cuda:
        weight = weight.pin_memory()  # the GPU need not wait for the copy
    return (loss * weight.to(loss.device, non_blocking=True)).sum()


# ---- masked prediction: what is under the mask? ------------------------------------------------
# Each takes patches (B, N, D) or, which can be cheaper, the hidden patches alone, (M, D).

def hidden_rows(x, mask):
    """(B, N, D) -> the rows of its hidden patches (M, D), in the order of x[mask]."""
    rows = x.dim() == 2 and len(x) == int(mask.sum())
    if mask.dtype != torch.bool or mask.dim() != 2 or not (rows or x.shape[:-1] == mask.shape):
        raise ValueError(f"mask {tuple(mask.shape)} {mask.dtype} must be bool (B, N), True = "
                         f"hidden, for (B, N, D) or its hidden rows (M, D), not {tuple(x.shape)}")
    return x if rows else x[mask]


def average(error):
    """The mean of all entries, 0 if there are none."""
    return error.sum() / max(1, error.numel())


def masked_token_loss(logits, tokens, mask):
    """BEiT (Bao et al. 2021, arXiv 2106.08254, eq. 1): cross-entropy at the hidden patches.

    Logits (B, N, K), tokens (B, N) int64 -> scalar, the mean over all hidden patches of the batch;
    log K for a uniform guess. Needs `hidden_rows`, `average`.
    """
    logits, tokens = hidden_rows(logits, mask), hidden_rows(tokens.unsqueeze(-1), mask)
    return average(F.cross_entropy(logits.float(), tokens.squeeze(-1), reduction="none"))


def standardize(patches):
    """(..., P) -> each patch with mean 0 and (unbiased) variance 1 of its own (MAE, section 3)."""
    centred = patches.float() - patches.float().mean(-1, keepdim=True)
    variance = centred.square().sum(-1, keepdim=True) / (patches.shape[-1] - 1)
    return centred / (variance + 1e-6).sqrt()


def pixel_loss(prediction, patches, mask, normalize=True, p=2):
    """Mean |prediction - pixels|^p over the hidden patches: (B, N, P), (B, N, P), (B, N) -> scalar.

    MAE (He et al. 2021, arXiv 2111.06377): p = 2, each target patch standardised, so that a flat
    guess has error (P-1)/P. SimMIM (Xie et al. 2021, arXiv 2111.09886): p = 1, normalize=False.
    Needs `hidden_rows`, `standardize`, `average`.
    """
    prediction, patches = (hidden_rows(x, mask) for x in (prediction, patches.detach()))
    if prediction.shape != patches.shape:
        raise ValueError(f"{tuple(prediction.shape)}, {tuple(patches.shape)} must be one shape")
    target = standardize(patches) if normalize else patches.float()
    return average((prediction.float() - target).abs() ** p)


def feature_loss(prediction, target, mask, beta=1.0):
    """Smooth L1 to the teacher's features at the hidden patches: (B, N, D) twice, (B, N) -> scalar.

    dBOT (Liu et al. 2022, arXiv 2209.03917). Mean over the hidden patches of the batch: e²/(2 beta)
    for |e| < beta, |e| - beta/2 beyond (dBOT's code: beta = 2). The caller normalises the target.
    Needs `hidden_rows`, `check_pairs`, `average`.
    """
    prediction, target = (hidden_rows(x, mask) for x in (prediction, target.detach()))
    check_pairs(prediction, target, 0)
    error = F.smooth_l1_loss(prediction.float(), target.float(), reduction="none", beta=beta)
    return average(error)


# ---- what the losses cannot see ----------------------------------------------------------------

def effective_rank(x):
    """exp of the entropy of the normalised singular values of centred (N, D) (Roy & Vetterli 2007).

    Between 1 and min(N, D); falls towards 1 when the features collapse onto a line. NaN where a
    feature is not finite.
    """
    x = (x - x.mean(0)).float().cpu()
    if not x.isfinite().all():  # LAPACK would not return
        return torch.nan
    values = torch.linalg.svdvals(x)
    p = values / values.sum().clamp_min(1e-12)
    return torch.exp(-(p * p.clamp_min(1e-12).log()).sum()).item()


def panel(student, teacher):
    """Signs of collapse as numbers, from the points (N, D) of two views.

    effective_rank, of the teacher's points. feature_std: spread of a dimension of the normalised
    points, times sqrt(D): 1 if isotropic, 0 for one point. uniformity: log mean over pairs of
    exp(-2|t_i - t_j|²), 0 for one point, lower is more uniform. alignment: mean |s - t|² of two
    views of an image, left out if `student` is None. (The last two: Wang & Isola 2020, arXiv
    2005.10242.) Needs `effective_rank`.
    """
    t = F.normalize(teacher)
    others = (t @ t.T)[~torch.eye(len(t), dtype=torch.bool, device=t.device)]  # cos, i != j
    seen = dict(effective_rank=effective_rank(teacher),
                feature_std=t.std(0).mean().item() * t.shape[1] ** 0.5,
                uniformity=(4 * others - 4).exp().mean().log().item())
    if student is not None:
        seen["alignment"] = (F.normalize(student.detach()) - t).square().sum(1).mean().item()
    return seen


# ---- the sum of angle errors over all triplets, a few vertices at a time -----------------------

@torch.no_grad()
def angles_by_squares(student, teacher, vertices):
    """Sum of huber over all triplets of two (N, N) matrices of squared distances S, on a CPU.

    By the law of cosines, with the gradient by the student's S in closed form, (N, N):

        c_ik = cos at j = (S_ji + S_jk - S_ik) / (2 d_ji d_jk)
        dc_ik / dS_ik = -1 / (2 d_ji d_jk)
        dc_ik / dS_ji = 1 / (2 d_ji d_jk) - c_ik / (2 S_ji)         (and S_jk alike)

    The gradient is summed in the same pass, a few vertices j at a time, so nothing of size N³ is
    ever kept. Where i and j are much closer to each other than to k, S_jk - S_ik has few digits:
    then all is computed in float64.
    """
    N = len(student)
    exact = any(((x > 0) & (x < 1e-4)).any() for x in (student, teacher))  # d < largest / 100
    if not exact:
        student, teacher = student.float(), teacher.float()

    def cosines(S, j):
        """1 / d_ji (K, N), 1 / (2 d_ji d_jk) and c_ik (K, N, N)."""
        sides = S[j]
        inverse = torch.where(sides > 0, sides, torch.inf).rsqrt()  # 0 where d = 0
        half = inverse.unsqueeze(2) * (inverse.unsqueeze(1) / 2)
        cos = (sides.unsqueeze(2) + sides.unsqueeze(1)).sub_(S).mul_(half)
        return inverse, half, cos

    total, gradient = student.new_zeros(()), torch.zeros_like(student)
    for j in vertices.split(max(1, 2**16 // N**2)):
        inverse, half, cos = cosines(student, j)
        error = cos - cosines(teacher, j)[2]
        error.diagonal(dim1=-2, dim2=-1).zero_()  # i = k is no triplet
        slope = error.clamp(-1, 1)  # huber'(e)
        total += error.sub_(slope, alpha=0.5).mul_(slope).sum()  # huber(e), inside and outside
        push, turn = half.mul_(slope), cos.mul_(slope)
        gradient -= push.sum(0)  # by S_ik; then by S_ji and S_jk, alike since c_ik = c_ki
        gradient[j] += 2 * push.sum(2) - turn.sum(2) * inverse.square()
    return total, gradient


@torch.no_grad()
def angles_by_edges(student, teacher, vertices):
    """The same sum from points (N, D), and its gradient by the student's points, on a GPU.

    With unit edges e_ji = (x_i - x_j) / |x_i - x_j| the cosine is c_ik = e_ji e_jk. This costs D
    times the work of the law of cosines, but in matrix products, which a GPU computes fastest, and
    float32 keeps all digits. The gradient by an edge, e = e_ji:

        push = 2 sum over k of huber'_ik e_jk,  less its part along e,  divided by d_ji
    """
    N, D = student.shape

    def unit_edges(x, j):
        edges = x - x[j].unsqueeze(1)  # (K, N, D)
        squares = edges.square().sum(-1, keepdim=True)
        inverse = torch.where(squares > 0, squares, torch.inf).rsqrt()  # 1 / d, 0 where d = 0
        return edges * inverse, inverse

    total, gradient = student.new_zeros(()), torch.zeros_like(student)
    with torch.autocast(student.device.type, enabled=False):
        for j in vertices.split(max(1, 2**25 // (N * max(N, D)))):
            (e, inverse), (other, _) = unit_edges(student, j), unit_edges(teacher, j)
            error = (e @ e.mT).sub_(other @ other.mT)  # (K, N, N)
            error.diagonal(dim1=-2, dim2=-1).zero_()  # i = k is no triplet
            slope = error.clamp(-1, 1)  # huber'(e)
            flat = slope.flatten()
            total += error.flatten() @ flat - (flat @ flat) / 2
            push = slope @ e
            push = (push - (push * e).sum(-1, keepdim=True) * e) * (2 * inverse)
            gradient += push.sum(0)
            gradient[j] -= push.sum(1)
    return total, gradient


# ---- bad input ---------------------------------------------------------------------------------

def angle_vertices(vertices, N, device):
    """A slice, a tensor of indices or None (all) -> indices (K,) of N points, checked."""
    if vertices is None or isinstance(vertices, slice):
        vertices = torch.arange(N)[vertices or slice(None)]
    else:
        right = isinstance(vertices, torch.Tensor)
        if right and vertices.device.type == "cpu":  # on a GPU this would wait for it
            right = (vertices.dtype == torch.int64 and vertices.shape == vertices.unique().shape
                     and vertices.ge(0).all() and vertices.lt(N).all())
        if not right:
            raise ValueError(f"vertices {vertices} must be a slice, or distinct int64 indices "
                             f"below {N} in a tensor")
    if not len(vertices):
        raise ValueError("no vertices: an angle needs at least one")
    pinned = device.type == "cuda" and vertices.device.type == "cpu"  # a GPU need not wait then
    return (vertices.pin_memory() if pinned else vertices).to(device, non_blocking=True)


def check_points(student, teacher, least):
    """Refuse points that differ in their number, or fewer than `least` of them."""
    if not student.dim() == teacher.dim() == 2 or len(student) != len(teacher):
        raise ValueError(f"student {tuple(student.shape)}, teacher {tuple(teacher.shape)}: both "
                         "must be (N, D) with the same N points; only the width D may differ")
    if len(student) < least:
        raise ValueError(f"{len(student)} point(s): this relation needs at least {least}; use a "
                         "larger batch")


def check_pairs(a, b, least):
    """Refuse rows that do not belong to each other, or fewer than `least` of them."""
    if a.dim() != 2 or a.shape != b.shape:
        raise ValueError(f"{tuple(a.shape)} and {tuple(b.shape)}: both sides must have one shape "
                         "(N, D), row i of one belonging to row i of the other")
    if len(a) < least:
        raise ValueError(f"{len(a)} point(s): this loss needs at least {least}; use a larger batch")
