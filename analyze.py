"""Every picture and table, one sub-command each, from the folders of runs or from the study.

    python analyze.py curves RUN ..       k-NN, losses, rank; of several runs mean and spread
    python analyze.py table RUN ..        Markdown, the seeds of one configuration in one row
    python analyze.py pairs RUN ..        each system alone and with relations, by three measures
    python analyze.py keep RUN ..         one line per run, to append to study/runs.jsonl
    python analyze.py masks RUN           the views of both networks, their distances of test images
    python analyze.py relations RUN ..    distances and angles of teacher and student
    python analyze.py attention C ..      where the CLS of the last block looks
    python analyze.py pca C ..            first three principal components of the patch tokens
    python analyze.py factors C ..        linear R² of each factor of the textures, block by block
    python analyze.py similarity C ..     CKA (Kornblith et al. 2019) of all blocks with all others
    python analyze.py spectrum C ..       singular values, effective rank, distances of images

RUN is the --out-dir of train.py, or for the first three study/runs.jsonl (--only 'cifar10-*' takes
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
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torchvision.utils import make_grid

from data import MEAN, STD, eval_batches, load_data, normalize, train_batches, unit
from eval_knn import Parser
from losses import cka_loss, effective_rank, pairwise_distance, squared_distance
from masking import MASKS
from model import ARCHS, pool_tokens
from objectives import OBJECTIVES, System, parse_loss
from randomness import generator
from textures import FACTORS, textures
from weights import open_backbone, read_file

PARTS = "distance angle pull patch_distance patch_angle ibot_image ibot_patch".split()
STYLES = ["-", "--", ":", "-."]
# options that do not make another system, and those of rkd alone
NOT_THE_SYSTEM = set("recipe data_path workers device compile out_dir resume save_every log_every "
                     "eval_every timeout seed".split())
OF_RKD = set("distance_weight distance_power angle_weight pull_weight patch_weight head".split())
T_95 = 12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26  # Student's t, 1, 2, .. 9 degrees
MEASURES = dict(knn_top1="k-NN", knn_top1_whitened="k-NN, whitened", linear_top1="linear probe")


def new_figure(rows, columns, width, height, **options):
    """(figure, axes [row][column]), in inches. Imported here: training needs no matplotlib."""
    from matplotlib.figure import Figure
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False, **options)


def name_of(path):
    return os.path.basename(os.path.normpath(path))


# ---- runs ----------------------------------------------------------------------------------------

def read_json_lines(path):
    """The objects of a .jsonl file. A line that was cut is left out."""
    found = []
    with open(path) as file:
        for line in file:
            try:
                found.append(json.loads(line))
            except ValueError:
                continue
    return found


def read_run(folder):
    """A run from its --out-dir: name, options, logged rows, and the results of eval_*.py."""
    with open(os.path.join(folder, "args.json")) as file:
        args = json.load(file)
    rows, seconds, before = read_json_lines(os.path.join(folder, "log.jsonl")), 0.0, 0
    if not rows:
        raise ValueError(f"{folder}: log.jsonl has no rows")
    for row in rows:
        if row.get("images_per_second"):
            seconds += (row["step"] - before) * args["batch_size"] / row["images_per_second"]
        before = row["step"]
        row |= dict(seconds=seconds, images=row["step"] * args["batch_size"])
    measured, path = {}, os.path.join(folder, "evals.jsonl")
    for result in read_json_lines(path) if os.path.exists(path) else ():
        kind = "_whitened" if result.get("whiten") else "_centered" if result.get("center") else ""
        for name, value in result.items():
            measured[name + kind if name == "knn_top1" else name] = value
    return SimpleNamespace(name=name_of(folder), args=args, rows=rows, measured=measured)


def read_runs(paths, only=("*",)):
    """Runs from folders, and those of .jsonl files whose names match a pattern of `only`."""
    runs = []
    for path in paths:
        if os.path.isdir(path):
            runs.append(read_run(path))
            continue
        defaults, *lines = read_json_lines(path)
        for line in lines:
            if any(fnmatch.fnmatch(line["name"], pattern) for pattern in only):
                args = defaults["defaults"] | line.pop("options")
                for row in line["rows"]:
                    row["images"] = row["step"] * args["batch_size"]
                runs.append(SimpleNamespace(args=args, **line))
    if not runs:
        raise ValueError(f"no run in {' '.join(map(str, paths))} is called {' or '.join(only)}")
    return runs


def keep(runs, path, most=20):
    """Append runs to a .jsonl file of `read_runs`, a line each: options, evaluations, log.

    Options equal to the defaults in the first line of the file are left out. The rows with a k-NN
    evaluation stay, and others evenly spaced, about `most` in all. Columns that follow from step
    and options are left out.
    """
    defaults = read_json_lines(path)[0]["defaults"] | dict(out_dir=None)
    derived = "epoch images lr weight_decay momentum".split()
    with open(path, "a") as file:
        for run in runs:
            *most_rows, last = run.rows  # the table reads the last one
            rows = [row for row in most_rows if "knn_top1" in row] + [last]
            others = [row for row in most_rows if "knn_top1" not in row]
            rows += others[::max(1, math.ceil(len(others) / max(1, most - len(rows))))]
            rows.sort(key=lambda row: row["step"])
            rows = [{name: x for name, x in row.items() if name not in derived} for row in rows]
            options = {name: x for name, x in run.args.items()
                       if name != "out_dir" and (name not in defaults or x != defaults[name])}
            line = dict(name=run.name, options=options, measured=run.measured, rows=rows)
            file.write(json.dumps(line) + "\n")


def system_of(run):
    """The options that make a run what it is; those of rkd only where it is in the sum."""
    other = set() if "rkd" in parse_loss(run.args["loss"]) else OF_RKD
    return {name: x for name, x in run.args.items() if name not in NOT_THE_SYSTEM | other}


def by_data_set(runs):
    """{name of the images: runs on them}."""
    sets = {}
    for run in runs:
        folder = run.args["data_path"] if run.args["data"] == "folder" else None
        sets.setdefault(name_of(folder) if folder else run.args["data"], []).append(run)
    return sets


def grouped(runs):
    """Runs that differ by their seeds alone, together: {label: [run, ..]}.

    A label is the loss and each option that another run of this loss has otherwise; an option of
    rkd is compared among all runs with rkd.
    """
    sets, groups, labelled = sorted(by_data_set(runs)), {}, {}
    if len(sets) > 1:
        raise ValueError(f"these runs are of different data sets, {sets}: one at a time")
    for run in runs:
        groups.setdefault(json.dumps(system_of(run), sort_keys=True), []).append(run)
    systems = [json.loads(key) for key in groups]
    for system, members in zip(systems, groups.values()):
        alike = [other for other in systems if other["loss"] == system["loss"]]
        label = system["loss"]
        for name, x in system.items():
            others = [s for s in systems if name in s] if name in OF_RKD else alike
            if any(other.get(name) != x for other in others):
                label += f", {name} {x}"
        labelled[label] = members
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
    if n > 1:
        half = T_95[min(n - 1, len(T_95)) - 1] * deviation(values) / math.sqrt(n)
        if abs(statistics.mean(values)) > half:
            return f"**{text}**"
    return text


def curves(folders, out=None, x="step", only=("*",)):
    """curves.png from log.jsonl and args.json: of one run with its loss terms, or of several."""
    folders = [folders] if isinstance(folders, (str, os.PathLike)) else folders
    runs = read_runs(folders, only)
    figure, axes = new_figure(1, 3, 12, 4)
    knn, loss, rank = axes[0]
    styles = itertools.cycle(STYLES)

    def draw(place, members, y, style, label, relative=False):
        steps, mean, spread = map(torch.tensor, over_seeds(members, x, y))
        if not len(steps):
            return
        if relative:
            mean, spread = mean / mean[0], spread / mean[0]
        [line] = place.plot(steps, mean, style, label=label)
        place.fill_between(steps, mean - spread, mean + spread, alpha=0.2, color=line.get_color())

    if len(runs) == 1:
        [run] = runs
        draw(knn, runs, "knn_top1", "o-",
             "EMA teacher" if run.args["teacher"] == "ema" else "student")
        for name, style in (("raw_pixels", "--"), ("untrained", ":")):
            if f"{name}_knn_top1" in run.rows[0]:
                knn.axhline(run.rows[0][f"{name}_knn_top1"], ls=style, color="0.4",
                            label=name.replace("_", " "))
        logged = {name for row in run.rows for name in row}
        for name in [*OBJECTIVES, *PARTS]:
            if name in logged:
                draw(loss, runs, name, next(styles), name)
        draw(rank, runs, "effective_rank", "-", "of a batch")
        draw(rank, runs, "test_effective_rank", "o--", "of the test images")
        loss.set(title="losses", ylabel="loss")
        for place in axes[0]:
            if place.lines:  # a run without a test set has no k-NN
                place.legend(fontsize=8)
    else:
        for (label, members), style in zip(grouped(runs).items(), styles):
            draw(knn, members, "knn_top1", style, f"{label} (n = {len(members)})")
            draw(loss, members, "loss", style, label, relative=True)
            draw(rank, members, "effective_rank", style, label)
        loss.set(title="loss", ylabel="loss / its first value")
        figure.suptitle("mean ± standard deviation over seeds", fontsize=10)
        figure.legend(*knn.get_legend_handles_labels(), loc="outside lower center", ncols=3,
                      fontsize=8)
    knn.set(title="k-NN", ylabel="accuracy, %")
    loss.set_yscale("log")
    rank.set(title="effective rank (1: collapsed)", ylabel="effective rank", ylim=(0, None))
    for place in axes[0]:
        place.set_xlabel(dict(step="step", images="images seen", seconds="training time, s")[x])
    figure.savefig(out or os.path.join(folders[0], "curves.png"), dpi=100)


def table(folders, only=("*",)):
    """Markdown of runs, a row for each configuration: mean ± standard deviation over its seeds.

    A value is the last one of evals.jsonl, else the last one of the log.
    """
    def cell(runs, name, digits=1, first=False):
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
        rows.append([f"`{label}`", mask, *cells.values(), str(len(runs))])
    return markdown(["run", "mask", *columns, "n"], rows)


def markdown(header, rows):
    lines = ["| " + " | ".join(cells) + " |" for cells in [header, *rows]]
    return "\n".join([lines[0], "|---" * len(header) + "|", *lines[1:]])


def paired(runs):
    """The groups, and of each sum with rkd whose rest was run too, all options alike but rkd's own:
    (label, label of the rest, {measure: differences of the seeds that both have})."""
    def key(runs, terms):
        options = {name: x for name, x in system_of(runs[0]).items() if name not in OF_RKD}
        return json.dumps(options | dict(loss=terms), sort_keys=True)

    groups, found = grouped(runs), []
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


def pairs(folders, out, only=("*",)):
    """pairs.png: each system alone and with relations -> Markdown of the differences by seed.

    From evals.jsonl: k-NN of the features as they are and whitened, and the linear probe. A row of
    panels for each data set. Bold differences are those whose 95 % interval leaves out zero.
    """
    sets = {name: paired(own) for name, own in by_data_set(read_runs(folders, only)).items()}
    if not any(found for _, found in sets.values()):
        raise ValueError("no two of these runs are X and X+W*rkd with all other options alike")
    heights = [len(groups) - len(found) for groups, found in sets.values()]
    figure, axes = new_figure(len(sets), 3, 12, 0.6 + 0.34 * sum(heights) + 0.6 * len(sets),
                              height_ratios=heights, sharex="row", sharey="row")
    rows = []
    for row, (name, (groups, found)) in zip(axes, sets.items()):
        draw_pairs(row, groups, {label: base for label, base, _ in found})
        row[0].set_ylabel(name)
        for label, base, each in found:
            rows.append([name, f"`{label}` less `{base}`", *map(difference, each.values()),
                         str(max(map(len, each.values())))])
    for place, measure in zip(axes[0], MEASURES.values()):
        place.set_title(measure)
    for place in axes[-1]:
        place.set_xlabel("accuracy, %")
    figure.suptitle("hollow: alone, filled: with rkd (mean ± standard deviation over seeds)",
                    fontsize=10)
    figure.savefig(out, dpi=100)
    return markdown(["images", "pair", *MEASURES.values(), "n"], rows)


def draw_pairs(axes, groups, bases):
    """The three panels of one data set; `bases` = {label of a sum: label of it without rkd}."""
    alone = [label for label in groups if label not in bases]
    for measure, place in zip(MEASURES, axes):
        place.grid(axis="x", color="0.9")
        for label, runs in groups.items():
            values = [run.measured[measure] for run in runs if measure in run.measured]
            y, face = alone.index(bases.get(label, label)), "white"
            if label in bases:
                y, face = y + 0.3, "black"
            if values:
                place.errorbar(statistics.mean(values), y, xerr=deviation(values), fmt="o",
                               color="black", markerfacecolor=face, capsize=2)
    axes[0].set_yticks(range(len(alone)), alone)
    axes[0].set_ylim(len(alone) - 0.3, -0.5)


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
    return SimpleNamespace(name=name_of(path), vit=vit.eval(), size=own["image_size"],
                           pool=own.get("pool", "cls"), data=options.data or own.get("data"))


def test_images(network, options, count):
    if not network.data:
        raise ValueError("it does not say its data: add --data")
    train, test = load_data(network.data, options.data_path, network.size)
    return of_each_class(test or train, network.size, count)


def of_each_class(data, size, count):
    """About `count` images (M, 3, S, S): the first of each of at most ten classes, in order."""
    labels = data.labels.unique()[-10:]  # -1, where an image has none, is the first
    each = math.ceil(count / len(labels))
    chosen = torch.cat([(data.labels == label).nonzero().flatten()[:each] for label in labels])
    return torch.cat([x for x, _ in eval_batches(data, chosen, size, torch.device("cpu"))])


def pixels(x):
    """Normalised images as they are seen, 0 to 1."""
    return (x * x.new_tensor(STD).view(3, 1, 1) + x.new_tensor(MEAN).view(3, 1, 1)).clamp(0, 1)


@torch.no_grad()
def block_features(network, images):
    """The feature of each image after each block, through the last norm: list of (M, D)."""
    parts = []
    for x in images.split(250):
        blocks = network.vit.last_blocks(x, len(network.vit.blocks))
        parts.append([pool_tokens(tokens, network.pool) for tokens in blocks])
    return [torch.cat(x) for x in zip(*parts)]


def draw_distances(place, distances, title):
    """A distance matrix as grey levels, its 2 % to 98 %."""
    low, high = distances[distances > 0].quantile(torch.tensor([0.02, 0.98]))
    place.imshow(distances, cmap="gray", vmin=low, vmax=high)
    place.set(title=title, xlabel="images, by class", xticks=[], yticks=[])


def draw_numbers(place, values, rows, columns):
    """A matrix of numbers between 0 and 1, as grey levels and as text."""
    place.imshow(values, cmap="gray", vmin=0, vmax=1, aspect="auto")
    for i, row in enumerate(values.tolist()):
        for j, value in enumerate(row):
            place.text(j, i, f"{value:.2f}", ha="center", va="center", fontsize=8,
                       color="black" if value > 0.5 else "white")
    place.set_yticks(range(len(rows)), rows)
    place.set_xticks(range(len(columns)), columns)


@torch.no_grad()
def masks(folder, data_path=None, teacher_checkpoint=None, sets=None, out=None):
    """masks.png from checkpoint.pt: two views as the networks see them, their distance matrices.

    Without a teacher, the student's own view of whole images stands in its place.
    """
    args, system = open_run(folder, data_path, teacher_checkpoint)
    student = system.student.backbone
    whole = (system.teacher or system.student).backbone
    train, test = sets or load_data(args.data, args.data_path, args.image_size)

    def hide(count, key):
        sampler = MASKS.get(args.mask, MASKS["random"])  # attention: drawn at random here
        return sampler(count, student.grid, args.mask_ratio, generator(args.seed, 4, key))

    shown = torch.arange(min(6, len(train)))
    _, weak, strong = next(train_batches(
        train, [(0, shown)], [(args.image_size, args.crop_scale)] * 2, args.seed,
        torch.device("cpu"), jitter=args.jitter, hue=args.hue))
    hidden = hide(len(shown), 0).view(-1, 1, *student.grid).float()
    hidden = F.interpolate(hidden, args.image_size) > 0
    above = pixels((weak if args.weak_teacher else strong)[1])
    below = torch.where(hidden, 0.6, pixels(strong[0]))
    figure, axes = new_figure(1, 3, 12, 3.4, width_ratios=[2, 1, 1])
    views, left, right = axes[0]
    grid = make_grid(torch.cat([above, below]), nrow=len(shown), padding=1, pad_value=1)
    views.imshow(grid.permute(1, 2, 0))
    name = "teacher" if system.teacher else "student, nothing hidden"
    views.set(title=f"above: {name}; below: student, another view", xticks=[], yticks=[])

    images = of_each_class(test or train, args.image_size, 80)
    draw_distances(left, pairwise_distance(pool_tokens(whole(images), args.pool)),
                   f"distances, {name}")
    tokens = student(images, hide(len(images), 1), drop=args.hide == "drop")
    draw_distances(right, pairwise_distance(pool_tokens(tokens, args.pool)),
                   "distances, student, masked")
    figure.savefig(out or os.path.join(folder, "masks.png"), dpi=100)


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
    figure, axes = new_figure(len(folders), 4, 12, 3.2 * len(folders))
    for row, folder in zip(axes, folders):
        args, system = open_run(folder, options.data_path, options.teacher_checkpoint)
        network = SimpleNamespace(size=args.image_size, data=args.data)
        images = test_images(network, options, 80)
        distances = {}
        for place, name in zip(row, ("student", "teacher") if system.teacher else ("student",)):
            points = pool_tokens(getattr(system, name).backbone(images), args.pool)
            distances[name] = pairwise_distance(points)
            draw_distances(place, distances[name], f"distances, {name}")
            counts = angles(points).histc(50, -1, 1)
            row[2].plot(torch.linspace(-1, 1, 50), counts / counts.sum(), label=name)
        row[0].set_ylabel(name_of(folder))
        row[2].set(xlabel="cosine of the angle", ylabel="share of the triplets")
        row[2].legend(fontsize=8)
        if system.teacher:
            i, j = torch.triu_indices(len(images), len(images), offset=1)
            row[3].plot(distances["teacher"][i, j], distances["student"][i, j], ",", color="black")
            row[3].set(xlabel="distance, teacher", ylabel="distance, student")
    return figure


@torch.no_grad()
def attention(networks, options):
    """attention.png: of each network, the attention of the last block's CLS, mean of the heads."""
    def maps(vit, images):
        x = vit.last_attention(images).mean(1, keepdim=True)  # (M, 1, N)
        return x.unflatten(2, vit.grid_of(*images.shape[2:]))
    return over_images(networks, options, maps)


