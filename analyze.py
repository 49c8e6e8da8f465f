"""The pictures and tables of the README, one sub-command each, from the folders of runs.

    python analyze.py curves RUN ..       k-NN, losses, rank; of several runs mean and spread
    python analyze.py table RUN ..        Markdown, the seeds of one configuration in one row
    python analyze.py pairs RUN ..        each system alone and with relations, by three measures
    python analyze.py masks RUN           what both networks see, how they relate test images
    python analyze.py views RUN           what the augmentation makes of an image
    python analyze.py relations RUN ..    distances and angles of teacher and student
    python analyze.py attention C ..      where the CLS of the last block looks
    python analyze.py pca C ..            first three principal components of the patch tokens
    python analyze.py factors C ..        what of a texture is linearly readable, block by block
    python analyze.py similarity C ..     CKA (Kornblith et al. 2019) of all blocks with all others
    python analyze.py spectrum C ..       singular values, effective rank, attention distance

RUN is the --out-dir of train.py, C that or any checkpoint that `load_backbone` reads (its --data
may have to be said). Each writes NAME.png into the first folder, or --out. train.py draws the first
and the third when it ends.

Left out: anything that needs two runs to have seen the same images in the same order.
"""
import argparse
import itertools
import json
import math
import os
import statistics
import sys
from types import SimpleNamespace

import torch
import torch.nn.functional as F

from data import MEAN, STD, eval_batches, load_data, normalize, train_batches, unit
from eval_knn import Parser
from losses import cka_loss, effective_rank, pairwise_distance, squared_distance
from masking import MASKS
from model import ARCHS, pool_tokens
from objectives import OBJECTIVES, System, parse_loss
from randomness import fold
from textures import FACTORS, textures
from weights import open_backbone, read_file

PARTS = "distance angle pull patch_distance patch_angle ibot_image ibot_patch".split()
WHOLE = ["rkd", "ibot"]  # drawn by their parts
STYLES = ["-", "--", ":", "-."]
# options that do not make another system
NOT_THE_SYSTEM = set("recipe data_path workers device compile out_dir resume save_every log_every "
                     "eval_every timeout seed predictor".split())
OF_RKD = {*"distance_weight distance_power angle_weight pull_weight patch_weight head "
           }
NEW = dict(distance_power=1.0)  # options that logs of before do not have: how those ran
T_95 = 12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26  # Student's t, 1, 2, .. 9 degrees
MEASURES = dict(knn_top1="k-NN", knn_top1_whitened="k-NN, whitened", linear_top1="linear probe")


def new_figure(mosaic, size, **options):
    """(figure, axes by letter), drawn to file only. Imported here: training needs no matplotlib."""
    from matplotlib.figure import Figure
    figure = Figure(figsize=size, layout="constrained")
    return figure, figure.subplot_mosaic(mosaic, **options)


def new_grid(rows, columns, size):
    """(figure, axes [row][column]) without frames, each of so many inches."""
    from matplotlib.figure import Figure
    figure = Figure(figsize=(columns * size, rows * size), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False)
    for place in axes.flat:
        place.set(xticks=[], yticks=[])
    return figure, axes


# ---- logs ----------------------------------------------------------------------------------------

def read_run(folder):
    """A run's options and rows; a line that was cut, or is none of ours, is left out."""
    with open(os.path.join(folder, "args.json")) as file:
        args = json.load(file)
    rows, seconds, before = [], 0.0, 0
    with open(os.path.join(folder, "log.jsonl"), errors="replace") as file:
        for line in file:
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):
                continue
            if isinstance(row, dict) and type(row.get("step")) is int and all(
                    isinstance(x, (int, float, type(None))) for x in row.values()):
                images = (row["step"] - before) * args["batch_size"]
                seconds += images / row["images_per_second"] if row.get("images_per_second") else 0
                before = row["step"]
                rows.append(row | dict(seconds=seconds, images=row["step"] * args["batch_size"]))
    if not rows:
        raise ValueError("log.jsonl has no row of numbers")
    measured = {}
    if os.path.exists(os.path.join(folder, "evals.jsonl")):  # what eval_*.py printed last
        with open(os.path.join(folder, "evals.jsonl")) as file:
            for line in file:
                measured |= shaped(json.loads(line))
    return SimpleNamespace(args=args, rows=rows, measured=measured, folder=os.fspath(folder))


def shaped(result):
    """What an evaluation printed, its k-NN named by what was done to the features."""
    kind = "_whitened" if result.get("whiten") else "_centered" if result.get("center") else ""
    return {f"{name}{kind}" if name == "knn_top1" else name: x for name, x in result.items()}


