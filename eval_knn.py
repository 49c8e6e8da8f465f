"""How good are frozen features? Let the nearest neighbours among labelled images vote.

    score(class c) = sum of exp(cos(x, f_i) / temperature), i = the k nearest references of class c

Wu et al. 2018, arXiv 1805.01978, section 3.4; k = 20 and temperature 0.07 are DINO's, arXiv
2104.14294. A held-out tenth of the references chooses among several k. Relational losses ignore a
common offset of the features: `--center` subtracts it. The few directions of largest variance rule
the cosines: `--whiten` makes the variances more alike.

Three ways to ask whether features generalise: another set (--data, --data-path), few labels
(--shots S: S labelled images of each class, the others unused) and changed test images (--shift).

    python eval_knn.py --checkpoint runs/rkd-textures/checkpoint.pt
    python eval_knn.py --checkpoint c.pt --data-path imagenette --shots 5 --draws 10
    python eval_knn.py --checkpoint c.pt --shift rotate
    python eval_knn.py --checkpoint c.pt --data folder --data-path /imagenet --pool cls --k 10 20
    torchrun --nproc_per_node=8 eval_knn.py --checkpoint dino.pth --arch vit_small --data folder ..
"""
import argparse
import contextlib
import faulthandler
import hashlib
import json
import math
import os
import statistics
import sys
from datetime import timedelta

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.distributed.rendezvous import rendezvous

from data import DATASETS, SHIFTS, eval_batches, fingerprint, load_data
from model import ARCHS, POOLS, pool_tokens
from randomness import generator
from weights import one_line, open_backbone, write_file

if sys.version_info < (3, 11):
    sys.exit(f"nanoRKD needs Python 3.11 or later, and this is {sys.version.split()[0]}")


# ---- how every script starts: options and processes ----------------------------------------------

class Help(argparse.RawDescriptionHelpFormatter):
    """The header as it is, then a line or two per option: X stands for its value."""

    def __init__(self, prog):
        super().__init__(prog, max_help_position=30, width=100)

    def _get_help_string(self, action):
        said = "default" in action.help or not action.option_strings
        none = action.default in (None, argparse.SUPPRESS) or action.default is False
        return action.help if said or none else f"{action.help} (%(default)s)"

    def _get_default_metavar_for_optional(self, action):
        return "X"


class Parser(argparse.ArgumentParser):
    """argparse that shows the header and each default; a mistake is one line and status 2."""

    def __init__(self, doc):
        super().__init__(description=doc, formatter_class=Help, usage="%(prog)s [options]")
        for stream in (sys.stdout, sys.stderr):  # a terminal may lack letters of a path
            if hasattr(stream, "reconfigure"):
                stream.reconfigure(errors="backslashreplace")

    def error(self, message):
        self.exit(2, f"{self.prog}: error: {one_line(message)}\n")

    @contextlib.contextmanager
    def one_line_errors(self):
        """A ValueError within is a mistake of the user."""
        try:
            yield
        except ValueError as error:
            self.error(error)


def number(low, high=math.inf, kind=float):
    """An argparse type: a finite number in [low, high]."""
    def number(text):
        value = kind(text)
        if not low <= value <= high or value == math.inf:
            raise argparse.ArgumentTypeError(f"{text} must lie in {low} .. {high}")
        return value
    return number


def whole(low, high=2**32 - 1):
    """An argparse type: a whole number in [low, high]."""
    return number(low, high, int)


