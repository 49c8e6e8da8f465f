"""Masks: how many patches are hidden, which, how evenly, and from which random numbers.

    pytest tests/test_masking.py
"""
import pytest
import torch

from masking import MASKS, attention_mask, block_mask, inverse_block_mask, random_mask

RATIOS = [0, 0.1, 0.3, 0.5, 0.6, 0.75, 0.99, 1]
makers = pytest.mark.parametrize("make", [random_mask, block_mask, inverse_block_mask])
grids = pytest.mark.parametrize("grid", [(14, 14), (4, 4), (7, 5), (3, 11), (1, 8), (8, 1), (1, 1)])


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def attended(batch, grid, ratio, generator):
    """attention_mask of drawn attention, called like the makers."""
    return attention_mask(torch.rand(batch, grid[0] * grid[1], generator=generator), ratio)


all_four = pytest.mark.parametrize("make", [random_mask, block_mask, inverse_block_mask, attended])


def borders(mask, grid):
    """Neighbours, side by side, of which one is hidden and one is not; counted per mask."""
    return mask.view(-1, *grid).diff(dim=2).sum((1, 2)).float()


# ---------- all of them ----------

@makers
@grids
@pytest.mark.parametrize("ratio", RATIOS)
def test_every_row_hides_exactly_the_rounded_share(make, grid, ratio):
    mask = make(33, grid, ratio, generator=seeded())
    assert mask.sum(1).tolist() == [round(ratio * grid[0] * grid[1])] * 33
    assert mask.dtype == torch.bool and mask.shape == (33, grid[0] * grid[1])


@all_four
@pytest.mark.parametrize("ratio", [0.6, torch.tensor(RATIOS)], ids=["one", "one an image"])
def test_equal_generators_give_equal_masks(make, ratio):
    first, again, other = (make(8, (14, 14), ratio, generator=seeded(seed)) for seed in (5, 5, 6))
    assert first.equal(again)
    assert not first.equal(other)


@makers
def test_a_generator_leaves_the_global_random_numbers_alone(make):
    before = torch.get_rng_state()
    make(8, (14, 14), 0.6, generator=seeded())
    assert torch.get_rng_state().equal(before)


@makers
def test_without_a_generator_the_global_seed_decides(make):
    with torch.random.fork_rng():
        torch.manual_seed(5)
        first = make(8, (14, 14), 0.6)
        torch.manual_seed(5)
        assert make(8, (14, 14), 0.6).equal(first)
        assert not make(8, (14, 14), 0.6).equal(first)


@makers
def test_images_of_a_batch_get_different_masks(make):
    assert len(make(32, (14, 14), 0.6, generator=seeded()).unique(dim=0)) > 28


@makers
def test_an_empty_batch_gives_no_masks(make):
    assert make(0, (4, 4), 0.5, generator=seeded()).shape == (0, 16)


@makers
def test_the_mask_comes_to_the_device_asked_for(make):
    assert make(2, (4, 4), 0.5, device="meta").device.type == "meta"


@makers
@pytest.mark.parametrize("ratio", [-0.1, 1.1, float("nan")])
def test_a_ratio_outside_0_and_1_is_refused_by_value(make, ratio):
    with pytest.raises(ValueError, match=f"mask ratio {ratio} must"):
        make(2, (4, 4), ratio)
    with pytest.raises(ValueError, match=f"mask ratio {ratio} must"):
        attention_mask(torch.rand(2, 16), ratio)


def test_the_table_names_the_three_makers():
    assert MASKS == dict(random=random_mask, block=block_mask, inverse_block=inverse_block_mask)


# ---------- one ratio an image ----------

@all_four
@grids
def test_with_one_ratio_an_image_each_row_hides_its_own_share(make, grid):
    mask = make(8, grid, torch.tensor(RATIOS), generator=seeded())
    assert mask.sum(1).tolist() == [round(ratio * grid[0] * grid[1]) for ratio in RATIOS]
    assert mask.dtype == torch.bool and mask.shape == (8, grid[0] * grid[1])


@all_four
@grids
def test_a_row_is_what_its_ratio_would_give_to_all(make, grid):
    mask = make(8, grid, torch.tensor(RATIOS), generator=seeded())
    for row, ratio in enumerate(RATIOS):
        assert mask[row].equal(make(8, grid, ratio, generator=seeded())[row])


@all_four
@pytest.mark.parametrize("wrong", [-0.1, 1.1, float("nan")])
def test_one_ratio_outside_0_and_1_is_refused_among_others(make, wrong):
    for ratios in ([wrong, 0.5], [0.5, wrong]):
        with pytest.raises(ValueError, match="mask ratio tensor.* must lie between 0"):
            make(2, (4, 4), torch.tensor(ratios), generator=seeded())


# ---------- each of them ----------

def test_random_hides_every_patch_equally_often():
    # in 4000 masks 3000 times, with standard deviation (4000 · 3/4 · 1/4)^½ = 27.4: five of them
    times = random_mask(4000, (4, 4), 0.75, generator=seeded()).sum(0)
    assert (times - 3000).abs().max() < 5 * 27.4


