"""The Vision Transformer against its equations: masks, positions, heads, decoder, EMA, depth."""
import pytest
import torch
from torch import nn
from torch.nn.functional import gelu, interpolate, layer_norm, unfold
from torch.testing import assert_close

from conftest import cloud
from model import (ARCHS, Block, Decoder, PatchEmbed, VisionTransformer, ema_update, patchify,
                   sincos_positions)

D, N = 32, 16  # width, and patches of a 16 x 16 image
EXTRAS = dict(layer_scale=True, registers=3)
extras = pytest.mark.parametrize("extras", [{}, EXTRAS], ids=["plain", "extras"])
stems = pytest.mark.parametrize("conv_stem", [False, True], ids=["plain", "conv_stem"])


def randomized(network, seed=0, std=0.3):
    """Every parameter is drawn anew, so that none is 0 or 1."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in network.parameters():
        parameter.data.normal_(0, std, generator=generator)
    return network


def small(seed=0, image_size=16, **options):
    """A ViT of 2 blocks with patches of 4 x 4 pixels."""
    return randomized(VisionTransformer(image_size, 4, D, 2, 4, **options), seed)


def hide(*rows):
    """Lists of hidden patches -> bool (B, N)."""
    return torch.stack([torch.isin(torch.arange(N), torch.tensor(row)) for row in rows])


def pixels(mask):
    """Patches bool (B, N) -> their pixels bool (B, 3, 16, 16)."""
    return mask.view(-1, 1, 4, 1, 4, 1).expand(-1, 3, 4, 4, 4, 4).reshape(-1, 3, 16, 16)


IMAGES = cloud(2, 3, 16, 16, seed=9)
MASK = hide([0, 3, 4, 9, 10, 15], [1, 2, 3, 8, 13, 14])


# ---------- the equations ----------

def test_attention_is_softmax_of_q_k_over_root_d_times_v():
    attention, x = small().blocks[0].attn, cloud(2, 5, D)
    q, k, v = (x @ attention.qkv.weight.mT + attention.qkv.bias).split(D, dim=-1)
    heads = [slice(8 * h, 8 * h + 8) for h in range(4)]
    maps = [(q[..., h] @ k[..., h].mT / 8**0.5).softmax(-1) for h in heads]
    mixed = torch.cat([w @ v[..., h] for w, h in zip(maps, heads)], -1)
    assert_close(attention(x), mixed @ attention.proj.weight.mT + attention.proj.bias)
    assert_close(attention.weights(x), torch.stack(maps, 1))


def test_block_is_the_pre_norm_encoder_layer_of_torch():
    block, x = small().blocks[0], cloud(2, 5, D)
    oracle = nn.TransformerEncoderLayer(D, 4, 4 * D, 0, gelu, 1e-6, True, norm_first=True)
    for theirs, ours in [(oracle.norm1, block.norm1), (oracle.self_attn.out_proj, block.attn.proj),
                         (oracle.norm2, block.norm2), (oracle.linear1, block.mlp.fc1),
                         (oracle.linear2, block.mlp.fc2)]:
        theirs.load_state_dict(ours.state_dict())
    oracle.self_attn.in_proj_weight, oracle.self_attn.in_proj_bias = block.attn.qkv.parameters()
    assert_close(block(x), oracle(x))


def test_patches_are_cut_row_by_row():
    images = cloud(2, 3, 8, 12)  # 2 rows of 3 patches
    assert patchify(images, 4).equal(unfold(images, 4, stride=4).mT.reshape(2, 6, 3, 4, 4))


@extras
def test_vit_is_cls_patches_and_registers_plus_positions_through_blocks_and_norm(extras):
    vit, other = small(**extras), small(**extras)
    x = torch.cat([vit.cls_token.expand(2, 1, D), vit.patch_embed.proj(IMAGES).flatten(2).mT], 1)
    x = x + vit.pos_embed
    if extras:  # registers come last, have no position and are not returned
        x = torch.cat([x, vit.reg_token.expand(2, -1, -1)], 1)
        other.reg_token.data.neg_()
        assert (other(IMAGES) - vit(IMAGES)).abs().amax(-1).min() > 1e-3  # each token sees them
    for block in vit.blocks:
        first, second = (block.ls1.gamma, block.ls2.gamma) if extras else (1, 1)
        x = x + first * block.attn(block.norm1(x))
        x = x + second * block.mlp(block.norm2(x))
    x = x[:, :1 + N]
    assert_close(vit(IMAGES, norm=False), x)
    assert_close(vit(IMAGES), layer_norm(x, [D], vit.norm.weight, vit.norm.bias, eps=1e-6))


@extras
@pytest.mark.parametrize("options", [{}, dict(norm=False), dict(mask=MASK, drop=True)])
def test_cls_only_gives_the_cls_of_the_full_forward_and_its_gradients(options, extras):
    vit, images = small(**extras).double(), IMAGES.double()
    both = vit(images, **options, cls_only=True), vit(images, **options)[:, :1]
    assert_close(*both)
    assert_close(*(torch.autograd.grad(x.square().sum(), [*vit.parameters()], allow_unused=True)
                   for x in both))


@extras
def test_last_blocks_pass_the_norm_and_last_attention_is_from_cls_to_the_patches(extras):
    vit = small(**extras)
    x = vit.blocks[0](vit.embed(IMAGES))
    assert_close(vit.last_blocks(IMAGES, 2), [vit.norm(x)[:, :1 + N], vit(IMAGES)])
    assert_close(vit.last_blocks(IMAGES, 1), [vit(IMAGES)])
    maps = vit.blocks[1].attn.weights(vit.blocks[1].norm1(x))  # (B, H, 1 + N, 1 + N)
    assert_close(vit.last_attention(IMAGES), maps[:, :, 0, 1:1 + N])


@stems
def test_a_token_depends_on_the_pixels_of_its_own_patch_alone(conv_stem):
    vit, other = small(conv_stem=conv_stem), IMAGES.clone()
    other[:, :, 4:8, 8:12] += 1  # row 1, column 2 of the 4 x 4 grid
    changed = (vit.embed(other) != vit.embed(IMAGES)).any(-1)  # (B, 1 + N)
    assert changed.nonzero().tolist() == [[0, 1 + 6], [1, 1 + 6]]


# ---------- masks ----------

@extras
@stems
@pytest.mark.parametrize("drop", [False, True], ids=["mask_token", "dropped"])
def test_the_output_depends_on_all_visible_pixels_and_on_no_hidden_one(conv_stem, drop, extras):
    vit, images = small(conv_stem=conv_stem, **extras), IMAGES.clone().requires_grad_()
    out = vit(images, MASK, drop=drop)
    out.pow(3).sum().backward()
    assert images.grad.eq(0).equal(pixels(MASK))
    painted = IMAGES.masked_fill(pixels(MASK), float("inf"))
    assert vit(painted, MASK, drop=drop).equal(out)
    assert vit(IMAGES, hide([], []), drop=drop).equal(vit(IMAGES))  # an empty mask is no mask


def test_a_hidden_patch_becomes_the_mask_token_plus_its_own_position():
    vit = small()
    expected = vit.embed(IMAGES)
    for b, patch in MASK.nonzero():
        expected[b, 1 + patch] = vit.mask_token[0, 0] + vit.pos_embed[0, 1 + patch]
    assert_close(vit.embed(IMAGES, MASK), expected)


@extras
def test_dropping_equals_encoding_the_visible_tokens_alone(extras):
    vit = small(**extras)
    for b in range(2):
        visible = [0] + [1 + n for n in range(N) if not MASK[b, n]]  # CLS and the others, in order
        x = vit.embed(IMAGES[b:b + 1])[:, visible + [1 + N + n for n in range(vit.registers)]]
        expected = vit.norm(vit.blocks[1](vit.blocks[0](x)))[0, :11]
        assert_close(vit(IMAGES, MASK, drop=True)[b], expected)
    for vit in (vit, small(conv_stem=True)):  # CLS is left
        assert vit(IMAGES, hide(range(N), range(N)), drop=True).shape == (2, 1, D)


# ---------- positions and image sizes ----------

@pytest.mark.parametrize("antialias", [False, True])
def test_positions_are_interpolated_over_the_grid_and_cls_keeps_its_own(antialias):
    vit = small(image_size=(12, 20), layer_scale=antialias)  # 3 x 5 patches
    grid = vit.pos_embed[0, 1:].T.reshape(1, D, 3, 5)
    expected = interpolate(grid, size=(6, 4), mode="bicubic", antialias=antialias)[0].flatten(1).T
    assert_close(vit.positions((6, 4))[0, 1:], expected)
    assert small().bfloat16()(cloud(2, 3, 24, 8).bfloat16()).dtype == torch.bfloat16
    assert vit.positions((6, 4))[0, 0].equal(vit.pos_embed[0, 0])
    assert vit.positions((3, 5)).equal(vit.pos_embed)


@stems
def test_other_image_sizes_give_one_token_per_patch_and_train_all_positions(conv_stem):
    vit = small(conv_stem=conv_stem)
    out = vit(cloud(2, 3, 24, 8))
    assert out.shape == (2, 1 + 12, D)
    out.pow(3).sum().backward()
    assert (vit.pos_embed.grad.abs().sum(-1) > 0).all()


def test_fixed_positions_are_sine_and_cosine_of_column_and_row_zero_for_cls_and_frozen():
    vit = VisionTransformer((8, 12), 4, 16, 1, 4, fixed_pos=True)  # 2 rows of 3 patches
    assert vit.pos_embed.shape == (1, 7, 16) and vit.pos_embed[0, 0].eq(0).all()
    for patch in range(6):
        for n, frequency in enumerate([1, 0.1, 0.01, 0.001]):  # 10,000 ** (-n / 4)
            angles = torch.tensor([patch % 3 * frequency, patch // 3 * frequency])
            expected = torch.stack([angles.sin(), angles.cos()], 1).flatten()
            assert_close(vit.pos_embed.data[0, 1 + patch, n::4], expected)
    assert [name for name, x in vit.named_parameters() if not x.requires_grad] == ["pos_embed"]


@pytest.mark.parametrize("build, message", [
    (lambda: VisionTransformer((30, 4), 4, D, 1, 4), "30x4 .* patch size 4.* 32x4"),
    (lambda: small()(cloud(1, 3, 16, 18)), "16x18 .* patch size 4.* 16x16"),
    (lambda: VisionTransformer(16, 4, embed_dim=30, num_heads=4), "embed_dim 30 .* num_heads 4"),
    (lambda: sincos_positions((2, 3), 30), "width 30 must be a multiple of 4"),
    (lambda: PatchEmbed(2, D, conv_stem=True), "patch size 2: .* 4, 8, 16"),
    (lambda: PatchEmbed(12, D, conv_stem=True), "patch size 12: .* 4, 8, 16"),
    (lambda: Decoder((4, 4), D, 6, width=100), "decoder width 100 must be a multiple of 32"),
    (lambda: Decoder((4, 4), D, 6, 32, 1)(cloud(2, 12, D), MASK), "11 visible .* leaves .*10"),
    (lambda: small()(IMAGES, hide([1, 2, 3], [1, 2]), drop=True), "13 to 14"),
    (lambda: small()(IMAGES, MASK.float()), r"mask .* torch.float32 must be bool \(2, 16\)"),
    (lambda: small()(IMAGES, MASK[:1]), r"mask \(1, 16\) .* must be bool \(2, 16\)")])
def test_sizes_and_masks_that_do_not_fit_are_refused_with_a_reason(build, message):
    with pytest.raises(ValueError, match=message):
        build()


# ---------- decoder, names, sizes ----------

def test_decoder_reads_visible_tokens_in_order_and_mask_tokens_at_hidden_places():
    decoder, tokens = randomized(Decoder((4, 4), D, 6, width=64, depth=2)), cloud(2, 1 + 10, D)
    assert [block.attn.num_heads for block in decoder.blocks] == [2, 2]  # 32 wide, as in MAE
    assert "pos_embed" not in decoder.state_dict()
    for b in range(2):
        embedded = iter(tokens[b] @ decoder.embed.weight.mT + decoder.embed.bias)
        x = [next(embedded)]  # CLS
        x += [decoder.mask_token[0, 0] if hidden else next(embedded) for hidden in MASK[b]]
        x = torch.stack(x) + sincos_positions((4, 4), 64)
        x = decoder.norm(decoder.blocks[1](decoder.blocks[0](x)))[0]
        expected = x @ decoder.pred.weight.mT + decoder.pred.bias
        assert_close(decoder(tokens, MASK)[b], expected)  # (1 + N, 6)


def test_parameter_names_are_timms_and_a_mask_token():
    inner = "norm1 attn.qkv attn.proj norm2 mlp.fc1 mlp.fc2".split()
    layers = ["patch_embed.proj", "norm", *(f"blocks.{n}.{x}" for n in range(12) for x in inner)]
    expected = [f"{layer}.{part}" for layer in layers for part in ("weight", "bias")]
    expected += ["cls_token", "mask_token", "pos_embed"]
    assert sorted(ARCHS["vit_tiny"]().state_dict()) == sorted(expected)
    expected += [f"blocks.{n}.{x}.gamma" for n in range(12) for x in ("ls1", "ls2")] + ["reg_token"]
    assert sorted(ARCHS["vit_tiny"](**EXTRAS).state_dict()) == sorted(expected)


@pytest.mark.parametrize("arch, width, depth, heads, timm", [
    ("vit_micro", 64, 2, 2, None), ("vit_mini", 128, 4, 4, None), ("vit_tiny", 192, 12, 3, 5524416),
    ("vit_small", 384, 12, 6, 21665664), ("vit_small_12heads", 384, 12, 12, 21665664),
    ("vit_base", 768, 12, 12, 85798656), ("vit_large", 1024, 24, 16, 303301632),
    ("vit_huge", 1280, 32, 16, 630918400)])
def test_archs_have_their_sizes_and_timms_number_of_parameters(arch, width, depth, heads, timm):
    vit = ARCHS[arch](image_size=224, patch_size=16, depth=2)  # the others are like the second
    blocks = ARCHS[arch].keywords["depth"]
    found = vit.embed_dim, blocks, vit.num_heads, vit.blocks[-1].attn.num_heads
    assert found == (width, depth, heads, heads)
    assert hasattr(vit.patch_embed, "stem") == (timm is None)
    inner, all_of_two = (sum(x.numel() for x in y.parameters()) for y in (vit.blocks[1], vit))
    assert timm in (None, all_of_two + (blocks - 2) * inner - width)  # less the mask token


# ---------- moving average and stochastic depth ----------

@pytest.mark.parametrize("momentum", [0, 0.9, 1])
def test_ema_averages_by_name_copies_buffers_and_ignores_a_predictor_of_the_student(momentum):
    teacher = nn.ModuleDict(dict(a=nn.Linear(2, 3), norm=nn.BatchNorm1d(3))).requires_grad_(False)
    student = nn.ModuleDict(dict(predictor=nn.Linear(2, 2), norm=nn.BatchNorm1d(3)))
    student["a"] = nn.Linear(2, 3)
    student["norm"](cloud(8, 3) + 5)
    for network, value in ((teacher, 0.0), (student, 1.0)):
        nn.init.constant_(network["a"].weight, value)
    ema_update(teacher, student, momentum)
    assert_close(teacher["a"].weight, torch.full((3, 2), 1.0 - momentum))
    assert not teacher["a"].weight.requires_grad and student["a"].weight.eq(1).all()
    assert teacher["norm"].running_mean.equal(student["norm"].running_mean)


def test_drop_path_drops_whole_images_at_its_rate_and_rescales_the_others():
    torch.manual_seed(0)
    out = Block(D, 4, 4, drop_path=0.25).drop_branch(torch.ones(2000, 5, 8))
    assert_close(out, out[:, :1, :1].expand(2000, 5, 8))
    assert_close(out.unique(), torch.tensor([0, 4 / 3]))
    assert abs(out.eq(0).float().mean() - 0.25) < 5 * (0.25 * 0.75 / 2000) ** 0.5


def test_drop_path_drops_each_branch_of_a_block_on_its_own():
    block, x = small(drop_path=0.5).blocks[1], cloud(1, 5, D)
    bases = [x, x + 2 * block.attn(block.norm1(x))]
    choices = [base + scale * block.mlp(block.norm2(base)) for base in bases for scale in (0, 2)]
    torch.manual_seed(0)
    outs = [block(x) for _ in range(40)]
    seen = [min(range(4), key=lambda n: (out - choices[n]).abs().max()) for out in outs]
    assert set(seen) == {0, 1, 2, 3}
    assert all(torch.allclose(out, choices[n], atol=1e-5) for out, n in zip(outs, seen))


def test_drop_path_grows_with_depth_and_does_nothing_in_evaluation():
    blocks = VisionTransformer(16, 4, D, 3, 4, drop_path=0.2).blocks
    assert_close([block.drop_path for block in blocks], [0.0, 0.1, 0.2])
    assert small(drop_path=0.9).eval()(IMAGES).equal(small().eval()(IMAGES))