def start_processes(name, timeout):
    """Join the processes of torchrun or Slurm, if any -> rank, world size, device."""
    there = dict(cuda=torch.cuda.is_available(), mps=torch.backends.mps.is_available(), cpu=True)
    if name == "auto":
        name = next(device for device in there if there[device])
    if not there[name]:
        raise ValueError(f"--device {name}: there is none here; leave it out to take what is there")
    device = torch.device(name, int(os.environ.get("LOCAL_RANK") or 0) if name == "cuda" else None)
    tasks = os.environ.get("SLURM_STEP_NUM_TASKS") or os.environ.get("SLURM_NTASKS") or "1"
    if not os.environ.get("RANK") and tasks != "1":
        raise ValueError(f"{tasks} tasks of Slurm and no RANK: each would run alone. Set RANK="
                         "$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$SLURM_NTASKS "
                         "MASTER_ADDR MASTER_PORT (see README), or start one task with torchrun")
    if os.environ.get("RANK"):
        if name == "cuda":
            torch.cuda.set_device(device)
        watch(2 * timeout)  # a peer may never come
        limit = timedelta(seconds=2 * timeout)
        store, rank, world = next(rendezvous("env://", timeout=limit))
        # torchrun's store outlives a restart, with the addresses of those who died in it
        store = dist.PrefixStore(f"start{store.add(f'starts/{rank}', 1)}", store)
        dist.init_process_group("nccl" if name == "cuda" else "gloo", store=store, rank=rank,
                                world_size=world, timeout=limit)
        watch(None)
    return *ranks(), device


def watch(seconds):
    """End the process with a traceback of all threads unless called again in time; None: stop."""
    faulthandler.cancel_dump_traceback_later()
    if seconds:
        faulthandler.dump_traceback_later(seconds, exit=True, file=sys.__stderr__)


def ranks():
    """(rank of this process, how many there are)."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def all_gather(x):
    """A plain object of every process, in order of rank, on all of them."""
    found = [x] * ranks()[1]
    if len(found) > 1:
        dist.all_gather_object(found, x)
    return found


# ---- features and votes --------------------------------------------------------------------------

FEATURES = [*POOLS, "last4", "pixels"]


def features_of(vit, images, pool):
    """(B, 3, S, S) -> (B, D)."""
    if pool == "pixels":  # a control: the image itself
        return F.adaptive_avg_pool2d(images, min(32, images.shape[-1])).flatten(1)
    if pool == "last4":  # the CLS tokens of the last four blocks, as in DINO's probe
        return torch.cat([tokens[:, 0] for tokens in vit.last_blocks(images, 4)], 1)
    return pool_tokens(vit(images, cls_only=pool == "cls"), pool)


@torch.no_grad()
def extract_features(vit, data, size, pool="mean", device="cpu", indices=None, workers=0,
                     alive=lambda: None, shift=None):
    """Frozen features of a set, or of some indices -> (M, D) float32 and labels (M,), on the CPU.

    Images without a label and unreadable ones are left out. Each process encodes a share, and all
    get the whole, in order. `alive()` is called with each batch. `shift`: see `data.shifted`.
    """
    indices = torch.arange(len(data)) if indices is None else indices
    rank, world = ranks()
    share = indices[data.labels[indices] >= 0].tensor_split(world)[rank]
    features, labels = [torch.zeros(0)], [torch.zeros(0).long()]  # a share may be empty
    was_training = vit.training
    vit.eval()
    for images, label in eval_batches(data, share, size, torch.device(device), workers,
                                      shift=shift):
        features.append(features_of(vit, images, pool).float().cpu())
        labels.append(label)
        alive()
    vit.train(was_training)
    shares = all_gather((torch.cat(features), torch.cat(labels)))
    return tuple(torch.cat(x) for x in zip(*shares))


def knn_scores(train_features, train_labels, test_features, num_classes, ks, temperature=0.07):
    """Weighted votes for several k from one search: (R, D), (R,), (M, D) -> {k: (M, C) float32}."""
    train, test = train_features.float(), F.normalize(test_features.float(), dim=1)
    lengths = train.norm(dim=1).clamp_min(1e-12)
    scores = {k: test.new_zeros(len(test), num_classes) for k in ks}
    rows = max(1, 2**23 // len(train))  # bounds the memory; a larger block leaves the cache
    for start in range(0, len(test), rows):
        with torch.autocast(test.device.type, enabled=False):
            cos = (test[start:start + rows] @ train.T).div_(lengths)  # no normalised copy of R x D
        cos, nearest = cos.topk(min(max(ks), len(train)), dim=1)  # the best first
        if temperature < 0.02:  # exp would overflow; a factor per row changes no comparison
            cos = cos - cos[:, :1]
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
    """Mean (D,) and matrix (D, D): (x - mean) @ matrix has std^(1 - power) per principal direction.

    `floor` times the largest variance is added to each, so that rounding errors are not blown up.
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


