"""Does relational distillation generalise? The ten comparisons that were named before looking.

    python study/generalise.py          # tables from study/runs.jsonl, assets/generalisation.png

A value of a run is its accuracy on one axis; a difference is paired by seed. Student's t gives the
p-value of the mean difference, Holm's method (1979) corrects the ten, Bonferroni's the intervals.
"""
import math
import statistics
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from analyze import (color_of, grouped, interval, markdown, new_figure, paired, plus_minus,
                     read_runs)
from eval_knn import Parser

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
PAIRS = [("DINO + RKD (weight 5)", "DINO"), ("MoCo v3 + RKD, no pull", "MoCo v3"),
         ("RKD, unmasked", "RKD, unmasked, all distances equal"), ("RKD, unmasked", "SimCLR")]
NAMED = [(*pair, axis) for axis in [*DRAWN][1:] for pair in PAIRS[:3]]
NAMED += [(*PAIRS[3], "5 per class")]


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
    runs = read_runs([ROOT / "study" / "runs.jsonl"], ["few-cifar10-*"])
    for run in runs:
        run.measured |= {axis: statistics.mean(run.measured[name] for name in names)
                         for axis, names in AXES.items()}
    groups = grouped(runs)
    rows = [[name, *(plus_minus([run.measured[axis] for run in groups[name]]) for axis in AXES),
             str(len(groups[name]))] for name in sorted(groups)]
    print(markdown(["trained on CIFAR-10", *AXES, "n"], rows), "\n")

    found = [paired(groups[system], groups[base], axis) for system, base, axis in NAMED]
    p = [p_value(one) for one in found]
    rows = [[str(i), f"{system} − {base}", axis, plus_minus(one, sign="+"),
             str(len(one)), f"{raw:.3f}", f"{adjusted:.3f}"]
            for i, ((system, base, axis), one, raw, adjusted)
            in enumerate(zip(NAMED, found, p, holm(p)), 1)]
    print(markdown(["", "comparison", "axis", "difference", "n", "p", "p, Holm"], rows))

    figure, [places] = new_figure(1, len(DRAWN), 2.9, sharey=True, sharex=True)
    for place, (axis, title) in zip(places, DRAWN.items()):
        for y, (system, base) in enumerate(PAIRS):
            one = paired(groups[system], groups[base], axis)
            mean, half = interval(one, [quantile(1 - 0.05 / len(NAMED), len(one) - 1)])
            named = (system, base, axis) in NAMED
            place.plot(one, [y + 0.2] * len(one), ".", ms=3, color="0.6")
            place.errorbar(mean, y, xerr=half, capsize=3, fmt="o" if named else "s",
                           mfc=None if named else "white", color=color_of(groups[base][0]))
        place.axvline(0, color="black", lw=1)
        place.grid(axis="x", color="0.9")
        place.set(title=title, xlabel="points")
    places[0].set_yticks(range(len(PAIRS)), [f"{a}\n− {b}".replace(", all", ",\nall")
                                             for a, b in PAIRS])
    places[0].set_ylim(len(PAIRS) - 0.5, -0.5)
    figure.suptitle("Difference of accuracy: mean, 99.5 % interval, single seeds below "
                    "(filled: named beforehand)")
    figure.savefig(out)


if __name__ == "__main__":
    main()
