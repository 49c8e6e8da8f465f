"""Every picture and table, one sub-command each, from the folders of runs or from the study.

    python analyze.py curves RUN ..       k-NN, losses, rank; of several runs means without losses
    python analyze.py table RUN ..        Markdown, the seeds of one configuration in one row
    python analyze.py keep RUN ..         one line per run, to append to study/runs.jsonl
    python analyze.py masks RUN           the views of both networks, their distances of test images
    python analyze.py relations RUN ..    distances and angles of the student over its teacher's
    python analyze.py attention C ..      where the CLS of the last block looks
    python analyze.py pca C ..            first three principal components of the patch tokens
    python analyze.py factors C ..        what of a texture a linear map reads, block by block
    python analyze.py similarity C ..     CKA (Kornblith et al. 2019) of all blocks with all others
    python analyze.py spectrum C ..       singular values, effective rank, distances of images

RUN is the --out-dir of train.py, or for the first two study/runs.jsonl (--only 'cifar10-*' takes
some of its runs); C a folder or any checkpoint that `load_backbone` reads (its --data may have to
be said). Each picture is NAME.png in the first folder, or --out. train.py draws curves and masks.

Left out: anything that needs two runs to have seen the same images in the same order.
"""
import argparse
import fnmatch
import itertools
import json
import math
import os
import statistics
from functools import cache, partial
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torchvision.utils import make_grid

from data import DATASETS, MEAN, STD, eval_batches, load_data, normalize, train_batches, unit
from eval_knn import Parser
from losses import cka_loss, effective_rank, pairwise_distance
from masking import MASKS
from model import ARCHS, pool_tokens
from objectives import OBJECTIVES, System, defaults, parse_loss
from randomness import generator
from textures import FACTORS, textures
from weights import open_backbone, read_file

PARTS = "distance angle pull ibot_image ibot_patch".split()
STYLES = ["-", "--", ":", "-.", (0, (6, 1, 1, 1, 1, 1)), (0, (1, 3))]  # of lines, also in grey
# terms of --loss -> what people call them, and their colour in every picture
TERMS = dict(
    rkd=("RKD", "tab:red"), cka=("CKA", "tab:pink"), ressl=("ReSSL", "tab:olive"),
    feature=("features", "tab:gray"), simclr=("SimCLR", "black"), moco=("MoCo v3", "tab:green"),
    byol=("BYOL", "tab:orange"), dino=("DINO", "tab:blue"), ibot=("iBOT", "tab:purple"),
    beit=("BEiT", "tab:brown"), mae=("MAE", "tab:cyan"), simmim=("SimMIM", "gold"),
    dbot=("dBOT", "navy"))
# options that do not make another system, and those of rkd alone with their usual values
NOT_THE_SYSTEM = set("recipe data_path data_fingerprint workers device compile out_dir resume "
                     "save_every log_every eval_every timeout seed".split())
OF_RKD = dict(distance_weight=1.0, distance_power=1.0, angle_weight=2.0, angle_vertices=None,
              pull_weight=0.05, head=0)
# an option and its value -> what people say instead
WORDS = {"distance weight 0.0": "angles only", "angle weight 0.0": "distances only",
         "pull weight 0.0": "no pull", "head batchnorm True": "BatchNorm head"}
A_RUN = "give the --out-dir of a finished run of train.py"


def new_figure(rows, columns, height, width=8, **options):
    """(figure, axes [row][column]), in inches; of 8 inches a page shows about 800 pixels.

    matplotlib is imported here: training needs none.
    """
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ValueError(f"pictures need matplotlib: pip install matplotlib ({error})") from error
    matplotlib.rcParams.update(
        {"font.size": 9, "axes.titlesize": 9, "figure.titlesize": 10, "legend.fontsize": 8})
    figure = Figure(figsize=(width, height), dpi=150, layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False, **options)


# ---- runs ----------------------------------------------------------------------------------------