def held_out(count):
    """Random split of 0 .. count - 1: indices to fit by, and a tenth to choose by."""
    order = torch.randperm(count, generator=torch.Generator().manual_seed(0))
    cut = max(1, round(0.1 * count)) if count > 1 else 0
    return order[cut:], order[:cut]


# ---- few labels ----------------------------------------------------------------------------------

def draw_labelled(labels, shots, *seed):
    """`shots` random indices of each class -> (shots, C); each row has one image of each class."""
    counts = check_shots(labels, shots)
    order = torch.randperm(len(labels), generator=generator(*seed))
    order = order[labels[order].argsort(stable=True)]  # class after class
    return order[counts.cumsum(0) - counts + torch.arange(shots).unsqueeze(1)]


def check_shots(labels, shots):
    """Number of images per class, (C,); ValueError where a class has fewer than `shots`."""
    counts = labels.unique(return_counts=True)[1]
    least = min(counts.tolist(), default=0)
    if shots > least:
        raise ValueError(f"--shots {shots}: the smallest class of the training set has {least} "
                         "images: take at most that")
    return counts


def few_label_top1(train, tests, labelled, settings, scores):
    """Accuracy in percent on each of `tests`, by the labelled images alone -> list, setting chosen.

    `train` and each test are (features, labels); `labelled` is one draw (shots, C).
    `scores(features, labels, queries, settings)` -> {setting: class scores (M, C)}.
    Cross-validation within the labelled images chooses the setting: each fold leaves out equally
    many images of each class. One image per class leaves none to choose by: the first setting is
    taken.
    """
    x, y = train
    right, folds = dict.fromkeys(settings, 0), min(len(labelled), 10)
    for fold in range(folds if folds > 1 else 0):
        left_out = torch.arange(len(labelled)) % folds == fold
        fit, asked = labelled[~left_out].flatten(), labelled[left_out].flatten()
        for setting, found in scores(x[fit], y[fit], x[asked], settings).items():
            right[setting] += (found.argmax(1) == y[asked]).sum().item()
    best, fit = max(settings, key=right.get), labelled.flatten()
    return [percent(scores(x[fit], y[fit], queries, [best])[best].argmax(1) == answers)
            for queries, answers in tests], best


def report_few_labels(args, name, train, tests, settings, scores):
    """Print `few_label_top1` of each draw, and the mean and standard deviation over the draws."""
    found = []
    for draw in range(args.draws):
        args.alive()
        labelled = draw_labelled(train[1], args.shots, args.seed, draw)
        found.append(few_label_top1(train, tests.values(), labelled, settings, scores))
    top1 = [each for each, _ in found]
    overall = [over_strengths(each) for each in top1]
    report(args, [("draw", "chosen", *tests)]
           + [(str(draw), f"{best:g}", *each) for draw, (each, best) in enumerate(found)],
           {name: round(statistics.mean(overall), 4),
            f"{name}_std": round(statistics.stdev(overall), 4) if len(overall) > 1 else 0.0,
            "shots": args.shots, "draws": args.draws, "references": labelled.numel(),
            **per_strength(name, tests, [statistics.mean(each) for each in zip(*top1)])})


# ---- the command line of both evaluations --------------------------------------------------------

def evaluation_options(doc):
    parser = Parser(doc)
    add = parser.add_argument_group("network and images").add_argument
    add("--checkpoint", required=True, help="weights: ours, or of DINO, iBOT, MAE, MoCo v3, timm")
    add("--arch", choices=ARCHS, help="only for weights that do not say theirs")
    add("--data", choices=DATASETS,
        help="any set; default: folder with --data-path, else the set of the checkpoint")
    add("--data-path", help="folder of the data; a path in a checkpoint is never followed")
    add("--image-size", type=whole(1, 8192),
        help="side in pixels to which images are resized; default: the checkpoint's")
    add("--pool", choices=FEATURES, help="feature; default: the checkpoint's, else cls")
    add("--center", action="store_true", help="subtract the mean feature of the references")
    add = parser.add_argument_group("few labels and shifted images").add_argument
    add("--shots", type=whole(1), help="labelled images per class; the others are unused")
    add("--draws", type=whole(1), default=5, help="sets of labelled images for --shots")
    add("--seed", type=whole(0), default=0, help="of draws, orders and crops")
    add("--shift", choices=SHIFTS, help="change the test images; the mean of five strengths counts")
    add = parser.add_argument_group("running").add_argument
    add("--cache", help="folder to keep the features in, for the next call")
    add("--workers", type=whole(0, 512), default=2, help="decoding processes (folders)")
    add("--device", default="auto", choices="auto cuda mps cpu".split(), help="where to run")
    add("--timeout", type=number(1), default=300.0, help="end a job without progress: seconds")
    return parser


