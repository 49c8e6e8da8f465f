"""The Vision Transformer against its equations, what masks let through, and which files it reads.

    pytest tests/test_model.py
"""
import argparse
import json
import math
import os
import re
import runpy
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
import torch
from torch.nn.functional import cosine_similarity, gelu, interpolate, layer_norm
from torch.testing import assert_close

from model import (ARCHS, Block, Decoder, PatchEmbed, PrototypeHead, VisionTransformer, ema_update,
                   export_backbone, load_backbone, mlp_head, open_backbone, patchify, pool_tokens,
                   sincos_positions)

MODEL = Path(__file__).resolve().parent.parent / "model.py"
D, N = 32, 16  # width, and patches of a 16 x 16 image
stems = pytest.mark.parametrize("conv_stem", [False, True], ids=["plain", "conv_stem"])


def drawn(network, seed=0, std=0.3):
    """The network with every parameter drawn anew, none 0 or 1."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in network.parameters():
        parameter.data.normal_(0, std, generator=generator)
    return network


def small(seed=0, image_size=16, **options):
    """A 2-block ViT with 4 x 4 pixel patches, every parameter drawn anew."""
    return drawn(VisionTransformer(image_size, patch_size=4, embed_dim=D, depth=2, num_heads=4,
                                   **options), seed)


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def hide(*rows):
    """Lists of hidden patches -> bool (B, N)."""
    mask = torch.zeros(len(rows), N, dtype=torch.bool)
    for row, patches in zip(mask, rows):
        row[patches] = True
    return mask


def pixels(mask):
    """bool (B, N) -> the same at each pixel, (B, 3, 16, 16)."""
    return mask.view(-1, 1, 4, 1, 4, 1).expand(-1, 3, 4, 4, 4, 4).reshape(-1, 3, 16, 16)


IMAGES = noise(2, 3, 16, 16, seed=9)
MASK = hide([0, 3, 4, 9, 10, 15], [1, 2, 3, 8, 13, 14])


# ---------- the equations ----------

def test_attention_is_softmax_of_q_k_over_root_d_times_v():
    attention, x = small().blocks[0].attn, noise(2, 5, D)
    q, k, v = (x @ attention.qkv.weight.mT + attention.qkv.bias).split(D, dim=-1)
    heads = [slice(8 * h, 8 * h + 8) for h in range(4)]
    maps = [(q[..., h] @ k[..., h].mT / 8**0.5).softmax(-1) for h in heads]
    mixed = torch.cat([w @ v[..., h] for w, h in zip(maps, heads)], -1)
    assert_close(attention(x), mixed @ attention.proj.weight.mT + attention.proj.bias)
    assert_close(attention.weights(x), torch.stack(maps, 1))


def test_block_is_the_pre_norm_encoder_layer_of_torch():
    block, x = small().blocks[0], noise(2, 5, D)
    oracle = torch.nn.TransformerEncoderLayer(D, 4, 4 * D, 0, gelu, 1e-6, True, norm_first=True)
    for theirs, ours in [(oracle.norm1, block.norm1), (oracle.self_attn.out_proj, block.attn.proj),
                         (oracle.norm2, block.norm2), (oracle.linear1, block.mlp.fc1),
                         (oracle.linear2, block.mlp.fc2)]:
        theirs.load_state_dict(ours.state_dict())
    oracle.self_attn.in_proj_weight, oracle.self_attn.in_proj_bias = block.attn.qkv.parameters()
    assert_close(block(x), oracle(x))


def test_patches_are_cut_row_by_row():
    images = noise(2, 3, 8, 12)
    patches = patchify(images, 4)
    for n in range(6):  # 2 rows of 3
        top, left = 4 * (n // 3), 4 * (n % 3)
        assert patches[:, n].equal(images[:, :, top:top + 4, left:left + 4])
    assert patches.shape == (2, 6, 3, 4, 4)


def test_plain_patches_are_timms_convolution():
    vit = small()
    tokens = vit.patch_embed.proj(IMAGES).flatten(2).mT
    assert_close(vit.embed(IMAGES)[:, 1:], tokens + vit.pos_embed[:, 1:])


def test_vit_is_cls_and_patches_plus_positions_through_blocks_and_norm():
    vit = small()
    x = torch.cat([vit.cls_token.expand(2, 1, D), vit.patch_embed.proj(IMAGES).flatten(2).mT], 1)
    x = vit.blocks[1](vit.blocks[0](x + vit.pos_embed))
    variance, mean = torch.var_mean(x, -1, correction=0, keepdim=True)
    normal = (x - mean) / (variance + 1e-6).sqrt()
    assert_close(vit(IMAGES), normal * vit.norm.weight + vit.norm.bias)


@pytest.mark.parametrize("drop", [False, True])
def test_without_norm_the_tokens_are_those_before_the_last_norm(drop):
    vit = small()
    x = vit.blocks[1](vit.blocks[0](vit.embed(IMAGES, MASK, drop)))
    assert vit(IMAGES, MASK, drop, norm=False).equal(x)
    assert vit(IMAGES, MASK, drop).equal(vit.norm(x))


@pytest.mark.parametrize("options", [dict(), dict(mask=MASK), dict(mask=MASK, drop=True),
                                     dict(norm=False)], ids=str)
def test_the_cls_alone_is_the_first_of_all_tokens_and_has_its_gradient(options):
    whole, alone = small().double(), small().double()
    expected = whole(IMAGES.double(), **options)[:, :1]
    found = alone(IMAGES.double(), **options, cls_only=True)
    assert_close(found, expected)
    for x in (found, expected):
        x.square().sum().backward()
    for (name, a), b in zip(alone.named_parameters(), whole.parameters()):
        assert (a.grad is None) == (b.grad is None), name
        assert a.grad is None or torch.allclose(a.grad, b.grad), name


def test_last_blocks_are_the_tokens_on_the_way_through_the_norm():
    vit = small()
    first, last = vit.last_blocks(IMAGES, 2)
    assert_close(first, vit.norm(vit.blocks[0](vit.embed(IMAGES))))
    assert_close(last, vit(IMAGES))
    assert_close(vit.last_blocks(IMAGES, 1)[0], last) and len(vit.last_blocks(IMAGES, 1)) == 1


def test_last_attention_is_that_of_cls_to_the_patches():
    vit = small()
    x = vit.blocks[0](vit.embed(IMAGES))
    full = vit.blocks[1].attn.weights(vit.blocks[1].norm1(x))  # (B, H, 1 + N, 1 + N)
    assert_close(vit.last_attention(IMAGES), full[:, :, 0, 1:])
    assert_close(full.sum(-1), torch.ones(2, 4, 17))


@stems
def test_a_token_comes_from_the_pixels_of_its_own_patch(conv_stem):
    vit, other = small(conv_stem=conv_stem), IMAGES.clone()
    other[:, :, 4:8, 8:12] += 1  # row 1, column 2 of the 4 x 4 grid
    changed = (vit.embed(other) != vit.embed(IMAGES)).any(-1)  # (B, 1 + N)
    assert changed.nonzero().tolist() == [[0, 1 + 6], [1, 1 + 6]]


@stems
def test_the_layout_of_the_images_in_memory_does_not_matter(conv_stem):
    vit, channels_last = small(conv_stem=conv_stem), IMAGES.to(memory_format=torch.channels_last)
    assert_close(vit(channels_last, MASK), vit(IMAGES, MASK))


def test_conv_stem_refuses_a_patch_it_cannot_halve():
    for size in (2, 6, 12):
        with pytest.raises(ValueError, match=f"patch size {size}: .* 4, 8, 16"):
            PatchEmbed(size, D, conv_stem=True)
    assert PatchEmbed(8, D, conv_stem=True)(noise(2, 5, 3, 8, 8)).shape == (2, 5, D)


def test_width_must_be_a_multiple_of_the_heads():
    with pytest.raises(ValueError, match="embed_dim 30 .* num_heads 4"):
        VisionTransformer(16, 4, embed_dim=30, num_heads=4)


# ---------- masks ----------

@stems
@pytest.mark.parametrize("drop", [False, True])
def test_a_mask_that_hides_nothing_is_no_mask(conv_stem, drop):
    vit = small(conv_stem=conv_stem)
    assert vit(IMAGES, hide([], []), drop=drop).equal(vit(IMAGES))


@stems
@pytest.mark.parametrize("drop", [False, True])
@pytest.mark.parametrize("paint", [0.0, -1.0, 1e30, float("inf")])
def test_hidden_pixels_cannot_reach_the_output(conv_stem, drop, paint):
    vit = small(conv_stem=conv_stem)
    expected = vit(IMAGES, MASK, drop=drop)
    painted = IMAGES.masked_fill(pixels(MASK), paint)
    assert vit(painted, MASK, drop=drop).equal(expected)
    assert not vit(painted, ~MASK).equal(vit(IMAGES, ~MASK))


@stems
@pytest.mark.parametrize("drop", [False, True])
def test_hidden_pixels_get_no_gradient_and_all_visible_ones_do(conv_stem, drop):
    images = IMAGES.clone().requires_grad_()
    (small(conv_stem=conv_stem)(images, MASK, drop=drop) ** 3).sum().backward()
    assert images.grad.eq(0).equal(pixels(MASK))


def test_hidden_patches_become_the_mask_token_at_their_position():
    vit = small()
    tokens = vit.embed(IMAGES)
    for b, patch in MASK.nonzero():
        tokens[b, 1 + patch] = vit.mask_token[0, 0] + vit.pos_embed[0, 1 + patch]
    assert_close(vit.embed(IMAGES, MASK), tokens)
    out = vit(IMAGES, MASK)
    assert (out[0, 1] - out[0, 1 + 15]).abs().max() > 0.1  # two hidden ones, told apart by position


def test_dropping_equals_cutting_the_hidden_tokens_out():
    vit = small()
    for b in range(2):
        visible = [0] + [1 + n for n in range(N) if not MASK[b, n]]  # CLS and the others, in order
        x = vit.embed(IMAGES[b:b + 1])[:, visible]
        expected = vit.norm(vit.blocks[1](vit.blocks[0](x)))[0]
        assert_close(vit(IMAGES, MASK, drop=True)[b], expected)


def test_patches_with_their_positions_commute_with_permutation():
    vit, order = small(), torch.randperm(N, generator=torch.Generator().manual_seed(0))
    x = vit.embed(IMAGES)
    moved = torch.cat([x[:, :1], x[:, 1:][:, order]], 1)
    out = vit.norm(vit.blocks[1](vit.blocks[0](moved)))
    assert_close(out[:, 1:], vit(IMAGES)[:, 1:][:, order])
    assert_close(out[:, 0], vit(IMAGES)[:, 0])


def test_dropping_does_not_use_the_mask_token():
    vit = small()
    before = vit(IMAGES, MASK, drop=True)
    vit.mask_token.data += 1
    assert vit(IMAGES, MASK, drop=True).equal(before)
    assert not vit(IMAGES, MASK).equal(before)


def test_dropping_everything_leaves_cls():
    everything = torch.ones(2, N, dtype=torch.bool)
    assert small()(IMAGES, everything, drop=True).shape == (2, 1, D)
    assert small()(IMAGES, everything).shape == (2, 1 + N, D)


def test_dropping_refuses_rows_of_unequal_count():
    with pytest.raises(ValueError, match="13 to 14"):
        small()(IMAGES, hide([1, 2, 3], [1, 2]), drop=True)
    assert small()(IMAGES, hide([1, 2, 3], [1, 2])).shape == (2, 1 + N, D)


@pytest.mark.parametrize("drop", [False, True])
@pytest.mark.parametrize("wrong", [
    MASK.float(), MASK.int(), MASK[:1], MASK[:, 1:], MASK.view(2, 4, 4)],
    ids=["float", "int", "one row", "15 patches", "grid"])
def test_a_mask_of_wrong_shape_or_type_is_refused(wrong, drop):
    message = f"mask {tuple(wrong.shape)} {wrong.dtype} must be bool (2, 16)"
    with pytest.raises(ValueError, match=re.escape(message)):
        small()(IMAGES, wrong, drop=drop)


# ---------- other image sizes ----------

def test_positions_of_the_built_size_are_pos_embed_itself():
    vit = small()
    assert vit.positions((4, 4)) is vit.pos_embed


@pytest.mark.parametrize("height, width", [(16, 32), (32, 16), (8, 12), (4, 4), (28, 60)])
@stems
def test_any_size_gives_cls_and_one_token_a_patch(height, width, conv_stem):
    images = noise(2, 3, height, width)
    vit = small(conv_stem=conv_stem)
    assert vit(images).shape == (2, 1 + height // 4 * (width // 4), D)
    hidden = torch.zeros(2, height // 4 * (width // 4), dtype=torch.bool)
    assert vit(images, hidden, drop=True).equal(vit(images))


def test_positions_are_interpolated_over_rows_and_columns_and_cls_is_kept():
    vit = small(image_size=(12, 20))  # 3 x 5 patches
    grid = vit.pos_embed[0, 1:].T.reshape(1, D, 3, 5)
    expected = interpolate(grid, size=(6, 4), mode="bicubic")[0].flatten(1).T
    assert_close(vit.positions((6, 4))[0, 1:], expected)
    assert vit.positions((6, 4))[0, 0].equal(vit.pos_embed[0, 0])


def test_positions_that_depend_on_the_row_alone_still_do():
    vit = small(image_size=(12, 20))
    vit.pos_embed.data[0, 1:] = torch.arange(3.).repeat_interleave(5).view(15, 1).expand(15, D)
    larger = vit.positions((7, 9))[0, 1:].view(7, 9, D)
    assert_close(larger, larger[:, :1].expand(7, 9, D))
    assert (larger.diff(dim=0) > 0).all()


def test_constant_positions_stay_constant():
    vit = small()
    vit.pos_embed.data[:] = 0.7
    assert_close(vit.positions((7, 9)), torch.full((1, 64, D), 0.7))


def test_other_sizes_still_train_the_positions():
    vit = small()
    vit(noise(1, 3, 24, 8)).pow(3).sum().backward()
    assert (vit.pos_embed.grad.abs().sum(-1) > 0).all()


def test_a_size_that_the_patch_does_not_divide_is_refused_with_a_way_out():
    for shape, way_out in [((18, 16), "16x16"), ((16, 18), "16x16"), ((30, 3), "32x4")]:
        with pytest.raises(ValueError, match=f"{shape[0]}x{shape[1]} .* patch size 4.* {way_out}"):
            small()(noise(1, 3, *shape))
        with pytest.raises(ValueError, match=f"{shape[0]}x{shape[1]} .* patch size 4.* {way_out}"):
            VisionTransformer(shape, 4, embed_dim=D, num_heads=4)


@pytest.mark.parametrize("grid", [(2, 3), (4, 1), (3, 3)])
def test_fixed_positions_are_sine_and_cosine_of_column_and_row_and_0_for_cls(grid):
    table = sincos_positions(grid, 16)
    assert table.shape == (1, 1 + grid[0] * grid[1], 16) and table[0, 0].eq(0).all()
    for row in range(grid[0]):
        for column in range(grid[1]):
            for n, frequency in enumerate([1, 0.1, 0.01, 0.001]):  # 10,000 ** (-n / 4)
                angles = [column * frequency, row * frequency]
                wanted = [f(x) for x in angles for f in (math.sin, math.cos)]
                assert_close(table[0, 1 + row * grid[1] + column, n::4], torch.tensor(wanted))


@pytest.mark.parametrize("width", [2, 30, 33])
def test_fixed_positions_refuse_a_width_that_4_does_not_divide(width):
    with pytest.raises(ValueError, match=f"width {width} must be a multiple of 4"):
        sincos_positions((2, 3), width)


def test_fixed_positions_are_all_that_is_not_trained():
    vit = VisionTransformer((8, 12), 4, D, 1, 4, fixed_pos=True)
    assert vit.pos_embed.equal(sincos_positions((2, 3), D))
    assert [name for name, x in vit.named_parameters() if not x.requires_grad] == ["pos_embed"]
    assert all(x.requires_grad for x in VisionTransformer(8, 4, D, 1, 4).parameters())


# ---------- what stands on a backbone ----------

def test_mlp_head_is_linear_norm_activation_linear():
    head, x = drawn(mlp_head(D, 24, 8)), noise(2, 3, D)
    first, norm, _, last = head
    hidden = layer_norm(x @ first.weight.mT + first.bias, [24], norm.weight, norm.bias)
    assert_close(head(x), gelu(hidden) @ last.weight.mT + last.bias)


NORM, RELU = torch.nn.BatchNorm1d, torch.nn.ReLU


@pytest.mark.parametrize("options, layers", [
    ({}, "Linear LayerNorm GELU Linear"), (dict(layers=1), "Linear"),
    (dict(layers=3), "Linear LayerNorm GELU Linear LayerNorm GELU Linear"),
    (dict(norm=None), "Linear GELU Linear"), (dict(last=NORM, layers=1), "Linear BatchNorm1d"),
    (dict(norm=NORM, activation=RELU, last=torch.nn.LayerNorm, bias=False),
     "Linear BatchNorm1d ReLU Linear LayerNorm")])
def test_mlp_head_has_the_layers_asked_for(options, layers):
    head = mlp_head(5, 7, 3, **options)
    linear = [layer for layer in head if isinstance(layer, torch.nn.Linear)]
    widths = [5] + [7] * (len(linear) - 1) + [3]
    assert " ".join(type(layer).__name__ for layer in head) == layers
    assert [(x.in_features, x.out_features) for x in linear] == [*zip(widths, widths[1:])]
    assert {layer.bias is not None for layer in linear} == {options.get("bias", True)}
    assert head(noise(4, 5)).shape == (4, 3)


def test_prototype_logits_are_cosines_of_prototypes_and_an_mlp():
    head, x = drawn(PrototypeHead(D, 24, 8, 5)), noise(2, 3, D)
    a, b, c = (layer for layer in head.mlp if isinstance(layer, torch.nn.Linear))
    z = gelu(gelu(x @ a.weight.mT + a.bias) @ b.weight.mT + b.bias) @ c.weight.mT + c.bias
    assert_close(head(x), cosine_similarity(z.unsqueeze(-2), head.prototypes, dim=-1))
    assert_close(head.embed(x), z / z.norm(dim=-1, keepdim=True))
    assert head(x).shape == (2, 3, 5) and head(x[0, 0]).shape == (5,)


def test_the_length_of_a_prototype_does_not_matter():
    head, x = drawn(PrototypeHead(D, 24, 8, 5)), noise(6, D)
    before = head(x)
    head.prototypes.data *= torch.tensor([[0.1], [1], [3], [10], [100]])
    assert_close(head(x), before)


def test_the_mean_of_prototype_logits_is_the_logit_of_the_mean():
    head, x = drawn(PrototypeHead(D, 24, 8, 5)), noise(6, D)
    assert_close(head.logits(head.embed(x).mean(0)), head(x).mean(0))


def test_decoder_reads_visible_tokens_in_order_and_mask_tokens_at_hidden_places():
    decoder, tokens = drawn(Decoder((4, 4), D, 6, width=64, depth=2)), noise(2, 1 + 10, D)
    for b in range(2):
        embedded = iter(tokens[b] @ decoder.embed.weight.mT + decoder.embed.bias)
        x = [next(embedded)]  # CLS
        x += [decoder.mask_token if hidden else next(embedded) for hidden in MASK[b]]
        x = torch.stack(x) + sincos_positions((4, 4), 64)
        x = decoder.norm(decoder.blocks[1](decoder.blocks[0](x)))[0]
        expected = x @ decoder.pred.weight.mT + decoder.pred.bias
        assert_close(decoder(tokens, MASK)[b], expected)  # (1 + N, 6)


@pytest.mark.parametrize("width, heads", [(16, 1), (32, 1), (96, 3), (128, 4)])
def test_decoder_heads_are_32_wide_and_its_positions_are_in_no_file(width, heads):
    decoder = Decoder((2, 3), D, 6, width=width, depth=2)
    assert [block.attn.num_heads for block in decoder.blocks] == [heads, heads]
    assert decoder.pos_embed.equal(sincos_positions((2, 3), width))
    assert "pos_embed" not in decoder.state_dict()


# ---------- names and numbers ----------

def test_parameter_names_are_timms_and_mask_token():
    tiny = ARCHS["vit_tiny"](image_size=32, patch_size=16)
    outer = """cls_token pos_embed patch_embed.proj.weight patch_embed.proj.bias
               norm.weight norm.bias"""
    inner = """norm1.weight norm1.bias attn.qkv.weight attn.qkv.bias attn.proj.weight attn.proj.bias
               norm2.weight norm2.bias mlp.fc1.weight mlp.fc1.bias mlp.fc2.weight mlp.fc2.bias"""
    blocks = [f"blocks.{n}.{name}" for n in range(12) for name in inner.split()]
    assert set(tiny.state_dict()) == {*outer.split(), *blocks, "mask_token"}


@pytest.fixture
def undrawn(monkeypatch):
    """Networks are filled with a pattern: drawing 20 million random numbers takes a second."""
    def fill(tensor, *args, **kwargs):
        pattern = torch.arange(tensor.numel()) % 127 - 63
        return tensor.data.copy_(pattern.view_as(tensor) / 2000)

    for init in ("xavier_uniform_", "trunc_normal_", "kaiming_uniform_"):
        monkeypatch.setattr(torch.nn.init, init, fill)


@pytest.mark.parametrize("arch, width, heads, expected", [
    ("vit_tiny", 192, 3, 5_524_416), ("vit_small", 384, 6, 21_665_664),
    ("vit_small_12heads", 384, 12, 21_665_664), ("vit_base", 768, 12, 85_798_656)])
def test_parameter_count_is_timms_and_one_mask_token(arch, width, heads, expected, undrawn):
    vit = ARCHS[arch](image_size=224, patch_size=16)
    patch, block = 3 * 16 * 16 * width + width, 12 * width**2 + 13 * width
    assert expected == patch + (1 + 197) * width + 12 * block + 2 * width
    assert sum(x.numel() for x in vit.parameters()) == expected + width
    assert {block.attn.num_heads for block in vit.blocks} == {heads}


@pytest.mark.parametrize("arch", ["vit_micro", "vit_mini"])
def test_the_small_ones_take_small_images(arch):
    vit = ARCHS[arch](image_size=32, patch_size=4)
    assert vit(noise(1, 3, 32, 32)).shape == (1, 65, vit.embed_dim)


def test_pooling_takes_cls_or_the_mean_of_the_patches_or_both():
    tokens = torch.tensor([[[1., 2], [3, 4], [5, 8]]])  # CLS and two patches
    assert pool_tokens(tokens, "cls").tolist() == [[1, 2]]
    assert pool_tokens(tokens, "mean").tolist() == [[4, 6]]
    assert pool_tokens(tokens, "cls+mean").tolist() == [[1, 2, 4, 6]]


# ---------- the moving average ----------

def test_moving_average_of_0_towards_1_at_09_is_01():
    teacher, student = torch.nn.Linear(2, 3), torch.nn.Linear(2, 3)
    for network, value in ((teacher, 0.0), (student, 1.0)):
        torch.nn.init.constant_(network.weight, value)
        torch.nn.init.constant_(network.bias, 10 * value)
    ema_update(teacher, student, 0.9)
    assert_close(teacher.weight.data, torch.full((3, 2), 0.1))
    assert_close(teacher.bias.data, torch.full((3,), 1.0))
    assert student.weight.eq(1).all() and student.bias.eq(10).all()


def test_momentum_1_keeps_and_momentum_0_copies():
    teacher, student, before = small(1), small(2), small(1).state_dict()
    ema_update(teacher, student, 1)
    assert all(x.equal(before[name]) for name, x in teacher.state_dict().items())
    ema_update(teacher, student, 0)
    assert all(x.equal(student.state_dict()[name]) for name, x in teacher.state_dict().items())


def test_buffers_are_copied_at_any_momentum():
    teacher, student = torch.nn.BatchNorm1d(3), torch.nn.BatchNorm1d(3)
    student(noise(8, 3) + 5)
    ema_update(teacher, student, 0.9)
    assert teacher.running_mean.equal(student.running_mean)
    assert teacher.num_batches_tracked == 1


def test_parameters_go_by_name_and_those_of_the_student_alone_are_passed_over():
    teacher, student = torch.nn.ModuleDict(), torch.nn.ModuleDict()
    student["predictor"], student["b"] = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)
    for network in (teacher, student):
        network["a"] = torch.nn.Linear(2, 2)
    teacher["b"] = torch.nn.Linear(2, 2)
    ema_update(teacher, student, 0)
    for name in ("a", "b"):
        assert teacher[name].weight.equal(student[name].weight)
    assert set(teacher) == {"a", "b"}


def test_the_teacher_stays_frozen():
    teacher, student = small(1).requires_grad_(False), small(2)
    ema_update(teacher, student, 0.5)
    assert all(not x.requires_grad and x.grad_fn is None for x in teacher.parameters())


# ---------- stochastic depth ----------

def test_drop_path_keeps_twice_the_branch_or_nothing():
    block, x = Block(D, 4, 4, drop_path=0.5), torch.ones(2000, 1, 1)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        out = block.skip(x)
    assert out.unique().tolist() == [0, 2]
    assert abs(out.mean() - 1) < 5 / 2000**0.5  # deviation of one image: 1


def test_drop_path_drops_all_tokens_of_an_image_together():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        out = Block(D, 4, 4, drop_path=0.25).skip(torch.ones(400, 5, 8))
    assert_close(out, out[:, :1, :1].expand(400, 5, 8))
    assert_close(out.unique(), torch.tensor([0, 4 / 3]))
    assert abs(out.eq(0).float().mean() - 0.25) < 5 * (0.25 * 0.75 / 400) ** 0.5


def test_drop_path_leaves_either_branch_out_of_the_sum():
    block, x = small(drop_path=0.5).blocks[1], noise(1, 5, D)
    y, z = x + 2 * block.attn(block.norm1(x)), x
    choices = [sum_ for base in (y, z) for sum_ in (base, base + 2 * block.mlp(block.norm2(base)))]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        outs = [block(x) for _ in range(40)]
    seen = [min(range(4), key=lambda n: (out - choices[n]).abs().max()) for out in outs]
    assert set(seen) == {0, 1, 2, 3}
    assert all(torch.allclose(out, choices[n], atol=1e-5) for out, n in zip(outs, seen))


def test_drop_path_does_nothing_in_evaluation():
    still, dropping = small().eval(), small(drop_path=0.9).eval()
    assert dropping(IMAGES).equal(still(IMAGES))


def test_drop_path_grows_with_depth():
    rates = [block.drop_path for block in VisionTransformer(16, 4, 32, 3, 4, drop_path=0.2).blocks]
    assert_close(rates, [0.0, 0.1, 0.2])


# ---------- files ----------

def prefixed(prefix, weights):
    return {prefix + name: x for name, x in weights.items()}


def pieces():
    """Weights to be found, weights that must not be taken, and a head."""
    wanted, other = small(1).state_dict(), small(2).state_dict()
    return wanted, other, {"head.weight": noise(10, D), "head.bias": noise(10)}


def hugging_face(weights):
    """A 2-block backbone as transformers' ViTModel names it, query, key and value apart."""
    renamed = {"embeddings.cls_token": weights["cls_token"],
               "embeddings.position_embeddings": weights["pos_embed"]}
    theirs = {"patch_embed.proj": "embeddings.patch_embeddings.projection", "norm": "layernorm"}
    for n in range(2):
        ours, layer = f"blocks.{n}.", f"encoder.layer.{n}."
        theirs |= {ours + "norm1": layer + "layernorm_before", ours + "mlp.fc2":
                   layer + "output.dense", ours + "mlp.fc1": layer + "intermediate.dense",
                   ours + "norm2": layer + "layernorm_after",
                   ours + "attn.proj": layer + "attention.output.dense"}
        for part in ("weight", "bias"):
            names = (f"{layer}attention.attention.{x}.{part}" for x in ("query", "key", "value"))
            renamed |= zip(names, weights[f"{ours}attn.qkv.{part}"].clone().split(D))
    return renamed | {f"{theirs[name]}.{part}": weights[f"{name}.{part}"]
                      for name in theirs for part in ("weight", "bias")}