def test_random_hides_pairs_of_patches_equally_often():
    # a pair with probability 2/4 · 1/3 = 1/6: 1000 of 6000 times, deviation 28.9: five of them
    mask = random_mask(6000, (2, 2), 0.5, generator=seeded()).float()
    times = (mask.T @ mask)[*torch.triu_indices(4, 4, 1)]
    assert (times - 1000).abs().max() < 5 * 28.9


def squares(mask, grid):
    """bool (B, N) -> the four patches of each 2 x 2 square, (B, gh / 2, gw / 2, 4)."""
    return mask.view(-1, grid[0] // 2, 2, grid[1] // 2, 2).transpose(2, 3).flatten(3)


@pytest.mark.parametrize("grid", [(14, 14), (4, 6), (2, 8)])
@pytest.mark.parametrize("ratio", RATIOS)
def test_in_units_of_2_random_hides_whole_squares_and_their_rounded_share(grid, ratio):
    cells = squares(random_mask(33, grid, ratio, generator=seeded(), unit=2), grid)
    assert cells.all(-1).equal(cells.any(-1))
    assert cells.all(-1).sum((1, 2)).tolist() == [round(ratio * grid[0] * grid[1] / 4)] * 33


def test_in_units_of_2_each_row_hides_the_share_of_its_own_ratio():
    mask = random_mask(8, (14, 14), torch.tensor(RATIOS), generator=seeded(), unit=2)
    assert mask.sum(1).tolist() == [4 * round(ratio * 49) for ratio in RATIOS]


def test_in_units_of_2_random_hides_every_square_equally_often():
    # of six squares two, in 4500 masks 1500 times, deviation (4500 · 1/3 · 2/3)^½ = 31.6: five
    times = squares(random_mask(4500, (4, 6), 1 / 3, generator=seeded(), unit=2), (4, 6)).sum(0)
    assert (times - 1500).abs().max() < 5 * 31.6


@pytest.mark.parametrize("grid", [(6, 8), (8, 6), (2, 2)])
def test_a_unit_that_does_not_divide_the_grid_is_refused(grid):
    with pytest.raises(ValueError, match=f"mask unit 3 .* grid of {grid[0]} x {grid[1]} patches"):
        random_mask(2, grid, 0.5, unit=3)
    assert random_mask(2, (6, 9), 0.5, unit=3).sum(1).tolist() == [27, 27]


def test_block_hides_rectangles_not_scattered_patches():
    grid, ratio = (14, 14), 0.5
    block = block_mask(64, grid, ratio, generator=seeded())
    scattered = random_mask(64, grid, ratio, generator=seeded())
    assert abs(borders(scattered, grid).mean() - 91.5) < 3  # 14 · 13 pairs, half differ
    assert borders(block, grid).mean() < 91.5 / 3
    assert borders(block.view(-1, *grid).mT.flatten(1), grid).mean() < 91.5 / 3


def test_block_rectangles_are_wide_as_often_as_tall():
    shape = block_mask(400, (14, 14), 16 / 196, generator=seeded()).view(-1, 14, 14)
    height, width = shape.any(2).sum(1), shape.any(1).sum(1)
    wide, tall = (width > height).float().mean(), (width < height).float().mean()
    assert 0.2 < wide < 0.6 and 0.2 < tall < 0.6  # the rest is square


def test_block_rectangles_have_16_patches_or_more():
    # 16 hidden patches have up to 8 borders left and right as a 4 x 4 block, up to 32 scattered
    mask = block_mask(400, (14, 14), 16 / 196, generator=seeded())
    assert borders(mask, (14, 14)).mean() < 10


def test_block_falls_at_either_end_alike():
    times = block_mask(4000, (14, 14), 16 / 196, generator=seeded()).sum(0).view(14, 14)
    for end_to_end in (times.sum(0), times.sum(1)):
        assert 0.5 < end_to_end[0] / end_to_end[-1] < 2  # the cut, row by row, spares the lowest


def test_block_reaches_every_patch():
    times = block_mask(2000, (8, 8), 0.5, generator=seeded()).float().mean(0)
    assert times.min() > 0.1 and times.max() < 0.9


@grids
@pytest.mark.parametrize("ratio", RATIOS)
def test_inverse_block_shows_a_rectangle_up_to_the_end_of_its_last_column(grid, ratio):
    for mask in inverse_block_mask(33, grid, ratio, generator=seeded()):
        cells = (~mask.view(grid)).nonzero()  # (V, 2)
        if len(cells):
            (top, left), (bottom, right) = cells.amin(0).tolist(), cells.amax(0).tolist()
            height = bottom - top + 1
            box = [[top + n % height, left + n // height] for n in range(len(cells))]  # columnwise
            assert sorted(box) == cells.tolist()
            assert right == box[-1][1]


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


@pytest.mark.parametrize("ratio", RATIOS)
def test_attention_hides_the_exact_share_even_of_equal_attention(ratio):
    assert attention_mask(torch.ones(3, 49), ratio).sum(1).tolist() == [round(ratio * 49)] * 3
