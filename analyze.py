"""Pictures of a run, each from its folder alone; train.py draws both when it ends.

    python analyze.py curves runs/rkd-textures   # curves.png: k-NN, losses, effective rank by step
    python analyze.py masks runs/rkd-textures    # masks.png: what both see, how they relate images

Left out so far: comparing several runs.
"""
import argparse
import itertools
import json
import os

import torch
import torch.nn.functional as F

from data import MEAN, STD, eval_batches, fold, load_data, train_batches
from launch import Parser
from losses import pairwise_distance
from masking import MASKS
from model import pool_tokens, read_file
from objectives import OBJECTIVES, System

PARTS = "distance angle pull patch_distance patch_angle ibot_image ibot_patch".split()
WHOLE = ["rkd", "ibot"]  # drawn by their parts


def new_figure(mosaic, size):
    """(figure, axes by letter), drawn to file only. Imported here: training needs no matplotlib."""
    from matplotlib.figure import Figure
    figure = Figure(figsize=size, layout="constrained")
    return figure, figure.subplot_mosaic(mosaic)


def curves(folder):
    """curves.png from log.jsonl and args.json."""
    with open(os.path.join(folder, "log.jsonl")) as file:
        rows = [json.loads(line) for line in file]
    if not all(isinstance(x, (int, float, type(None))) for row in rows for x in row.values()):
        raise ValueError("log.jsonl has something else than numbers")
    with open(os.path.join(folder, "args.json")) as file:
        kept = "teacher" if json.load(file)["teacher"] == "ema" else "student"
    figure, axes = new_figure("abc", (12, 3.4))
    evaluated, trained = ([row for row in rows if name in row] for name in ("knn_top1", "loss"))

    def line(place, name, chosen, style="-", **options):
        chosen = [row for row in chosen if name in row]
        if chosen:
            x, y = zip(*((row["step"], row[name]) for row in chosen))
            axes[place].plot(x, y, style, **options)

    line("a", "knn_top1", evaluated, "o-", label=kept)
    for name, style, label in (("raw_pixels_knn_top1", "--", "raw pixels, centred"),
                               ("untrained_knn_top1", ":", "untrained network")):
        if evaluated and name in evaluated[0]:
            axes["a"].axhline(evaluated[0][name], ls=style, color="0.4", label=label)
    axes["a"].set_title("k-NN accuracy, %")
    losses = [name for name in trained[-1] if name in {*OBJECTIVES, *PARTS}] if trained else []
    for name, style in zip([name for name in losses if len(losses) == 1 or name not in WHOLE],
                           itertools.cycle(["-", "--", ":", "-."])):
        line("b", name, trained, style, label=name)
    axes["b"].set(title="losses", yscale="log")
    line("c", "effective_rank", trained, label="of a batch")
    line("c", "test_effective_rank", evaluated, "o--", label="of the test images")
    axes["c"].set(title="effective rank (1: collapsed)", ylim=(0, None))
    for place in axes.values():
        place.set_xlabel("step")
        if place.get_legend_handles_labels()[0]:
            place.legend()
    figure.savefig(os.path.join(folder, "curves.png"), dpi=100)


@torch.no_grad()
def masks(folder, data_path=None, teacher_checkpoint=None, sets=None, shown=6, each=8):
    """masks.png from checkpoint.pt: two views as the networks see them, their distance matrices.

    Without a teacher, the student's own view of whole images stands in its place. Paths in the file
    are not followed: where the images and a given teacher lie is said again.
    """
    state = read_file(os.path.join(folder, "checkpoint.pt"))
    args, device = argparse.Namespace(**state["args"]), torch.device("cpu")
    if args.teacher_checkpoint and not teacher_checkpoint:
        raise ValueError("it was trained with a given teacher: add --teacher-checkpoint FILE")
    args.data_path, args.teacher_checkpoint = data_path, teacher_checkpoint
    system = System(args).eval()
    system.load(state)
    student, teacher = system.student, system.teacher or system.student
    other = "teacher" if system.teacher else "whole"
    train, test = sets or load_data(args.data, args.data_path, args.image_size)

    def hide(count, key):
        maker = MASKS.get(args.mask, MASKS["random"])  # attention: drawn at random here
        return maker(count, student.backbone.grid, args.mask_ratio,
                     torch.Generator().manual_seed(fold(args.seed, 4, key)))

    def pixels(x):
        return (x * x.new_tensor(STD).view(3, 1, 1) + x.new_tensor(MEAN).view(3, 1, 1)).clamp(0, 1)

    shown, views = min(shown, len(train)), [(args.image_size, args.crop_scale)] * 2
    _, weak, strong = next(train_batches(train, [(0, torch.arange(shown))], views, args.seed,
                                         device, jitter=args.jitter, hue=args.hue))
    hidden = hide(shown, 0).view(shown, 1, *student.backbone.grid).float()
    hidden = F.interpolate(hidden, args.image_size) > 0
    whole = pixels((weak if args.weak_teacher else strong)[1])
    part = torch.where(hidden, 0.6, pixels(strong[0]))
    figure, axes = new_figure("aabc", (12, 3.2))
    rows = [torch.cat([*F.pad(row, (1, 1, 1, 1), value=1)], 2) for row in (whole, part)]
    axes["a"].imshow(torch.cat(rows, 1).permute(1, 2, 0).numpy())
    axes["a"].set_title("teacher: a whole view (above); student: part of another" if system.teacher
                        else "a whole view (above); what the student sees of another", fontsize=10)

    data = test or train
    labels = data.labels.unique()[-10:]  # -1, where an image has none, is the first
    chosen = torch.cat([(data.labels == label).nonzero().flatten()[:each] for label in labels])
    images = torch.cat([x for x, _ in eval_batches(data, chosen, args.image_size, device)])
    points = {other: teacher.backbone(images),
              "student": student.backbone(images, hide(len(images), 1), drop=args.hide == "drop")}
    for place, (name, tokens) in zip("bc", points.items()):
        distances = pairwise_distance(pool_tokens(tokens, args.pool))
        low, high = distances[distances > 0].quantile(torch.tensor([0.02, 0.98]))
        axes[place].imshow(distances.numpy(), cmap="gray", vmin=low, vmax=high)
        title = "student's distances, whole" if name == "whole" else f"{name}'s distances"
        axes[place].set_title(f"{title},\n{len(chosen)} images by class", fontsize=10)
    for place in axes.values():
        place.axis("off")
    figure.savefig(os.path.join(folder, "masks.png"), dpi=100)


FIGURES = dict(curves=curves, masks=masks)

if __name__ == "__main__":
    parser = Parser(__doc__)
    parser.add_argument("figure", choices=FIGURES, help="which picture")
    parser.add_argument("folder", help="--out-dir of a run")
    parser.add_argument("--data-path", help="masks: where the images of a folder run are")
    parser.add_argument("--teacher-checkpoint", help="masks: where the given teacher is")
    args = parser.parse_args()
    where = (args.data_path, args.teacher_checkpoint) if args.figure == "masks" else ()
    try:
        FIGURES[args.figure](args.folder, *where)
    except Exception as error:  # whatever is in that folder
        parser.error(f"{args.folder}: no {args.figure} from it ({type(error).__name__}: "
                     f"{str(error)[:300]}); give the --out-dir of a finished run of train.py")
