"""The losses against numbers worked out by hand and against the papers' formulas in float64."""
from functools import partial
from math import isnan, log

import pytest
import torch
from torch.nn.functional import normalize as unit
from torch.testing import assert_close

from conftest import cloud
import losses
from losses import (byol_loss, cka_loss, dino_loss, effective_rank, feature_loss, info_nce_loss,
                    masked_patch_loss, masked_token_loss, move_center, nt_xent_loss,
                    pairwise_distance, panel, pixel_loss, pull_loss, ressl_loss, rkd_angle_loss,
                    rkd_distance_loss)


def rows(*values):
    return torch.tensor(values).float()


def gradient(loss, student, teacher):
    student = student.clone().requires_grad_()
    return torch.autograd.grad(3 * loss(student, teacher), student)[0]  # weight 3, as in a sum


def assert_same(loss, definition, student, teacher, tolerance=1e-4):
    exact = student.double(), teacher.double()
    value, push = definition(*exact).float(), gradient(definition, *exact)
    assert_close(loss(student, teacher), value, rtol=tolerance, atol=0)
    assert (gradient(loss, student, teacher) - push).norm() < tolerance * push.norm()


# ---------- numbers worked out by hand ----------

TRIANGLE = rows([0, 0], [3, 0], [0, 4])  # sides 3, 4, 5 over their mean 4: .75, 1, 1.25
EQUILATERAL = rows([0, 0], [1, 0], [0.5, 0.75**0.5])  # all cosines .5, the triangle's 0, .6, .8
LINE = rows([0], [1], [2])  # distances over their mean: .75, 1.5, .75; cosines 1, -1, 1
TWINS = rows([0], [0], [3])  # distances over their mean: 0, 1.5, 1.5; cosines 0, 0, 1
ONE_POINT = torch.ones(3, 2)  # collapsed: all distances 0, all cosines 0
FAR = rows([0], [0], [0], [0], [0], [1])  # 10 pairs at 0, 5 pairs at 3 times the mean
COMPASS = rows([1, 0], [-1, 0], [0, 1], [0, -1])
EAST_WEST, NORTH_SOUTH = COMPASS[:2], COMPASS[2:]
EYE, POINTS, ZEROS = torch.eye(4), cloud(3, 5, 4), torch.zeros(3, 5, 4)
HIDDEN = torch.tensor([[1, 0, 1, 1, 0], [0, 0, 1, 0, 0], [0, 0, 0, 0, 0]]).bool()  # 3, 1 and 0
CENTER = cloud(4, seed=3).requires_grad_()  # no loss may give it a gradient
sharpened, equal_sides = (partial(rkd_distance_loss, power=power) for power in (2, 0))
pixels, tokens = partial(pixel_loss, mask=HIDDEN), partial(masked_token_loss, mask=HIDDEN)


