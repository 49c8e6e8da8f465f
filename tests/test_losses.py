"""The relational losses and their instruments against numbers worked out by hand and, for the
losses, against their definition written out.

    pytest tests/test_losses.py
"""
from itertools import permutations

import pytest
import torch
from torch.nn.functional import normalize as unit
from torch.testing import assert_close

from losses import (effective_rank, pairwise_distance, panel, pull_loss, rkd_angle_loss,
                    rkd_distance_loss)

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


# ---------- mistakes ----------

@both
def test_too_few_points_are_refused_by_count(loss):
    N = 1 if loss is rkd_distance_loss else 2
    with pytest.raises(ValueError, match=f"^{N} point.* at least {N + 1}"):
        loss(cloud(N, 4), cloud(N, 4))
    assert loss(cloud(N + 1, 4), cloud(N + 1, 4, seed=1)).isfinite()


@both
@pytest.mark.parametrize("s, t", [[(5, 4), (6, 4)], [(2, 5, 4), (3, 5, 4)], [(5, 4), (1, 5, 4)],
                                  [(5,), (5,)]])
def test_sets_that_do_not_match_are_refused(loss, s, t):
    with pytest.raises(ValueError, match="width D may differ"):
        loss(cloud(*s), cloud(*t))


# ---------- the pull, and the instruments ----------

def test_pull_is_the_squared_distance_of_directions_from_the_centre():
    east_west, north_south = torch.tensor([[1., 0], [-1, 0]]), torch.tensor([[0., 5], [0, -5]])
    assert_close(pull_loss(east_west, east_west), torch.tensor(0.0))
    assert_close(pull_loss(east_west, north_south), torch.tensor(2.0))
    assert_close(pull_loss(east_west, -east_west), torch.tensor(4.0))
    assert_close(pull_loss(7 * east_west + 100, north_south - 50), torch.tensor(2.0))


def test_pull_gives_no_gradient_to_the_teacher_and_needs_two_points():
    student, teacher = cloud(9, 5).requires_grad_(), cloud(9, 5, seed=1).requires_grad_()
    pull_loss(student, teacher).backward()
    assert teacher.grad is None and student.grad.norm() > 1e-3
    with pytest.raises(ValueError, match="^1 point.* at least 2"):
        pull_loss(student[:1], teacher[:1])


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
