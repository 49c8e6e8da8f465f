"""Foreign checkpoints in, our backbones out: the one reader and writer of weights.

    load_backbone(vit, path)            strictly: a key too many or too few is an error
    open_backbone(path)                 builds the network that a file was written for
    python weights.py --checkpoint C --export FILE     # the backbone alone, for timm to load

Files are read as plain tensors (`weights_only=True`): a pickle that would run code is refused and
has not run. Names are those of timm and DINO; the usual prefixes are found.
"""
import argparse
import contextlib
import math
import os
import re

import torch
import torch.nn.functional as F

from model import ARCHS


def write_file(path, write, keep=None):
    """Replace a file whole or not at all: `write(file)` beside it, to disk, rename.

    `keep`: where the file that was there goes. OSError and RuntimeError say why it was not written.
    """
    temporary = f"{os.fspath(path)}.tmp"
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        if keep and os.path.exists(path):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(keep)
            try:
                os.link(path, keep)  # a second name: `path` is a whole file at every moment
            except OSError:  # not every disk has links
                os.replace(path, keep)
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):  # a full disk needs the room
            os.unlink(temporary)
        raise


def read_file(path):
    """The dict in a file of plain tensors. Pickled code is refused, not run."""
    path, reason = os.fspath(path), "its top is no dict"
    if not os.path.isfile(path):
        raise ValueError(f"no such file: {path}")
    try:
        if path.endswith(".safetensors"):
            from safetensors.torch import load_file  # only where such a file is read
            return load_file(path)
        with torch.serialization.safe_globals([argparse.Namespace]):  # in the official files
            file = torch.load(path, map_location="cpu", weights_only=True)
        if isinstance(file, dict):
            return file
    except (ImportError, OSError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    except Exception as error:  # a broken file provokes a dozen kinds
        reason = "it holds code" if "GLOBAL" in str(error) else type(error).__name__
    raise ValueError(f"{path} is no checkpoint of plain tensors ({reason}): take one written by "
                     "train.py, timm, DINO, iBOT, MAE or MoCo v3")


def misfits(own, weights, optional=()):
    """Reasons why `weights` cannot be loaded over `own`, dicts of tensors: a list of sentences."""
    if not isinstance(weights, dict):
        return [f"a {type(weights).__name__} in place of tensors by name"]
    wrong = [f"missing {name}" for name in own if name not in weights and name not in optional]
    for name, x in weights.items():
        if name not in own:
            wrong.append(f"unexpected {str(name)[:80]}")
        elif not is_floats(x):
            wrong.append(f"{name} is no dense tensor of floats")
        elif x.shape != own[name].shape:
            wrong.append(f"{name} is {tuple(x.shape)}, not {tuple(own[name].shape)}")
        elif not x.float().isfinite().all():
            wrong.append(f"{name} has values that are not finite")
    return wrong


def is_floats(x):
    return isinstance(x, torch.Tensor) and x.layout == torch.strided and x.is_floating_point()


def listed(wrong):
    """The first complaints, and how many more there are."""
    return "; ".join(wrong[:8]) + (f"; and {len(wrong) - 8} more" if len(wrong) > 8 else "")


RENAMED = {  # names of Hugging Face, before transformers 5 and since -> timm's, in this order
    r"embeddings\.(cls_token|mask_token|register_tokens)": r"\1",
    r"embeddings\.position_embeddings": "pos_embed",
    r"embeddings\.patch_embeddings\.projection\.": "patch_embed.proj.",
    r"(encoder\.layer|layers)\.": "blocks.",
    r"attention\.(attention\.)?([qkv])(uery|ey|alue|_proj)\.": r"attn.\2.",
    r"attention\.(output\.dense|o_proj)\.": "attn.proj.",
    r"intermediate\.dense\.": "mlp.fc1.", r"output\.dense\.": "mlp.fc2.",
    r"layer_scale([12])\.lambda1": r"ls\1.gamma",
    r"layernorm_before\.": "norm1.", r"layernorm_after\.": "norm2.", r"layernorm\.": "norm.",
    "masked_embed$": "mask_token", "register_tokens$": "reg_token"}  # iBOT's, DINOv2's


def timm_names(weights):
    """Tensors under timm's names; a separate query, key and value become one qkv."""
    renamed = {}
    for name, x in weights.items():
        for theirs, ours in RENAMED.items():
            name = re.sub(theirs, ours, name)
        renamed[name] = x
    for name in [name for name in renamed if ".attn.q." in name]:
        parts = [name.replace(".q.", f".{part}.") for part in "qkv"]
        if len({renamed[part].shape if part in renamed else None for part in parts}) == 1:
            joined = torch.cat([renamed.pop(part) for part in parts])
            renamed[name.replace(".q.", ".qkv.")] = joined
    return renamed


# width -> heads of the published ViTs; MoCo v3's ViT-S alone has 12
PUBLISHED_HEADS = {192: 3, 384: 6, 768: 12, 1024: 16, 1280: 16}


def heads_in(options, prefix, width):
    """Attention heads that a file was trained with, None where it does not say: no shape tells."""
    if options.get("arch") in [*ARCHS]:  # ours
        shape = ARCHS[options["arch"]].keywords
        return shape["num_heads"] if shape["embed_dim"] == width else None
    if width == 384 and re.search("(base|momentum)_encoder", prefix):
        return 12
    return PUBLISHED_HEADS.get(width) if "teacher" in prefix else None  # DINO, iBOT


def flat(tree, prefix="", depth=4):
    """Dicts in dicts -> one {dotted name: tensor}: whatever a file is wrapped in is a prefix."""
    found = {f"{prefix}{name}": x for name, x in tree.items() if isinstance(x, torch.Tensor)}
    if depth and not any(name.endswith("cls_token") for name in found):
        for name, x in tree.items():
            found |= flat(x, f"{prefix}{name}.", depth - 1) if isinstance(x, dict) else {}
    return found


def read_weights(path):
    """The options of our run, the backbone under timm's names, and its heads or None.

    Which network: ours, DINO's and iBOT's teacher (our student where there is no teacher); MoCo
    v3's base_encoder; else the first. Heads, MAE's decoder (with its mask token of decoder width),
    timm's classifier and Hugging Face's pooler are left out. A folder is its checkpoint.pt.
    """
    path = os.path.join(path, "checkpoint.pt") if os.path.isdir(path) else os.fspath(path)
    file = read_file(path)
    options = file["args"] if isinstance(file.get("args"), dict) else {}
    weights = timm_names(flat(file))
    prefixes = [name.removesuffix("cls_token") for name in weights if name.endswith("cls_token")]
    if not prefixes:
        raise ValueError(f"{path} holds no ViT backbone (no cls_token): "
                         f"it has {[name[:80] for name in sorted(weights)[:5]]}")
    prefix = min(prefixes, key=lambda x: ("momentum_encoder" in x or x.startswith("frozen."),
                                          "teacher" not in x, x.count(".")))
    weights = {name.removeprefix(prefix): x
               for name, x in weights.items() if name.startswith(prefix)}
    decoder = any(name.startswith("decoder") for name in weights)
    outside = ("decoder_", "head.", "head_dist.", "pooler.") + ("mask_token",) * decoder
    weights = {name: x for name, x in weights.items() if not name.startswith(outside)}
    for name, x in weights.items():
        if not is_floats(x):
            raise ValueError(f"{path} cannot be loaded: {name} is no dense tensor of floats")
    if "mask_token" in weights:
        weights["mask_token"] = weights["mask_token"].reshape(1, 1, -1)  # (1, D) in both
    return options, weights, heads_in(options, prefix, (0, *weights["cls_token"].shape)[-1])


def load_backbone(vit, path, num_heads=None):
    """Load a backbone into `vit`, strictly, and return it; ValueError lists what does not fit.

    Reads our checkpoints, those of DINO, DINOv2, iBOT, MAE, MoCo v3 and timm, and Hugging Face's
    ViT layout, whatever their prefixes. Only `mask_token` may be missing. `num_heads` says what the
    file was trained with where that is not the published number: with another than that, weights
    would load and give garbage. Nothing is changed in `vit` when anything is wrong.
    """
    options, weights, heads = read_weights(path)
    if "image_size" in options and len({*vit.grid}) > 1:
        raise ValueError(f"{path} was trained on square images, not on {vit.grid[0]} x "
                         f"{vit.grid[1]} patches: build the model for its --image-size")
    return fill(vit, weights, path, num_heads or heads or PUBLISHED_HEADS.get(vit.embed_dim))


def fill(vit, weights, path, heads=None):
    """Put weights read from `path` into `vit`, all of them or none."""
    pos, scaled = weights.get("pos_embed", torch.empty(0)), vit.layer_scale or vit.registers
    if scaled and pos.dim() == 3 and pos.shape[1] + 1 == vit.pos_embed.shape[1]:
        weights = weights | {"pos_embed": F.pad(pos, (0, 0, 1, 0))}  # timm's has none for CLS
    wrong = misfits(vit.state_dict(), weights, optional=["mask_token"])
    if not wrong and heads not in (None, vit.num_heads):
        wrong = [f"it was trained with {heads} attention heads, not {vit.num_heads}: take an arch "
                 f"with {heads}" + ", vit_small_12heads" * (heads == 12 and vit.embed_dim == 384)]
    if wrong:
        raise ValueError(f"{path} does not fit this model ({vit.embed_dim} wide, {len(vit.blocks)} "
                         f"blocks): {listed(wrong)}")
    vit.load_state_dict(weights, strict=False)
    return vit


def open_backbone(path, arch=None):
    """Build the network that a file was written for and load it -> (vit, options).

    `options` are those of the run for our checkpoints; for other files `arch` must be given, and
    they are {"arch", "patch_size", "image_size"}, with the sizes that the weights have. These files
    do not say their grid of patches: it is taken to be square where its number allows.
    """
    options, weights, heads = read_weights(path)
    ours = {"arch", "patch_size", "image_size"} <= set(options)
    options = dict(options) if ours else {"arch": arch}
    if options["arch"] not in [*ARCHS]:
        raise ValueError(f"{path} does not say its arch: add --arch, one of {', '.join(ARCHS)}")
    if ours and arch not in (None, options["arch"]):
        raise ValueError(f"--arch {arch} contradicts {path}, a {options['arch']}: leave --arch out")
    positions, registers = (math.prod(weights[name].shape[1:-1]) if name in weights else 0
                            for name in ("pos_embed", "reg_token"))
    if not ours:
        P = (0, *weights.get("patch_embed.proj.weight", torch.empty(0)).shape)[-1]
        options |= {"patch_size": P, "image_size": math.isqrt(positions) * P}
    S, P = options["image_size"], options["patch_size"]
    if not (type(S) is type(P) is int and 1 <= P <= S < 2**20
            and positions - (S // P) ** 2 in (0, 1)):
        raise ValueError(f"{path} has {positions} positions (pos_embed) and patches of {P} pixels "
                         "(patch_embed.proj.weight): they are not those of CLS and of square images"
                         + f" of {S} pixels" * ours + " (rotary positions?)" * (not positions))
    vit = ARCHS[options["arch"]](image_size=S, patch_size=P, registers=registers,
                                 layer_scale="blocks.0.ls1.gamma" in weights)
    return fill(vit, weights, path, heads), options


def export_backbone(vit, path):
    """Write a backbone's weights as timm names them, for timm's VisionTransformer of this shape.

    A conv stem is refused: timm's has none. So are LayerScale and registers, which only weights
    that timm reads already have. The mask token, which timm's lacks too, is left out.
    """
    if not hasattr(vit.patch_embed, "proj") or vit.layer_scale or vit.registers:
        raise ValueError("a conv stem (vit_micro, vit_mini), LayerScale and registers have no "
                         "place in timm's plain ViT: export vit_tiny, vit_small or vit_base")
    weights = {name: x.cpu() for name, x in vit.state_dict().items() if name != "mask_token"}
    write_file(path, lambda file: torch.save(weights, file))


def one_line(message, most=900):
    """An error message as one line that fits a screen: long words and long middles are cut."""
    words = (word if len(word) <= 200 else f"{word[:100]}..{word[-60:]}"
             for word in str(message).split())
    text = " ".join(words).encode("utf-8", "backslashreplace").decode()
    return text if len(text) <= most else f"{text[:most - 300]} .. {text[-290:]}"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = lambda text: parser.exit(2, f"weights.py: error: {one_line(text)}\n")
    parser.add_argument("--checkpoint", required=True, help="ours, or any that load_backbone reads")
    parser.add_argument("--arch", choices=ARCHS, help="only for weights that do not say theirs")
    parser.add_argument("--export", required=True, metavar="FILE", help="where to write")
    args = parser.parse_args()
    try:
        vit, options = open_backbone(args.checkpoint, args.arch)
        if os.path.exists(args.export) and os.path.samefile(args.checkpoint, args.export):
            raise ValueError("this is the --checkpoint itself: take another")
        export_backbone(vit, args.export)
    except (ValueError, OSError, RuntimeError) as error:
        parser.error(f"--export {args.export}: {error}")
    print(f"""{args.export} is written; in timm:
vit = timm.create_model("vit_base_patch16_224", num_classes=0, img_size={options["image_size"]},
                        patch_size={vit.patch_size}, embed_dim={vit.embed_dim},
                        depth={len(vit.blocks)}, num_heads={vit.num_heads})
vit.load_state_dict(torch.load("{args.export}", weights_only=True))""")