def system_of(run):
    """The options that make a run what it is; those of rkd only where it is in the sum."""
    other = set() if "rkd" in parse_loss(run.args["loss"]) else OF_RKD
    return {name: x for name, x in (NEW | run.args).items() if name not in NOT_THE_SYSTEM | other}


def by_data_set(folders):
    """{name of the images: the folders of runs on them}."""
    sets = {}
    for folder in folders:
        args = read_run(folder).args
        own = args["data"] == "folder" and os.path.basename((args["data_path"] or "").rstrip("/"))
        sets.setdefault(own or args["data"], []).append(folder)
    return sets


def grouped(folders):
    """Runs that differ by their seeds alone, together: {label: [run, ..]}."""
    sets, groups = sorted(by_data_set(folders)), {}
    if len(sets) > 1:
        raise ValueError(f"these runs are of different data sets, {sets}: one at a time")
    for run in map(read_run, folders):
        groups.setdefault(json.dumps(system_of(run), sort_keys=True), []).append(run)
    options, labelled = [json.loads(key) for key in groups], {}
    for own, members in zip(options, groups.values()):
        alike = [other for other in options if other["loss"] == own["loss"]]
        differing = [f"{name} {x}" for name, x in own.items() if any(
            other.get(name, x if name in OF_RKD else None) != x
            for other in (options if name in OF_RKD else alike))]
        labelled[", ".join([own["loss"], *differing])] = members
    return labelled


def over_seeds(runs, x, y):
    """(x, mean, standard deviation) of a column at the steps that all seeds have."""
    columns = [{row["step"]: row for row in run.rows if row.get(y) is not None} for run in runs]
    steps = sorted(set.intersection(*(set(column) for column in columns)))
    values = [[column[step][y] for column in columns] for step in steps]
    return ([statistics.mean(column[step][x] for column in columns) for step in steps],
            [statistics.mean(v) for v in values],
            [deviation(v) for v in values])


def deviation(values):
    """Standard deviation over seeds; 0 of one."""
    return statistics.stdev(values) if len(values) > 1 else 0.0


def plus_minus(values, digits=1, sign=""):
    """mean ± standard deviation, as text; nothing of no values."""
    if not values:
        return ""
    around = f" ± {deviation(values):.{digits}f}" if len(set(values)) > 1 else ""
    return f"{statistics.mean(values):{sign}.{digits}f}{around}"


def difference(values):
    """mean ± standard deviation of paired differences, as Markdown.

    Bold where the 95 % interval of the mean, mean ± t · deviation / √n, leaves out zero.
    """
    n, text = len(values), plus_minus(values, sign="+")
    known = n > 1 and abs(statistics.mean(values)) > (
        T_95[min(n - 1, len(T_95)) - 1] * deviation(values) / math.sqrt(n))
    return f"**{text}**" if known else text


def curves(folders, out=None, x="step"):
    """curves.png from log.jsonl and args.json: of one run with its loss terms, or of several."""
    folders = [folders] if isinstance(folders, (str, os.PathLike)) else folders
    figure, axes = new_figure("abc", (12, 3.4))
    if len(folders) == 1:
        curves_of_one(read_run(folders[0]), axes, x)
    else:
        for (label, runs), style in zip(grouped(folders).items(), itertools.cycle(STYLES)):
            for place, y in (("a", "knn_top1"), ("b", "loss"), ("c", "effective_rank")):
                steps, mean, spread = over_seeds(runs, x, y)
                if not mean:
                    continue
                if y == "loss":
                    mean, spread = ([v / mean[0] for v in values] for values in (mean, spread))
                [line] = axes[place].plot(steps, mean, style, label=f"{label} (n = {len(runs)})")
                low, high = zip(*((m - s, m + s) for m, s in zip(mean, spread)))
                axes[place].fill_between(steps, low, high, alpha=0.2, color=line.get_color())
        axes["a"].set_title("k-NN accuracy, %: mean ± std of the seeds")
        axes["b"].set(title="loss / its first value", yscale="log")
        axes["c"].set(title="effective rank of a batch", ylim=(0, None))
    for name, place in axes.items():
        place.set_xlabel(dict(step="step", images="images seen", seconds="seconds of training")[x])
        if place.get_legend_handles_labels()[0] and (name == "a" or len(folders) == 1):
            place.legend(fontsize=8)
    figure.savefig(out or os.path.join(folders[0], "curves.png"), dpi=100)


