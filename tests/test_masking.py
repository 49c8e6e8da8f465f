"""Masks: how many patches are hidden, which, how evenly, and from which random numbers.

And that each function of losses.py and masking.py works when it is pasted somewhere else.
"""
import inspect
import re
import sys

import pytest
import torch
from torch.testing import assert_close

import losses
import masking
from masking import attention_mask, block_mask, inverse_block_mask, random_mask


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def attended(batch, grid, ratio, generator):  # attention_mask, called like the makers
    return attention_mask(torch.rand(batch, grid[0] * grid[1], generator=generator), ratio)


RATIOS = [0, 0.1, 0.3, 0.5, 0.6, 0.75, 0.99, 1]
grids = pytest.mark.parametrize("grid", [(14, 14), (7, 5), (3, 11), (8, 1), (1, 1)])
makers = pytest.mark.parametrize("make", [random_mask, block_mask, inverse_block_mask])
all_four = pytest.mark.parametrize("make", [random_mask, block_mask, inverse_block_mask, attended])


@all_four
@grids
def test_each_row_hides_exactly_the_rounded_share_of_one_ratio_or_of_its_own(make, grid):
    N, own = grid[0] * grid[1], make(8, grid, torch.tensor(RATIOS), generator=seeded())
    assert own.dtype == torch.bool and own.shape == (8, N)
    for row, ratio in enumerate(RATIOS):
        mask = make(8, grid, ratio, generator=seeded())
        assert mask.dtype == torch.bool and mask.sum(1).tolist() == [round(ratio * N)] * 8
        assert own[row].equal(mask[row])


@makers
def test_masks_are_drawn_from_the_generator_alone_or_else_from_the_global_seed(make):
    with torch.random.fork_rng():
        torch.manual_seed(5)
        first, again, other = (make(8, (14, 14), 0.6, generator=seeded(s)) for s in (5, 5, 6))
        assert make(8, (14, 14), 0.6).equal(first)  # no draw has moved the global seed so far
        assert make(8, (14, 14), 0.6, device="meta").is_meta  # where the mask goes at the end
    assert first.equal(again) and not first.equal(other)
    assert len(first.unique(dim=0)) > 5  # each image has its own


@all_four
@pytest.mark.parametrize("wrong", [-0.1, 1.1, float("nan")])
def test_a_ratio_outside_0_and_1_is_refused_alone_and_among_others(make, wrong):
    for ratio in (wrong, torch.tensor([wrong, 0.5]), torch.tensor([0.5, wrong])):
        with pytest.raises(ValueError, match=f"mask ratio .*{wrong}"):
            make(2, (4, 4), ratio, generator=seeded())


@pytest.mark.parametrize("grid, unit, ratio, chance", [
    ((4, 4), 1, 0.75, 12 / 16), ((4, 6), 2, 0.3, 2 / 6), ((6, 9), 3, 0.5, 3 / 6)])