@pytest.mark.parametrize("name, loss, student, teacher, value", [
    # huber(e) is e²/2 up to 1 and |e| - 1/2 beyond; the mean is over distinct pairs and triplets
    ("distance", rkd_distance_loss, LINE, TRIANGLE, 1 / 12),  # errors 0, .5, -.5
    ("error over 1", rkd_distance_loss, FAR, torch.eye(6), (10 * .5 + 5 * 1.5) / 15),
    ("copies", rkd_distance_loss, TWINS, TRIANGLE, (.75**2 + .5**2 + .25**2) / 2 / 3),
    ("collapsed", rkd_distance_loss, ONE_POINT, TRIANGLE, (.75**2 / 2 + .5 + .75) / 3),
    # power 2: the triangle's sides 9, 16, 25 over their mean: .54, .96, 1.5; power 0: 1, 1, 1
    ("power 2", sharpened, LINE, TRIANGLE, (.21**2 + .54**2 + .75**2) / 2 / 3),
    ("power 0", equal_sides, LINE, ONE_POINT, (.25**2 + .5**2 + .25**2) / 2 / 3),
    ("angle", rkd_angle_loss, EQUILATERAL, TRIANGLE, (.5**2 + .1**2 + .3**2) / 2 / 3),
    ("error over 1", rkd_angle_loss, LINE, LINE[[1, 0, 2]], (1.5 + 1.5 + 0) / 3),
    ("copies", rkd_angle_loss, TWINS, TRIANGLE, (.6**2 + .2**2) / 2 / 3),
    ("collapsed", rkd_angle_loss, ONE_POINT, TRIANGLE, (.6**2 + .8**2) / 2 / 3),
    ("one of two axes", cka_loss, COMPASS[:, :1], COMPASS, 1 - 0.5**0.5),
    ("all alike", partial(info_nce_loss, temperature=0.1), ONE_POINT, ONE_POINT, log(3)),
    ("all alike", partial(nt_xent_loss, temperature=0.1), ONE_POINT, ONE_POINT, log(2 * 3 - 1)),
    # odds of 3 against 3 orthogonal negatives, and of 4 against 4
    ("odds", partial(info_nce_loss, temperature=1 / log(3)), 7 * EYE, EYE, log(2)),
    ("odds", partial(nt_xent_loss, temperature=1 / log(4)), 7 * EYE[:3], EYE[:3], log(2)),
    ("orthogonal", byol_loss, EAST_WEST, NORTH_SOUTH, 2),
    ("opposite", byol_loss, EAST_WEST, -EAST_WEST, 4),
    ("orthogonal", pull_loss, EAST_WEST, NORTH_SOUTH, 2),
    ("uniform", partial(dino_loss, center=CENTER), ZEROS[0], POINTS[0], log(4)),
    ("uniform", tokens, ZEROS, torch.ones(3, 5).long(), log(4)),
    # standardised patches of P values have unbiased variance 1: their squares sum to P - 1
    ("flat guess", pixels, ZEROS, 100 * POINTS, 3 / 4),
    ("constant patch", pixels, ZEROS, ZEROS + 5, 0),
    ("a tenth", move_center, rows(1, 0), rows(2, 0).half(), [1.1, 0]),
    ("momentum", partial(move_center, momentum=0.25), rows(1, 0), rows(2, 0).half(), [1.75, 0]),
    ("sides", lambda x, _: pairwise_distance(x), TRIANGLE, 0, [[0, 3, 4], [3, 0, 5], [4, 5, 0]]),
    *[("equal", loss, POINTS[0], POINTS[0], 0) for loss in
      (rkd_distance_loss, rkd_angle_loss, cka_loss, byol_loss, pull_loss)]])
def test_loss_equals_the_number_worked_out_by_hand(name, loss, student, teacher, value):
    assert_close(loss(student, teacher), torch.tensor(value).float(), rtol=1e-5, atol=1e-6)


# ---------- the papers' formulas, written out ----------

def average(values):
    return sum(values) / len(values)


def huber(e):
    return torch.where(e.abs() < 1, e**2 / 2, e.abs() - 0.5)


def distance_definition(student, teacher, power=1):  # of Park et al.; a power of the teacher's
    i, j = (~torch.eye(len(student)).bool()).nonzero().T  # all ordered pairs
    s, t = (student[i] - student[j]).norm(dim=-1), (teacher[i] - teacher[j]).norm(dim=-1)**power
    return huber(s / s.mean() - t / t.mean()).mean()


def all_cosines(x):
    """Eq. 8: (N, D) -> [j, i, k], the cosine at x_j; 0 where a side has no length."""
    sides = x.unsqueeze(0) - x.unsqueeze(1)
    apart, directions = sides.any(-1), torch.zeros_like(sides)
    directions[apart] = unit(sides[apart], dim=-1)
    return directions @ directions.mT


def angle_definition(student, teacher, vertices=None):  # at the first vertices j
    other = ~torch.eye(len(student)).bool()
    triplets = other[:, :, None] & other[:, None, :] & other[None]  # j != i, j != k, i != k
    triplets = triplets & (torch.arange(len(student)) < (vertices or len(student)))[:, None, None]
    return huber(all_cosines(student) - all_cosines(teacher))[triplets].mean()


def cka_definition(s, t):
    H = torch.eye(len(s)).double() - 1 / len(s)
    K, L = H @ s @ s.T @ H, H @ t @ t.T @ H
    return 1 - (K * L).sum() / (K.norm() * L.norm())


def similarities(x, others, temperature):
    return (torch.stack([x @ y / (x.norm() * y.norm()) for y in others]) / temperature).softmax(0)