@torch.no_grad()
def pca(networks, options):
    """pca.png: first three principal components of all patch tokens shown, as red, green, blue."""
    def colours(vit, images):
        tokens = vit(images)[:, 1:].flatten(0, 1)
        x = tokens - tokens.mean(0)
        x = x @ torch.linalg.svd(x, full_matrices=False).Vh[:3].T
        low, high = x.quantile(0.02, 0), x.quantile(0.98, 0)
        x = ((x - low) / (high - low)).clamp(0, 1)
        return x.view(len(images), *vit.grid_of(*images.shape[2:]), 3).permute(0, 3, 1, 2)
    return over_images(networks, options, colours)


def over_images(networks, options, picture):
    """A row of images, then one row per network of `picture(vit, images)` (M, 1 or 3, h, w)."""
    images = [test_images(network, options, 10)[:10] for network in networks]
    figure, axes = new_figure(1 + len(networks), len(images[0]), 12, 1.2 * (1 + len(networks)),
                              subplot_kw=dict(xticks=[], yticks=[]))
    rows = [("images", pixels(images[0]))]
    rows += [(network.name, picture(network.vit, x)) for network, x in zip(networks, images)]
    for row, (name, pictures) in zip(axes, rows):
        row[0].set_ylabel(name, fontsize=8)
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
    """Factors (M, 9) as `textures` drew them -> {name: (M, T) float64}, targets of a linear map.

    Hues and phases are periodic and become sine and cosine, the illumination becomes the vector of
    its slope, the class its ten indicators.
    """
    def circle(turns):
        return torch.stack([(2 * math.pi * turns).sin(), (2 * math.pi * turns).cos()], 1)

    columns = dict(zip(FACTORS, drawn.double().T))
    slope = columns.pop("illumination").unsqueeze(1) * circle(columns.pop("direction"))
    for name, x in columns.items():
        if name == "class":
            columns[name] = F.one_hot(x.long(), 10).double()
        else:
            columns[name] = circle(x) if name.startswith(("hue", "phase")) else x.unsqueeze(1)
    return columns | {"illumination": slope}