def read_json_lines(path):
    """The objects of a .jsonl file. Other lines are left out: cut ones, and text for people."""
    found = []
    with open(path, encoding="utf-8", errors="replace") as file:
        for line in file:
            try:
                found.append(json.loads(line))
            except ValueError:
                continue
    return [x for x in found if isinstance(x, dict)]


def read_run(folder):
    """A run from its --out-dir: name, options, logged rows, and the results of eval_*.py.

    Accuracies of few labels, shifted images or other data have names of their own, as in
    linear_top1_on_imagenette_5_shots.
    """
    folder = Path(folder)
    args = json.loads((folder / "args.json").read_text())
    rows = [row for row in read_json_lines(folder / "log.jsonl") if "step" in row]
    if not rows:
        raise ValueError("log.jsonl has no rows")
    seconds, before = 0.0, 0
    for row in rows:
        if row.get("images_per_second"):
            seconds += (row["step"] - before) * args["batch_size"] / row["images_per_second"]
        before = row["step"]
        row["seconds"] = seconds
    measured, path = {}, folder / "evals.jsonl"
    own = (None, args["data"], Path(args.get("data_path") or "").name)
    for result in read_json_lines(path) if path.exists() else ():
        kind = "_whitened" if result.get("whiten") else "_centered" if result.get("center") else ""
        other = f"_on_{result['data']}" if result.get("data") not in own else ""
        other += f"_{result['shots']}_shots" if result.get("shots") else ""
        other += f"_{result['shift']}" if result.get("shift") else ""
        for name, value in result.items():
            if name.endswith("_top1"):
                measured[name + kind + other] = value
            elif not other:
                measured[name] = value
    return SimpleNamespace(name=folder.name, args=args, rows=rows, measured=measured)


def read_runs(paths, only=("*",)):
    """Runs from folders, and those of .jsonl files whose names match a pattern of `only`."""
    runs = []
    for path in paths:
        try:
            if os.path.isdir(path):
                runs.append(read_run(path))
                continue
            first, *lines = read_json_lines(path)
            usual = first["defaults"]
            runs += [SimpleNamespace(args=usual | line.pop("options"), **line)
                     for line in lines if any(fnmatch.fnmatch(line["name"], one) for one in only)]
        except (OSError, ValueError, KeyError) as error:
            raise ValueError(f"{path} cannot be read as a run ({type(error).__name__}: {error}): "
                             f"{A_RUN}, or study/runs.jsonl") from error
    if not runs:
        raise ValueError(f"no run in {' '.join(map(str, paths))} is called {' or '.join(only)}: "
                         "give other patterns to --only")
    return runs


def keep(runs, path):
    """Append runs to a .jsonl file, a line each: options, evaluations, log.

    Options equal to the defaults in the first line of the file are left out. About 20 rows stay,
    and those with a k-NN evaluation.
    """
    usual = read_json_lines(path)[0]["defaults"]
    with open(path, "a") as file:
        for run in runs:
            *rows, last = run.rows
            every = math.ceil(len(run.rows) / 20)
            rows = [row for i, row in enumerate(rows) if i % every == 0 or "knn_top1" in row]
            options = {name: x for name, x in run.args.items()
                       if name != "out_dir" and (name not in usual or x != usual[name])}
            line = dict(name=run.name, options=options, measured=run.measured, rows=[*rows, last])
            file.write(json.dumps(line) + "\n")


def data_of(run):
    """The images of a run: the same for a folder that was moved."""
    return run.args["data"], (run.args.get("data_fingerprint")
                              or Path(run.args.get("data_path") or "").name)


def system_of(run):
    """The options that make a run what it is; those of rkd only where it is in the sum."""
    rkd = "rkd" in parse_loss(run.args["loss"])
    return {name: x for name, x in run.args.items()
            if name not in NOT_THE_SYSTEM and (rkd or name not in OF_RKD)}