def ressl_definition(s, t, student_temperature=0.1, teacher_temperature=0.04):
    values = []
    for i in range(len(s)):
        p = similarities(s[i], [*s[:i], *s[i + 1:]], student_temperature)
        q = similarities(t[i], [*t[:i], *t[i + 1:]], teacher_temperature)
        values.append((q * (q / p).log()).sum())
    return average(values)


def info_nce_definition(query, key, temperature=0.2):
    return average([-similarities(q, key, temperature)[i].log() for i, q in enumerate(query)])


def nt_xent_definition(a, b, temperature=0.2):
    N, views = len(a), [*a, *b]
    others = [[views[i - N]] + [view for n, view in enumerate(views) if n % N != i % N]
              for i in range(2 * N)]  # the positive comes first
    return average([-similarities(x, y, temperature)[0].log() for x, y in zip(views, others)])


def byol_definition(p, z):
    return average([(a / a.norm() - b / b.norm()).square().sum() for a, b in zip(p, z)])


def pull_definition(s, t):
    return byol_definition(s - s.mean(0), t - t.mean(0))


def cross_entropy(s, t, student_temperature=0.1, teacher_temperature=0.04):
    target = ((t - CENTER) / teacher_temperature).softmax(0)
    return -(target * (s / student_temperature).softmax(0).log()).sum()


def masked_patch_definition(s, t):
    images = [[cross_entropy(*row, 0.3, 0.7) for row in zip(s[b][HIDDEN[b]], t[b][HIDDEN[b]])]
              for b in (0, 1)]
    return (average(images[0]) + average(images[1]) + 0) / 3  # image 2 hides nothing


def hidden(error):
    return lambda s, t: average([error(s[b, n], t[b, n]) for b, n in HIDDEN.nonzero().tolist()])


LOSSES = dict(
    rkd_distance=(rkd_distance_loss, distance_definition),
    rkd_angle=(rkd_angle_loss, angle_definition),
    cka=(cka_loss, cka_definition),
    ressl=(ressl_loss, ressl_definition),
    info_nce=(partial(info_nce_loss, temperature=0.2), info_nce_definition),
    nt_xent=(partial(nt_xent_loss, temperature=0.2), nt_xent_definition),
    nt_xent_other_side=(lambda b, a: nt_xent_loss(a, b, 0.2), nt_xent_definition),
    byol=(byol_loss, byol_definition),
    pull=(pull_loss, pull_definition),
    dino=(partial(dino_loss, center=CENTER), lambda s, t: average([*map(cross_entropy, s, t)])))
MASKED = dict(
    masked_patch=(partial(masked_patch_loss, center=CENTER, student_temperature=0.3,
                          teacher_temperature=0.7), masked_patch_definition),
    masked_token=(lambda s, t, mask: masked_token_loss(s, t.argmax(-1), mask),
                  hidden(lambda s, t: -s.softmax(0)[t.argmax()].log())),
    mae=(pixel_loss, hidden(lambda s, t: (s - (t - t.mean()) / t.std()).pow(2).mean())),
    simmim=(partial(pixel_loss, normalize=False, p=1), hidden(lambda s, t: (s - t).abs().mean())),
    feature=(feature_loss, hidden(lambda s, t: huber(s - t).mean())),
    dbot=(partial(feature_loss, beta=2), hidden(lambda s, t: 2 * huber((s - t) / 2).mean())))
RELATIONS = ["rkd_distance", "rkd_angle", "cka", "ressl"]
every = pytest.mark.parametrize("name", LOSSES | MASKED)
masked = pytest.mark.parametrize("name", MASKED)
rkd = pytest.mark.parametrize("name", RELATIONS[:2])


def case(name):
    """The loss, and a student and a teacher of 7 points, or of 3 images of 5 patches."""
    if name in MASKED:
        return partial(MASKED[name][0], mask=HIDDEN), 2 * cloud(3, 5, 4), 2 * cloud(3, 5, 4, seed=1)
    student, teacher = 2 * cloud(7, 4), 2 * cloud(7, 6 if name in RELATIONS else 4, seed=1)
    student[0] *= 5  # so that distances differ by more than 1
    student[6], teacher[5] = student[2], teacher[1]  # points that coincide
    return LOSSES[name][0], student, teacher