def layouts():
    """The files of the wild, as they are: name -> (content, does it hold our mask token)."""
    wanted, other, head = pieces()
    timm, timm_other = ({name: x for name, x in weights.items() if name != "mask_token"}
                        for weights in (wanted, other))
    dino_head = {"head.mlp.0.weight": noise(8, D), "head.last_layer.weight_g": noise(8, 1)}
    decoder = {"mask_token": noise(1, 1, 512), "decoder_pos_embed": noise(1, 17, 512),
               "decoder_embed.weight": noise(512, D), "decoder_blocks.0.norm1.weight": noise(512),
               "decoder_norm.bias": noise(512), "decoder_pred.bias": noise(48)}
    moco_head = {"head.0.weight": noise(8, D), "head.1.running_mean": noise(8)}
    options = argparse.Namespace(arch="vit_small", patch_size=4, lr=0.1)

    def both(prefix, student_prefix, extra):
        return {"student": prefixed(student_prefix, timm_other | extra),
                "teacher": prefixed(prefix, timm) | extra, "epoch": 100, "args": options}

    ibot = both("backbone.", "module.backbone.", dino_head)
    ibot["teacher"]["backbone.masked_embed"] = wanted["mask_token"].view(1, D)
    ibot["student"]["module.backbone.masked_embed"] = other["mask_token"].view(1, D)
    moco = (prefixed("module.momentum_encoder.", timm_other | moco_head)
            | prefixed("module.base_encoder.", timm | moco_head)
            | {"module.predictor.0.weight": noise(8, 8)})
    vit = prefixed("vit.", hugging_face(wanted))
    their_decoder = prefixed("decoder.", decoder) | {
        "decoder.decoder_layers.0.attention.attention.query.weight": noise(512, 512)}
    return {
        "ours": ({"step": 7, "args": {"arch": "vit_micro"}, "student": prefixed("backbone.", other),
                  "teacher": prefixed("backbone.", wanted) | prefixed("head.", head)}, True),
        "ours, no teacher": ({"frozen": prefixed("backbone.", other), "args": {"arch": "vit_micro"},
                              "student": prefixed("backbone.", wanted) | prefixed("head.", head),
                              "optimizer": {"state": {0: {"exp_avg": noise(3)}}}}, True),
        "bare": (wanted, True),
        "compiled": (prefixed("_orig_mod.", wanted), True),
        "compiled and distributed": (prefixed("module._orig_mod.backbone.", wanted), True),
        "timm": (timm | head, False),
        "timm distilled": (timm | head | prefixed("head_dist.", {"weight": noise(10, D)}), False),
        "deit": ({"model": timm | head}, False),
        "dino": (both("backbone.", "module.backbone.", dino_head), False),
        "dino distributed": (both("module.backbone.", "module.backbone.", dino_head), False),
        "ibot": (ibot, True),
        "mae": ({"model": timm | decoder, "optimizer": {"state": {}}, "args": options}, False),
        "both in one dict": (prefixed("student.backbone.", other)
                             | prefixed("teacher.backbone.", wanted), True),
        "moco v3": ({"epoch": 300, "arch": "vit_small", "state_dict": moco}, False),
        "moco v3, other order": ({"state_dict": dict(reversed(moco.items()))}, False),
        "hugging face": (hugging_face(wanted) | {"pooler.dense.weight": noise(D, D)}, False),
        "hugging face classifier": (vit | prefixed("classifier.", {"weight": noise(10, D)}), False),
        "hugging face mae": (vit | their_decoder, False),
        "hugging face masked": (vit | {"vit.embeddings.mask_token": wanted["mask_token"],
                                       "decoder.0.weight": noise(48, D, 1, 1)}, True),
    }


