"""Foreign checkpoints in, our backbones out: the one reader and writer of weights.

    load_backbone(vit, path)            strictly: a key too many or too few is an error
    open_backbone(path)                 builds the network that a file was written for
    python weights.py --checkpoint C --export FILE     # the backbone alone, for timm to load

Files are read as plain tensors (`weights_only=True`): a pickle that would run code is refused and
has not run. Names are those of timm and DINO; the usual prefixes are found.
"""
import argparse
import contextlib
import json
import math
import os
import warnings

import torch

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
    path = os.fspath(path)
    if not os.path.isfile(path):
        raise ValueError(f"no such file: {path}")
    try:
        if path.endswith(".safetensors"):
            from safetensors.torch import load_file  # only where such a file is read
            return load_file(path)
        with (torch.serialization.safe_globals([argparse.Namespace]),  # in the official files
              warnings.catch_warnings(action="ignore")):
            file = torch.load(path, map_location="cpu", weights_only=True)
        if not isinstance(file, dict):
            raise TypeError("no dict")
        return file
    except ImportError as error:
        raise ValueError(f"{path}: reading .safetensors needs the package safetensors: "
                         "pip install safetensors") from error
    except Exception as error:  # whatever a broken or hostile file provokes
        reason = "it holds code" if "GLOBAL" in str(error) else type(error).__name__
        raise ValueError(f"{path} is no checkpoint of plain tensors ({reason}): take one written "
                         "by train.py, timm, DINO, iBOT, MAE or MoCo v3") from error


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


HUGGING_FACE = {"embeddings.cls_token": "cls_token", "embeddings.mask_token": "mask_token",
                "embeddings.position_embeddings": "pos_embed",
                "embeddings.patch_embeddings.projection.": "patch_embed.proj.",
                "encoder.layer.": "blocks.", ".attention.output.dense.": ".attn.proj.",
                ".intermediate.dense.": ".mlp.fc1.", ".output.dense.": ".mlp.fc2.",
                "layernorm_before.": "norm1.", "layernorm_after.": "norm2.", "layernorm.": "norm."}


def from_hugging_face(weights):
    """Hugging Face's ViT names -> timm's; the separate query, key and value become one qkv."""
    renamed = {}
    for name, x in weights.items():
        for theirs, ours in HUGGING_FACE.items():
            name = name.replace(theirs, ours)
        renamed[name] = x
    for name in [name for name in renamed if ".attention.attention.query." in name]:
        parts = [name.replace(".query.", f".{part}.") for part in ("query", "key", "value")]
        if len({renamed[part].shape for part in parts if part in renamed}) == 1 and all(
                part in renamed for part in parts):
            joined = name.replace(".attention.attention.query.", ".attn.qkv.")
            renamed[joined] = torch.cat([renamed.pop(part) for part in parts])
    return renamed


# width -> heads of the published ViTs, 64 wide each; MoCo v3's ViT-S alone has 12
PUBLISHED_HEADS = {192: 3, 384: 6, 768: 12, 1024: 16}


def heads_in(path, file, prefix, weights):
    """(attention heads that a file was trained with, does it say so): no shape tells them."""
    width = (0, *weights["cls_token"].shape)[-1]
    options = file.get("args")
    if isinstance(options, dict) and options.get("arch") in [*ARCHS]:  # ours
        shape = ARCHS[options["arch"]].keywords
        return (shape["num_heads"], True) if shape["embed_dim"] == width else (None, False)
    try:  # Hugging Face's config, beside the weights
        beside = os.path.join(os.path.dirname(path), "config.json")
        with open(beside if os.path.isfile(beside) else os.devnull) as config:
            config = json.load(config)
        if config["hidden_size"] == width:
            return int(config["num_attention_heads"]), True
    except (OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError):
        pass
    if width == 384 and ("base_encoder" in prefix or "momentum_encoder" in prefix):
        return 12, True
    return PUBLISHED_HEADS.get(width), "teacher" in file  # DINO, iBOT; else the usual number


def read_weights(path):
    """The file's dict, the backbone in it under timm's names, and what `heads_in` knows.

    Which network: ours, DINO's and iBOT's teacher (our student where there is no teacher); MoCo
    v3's base_encoder; else the only one. Heads, MAE's decoder (with its mask token of decoder
    width), timm's classifier and Hugging Face's pooler are left out.
    """
    file = weights = read_file(path)
    for name in ("teacher", "state_dict", "model", "student"):
        weights = weights[name] if isinstance(weights.get(name), dict) else weights
    weights = {str(name): x for name, x in weights.items() if is_floats(x)}
    if any(name.endswith("embeddings.cls_token") for name in weights):
        weights = from_hugging_face(weights)
    prefixes = [name.removesuffix("cls_token") for name in weights if name.endswith("cls_token")]
    if not prefixes:
        raise ValueError(f"{path} holds no ViT backbone (no cls_token): "
                         f"it has {[name[:80] for name in sorted(weights)[:5]]}")
    prefix = min(prefixes, key=lambda x: ("momentum_encoder" in x, "teacher" not in x, len(x)))
    weights = {name.removeprefix(prefix): x
               for name, x in weights.items() if name.startswith(prefix)}
    decoder = any(name.startswith("decoder") for name in weights)
    outside = ("decoder_", "head.", "head_dist.", "pooler.") + ("mask_token",) * decoder
    weights = {name: x for name, x in weights.items() if not name.startswith(outside)}
    if "masked_embed" in weights:  # iBOT's name
        weights["mask_token"] = weights.pop("masked_embed").reshape(1, 1, -1)
    return file, weights, heads_in(path, file, prefix, weights)