@torch.no_grad()
def factors(networks, options):
    """factors.png: R² of each latent factor of the textures, linearly read from each block.

    Factors as in `readable`; the ridge is chosen on a held-out part.
    """
    images, _, drawn = textures(4000, 2, networks[0].size)
    x = normalize(unit(images))
    parts = torch.arange(4000).split([2700, 300, 1000])
    columns = readable(drawn)
    targets, widths = torch.cat([*columns.values()], 1), [c.shape[1] for c in columns.values()]
    figure, axes = new_figure(1, len(networks), 1.5 + 3 * len(networks), 4, sharey=True)
    for place, network in zip(axes[0], networks):
        scores = []
        for features in [F.adaptive_avg_pool2d(x, 16).flatten(1), *block_features(network, x)]:
            found = ridge(features, targets, parts).split(widths)
            scores.append([part.mean().item() for part in found])
        draw_numbers(place, torch.tensor(scores).T.clamp_min(0), [*columns],
                     ["pixels", *range(1, len(scores))])
        place.set(title=network.name, xlabel="block")
    figure.suptitle("R² of a linear map from the features to each factor", fontsize=10)
    return figure


@torch.no_grad()
def similarity(networks, options):
    """similarity.png: linear CKA of each block of each network with all others, on test images."""
    features, names = [], []
    for network in networks:
        blocks = block_features(network, test_images(network, options, 1000))
        features += blocks
        names += [f"{network.name}, block {i}" for i in range(1, 1 + len(blocks))]
    cka = torch.tensor([[1 - cka_loss(a, b).item() for b in features] for a in features])
    figure, axes = new_figure(1, 1, *[2 + 0.5 * len(names)] * 2)
    draw_numbers(axes[0][0], cka, names, names)
    axes[0][0].tick_params(axis="x", rotation=90)
    axes[0][0].set_title("CKA of the features", fontsize=10)
    return figure


