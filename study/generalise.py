"""Does relational distillation generalise? The comparisons that were named before looking.

    python study/generalise.py > study/accuracies.md    # from study/runs.jsonl; draws both pictures

A value of a run is its accuracy on one axis; a difference is paired by seed. Student's t gives the
p-value of the mean difference, Holm's method (1979) corrects each family of named comparisons,
Bonferroni's the intervals of the figure. All other differences are exploratory: bold where the
uncorrected 95 % interval leaves out zero.
"""
import functools
import math
import statistics
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from analyze import deviation, grouped, markdown, new_figure, plus_minus, read_runs
from eval_knn import Parser

PAGE = """# All accuracies and differences

`python study/generalise.py > study/accuracies.md` writes this page. Accuracy in percent, mean ±
standard deviation over n seeds; differences in points, paired by seed, bold where the uncorrected
95 % interval excludes zero. Imagenette, textures, CIFAR-10 as columns: measured on another set. The
last tables are the families that were named beforehand."""
SHIFTS = "noise blur contrast hue rotate".split()
SETS = {"cifar10": "CIFAR-10", "imagenette": "Imagenette", "textures": "textures"}
MEASURED_ON = {"cifar10": "cifar10", "imagenette": "imagenette96", "textures": "textures"}
RKD, EQUAL = "RKD, unmasked", "RKD, unmasked, all distances equal"
PAIRS = [("DINO + RKD (weight 5)", "DINO"), ("MoCo v3 + RKD, no pull", "MoCo v3"), (RKD, EQUAL),
         (RKD, "SimCLR")]
CONTROLS = [("DINO + RKD (weight 5)", "DINO + RKD (weight 5), all distances equal"),
            ("MoCo v3 + RKD, no pull", "MoCo v3 + RKD, all distances equal, no pull")]
MORE = [*CONTROLS, (RKD, "RKD, masked"), ("RKD, masked", "RKD, masked, all distances equal"),
        ("BYOL + RKD, no pull", "BYOL"), ("iBOT + RKD, no pull", "iBOT"),
        ("BYOL + RKD, no pull", "BYOL + RKD, all distances equal, no pull")]
FEW = ["1 per class", "5 per class"]
# named before looking, a list for each time: (trained on, seeds, system, base, axis)
FAMILIES = [
    [("cifar10", range(5), *pair, axis) for axis in ("5 per class", "Imagenette", "shifted")
     for pair in PAIRS[:3]] + [("cifar10", range(5), *PAIRS[3], "5 per class")],
    [("cifar10", range(3, 8), *pair, axis) for axis in FEW for pair in CONTROLS],
    [(own, seeds, *PAIRS[0], axis) for axis in FEW
     for own, seeds in (("cifar10", range(8, 13)), ("imagenette", range(1, 6)))],
    [("imagenette", range(seeds), *pair, axis) for axis in FEW
     for pair, seeds in zip(CONTROLS, (6, 5))],
]


def axes(own):
    """{name of an axis: measures that are averaged} of networks trained on the set `own`."""
    found = {"all labels": ["linear_top1"]}
    found |= {f"{n} per class": [f"linear_top1_{n}_shots"] for n in (1, 5, 50)}
    for key, name in SETS.items():
        if key != own:
            found[name] = [f"linear_top1_on_{MEASURED_ON[key]}"]
            found[f"{name}, 5 per class"] = [f"linear_top1_on_{MEASURED_ON[key]}_5_shots"]
    return found | {"shifted": [f"linear_top1_{shift}" for shift in SHIFTS],
                    "k-NN": ["knn_top1"], "whitened k-NN": ["knn_top1_whitened"],
                    "k-NN, 1 per class": ["knn_top1_1_shots"],
                    "k-NN, 5 per class": ["knn_top1_5_shots"]}


def read_groups(own):
    """{name of a system: its runs on the set `own`}, with a value for each axis."""
    runs = read_runs([ROOT / "study" / "runs.jsonl"], [f"{own}-*"])
    for run in runs:
        run.measured |= {axis: statistics.mean(run.measured[name] for name in names)
                         for axis, names in axes(own).items() if {*names} <= {*run.measured}}
    pixels = [run for run in runs if "-pixels-" in run.name]  # measured with --pool pixels
    groups = grouped([run for run in runs if run not in pixels])
    return groups | ({"raw pixels": pixels} if pixels else {})


