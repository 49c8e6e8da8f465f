"""The Vision Transformer that student and teacher share, and how its weights move and are read.

An image is cut into N = gh·gw patches; each becomes a token of width D; a CLS token goes first;
blocks of attention and MLP follow, pre-norm (Dosovitskiy et al. 2020, arXiv 2010.11929):

    x = [cls, E patch_1, .., E patch_N] + pos
    x = x + attention(norm1(x));  x = x + mlp(norm2(x))      (depth times)        -> norm(x)

Parameter names are those of timm and DINO, so published weights load as they are (`load_backbone`).
Hidden patches (masking.py: bool (B, N), True = hidden) either become the `mask_token`, which stands
in for their pixels and keeps their position, or are dropped, which at 75 % costs a quarter. The
teacher is the student's moving average (`ema_update`; Tarvainen & Valpola 2017, arXiv 1703.01780).
Left out: LayerScale, relative positions, registers, other norms.

Letters: B images, N patches, V visible patches, D width, H heads, P patch size in pixels.
"""
import argparse
import math
from functools import partial

import torch
import torch.nn as nn
import torch.nn.functional as F


class PatchEmbed(nn.Module):
    """Patches (B, V, 3, P, P) -> tokens (B, V, D), each from its own pixels alone.

    Plain: one linear map, stored as timm's convolution `proj`. With `conv_stem` a few strided
    convolutions run inside each patch (zero-padded at its border): small networks learn faster from
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
        return self.stem(patches.flatten(0, 1)).view(*patches.shape[:2], -1)


class Attention(nn.Module):
    """softmax(QKᵀ / sqrt(D / H)) V for H heads."""

    def __init__(self, dim, num_heads):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def heads(self, x):
        B, N, D = x.shape
        qkv = self.qkv(x).view(B, N, 3, self.num_heads, D // self.num_heads)
        return qkv.permute(2, 0, 3, 1, 4)  # (3, B, H, N, D / H)

    def forward(self, x):
        return self.proj(F.scaled_dot_product_attention(*self.heads(x)).transpose(1, 2).flatten(2))

    def weights(self, x):
        """The attention map itself, (B, H, N, N): for pictures and for attention-guided masks."""
        q, k, _ = self.heads(x)
        return (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1)


class Mlp(nn.Module):
    def __init__(self, dim, hidden):
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    def __init__(self, dim, num_heads, mlp_ratio, drop_path):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, num_heads)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))
        self.drop_path = drop_path

    def skip(self, x):
        """Stochastic depth: drop an image's branch with this probability (arXiv 1603.09382)."""
        if not self.training or self.drop_path == 0:
            return x
        keep = 1 - self.drop_path
        return x * (torch.rand(x.shape[0], 1, 1, device=x.device) < keep) / keep

    def forward(self, x):
        x = x + self.skip(self.attn(self.norm1(x)))
        return x + self.skip(self.mlp(self.norm2(x)))