def name_of(run, others=()):
    """What people call a run: `DINO + RKD (weight 5)`, `RKD, unmasked, all distances equal`.

    Its loss; its mask, unless that is the published one; options of rkd that are not the usual
    ones. Another option is said unless it is off or, where no run of `others` with this loss has it
    off, has the commonest value.
    """
    if "loss" not in run.args:  # foreign weights
        return run.name
    if run.args.get("lr") == 0:
        return "untrained"
    options = system_of(run)
    loss, ratio = options.pop("loss"), options.pop("mask_ratio")
    said = [" + ".join(TERMS.get(term, [term])[0] + f" (weight {weight:g})" * (weight != 1)
                       for term, weight in parse_loss(loss).items())]
    if ratio != defaults(loss).get("mask_ratio"):
        share = "" if ratio == 0.75 else f"{100 * ratio:g} % "
        said.append(f"{share}masked" if ratio else "unmasked")
    if (options.get("distance_power"), options.get("angle_weight")) == (0, 0):
        said.append("all distances equal")
        del options["distance_power"], options["angle_weight"]
    everyone = [other.args for other in others or [run] if other.args.get("lr") != 0]
    same = [args for args in everyone if args.get("loss") == loss]
    for option, value in options.items():
        values = [args.get(option) for args in same]
        all_values = [args.get(option) for args in everyone]
        usual = max(values, key=lambda x: (not x, values.count(x), all_values.count(x)))
        if value != OF_RKD.get(option, usual):
            text = f"{option.replace('_', ' ')} {value}"
            said.append(WORDS.get(text, text.removesuffix(" True")))
    return ", ".join(said)


def names_of(runs):
    """The names of runs beside each other; those that would be alike have their folder's too."""
    names = [name_of(run, runs) for run in runs]
    return [f"{name} ({run.name})" if names.count(name) > 1 else name
            for name, run in zip(names, runs)]


def color_of(run):
    """One colour for all runs whose loss begins with the same term; None of foreign weights."""
    if "loss" not in run.args:
        return None
    first = next(iter(parse_loss(run.args["loss"])))
    return "0.6" if run.args.get("lr") == 0 else TERMS.get(first, [first, "tab:gray"])[1]


def grouped(runs):
    """Runs that differ by their seeds alone, together: {their name: [run, ..]}."""
    sets, groups = {data_of(run): run.name for run in runs}, {}
    if len(sets) > 1:
        raise ValueError(f"these runs are of different data sets: {', '.join(sets.values())}: one "
                         "set at a time")
    for run in runs:
        groups.setdefault(json.dumps(system_of(run), sort_keys=True), []).append(run)
    return dict(zip(names_of([members[0] for members in groups.values()]), groups.values()))


def deviation(values):
    """Standard deviation over seeds; 0 of one."""
    return statistics.stdev(values) if len(values) > 1 else 0.0


def over_seeds(runs, column):
    """(steps that all seeds have, mean, standard deviation) of a logged column."""
    logged = [{row["step"]: row[column] for row in run.rows if row.get(column) is not None}
              for run in runs]
    steps = sorted(set.intersection(*map(set, logged)))
    values = [[seed[step] for seed in logged] for step in steps]
    return steps, [*map(statistics.mean, values)], [*map(deviation, values)]


def plus_minus(values, digits=1, sign=""):
    """mean ± standard deviation, as text; nothing of no values."""
    if not values:
        return ""
    around = f" ± {deviation(values):.{digits}f}" if len(set(values)) > 1 else ""
    return f"{statistics.mean(values):{sign}.{digits}f}{around}".replace("-", "−")


def draw_curve(place, runs, column, **look):
    """The mean of a logged column over seeds, their standard deviation as a band around it."""
    steps, mean, spread = map(torch.tensor, over_seeds(runs, column))
    if not len(steps):  # a run without a test set has no k-NN
        return
    [line] = place.plot(steps, mean, **look)
    place.fill_between(steps, mean - spread, mean + spread, alpha=0.2, color=line.get_color())


