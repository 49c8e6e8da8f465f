"""Which part of the architecture matters for which system? One factor at a time from a common base.

    python study/architecture.py CIFAR10 RUNS    # train and measure what RUNS lacks, three hours
    python study/architecture.py                 # assets/architecture.png from study/runs.jsonl

The base is vit_micro (two blocks, width 64, patches of 8 px, conv stem, learned positions), and the
pooling, head and momentum that each system has in the study. Learning rates are not tuned again.
Several processes may share the work: each takes a run that has no folder yet.
"""
import contextlib
import functools
import io
import math
import statistics
import sys
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import eval_knn
import eval_linear
import train
from analyze import new_figure, read_runs
from data import load_data
from eval_knn import Parser
from generalise import heat_map
from model import ARCHS, PrototypeHead, VisionTransformer, mlp_head
from objectives import OBJECTIVES, batchnorm_mlp

SEEDS = [0, 1]  # their mean is drawn
COMMON = ("--hue 0.1 --crop-scale 0.3 1 --batch-size 64 --max-steps 1000 --save-every 1000 "
          "--workers 0").split()
SYSTEMS = {"RKD, unmasked": ("rkd", "--mask-ratio 0"), "SimCLR": ("simclr", "--lr 1e-3"),
           "DINO": ("dino", "--lr 1e-3"), "MAE": ("mae", "")}
MEASURES = {"linear_top1": "linear probe", "linear_top1_5_shots": "5 labels per class"}


class NoPositions(VisionTransformer):
    """A ViT that sees its patches as a set."""

    def __init__(self, **options):
        super().__init__(**options)
        self.pos_embed = nn.Parameter(torch.zeros_like(self.pos_embed), requires_grad=False)


# factor -> what of the network differs, or options of train.py
NETWORKS = {
    "depth 4": dict(depth=4), "depth 8": dict(depth=8),
    "width 128": dict(embed_dim=128, num_heads=4), "linear patches": dict(conv_stem=False)}
OPTIONS = {
    "patches of 4 px": "--patch-size 4", "patches of 16 px": "--patch-size 16",
    "fixed positions": "--fixed-pos", "CLS": "--pool cls", "mean of the patches": "--pool mean"}
HEADS = ["no head", "LayerNorm head", "BatchNorm head"]
MOMENTA = {"momentum .95": "--momentum 0.95", "momentum .99": "--momentum 0.99",
           "momentum .996": "--momentum 0.996"}
FACTORS = ["base", *NETWORKS, "no positions", *OPTIONS, *HEADS, *MOMENTA]
# what the base of a system has already, and what a system cannot have
OWN = dict(rkd=["mean of the patches", "no head", "momentum .95"],
           simclr=["mean of the patches", "BatchNorm head"],
           dino=["CLS", "BatchNorm head", "momentum .99"], mae=["mean of the patches"])
LACKS = dict(simclr=[*MOMENTA], mae=[*MOMENTA, *HEADS], dino=["no head"])


def add_archs():
    """Let --arch and checkpoints name each factor: `vit_micro, depth 4`."""
    for factor in FACTORS[1:]:
        kind = NoPositions if factor == "no positions" else VisionTransformer
        shape = ARCHS["vit_micro"].keywords | NETWORKS.get(factor, {})
        ARCHS[f"vit_micro, {factor}"] = functools.partial(kind, **shape)


def head_of(factor, loss):
    """A maker of heads as of `objectives.Term`."""
    def make(args, vit, width, teacher_width):
        norm = nn.LayerNorm if factor == "LayerNorm head" else None
        if loss == "dino":
            return PrototypeHead(width, 4 * width, 256, args.prototypes, norm)
        if factor == "BatchNorm head":
            return batchnorm_mlp(args, vit, width, teacher_width, out=width)
        return mlp_head(width, 4 * width, width, norm=norm) if norm else nn.Identity()
    return make


def run(main, *words):
    """A script's `main` with these options -> the last line that it prints."""
    sys.argv = [main.__module__, *map(str, words)]
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        main()
    return printed.getvalue().splitlines()[-1]


def train_and_measure(folder, loss, options, factor, seed):
    """One run: its checkpoint and evals.jsonl in `folder`."""
    usual = OBJECTIVES[loss]
    if factor in HEADS:
        OBJECTIVES[loss] = replace(usual, head=head_of(factor, loss))
    arch = "vit_micro" if factor == "base" else f"vit_micro, {factor}"
    options = f"{options} {(OPTIONS | MOMENTA).get(factor, '')}".split()
    run(train.main, "--data-path", "cifar10", "--loss", loss, *COMMON, *options, "--arch", arch,
        "--seed", seed, "--out-dir", folder)
    OBJECTIVES[loss] = usual
    words = ["--checkpoint", folder, "--data-path", "cifar10", "--cache", folder / "cache"]
    results = [run(eval_linear.main, *words, "--epochs", 30),
               run(eval_linear.main, *words, "--shots", 5)]
    (folder / "evals.jsonl").write_text("".join(f"{line}\n" for line in results))


def train_all(data, runs):
    sets = load_data("folder", data)
    eval_knn.load_data = lambda *_: sets  # read once for all runs
    train.load_data = lambda *_: (sets[0], None)  # no evaluation on the way
    add_archs()
    for seed in SEEDS:
        for factor in FACTORS:
            for loss, options in SYSTEMS.values():
                if factor in OWN[loss] or factor in LACKS.get(loss, ()):
                    continue
                name = "".join(x if x.isalnum() else "-" for x in factor)
                folder = runs / f"arch-{loss}-{name}-s{seed}"
                with contextlib.suppress(FileExistsError):
                    folder.mkdir(parents=True)
                    train_and_measure(folder, loss, options, factor, seed)


def draw(path):
    """A heat map: factor by system, the change of each measure, mean over the seeds.

    Bold where it is at least two points for each seed, up or down: single seeds vary by one.
    """
    found = {}
    for each in read_runs([ROOT / "study" / "runs.jsonl"], ["arch-*"]):
        factor = each.args["arch"].removeprefix("vit_micro").removeprefix(", ") or "base"
        found[each.args["loss"], factor, each.args["seed"]] = each.measured
    figure, [places] = new_figure(1, 2, 5.2, sharey=True)
    for place, (measure, title) in zip(places, MEASURES.items()):
        def cell(factor, loss):
            pairs = [(found[loss, factor, seed][measure], found[loss, "base", seed][measure])
                     for seed in SEEDS if (loss, factor, seed) in found]
            if factor == "base":
                return math.nan, f"{statistics.mean(base for _, base in pairs):.1f}", False
            if not pairs:
                return math.nan, "base" if factor in OWN[loss] else "", False
            changes = [own - base for own, base in pairs]
            change = statistics.mean(changes)
            return change, f"{change:+.1f}", min(changes) >= 2 or max(changes) <= -2

        cells = [[cell(factor, loss) for loss, _ in SYSTEMS.values()] for factor in FACTORS]
        heat_map(place, cells, ["base: accuracy, %", *FACTORS[1:]], SYSTEMS, 10)
        place.set(title=f"change of accuracy, points: {title}")
    figure.savefig(path)


if __name__ == "__main__":
    parser = Parser(__doc__)
    parser.add_argument("data", nargs="?", help="folder of CIFAR-10; without it: draw")
    parser.add_argument("runs", nargs="?", type=Path, default="runs", help="folder of the runs")
    parser.add_argument("--out", default=ROOT / "assets" / "architecture.png", help="picture")
    args = parser.parse_args()
    if args.data:
        train_all(args.data, Path(args.runs).resolve())
    else:
        draw(args.out)