def curves_of_one(run, axes, x):
    kept = "teacher" if run.args["teacher"] == "ema" else "student"
    evaluated, trained = ([row for row in run.rows if name in row] for name in ("knn_top1", "loss"))

    def line(place, name, chosen, style="-", **options):
        chosen = [row for row in chosen if row.get(name) is not None]
        if chosen:
            axes[place].plot(*zip(*((row[x], row[name]) for row in chosen)), style, **options)

    line("a", "knn_top1", evaluated, "o-", label=kept)
    for name, style, label in (("raw_pixels_knn_top1", "--", "raw pixels, centred"),
                               ("untrained_knn_top1", ":", "untrained network")):
        if evaluated and name in evaluated[0]:
            axes["a"].axhline(evaluated[0][name], ls=style, color="0.4", label=label)
    axes["a"].set_title("k-NN accuracy, %")
    losses = [name for name in trained[-1] if name in {*OBJECTIVES, *PARTS}] if trained else []
    for name, style in zip([name for name in losses if len(losses) == 1 or name not in WHOLE],
                           itertools.cycle(STYLES)):
        line("b", name, trained, style, label=name)
    axes["b"].set(title="losses", yscale="log")
    line("c", "effective_rank", trained, label="of a batch")
    line("c", "test_effective_rank", evaluated, "o--", label="of the test images")
    axes["c"].set(title="effective rank (1: collapsed)", ylim=(0, None))


def table(folders):
    """Markdown of runs, a row for each configuration: mean ± standard deviation over its seeds.

    k-NN and linear are those of evals.jsonl where it is in the folder (the last lines of
    eval_knn.py and eval_linear.py); else the k-NN of the log's last row.
    """
    def value(run, name, first):
        rows = run.rows if first else [run.measured, *run.rows[::-1]]
        return next((row[name] for row in rows if row.get(name) is not None), None)

    def cell(runs, name, digits=1, first=False):
        values = (value(run, name, first) for run in runs)
        return plus_minus([x for x in values if x is not None], digits)

    lines = ["| run | mask | steps | k-NN, % | centred, % | whitened, % | linear, % | "
             "effective rank | alignment | uniformity | seconds | n |", "|---" * 12 + "|"]
    for label, runs in grouped(folders).items():
        args = runs[0].args
        hides = f"{args['mask']}, {args['mask_ratio']:.0%}" if args["mask_ratio"] else "none"
        rank = [cell(runs, "effective_rank", digits=0, first=first) for first in (True, False)]
        lines.append("| " + " | ".join([
            f"`{label}`", hides, cell(runs, "step", digits=0), cell(runs, "knn_top1"),
            cell(runs, "knn_top1_centered"), cell(runs, "knn_top1_whitened"),
            cell(runs, "linear_top1"), " → ".join(rank),
            cell(runs, "alignment", digits=2), cell(runs, "uniformity", digits=2),
            cell(runs, "seconds", digits=0), str(len(runs))]) + " |")
    return "\n".join(lines)


def paired(folders):
    """The groups, and of each sum with rkd whose rest was run too, all options alike but rkd's own:
    (label, label of the rest, {measure: differences of the seeds that both have})."""
    def key(runs, terms):
        options = {name: x for name, x in system_of(runs[0]).items() if name not in OF_RKD}
        return json.dumps(options | dict(loss=terms), sort_keys=True)

    groups, found = grouped(folders), []
    terms = {label: parse_loss(runs[0].args["loss"]) for label, runs in groups.items()}
    labels = {key(runs, terms[label]): label for label, runs in groups.items()}
    for label, runs in groups.items():
        rest = {name: weight for name, weight in terms[label].items() if name != "rkd"}
        base = labels.get(key(runs, rest))
        if rest == terms[label] or not base:
            continue
        alone = {run.args["seed"]: run.measured for run in groups[base]}
        both = [(run.measured, alone[run.args["seed"]]) for run in runs
                if run.args["seed"] in alone]
        found.append((label, base, {name: [a[name] - b[name] for a, b in both
                                           if name in a and name in b] for name in MEASURES}))
    return groups, found