def load_backbone(vit, path, num_heads=None):
    """Load a backbone into `vit`, strictly, and return it; ValueError lists what does not fit.

    Reads our checkpoints, those of DINO, iBOT, MAE, MoCo v3 and timm, and Hugging Face's ViT
    layout, whatever their prefixes. Only `mask_token` may be missing. Another number of heads than
    the file's is refused, for it would load and give garbage; `num_heads` says what the file was
    trained with where that is not the published number. Nothing is changed in `vit` when anything
    is wrong.
    """
    _, weights, (heads, _) = read_weights(path)
    return fill(vit, weights, path, num_heads or heads)


def fill(vit, weights, path, heads=None):
    """Put weights read from `path` into `vit`, all of them or none."""
    wrong = misfits(vit.state_dict(), weights, optional=["mask_token"])
    if not wrong and heads not in (None, vit.num_heads):
        wrong = [f"it was trained with {heads} attention heads, not {vit.num_heads}: take an arch "
                 f"with {heads}" + ", vit_small_12heads" * (heads == 12 and vit.embed_dim == 384)]
    if wrong:
        raise ValueError(f"{path} does not fit this model: {listed(wrong)}")
    vit.load_state_dict(weights, strict=False)
    return vit


def open_backbone(path, arch=None):
    """Build the network that a file was written for and load it -> (vit, options).

    `options` are those of the run for our checkpoints; for other files `arch` must be given, and
    they are {"arch", "patch_size", "image_size"}, with the sizes that the weights have.
    """
    file, weights, (heads, said) = read_weights(path)
    ours = (isinstance(file.get("args"), dict)
            and {"arch", "patch_size", "image_size"} <= set(file["args"]))
    options = dict(file["args"]) if ours else {"arch": arch}
    if options["arch"] not in [*ARCHS]:
        raise ValueError(f"{path} does not say its arch: add --arch, one of {', '.join(ARCHS)}")
    if ours and arch not in (None, options["arch"]):
        raise ValueError(f"--arch {arch} contradicts {path}, a {options['arch']}: leave --arch out")
    patches = math.prod(weights["pos_embed"].shape[1:-1]) - 1 if "pos_embed" in weights else 0
    if not ours:
        kernel = weights.get("patch_embed.proj.weight", torch.empty(0))
        if kernel.dim() != 4 or not kernel.numel() or patches < 1:
            raise ValueError(f"{path} has no patch_embed.proj.weight or pos_embed: "
                             "it is no ViT of timm's layout")
        P = kernel.shape[-1]
        options |= {"patch_size": P, "image_size": math.isqrt(patches) * P}
    S, P = options["image_size"], options["patch_size"]
    if not (type(S) is type(P) is int and 1 <= P <= S < 2**20 and (S // P) ** 2 == patches):
        raise ValueError(f"{path} does not fit itself: its image_size and patch_size do not give "
                         f"the {patches} patches that it has positions for")
    vit = ARCHS[options["arch"]](image_size=S, patch_size=P)
    try:
        return fill(vit, weights, path, heads if said else None), options
    except ValueError as error:
        raise ValueError(f"{error}; is it of another --arch?" if not ours else error) from None


def export_backbone(vit, path):
    """Write a backbone's weights as timm names them, for timm's VisionTransformer of this shape.

    A conv stem is refused: timm's has none. The mask token, which timm's lacks too, is left out.
    """
    if not hasattr(vit.patch_embed, "proj"):
        raise ValueError("a conv stem (vit_micro, vit_mini) has no place in timm's ViT: export "
                         "vit_tiny, vit_small or vit_base")
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
            raise ValueError(f"--export {args.export} is the --checkpoint itself: take another")
        export_backbone(vit, args.export)
    except ValueError as error:
        parser.error(error)
    except (OSError, RuntimeError) as error:
        parser.error(f"--export {args.export} cannot be written ({error}): take a file in a folder "
                     "that exists")
    print(f"""{args.export} is written; in timm:
vit = timm.create_model("{options["arch"].removesuffix("_12heads")}_patch16_224", num_classes=0,
                        img_size={options["image_size"]}, patch_size={options["patch_size"]},
                        num_heads={vit.num_heads})
vit.load_state_dict(torch.load("{args.export}", weights_only=True))""")