@torch.no_grad()
def spectrum(networks, options):
    """spectrum.png: singular values, effective rank of each block, how unequal the distances are
    (all at 1: no relations are left)."""
    figure, axes = new_figure(1, 3, 13, 4)
    values, ranks, distances = axes[0]
    for network, style in zip(networks, itertools.cycle(STYLES)):
        features = block_features(network, test_images(network, options, 1000))
        last = features[-1]
        found = torch.linalg.svdvals(last - last.mean(0))
        found = found[found > 1e-4 * found[0]]  # centred and normalised: the last one is 0
        values.semilogy(found / found[0], style, label=network.name)
        ranks.plot(range(1, 1 + len(features)), [effective_rank(x) for x in features],
                   "o" + style, label=network.name)
        density, edges = torch.histogram(relative_distances(last), 60, range=(0, 2.5), density=True)
        distances.plot((edges[1:] + edges[:-1]) / 2, density, style, label=network.name)
    values.set(title="last block", xlabel="index", ylabel="singular value / the largest")
    ranks.set(title="all blocks", xlabel="block", ylabel="effective rank", ylim=(0, None))
    ranks.xaxis.get_major_locator().set_params(integer=True)
    distances.set(title="last block", xlabel="distance between two images / mean distance",
                  ylabel="density")
    for place in axes[0]:
        place.legend(fontsize=8)
    return figure