@every
def test_loss_and_gradient_equal_the_papers_formula_in_float64(name):
    loss, student, teacher = case(name)
    assert_same(loss, (LOSSES | MASKED)[name][1], student, teacher)


@pytest.mark.parametrize("name", [name for name in LOSSES | MASKED if "nt_xent" not in name])
def test_gradient_reaches_the_student_and_never_teacher_target_key_or_center(name):
    loss, student, teacher = case(name)
    loss(student.requires_grad_(), teacher.requires_grad_()).backward()
    assert student.grad.norm() > 1e-3
    assert teacher.grad is None and CENTER.grad is None
    assert not move_center(CENTER, CENTER).requires_grad


@every
def test_order_of_the_images_does_not_matter_but_the_pairing_does(name):
    loss, student, teacher = case(name)
    order = torch.tensor([2, 0, 1] if name in MASKED else [4, 0, 2, 6, 1, 3, 5])
    shuffled = partial(loss, mask=HIDDEN[order]) if name in MASKED else loss
    assert_close(shuffled(student[order], teacher[order]), loss(student, teacher))
    assert (shuffled(student[order], teacher) - loss(student, teacher)).abs() > 1e-4


@every
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_and_autocast_give_the_float32_loss_even_with_a_large_offset(name, dtype):
    loss, *points = case(name)
    half = [(x + 50).to(dtype) for x in points]
    full = [x.float() for x in half]
    in_autocast = torch.autocast("cpu", dtype=dtype)(loss)
    other = {torch.float16: torch.bfloat16, torch.bfloat16: torch.float16}[dtype]
    in_other = torch.autocast("cpu", dtype=other)(loss)
    assert_close(in_other(*half), loss(*half))
    assert loss(*half).dtype == torch.float32 and loss(*half).dim() == 0
    assert_close(loss(*half), loss(*full), rtol=2e-2, atol=1e-6)
    assert_close(gradient(loss, *half).float(), gradient(loss, *full), rtol=2e-2, atol=1e-3)
    assert_close(in_autocast(*full), loss(*full))
    assert_close(gradient(in_autocast, *full), gradient(loss, *full))


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@every
def test_a_loss_shows_a_student_that_is_not_finite(name, value):
    loss, student, teacher = case(name)
    student[(HIDDEN if name in MASKED else 3)] = value
    assert not loss(student, teacher).isfinite()


# ---------- what losses do not see, and where they must be exact ----------

MOVES = dict(
    shift=lambda x: x + 10, scale=lambda x: 7 * x, shrink=lambda x: 1e-10 * x,
    rotation=lambda x: x @ torch.linalg.qr(cloud(4, 4, seed=2).double())[0].float(),
    mirror=lambda x: x * rows(-1, 1, 1, 1), stretch=lambda x: x * rows(3, 1, 1, 1))
IGNORED = dict(  # `shrink` is why the panel is watched: a network that collapses keeps its loss
    **dict.fromkeys(RELATIONS[:3], "shift scale shrink rotation mirror"),
    **dict.fromkeys(["info_nce", "nt_xent", "byol"], "scale shrink"), dino="shift",
    pull="shift scale shrink", ressl="scale shrink rotation mirror")


@pytest.mark.parametrize("move", MOVES)
@pytest.mark.parametrize("name", IGNORED)
def test_loss_ignores_the_moves_in_the_table_on_either_side_and_sees_the_others(name, move):
    loss, student, teacher = LOSSES[name][0], cloud(9, 4), cloud(9, 4, seed=1)
    expected = loss(student, teacher)
    for moved in (loss(MOVES[move](student), teacher), loss(student, MOVES[move](teacher))):
        if move in IGNORED[name].split():
            assert_close(moved, expected, rtol=1e-4, atol=1e-6)
        else:
            assert (moved - expected).abs() > 1e-3


@rkd
def test_relations_of_points_of_any_scale_are_the_same(name):
    loss, student, teacher = LOSSES[name][0], cloud(9, 5), cloud(9, 4, seed=1)
    assert_close(loss(1e-25 * student, 1e15 * teacher), loss(student, teacher))


@pytest.mark.parametrize("name", RELATIONS)
def test_all_points_equal_gives_a_finite_loss_and_gradient(name):
    for points in [(ONE_POINT, TRIANGLE), (TRIANGLE, ONE_POINT), (ONE_POINT, ONE_POINT)]:
        assert LOSSES[name][0](*points).isfinite()
        assert gradient(LOSSES[name][0], *points).isfinite().all()