def pairs(folders, out):
    """pairs.png: each system alone and with relations -> Markdown of the differences by seed.

    From evals.jsonl: k-NN of the features as they are and whitened, and the linear probe. A row of
    panels for each data set. Bold differences are those whose 95 % interval leaves out zero.
    """
    sets = {name: paired(own) for name, own in by_data_set(folders).items()}
    if not any(found for _, found in sets.values()):
        raise ValueError("no two of these runs are X and X+W*rkd with all other options alike")
    heights = [0.34 * (len(groups) - len(found)) for groups, found in sets.values()]
    figure, axes = new_figure([[f"{name}/{x}" for x in MEASURES] for name in sets],
                              (12, 0.6 + sum(heights) + 0.6 * len(sets)), height_ratios=heights)
    lines = ["| images | pair | " + " | ".join(MEASURES.values()) + " | n |", "|---" * 6 + "|"]
    for name, (groups, found) in sets.items():
        row = {measure: axes[f"{name}/{measure}"] for measure in MEASURES}
        pairs_of_one(groups, found, row)
        row["knn_top1"].set_ylabel(name)
        lines += [" | ".join([f"| {name} | `{label}` less `{base}`",
                              *map(difference, each.values()),
                              f"{max(map(len, each.values()))} |"]) for label, base, each in found]
    row["knn_top1_whitened"].set_xlabel("%, mean ± std of the seeds; hollow: alone, filled: + rkd")
    figure.savefig(out, dpi=100)
    return "\n".join(lines)


def pairs_of_one(groups, found, axes):
    """The three panels of one data set; {measure: axes}."""
    summed = {label: base for label, base, _ in found}
    rows = [label for label in groups if label not in summed]
    for measure, place in axes.items():
        def dot(label, y, face):
            values = [run.measured[measure] for run in groups[label] if measure in run.measured]
            if values:
                place.errorbar(statistics.mean(values), y, xerr=deviation(values), fmt="o",
                               color="black", markerfacecolor=face, capsize=2)
            return statistics.mean(values or [math.nan])

        for y, label in enumerate(rows):
            start = dot(label, y, "white")
            for other in (other for other, base in summed.items() if base == label):
                end = dot(other, y + 0.3, "black")
                place.plot([start, end], [y, y + 0.3], color="0.6", zorder=0)
        gains = [statistics.mean(each[measure]) for _, _, each in found if each[measure]]
        said = f": adding rkd {statistics.mean(gains):+.1f} points" if gains else ""
        place.set_title(MEASURES[measure] + said, fontsize=10)
        place.set(yticks=range(len(rows)), ylim=(len(rows) - 0.3, -0.5))
        place.set_yticklabels(rows if measure == "knn_top1" else [], fontsize=9)
        place.grid(axis="x", color="0.9")
    limits = [place.get_xlim() for place in axes.values() if place.lines]
    for place in axes.values() if limits else ():
        place.set_xlim(min(low for low, _ in limits), max(high for _, high in limits))


# ---- networks and images -------------------------------------------------------------------------

def open_run(folder, data_path=None, teacher_checkpoint=None):
    """(args, system) of the checkpoint in a run's folder.

    Paths in the file are not followed: where the images and a given teacher lie is said again.
    """
    state = read_file(os.path.join(folder, "checkpoint.pt"))
    args = argparse.Namespace(**state["args"])
    if args.teacher_checkpoint and not teacher_checkpoint:
        raise ValueError("it was trained with a given teacher: add --teacher-checkpoint FILE")
    args.data_path, args.teacher_checkpoint = data_path, teacher_checkpoint
    system = System(args).eval()
    system.load(state)
    return args, system


def open_network(path, options):
    """A backbone, its name, and how it was trained: of a run's folder, or of a checkpoint."""
    file = os.path.join(path, "checkpoint.pt") if os.path.isdir(path) else path
    vit, own = open_backbone(file, options.arch)
    name = os.path.basename(os.path.normpath(path))
    return SimpleNamespace(name=name, vit=vit.eval(), size=own["image_size"],
                           pool=own.get("pool", "cls"), data=options.data or own.get("data"))


def of_each_class(data, each):
    """Indices of so many images, the first ones, of each of (at most ten) classes, in order."""
    labels = data.labels.unique()[-10:]  # -1, where an image has none, is the first
    return torch.cat([(data.labels == label).nonzero().flatten()[:each] for label in labels])


