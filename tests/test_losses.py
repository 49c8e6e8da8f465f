"""The losses and their instruments against numbers worked out by hand and, for the losses, against
their definition written out in float64.

    pytest tests/test_losses.py
"""
import re
from functools import partial
from itertools import permutations
from math import log

import pytest
import torch
from torch.nn.functional import normalize as unit
from torch.testing import assert_close

from losses import (byol_loss, cka_loss, cosines, dino_loss, effective_rank, feature_loss,
                    info_nce_loss, masked_patch_loss, masked_token_loss, move_center,
                    nt_xent_loss, pairwise_distance, panel, pixel_loss, pull_loss, ressl_loss,
                    rkd_angle_loss, rkd_distance_loss, soft_cross_entropy, standardize)

LOSSES = [rkd_distance_loss, rkd_angle_loss]
both = pytest.mark.parametrize("loss", LOSSES)
TRIANGLE = torch.tensor([[0., 0], [3, 0], [0, 4]])  # sides 01: 3, 02: 4, 12: 5
EQUILATERAL = torch.tensor([[0., 0], [1, 0], [0.5, 0.75**0.5]])
LINE = torch.tensor([[0.], [1], [2]])
ONE_POINT = torch.ones(3, 2)


def cloud(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def huber(e):
    return torch.where(e.abs() < 1, e**2 / 2, e.abs() - 0.5)


def distance_definition(student, teacher):
    """Eq. 5-7 in float64, from differences of points and a list of all ordered pairs."""
    i, j = torch.tensor(list(permutations(range(len(student)), 2))).T
    s, t = ((x.double()[i] - x.double()[j]).norm(dim=-1) for x in (student, teacher))
    return huber(s / s.mean() - t / t.mean()).mean()


def angle_definition(student, teacher):
    """Eq. 8-9 in float64, from unit vectors and a list of all ordered triplets."""
    def cosine(x):
        a, b = x[i] - x[j], x[k] - x[j]
        cos, both_sides = torch.zeros(len(i)).double(), a.any(-1) & b.any(-1)
        cos[both_sides] = (unit(a[both_sides], dim=-1) * unit(b[both_sides], dim=-1)).sum(-1)
        return cos  # 0 where a side has no length

    i, j, k = torch.tensor(list(permutations(range(len(student)), 3))).T
    return huber(cosine(student.double()) - cosine(teacher.double())).mean()


DEFINITION = {rkd_distance_loss: distance_definition, rkd_angle_loss: angle_definition}


def gradient(loss, student, teacher):
    student = student.clone().requires_grad_()
    return torch.autograd.grad(loss(student, teacher), student)[0]


# ---------- numbers worked out by hand ----------

def test_distances_of_the_triangle_are_3_4_5():
    expected = torch.tensor([[0., 3, 4], [3, 0, 5], [4, 5, 0]])
    assert_close(pairwise_distance(TRIANGLE), expected)


def test_line_against_triangle_has_distance_loss_one_twelfth():
    # triangle / its mean 4: .75, 1, 1.25; line: 1, 2, 1 / (4/3) = .75, 1.5, .75; errors 0, .5, -.5
    assert_close(rkd_distance_loss(LINE, TRIANGLE), torch.tensor(1 / 12))


def test_the_original_code_averages_the_zero_diagonal_in():
    target = torch.tensor([[0, .75, 1], [.75, 0, 1.25], [1, 1.25, 0]])
    line = torch.tensor([[0, .75, 1.5], [.75, 0, .75], [1.5, .75, 0]])
    original = torch.nn.functional.smooth_l1_loss(line, target)  # over all 9 entries
    assert_close(original, torch.tensor(1 / 18))
    assert_close(rkd_distance_loss(LINE, TRIANGLE) * (3 - 1) / 3, original)


def test_distance_loss_grows_linearly_beyond_an_error_of_one():
    # five points at 0, one at 1: 10 pairs of 0 and 5 of 1, over their mean 1/3: 0 and 3
    # the teacher's are all 1: errors -1 and 2, huber 1/2 and 2 - 1/2
    far = torch.tensor([[0.], [0], [0], [0], [0], [1]])
    assert_close(rkd_distance_loss(far, torch.eye(6)), torch.tensor((10 * .5 + 5 * 1.5) / 15))


def test_a_power_sharpens_the_teachers_distances_and_0_makes_them_equal():
    # 9, 16, 25 / (50/3): .54, .96, 1.5; line .75, 1.5, .75: errors .21, .54, -.75
    expected = torch.tensor((.21**2 + .54**2 + .75**2) / 2 / 3)
    assert_close(rkd_distance_loss(LINE, TRIANGLE, power=2), expected)
    for teacher in (TRIANGLE, ONE_POINT):  # errors -.25, .5, -.25, whoever teaches
        assert_close(rkd_distance_loss(LINE, teacher, power=0), torch.tensor(.375 / 2 / 3))
    assert_close(rkd_distance_loss(EQUILATERAL, LINE, power=0), torch.tensor(0.))


def test_equilateral_against_triangle_has_the_angle_loss_of_six_triplets():
    # cosines .5 against 0, .6, .8: (.5² + .1² + .3²) / 2 / 3 = .35 / 6
    assert_close(rkd_angle_loss(EQUILATERAL, TRIANGLE), torch.tensor(0.35 / 6))


def test_the_original_code_averages_the_angle_over_all_27_entries():
    total, entries = 0, 0
    for i, j, k in [(i, j, k) for i in range(3) for j in range(3) for k in range(3)]:
        a, b = (unit(x[i] - x[j], dim=0) @ unit(x[k] - x[j], dim=0)
                for x in (EQUILATERAL, TRIANGLE))
        total, entries = total + huber(a - b), entries + 1
    assert_close(total / entries, torch.tensor(0.35 / 27))  # 0.0130
    assert_close(rkd_angle_loss(EQUILATERAL, TRIANGLE) * (3 - 1) * (3 - 2) / 3**2, total / entries)


def test_angle_loss_is_linear_beyond_an_error_of_one():
    # a line has cosines 1, -1, 1; with the middle elsewhere -1, 1, 1: errors 2, 2, 0, huber 3/2
    assert_close(rkd_angle_loss(LINE, LINE[[1, 0, 2]]), torch.tensor(1.0))


def test_one_point_against_triangle_has_finite_positive_losses():
    # collapse: distances 0 against .75, 1, 1.25; cosines 0 against 0, .6, .8
    assert_close(rkd_distance_loss(ONE_POINT, TRIANGLE), torch.tensor((.75**2 / 2 + .5 + .75) / 3))
    assert_close(rkd_angle_loss(ONE_POINT, TRIANGLE), torch.tensor((.6**2 + .8**2) / 2 / 3))


# ---------- the definition, written out ----------

@both
@pytest.mark.parametrize("N", [3, 37, 60])
def test_loss_equals_its_definition(loss, N):
    student, teacher = cloud(N, 4), cloud(N, 7, seed=1)
    student[0] *= 20  # errors on both sides of one
    expected = DEFINITION[loss](student, teacher).float()
    assert_close(loss(student, teacher), expected, rtol=1e-4, atol=0)


@both
@pytest.mark.parametrize("N", [3, 37, 60])
def test_gradient_equals_that_of_the_definition(loss, N):
    student, teacher = cloud(N, 4), cloud(N, 7, seed=1)
    student[0] *= 20
    expected = gradient(DEFINITION[loss], student, teacher)
    error = (gradient(loss, student, teacher) - expected).norm()
    assert error < 1e-4 * expected.norm()


def test_angle_loss_is_exact_when_it_takes_the_vertices_in_several_parts():
    students, teachers = cloud(2, 61, 4), cloud(2, 61, 5, seed=1)  # 2 · 61³ cosines: 4 parts
    expected = sum(angle_definition(s, t) for s, t in zip(students, teachers)) / 2
    assert_close(rkd_angle_loss(students, teachers), expected.float(), rtol=1e-4, atol=0)
    expected = [gradient(angle_definition, s, t) / 2 for s, t in zip(students, teachers)]
    error = (gradient(rkd_angle_loss, students, teachers) - torch.stack(expected)).norm()
    assert error < 1e-4 * torch.stack(expected).norm()


@pytest.mark.parametrize("N", [70, 130])  # blocks of 32 rows: one of 6, one of 2 at the end
def test_angle_loss_is_exact_in_several_blocks_with_copies_and_in_half_precision(N):
    student, teacher = cloud(N, 6).half(), cloud(N, 5, seed=1).half()
    student[1], student[N - 1], teacher[2] = student[0], student[40], teacher[N - 2]
    expected = angle_definition(student, teacher).float()
    assert_close(rkd_angle_loss(student, teacher), expected, rtol=1e-5, atol=0)
    push = gradient(angle_definition, student.double(), teacher)
    error = gradient(rkd_angle_loss, student.double(), teacher) - push
    assert error.norm() < 1e-5 * push.norm()


@pytest.mark.parametrize("apart", [1e-1, 1e-2, 1e-3, 1e-4, 1e-5])
def test_points_that_nearly_coincide_cost_the_angle_no_digits(apart):
    student, teacher = cloud(12, 64), cloud(12, 5, seed=1)
    student[1] = student[0] + apart * cloud(64, seed=2)
    teacher[3] = teacher[2] + apart * cloud(5, seed=3)
    expected = gradient(angle_definition, student.double(), teacher)
    error = (gradient(rkd_angle_loss, student, teacher) - expected).norm(dim=1)
    assert (error < 3e-5 * expected.norm(dim=1)).all()  # of each point: those two are pushed most


def test_angles_at_parts_of_the_vertices_average_to_those_at_all():
    def parts(student, teacher):
        return sum(rkd_angle_loss(student, teacher, slice(at, at + 4)) for at in (0, 4, 8)) / 3

    student, teacher = cloud(12, 4), cloud(12, 7, seed=1)
    assert_close(parts(student, teacher), rkd_angle_loss(student, teacher))
    assert_close(gradient(parts, student, teacher), gradient(rkd_angle_loss, student, teacher))


@both
def test_relations_compile_to_one_graph(loss):
    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    student, teacher = cloud(12, 4), cloud(12, 7, seed=1)
    assert_close(compiled(student, teacher), loss(student, teacher))
    assert_close(gradient(compiled, student, teacher), gradient(loss, student, teacher))


@both
def test_gradient_equals_finite_differences_of_the_definition(loss):
    student, teacher, step = cloud(5, 2), cloud(5, 3, seed=1), 1e-5
    expected = torch.zeros(5, 2)
    for place in [(i, d) for i in range(5) for d in range(2)]:
        move = torch.zeros(5, 2, dtype=torch.float64)
        move[place] = step
        up, down = (DEFINITION[loss](student + sign * move, teacher) for sign in (1, -1))
        expected[place] = (up - down) / (2 * step)
    assert_close(gradient(loss, student, teacher), expected, rtol=1e-4, atol=1e-6)


@both
def test_gradient_follows_the_weight_of_the_loss(loss):
    student, teacher = cloud(6, 3), cloud(6, 3, seed=1)
    weighted = gradient(lambda s, t: 3 * loss(s, t), student, teacher)
    assert_close(weighted, 3 * gradient(loss, student, teacher))


# ---------- what the relations do not see ----------

ROTATION = torch.linalg.qr(cloud(5, 5, seed=2).double())[0].float()
MOVES = dict(shift=lambda x: x + 10, scale=lambda x: 7 * x, rotation=lambda x: x @ ROTATION,
             mirror=lambda x: x * torch.tensor([-1., 1, 1, 1, 1]),
             shrink=lambda x: 1e-6 * x, vanish=lambda x: 1e-25 * x)


@both
@pytest.mark.parametrize("move", MOVES.values(), ids=MOVES)
def test_loss_ignores_shift_rotation_mirror_and_scale_of_either_side(loss, move):
    # `shrink` is why train.py watches the spread: a network that collapses keeps its loss
    student, teacher = cloud(9, 5), cloud(9, 5, seed=1)
    expected = loss(student, teacher)
    assert_close(loss(move(student), teacher), expected, rtol=1e-4, atol=0)
    assert_close(loss(student, move(teacher)), expected, rtol=1e-4, atol=0)


@both
def test_loss_sees_a_stretch_along_one_axis(loss):
    points = cloud(9, 5)
    assert loss(points * torch.tensor([3., 1, 1, 1, 1]), points) > 1e-3


@both
def test_equal_inputs_give_zero(loss):
    assert_close(loss(cloud(9, 5), cloud(9, 5)), torch.tensor(0.0), rtol=0, atol=1e-9)


@both
def test_more_dimensions_with_nothing_in_them_change_nothing(loss):
    student, teacher = cloud(9, 5), cloud(9, 3, seed=1)
    wider = torch.cat([teacher, torch.zeros(9, 6)], 1)
    assert_close(loss(student, wider), loss(student, teacher))


@both
def test_order_of_the_batch_does_not_matter(loss):
    student, teacher = cloud(9, 5), cloud(9, 3, seed=1)
    order = torch.tensor([4, 0, 8, 2, 6, 1, 7, 3, 5])
    assert_close(loss(student[order], teacher[order]), loss(student, teacher))
    assert (loss(student[order], teacher) - loss(student, teacher)).abs() > 1e-4  # the pairing does


@both
def test_gradient_never_reaches_the_teacher(loss):
    student, teacher = cloud(9, 5).requires_grad_(), cloud(9, 3, seed=1).requires_grad_()
    loss(student, teacher).backward()
    assert teacher.grad is None
    assert student.grad.norm() > 1e-3


@both
def test_sets_of_points_are_averaged(loss):
    students, teachers = cloud(2, 3, 9, 5), cloud(2, 3, 9, 4, seed=1)
    students[1] *= 1e-25  # none of them drowns another
    single = [loss(students[b, h], teachers[b, h]) for b in range(2) for h in range(3)]
    assert_close(loss(students, teachers), sum(single) / 6)


# ---------- points that coincide ----------

def test_coincident_points_count_in_the_mean_as_zeros():
    # student pairs 0, 3, 3 with mean 2; triangle .75, 1, 1.25: errors -.75, .5, .25
    student = torch.tensor([[0.], [0], [3]])
    expected = torch.tensor((.75**2 + .5**2 + .25**2) / 2 / 3)
    assert_close(rkd_distance_loss(student, TRIANGLE), expected)


def test_side_of_length_zero_counts_as_cosine_zero():
    # at 0 and at 1 one side is zero: cosine 0; at 2 both sides agree: cosine 1; triangle 0, .6, .8
    student = torch.tensor([[0.], [0], [3]])
    assert_close(rkd_angle_loss(student, TRIANGLE), torch.tensor((.6**2 + .2**2) / 2 / 3))


def test_copies_have_distance_exactly_zero_and_no_gradient():
    points = (100 * cloud(5, 7) + 1000)[[0, 1, 2, 3, 4, 2]].requires_grad_()
    distances = pairwise_distance(points)
    assert distances[2, 5] == 0 and distances.diagonal().eq(0).all()
    distances[2, 5].backward()
    assert points.grad.eq(0).all()


def test_points_closer_than_rounding_coincide():
    points = cloud(20, 7).double()
    twins = points + 1e-9 * cloud(20, 7, seed=1)
    assert pairwise_distance(torch.cat([points, twins])).diagonal(20).eq(0).all()


@both
def test_copies_push_and_are_pushed_as_the_definition_says(loss):
    student, teacher = cloud(5, 3)[[0, 1, 2, 3, 4, 2, 2]], cloud(7, 3, seed=1)
    expected = gradient(DEFINITION[loss], student, teacher)
    assert_close(gradient(loss, student, teacher), expected, rtol=1e-4, atol=1e-6)


@both
def test_all_points_equal_gives_finite_loss_and_gradient(loss):
    for student, teacher in [(ONE_POINT, TRIANGLE), (TRIANGLE, ONE_POINT), (ONE_POINT, ONE_POINT)]:
        assert loss(student, teacher).isfinite()
        assert gradient(loss, student, teacher).isfinite().all()
    assert loss(ONE_POINT, ONE_POINT) == 0


# ---------- precision and memory ----------

def test_close_points_far_from_the_origin_keep_their_distance():
    points = cloud(8, 4) + 100
    twins = points + torch.tensor([1e-5, 0, 0, 0])  # float32 holds 0.8e-5 or 1.5e-5 here
    expected = (points.double() - twins.double()).norm(dim=1).float()
    near = pairwise_distance(torch.cat([points, twins])).diagonal(8)
    assert_close(near, expected, rtol=1e-3, atol=0)
    assert near.min() > 0.7e-5


@both
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_gives_the_float32_loss_even_with_a_large_offset(loss, dtype):
    student, teacher = (cloud(12, 8) + 50).to(dtype), (cloud(12, 6, seed=1) + 50).to(dtype)
    result = loss(student, teacher)
    assert result.dtype == torch.float32
    assert_close(result, loss(student.float(), teacher.float()), rtol=2e-2, atol=0)
    assert gradient(loss, student, teacher).norm() > 1e-3


@both
def test_autocast_changes_nothing(loss):
    student, teacher = cloud(12, 8) + 50, cloud(12, 6, seed=1) + 50
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result, push = loss(student, teacher), gradient(loss, student, teacher)
    assert_close(result, loss(student, teacher), rtol=2e-2, atol=0)
    assert_close(push, gradient(loss, student, teacher), rtol=2e-2, atol=1e-6)


@both
def test_what_is_kept_for_the_backward_pass_is_quadratic(loss):
    kept, N = [], 128

    def note(x):
        kept.append(x.numel())
        return x

    with torch.autograd.graph.saved_tensors_hooks(note, note):
        loss(cloud(N, 4).requires_grad_(), cloud(N, 4, seed=1))
    assert max(kept) == N * N
    assert sum(kept) < 16 * N * N


# ---------- mistakes: sets of points ----------

@pytest.mark.parametrize("loss", [*LOSSES, cka_loss, ressl_loss])
@pytest.mark.parametrize("s, t", [[(5, 4), (6, 4)], [(2, 5, 4), (3, 5, 4)], [(5, 4), (1, 5, 4)],
                                  [(5,), (5,)]])
def test_sets_that_do_not_match_are_refused(loss, s, t):
    with pytest.raises(ValueError, match="width D may differ"):
        loss(cloud(*s), cloud(*t))


@pytest.mark.parametrize("loss", [*LOSSES, cka_loss, ressl_loss])
def test_whole_numbers_and_two_devices_are_refused(loss):
    with pytest.raises(ValueError, match=r"int64.*float\(\)"):
        loss(torch.arange(12).view(4, 3), cloud(4, 3))
    with pytest.raises(ValueError, match="cpu.*meta.*one device"):
        loss(cloud(4, 3), cloud(4, 3).to("meta"))


@both
def test_more_points_than_the_memory_holds_are_refused_before_any_is_asked_for(loss):
    many = torch.zeros(1, 1).expand(10**6, 1)
    with pytest.raises(ValueError, match=r"1000000 points.*GiB.*fewer anchors.*--angle-weight 0"):
        loss(many, many)


# ---------- the pull, and the instruments ----------

def test_pull_is_the_squared_distance_of_directions_from_the_centre():
    east_west, north_south = torch.tensor([[1., 0], [-1, 0]]), torch.tensor([[0., 5], [0, -5]])
    assert_close(pull_loss(east_west, east_west), torch.tensor(0.0))
    assert_close(pull_loss(east_west, north_south), torch.tensor(2.0))
    assert_close(pull_loss(east_west, -east_west), torch.tensor(4.0))
    assert_close(pull_loss(7 * east_west + 100, north_south - 50), torch.tensor(2.0))


def test_effective_rank_counts_the_directions_that_are_used():
    corners = torch.tensor([[1., 1], [1, -1], [-1, 1], [-1, -1]])
    assert effective_rank(corners + 10) == pytest.approx(2)
    assert effective_rank(LINE.expand(3, 5)) == pytest.approx(1, abs=1e-4)
    # singular values 3 : 1, shares 3/4 and 1/4: exp(entropy) = 4 / 3^(3/4)
    assert effective_rank(corners * torch.tensor([3, 1])) == pytest.approx(4 / 3**0.75)
    assert effective_rank(ONE_POINT) == pytest.approx(1)


def test_panel_of_four_directions():
    teacher = torch.tensor([[6., 0], [-6, 0], [0, 2], [0, -2]])
    seen = panel(torch.tensor([[0., 1], [0, -1], [1, 0], [-1, 0]]), teacher)
    assert seen["effective_rank"] == pytest.approx(4 / 3**0.75)  # of the teacher, with its lengths
    assert seen["feature_std"] == pytest.approx((2 / 3 * 2) ** 0.5)  # of 1, -1, 0, 0; D = 2
    assert seen["alignment"] == pytest.approx(2)  # a right angle
    far, near = torch.tensor([-8., -4]).exp()  # squared distance 4 for 1 of 3 others, 2 for two
    assert seen["uniformity"] == pytest.approx(((far + 2 * near) / 3).log().item())


def test_panel_shows_the_collapse_that_the_losses_do_not():
    collapsed = dict(effective_rank=1, feature_std=0, alignment=0, uniformity=0)
    assert panel(ONE_POINT, ONE_POINT) == pytest.approx(collapsed, abs=1e-5)


# ---------- the other losses: how each is called, and its definition in float64 ----------

HIDDEN = torch.tensor([[1, 0, 1, 1, 0], [0, 0, 1, 0, 0], [0, 0, 0, 0, 0]]).bool()  # 3, 1 and 0
CENTER = cloud(4, seed=3).requires_grad_()  # it must never get one


def average(values):
    return sum(values) / len(values)


def softmax(logits):
    return logits.exp() / logits.exp().sum()


def similarities(x, others, temperature):
    return softmax(torch.stack([x @ y / (x.norm() * y.norm()) for y in others]) / temperature)


def cka_definition(s, t):
    H = torch.eye(len(s)).double() - 1 / len(s)
    K, L = H @ s @ s.T @ H, H @ t @ t.T @ H
    return 1 - (K * L).sum() / (K.norm() * L.norm())


def ressl_definition(s, t):
    total = 0
    for i in range(len(s)):
        p, q = (similarities(x[i], [x[j] for j in range(len(x)) if j != i], temperature)
                for x, temperature in [(t, 0.04), (s, 0.1)])
        total += (p * (p / q).log()).sum()
    return total / len(s)


def info_nce_definition(query, key):
    return average([-similarities(q, key, 0.2)[i].log() for i, q in enumerate(query)])


def nt_xent_definition(a, b):
    total = 0
    for ours, theirs in [(a, b), (b, a)]:
        for i, view in enumerate(ours):  # the positive comes first
            others = [theirs[i]] + [x[j] for x in (a, b) for j in range(len(a)) if j != i]
            total -= similarities(view, others, 0.2)[0].log()
    return total / (2 * len(a))


def byol_definition(p, z):
    return average([(a / a.norm() - b / b.norm()).square().sum() for a, b in zip(p, z)])


def cross_entropy(s, t):
    return -(softmax((t - CENTER) / 0.04) * softmax(s / 0.1).log()).sum()


def masked_patch_definition(s, t):
    images = [[cross_entropy(s[b, n], t[b, n]) for n in range(5) if HIDDEN[b, n]] for b in range(3)]
    return average([average(image) if image else 0 for image in images])


def over_hidden(error):
    return lambda s, t: average([error(s[b, n], t[b, n]) for b, n in HIDDEN.nonzero().tolist()])


def pixel_error(s, t):
    centred = t - sum(t) / 4
    return (s - centred / (sum(centred**2) / 3 + 1e-6) ** 0.5).square().mean()


PAIRS = dict(
    cka=(cka_loss, cka_definition), ressl=(ressl_loss, ressl_definition),
    info_nce=(partial(info_nce_loss, temperature=0.2), info_nce_definition),
    nt_xent=(partial(nt_xent_loss, temperature=0.2), nt_xent_definition),
    byol=(byol_loss, byol_definition),
    pull=(pull_loss, lambda s, t: byol_definition(s - sum(s) / len(s), t - sum(t) / len(t))),
    dino=(lambda s, t: dino_loss(s, t, CENTER),
          lambda s, t: average([cross_entropy(a, b) for a, b in zip(s, t)])))
MASKED = dict(
    masked_patch=(lambda s, t, mask=HIDDEN: masked_patch_loss(s, t, mask, CENTER),
                  masked_patch_definition),
    masked_token=(lambda s, t, mask=HIDDEN: masked_token_loss(s, t.argmax(-1), mask),
                  over_hidden(lambda s, t: -softmax(s)[t.argmax()].log())),
    mae=(lambda s, t, mask=HIDDEN: pixel_loss(s, t, mask), over_hidden(pixel_error)),
    mse=(lambda s, t, mask=HIDDEN: pixel_loss(s, t, mask, normalize=False),
         over_hidden(lambda s, t: (s - t).square().mean())),
    simmim=(lambda s, t, mask=HIDDEN: pixel_loss(s, t, mask, normalize=False, p=1),
            over_hidden(lambda s, t: (s - t).abs().mean())),
    feature=(lambda s, t, mask=HIDDEN: feature_loss(s, t, mask),
             over_hidden(lambda s, t: huber(s - t).mean())),
    dbot=(lambda s, t, mask=HIDDEN: feature_loss(s, t, mask, beta=2.0),
          over_hidden(lambda s, t: 2 * huber((s - t) / 2).mean())))
every = pytest.mark.parametrize("name", [*PAIRS, *MASKED])
masked = pytest.mark.parametrize("name", MASKED)


def case(name):
    """The loss, and inputs with unequal pairs; relations get two widths."""
    sizes = (3, 5) if name in MASKED else (7,)
    width = 6 if name in ("cka", "ressl") else 4
    return (PAIRS | MASKED)[name][0], 2 * cloud(*sizes, 4), 2 * cloud(*sizes, width, seed=1)


@every
def test_loss_and_gradient_are_those_of_the_definition(name):
    loss, student, teacher = case(name)

    def definition(student, teacher):
        return (PAIRS | MASKED)[name][1](student.double(), teacher.double()).float()

    assert_close(loss(student, teacher), definition(student, teacher), rtol=1e-4, atol=0)
    expected = gradient(definition, student, teacher)
    assert (gradient(loss, student, teacher) - expected).norm() < 1e-4 * expected.norm()


def test_nt_xent_gives_gradient_to_both_sides():
    loss, a, b = case("nt_xent")
    expected = gradient(lambda b, a: nt_xent_definition(a.double(), b.double()), b, a)
    assert_close(gradient(lambda b, a: loss(a, b), b, a), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", [name for name in PAIRS | MASKED if name != "nt_xent"])
def test_no_gradient_reaches_target_or_center_even_where_they_ask_for_one(name):
    loss, student, teacher = case(name)
    loss(student.requires_grad_(), teacher.requires_grad_()).backward()
    assert student.grad.norm() > 1e-3
    assert teacher.grad is None and CENTER.grad is None


@every
def test_order_of_the_images_changes_nothing(name):
    loss, student, teacher = case(name)
    order = torch.tensor([2, 0, 1] if name in MASKED else [4, 0, 2, 6, 1, 3, 5])
    shuffled = partial(loss, mask=HIDDEN[order]) if name in MASKED else loss
    assert_close(shuffled(student[order], teacher[order]), loss(student, teacher))


@every
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_gives_the_float32_loss(name, dtype):
    loss, student, teacher = case(name)
    student, teacher = (student + 50).to(dtype), (teacher + 50).to(dtype)
    result = loss(student, teacher)
    assert result.dtype == torch.float32 and result.dim() == 0
    assert_close(result, loss(student.float(), teacher.float()), rtol=2e-2, atol=1e-6)
    assert gradient(loss, student, teacher).isfinite().all()


@every
def test_autocast_does_not_change_one_bit(name):
    loss, student, teacher = case(name)

    def in_autocast(student, teacher):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return loss(student, teacher)

    assert_close(in_autocast(student, teacher), loss(student, teacher), rtol=0, atol=0)
    assert_close(gradient(in_autocast, student, teacher), gradient(loss, student, teacher),
                 rtol=0, atol=0)


# ---------- other relations ----------

def test_cka_of_an_axis_with_two_axes_is_the_cosine_of_one_and_root_two():
    # K = vvᵀ, L = vvᵀ + wwᵀ, v orthogonal to w: <K, L> = 4, |K| = 2, |L| = sqrt(8)
    v, w = torch.tensor([[1.], [-1], [0], [0]]), torch.tensor([[0.], [0], [1], [-1]])
    assert_close(cka_loss(v, torch.cat([v, w], 1)), torch.tensor(1 - 0.5**0.5))
    assert_close(cka_loss(v, w), torch.tensor(1.0))
    assert_close(cka_loss(v, v), torch.tensor(0.0), rtol=0, atol=1e-6)


@pytest.mark.parametrize("move", (MOVES | dict(vanish=lambda x: 1e-10 * x)).values(), ids=MOVES)
def test_cka_ignores_shift_rotation_mirror_and_scale_of_either_side(move):
    student, teacher = cloud(9, 5), cloud(9, 5, seed=1)
    expected = cka_loss(student, teacher)
    assert 0 < expected < 1
    assert_close(cka_loss(move(student), teacher), expected, rtol=1e-4, atol=0)
    assert_close(cka_loss(student, move(teacher)), expected, rtol=1e-4, atol=0)


@pytest.mark.parametrize("loss", [cka_loss, ressl_loss])
def test_all_points_equal_has_a_finite_relation_and_gradient(loss):
    for student, teacher in [(ONE_POINT, TRIANGLE), (TRIANGLE, ONE_POINT), (ONE_POINT, ONE_POINT)]:
        assert loss(student, teacher).isfinite()
        assert gradient(loss, student, teacher).isfinite().all()


def test_ressl_of_equal_cosines_against_odds_of_three_to_one():
    # teacher: cosines 1 and -1 for points 0 and 1, odds exp(2 / temperature) = 3; even for point 2
    teacher = torch.tensor([[1., 0], [2, 0], [-3, 0]])
    expected = 2 / 3 * (0.75 * log(0.75 / 0.5) + 0.25 * log(0.25 / 0.5))
    result = ressl_loss(torch.eye(3), teacher, teacher_temperature=2 / log(3))
    assert_close(result, torch.tensor(expected))


def test_ressl_is_zero_for_equal_inputs_at_equal_temperatures_and_positive_otherwise():
    x = cloud(9, 5)
    assert_close(ressl_loss(x, 7 * x, 0.1, 0.1), torch.tensor(0.0), rtol=0, atol=1e-6)
    assert ressl_loss(x, x) > 1e-2  # the teacher is sharper
    assert all(ressl_loss(x, cloud(9, 3, seed=seed), 0.1, 0.1) > 1e-2 for seed in range(5))


# ---------- contrast ----------

def test_cosines_of_3_4_and_the_axes():
    a, b = torch.tensor([[3., 4], [0, 0], [-1, 0]]), torch.tensor([[5., 0], [0, 0.1]])
    assert_close(cosines(a, b), torch.tensor([[0.6, 0.8], [0, 0], [-1, 0]]))


def test_equal_embeddings_cannot_be_told_apart():
    assert_close(info_nce_loss(ONE_POINT, ONE_POINT, 0.1), torch.tensor(log(3)))
    assert_close(nt_xent_loss(ONE_POINT, ONE_POINT, 0.1), torch.tensor(log(2 * 3 - 1)))


def test_positives_with_odds_against_orthogonal_negatives():
    # exp(1 / temperature) = 3 against 3 negatives of weight 1; 4 against 4
    assert_close(info_nce_loss(7 * torch.eye(4), torch.eye(4), 1 / log(3)), torch.tensor(log(2)))
    assert_close(nt_xent_loss(7 * torch.eye(3), torch.eye(3), 1 / log(4)), torch.tensor(log(2)))


# ---------- self-distillation ----------

@pytest.mark.parametrize("target, expected", [[(9., 0), 0], [(0, 9.), 2], [(-9., 0), 4]])
def test_byol_is_0_for_equal_2_for_orthogonal_4_for_opposite_directions(target, expected):
    result = byol_loss(torch.tensor([[0.1, 0]]), torch.tensor([target]))
    assert_close(result, torch.tensor(float(expected)))


def test_soft_cross_entropy_of_odds_three_to_one():
    three, even, none = torch.tensor([log(3), 0]), torch.zeros(2), torch.zeros(2)
    entropy = -0.75 * log(0.75) - 0.25 * log(0.25)
    assert_close(soft_cross_entropy(even, three, none, 1, 1), torch.tensor(log(2)))
    assert_close(soft_cross_entropy(three, three, none, 1, 1), torch.tensor(entropy))
    assert_close(soft_cross_entropy(three, three, three, 1, 1),  # the centre makes the teacher even
                 torch.tensor(-0.5 * log(0.75) - 0.5 * log(0.25)))


def test_temperatures_divide_the_logits_and_the_teachers_divides_the_centre_too():
    (_, s, t), rows = case("dino"), torch.ones(1, 7).bool()
    expected = soft_cross_entropy(s / 0.3, t / 0.7, CENTER / 0.7, 1, 1).mean()
    assert_close(dino_loss(s, t, CENTER, 0.3, 0.7), expected)
    assert_close(masked_patch_loss(s, t, rows, CENTER, 0.3, 0.7), expected)


def test_uniform_prototypes_cost_log_K():
    uniform, teacher = torch.zeros(2, 5, 4), cloud(2, 5, 4)
    assert_close(dino_loss(uniform[0], teacher[0], CENTER), torch.tensor(log(4)))
    assert_close(masked_patch_loss(uniform, teacher, HIDDEN[:2], CENTER), torch.tensor(log(4)))
    assert_close(masked_token_loss(uniform, teacher.argmax(-1), HIDDEN[:2]), torch.tensor(log(4)))


def test_center_moves_a_tenth_of_the_way_to_the_mean_of_the_batch():
    batch_mean = torch.tensor([2., 0]).half().requires_grad_()
    moved = move_center(torch.tensor([1., 0]), batch_mean)
    assert_close(moved, torch.tensor([1.1, 0]))
    assert not moved.requires_grad
    assert_close(move_center(torch.tensor([1., 0]), batch_mean, 0.25), torch.tensor([1.75, 0]))


def test_masked_patch_loss_weighs_every_image_alike():
    # 3 patches of image 0 guess at random, the one of image 1 is sure and right, image 2 hides none
    student, teacher = torch.zeros(3, 5, 4), torch.zeros(3, 5, 4)
    student[1, :, 0] = teacher[..., 0] = 100
    loss = masked_patch_loss(student, teacher, HIDDEN, torch.zeros(4))
    assert_close(loss, torch.tensor((log(4) + 0 + 0) / 3))


# ---------- masked prediction ----------

def test_pixels_and_features_weigh_every_hidden_patch_alike():
    target = torch.zeros(3, 5, 4)
    target[0] = 0.5  # at 3 of the 4 hidden patches
    assert_close(pixel_loss(torch.zeros(3, 5, 4), target, HIDDEN, False, 1), torch.tensor(3 / 8))
    assert_close(feature_loss(torch.zeros(3, 5, 4), target, HIDDEN), torch.tensor(3 / 4 / 8))


@masked
def test_rows_of_the_hidden_patches_alone_give_the_same_loss(name):
    loss, student, teacher = case(name)
    assert_close(loss(student[HIDDEN], teacher[HIDDEN]), loss(student, teacher))
    assert_close(gradient(loss, student[HIDDEN], teacher[HIDDEN]),
                 gradient(loss, student, teacher)[HIDDEN])


@masked
@pytest.mark.parametrize("value", [7., torch.nan, torch.inf])
@pytest.mark.parametrize("sides", [(True, False), (False, True), (True, True)])
def test_visible_patches_change_neither_loss_nor_gradient(name, value, sides):
    loss, student, teacher = case(name)
    expected = loss(student, teacher), gradient(loss, student, teacher)
    student, teacher = (x.masked_fill(~HIDDEN.unsqueeze(-1), value) if side else x
                        for x, side in zip((student, teacher), sides))
    assert_close((loss(student, teacher), gradient(loss, student, teacher)), expected)


@masked
def test_nothing_hidden_costs_nothing(name):
    (loss, student, teacher), none = case(name), torch.zeros(3, 5).bool()
    loss = partial(loss, mask=none)
    assert loss(student, teacher) == 0 and gradient(loss, student, teacher).eq(0).all()
    assert loss(student[none], teacher[none]) == 0
    assert gradient(loss, student[none], teacher[none]).shape == (0, 4)


def test_standardized_patch_has_mean_0_and_unbiased_variance_1():
    patches = torch.tensor([[[1., 2, 3], [10, 30, 20], [5, 5, 5]]]).half()
    expected = torch.tensor([[[-1., 0, 1], [-1, 1, 0], [0, 0, 0]]])
    assert_close(standardize(patches), expected, rtol=1e-5, atol=1e-6)


def test_flat_guess_of_standardized_pixels_has_error_P_minus_1_over_P():
    # unbiased variance 1: the squares of a patch sum to P - 1; a guess off the mean adds its square
    flat, patches = torch.zeros(3, 5, 4), 100 * cloud(3, 5, 4)
    assert_close(pixel_loss(flat, patches, HIDDEN), torch.tensor(3 / 4))
    assert_close(pixel_loss(flat + 2, patches, HIDDEN), torch.tensor(3 / 4 + 4))


@pytest.mark.parametrize("beta, inside, outside", [(1, 0.125, 2.5), (2, 0.0625, 2.0)])
def test_feature_loss_is_a_parabola_inside_beta_and_a_line_beyond(beta, inside, outside):
    target, mask = torch.tensor([[[0.5, -3]]]), torch.tensor([[True]])
    result = feature_loss(torch.zeros(1, 1, 2), target, mask, beta)
    assert_close(result, torch.tensor((inside + outside) / 2))


# ---------- mistakes: rows, logits, masks, tokens ----------

@pytest.mark.parametrize("loss, least", [
    (rkd_distance_loss, 2), (rkd_angle_loss, 3), (cka_loss, 2), (ressl_loss, 3), (pull_loss, 2),
    (PAIRS["info_nce"][0], 2), (PAIRS["nt_xent"][0], 2), (byol_loss, 1)])
def test_too_few_points_are_refused_by_count(loss, least):
    with pytest.raises(ValueError, match=f"^{least - 1} point.* at least {least}"):
        loss(cloud(least - 1, 4), cloud(least - 1, 4))
    assert loss(cloud(least, 4), cloud(least, 4, seed=1)).isfinite()


@pytest.mark.parametrize("name", ["info_nce", "nt_xent", "byol", "pull"])
@pytest.mark.parametrize("a, b", [[(5, 4), (6, 4)], [(5, 4), (5, 6)], [(5, 4), (1, 4)],
                                  [(3, 5, 4), (3, 5, 1)], [(5,), (5,)]])
def test_rows_that_are_no_partners_are_refused_by_size(name, a, b):
    with pytest.raises(ValueError, match=re.escape(f"{a} and {b}")):
        PAIRS[name][0](cloud(*a), cloud(*b))


@pytest.mark.parametrize("name", ["mae", "simmim", "dbot"])
@pytest.mark.parametrize("a, b", [[(3, 5, 4), (3, 5, 1)], [(3, 5, 4), (2, 5, 4)], [(8, 4), (7, 4)],
                                  [(3, 5, 4), (8, 3)], [(15, 4), (15, 4)]])
def test_patches_that_are_no_partners_are_refused(name, a, b):
    with pytest.raises(ValueError, match="must"):
        MASKED[name][0](cloud(*a), cloud(*b), mask=HIDDEN)  # hides 8 of 3 x 5


@pytest.mark.parametrize("s, t, c", [[(5, 4), (5, 3), (4,)], [(5, 4), (6, 4), (4,)],
                                     [(5, 4), (5, 4), (3,)], [(5, 4), (5, 4), (1, 4)]])
def test_logits_and_center_of_other_sizes_are_refused(s, t, c):
    message = re.escape(f"student logits {s}, teacher logits {t} and center {c}")
    with pytest.raises(ValueError, match=message):
        dino_loss(cloud(*s), cloud(*t), cloud(*c))
    with pytest.raises(ValueError, match=message if len(s) == len(t) == 5 else "must"):
        masked_patch_loss(cloud(*s), cloud(*t), torch.ones(1, 5).bool(), cloud(*c))


@masked
@pytest.mark.parametrize("mask", [HIDDEN.float(), HIDDEN.int(), HIDDEN[:2], HIDDEN[:, :4],
                                  HIDDEN[0], HIDDEN.unsqueeze(-1), HIDDEN.T])
def test_masks_that_do_not_fit_are_refused_by_size_and_type(name, mask):
    loss, student, teacher = case(name)
    message = re.escape(f"mask {tuple(mask.shape)} {mask.dtype}") + r".*\(3, 5, 4\)"
    with pytest.raises(ValueError, match=message):
        loss(student, teacher, mask=mask)


@masked
def test_rows_that_are_not_those_of_the_mask_are_refused(name):
    mask = torch.eye(5).bool()  # as many hidden patches as patches in an image
    assert MASKED[name][0](cloud(5, 4), cloud(5, 4), mask=mask).isfinite()
    with pytest.raises(ValueError, match=r"\(4, 4\)"):
        MASKED[name][0](cloud(4, 4), cloud(4, 4), mask=mask)


@pytest.mark.parametrize("logits, tokens", [[(3, 5, 4), (2, 5)], [(3, 5, 4), (3, 4)],
                                            [(4, 4), (3,)]])
def test_tokens_that_do_not_fit_the_logits_are_refused(logits, tokens):
    with pytest.raises(ValueError, match=r"\D+".join(map(str, tokens))):
        masked_token_loss(cloud(*logits), torch.zeros(tokens).long(), HIDDEN)