class VisionTransformer(nn.Module):
    """`vit(images, mask)`: (B, 3, height, width) -> (B, 1 + N, D), CLS first, after the final norm.

    Any image whose sides the patch size divides will do: where its grid is not the one that the
    model was built for, `pos_embed` is interpolated (bicubic) to that very grid, square or not.
    """

    def __init__(self, image_size=224, patch_size=16, embed_dim=384, depth=12, num_heads=6,
                 mlp_ratio=4, drop_path=0.0, conv_stem=False):
        super().__init__()
        if embed_dim % num_heads:
            raise ValueError(f"embed_dim {embed_dim} must be a multiple of num_heads {num_heads}")
        self.patch_size, self.embed_dim, self.num_heads = patch_size, embed_dim, num_heads
        height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
        self.grid = self.grid_of(height, width)
        self.patch_embed = PatchEmbed(patch_size, embed_dim, conv_stem)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        self.mask_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + self.grid[0] * self.grid[1], embed_dim))
        rates = torch.linspace(0, drop_path, depth).tolist()  # deeper blocks are dropped more often
        self.blocks = nn.ModuleList(Block(embed_dim, num_heads, mlp_ratio, rate) for rate in rates)
        self.norm = nn.LayerNorm(embed_dim, eps=1e-6)
        for token in (self.cls_token, self.mask_token, self.pos_embed):
            nn.init.trunc_normal_(token, std=0.02)
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
        patches = F.interpolate(patches, size=grid, mode="bicubic")  # a factor would mis-round
        return torch.cat([cls, patches.flatten(2).mT], 1)

    def embed(self, images, mask=None, drop=False):
        """Images to the tokens that enter the first block. A mask with `drop` needs equal rows."""
        (B, _, height, width), P = images.shape, self.patch_size
        gh, gw = self.grid_of(height, width)
        if mask is not None and (mask.shape != (B, gh * gw) or mask.dtype != torch.bool):
            raise ValueError(f"mask {tuple(mask.shape)} {mask.dtype} must be bool {(B, gh * gw)}")
        patches = images.view(B, 3, gh, P, gw, P).permute(0, 2, 4, 1, 3, 5).flatten(1, 2)
        pos = self.positions((gh, gw))
        if mask is not None and drop:
            visible = (~mask).sum(1).tolist()  # a mask on the CPU costs no wait for the GPU here
            if min(visible) != max(visible):
                raise ValueError(f"dropping needs as many visible patches in each image, not "
                                 f"{min(visible)} to {max(visible)}")
            kept = mask.to(torch.uint8).argsort(dim=1, stable=True)[:, :visible[0]]  # (B, V)
            kept = kept.to(images.device, non_blocking=True)
            rows = torch.arange(B, device=images.device).unsqueeze(1)
            patches = patches[rows, kept]  # (B, V, 3, P, P), in order
            x = self.patch_embed(patches) + pos[0, 1:][kept]
        else:
            x = self.patch_embed(patches)
            if mask is not None:
                mask = mask.to(images.device, non_blocking=True)
                x = torch.where(mask.unsqueeze(-1), self.mask_token.to(x.dtype), x)
            x = x + pos[:, 1:]
        return torch.cat([(self.cls_token + pos[:, :1]).expand(B, -1, -1), x], 1)

    def forward(self, images, mask=None, drop=False):
        """(B, 3, height, width) -> (B, 1 + N, D); with `drop` the visible only, (B, 1 + V, D)."""
        x = self.embed(images, mask, drop)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)

    def last_blocks(self, images, n):
        """Tokens after each of the last n blocks, through the final norm: list of (B, 1 + N, D)."""
        x, out = self.embed(images), []
        for block in self.blocks:
            x = block(x)
            out.append(x)
        return [self.norm(x) for x in out[-n:]]

    def last_attention(self, images):
        """What CLS attends to in the last block: (B, H, N) over the patches."""
        x = self.embed(images)
        for block in self.blocks[:-1]:
            x = block(x)
        return self.blocks[-1].attn.weights(self.blocks[-1].norm1(x))[:, :, 0, 1:]


def init_linear(module):
    """Xavier-uniform, as in MAE: trunc_normal(0.02) stalls a tiny ViT for hundreds of steps."""
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        nn.init.zeros_(module.bias)


def mlp_head(dim, hidden, out):
    """Projection head or predictor: (.., dim) -> (.., out).

    With LayerNorm, so that it is the same on any number of processes; those of MoCo v3 and BYOL
    have BatchNorm there.
    """
    return nn.Sequential(nn.Linear(dim, hidden), nn.LayerNorm(hidden), nn.GELU(),
                         nn.Linear(hidden, out)).apply(init_linear)