def test_random_hides_whole_units_each_equally_often_and_each_pair(grid, unit, ratio, chance):
    mask = random_mask(6000, grid, ratio, generator=seeded(), unit=unit)
    cells = mask.view(6000, grid[0] // unit, unit, grid[1] // unit, unit).transpose(2, 3).flatten(3)
    assert cells.all(-1).equal(cells.any(-1))
    hidden = cells.any(-1).flatten(1).double()  # (6000, U)
    U, times = hidden.shape[1], hidden.T @ hidden  # of each pair; of each unit on the diagonal
    p = torch.full_like(times, chance * (chance * U - 1) / (U - 1)).fill_diagonal_(chance)
    assert ((times - 6000 * p).abs() < 5 * (6000 * p * (1 - p)).sqrt()).all()  # five deviations


@pytest.mark.parametrize("grid", [(6, 8), (8, 6)])
def test_a_unit_that_does_not_divide_the_grid_is_refused(grid):
    with pytest.raises(ValueError, match=f"3 .*{grid[0]} x {grid[1]}"):
        random_mask(2, grid, 0.5, unit=3)


def test_block_hides_a_rectangle_wide_as_often_as_tall_and_at_either_end_alike():
    mask = block_mask(4000, (14, 14), 16 / 196, generator=seeded()).view(-1, 14, 14)
    assert mask.diff(dim=2).sum((1, 2)).float().mean() < 10  # 8 at a square, up to 32 if scattered
    height, width = mask.any(2).sum(1), mask.any(1).sum(1)
    for longer in (width > height, height > width):  # the rest is square
        assert 0.2 < longer.float().mean() < 0.6
    for end_to_end in (mask.sum((0, 1)), mask.sum((0, 2))):
        assert 0.5 < end_to_end[0] / end_to_end[-1] < 2


@grids
def test_inverse_block_shows_a_rectangle_up_to_the_end_of_its_last_column(grid):
    for mask in inverse_block_mask(256, grid, torch.tensor(RATIOS * 32), generator=seeded()):
        cells = (~mask.view(grid)).nonzero().tolist()
        height = len({row for row, _ in cells})
        box = [[cells[0][0] + n % height, cells[0][1] + n // height] for n in range(len(cells))]
        assert sorted(box) == cells  # the box was filled column by column


def test_inverse_block_takes_every_shape_and_place():
    # 49 visible of 14 x 14: 5 to 10 high and as wide as that needs, anywhere that this fits
    shown = ~inverse_block_mask(4000, (14, 14), 0.75, generator=seeded()).view(-1, 14, 14)
    rows, columns = shown.any(2), shown.any(1)
    height, top, left = rows.sum(1), rows.float().argmax(1), columns.float().argmax(1)
    assert height.unique().tolist() == [5, 6, 7, 8, 9, 10]
    for h, width in zip(range(5, 11), (10, 9, 7, 7, 6, 5)):
        assert top[height == h].unique().tolist() == list(range(14 - h + 1))
        assert left[height == h].unique().tolist() == list(range(14 - width + 1))


def test_attention_hides_exactly_the_most_attended():
    attention = torch.tensor([[.1, .4, .2, .3], [.7, .05, .15, .1]])
    assert attention_mask(attention, 0.25).int().tolist() == [[0, 1, 0, 0], [1, 0, 0, 0]]
    assert attention_mask(attention, 0.5).int().tolist() == [[0, 1, 0, 1], [1, 0, 1, 0]]
    assert attention_mask(torch.ones(3, 49), 0.6).sum(1).tolist() == [29] * 3  # all equal


def test_blocks_lie_as_often_at_one_side_as_at_the_other_and_as_in_beits_own_code():
    hidden = block_mask(30000, (14, 14), 75 / 196, generator=seeded()).view(-1, 14, 14).double()
    published = [0.134, 0.249, 0.347, 0.421, 0.474, 0.507, 0.524]  # of 40,000 masks of its code
    for lines in (hidden.mean((0, 2)), hidden.mean((0, 1))):
        assert_close(lines, lines.flip(0), atol=0.01, rtol=0)
        assert_close(lines[:7], torch.tensor(published).double(), atol=0.01, rtol=0)
    for dim in (1, 2):  # as few and as large blocks: so often does a cell differ from its neighbour
        assert hidden.diff(dim=dim).abs().mean().item() == pytest.approx(0.110, abs=0.005)
    assert hidden.mean(0).min() > 0.02  # the corners too


# ---------- each function can be pasted ----------

def pasted(function):
    """The function in an empty module, from its source and that of what its docstring names."""
    theirs = vars(sys.modules[function.__module__])
    helpers = [theirs[name] for name in re.findall(r"`(\w+)`", function.__doc__) if name in theirs]
    assert len(helpers) <= (6 if function is losses.rkd_angle_loss else 3)
    module = {}
    exec("import math, torch\nimport torch.nn.functional as F\n"
         + "\n".join(map(inspect.getsource, [*helpers, function])), module)
    return module[function.__name__]


X, Y = torch.randn(2, 6, 4, generator=seeded())
SQUARES = losses.squared_distance(X)
LOGITS, HIDDEN = X.expand(2, 6, 4), torch.arange(6).expand(2, 6) < 2
ARGUMENTS = {  # of those that do not take two sets of points
    "average pairwise_distance squared_distance standardize effective_rank": (X,),
    "info_nce_loss nt_xent_loss": (X, Y, 0.1), "check_points check_pairs": (X, Y, 2),
    "dino_loss": (X, Y, X[0]),
    "soft_cross_entropy": (X, Y, X[0], 0.1, 0.04),
    "angle_vertices": (slice(2), 6, X.device),
    "angles_by_squares": (SQUARES, 2 * SQUARES, torch.arange(2)),
    "angles_by_edges": (X, Y, torch.arange(2)), "move_center": (X[0], Y[0]),
    "hidden_rows": (LOGITS, HIDDEN),
    "masked_patch_loss": (LOGITS, LOGITS + 1, HIDDEN, X[0]),
    "masked_token_loss": (LOGITS, LOGITS.argmax(-1), HIDDEN),
    "pixel_loss feature_loss": (LOGITS, LOGITS + 1, HIDDEN),
    "random_mask block_mask inverse_block_mask": (2, (4, 6), 0.5, seeded(3)),
    "hidden_count": (0.5, 24), "attention_mask": (X, 0.5),
    "inside": ((4, 6), *torch.ones(4, 2))}
ARGUMENTS = {name: given for names, given in ARGUMENTS.items() for name in names.split()}
FUNCTIONS = [x for module in (losses, masking) for x in vars(module).values()
             if inspect.isfunction(x) and x.__module__ == module.__name__]


@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda function: function.__name__)
def test_a_function_works_where_it_is_pasted_with_what_its_docstring_names(function):
    found = []
    for same in (pasted(function), function):
        given = ARGUMENTS.get(function.__name__, (X, Y))
        found.append(same(*(x.manual_seed(3) if isinstance(x, torch.Generator) else x
                            for x in given)))
    assert_close(*found)