def relative_distances(points):
    """The N(N-1)/2 distances between points (N, D), over their mean: what RKD-D sees."""
    i, j = torch.triu_indices(len(points), len(points), offset=1)
    distances = pairwise_distance(points)[i, j]
    return distances / distances.mean()


OF_NETWORKS = dict(attention=attention, pca=pca, factors=factors, similarity=similarity,
                   spectrum=spectrum)


def main():
    parser = Parser(__doc__)
    add = parser.add_argument
    add("figure", choices=["curves", "table", "pairs", "keep", "masks", "relations", *OF_NETWORKS],
        help="which picture or table")
    add("folder", nargs="+", help="--out-dir of a run, a .jsonl file, or a checkpoint (see above)")
    add("--only", nargs="+", default=["*"], metavar="PATTERN", help="runs of a .jsonl file by name")
    add("--out", help="file of the picture; default: NAME.png in the first folder")
    add("--x", default="step", choices=["step", "images", "seconds"], help="curves: against what")
    add("--data", help="of checkpoints that do not say theirs")
    add("--data-path", help="where the images are; a path in a checkpoint is never followed")
    add("--teacher-checkpoint", help="where the given teacher of a run is")
    add("--arch", choices=ARCHS, help="only for weights that do not say theirs")
    options = parser.parse_args()
    folders, name, only = options.folder, options.figure, options.only
    place = folders[0] if os.path.isdir(folders[0]) else os.path.dirname(folders[0])
    out = options.out or os.path.join(place, f"{name}.png")
    try:
        if name == "curves":
            curves(folders, out, options.x, only)
        elif name == "table":
            print(table(folders, only))
        elif name == "pairs":
            print(pairs(folders, out, only))
        elif name == "keep":
            keep(read_runs(folders), options.out or "study/runs.jsonl")
        elif name == "masks":
            masks(folders[0], options.data_path, options.teacher_checkpoint, out=out)
        elif name == "relations":
            relations(folders, options).savefig(out, dpi=100)
        else:
            networks = [open_network(path, options) for path in folders]
            OF_NETWORKS[name](networks, options).savefig(out, dpi=100)
    except Exception as error:  # whatever is in that folder
        parser.error(f"{folders[0]}: no {name} from it ({type(error).__name__}: "
                     f"{str(error)[:300]}); give the --out-dir of a finished run of train.py")


if __name__ == "__main__":
    main()
