"""Does relational distillation generalise? The ten comparisons that were named before looking.

    python study/generalise.py                 # tables from study/runs.jsonl, assets/generalisation.png

A value of a run is its accuracy on one axis; a difference is paired by seed. Student's t gives the
p-value of the mean difference, Holm's method (1979) corrects the ten, Bonferroni's the intervals.
"""
import math
import statistics
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from analyze import color_of, markdown, new_figure, plus_minus, read_runs
from eval_knn import Parser

SYSTEMS = {  # runs.jsonl's few-cifar10-NAME-sSEED -> what people say
    "dino": "DINO", "dino+5rkd": "DINO + RKD (weight 5)",
    "dino+5equal": "DINO + RKD (weight 5), all distances equal",
    "moco": "MoCo v3", "moco+rkd": "MoCo v3 + RKD, no pull",
    "moco+equal": "MoCo v3 + RKD, all distances equal, no pull",
    "byol": "BYOL", "byol+rkd": "BYOL + RKD, no pull",
    "byol+equal": "BYOL + RKD, all distances equal, no pull",
    "rkd-m0": "RKD, unmasked", "rkd-m0-equal": "RKD, unmasked, all distances equal",
    "rkd": "RKD, masked", "rkd-equal": "RKD, masked, all distances equal",
    "simclr": "SimCLR", "mae": "MAE", "ibot": "iBOT"}
SHIFTS = "noise blur contrast hue rotate".split()
AXES = {  # columns of the table -> the measures that are averaged
    "all labels": ["linear_top1"],
    "1 per class": ["linear_top1_1_shots"],
    "5 per class": ["linear_top1_5_shots"],
    "50 per class": ["linear_top1_50_shots"],
    "Imagenette": ["linear_top1_on_imagenette96"],
    "Imagenette, 5 per class": ["linear_top1_on_imagenette96_5_shots"],
    "textures": ["linear_top1_on_textures"],
    "textures, 5 per class": ["linear_top1_on_textures_5_shots"],
    "shifted": [f"linear_top1_{shift}" for shift in SHIFTS],
    "k-NN": ["knn_top1"],
    "k-NN, 5 per class": ["knn_top1_5_shots"]}
DRAWN = {"all labels": "all labels", "5 per class": "5 labels per class",
         "Imagenette": "other data:\nImagenette", "shifted": "shifted\ntest images"}
PAIRS = [("dino+5rkd", "dino"), ("moco+rkd", "moco"), ("rkd-m0", "rkd-m0-equal"),
         ("rkd-m0", "simclr")]
NAMED = [(*pair, axis) for axis in [*DRAWN][1:] for pair in PAIRS[:3]] + [(*PAIRS[3], "5 per class")]


def values(runs, axis):
    """{seed: accuracy} of the runs that were measured on an axis."""
    return {run.args["seed"]: statistics.mean(run.measured[name] for name in AXES[axis])
            for run in runs if all(name in run.measured for name in AXES[axis])}


def differences(groups, system, base, axis):
    """Differences of the seeds that both have."""
    first, second = values(groups.get(system, []), axis), values(groups.get(base, []), axis)
    return [first[seed] - second[seed] for seed in sorted(first.keys() & second.keys())]


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


def main():
    parser = Parser(__doc__)
    parser.add_argument("--out", default=ROOT / "assets" / "generalisation.png", help="picture")
    out = parser.parse_args().out
    groups = {}
    for run in read_runs([ROOT / "study" / "runs.jsonl"], ["few-cifar10-*"]):
        groups.setdefault(run.name.removeprefix("few-cifar10-").rsplit("-s", 1)[0], []).append(run)
    rows = [[SYSTEMS[name], *(plus_minus([*values(groups[name], axis).values()]) for axis in AXES),
             str(len(groups[name]))] for name in SYSTEMS if name in groups]
    print(markdown(["trained on CIFAR-10", *AXES, "n"], rows), "\n")

    found = [differences(groups, *comparison) for comparison in NAMED]
    p = [p_value(one) for one in found]
    rows = [[str(i), f"{SYSTEMS[system]} − {SYSTEMS[base]}", axis, plus_minus(one, sign="+"),
             str(len(one)), f"{raw:.3f}", f"{adjusted:.3f}"]
            for i, ((system, base, axis), one, raw, adjusted)
            in enumerate(zip(NAMED, found, p, holm(p)), 1)]
    print(markdown(["", "comparison", "axis", "difference", "n", "p", "p, Holm"], rows))

    figure, [places] = new_figure(1, len(DRAWN), 2.9, sharey=True, sharex=True)
    for place, (axis, title) in zip(places, DRAWN.items()):
        for y, (system, base) in enumerate(PAIRS):
            one = differences(groups, system, base, axis)
            half = quantile(1 - 0.05 / len(NAMED), len(one) - 1) * statistics.stdev(one)
            named = (system, base, axis) in NAMED
            place.plot(one, [y + 0.2] * len(one), ".", ms=3, color="0.6")
            place.errorbar(statistics.mean(one), y, xerr=half / math.sqrt(len(one)), capsize=3,
                           fmt="o" if named else "s", mfc=None if named else "white",
                           color=color_of(groups[base][0]))
        place.axvline(0, color="black", lw=1)
        place.grid(axis="x", color="0.9")
        place.set(title=title, xlabel="points")
    places[0].set_yticks(range(len(PAIRS)), [f"{SYSTEMS[a]}\n− {SYSTEMS[b]}".replace(", all", ",\nall")
                                             for a, b in PAIRS])
    places[0].set_ylim(len(PAIRS) - 0.5, -0.5)
    figure.suptitle("Difference of accuracy: mean, 99.5 % interval, single seeds below "
                    "(filled: named beforehand)")
    figure.savefig(out)


if __name__ == "__main__":
    main()