def written(tmp_path, content):
    torch.save(content, tmp_path / "weights.pt")
    return tmp_path / "weights.pt"


@pytest.mark.parametrize("layout", layouts())
def test_the_backbone_is_found_in_every_layout(layout, tmp_path):
    (content, has_mask_token), vit, wanted = layouts()[layout], small(3), pieces()[0]
    own_mask_token = vit.mask_token.clone()
    assert load_backbone(vit, written(tmp_path, content)) is vit
    for name, x in vit.state_dict().items():
        if name != "mask_token":
            assert x.equal(wanted[name]), name
    assert vit.mask_token.equal(wanted["mask_token"] if has_mask_token else own_mask_token)
    assert vit(IMAGES).equal(small(1)(IMAGES))


def without(weights, name):
    return {other: x for other, x in weights.items() if other != name}


@pytest.mark.parametrize("part", ["query", "key", "value"])
def test_a_missing_query_key_or_value_is_listed(part, tmp_path):
    weights = hugging_face(pieces()[0])
    del weights[f"encoder.layer.1.attention.attention.{part}.bias"]
    with pytest.raises(ValueError, match="missing blocks.1.attn.qkv.bias; unexpected"):
        load_backbone(small(3), written(tmp_path, weights))


@pytest.mark.parametrize("layout", [name for name in layouts() if "face" in name] + ["timm"])
def test_safetensors_hold_the_same_as_pickles(layout, tmp_path):
    safetensors, path = pytest.importorskip("safetensors.torch"), tmp_path / "model.safetensors"
    safetensors.save_file(layouts()[layout][0], path)
    assert load_backbone(small(3), path)(IMAGES).equal(small(1)(IMAGES))


