"""The Vision Transformer that student and teacher share, its heads and its decoder.

An image is cut into N = gh·gw patches. Each becomes a token of width D, and a CLS token goes first.
Blocks of attention and MLP follow, pre-norm (Dosovitskiy et al. 2020, arXiv 2010.11929):

    x = [cls, E patch_1, .., E patch_N] + pos
    x = x + attention(norm1(x));  x = x + mlp(norm2(x))      (depth times)        -> norm(x)

Parameter names are those of timm and DINO, so published weights load as they are (weights.py).
Hidden patches (masking.py: bool (B, N), True = hidden) become the `mask_token` at the same
position, or are dropped: at 75 % a forward pass then costs a quarter. The teacher is the student's
moving average (`ema_update`; Tarvainen & Valpola 2017, arXiv 1703.01780). LayerScale and registers
are for the weights of DINOv2; our own networks do without.
Left out: relative and rotary positions, gated MLPs, other norms.

Letters: B images, N patches, V visible patches, D width, H heads, P patch size in pixels.
"""
from collections import OrderedDict
from functools import partial

import torch
import torch.nn as nn
import torch.nn.functional as F


def patchify(images, patch_size):
    """(B, 3, height, width) -> patches row by row, (B, N, 3, P, P)."""
    (B, C, height, width), P = images.shape, patch_size
    patches = images.reshape(B, C, height // P, P, width // P, P)
    return patches.permute(0, 2, 4, 1, 3, 5).flatten(1, 2)


def to_device(index, device):
    """A tensor on the device. From pinned memory, so that the CPU need not wait for the GPU."""
    if device.type == "cuda" and index.device.type == "cpu":
        index = index.pin_memory()
    return index.to(device, non_blocking=True)


def sincos_positions(grid, dim):
    """Fixed 2-D positions, in MAE's order: grid (gh, gw) -> (1, 1 + N, D), zeros for CLS.

    A quarter of the width each: sin and cos of the column, sin and cos of the row (MoCo v3 has the
    row first), times D/4 frequencies from 1 down to 1/10,000.
    """
    if dim % 4:
        raise ValueError(f"width {dim} must be a multiple of 4 for sine-cosine positions")
    frequency = 1e4 ** -(torch.arange(dim // 4) / (dim // 4))
    row, column = (x.flatten().unsqueeze(1) * frequency
                   for x in torch.meshgrid(*map(torch.arange, grid), indexing="ij"))
    table = torch.cat([column.sin(), column.cos(), row.sin(), row.cos()], 1)  # (N, D)
    return F.pad(table, (0, 0, 1, 0)).unsqueeze(0)


class PatchEmbed(nn.Module):
    """Patches (B, V, 3, P, P) -> tokens (B, V, D), each from its own pixels alone.

    One linear map, stored as timm's convolution `proj`. With `conv_stem` a few strided convolutions
    run inside each patch instead (zero-padded at its border): small networks learn faster with
    them, and still no pixel of a hidden patch reaches a visible token.
    """

    def __init__(self, patch_size, embed_dim, conv_stem=False):
        super().__init__()
        if not conv_stem:
            self.proj = nn.Conv2d(3, embed_dim, patch_size, patch_size)
            nn.init.xavier_uniform_(self.proj.weight.flatten(1))  # as a linear layer, like MAE
            nn.init.zeros_(self.proj.bias)
            return
        if patch_size < 4 or patch_size & (patch_size - 1):
            raise ValueError(f"patch size {patch_size}: a conv stem halves it, so take 4, 8, 16 ..")
        layers, width, size = [], 3, patch_size
        while size > 2:
            layers += [nn.Conv2d(width, embed_dim // 2, 3, stride=2, padding=1),
                       nn.GroupNorm(1, embed_dim // 2), nn.GELU()]
            width, size = embed_dim // 2, size // 2
        self.stem = nn.Sequential(*layers, nn.Conv2d(width, embed_dim, 2))

    def forward(self, patches):
        if hasattr(self, "proj"):
            return F.linear(patches.flatten(2), self.proj.weight.flatten(1), self.proj.bias)
        return self.stem(patches.flatten(0, 1)).flatten(1).unflatten(0, patches.shape[:2])


class Attention(nn.Module):
    """softmax(QKᵀ / sqrt(D / H)) V for H heads."""

    def __init__(self, dim, num_heads):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def heads(self, x):
        """q, k and v: (B, N, D) -> (3, B, H, N, D / H)."""
        B, N, D = x.shape
        qkv = self.qkv(x).view(B, N, 3, self.num_heads, D // self.num_heads)
        return qkv.permute(2, 0, 3, 1, 4)

    def forward(self, x, cls_only=False):
        q, k, v = self.heads(x)
        if cls_only:
            q = q[:, :, :1]
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))

    def weights(self, x):
        """The attention map (B, H, N, N), for pictures and for attention-guided masks."""
        q, k, _ = self.heads(x)
        return (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1)


class LayerScale(nn.Module):
    """A learned factor for each dimension of a branch, small at first (CaiT, arXiv 2103.17239)."""

    def __init__(self, dim):
        super().__init__()
        self.gamma = nn.Parameter(torch.full((dim,), 1e-5))

    def forward(self, x):
        return x * self.gamma


class Block(nn.Module):
    def __init__(self, dim, num_heads, mlp_ratio, drop_path, layer_scale=False):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, num_heads)
        self.ls1 = LayerScale(dim) if layer_scale else nn.Identity()
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        hidden = int(dim * mlp_ratio)
        self.mlp = nn.Sequential(OrderedDict(
            fc1=nn.Linear(dim, hidden), gelu=nn.GELU(), fc2=nn.Linear(hidden, dim)))
        self.ls2 = LayerScale(dim) if layer_scale else nn.Identity()
        self.drop_path = drop_path

    def drop_branch(self, x):
        """Stochastic depth (arXiv 1603.09382): drop a branch of an image at a rate `drop_path`."""
        if not self.training or self.drop_path == 0:
            return x
        keep = 1 - self.drop_path
        return x * (torch.rand(x.shape[0], 1, 1, device=x.device) < keep) / keep

    def forward(self, x, cls_only=False):
        """(B, N, D) -> (B, N, D), or with `cls_only` the first token (B, 1, D) from one query."""
        mixed = self.attn(self.norm1(x), cls_only)
        x = (x[:, :1] if cls_only else x) + self.drop_branch(self.ls1(mixed))
        return x + self.drop_branch(self.ls2(self.mlp(self.norm2(x))))


class VisionTransformer(nn.Module):
    """`vit(images, mask)`: (B, 3, height, width) -> (B, 1 + N, D), CLS first, after the final norm.

    The patch size must divide both sides of an image. For another grid than the one that the model
    was built for, `pos_embed` is interpolated (bicubic) to the exact grid, square or not: with
    antialiasing if there is `layer_scale`, as in timm and in DINOv2 with registers, else without,
    as in DINO and iBOT (whose scale is 0.1 patches off). `registers`: number of additional tokens
    (arXiv 2309.16588). They come last, have no positions and are not returned.
    """

    def __init__(self, image_size=224, patch_size=16, embed_dim=384, depth=12, num_heads=6,
                 mlp_ratio=4, drop_path=0.0, conv_stem=False, fixed_pos=False, layer_scale=False,
                 registers=0):
        super().__init__()
        if embed_dim % num_heads:
            raise ValueError(f"embed_dim {embed_dim} must be a multiple of num_heads {num_heads}")
        self.patch_size, self.embed_dim, self.num_heads = patch_size, embed_dim, num_heads
        self.layer_scale, self.registers = layer_scale, registers
        height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
        self.grid = self.grid_of(height, width)
        self.patch_embed = PatchEmbed(patch_size, embed_dim, conv_stem)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        self.mask_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + self.grid[0] * self.grid[1], embed_dim))
        if registers:
            self.reg_token = nn.Parameter(torch.randn(1, registers, embed_dim) * 0.02)
        rates = torch.linspace(0, drop_path, depth).tolist()  # deeper blocks are dropped more often
        self.blocks = nn.ModuleList(
            Block(embed_dim, num_heads, mlp_ratio, rate, layer_scale) for rate in rates)
        self.norm = nn.LayerNorm(embed_dim, eps=1e-6)
        for token in (self.cls_token, self.mask_token, self.pos_embed):
            nn.init.trunc_normal_(token, std=0.02)
        if fixed_pos:
            self.pos_embed = nn.Parameter(sincos_positions(self.grid, embed_dim), False)
        self.blocks.apply(init_linear)

    def grid_of(self, height, width):
        P = self.patch_size
        if height % P or width % P or not height or not width:
            raise ValueError(f"image size {height}x{width} is not a multiple of patch size {P}: "
                             f"take {max(1, round(height / P)) * P}x{max(1, round(width / P)) * P} "
                             "or another patch size")
        return height // P, width // P

    def positions(self, grid):
        """pos_embed for a (gh, gw) grid: (1, 1 + gh·gw, D)."""
        if grid == self.grid:
            return self.pos_embed
        cls, patches = self.pos_embed.float().split([1, self.pos_embed.shape[1] - 1], 1)
        patches = patches.unflatten(1, self.grid).permute(0, 3, 1, 2)
        patches = F.interpolate(patches, size=grid, mode="bicubic",  # a factor would mis-round
                                antialias=self.layer_scale)
        return torch.cat([cls, patches.flatten(2).mT], 1).to(self.pos_embed.dtype)

    def embed(self, images, mask=None, drop=False):
        """Images to the tokens that enter the first block: CLS, patches, registers."""
        B, _, height, width = images.shape
        gh, gw = self.grid_of(height, width)
        if mask is not None and (mask.shape != (B, gh * gw) or mask.dtype != torch.bool):
            raise ValueError(f"mask {tuple(mask.shape)} {mask.dtype} must be bool {(B, gh * gw)}")
        patches, pos = patchify(images, self.patch_size), self.positions((gh, gw))
        if mask is None:
            x = self.patch_embed(patches) + pos[:, 1:]
        elif drop:
            V = (~mask).sum(1).tolist()  # a mask on the CPU costs no wait for the GPU here
            if len({*V}) > 1:
                raise ValueError("dropping needs as many visible patches in each image, not "
                                 f"{min(V)} to {max(V)}")
            kept = (~mask).nonzero()[:, 1].view(B, -1)  # the visible patches
            kept = to_device(kept, images.device)  # (B, V)
            rows = torch.arange(B, device=images.device).unsqueeze(1)
            x = self.patch_embed(patches[rows, kept]) + pos[0, 1:][kept]
        else:
            x = self.patch_embed(patches)
            hidden = to_device(mask, images.device).unsqueeze(-1)
            x = torch.where(hidden, self.mask_token.to(x.dtype), x) + pos[:, 1:]
        tokens = [(self.cls_token + pos[:, :1]).expand(B, -1, -1), x]
        if self.registers:
            tokens.append(self.reg_token.expand(B, -1, -1))
        return torch.cat(tokens, 1)

    def forward(self, images, mask=None, drop=False, norm=True, cls_only=False):
        """(B, 3, height, width) -> (B, 1 + N, D); with `drop` CLS and the visible, (B, 1 + V, D).

        `drop` needs equally many hidden patches in each image. `cls_only` gives (B, 1, D) and
        saves most of the last block.
        """
        x = self.embed(images, mask, drop)
        for block in self.blocks[:-1]:
            x = block(x)
        x = self.blocks[-1](x, cls_only)[:, :x.shape[1] - self.registers]
        return self.norm(x) if norm else x

    def last_blocks(self, images, n):
        """Tokens after each of the last n blocks, through the final norm: list of (B, 1 + N, D)."""
        x, out = self.embed(images), []
        for block in self.blocks:
            x = block(x)
            out.append(x[:, :x.shape[1] - self.registers])
        return [self.norm(x) for x in out[-n:]]

    def last_attention(self, images):
        """The attention of CLS to the patches in the last block: (B, H, N)."""
        x = self.embed(images)
        for block in self.blocks[:-1]:
            x = block(x)
        weights = self.blocks[-1].attn.weights(self.blocks[-1].norm1(x))
        return weights[:, :, 0, 1:x.shape[1] - self.registers]


def init_linear(module):
    """Xavier-uniform, as in MAE: trunc_normal(0.02) stalls a tiny ViT for hundreds of steps."""
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


# ---- heads and decoder -------------------------------------------------------------------------

def mlp_head(dim, hidden, out, layers=2, norm=nn.LayerNorm, activation=nn.GELU, last=None,
             bias=True):
    """Projection head or predictor: (.., dim) -> (.., out).

    LayerNorm sees one sample alone. For SimCLR, MoCo v3 and BYOL objectives.py gives BatchNorm as
    `norm`. `last`: a norm behind the last layer.
    """
    widths, steps = [dim] + [hidden] * (layers - 1), []
    for before, width in zip(widths, widths[1:]):
        steps += [nn.Linear(before, width, bias), *([norm(width)] if norm else []), activation()]
    steps += [nn.Linear(widths[-1], out, bias), *([last(out)] if last else [])]
    return nn.Sequential(*steps).apply(init_linear)


class PrototypeHead(nn.Module):
    """DINO's head (.., D) -> (.., K): MLP, to length 1, cosines with K prototypes of length 1."""

    def __init__(self, dim, hidden, bottleneck, prototypes, norm=None):
        super().__init__()
        self.mlp = mlp_head(dim, hidden, bottleneck, layers=3, norm=norm)
        self.prototypes = nn.Parameter(torch.empty(prototypes, bottleneck))
        nn.init.uniform_(self.prototypes, -bottleneck ** -0.5, bottleneck ** -0.5)  # as DINO's

    def embed(self, x):
        return F.normalize(self.mlp(x), dim=-1)

    def logits(self, z):
        """Linear in z: the mean over many logits is the logit of their mean, which is cheaper."""
        scale = 1 / self.prototypes.norm(dim=-1, keepdim=True)  # F.normalize has a slower gradient
        return F.linear(z, self.prototypes * scale)

    def forward(self, x):
        return self.logits(self.embed(x))


class Decoder(nn.Module):
    """MAE's decoder: visible tokens (B, 1 + V, D), mask (B, N) -> predictions (B, 1 + N, out).

    A mask token at each hidden place, fixed positions, a few blocks, one linear map (arXiv
    2111.06377, section 3). Heads are 32 wide, as in MAE (512 in 16).
    """

    def __init__(self, grid, dim, out, width=512, depth=8, drop_path=0.0):
        super().__init__()
        heads = max(1, width // 32)
        if width % heads or width % 4:
            raise ValueError(f"decoder width {width} must be a multiple of 32 (heads are 32 wide)")
        self.embed = nn.Linear(dim, width)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, width))
        nn.init.normal_(self.mask_token, std=0.02)
        self.register_buffer("pos_embed", sincos_positions(grid, width), persistent=False)
        rates = torch.linspace(0, drop_path, depth).tolist()
        self.blocks = nn.Sequential(*(Block(width, heads, 4, rate) for rate in rates))
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.pred = nn.Linear(width, out)
        self.apply(init_linear)

    def forward(self, tokens, mask):
        N, V = mask.shape[1], tokens.shape[1] - 1
        if (~mask).sum(1).ne(V).any():
            raise ValueError(f"{V} visible tokens per image, but the mask leaves "
                             f"{(~mask).sum(1).tolist()[:8]}")
        x = self.embed(tokens)
        visible = to_device((~mask).nonzero(), x.device)  # (B·V, 2): image, patch
        patches = self.mask_token.to(x.dtype).expand(len(x), N, -1)
        patches = patches.index_put((*visible.T,), x[:, 1:].flatten(0, 1))
        x = torch.cat([x[:, :1], patches], 1) + self.pos_embed
        return self.pred(self.norm(self.blocks(x)))


@torch.no_grad()
def ema_update(teacher, student, momentum):
    """teacher = momentum · teacher + (1 - momentum) · student, by name; buffers are copied.

    Parameters that only the student has (a predictor) are skipped.
    """
    parameters, buffers = dict(student.named_parameters()), dict(student.named_buffers())
    targets = dict(teacher.named_parameters())
    sources = [parameters[name].detach() for name in targets]
    torch._foreach_lerp_(list(targets.values()), sources, 1 - momentum)
    for name, buffer in teacher.named_buffers():
        buffer.copy_(buffers[name])


POOLS = "mean cls cls+mean".split()


def pool_tokens(tokens, pool):
    """The feature of an image, (B, 1 + N, D) -> (B, D): CLS, mean of patches, or both (B, 2D)."""
    makers = dict(cls=lambda: tokens[:, 0], mean=lambda: tokens[:, 1:].mean(1))
    return torch.cat([makers[name]() for name in pool.split("+")], 1)


# name -> constructor. DeiT's tiny, small and base, MoCo v3's ViT-S with 12 heads, the ViT paper's
# large and huge; micro and mini are ours, for images of 32 pixels.
ARCHS = dict(
    vit_micro=partial(VisionTransformer, embed_dim=64, depth=2, num_heads=2, conv_stem=True),
    vit_mini=partial(VisionTransformer, embed_dim=128, depth=4, num_heads=4, conv_stem=True),
    vit_tiny=partial(VisionTransformer, embed_dim=192, depth=12, num_heads=3),
    vit_small=partial(VisionTransformer, embed_dim=384, depth=12, num_heads=6),
    vit_small_12heads=partial(VisionTransformer, embed_dim=384, depth=12, num_heads=12),
    vit_base=partial(VisionTransformer, embed_dim=768, depth=12, num_heads=12),
    vit_large=partial(VisionTransformer, embed_dim=1024, depth=24, num_heads=16),
    vit_huge=partial(VisionTransformer, embed_dim=1280, depth=32, num_heads=16),
)