@torch.no_grad()
def ema_update(teacher, student, momentum):
    """teacher = momentum · teacher + (1 - momentum) · student, by name; buffers are copied.

    What only the student has (a predictor) is passed over.
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
    cls, mean = tokens[:, 0], tokens[:, 1:].mean(1)
    return dict(cls=cls, mean=mean)[pool] if pool != "cls+mean" else torch.cat([cls, mean], 1)


# name -> constructor; tiny, small and base are DeiT's, micro and mini are for images of 32 pixels
ARCHS = dict(
    vit_micro=partial(VisionTransformer, embed_dim=64, depth=2, num_heads=2, conv_stem=True),
    vit_mini=partial(VisionTransformer, embed_dim=128, depth=4, num_heads=4, conv_stem=True),
    vit_tiny=partial(VisionTransformer, embed_dim=192, depth=12, num_heads=3),
    vit_small=partial(VisionTransformer, embed_dim=384, depth=12, num_heads=6),
    vit_base=partial(VisionTransformer, embed_dim=768, depth=12, num_heads=12),
)


def read_weights(path):
    """The file's dict, and the backbone in it under timm's names. Pickled code is refused, not run.

    Which network: ours, DINO's and iBOT's teacher; MoCo v3's base_encoder; else the only one.
    Heads, MAE's decoder (with its mask token of decoder width) and timm's classifier are left out.
    """
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):  # in the official files
            file = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise ValueError(f"no such file: {path}") from None
    except Exception as error:  # whatever a hostile or broken file provokes
        reason = "it holds code" if "GLOBAL" in str(error) else type(error).__name__
        raise ValueError(f"{path} is no checkpoint of plain tensors ({reason}): take one written "
                         "by train.py, timm, DINO, iBOT, MAE or MoCo v3") from error
    inner = file
    for name in ("teacher", "state_dict", "model"):
        if isinstance(inner, dict) and isinstance(inner.get(name), dict):
            inner = inner[name]
    weights = inner if isinstance(inner, dict) else {}
    weights = {str(name): x for name, x in weights.items() if isinstance(x, torch.Tensor)}
    prefixes = [name.removesuffix("cls_token") for name in weights if name.endswith("cls_token")]
    if not prefixes:
        raise ValueError(f"{path} holds no ViT backbone (no cls_token): "
                         f"it has {sorted(weights)[:5]}")
    prefix = min(prefixes, key=lambda x: ("momentum_encoder" in x, "teacher" not in x, len(x)))
    weights = {name.removeprefix(prefix): x
               for name, x in weights.items() if name.startswith(prefix)}
    decoder = any(name.startswith("decoder") for name in weights)
    outside = ("decoder_", "head.", "head_dist.") + ("mask_token",) * decoder
    weights = {name: x for name, x in weights.items() if not name.startswith(outside)}
    if "masked_embed" in weights:  # iBOT's name
        weights["mask_token"] = weights.pop("masked_embed").view(1, 1, -1)
    return file, weights


def load_backbone(vit, path):
    """Load a backbone into `vit`, strictly, and return it; ValueError lists what does not fit.

    Reads our checkpoints and those of DINO, iBOT, MAE, MoCo v3 and timm, whatever their prefixes.
    Only `mask_token` may be missing. Nothing is changed in `vit` when anything is wrong.
    """
    return fill(vit, read_weights(path)[1], path)


def fill(vit, weights, path):
    """Put weights read from `path` into `vit`, all of them or none."""
    own = vit.state_dict()
    wrong = [f"missing {name}" for name in own if name not in weights and name != "mask_token"]
    wrong += [f"unexpected {name}" for name in weights if name not in own]
    wrong += [f"{name} is {tuple(x.shape)}, not {tuple(own[name].shape)}"
              for name, x in weights.items() if name in own and x.shape != own[name].shape]
    if wrong:
        raise ValueError(f"{path} does not fit this model: " + "; ".join(wrong[:8])
                         + (f"; and {len(wrong) - 8} more" if len(wrong) > 8 else ""))
    vit.load_state_dict(weights, strict=False)
    return vit


def open_backbone(path, arch=None):
    """Build the network that a file was written for and load it -> (vit, options).

    `options` are those of the run for our checkpoints; for other files `arch` must be given, and
    they are {"arch", "patch_size", "image_size"}, with the sizes that the weights have.
    """
    file, weights = read_weights(path)
    ours = (isinstance(file.get("args"), dict)
            and {"arch", "patch_size", "image_size"} <= set(file["args"]))
    options = dict(file["args"]) if ours else {"arch": arch}
    if ours and arch not in (None, options["arch"]):
        raise ValueError(f"--arch {arch} contradicts {path}, a {options['arch']}: leave --arch out")
    if options["arch"] not in ARCHS:
        raise ValueError(f"{path} does not say its arch: add --arch, one of {', '.join(ARCHS)}")
    if not ours:
        if not {"patch_embed.proj.weight", "pos_embed"} <= set(weights):
            raise ValueError(f"{path} has no patch_embed.proj.weight or pos_embed: "
                             "it is no ViT of timm's layout")
        P = weights["patch_embed.proj.weight"].shape[-1]
        options |= {"patch_size": P,
                    "image_size": math.isqrt(weights["pos_embed"].shape[1] - 1) * P}
    vit = ARCHS[options["arch"]](image_size=options["image_size"], patch_size=options["patch_size"])
    return fill(vit, weights, path), options