def test_safetensors_without_the_package_asks_for_it(tmp_path, monkeypatch):
    for name in ("safetensors", "safetensors.torch"):
        monkeypatch.setitem(sys.modules, name, None)  # as if it were not installed
    with pytest.raises(ValueError, match="model.safetensors: .* pip install safetensors"):
        load_backbone(small(), tmp_path / "model.safetensors")


MISFITS = {
    "missing norm.bias": lambda w: without(w, "norm.bias"),
    "missing blocks.1.attn.qkv.weight": lambda w: without(w, "blocks.1.attn.qkv.weight"),
    "missing pos_embed": lambda w: without(w, "pos_embed"),
    "unexpected blocks.2.norm1.bias": lambda w: w | {"blocks.2.norm1.bias": noise(D)},
    "unexpected blocks.0.ls1.gamma": lambda w: w | {"blocks.0.ls1.gamma": noise(D)},
    "norm.bias is (33,), not (32,)": lambda w: w | {"norm.bias": noise(33)},
    "pos_embed is (1, 26, 32), not (1, 17, 32)": lambda w: w | {"pos_embed": noise(1, 26, D)},
    "cls_token is (1, 32), not (1, 1, 32)": lambda w: w | {"cls_token": noise(1, D)},
    "mask_token is (1, 1, 512), not (1, 1, 32)": lambda w: w | {"mask_token": noise(1, 1, 512)},
}


