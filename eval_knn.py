"""How good are frozen features? Let the nearest neighbours among labelled images vote.

    score(class c) = sum of exp(cos(x, f_i) / temperature), i = the k nearest references of class c

No training, no learning rate: the first thing to look at (Wu et al. 2018, arXiv 1805.01978, section
3.4; k = 20 and temperature 0.07 are DINO's, arXiv 2104.14294). Relations do not see a common offset
of the features; `--center` takes it away (the mean of the references). Cosines are ruled by the few
directions in which features vary most; `--whiten` makes them more alike, and so tells what features
know from the shape in which they hold it. Among several k the best is chosen on a held-out tenth of
the references.

    python eval_knn.py --checkpoint runs/rkd-textures/checkpoint.pt
    python eval_knn.py --checkpoint c.pt --data folder --data-path /imagenet --pool cls --k 10 20
    torchrun --nproc_per_node=8 eval_knn.py --checkpoint dino.pth --arch vit_small --data folder ..
"""
import hashlib
import json
import os
from types import SimpleNamespace

import torch
import torch.distributed as dist
import torch.nn.functional as F

from data import DATASETS, eval_batches, load_data
from launch import (Parser, Watch, everywhere, first_problem, join_processes, leave_by, number,
                    pick_device, positive, whole)
from model import ARCHS, POOLS, pool_tokens
from weights import open_backbone, write_file


def features_of(vit, images, pool):
    """(B, 3, S, S) -> (B, D), by two more pools than the model knows.

    `last4` joins the CLS of the last four blocks, as DINO's probe does; `pixels`, the control, is
    the image itself, averaged down to at most 32 x 32.
    """
    if pool == "pixels":
        return F.adaptive_avg_pool2d(images, min(32, images.shape[-1])).flatten(1)
    if pool == "last4":
        return torch.cat([tokens[:, 0] for tokens in vit.last_blocks(images, 4)], 1)
    return pool_tokens(vit(images, cls_only=pool == "cls"), pool)


@torch.no_grad()
def extract_features(vit, data, size, pool="mean", device="cpu", indices=None, workers=0,
                     mark=None):
    """Frozen features of a set, or of some indices -> (M, D) float32 and labels (M,), on the CPU.

    Images without a label and unreadable ones are left out. Over processes, each takes a share and
    all get the whole, in order. `mark` is called with each batch: there is progress.
    """
    indices = torch.arange(len(data)) if indices is None else indices
    indices = indices[data.labels[indices] >= 0]
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    share = indices.tensor_split(world)[rank]
    features, labels, was_training = [], [], vit.training
    vit.eval()
    for images, label in eval_batches(data, share, size, torch.device(device), workers):
        features.append(features_of(vit, images, pool).float().cpu())
        labels.append(label)
        if mark:
            mark("evaluating")
    vit.train(was_training)
    both = [torch.cat(x) if x else torch.zeros(0) for x in (features, labels)]
    parts = [part for part in everywhere(both) if len(part[1])]  # a share may be empty
    data.share()
    features, labels = (torch.cat(x) for x in zip(*parts)) if parts else both
    return features, labels.long()