def test_points_far_from_the_origin_keep_their_distances_and_coincide_within_rounding():
    points = (cloud(64, 32) + 100).double()
    close, same = points + 1e-5 * torch.eye(32)[0], points + 1e-9 * cloud(64, 32, seed=1)
    distances = pairwise_distance(torch.cat([points, close, same]))
    assert_close(distances.diagonal(64)[:64], torch.full((64,), 1e-5), rtol=1e-3, atol=0)
    assert distances.diagonal(128).eq(0).all() and distances.diagonal().eq(0).all()


def test_distances_pass_on_a_gradient_that_is_not_symmetric():
    points, weight = cloud(7, 4), cloud(7, 7, seed=1)
    points[3], (i, j) = points[5], (~torch.eye(7).bool()).nonzero().T  # 3 and 5 coincide

    def exact(x, _):
        apart = (x[i] - x[j]).any(-1)
        return ((x[i] - x[j])[apart].norm(dim=-1) * weight[i, j][apart]).sum()

    assert_same(lambda x, _: (pairwise_distance(x) * weight).sum(), exact, points, points)


@pytest.mark.parametrize("gap", [1, 1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 0])  # against the spread
def test_points_that_nearly_coincide_cost_the_angle_no_digits_on_a_cpu_or_a_gpu(gap):
    def points(D, seed):
        x = cloud(24, D, seed=seed)
        return torch.cat([x, x + gap * cloud(24, D, seed=seed + 9)])

    (student, teacher), N = (points(64, 0), points(5, 1)), 48
    value = angle_definition(student.double(), teacher.double())
    expected = gradient(angle_definition, student.double(), teacher.double())
    on_cpu = rkd_angle_loss(student, teacher), gradient(rkd_angle_loss, student, teacher)
    summed = losses.angles_by_edges(student, teacher, torch.arange(N))
    on_gpu, push = (x.double() / (N * (N - 1) * (N - 2)) for x in summed)
    for loss, found in (on_cpu, (on_gpu, 3 * push)):
        assert_close(loss.double(), value, rtol=1e-5, atol=0)
        assert ((found - expected).norm(dim=1) < 3e-5 * expected.norm(dim=1)).all()  # at each point


def test_angle_loss_is_exact_where_it_is_computed_in_several_parts():
    student, teacher = cloud(130, 6).double(), cloud(130, 5, seed=1).double()
    student[129], teacher[2] = student[40], teacher[128]
    assert_same(rkd_angle_loss, angle_definition, student, teacher, tolerance=1e-5)


def test_angles_at_equal_parts_of_the_vertices_average_to_the_whole():
    order = torch.randperm(12, generator=torch.Generator().manual_seed(0))
    for three in ([slice(at, at + 4) for at in (0, 4, 8)], order.split(4)):
        def parts(student, teacher):
            return sum(rkd_angle_loss(student, teacher, part) for part in three) / 3

        assert_same(parts, rkd_angle_loss, cloud(12, 4), cloud(12, 7, seed=1))


@pytest.mark.parametrize("wrong", [
    slice(0, 0), torch.tensor([], dtype=torch.int64), torch.tensor([0, 5]), torch.tensor([-1]),
    torch.tensor([1, 1]), torch.tensor([True, False]), torch.tensor([[0, 1]]), torch.tensor([1.0]),
    [1, 2]])
def test_impossible_vertices_are_refused(wrong):
    with pytest.raises(ValueError, match="vertices"):
        rkd_angle_loss(cloud(5, 3), cloud(5, 3, seed=1), wrong)


@rkd
def test_what_is_kept_for_the_backward_pass_is_quadratic_in_the_points(name):
    kept, N = [], 128
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        LOSSES[name][0](cloud(N, 4).requires_grad_(), cloud(N, 4, seed=1))
    assert 0 < sum(x.numel() for x in kept) < 16 * N**2


