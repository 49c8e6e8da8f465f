"""Randomness: every number is a hash of its keys, uniform, and unrelated to its neighbours."""
import pytest
import torch

from randomness import uniform


def correlation(a, b):
    return torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1].abs().item()


def test_equal_keys_give_equal_numbers_whatever_was_drawn_before():
    first = uniform(4, 1, 2, 3)
    uniform(100, 9, 9), torch.rand(7)
    assert uniform(4, 1, 2, 3).equal(first) and first.shape == (1, 4)
    assert not uniform(4, 1, 3, 2).equal(first)  # the order of the keys matters


def test_a_number_does_not_depend_on_the_rest_of_the_batch():
    batch = uniform(5, 0, 1, torch.tensor([8, 3, 5]), 2)
    assert batch[1].equal(uniform(5, 0, 1, torch.tensor([3]), 2)[0])
    assert batch[2].equal(uniform(5, 0, 1, 5, 2)[0])
    assert batch[:, :2].equal(uniform(2, 0, 1, torch.tensor([8, 3, 5]), 2))


@pytest.mark.parametrize("changed", range(4))
def test_each_key_alone_changes_all_numbers_to_unrelated_ones(changed):
    keys = [0, 0, torch.arange(5000), 0]
    others = [key + (k == changed) for k, key in enumerate(keys)]
    a, b = uniform(4, *keys), uniform(4, *others)
    assert (a == b).float().mean() < 0.001
    assert correlation(a, b) < 0.02


def test_numbers_are_uniform_and_neighbours_are_unrelated():
    x = uniform(32, 0, 0, torch.arange(4096), 0)  # 131072 numbers: the mean varies by 0.0008
    assert x.min() >= 0 and x.max() < 1
    assert abs(x.mean() - 1 / 2) < 0.004 and abs(x.var() - 1 / 12) < 0.001
    assert correlation(x[1:], x[:-1]) < 0.01 and correlation(x[:, 1:], x[:, :-1]) < 0.01
    assert (torch.histc(x, 16, 0, 1) / x.numel() - 1 / 16).abs().max() < 0.003