@pytest.mark.parametrize("message", MISFITS)
def test_weights_that_do_not_fit_are_listed_and_change_nothing(message, tmp_path):
    vit, path = small(3), written(tmp_path, MISFITS[message](pieces()[0]))
    with pytest.raises(ValueError, match=re.escape(message)):
        load_backbone(vit, path)
    assert all(x.equal(small(3).state_dict()[name]) for name, x in vit.state_dict().items())


def test_all_that_is_wrong_is_counted(tmp_path):
    rest = {name: x for name, x in pieces()[0].items() if not name.startswith("blocks.0.")}
    with pytest.raises(ValueError, match="missing blocks.0.norm1.weight; .*; and 4 more"):  # of 12
        load_backbone(small(3), written(tmp_path, rest))


JUNK = {"empty": b"", "csv": b"step,loss\n1,0.5\n", "page": b"<!DOCTYPE html><html></html>\n",
        "git lfs": b"version https://git-lfs.github.com/spec/v1\n", "json": b'{"step": 1}\n',
        "picture": b"\x89PNG\r\n\x1a\n" + bytes(99), "cut off": b"PK\x03\x04" + bytes(99)}


@pytest.mark.parametrize("content", JUNK.values(), ids=JUNK)
def test_a_file_that_is_no_checkpoint_is_refused_by_name(content, tmp_path):
    path = tmp_path / "weights.pt"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="weights.pt .*checkpoint of plain tensors"):
        load_backbone(small(), path)