def p_value(found):
    """Two-sided, of Student's t for a mean of zero, by integrating its density."""
    n = len(found)
    t = abs(statistics.mean(found)) / (statistics.stdev(found) / math.sqrt(n))
    return 1 - 2 * integral(t, n - 1)


def integral(t, freedom, steps=20_000):
    """Of Student's density from 0 to t, by Simpson's rule."""
    scale = math.exp(math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2))
    scale /= math.sqrt(freedom * math.pi)
    x = [t * i / steps for i in range(steps + 1)]
    y = [scale * (1 + a * a / freedom) ** (-(freedom + 1) / 2) for a in x]
    return t / steps / 3 * (y[0] + y[-1] + 4 * sum(y[1:-1:2]) + 2 * sum(y[2:-1:2]))


@functools.cache
def quantile(level, freedom):
    """t with probability `level` between -t and t, by bisection."""
    low, high = 0.0, 100.0
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (low, middle) if 2 * integral(middle, freedom, 2000) > level else (middle, high)
    return middle


def holm(p):
    """Adjusted p-values: the k-th smallest times (number - k), never below a smaller one's."""
    order, adjusted, largest = sorted(range(len(p)), key=p.__getitem__), [0.0] * len(p), 0.0
    for rank, i in enumerate(order):
        largest = max(largest, min(1.0, p[i] * (len(p) - rank)))
        adjusted[i] = largest
    return adjusted


def interval(values, level=0.95):
    """(mean, half of its interval): Student's t · deviation / √n. NaN of too few values."""
    n = len(values)
    if n < 2:
        return sum(values) / n if n else math.nan, math.nan
    return statistics.mean(values), quantile(level, n - 1) * deviation(values) / n ** 0.5


def difference(values):
    """mean ± standard deviation as Markdown, bold where the 95 % interval leaves out zero."""
    text, (mean, half) = plus_minus(values, sign="+"), interval(values)
    return f"**{text}**" if abs(mean) > half else text


def paired(runs, alone, measure):
    """The differences of a measure between `runs` and those of the same seed in `alone`."""
    base = {run.args["seed"]: run.measured[measure] for run in alone if measure in run.measured}
    return [run.measured[measure] - base[run.args["seed"]] for run in runs
            if measure in run.measured and run.args["seed"] in base]


def pair_name(system, base):
    return f"{system} − {'the same, equal distances' if 'equal' in base else base}"


def differences(groups, own, seeds, system, base, axis):
    """Of one named comparison, paired by seed."""
    runs = [run for run in groups[own][system] if run.args["seed"] in seeds]
    return paired(runs, groups[own][base], axis)


def named_table(groups, family):
    """Markdown of a family of comparisons: difference, p-value, corrected p-value."""
    found = [differences(groups, *comparison) for comparison in family]
    p = [p_value(one) for one in found]
    rows = [[SETS[own], pair_name(system, base), axis, plus_minus(one, sign="+"), str(len(one)),
             *(f"{x:.3f}" if x >= 0.001 else "< .001" for x in (raw, adjusted))]
            for (own, _, system, base, axis), one, raw, adjusted in zip(family, found, p, holm(p))]
    return markdown(["trained on", "comparison", "axis", "difference", "n", "p", "p, Holm"], rows)