def start(parser):
    """Command line -> options, network, training set, references, {name: test images}.

    References and test images are pairs (features, labels). The first test images are as they are;
    with --shift one set per strength follows. Set, size and pool default to the checkpoint's. The
    options gain rank, world, device, `alive()` and the number of classes.
    """
    args = parser.parse_args()
    with parser.one_line_errors():
        without_effect = "whiten epochs lrs batch_size augment" if args.shots else "draws"
        for name in without_effect.split():
            if name in args and getattr(args, name) != parser.get_default(name):
                raise ValueError(f"--{name.replace('_', '-')} has no effect "
                                 f"{'with' if args.shots else 'without'} --shots: leave it out")
        args.rank, args.world, args.device = start_processes(args.device, args.timeout)
        args.alive = lambda: watch(args.timeout)
        if os.path.isdir(args.checkpoint):  # of a run
            args.checkpoint = os.path.join(args.checkpoint, "checkpoint.pt")
        vit, options = open_backbone(args.checkpoint, args.arch)
        args.data = args.data or ("folder" if args.data_path else options.get("data"))
        args.pool = args.pool or options.get("pool", "cls")
        args.image_size = args.image_size or options["image_size"]
        if args.data not in DATASETS or args.pool not in FEATURES:
            raise ValueError(f"{args.checkpoint} says --data {str(args.data)[:40]!r} and --pool "
                             f"{str(args.pool)[:40]!r}: add --data, one of {', '.join(DATASETS)}, "
                             f"and --pool, one of {', '.join(FEATURES)}")
        vit.grid_of(args.image_size, args.image_size)  # refuses a size that patches do not divide
        if args.pool == "last4" and len(vit.blocks) < 4:
            raise ValueError(f"--pool last4 joins the last four blocks, and {args.checkpoint} has "
                             f"{len(vit.blocks)}: take cls or mean")
        sets = load_data(args.data, args.data_path, args.image_size)
        if sets[1] is None:
            raise ValueError(f"--data-path {args.data_path} needs classes and a val/ or test/")
        if args.shots:  # too many is an error before features are computed
            check_shots(sets[0].labels[sets[0].labels >= 0], args.shots)
        vit.to(args.device)
        train = cached_features(args, vit, sets[0])
        tests = {"test": cached_features(args, vit, sets[1])}
        for strength in SHIFTS.get(args.shift, ()):
            tests[f"{args.shift} {strength:g}"] = cached_features(args, vit, sets[1],
                                                                  (args.shift, strength))
        args.classes = int(max(labels.max() for _, labels in [train, *tests.values()])) + 1
        return args, vit, sets[0], train, tests


def cached_features(args, vit, data, shift=None):
    """(features, labels) of a set, kept in --cache where it is given."""
    path, found = None, None
    if args.cache:
        try:
            os.makedirs(args.cache, exist_ok=True)
        except OSError as error:
            raise ValueError(f"--cache {args.cache} cannot be a folder: {error}") from error
        key = repr((args.arch, args.data, args.image_size, args.pool, shift,
                    fingerprint(data))).encode()
        with open(args.checkpoint, "rb") as file:
            path = os.path.join(args.cache, hashlib.sha256(key + file.read()).hexdigest() + ".pt")
        with contextlib.suppress(Exception):  # not there, or cut short when its writer was killed
            *found, unreadable = torch.load(path, weights_only=True)
            data.unreadable = dict.fromkeys(unreadable, "when the cache was written")
    if all(all_gather(bool(found))):  # a process without it would wait for the others for ever
        return found
    found = extract_features(vit, data, args.image_size, args.pool, args.device,
                             workers=args.workers, alive=args.alive, shift=shift)
    if not len(found[1]):
        raise ValueError(f"--data-path {args.data_path} has no readable labelled images in one of "
                         "its parts: check train/ and val/")
    if path and args.rank == 0:
        write_file(path, lambda file: torch.save((*found, sorted(data.unreadable)), file))
    return found