def pictures(network, options, count):
    """(images (M, 3, S, S), labels, names of classes): of each class as many, in order."""
    if not network.data:
        raise ValueError("it does not say its data: add --data")
    train, test = load_data(network.data, options.data_path, network.size)
    data = test or train
    chosen = of_each_class(data, -(-count // min(10, len(data.labels.unique()))))
    both = list(eval_batches(data, chosen, network.size, torch.device("cpu")))
    return torch.cat([x for x, _ in both]), torch.cat([y for _, y in both]), data.classes


def pixels(x):
    """Normalised images as they are seen, 0 to 1."""
    return (x * x.new_tensor(STD).view(3, 1, 1) + x.new_tensor(MEAN).view(3, 1, 1)).clamp(0, 1)


@torch.no_grad()
def block_features(network, images):
    """The feature of each image after each block, through the last norm: list of (M, D)."""
    depth, parts = len(network.vit.blocks), []
    for x in images.split(250):
        parts.append([pool_tokens(tokens, network.pool)
                      for tokens in network.vit.last_blocks(x, depth)])
    return [torch.cat(x) for x in zip(*parts)]


def ordered_distances(place, distances, title):
    """A distance matrix as grey levels, its 2 % to 98 %."""
    low, high = distances[distances > 0].quantile(torch.tensor([0.02, 0.98]))
    place.imshow(distances.numpy(), cmap="gray", vmin=low, vmax=high)
    place.set_title(title, fontsize=10)


@torch.no_grad()
def masks(folder, data_path=None, teacher_checkpoint=None, sets=None, out=None, shown=6, each=8):
    """masks.png from checkpoint.pt: two views as the networks see them, their distance matrices.

    Without a teacher, the student's own view of whole images stands in its place.
    """
    args, system = open_run(folder, data_path, teacher_checkpoint)
    device = torch.device("cpu")
    student, teacher = system.student, system.teacher or system.student
    other = "teacher" if system.teacher else "whole"
    train, test = sets or load_data(args.data, args.data_path, args.image_size)

    def hide(count, key):
        maker = MASKS.get(args.mask, MASKS["random"])  # attention: drawn at random here
        return maker(count, student.backbone.grid, args.mask_ratio,
                     torch.Generator().manual_seed(fold(args.seed, 4, key)))

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
    chosen = of_each_class(data, each)
    images = torch.cat([x for x, _ in eval_batches(data, chosen, args.image_size, device)])
    points = {other: teacher.backbone(images),
              "student": student.backbone(images, hide(len(images), 1), drop=args.hide == "drop")}
    for place, (name, tokens) in zip("bc", points.items()):
        distances = pairwise_distance(pool_tokens(tokens, args.pool))
        title = "student's distances, whole" if name == "whole" else f"{name}'s distances"
        ordered_distances(axes[place], distances, f"{title},\n{len(chosen)} images by class")
    for place in axes.values():
        place.axis("off")
    figure.savefig(out or os.path.join(folder, "masks.png"), dpi=100)


@torch.no_grad()
def views(folder, data_path=None, out=None, shown=5, each=4):
    """views.png: images as they are, cropped, and with the colours of the run."""
    args = argparse.Namespace(**read_file(os.path.join(folder, "checkpoint.pt"))["args"])
    train, _ = load_data(args.data, data_path, args.image_size)
    index, cpu = torch.arange(min(shown, len(train))), torch.device("cpu")
    whole = torch.cat([x for x, _ in eval_batches(train, index, args.image_size, cpu)])
    options = dict(jitter=args.jitter, hue=args.hue, grey_probability=args.grey,
                   blur_probability=args.blur[0], solarize_probability=args.solarize[0])
    _, weak, strong = next(train_batches(train, [(0, index)], [(args.image_size, args.crop_scale)]
                                         * each, args.seed, cpu, **options))
    figure, axes = new_grid(1, 1, 6)
    rows = [[x, *both] for x, *both in zip(whole, *(v for pair in zip(weak, strong) for v in pair))]
    rows = [torch.cat([F.pad(pixels(x), (1, 1, 1, 1), value=1) for x in row], 2) for row in rows]
    axes[0, 0].imshow(torch.cat(rows, 1).permute(1, 2, 0).numpy())
    axes[0, 0].set_title(f"{args.data}: an image, then {each} crops, each alone and with new "
                         "colours", fontsize=9)
    figure.savefig(out or os.path.join(folder, "views.png"), dpi=100, bbox_inches="tight")


def angles(x):
    """Cosines at all vertices of points (N, D): a flat tensor of the N(N-1)(N-2) triplets."""
    S, N = squared_distance(x), len(x)
    inverse = torch.where(S > 0, S, torch.inf).rsqrt()
    cos = (S[:, :, None] + S[:, None, :] - S) / 2 * inverse[:, :, None] * inverse[:, None, :]
    j, i, k = torch.meshgrid(*[torch.arange(N)] * 3, indexing="ij")
    return cos[(i != j) & (k != j) & (i != k)].float()


@torch.no_grad()
def relations(folders, options):
    """relations.png: of each run, distances of teacher and student by class, and their angles."""
    figure, axes = new_grid(len(folders), 4, 3)
    for row, folder in zip(axes, folders):
        args, system = open_run(folder, options.data_path, options.teacher_checkpoint)
        network = SimpleNamespace(size=args.image_size, data=args.data)
        images, _, _ = pictures(network, options, 80)
        networks = dict(teacher=system.teacher, student=system.student)
        points = {name: pool_tokens(x.backbone(images), args.pool) for name, x in networks.items()
                  if x}
        distances = {name: pairwise_distance(x) for name, x in points.items()}
        for place, (name, x) in zip(row, distances.items()):
            ordered_distances(place, x, f"{name}, {os.path.basename(os.path.normpath(folder))}")
        for name, style in zip(points, STYLES):
            counts = angles(points[name]).histc(50, -1, 1)
            row[2].plot(torch.linspace(-1, 1, 50), counts / counts.sum(), style, label=name)
        row[2].set(title="cosines of the angles", xticks=[-1, 0, 1])
        row[2].legend(fontsize=8)
        if len(distances) == 2:
            above = torch.ones(len(images), len(images)).triu(1) > 0
            t, s = (x[above] for x in distances.values())
            row[3].plot(t, s, ",", color="black")
            row[3].set(title=f"distances: r = {torch.corrcoef(torch.stack([t, s]))[0, 1]:.2f}",
                       xlabel="teacher", ylabel="student")
    return figure


@torch.no_grad()
def attention(networks, options):
    """attention.png: of each network, what the CLS of its last block attends to, mean of heads."""
    def seen(vit, images):
        maps = vit.last_attention(images).mean(1, keepdim=True)  # (M, 1, N)
        return F.interpolate(maps.unflatten(2, vit.grid_of(*images.shape[2:])), images.shape[2:])
    return over_images(networks, options, seen)


@torch.no_grad()
def pca(networks, options):
    """pca.png: first three principal components of all patch tokens shown, as red, green, blue."""
    def colours(vit, images):
        grid = vit.grid_of(*images.shape[2:])
        tokens = vit(images)[:, 1:]
        x = tokens.flatten(0, 1) - tokens.mean((0, 1))
        x = x @ torch.linalg.svd(x, full_matrices=False).Vh[:3].T
        low, high = x.quantile(0.02, 0), x.quantile(0.98, 0)
        x = ((x - low) / (high - low)).clamp(0, 1).view(len(images), *grid, 3).permute(0, 3, 1, 2)
        return F.interpolate(x, images.shape[2:])
    return over_images(networks, options, colours)


def over_images(networks, options, picture):
    """A row of images and under it one row a network: `picture(vit, images)` (M, 1 or 3, S, S)."""
    images = [pictures(network, options, 10)[0][:10] for network in networks]
    figure, axes = new_grid(1 + len(networks), len(images[0]), 1.2)
    rows = [("images", pixels(images[0]))]
    rows += [(network.name, picture(network.vit, x)) for network, x in zip(networks, images)]
    for places, (name, row) in zip(axes, rows):
        for place, x in zip(places, row):
            place.imshow(x.permute(1, 2, 0).squeeze(2).numpy(), cmap="gray")
        places[0].set_ylabel(name, fontsize=7)
    return figure


def ridge(x, targets, parts):
    """R² of each column of `targets` (M, T), linearly read from x (M, D): fit, choose, test."""
    fit, choose, test = parts
    mean, std = x[fit].mean(0), x[fit].std(0).clamp_min(1e-6)
    x = F.pad((x - mean) / std, (0, 1), value=1.0).double()
    y, best = targets.double(), None
    gram, moment = x[fit].T @ x[fit], x[fit].T @ y[fit]

    def score(weights, rows):
        error = (y[rows] - x[rows] @ weights).square().mean(0)
        return 1 - error / (y[rows] - y[fit].mean(0)).square().mean(0)

    for strength in (1e-3, 1e-2, 1e-1, 1.0, 10.0):
        penalty = strength * 1e-2 * len(fit) * torch.eye(len(gram))
        weights = torch.linalg.solve(gram + penalty, moment)
        chosen = score(weights, choose).mean()
        if best is None or chosen > best[0]:
            best = chosen, weights
    return score(best[1], test)


def readable(drawn):
    """Factors (M, 9) as `data.textures` drew them -> {name: (M, T) float64}, what a line can read.

    Those that go round (hues, phases) as sine and cosine, the illumination as the vector of its
    slope, the class as its ten indicators.
    """
    value = dict(zip(FACTORS, drawn.double().T))
    strength, direction = value.pop("illumination"), value.pop("direction")

    def circle(turns):
        return torch.stack([(2 * math.pi * turns).sin(), (2 * math.pi * turns).cos()], 1)

    columns = {name: F.one_hot(x.long(), 10).double() if name == "class" else
               circle(x) if name.startswith(("hue", "phase")) else x.unsqueeze(1)
               for name, x in value.items()}
    return columns | {"illumination": strength.unsqueeze(1) * circle(direction)}


@torch.no_grad()
def factors(networks, options):
    """factors.png: R² of each latent factor of the textures, linearly read from each block.

    Factors as in `readable`; the ridge is chosen on a held-out part.
    """
    images, _, drawn = textures(4000, 2, networks[0].size)
    x = normalize(unit(images))
    parts = torch.arange(4000).split([2700, 300, 1000])
    columns = readable(drawn)
    targets = torch.cat([*columns.values()], 1)
    figure, axes = new_grid(-(-len(networks) // 2), min(2, len(networks)), 4.2)
    for place in axes.flat[len(networks):]:
        place.axis("off")
    for place, network in zip(axes.flat, networks):
        features = [F.adaptive_avg_pool2d(x, 16).flatten(1), *block_features(network, x)]
        scores = []
        for each in features:
            found = ridge(each, targets, parts).split([c.shape[1] for c in columns.values()])
            scores.append([part.mean().item() for part in found])
        scores = torch.tensor(scores).T.clamp_min(0)  # (factors, pixels and blocks)
        place.imshow(scores.numpy(), cmap="gray", vmin=0, vmax=1, aspect="auto")
        for (i, j), value in ((ij, scores[ij].item()) for ij in itertools.product(
                range(scores.shape[0]), range(scores.shape[1]))):
            place.text(j, i, f"{value:.2f}", ha="center", va="center", fontsize=8,
                       color="black" if value > 0.5 else "white")
        place.set(yticks=range(len(columns)), yticklabels=columns, xticks=range(len(features)),
                  xticklabels=["pixels", *range(1, len(features))], xlabel="block")
        place.set_title(f"{network.name}: R² of the class {scores[0, -1]:.2f} (pixels "
                        f"{scores[0, 0]:.2f}),\nof the rest {scores[1:, -1].mean():.2f} (pixels "
                        f"{scores[1:, 0].mean():.2f})", fontsize=9)
    return figure


@torch.no_grad()
def similarity(networks, options):
    """similarity.png: linear CKA of each block of each network with all others, on test images."""
    found = [block_features(network, pictures(network, options, 1000)[0]) for network in networks]
    if len({len(each[0]) for each in found}) > 1:
        raise ValueError("they were trained on sets of different size: give one --data for all")
    flat = [x for each in found for x in each]
    names = [f"{network.name} {block}" for network, each in zip(networks, found)
             for block in range(1, len(each) + 1)]
    cka = torch.tensor([[1 - cka_loss(a, b).item() for b in flat] for a in flat])
    figure, axes = new_grid(1, 1, 2 + 0.5 * len(flat))
    place = axes[0, 0]
    place.imshow(cka.numpy(), cmap="gray", vmin=0, vmax=1)
    for i, j in itertools.product(range(len(flat)), repeat=2):
        place.text(j, i, f"{cka[i, j]:.2f}", ha="center", va="center", fontsize=7,
                   color="black" if cka[i, j] > 0.5 else "white")
    title = "CKA of features, block by block"
    if len(networks) > 2:
        last = torch.tensor([len(each) for each in found]).cumsum(0) - 1
        two = {(a.name, b.name): cka[i, j].item() for (a, i), (b, j)
               in itertools.combinations(zip(networks, last), 2)}
        most, least = (f"{' and '.join(choose(two, key=two.get))} {choose(two.values()):.2f}"
                       for choose in (max, min))
        title += f";\nlast blocks most alike: {most}, least: {least}"
    place.set(yticks=range(len(flat)), yticklabels=names, xticks=range(len(flat)))
    place.set_title(title, fontsize=10)
    place.set_xticklabels(names, rotation=90)
    return figure


@torch.no_grad()
def spectrum(networks, options):
    """spectrum.png: singular values, effective rank of each block, how unequal the distances are
    (all at 1: no relations are left), how far each head looks."""
    figure, axes = new_figure("ab;cd", (10, 7))
    ranks, spreads, far = {}, {}, []
    for network, style, marker in zip(networks, itertools.cycle(STYLES), itertools.cycle("o^sv")):
        images = pictures(network, options, 1000)[0]
        features = block_features(network, images)
        values = torch.linalg.svdvals(features[-1] - features[-1].mean(0))
        values = values[values > 1e-4 * values[0]]  # centred and normalised: the last one is 0
        axes["a"].semilogy(values / values[0], style, label=network.name)
        of_blocks = [effective_rank(x) for x in features]
        ranks[network.name] = of_blocks[-1]
        axes["b"].plot(range(1, len(features) + 1), of_blocks, marker + style, label=network.name)
        distances = relative_distances(features[-1])
        spreads[network.name] = distances.std().item()
        density, edges = torch.histogram(distances, 60, range=(0, 2.5), density=True)
        axes["c"].plot((edges[1:] + edges[:-1]) / 2, density, style, label=network.name)
        for block, heads in enumerate(attention_distances(network.vit, images[:100]), 1):
            far += heads
            axes["d"].plot([block] * len(heads), heads, marker, label=network.name * (block == 1),
                           color=axes["a"].lines[-1].get_color())

    def ends(found, digits):
        low, high = (choose(found, key=found.get) for choose in (min, max))
        named = [f"{found[name]:.{digits}f} ({name})" for name in (low, high)]
        return " to ".join(named) if low != high else f"{found[low]:.{digits}f}"

    axes["a"].set(title="singular values of the last block / the largest", xlabel="rank")
    axes["b"].set(title=f"effective rank: {ends(ranks, 0)}", xlabel="block", ylim=(0, None))
    axes["c"].set(title=f"std of the distances: {ends(spreads, 2)}", yticks=[],
                  xlabel="distance between two images / mean")
    axes["d"].set(title=f"heads look {min(far):.1f} to {max(far):.1f} patches far", xlabel="block")
    axes["d"].set_ylim(0, 1.1 * axes["d"].dataLim.ymax)
    for place in "bd":
        axes[place].set_xticks(range(1, 1 + max(len(network.vit.blocks) for network in networks)))
    for place in axes.values():
        place.title.set_fontsize(11)
        handles, labels = place.get_legend_handles_labels()
        kept = [(h, x) for h, x in zip(handles, labels) if x]
        place.legend(*zip(*kept), fontsize=8)
    return figure


def relative_distances(points):
    """The N(N-1)/2 distances between points (N, D), over their mean: what RKD-D sees."""
    distances = pairwise_distance(points)
    distances = distances[tuple(torch.triu_indices(*distances.shape, offset=1))]
    return distances / distances.mean()


def attention_distances(vit, images):
    """Mean distance, in patches, at which each head of each block attends: list of H numbers."""
    (gh, gw), x, found = vit.grid_of(*images.shape[2:]), vit.embed(images), []
    place = torch.stack(torch.meshgrid(torch.arange(gh), torch.arange(gw), indexing="ij"), 2)
    place = place.flatten(0, 1).float()
    apart = torch.cdist(place, place)  # (N, N)
    for block in vit.blocks:
        weights = block.attn.weights(block.norm1(x))[:, :, 1:, 1:]  # patches to patches
        weights = weights / weights.sum(-1, keepdim=True)
        found.append((weights * apart).sum(-1).mean((0, 2)).tolist())
        x = block(x)
    return found


OF_NETWORKS = dict(attention=attention, pca=pca, factors=factors, similarity=similarity,
                   spectrum=spectrum)
FIGURES = ["curves", "table", "pairs", "masks", "views", "relations", *OF_NETWORKS]


def draw(options):
    """One sub-command: writes its picture, or prints its table."""
    first, name = options.folder[0], options.figure
    out = options.out or os.path.join(first if os.path.isdir(first) else os.path.dirname(first),
                                      f"{name}.png")
    if name == "curves":
        return curves(options.folder, out, options.x)
    if name == "table":
        return print(table(options.folder))
    if name == "pairs":
        return print(pairs(options.folder, out))
    if name == "masks":
        return masks(first, options.data_path, options.teacher_checkpoint, out=out)
    if name == "views":
        return views(first, options.data_path, out)
    if name == "relations":
        figure = relations(options.folder, options)
    else:
        networks = [open_network(path, options) for path in options.folder]
        figure = OF_NETWORKS[name](networks, options)
    figure.savefig(out, dpi=100, bbox_inches="tight")


def main():
    parser = Parser(__doc__)
    add = parser.add_argument
    add("figure", choices=FIGURES, help="which picture or table")
    add("folder", nargs="+", help="--out-dir of a run, or a checkpoint where C stands above")
    add("--out", help="file of the picture; default: NAME.png in the first folder")
    add("--x", default="step", choices=["step", "images", "seconds"], help="curves: against what")
    add("--data", help="of checkpoints that do not say theirs")
    add("--data-path", help="where the images are; a path in a checkpoint is never followed")
    add("--teacher-checkpoint", help="where the given teacher of a run is")
    add("--arch", choices=ARCHS, help="only for weights that do not say theirs")
    options = parser.parse_args()
    try:
        draw(options)
    except Exception as error:  # whatever is in that folder
        parser.error(f"{options.folder[0]}: no {options.figure} from it ({type(error).__name__}: "
                     f"{str(error)[:300]}); give the --out-dir of a finished run of train.py")


if __name__ == "__main__":
    sys.exit(main())
