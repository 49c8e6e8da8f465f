"""Why do relations help with few labels? Exchange the spectra of two networks' features.

    python study/why.py RUNS DATA              # RUNS holds few-cifar10-NAME-sSEED, DATA is CIFAR-10

Features (M, D) are centred and turned into their principal directions; direction i is stretched so
that its variance is that of the other network's direction i, and all is turned back:

    x -> x V diag(sqrt(variance' / variance)) V^T

What a linear map can read is unchanged, the shape is the other network's. If relations help by the
shape alone, then a base system with the spectrum of its sum is as good as the sum, and the sum with
the spectrum of its base as bad as the base. No label is used. Five labels per class, the draws of
eval_linear.py; the classifiers are its ridge regression and the nearest mean of a class.
"""
import statistics
import sys
from functools import partial
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from analyze import markdown, name_of, plus_minus, read_run
from data import load_data
from eval_knn import Parser, draw_labelled, extract_features, few_label_top1, percent
from eval_linear import STRENGTHS, ridge_scores
from weights import open_backbone

PAIRS = [("dino", "dino+5rkd"), ("moco", "moco+rkd"), ("rkd-m0-equal", "rkd-m0")]


def spectrum(x):
    """Variances, the largest first, and principal directions (D, D) of centred features."""
    variance, directions = torch.linalg.eigh(x.double().T @ x.double() / len(x))
    return variance.flip(0).clamp_min(1e-12), directions.flip(1)


def with_spectrum(sets, variance):
    """Features of both sets, stretched to these variances of the training set."""
    own, directions = spectrum(sets[0][0])
    matrix = directions * (variance / own).sqrt() @ directions.T
    return [(x @ matrix.to(x), labels) for x, labels in sets]


def few_label_accuracies(train, test, shots=5, draws=5):
    """(ridge, nearest class mean), percent, means over the draws."""
    ridge, nearest = [], []
    for draw in range(draws):
        labelled = draw_labelled(train[1], shots, 0, draw)
        scores = partial(ridge_scores, classes=labelled.shape[1])
        ridge += few_label_top1(train, [test], labelled, STRENGTHS, scores)[0]
        means = train[0][labelled].mean(0)
        found = torch.cdist(test[0], means).argmin(1)
        nearest.append(percent(train[1][labelled[0]][found] == test[1]))
    return statistics.mean(ridge), statistics.mean(nearest)


def separation(x, labels):
    """Squared distance of class means to the centre over that of images to their class mean."""
    means = torch.stack([x[labels == c].mean(0) for c in labels.unique()])
    return (means.square().sum(1).mean() / (x - means[labels]).square().sum(1).mean()).item()


def main():
    parser = Parser(__doc__)
    parser.add_argument("runs", type=Path, help="folder of the runs")
    parser.add_argument("data", help="folder of CIFAR-10")
    args = parser.parse_args()
    runs, sets = args.runs, load_data("folder", args.data)

    def features(name, seed):
        vit, options = open_backbone(runs / f"few-cifar10-{name}-s{seed}")
        found = [extract_features(vit, data, 32, options["pool"]) for data in sets]
        return [(x - found[0][0].mean(0), labels) for x, labels in found]

    rows = []
    for pair in PAIRS:
        seeds = [s for s in range(5) if all((runs / f"few-cifar10-{name}-s{s}/evals.jsonl").exists()
                                            for name in pair)]
        results = {}
        for seed in seeds:
            own = {name: features(name, seed) for name in pair}
            variance = {name: spectrum(x[0][0])[0] for name, x in own.items()}
            for name in pair:
                dimension = (variance[name].sum()**2 / variance[name].square().sum()).item()
                for shape in pair:
                    seen = own[name] if shape == name else with_spectrum(own[name], variance[shape])
                    results.setdefault((name, shape), []).append(
                        (*few_label_accuracies(*seen), separation(*seen[0]), dimension))
        for (name, shape), found in results.items():
            ridge, nearest, apart, dimension = zip(*found)
            said, other = (name_of(read_run(runs / f"few-cifar10-{x}-s{seeds[0]}"))
                           for x in (name, shape))
            rows.append([said, "its own" if shape == name else f"of {other}",
                         plus_minus(ridge), plus_minus(nearest), plus_minus(apart, 2),
                         plus_minus(dimension, 0) if shape == name else "", str(len(found))])
    print(markdown(["features", "spectrum", "ridge, 5 per class", "nearest class mean, 5 per class",
                    "between / within", "dimensions", "n"], rows))


if __name__ == "__main__":
    main()