def draw_run(run, knn, loss, rank):
    """One run: k-NN beside its two controls, each term of the loss, the rank of two sets."""
    draw_curve(knn, [run], "knn_top1", marker="o", color=color_of(run),
               label="EMA teacher" if run.args["teacher"] == "ema" else "student")
    for name, style in (("raw_pixels", "--"), ("untrained", ":")):
        if f"{name}_knn_top1" in run.rows[0]:
            knn.axhline(run.rows[0][f"{name}_knn_top1"], ls=style, color="0.4",
                        label=name.replace("_", " "))
    terms = [name for name in [*OBJECTIVES, *PARTS] if any(name in row for row in run.rows)]
    for name, style in zip(terms, itertools.cycle(STYLES)):
        draw_curve(loss, [run], name, ls=style, label=TERMS.get(name, [name.replace("_", " ")])[0])
    draw_curve(rank, [run], "effective_rank", color="black", label="of a batch")
    draw_curve(rank, [run], "test_effective_rank", color="0.5", marker="o", ls="--",
               label="of the test images")
    loss.set(title="losses", ylabel="loss", yscale="log")
    for place in (knn, loss, rank):
        if place.lines:
            place.legend(loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=2)


def curves(folders, out=None, only=("*",)):
    """curves.png from log.jsonl and args.json: of one run with its loss terms, or of several."""
    folders = [folders] if isinstance(folders, (str, os.PathLike)) else folders
    runs = read_runs(folders, only)
    if len(runs) == 1:
        figure, axes = new_figure(1, 3, 3.6)
        knn, loss, rank = axes[0]
        draw_run(runs[0], knn, loss, rank)
        figure.suptitle(name_of(runs[0]))
    else:
        figure, axes = new_figure(1, 2, 4)
        knn, rank = axes[0]
        for (label, members), style in zip(grouped(runs).items(), itertools.cycle(STYLES)):
            look = dict(ls=style, color=color_of(members[0]), label=f"{label} (n = {len(members)})")
            draw_curve(knn, members, "knn_top1", **look)
            draw_curve(rank, members, "effective_rank", **look)
        figure.suptitle("mean ± standard deviation over n seeds")
        figure.legend(*rank.get_legend_handles_labels(), loc="outside lower center", ncols=2)
    knn.set(title="k-NN accuracy while training", ylabel="accuracy, %")
    rank.set(title="effective rank (1: collapsed)", ylabel="dimensions", ylim=(0, None))
    for place in axes[0]:
        place.set_xlabel("step")
    figure.savefig(out or os.path.join(folders[0], "curves.png"))


def markdown(header, rows):
    lines = ["| " + " | ".join(cells) + " |" for cells in [header, *rows]]
    return "\n".join([lines[0], "|---" * len(header) + "|", *lines[1:]])


def table(folders, only=("*",)):
    """Markdown of runs, a row for each configuration: mean ± standard deviation over its seeds.

    A value is the last one of evals.jsonl, else the last one of the log.
    """
    def cell(runs, name, digits, first=False):
        values = []
        for run in runs:
            rows = run.rows if first else [run.measured, *reversed(run.rows)]
            values += [row[name] for row in rows if row.get(name) is not None][:1]
        return plus_minus(values, digits)

    columns = {"steps": ("step", 0), "k-NN, %": ("knn_top1", 1),
               "centred, %": ("knn_top1_centered", 1), "whitened, %": ("knn_top1_whitened", 1),
               "linear, %": ("linear_top1", 1), "effective rank": ("effective_rank", 0),
               "alignment": ("alignment", 2), "uniformity": ("uniformity", 2),
               "seconds": ("seconds", 0)}
    rows = []
    for label, runs in grouped(read_runs(folders, only)).items():
        args = runs[0].args
        cells = {name: cell(runs, *column) for name, column in columns.items()}
        first = cell(runs, "effective_rank", 0, first=True)
        cells["effective rank"] = f"{first} → {cells['effective rank']}"
        mask = f"{args['mask']}, {args['mask_ratio']:.0%}" if args["mask_ratio"] else "none"
        rows.append([label, mask, *cells.values(), str(len(runs))])
    return markdown(["run", "mask", *columns, "n"], rows)


# ---- networks and images -------------------------------------------------------------------------