@masked
@pytest.mark.parametrize("value", [7., torch.nan])
def test_visible_patches_change_neither_loss_nor_gradient_and_may_be_left_out(name, value):
    loss, student, teacher = case(name)
    other_s, other_t = (x.masked_fill(~HIDDEN.unsqueeze(-1), value) for x in (student, teacher))
    expected, push = loss(student, teacher), gradient(loss, student, teacher)
    for points in [(other_s, teacher), (student, other_t), (other_s, other_t)]:
        assert_close((loss(*points), gradient(loss, *points)), (expected, push))
    alone = student[HIDDEN], teacher[HIDDEN]
    assert_close((loss(*alone), gradient(loss, *alone)), (expected, push[HIDDEN]))


@masked
def test_nothing_hidden_costs_nothing(name):
    (loss, student, teacher), none = case(name), torch.zeros(3, 5).bool()
    for points in [(student, teacher), (student[none], teacher[none])]:
        assert loss(*points, mask=none) == 0
        assert gradient(partial(loss, mask=none), *points).eq(0).all()


def test_effective_rank_counts_the_directions_that_are_used():
    corners = rows([1, 1], [1, -1], [-1, 1], [-1, -1])
    assert effective_rank(corners + 10) == pytest.approx(2)
    assert effective_rank(LINE.expand(3, 5)) == pytest.approx(1, abs=1e-4)
    # singular values 3 : 1, shares 3/4 and 1/4: exp(entropy) = 4 / 3^(3/4)
    assert effective_rank(corners * torch.tensor([3, 1])) == pytest.approx(4 / 3**0.75)
    assert isnan(effective_rank(ONE_POINT * torch.nan))


def test_panel_shows_the_spread_of_four_directions_and_the_collapse_to_one_point():
    teacher = COMPASS * rows([6], [6], [2], [2])
    seen = panel(COMPASS[[2, 3, 0, 1]], teacher)
    assert seen["effective_rank"] == pytest.approx(4 / 3**0.75)  # of the teacher, with its lengths
    assert seen["feature_std"] == pytest.approx((2 / 3 * 2) ** 0.5)  # of 1, -1, 0, 0; D = 2
    assert seen["alignment"] == pytest.approx(2)  # a right angle
    far, near = torch.tensor([-8., -4]).exp()  # squared distance 4 for 1 of 3 others, 2 for two
    assert seen["uniformity"] == pytest.approx(((far + 2 * near) / 3).log().item())
    collapsed = dict(effective_rank=1, feature_std=0, alignment=0, uniformity=0)
    assert panel(ONE_POINT, ONE_POINT) == pytest.approx(collapsed, abs=1e-5)


# ---------- refusals: one row per kind of mistake ----------

SIZES = r"\(\d+,.*\)"  # the message names the sizes
LEAST = dict(rkd_distance=2, rkd_angle=3, cka=2, ressl=3, info_nce=2, nt_xent=2, pull=2, byol=1)


@pytest.mark.parametrize("loss, student, teacher, words", [
    *[(LOSSES[name][0], cloud(n - 1, 4), cloud(n - 1, 4), f"{n - 1} point.* at least {n}")
      for name, n in LEAST.items()],
    *[(LOSSES[name][0], cloud(5, 4), cloud(6, 4), SIZES) for name in LOSSES],  # two counts
    *[(LOSSES[name][0], cloud(5, 4), cloud(5, 6), SIZES) for name in list(LOSSES)[4:]],  # widths
    *[(LOSSES[name][0], cloud(5), cloud(5), SIZES) for name in LEAST],  # no points
    *[(LOSSES[name][0], POINTS, POINTS, SIZES) for name in LEAST],  # three dimensions
    *[(partial(loss, mask=HIDDEN), POINTS, POINTS[:2], SIZES) for loss, _ in MASKED.values()],
    *[(partial(loss, mask=mask), POINTS, POINTS, f"{SIZES} {mask.dtype}")
      for loss, _ in MASKED.values() for mask in (HIDDEN.float(), HIDDEN[:2], HIDDEN[0], HIDDEN.T)],
    (pixels, POINTS, POINTS[..., :1], SIZES),  # two widths
    (pixels, cloud(15, 4), cloud(15, 4), SIZES),  # rows of the visible patches too
    (partial(dino_loss, center=cloud(3)), POINTS[0], POINTS[0], r"center \(3,\)")])
def test_points_masks_and_centers_that_do_not_fit_are_refused(loss, student, teacher, words):
    with pytest.raises(ValueError, match=words):
        loss(student, teacher)
