"""The built-in set: its bytes, its balance, and the ranges of its latent factors."""
import colorsys
import hashlib

import pytest
import torch
from torch.testing import assert_close

import textures
from data import load_data
from textures import FACTORS, hsv_to_rgb


@pytest.mark.parametrize("count, size, digest", [
    (20, 32, "0ccde554c350a877649dd623693b457982710da4168cc62cb3fb8fbf27145df4"),
    (4, 96, "c5d804fd04e0feb01e6be8d3eeeede20becb717ac339a63e60be7d78c351c06d")])
def test_textures_are_exactly_these_bytes(count, size, digest):
    pixels = textures.textures(count + 10, 0, size)[0][:count].numpy().tobytes()
    assert len(pixels) == count * 3 * size * size
    assert hashlib.sha256(pixels).hexdigest() == digest


@pytest.mark.parametrize("size", [32, 96, 224])
def test_textures_are_drawn_in_pieces_of_bounded_memory(monkeypatch, size):
    pieces, count = [], 300 * 96**2 // size**2

    def draw_some(index, *rest):  # the real one takes about 200 bytes per pixel
        pieces.append(index.tolist())
        images = (index % 256).to(torch.uint8).view(-1, 1, 1, 1).expand(-1, 3, size, size)
        return images, torch.zeros(len(index), len(FACTORS)).double()
    monkeypatch.setattr(textures, "draw_some", draw_some)
    images, labels, _ = textures.textures(count, 0, size)
    assert sum(pieces, []) == [*range(count)] and len(labels) == count
    assert images[:, 2, 5, 5].tolist() == [i % 256 for i in range(count)]
    assert max(map(len, pieces)) * size**2 * 200 < 2**30


def test_texture_classes_are_balanced_and_no_class_has_a_colour_of_its_own():
    images, labels, _ = textures.textures(400, 0)
    assert labels.bincount().tolist() == [40] * 10
    colours = [images[labels == k].float().mean((0, 2, 3)) for k in range(10)]
    assert torch.stack(colours).std(0).max() < 20  # of 255: means of 40 that vary by about 50


def test_factors_lie_in_their_ranges_and_the_first_is_the_class():
    _, labels, factors = textures.textures(1000, 0)
    column = dict(zip(FACTORS, factors.T))
    assert column["class"].equal(labels.double())
    ranges = dict(frequency=(3.5, 4.5), rotation=(-0.2, 0.2), illumination=(0, 0.6))
    for name in FACTORS[1:]:
        low, high = ranges.get(name, (0, 1))  # hues in turns, phases in periods
        assert low <= column[name].min() and column[name].max() <= high
        assert abs(column[name].mean() - (low + high) / 2) < 0.05 * (high - low)


def test_no_test_image_is_a_training_image():
    train, test = load_data("textures", None, 16)
    assert (len(train), len(test)) == (10000, 1000) and train.classes == test.classes
    seen, measured = ({x.numpy().tobytes() for x in part.images} for part in (train, test))
    assert not seen & measured


def test_hsv_to_rgb_is_colorsys():
    hsv = torch.rand(50, 3, generator=torch.Generator().manual_seed(0))
    expected = torch.tensor([colorsys.hsv_to_rgb(*row) for row in hsv.double().tolist()])
    assert_close(hsv_to_rgb(*hsv.T), expected, atol=1e-6, rtol=0)