def over_strengths(top1):
    """One number of the accuracies on the test images and on each strength of a shift: its mean."""
    return round(statistics.mean(top1[1:] or top1), 4)


def per_strength(name, tests, top1):
    """Entries of the result for a shift, one per strength; none without a shift."""
    if len(tests) == 1:
        return {}
    return {f"{name} {test}": round(x, 4) for test, x in zip(tests, top1)}


def report(args, rows, result):
    """A table for people, then one line of JSON for programs, from rank 0."""
    watch(None)
    result |= dict(data=os.path.basename(args.data_path or "") or args.data, shift=args.shift)
    if ranks()[0] == 0:
        for row in rows:
            print("".join(f"{x:>15}" if isinstance(x, str) else f"{x:15.2f}" for x in row))
        print(json.dumps(result), flush=True)
    if dist.is_initialized():
        dist.destroy_process_group()


def main():
    parser = evaluation_options(__doc__)
    add = parser.add_argument_group("k-NN").add_argument
    add("--k", type=whole(1), nargs="+", default=[10, 20, 100, 200],
        help="neighbours, at most the references that are not held out")
    add("--temperature", type=number(1e-3), default=0.07, help="of the votes")
    add("--whiten", type=number(0, 1), default=0.0,
        help="centre, and divide each principal direction by its std to this power; 1: all alike")
    args, _, _, train, tests = start(parser)
    if args.shots:
        def scores(x, y, queries, ks):
            mean = x.mean(0) if args.center else 0
            return knn_scores(x - mean, y, queries - mean, args.classes, ks, args.temperature)

        ks = sorted({1, *args.k})
        report_few_labels(args, "knn_top1", train, tests, ks, scores)
        return
    fit, choose = held_out(len(train[1]))
    ks = sorted({min(k, len(fit)) for k in args.k})
    if args.whiten or args.center:
        # to whiten costs a decomposition, of 3,072 dimensions for pixels
        mean, matrix = (whitening(train[0], args.whiten) if args.whiten
                        else (train[0].mean(0), None))

        def changed(x, labels):
            return (x - mean if matrix is None else (x - mean) @ matrix), labels

        train, tests = changed(*train), {name: changed(*test) for name, test in tests.items()}

    def accuracies(references, queries):
        """{k: percent right}; each process looks up its share of the queries."""
        references, right = [x.to(args.device) for x in references], []
        share = [x.tensor_split(args.world)[args.rank].split(4096) for x in queries]
        for features, labels in zip(*share):
            args.alive()
            features = features.to(args.device)
            scores = knn_scores(*references, features, args.classes, ks, args.temperature)
            right.append(torch.stack([scores[k].argmax(1).cpu() == labels for k in ks]))
        right = torch.cat(all_gather(torch.cat(right, 1)), 1)  # (number of ks, queries)
        return dict(zip(ks, map(percent, right)))

    chosen_by = accuracies([x[fit] for x in train], [x[choose] for x in train])
    each = [accuracies(train, test) for test in tests.values()]
    top1 = {k: [found[k] for found in each] for k in ks}  # one per set of test images
    best = max(ks, key=chosen_by.get)
    report(args, [("k", "held out", *tests)] + [(str(k), chosen_by[k], *top1[k]) for k in ks],
           {"knn_top1": over_strengths(top1[best]), "k": best,
            **{f"knn_top1_k{k}": over_strengths(top1[k]) for k in ks},
            **per_strength("knn_top1", tests, top1[best]),
            "references": len(train[1]), "tests": len(tests["test"][1]), "center": args.center,
            "whiten": args.whiten})


if __name__ == "__main__":
    main()