def knn_scores(train_features, train_labels, test_features, num_classes, ks, temperature=0.07):
    """Weighted votes for several k from one search: (R, D), (R,), (M, D) -> {k: (M, C) float32}.

    Rows are normalised here; k is at most R. Memory is bounded: some test rows at a time.
    """
    train, test = (F.normalize(x.float(), dim=1) for x in (train_features, test_features))
    scores = {k: test.new_zeros(len(test), num_classes) for k in ks}
    rows = max(1, 2**26 // len(train))
    for start in range(0, len(test), rows):
        cos = test[start:start + rows] @ train.T
        cos, nearest = cos.topk(min(max(ks), len(train)), dim=1)  # the best first
        votes, labels = (cos / temperature).exp(), train_labels[nearest]
        for k in ks:
            scores[k][start:start + rows].scatter_add_(1, labels[:, :k], votes[:, :k])
    return scores


def knn_predict(train_features, train_labels, test_features, num_classes, k=20, temperature=0.07):
    """Class scores (M, C) of the weighted k-NN vote above; argmax is the prediction."""
    return knn_scores(train_features, train_labels, test_features, num_classes, [k], temperature)[k]


def percent(right):
    """Share of True in percent, to four digits."""
    return round(100 * right.double().mean().item(), 4)


def whitening(features, power=1.0, floor=1e-4):
    """Mean (D,) and matrix (D, D): (x - mean) @ matrix varies as std^(1 - power) in each direction.

    The principal directions of features (M, D) over their standard deviations to the `power`: 0
    only turns, 1 makes all directions alike. `floor` of the largest variance is added to each, so
    that what is mere rounding is not blown up.
    """
    mean = features.mean(0)
    x = (features - mean).double()
    variance, directions = torch.linalg.eigh(x.T @ x / len(x))
    variance = (variance + floor * variance[-1]).clamp_min(1e-12)
    return mean, (directions * variance ** (-power / 2)).to(features)


def knn_top1(train, test, k=20, center=False):
    """Accuracy in percent of (features, labels) `test` by the references `train`."""
    offset = train[0].mean(0) if center else 0
    classes = int(max(train[1].max(), test[1].max())) + 1
    scores = knn_predict(train[0] - offset, train[1], test[0] - offset, classes, k)
    return percent(scores.argmax(1) == test[1])


def held_out(count, part=0.1, seed=0):
    """Split 0 .. count - 1 at random: what to fit by, what to choose by -> two index tensors."""
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    cut = max(1, round(part * count)) if count > 1 else 0
    return order[cut:], order[:cut]


# ---- the command line of both evaluations -----------------------------------------------------

def evaluation_options(doc):
    parser = Parser(doc)
    add = parser.add_argument
    add("--checkpoint", required=True, help="weights: ours, or of DINO, iBOT, MAE, MoCo v3, timm")
    add("--arch", choices=ARCHS, help="only for weights that do not say theirs")
    add("--data", choices=DATASETS, help="default: what the checkpoint was trained on")
    add("--data-path", help="folder of the data; a path in a checkpoint is never followed")
    add("--image-size", type=whole(1, 8192), help="side in pixels; default: the checkpoint's")
    add("--pool", choices=[*POOLS, "last4", "pixels"],
        help="feature; default: the checkpoint's, else cls")
    add("--center", action="store_true", help="subtract the mean feature of the references")
    add("--cache", help="folder to keep the features in, for the next call")
    add("--workers", type=whole(0, 512), default=2,
        help="processes that decode images, for folders")
    add("--device", default="auto", choices="auto cuda mps cpu".split(), help="where to run")
    add("--timeout", type=number(1), default=300.0,
        help="seconds without progress of any process, after which all end")
    return parser


def start(parser):
    """Command line -> options, run, (features, labels) of references and of test images."""
    args, device, problem, run = parser.parse_args(), None, None, None
    try:
        device = pick_device(args.device)
    except ValueError as error:
        problem = str(error)
    try:
        rank, world = join_processes(device, args.timeout, problem)
        run = prepare(args, device)
    except (OSError, ValueError) as error:
        problem = str(error)
    problem = first_problem(problem)
    if problem:
        parser.error(problem)
    run.rank, run.world, run.watch = rank, world, Watch(rank, world, args.timeout)
    try:
        return args, run, *labelled_features(run, args)
    except ValueError as error:  # too many unreadable images
        parser.error(error)


def prepare(args, device):
    """Options -> the network and the two sets; whatever can be wrong is found out here."""
    vit, options = open_backbone(args.checkpoint, args.arch)
    name = args.data or options.get("data")
    if not name:
        raise ValueError(f"{args.checkpoint} does not say its data: "
                         f"add --data {'|'.join(DATASETS)}")
    path, pool = args.data_path, args.pool or options.get("pool", "cls")
    size = args.image_size or options["image_size"]
    if name not in DATASETS or pool not in [*POOLS, "last4", "pixels"]:
        raise ValueError(f"{args.checkpoint} was trained on {str(name)[:40]!r} with pool "
                         f"{str(pool)[:40]!r}, which are not known here: add --data and --pool")
    vit.grid_of(size, size)  # refuses a size that the patches do not divide
    train, test = load_data(name, path, size)
    if test is None:
        raise ValueError(f"--data-path {path} has no classes, or no val/ or test/ to measure by")
    key = None
    if args.cache:
        try:
            os.makedirs(args.cache, exist_ok=True)
        except OSError as error:
            raise ValueError(f"--cache {args.cache} cannot be a folder: {error}") from error
        with open(args.checkpoint, "rb") as file:
            key = hashlib.sha256(repr((name, path, size, pool)).encode() + file.read()).hexdigest()
    return SimpleNamespace(vit=vit.to(device), train=train, test=test, size=size, pool=pool,
                           device=device, key=key)


def labelled_features(run, args):
    """(features, labels) of references and of test images, kept in --cache where it is given."""
    cached, found = args.cache and os.path.join(args.cache, run.key + ".pt"), None
    if cached and os.path.exists(cached):
        try:
            found, unreadable = torch.load(cached, weights_only=True)
        except Exception:  # cut short by what killed its writer
            found = None
    if all(everywhere(bool(found))):  # one that lacks them would wait for the others for ever
        run.train.unreadable = set(unreadable)
        return found
    found = [extract_features(run.vit, data, run.size, run.pool, run.device, workers=args.workers,
                              mark=run.watch.mark)
             for data in (run.train, run.test)]
    if not all(len(labels) for _, labels in found):
        raise ValueError(f"--data-path {args.data_path} has no readable labelled images in one of "
                         "its parts: check train/ and val/")
    if cached and run.rank == 0:
        write_file(cached, lambda file: torch.save((found, sorted(run.train.unreadable)), file))
    return found


def report(rows, result):
    """A table for people, then one line of JSON for programs, from the first process alone."""
    if dist.is_initialized() and dist.get_rank() != 0:
        return
    for row in rows:
        print("".join(f"{x:>12}" if isinstance(x, str) else f"{x:12.2f}" for x in row))
    print(json.dumps(result), flush=True)


def main():
    parser = evaluation_options(__doc__)
    add = parser.add_argument
    add("--k", type=positive, nargs="+", default=[10, 20, 100, 200], help="neighbours")
    add("--temperature", type=number(1e-3), default=0.07, help="of the votes")
    add("--whiten", type=number(0, 1), default=0.0,
        help="centre, and divide each principal direction by its std to this power; 1: all alike")
    args, run, train, test = start(parser)
    fit, choose = held_out(len(train[1]))
    ks = sorted({min(k, len(fit)) for k in args.k})
    if ks != sorted(set(args.k)):
        print(f"k is at most {len(fit)}, the references left beside the held-out tenth: took {ks}")
    if args.whiten:
        mean, matrix = whitening(train[0], args.whiten)
        train, test = (((features - mean) @ matrix, labels) for features, labels in (train, test))
    elif args.center:
        offset = train[0].mean(0)
        train, test = ((features - offset, labels) for features, labels in (train, test))
    classes = int(max(train[1].max(), test[1].max())) + 1

    def accuracies(references, queries):
        """{k: percent right}; each process looks up its share of the queries."""
        references, right = [x.to(run.device) for x in references], {k: [] for k in ks}
        share = [x.tensor_split(run.world)[run.rank] for x in queries]
        for features, labels in zip(*(x.split(4096) for x in share)):
            run.watch.mark("searching")
            scores = knn_scores(*references, features.to(run.device), classes, ks, args.temperature)
            for k, x in scores.items():
                right[k].append(x.argmax(1).cpu() == labels)
        right = {k: torch.cat([*x, torch.zeros(0, dtype=torch.bool)]) for k, x in right.items()}
        return {k: percent(torch.cat([part[k] for part in everywhere(right)])) for k in ks}

    chosen_by = accuracies([x[fit] for x in train], [x[choose] for x in train])
    top1 = accuracies(train, test)
    run.watch.over = True
    best = max(ks, key=chosen_by.get)
    report([("k", "held out", "test")] + [(str(k), chosen_by[k], top1[k]) for k in ks],
           {"knn_top1": top1[best], "k": best, **{f"knn_top1_k{k}": top1[k] for k in ks},
            "references": len(train[1]), "tests": len(test[1]), "center": args.center,
            "whiten": args.whiten})


if __name__ == "__main__":
    leave_by(main)