def draw(groups, path):
    """A row of panels per training set, a panel per axis: differences and their intervals."""
    titles = {"all labels": "all labels", "1 per class": "1 label\nper class",
              "5 per class": "5 labels\nper class", "other data": "other data",
              "shifted": "shifted\ntest images"}
    others = {"cifar10": "Imagenette", "imagenette": "CIFAR-10"}
    pairs = [*PAIRS[:2], *CONTROLS, *PAIRS[2:]]
    figure, places = new_figure(len(others), len(titles), 6, sharey=True, sharex=True)
    for row, (own, other) in zip(places, others.items()):
        # the last family that names a comparison on this set
        named = {tuple(each): (seeds, len(family)) for family in FAMILIES
                 for trained_on, seeds, *each in family if trained_on == own}
        for place, (axis, title) in zip(row, titles.items()):
            axis = other if axis == "other data" else axis
            for y, (system, base) in enumerate(pairs):
                seeds, number = named.get((system, base, axis), (range(1000), 1))
                found = differences(groups, own, seeds, system, base, axis)
                mean, half = interval(found, 1 - 0.05 / number)
                place.plot(found, [y + 0.25] * len(found), ".", ms=3, color="0.6")
                place.errorbar(mean, y, xerr=half, capsize=3, fmt="o", color="black",
                               mfc="black" if (system, base, axis) in named else "white")
            place.axvline(0, color="black", lw=1)
            place.grid(axis="x", color="0.9")
            if own == "cifar10" or axis == other:
                place.set_title(f"other data:\n{other}" if axis == other else title)
        row[0].set_yticks(range(len(pairs)), [pair_name(*pair).replace(" −", "\n−")
                                              for pair in pairs])
        row[0].set(ylim=(len(pairs) - 0.5, -0.5), ylabel=f"trained on {SETS[own]}")
    for place in places[-1]:
        place.set_xlabel("points")
    figure.suptitle("Difference of accuracy: mean with its interval, single seeds below. Filled: "
                    "named beforehand,\n95 % for the whole family (Bonferroni). Open: 95 % each, "
                    "exploratory")
    figure.savefig(path)


def heat_map(place, cells, rows, columns, limit):
    """Cells (value, text, is it bold?) by row and column; colours from -limit to limit."""
    values = [[value for value, _, _ in row] for row in cells]
    place.imshow(values, cmap="RdBu", vmin=-limit, vmax=limit, aspect="auto")
    for i, row in enumerate(cells):
        for j, (value, text, bold) in enumerate(row):
            place.text(j, i, text, ha="center", va="center", fontsize=8,
                       color="white" if abs(value) > 0.6 * limit else "black",
                       weight="bold" if bold else "normal")
    place.set_xticks(range(len(columns)), columns, rotation=25, ha="right")
    place.set_yticks(range(len(rows)), rows)


def draw_all(found, path):
    """A heat map per training set: differences (pair by axis), bold where their interval does."""
    heights = [len(pairs) for pairs in found.values()]
    figure, places = new_figure(len(found), 1, 2.4 + 0.21 * sum(heights), height_ratios=heights)
    for [place], (own, pairs) in zip(places, found.items()):
        cells, names = [], []
        for (a, b), each in pairs.items():
            cells.append([(mean, f"{mean:+.1f}", abs(mean) > half)
                          for mean, half in map(interval, each.values())])
            name = f"{pair_name(a, b)}, n = {len(each['k-NN'])}"
            for left_out in " (weight 5)", ", no pull", "the same, ":
                name = name.replace(left_out, "")
            names.append(name)
        heat_map(place, cells, names, axes(own), 10)
        place.set_title(f"trained on {SETS[own]}: difference of accuracy, points")
    figure.savefig(path)


def main():
    parser = Parser(__doc__)
    parser.add_argument("--out", default=ROOT / "assets", type=Path, help="folder of the pictures")
    out = parser.parse_args().out
    groups = {own: read_groups(own) for own in SETS}
    found, tables = {}, []
    for own, systems in groups.items():
        rows = [[name, *(plus_minus([run.measured[axis] for run in systems[name]
                                     if axis in run.measured]) for axis in axes(own)),
                 str(len(systems[name]))]
                for name in sorted(systems)]
        tables.append(markdown([f"trained on {SETS[own]}", *axes(own), "n"], rows))
        found[own] = {(a, b): {axis: paired(systems[a], systems[b], axis) for axis in axes(own)}
                      for a, b in PAIRS + MORE if {a, b} <= {*systems}}
        rows = [[pair_name(a, b), *map(difference, each.values()), str(len(each["k-NN"]))]
                for (a, b), each in found[own].items()]
        tables.append(markdown([f"difference, {SETS[own]}", *axes(own), "n"], rows))
    print(PAGE, *tables, *(named_table(groups, family) for family in FAMILIES), sep="\n\n")
    draw(groups, out / "generalisation.png")
    draw_all(found, out / "generalisation_all.png")


if __name__ == "__main__":
    main()
