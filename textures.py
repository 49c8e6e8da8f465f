"""The built-in set: ten textures, drawn from a seed, that colour cannot tell apart.

    image = light · (figure · colour_a + (1 - figure) · colour_b) + noise

`figure` is one of ten periodic patterns (the class); colours, frequency, phase, rotation and light
are drawn independently of the class, and returned (`FACTORS`): so one can ask which causes of an
image a network keeps (`analyze.py factors`). 11,000 images of 32 px take about two seconds.
"""
import math

import torch
import torch.nn.functional as F

from randomness import uniform

TEXTURES = "stripes checker dots rings grid plusses bricks waves zigzag dashes".split()
FACTORS = "class hue_a hue_b frequency phase_x phase_y rotation illumination direction".split()


def textures(count, seed, size=32):
    """-> images uint8 (count, 3, size, size), labels (count,), factors (count, 9).

    Each image has two HSV colours, 3.5-4.5 periods, a phase, a small rotation, a gradient of light
    and noise of four scales; `factors` holds what was drawn, in the order of FACTORS, for probes.
    """
    index = torch.arange(count)
    images = torch.empty(count, 3, size, size, dtype=torch.uint8)
    factors = torch.empty(count, len(FACTORS), dtype=torch.float64)
    for some in index.split(max(1, 2**21 // size**2)):  # whole, 10,000 of 224 px would take 50 GB
        images[some], factors[some] = draw_some(some, seed, size)
    return images, index % len(TEXTURES), factors


def draw_some(index, seed, size):
    """`textures` of the numbers `index` (B,) -> images (B, 3, size, size), factors (B, 9)."""
    draw = uniform(16, seed, index).double()
    label = index % len(TEXTURES)
    frequency, rotation = 3.5 + draw[:, 0], 0.4 * draw[:, 1] - 0.2
    grid = (torch.arange(size).double() + 0.5) / size - 0.5
    y, x = grid.view(1, -1, 1), grid.view(1, 1, -1)
    cos, sin = (f(rotation).view(-1, 1, 1) for f in (torch.cos, torch.sin))
    scale = frequency.view(-1, 1, 1)
    u = scale * (cos * x + sin * y) + draw[:, 2].view(-1, 1, 1)  # in periods
    v = scale * (cos * y - sin * x) + draw[:, 3].view(-1, 1, 1)

    def cell(t):  # -0.5 .. 0.5 within a period
        return t - t.floor() - 0.5

    def far(a, b):
        return (cell(a).square() + cell(b).square()).sqrt()

    def brick(u, v):  # each row half a brick further
        return cell(u / 2 + v.floor() / 2).abs()

    def wave(t):
        return torch.sin(2 * math.pi * t)

    shapes = [  # signed: positive is the figure, negative the ground, about one unit a period
        lambda u, v: 0.25 - cell(u).abs(),
        lambda u, v: 0.3 * wave(u / 2) * wave(v / 2),
        lambda u, v: 0.33 - far(u, v),
        lambda u, v: 0.12 - (far(u, v) - 0.3).abs(),
        lambda u, v: torch.maximum(cell(u).abs(), cell(v).abs()) - 0.36,
        lambda u, v: torch.maximum(torch.minimum(0.13 - cell(u).abs(), 0.4 - cell(v).abs()),
                                   torch.minimum(0.13 - cell(v).abs(), 0.4 - cell(u).abs())),
        lambda u, v: torch.minimum(0.36 - cell(v).abs(), 0.86 - 2 * brick(u, v)),
        lambda u, v: 0.25 - cell(v + 0.25 * wave(u / 2)).abs(),
        lambda u, v: 0.25 - cell(v + 2 * cell(u / 2).abs()).abs(),
        lambda u, v: torch.minimum(0.2 - cell(v).abs(), 0.55 - 2 * brick(u, v)),
    ]
    figure = torch.empty_like(u)
    for k, shape in enumerate(shapes):
        figure[label == k] = shape(u[label == k], v[label == k])
    figure = torch.sigmoid(figure * size / frequency.view(-1, 1, 1) * 1.5)  # soft by a pixel
    figure = figure.unsqueeze(1)

    gap, base = 0.3 + 0.2 * draw[:, 4], 0.25 + 0.25 * draw[:, 5]
    bright = torch.stack([base, base + gap], 1)
    bright = torch.where(draw[:, 6:7] < 0.5, bright, bright.flip(1))  # which is the lighter
    a, b = (hsv_to_rgb(draw[:, 7 + k], 0.3 + 0.6 * draw[:, 9 + k], bright[:, k]) for k in (0, 1))
    images = figure * a[:, :, None, None] + (1 - figure) * b[:, :, None, None]  # (count, 3, S, S)

    angle, strength = (draw[:, k].view(-1, 1, 1, 1) for k in (11, 12))
    angle, strength = 2 * math.pi * angle, 0.6 * strength
    images *= 1 + strength * (torch.cos(angle) * x + torch.sin(angle) * y)
    for level, coarse in enumerate((size, size // 2, size // 4, size // 8)):
        noise = uniform(coarse * coarse, seed, index, 1 + level).view(-1, 1, coarse, coarse)
        images += 0.12 * F.interpolate(noise - 0.5, size=(size, size), mode="nearest")
    factors = torch.stack([label, draw[:, 7], draw[:, 8], frequency, draw[:, 2], draw[:, 3],
                           rotation, strength.flatten(), draw[:, 11]], 1)
    return (images.clamp(0, 1) * 255).round().to(torch.uint8), factors


def hsv_to_rgb(hue, saturation, value):
    """v - v·s·max(0, min(k, 4 - k, 1)), k = (n + 6h) % 6, n = 5, 3, 1: h in turns -> (B, 3, ..)."""
    channels = []
    for n in (5, 3, 1):
        k = (n + 6 * hue) % 6
        channels.append(value - value * saturation * torch.minimum(k, 4 - k).clamp(0, 1))
    return torch.stack(channels, 1)
