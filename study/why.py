"""Why do relations help with few labels? Exchange the spectra of two networks' features.

    python study/why.py RUNS DATA              # RUNS holds cifar10-NAME-sSEED, DATA is CIFAR-10

Features (M, D) are centred and turned into their principal directions; direction i is stretched so
that its variance is that of the other network's direction i, and all is turned back:

    x -> x V diag(sqrt(variance' / variance)) V^T

What a linear map can read is unchanged, the shape is the other network's. If relations help by the
shape alone, then a base system with the spectrum of its sum is as good as the sum, and the sum with
the spectrum of its base as bad as the base. No label is used. Five labels per class, the draws of
eval_linear.py; the classifiers are its ridge regression and the nearest mean of a class.

A second table has the differences of a pair by both classifiers, paired by seed.

The last column of the first is about neighbourhoods: of the ten nearest test images to a test image
(cosines of centred features), the share that student and teacher have in common.
"""
import statistics
import sys
from functools import cache, partial
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from analyze import markdown, name_of, open_run, plus_minus, read_run
from data import load_data
from eval_knn import Parser, draw_labelled, extract_features, few_label_top1, percent
from eval_linear import STRENGTHS, ridge_scores
from generalise import difference, pair_name
from losses import cosines

PAIRS = [("dino", "dino+5rkd"), ("moco", "moco+rkd"), ("rkd-m0-equal", "rkd-m0"),
         ("dino+5equal", "dino+5rkd"), ("moco+equal", "moco+rkd")]


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


def shared_neighbours(a, b, k=10):
    """Percent of the k nearest rows to a row of `a` (N, D) that are also its nearest in `b`."""
    shared = 0
    for rows in torch.arange(len(a)).split(1000):
        near = []
        for x in (a, b):
            cos = cosines(x[rows], x)
            cos[torch.arange(len(rows)), rows] = -2.0  # not itself
            near.append(cos.topk(k, 1).indices)
        shared += (near[0].unsqueeze(2) == near[1].unsqueeze(1)).sum().item()
    return 100 * shared / (k * len(a))


def main():
    parser = Parser(__doc__)
    parser.add_argument("runs", type=Path, help="folder of the runs")
    parser.add_argument("data", help="folder of CIFAR-10")
    args = parser.parse_args()
    runs, sets = args.runs, load_data("folder", args.data)

    @cache
    def features(name, seed):
        """Centred (features, labels) of both sets by the teacher, and its shared neighbours."""
        options, system, _ = open_run(runs / f"cifar10-{name}-s{seed}", sets=sets)
        teacher = [extract_features(system.teacher.backbone, x, 32, options.pool) for x in sets]
        mean = teacher[0][0].mean(0)
        found = [(x - mean, labels) for x, labels in teacher]
        student = extract_features(system.student.backbone, sets[1], 32, options.pool)[0]
        return found, shared_neighbours(student - student.mean(0), found[1][0])

    rows, differences = [], []
    for pair in PAIRS:
        seeds = [s for s in range(8) if all((runs / f"cifar10-{name}-s{s}/evals.jsonl").exists()
                                            for name in pair)]
        results = {}
        for seed in seeds:
            own, shared = {}, {}
            for name in pair:
                own[name], shared[name] = features(name, seed)
            variance = {name: spectrum(x[0][0])[0] for name, x in own.items()}
            for name in pair:
                dimension = (variance[name].sum()**2 / variance[name].square().sum()).item()
                for shape in pair:
                    seen = own[name] if shape == name else with_spectrum(own[name], variance[shape])
                    results.setdefault((name, shape), []).append((
                        *few_label_accuracies(*seen), separation(*seen[0]), dimension,
                        shared[name]))
        said = {name: name_of(read_run(runs / f"cifar10-{name}-s{seeds[0]}")) for name in pair}
        base, system = (results[name, name] for name in pair)
        differences.append([pair_name(said[pair[1]], said[pair[0]]),
                            *(difference([own[i] - other[i] for own, other in zip(system, base)])
                              for i in (0, 1)), str(len(seeds))])
        for (name, shape), found in results.items():
            ridge, nearest, apart, dimension, shared = zip(*found)
            rows.append([said[name], "its own" if shape == name else f"of {said[shape]}",
                         plus_minus(ridge), plus_minus(nearest), plus_minus(apart, 2),
                         *((plus_minus(dimension, 0), plus_minus(shared)) if shape == name
                           else ("", "")), str(len(found))])
    print(markdown(["features", "spectrum", "ridge, 5 per class", "nearest class mean, 5 per class",
                    "between / within", "dimensions", "shared neighbours, %", "n"], rows), "\n")
    print(markdown(["difference", "ridge", "nearest class mean", "n"], differences))


if __name__ == "__main__":
    main()