@pytest.mark.parametrize("content", JUNK.values(), ids=JUNK)
def test_broken_safetensors_are_refused_by_name(content, tmp_path):
    pytest.importorskip("safetensors")
    path = tmp_path / "model.safetensors"
    with pytest.raises(ValueError, match="no such file: .*model.safetensors"):
        load_backbone(small(), path)
    path.write_bytes(content)
    with pytest.raises(ValueError, match="model.safetensors is no checkpoint of plain tensors"):
        load_backbone(small(), path)


@pytest.mark.parametrize("content", JUNK.values(), ids=JUNK)
def test_only_a_pickle_with_code_is_said_to_hold_code(content, tmp_path):
    path = tmp_path / "weights.pt"
    path.write_bytes(content)
    with pytest.raises(ValueError) as caught:
        load_backbone(small(), path)
    assert "it holds code" not in str(caught.value)


def test_a_directory_and_a_missing_file_are_refused_by_name(tmp_path):
    with pytest.raises(ValueError, match="no such file: .*nowhere.pt"):
        load_backbone(small(), tmp_path / "nowhere.pt")
    with pytest.raises(ValueError, match=re.escape(str(tmp_path))):
        load_backbone(small(), tmp_path)


FOREIGN = {"resnet": {"conv1.weight": noise(3), "fc.bias": noise(3)}, "tensor": noise(3),
           "list": [noise(3)], "empty": {}, "text": "cls_token", "numbered": {0: noise(3)},
           "tensor inside": {"model": noise(3)}, "empty teacher": {"teacher": {}}}