def open_run(folder, data_path=None, teacher_checkpoint=None, sets=None):
    """(args, system, (train, test)) of the checkpoint in a run's folder.

    Paths in the file are not followed: where the images and a given teacher lie is said again.
    """
    try:
        state = read_file(os.path.join(folder, "checkpoint.pt"))
        args = argparse.Namespace(**state["args"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{folder} has no checkpoint of a run ({error}): {A_RUN}") from error
    if args.teacher_checkpoint and not teacher_checkpoint:
        raise ValueError(f"{folder} was trained with a given teacher: "
                         "add --teacher-checkpoint FILE")
    args.data_path, args.teacher_checkpoint = data_path, teacher_checkpoint
    system = System(args).eval()
    system.load(state)
    return args, system, sets or open_sets(args.data, data_path, args.image_size)


def open_networks(paths, options, count):
    """Backbones with their names, and `count` images of what each was trained on, or of --data.

    --arch is for files that do not say theirs, so that one picture can show own and foreign ones.
    """
    networks = []
    for path in paths:
        try:
            vit, own = open_backbone(path)
        except ValueError:
            if not options.arch:
                raise
            vit, own = open_backbone(path, options.arch)
        network = SimpleNamespace(name=Path(path).name, args=own, vit=vit.eval(),
                                  size=own["image_size"], pool=own.get("pool", "cls"))
        if count:
            sets = open_sets(options.data or own.get("data"), options.data_path, network.size)
            network.images = test_images(sets, network.size, count)
        networks.append(network)
    for network, network.title in zip(networks, names_of(networks)):
        network.color = color_of(network)
    return networks


@cache
def open_sets(data, path, size):
    """`load_data`, of a folder where only its path is said."""
    if path and data in (None, "textures"):
        data = "folder"
    if data not in DATASETS:
        raise ValueError(f"the checkpoint was trained on {str(data)[:40]!r}: add --data, one of "
                         f"{', '.join(DATASETS)}")
    return load_data(data, path, size)


def test_images(sets, size, count):
    """At most `count` images (M, 3, S, S), by class: the first of each of at most ten classes."""
    train, test = sets
    data = test if test and len(test) > 1 else train  # a single image has no distances
    labels = data.labels.unique()[-10:]  # -1, where an image has none, is the first
    each = math.ceil(count / len(labels))
    chosen = torch.cat([(data.labels == label).nonzero().flatten()[:each] for label in labels])
    return torch.cat([x for x, _ in eval_batches(data, chosen[:count], size, torch.device("cpu"))])


def pixels(x):
    """Normalised images as they are seen, 0 to 1."""
    return (x * x.new_tensor(STD).view(3, 1, 1) + x.new_tensor(MEAN).view(3, 1, 1)).clamp(0, 1)


def block_features(network, images):
    """The feature of each image after each block, through the last norm: list of (M, D)."""
    parts = []
    for x in images.split(250):
        blocks = network.vit.last_blocks(x, len(network.vit.blocks))
        parts.append([pool_tokens(tokens, network.pool) for tokens in blocks])
    return [torch.cat(x) for x in zip(*parts)]


def draw_numbers(place, values, rows, columns):
    """A matrix of numbers between 0 and 1, as grey levels and as text."""
    place.imshow(values, cmap="Greys", vmin=0, vmax=1, aspect="auto")
    for i, row in enumerate(values.tolist()):
        for j, value in enumerate(row):
            place.text(j, i, f"{value:.2f}", ha="center", va="center", fontsize=8,
                       color="black" if value < 0.5 else "white")
    place.set_yticks(range(len(rows)), rows)
    place.set_xticks(range(len(columns)), columns)


@torch.no_grad()
def masks(folder, data_path=None, teacher_checkpoint=None, sets=None, out=None):
    """masks.png from checkpoint.pt: two views as the networks see them, their distance matrices.

    Without a teacher, the student's own view of whole images stands in its place.
    """
    args, system, sets = open_run(folder, data_path, teacher_checkpoint, sets)
    student, whole = system.student.backbone, (system.teacher or system.student).backbone
    images = test_images(sets, args.image_size, 80)
    sampler = MASKS.get(args.mask, MASKS["random"])  # attention: drawn at random here
    mask = sampler(len(images), student.grid, args.mask_ratio, generator(args.seed, 4))
    shown = torch.arange(min(3, len(images), len(sets[0])))
    _, weak, strong = next(train_batches(
        sets[0], [(1, shown)], [(args.image_size, args.crop_scale)] * 2, args.seed,
        torch.device("cpu"), jitter=args.jitter, hue=args.hue))
    hidden = F.interpolate(mask[shown].view(-1, 1, *student.grid).float(), args.image_size) > 0
    views = (pixels((weak if args.weak_teacher else strong)[1]),
             torch.where(hidden, 0.8, pixels(strong[0])))
    points = whole(images), student(images, mask, drop=args.hide == "drop")

    figure, axes = new_figure(2, 2, 4.7, width_ratios=[2.1, 1])
    for (left, right), x, tokens in zip(axes, views, points):
        left.imshow(make_grid(x, padding=1, pad_value=1).permute(1, 2, 0))
        left.axis("off")
        distances = pairwise_distance(pool_tokens(tokens, args.pool))
        apart = distances[distances > 0]
        low, high = apart.quantile(torch.tensor([0.02, 0.98])) if len(apart) else (0, 1)
        right.imshow(distances, cmap="gray", vmin=low, vmax=high)
        right.set(xticks=[], yticks=[])
        right.set_ylabel("→", rotation=0, fontsize=24, labelpad=16, va="center")
    axes[0][0].set_title(f"{'teacher' if system.teacher else 'student'}: the whole view")
    axes[1][0].set_title(f"student: another view, {100 * args.mask_ratio:g} % hidden")
    axes[0][1].set_title(f"distances between {len(images)} images")
    compared = "RKD makes them alike" if "rkd" in system.terms else "compare"
    axes[0][1].set_xlabel(f"⇕ {compared} ⇕", fontsize=11, labelpad=8)
    axes[1][1].set_xlabel("images, by class")
    figure.savefig(out or os.path.join(folder, "masks.png"))


def angles(x):
    """Cosines at all vertices of points (N, D): a flat tensor of the N(N-1)(N-2) triplets."""
    sides = F.normalize(x - x[:, None], dim=2)  # [j, i]: from the vertex j to i
    apart = ~torch.eye(len(x), dtype=torch.bool)
    return (sides @ sides.mT)[apart[:, :, None] & apart[:, None] & apart]


def relations(folders, options):
    """relations.png: of each run, the student's distances and angles over those of its teacher."""
    figure, axes = new_figure(len(folders), 2, 3.6 * len(folders))
    for row, folder in zip(axes, folders):
        args, system, sets = open_run(folder, options.data_path, options.teacher_checkpoint)
        images = test_images(sets, args.image_size, 80)
        teacher, student = (pool_tokens(network.backbone(images), args.pool)
                            for network in (system.teacher or system.student, system.student))
        row[0].set_title(f"{Path(folder).name}: dark where there are many")
        for place, name, relation in zip(row, ("distance", "cosine of the angle"),
                                         (torch.pdist, angles)):
            place.hist2d(relation(teacher), relation(student), 80, cmap="Greys")
            place.set(xlabel=f"{name}, teacher", ylabel=f"{name}, student")
    return figure


def attention(vit, images):
    """The attention of the last block's CLS, mean of the heads: (M, 1, h, w)."""
    x = vit.last_attention(images).mean(1, keepdim=True)  # (M, 1, N)
    return x.unflatten(2, vit.grid_of(*images.shape[2:]))


def pca(vit, images):
    """First three principal components of all patch tokens, as red, green, blue: (M, 3, h, w)."""
    tokens = vit(images)[:, 1:].flatten(0, 1)
    x = tokens - tokens.mean(0)
    x = x @ torch.linalg.svd(x, full_matrices=False).Vh[:3].T
    low, high = x.quantile(0.02, 0), x.quantile(0.98, 0)
    x = ((x - low) / (high - low).clamp_min(1e-6)).clamp(0, 1)
    return x.view(len(images), *vit.grid_of(*images.shape[2:]), 3).permute(0, 3, 1, 2)


def over_images(picture, networks):
    """attention.png or pca.png: a row of images, then of each network what `picture` makes."""
    rows = [("images", pixels(networks[0].images))]
    rows += [(network.title, picture(network.vit, network.images)) for network in networks]
    figure, axes = new_figure(len(rows), len(rows[0][1]), 0.85 * len(rows),
                              subplot_kw=dict(xticks=[], yticks=[]))
    for row, (name, pictures) in zip(axes, rows):
        row[0].set_ylabel(name.replace(", ", "\n"), fontsize=7)
        for place, x in zip(row, pictures):
            place.imshow(x.permute(1, 2, 0), cmap="gray")
    return figure


def ridge(x, targets, parts):
    """R² of each column of `targets` (M, T), linearly read from x (M, D): fit, choose, test."""
    fit, choose, test = parts
    mean, std = x[fit].mean(0), x[fit].std(0).clamp_min(1e-6)
    x = F.pad((x - mean) / std, (0, 1), value=1.0).double()
    y = targets.double()
    gram, moment = x[fit].T @ x[fit], x[fit].T @ y[fit]

    def score(weights, rows):
        error = (y[rows] - x[rows] @ weights).square().mean(0)
        return 1 - error / (y[rows] - y[fit].mean(0)).square().mean(0)

    solutions = []
    for strength in (1e-3, 1e-2, 1e-1, 1.0, 10.0):
        penalty = strength * 1e-2 * len(fit) * torch.eye(len(gram))
        solutions.append(torch.linalg.solve(gram + penalty, moment))
    return score(max(solutions, key=lambda weights: score(weights, choose).mean()), test)


def readable(drawn):
    """Factors (M, 9) as `textures` drew them -> {words: (M, T) float64}, targets of a linear map.

    Hues and phases are periodic and become sine and cosine, the illumination becomes the vector of
    its slope, the class its ten indicators.
    """
    def circle(turns):
        return torch.stack([(2 * math.pi * turns).sin(), (2 * math.pi * turns).cos()], 1)

    x = dict(zip(FACTORS, drawn.double().T))
    return {"pattern (the class)": F.one_hot(x["class"].long(), 10).double(),
            "colour of the figure": circle(x["hue_a"]), "colour of the ground": circle(x["hue_b"]),
            "number of periods": x["frequency"][:, None],
            "shift, first axis": circle(x["phase_x"]), "shift, second axis": circle(x["phase_y"]),
            "rotation": x["rotation"][:, None],
            "slope of the light": x["illumination"][:, None] * circle(x["direction"])}


def factors(networks):
    """factors.png: R² of each latent factor of the textures, linearly read from each block."""
    images, _, drawn = textures(4000, 2, networks[0].size)
    x = normalize(unit(images))
    parts = torch.arange(4000).split([2700, 300, 1000])
    columns = readable(drawn)
    targets, widths = torch.cat([*columns.values()], 1), [c.shape[1] for c in columns.values()]
    read = [("pixels", [F.adaptive_avg_pool2d(x, 16).flatten(1)])]
    read += [(network.title, block_features(network, x)) for network in networks]
    blocks = [len(features) for _, features in read]
    figure, axes = new_figure(1, len(read), 3.4, max(8, 2 + 0.5 * sum(blocks)),
                              width_ratios=blocks, sharey=True)
    for place, (name, features) in zip(axes[0], read):
        scores = [[part.mean().item() for part in ridge(block, targets, parts).split(widths)]
                  for block in features]
        draw_numbers(place, torch.tensor(scores).T.clamp_min(0), [*columns],
                     [*range(1, 1 + len(scores))])
        place.set(title=name, xlabel="block")
    axes[0][0].set(title="", xlabel="", xticklabels=["pixels"])
    figure.suptitle("how much of each cause of a texture is linearly read from the features (R²)")
    return figure


def similarity(networks):
    """similarity.png: linear CKA of each block of each network with all others, on test images."""
    names, features = zip(*[(f"{network.title}, block {i}", x) for network in networks
                            for i, x in enumerate(block_features(network, network.images), 1)])
    cka = torch.tensor([[1 - cka_loss(a, b).item() for b in features] for a in features])
    side = max(6, 2 + 0.5 * len(names))
    figure, axes = new_figure(1, 1, side, side)
    draw_numbers(axes[0][0], cka, names, names)
    axes[0][0].tick_params(axis="x", rotation=90)
    axes[0][0].set_title("similarity of the features by CKA (1: equal but for rotation and scale)")
    return figure


def spectrum(networks):
    """spectrum.png of the last block's features: singular values, effective rank, and how unequal
    the distances between images are (all at 1: no relations are left)."""
    figure, axes = new_figure(1, 2, 3.6)
    values, distances = axes[0]
    for network, style in zip(networks, itertools.cycle(STYLES)):
        last = block_features(network, network.images)[-1]
        look = dict(ls=style, color=network.color)
        found = torch.linalg.svdvals(last - last.mean(0))
        found = found[found > 1e-4 * found[0]]  # centred and normalised: the last one is 0
        name = f"{network.title} (effective rank {effective_rank(last):.0f})"
        values.semilogy(found / found[:1], label=name, **look)
        apart = torch.pdist(last)
        density, edges = (apart / apart.mean()).histogram(60, range=(0, 2.5), density=True)
        distances.plot((edges[1:] + edges[:-1]) / 2, density, **look)
    values.set(title="singular values of the features", xlabel="index, from the largest",
               ylabel="singular value / the largest")
    distances.set(title="distances between test images", xlabel="distance / mean distance",
                  ylabel="density")
    figure.legend(*values.get_legend_handles_labels(), loc="outside lower center", ncols=2)
    return figure


# pictures of networks, and how many test images each needs
OF_NETWORKS = dict(attention=(partial(over_images, attention), 10),
                   pca=(partial(over_images, pca), 10), factors=(factors, 0),
                   similarity=(similarity, 1000), spectrum=(spectrum, 1000))


@torch.no_grad()
def main():
    parser = Parser(__doc__)
    add = parser.add_argument
    add("figure", choices=["curves", "table", "keep", "masks", "relations", *OF_NETWORKS],
        help="which picture or table")
    add("folder", nargs="+", help="--out-dir of a run, a .jsonl file, or a checkpoint (see above)")
    add("--only", nargs="+", default=["*"], metavar="PATTERN", help="runs of a .jsonl file by name")
    add("--out", help="file of the picture; default: NAME.png in the first folder")
    add("--data", choices=DATASETS, help="of checkpoints that do not say theirs")
    add("--data-path", help="where the images are; a path in a checkpoint is never followed")
    add("--teacher-checkpoint", help="where the given teacher of a run is")
    add("--arch", choices=ARCHS, help="of weights that do not say theirs")
    options = parser.parse_args()
    folders, name, only = options.folder, options.figure, options.only
    place = folders[0] if os.path.isdir(folders[0]) else os.path.dirname(folders[0])
    out = options.out or os.path.join(place, f"{name}.png")
    try:
        if name == "curves":
            curves(folders, out, only)
        elif name == "table":
            print(table(folders, only))
        elif name == "keep":
            keep(read_runs(folders), options.out or "study/runs.jsonl")
        elif name == "masks":
            masks(folders[0], options.data_path, options.teacher_checkpoint, out=out)
        elif name == "relations":
            relations(folders, options).savefig(out)
        else:
            draw, count = OF_NETWORKS[name]
            draw(open_networks(folders, options, count)).savefig(out)
    except ValueError as error:
        parser.error(f"no {name}: {error}")
    except OSError as error:
        parser.error(f"no {name}: {error}; name a file that can be written with --out")


if __name__ == "__main__":
    main()