@pytest.mark.parametrize("content", FOREIGN.values(), ids=FOREIGN)
def test_a_file_without_a_backbone_is_refused(content, tmp_path):
    with pytest.raises(ValueError, match="weights.pt .*no cls_token"):
        load_backbone(small(), written(tmp_path, content))


class Hostile:
    """Creates a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_that_runs_code_is_refused_and_has_not_run(zipped, tmp_path):
    path, trace = tmp_path / "weights.pt", tmp_path / "it ran"
    torch.save(pieces()[0] | {"args": Hostile(trace)}, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(ValueError, match="weights.pt .*it holds code"):
        load_backbone(small(), path)
    assert not trace.exists()
    torch.load(path, weights_only=False)  # and it would have
    assert trace.exists()


def test_a_class_of_the_users_own_is_refused_even_if_harmless(tmp_path):
    content = pieces()[0] | {"args": re.compile("a")}
    with pytest.raises(ValueError, match="it holds code"):
        load_backbone(small(), written(tmp_path, content))


# ---------- heads, which no shape tells ----------

def one_block(width, heads):
    return VisionTransformer(16, 8, width, depth=1, num_heads=heads)


def zeros(vit):
    """Its weights without the mask token, all 0: one number a tensor, in memory and in a file."""
    return {name: torch.zeros(x.shape)
            for name, x in vit.state_dict().items() if name != "mask_token"}


@cache
def trained():
    """File -> (content, width, heads that it was trained with, heads to refuse)."""
    tiny, weights, base = (zeros(one_block(width, 1)) for width in (192, 384, 768))
    dino = {"student": prefixed("module.backbone.", weights), "epoch": 100,
            "teacher": prefixed("backbone.", weights), "args": argparse.Namespace(arch="vit_small")}
    moco = {"arch": "vit_small", "state_dict": prefixed("module.base_encoder.", weights)}
    ours = {"args": {"arch": "vit_small_12heads"}, "teacher": prefixed("backbone.", weights)}
    return {"dino": (dino, 384, 6, 12), "moco v3": (moco, 384, 12, 6), "ours": (ours, 384, 12, 6),
            "deit tiny": ({"model": tiny}, 192, 3, 6), "mae base": ({"model": base}, 768, 12, 16)}


@pytest.mark.parametrize("file", trained())
def test_another_number_of_heads_than_the_files_is_refused_and_changes_nothing(file, tmp_path):
    content, width, right, wrong = trained()[file]
    path, vit = written(tmp_path, content), one_block(width, wrong)
    before = {name: x.clone() for name, x in vit.state_dict().items()}
    with pytest.raises(ValueError, match=f"{right} attention heads, not {wrong}: .* with {right}"):
        load_backbone(vit, path)
    assert all(x.equal(before[name]) for name, x in vit.state_dict().items())
    assert load_backbone(one_block(width, right), path).norm.weight.eq(0).all()


def test_num_heads_overrides_what_the_file_seems_to_have(tmp_path):
    path = written(tmp_path, trained()["dino"][0])
    assert load_backbone(one_block(384, 8), path, num_heads=8).norm.weight.eq(0).all()
    with pytest.raises(ValueError, match="8 attention heads, not 6"):
        load_backbone(one_block(384, 6), path, num_heads=8)


@pytest.mark.parametrize("file, config, heads", [
    ("dino", dict(hidden_size=384, num_attention_heads=8), 8),
    ("moco v3", dict(hidden_size=384, num_attention_heads=8), 8),
    ("ours", dict(hidden_size=384, num_attention_heads=8), 12),  # which says it itself
    ("dino", dict(hidden_size=192, num_attention_heads=8), 6),  # of another network
    ("dino", dict(hidden_size=384), 6), ("dino", dict(num_attention_heads=8), 6), ("dino", [8], 6)])
def test_a_config_of_the_same_width_beside_the_file_decides(file, config, heads, tmp_path):
    path, wrong = written(tmp_path, trained()[file][0]), 6 if heads == 8 else 8
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert load_backbone(one_block(384, heads), path).norm.weight.eq(0).all()
    with pytest.raises(ValueError, match=f"{heads} attention heads, not {wrong}"):
        load_backbone(one_block(384, wrong), path)


@pytest.mark.parametrize("heads", [1, 4, 8])
def test_heads_of_a_width_that_is_not_published_are_not_checked(heads, tmp_path):
    vit = VisionTransformer(16, 4, D, depth=2, num_heads=heads)
    assert load_backbone(vit, written(tmp_path, pieces()[0])).norm.bias.equal(small(1).norm.bias)


def test_moco_v3s_small_opens_as_the_one_with_12_heads_alone(undrawn, tmp_path):
    weights = zeros(ARCHS["vit_small"](image_size=16, patch_size=8))
    path = written(tmp_path, {"state_dict": prefixed("module.base_encoder.", weights)})
    with pytest.raises(ValueError, match="12 attention heads, not 6: .*vit_small_12heads"):
        open_backbone(path, "vit_small")
    assert open_backbone(path, "vit_small_12heads")[0].num_heads == 12


# ---------- a network for a file ----------

MICRO = dict(arch="vit_micro", image_size=16, patch_size=4)


def micro_checkpoint(tmp_path):
    vit = ARCHS["vit_micro"](image_size=16, patch_size=4)
    teacher = prefixed("backbone.", vit.state_dict())
    return vit, written(tmp_path, {"step": 7, "args": MICRO | {"lr": 0.1}, "teacher": teacher})


@pytest.mark.parametrize("arch", [None, "vit_micro"])
def test_our_checkpoint_says_its_own_architecture(arch, tmp_path):
    vit, path = micro_checkpoint(tmp_path)
    opened, options = open_backbone(path, arch)
    assert opened(IMAGES).equal(vit(IMAGES))
    assert options == MICRO | {"lr": 0.1}


def test_an_arch_that_contradicts_our_checkpoint_is_refused(tmp_path):
    with pytest.raises(ValueError, match="--arch vit_tiny contradicts .*vit_micro"):
        open_backbone(micro_checkpoint(tmp_path)[1], "vit_tiny")


def tiny_from_elsewhere(tmp_path):
    vit = ARCHS["vit_tiny"](image_size=24, patch_size=8)
    return vit, written(tmp_path, {"model": vit.state_dict(), "args": argparse.Namespace(arch="?")})


def test_another_file_needs_arch_and_its_sizes_are_read_from_the_weights(tmp_path):
    vit, path = tiny_from_elsewhere(tmp_path)
    opened, options = open_backbone(path, "vit_tiny")
    assert options == dict(arch="vit_tiny", image_size=24, patch_size=8)
    assert opened(noise(1, 3, 24, 24)).equal(vit(noise(1, 3, 24, 24)))


@pytest.mark.parametrize("arch", [None, "resnet50"])
def test_another_file_without_a_known_arch_asks_for_it(arch, tmp_path):
    with pytest.raises(ValueError, match="add --arch, one of vit_micro, .*vit_base"):
        open_backbone(tiny_from_elsewhere(tmp_path)[1], arch)


def test_another_file_of_another_width_is_refused_with_its_shapes(tmp_path):
    with pytest.raises(ValueError, match=r"cls_token is \(1, 1, 192\), not \(1, 1, 384\)"):
        open_backbone(tiny_from_elsewhere(tmp_path)[1], "vit_small")


@pytest.mark.parametrize("name", ["patch_embed.proj.weight", "pos_embed"])
def test_another_file_without_what_tells_its_sizes_is_refused_by_name(name, tmp_path):
    weights = ARCHS["vit_tiny"](image_size=16, patch_size=8).state_dict()
    path = written(tmp_path, without(weights, name))
    with pytest.raises(ValueError, match=name):
        open_backbone(path, "vit_tiny")


# ---------- timm, there and back ----------

TINY = dict(image_size=32, patch_size=8)
OUTER = {"cls_token": (1, 1, 192), "pos_embed": (1, 17, 192), "patch_embed.proj.bias": (192,),
         "patch_embed.proj.weight": (192, 3, 8, 8), "norm.weight": (192,), "norm.bias": (192,)}
INNER = {"norm1.weight": (192,), "norm1.bias": (192,), "attn.qkv.weight": (576, 192),
         "attn.qkv.bias": (576,), "attn.proj.weight": (192, 192), "attn.proj.bias": (192,),
         "norm2.weight": (192,), "norm2.bias": (192,), "mlp.fc1.weight": (768, 192),
         "mlp.fc1.bias": (768,), "mlp.fc2.weight": (192, 768), "mlp.fc2.bias": (192,)}


def timm_tiny(num_classes):
    create = pytest.importorskip("timm").create_model
    return create("vit_tiny_patch16_224", img_size=32, patch_size=8, num_classes=num_classes).eval()


@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
def test_what_timm_saves_gives_timms_features(suffix, undrawn, tmp_path):
    theirs, path = drawn(timm_tiny(num_classes=10), std=0.1), tmp_path / f"timm.{suffix}"
    if suffix == "pt":
        torch.save(theirs.state_dict(), path)
    else:
        pytest.importorskip("safetensors.torch").save_file(theirs.state_dict(), path)
    ours, images = load_backbone(ARCHS["vit_tiny"](**TINY), path).eval(), noise(2, 3, 32, 32)
    assert_close(ours(images), theirs.forward_features(images), atol=1e-5, rtol=0)


def test_an_export_has_timms_names_and_shapes(undrawn, tmp_path):
    export_backbone(ARCHS["vit_tiny"](**TINY), tmp_path / "tiny.pt")
    weights = torch.load(tmp_path / "tiny.pt", weights_only=True)
    inner = {f"blocks.{n}.{name}": shape for n in range(12) for name, shape in INNER.items()}
    assert {name: tuple(x.shape) for name, x in weights.items()} == OUTER | inner


def test_timm_loads_an_export_strictly_and_gives_the_same_features(undrawn, tmp_path):
    theirs, ours = timm_tiny(num_classes=0), drawn(ARCHS["vit_tiny"](**TINY), std=0.1)
    export_backbone(ours, tmp_path / "tiny.pt")
    theirs.load_state_dict(torch.load(tmp_path / "tiny.pt", weights_only=True))
    images = noise(2, 3, 32, 32)
    assert_close(theirs.forward_features(images), ours(images), atol=1e-5, rtol=0)
    assert_close(theirs(images), ours(images)[:, 0], atol=1e-5, rtol=0)


def test_an_export_is_read_again(tmp_path):
    export_backbone(small(1), tmp_path / "small.pt")
    assert load_backbone(small(3), tmp_path / "small.pt")(IMAGES).equal(small(1)(IMAGES))


def test_a_conv_stem_is_not_exported(tmp_path):
    with pytest.raises(ValueError, match="conv stem .*export vit_tiny, vit_small or vit_base"):
        export_backbone(small(conv_stem=True), tmp_path / "stem.pt")
    assert not list(tmp_path.iterdir())


def test_the_command_exports_or_says_in_one_line_why_not(undrawn, tmp_path):
    weights = zeros(ARCHS["vit_tiny"](**TINY))
    path = written(tmp_path, {"args": TINY | {"arch": "vit_tiny"}, "student": weights})
    words = sys.executable, MODEL, "--export", tmp_path / "out.pt", "--checkpoint"
    good, bad = (subprocess.run([*words, file], capture_output=True, text=True)
                 for file in (path, __file__))
    assert good.returncode == 0 and 'timm.create_model("vit_tiny_patch16_224"' in good.stdout
    assert torch.load(tmp_path / "out.pt", weights_only=True).keys() == weights.keys()
    assert bad.returncode == 2 and bad.stdout == ""
    assert re.fullmatch("model.py: error: .*test_model.py is no checkpoint.*\n", bad.stderr)


@pytest.mark.parametrize("arch, heads", [("vit_tiny", 3), ("vit_small_12heads", 12)])
def test_the_recipe_that_the_command_prints_works(arch, heads, undrawn, tmp_path, monkeypatch,
                                                  capsys):
    scope = {"timm": pytest.importorskip("timm"), "torch": torch}
    content = {"args": TINY | {"arch": arch}, "student": zeros(ARCHS[arch](**TINY))}
    words = "--checkpoint", str(written(tmp_path, content)), "--export", str(tmp_path / "out.pt")
    monkeypatch.setattr(sys, "argv", ["model.py", *words])
    runpy.run_path(str(MODEL), run_name="__main__")
    exec(capsys.readouterr().out.split("in timm:\n")[1], scope)
    assert {block.attn.num_heads for block in scope["vit"].blocks} == {heads}
    assert scope["vit"](noise(1, 3, 32, 32)).eq(0).all()  # all weights 0
