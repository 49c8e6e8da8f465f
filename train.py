"""Masked relational knowledge distillation of Vision Transformers, on a laptop or on several nodes.

A student sees an augmented view with most patches hidden, a teacher (its moving average) another
view, whole; the student learns the teacher's *relations* among the images of the batch. The losses
are in losses.py, who sees what in objectives.py, the run here: options, schedules, data, loop, log.

    python train.py                                  # built-in images, three minutes, any machine
    torchrun --nproc_per_node=8 train.py --loss rkd --data folder --data-path /imagenet \\
        --arch vit_small --image-size 224 --patch-size 16 --batch-size 1024 --epochs 100 --hue 0.1
    torchrun --nnodes=4 --nproc_per_node=8 --rdzv_backend=c10d --rdzv_endpoint=IP:29500 train.py ..

Everything is in --out-dir: checkpoint.pt, args.json, log.jsonl, curves.png, masks.png. A killed run
goes on where it was with the same command; one process or many give the same run.
"""
import argparse
import contextlib
import inspect
import json
import math
import os
import signal
import sys
import time
import types

import torch
import torch.distributed as dist
from torch import nn
from tqdm import tqdm

import analyze
from checkpoint import Log, open_folder, resume, rounded, save_run, warn
from data import DATASETS, UnreadableImages, load_data, train_batches
from eval_knn import extract_features, knn_top1
from launch import (Parser, Watch, first_problem, join_processes, largest, leave_by, natural,
                    number, pick_device, positive, whole)
from losses import effective_rank, panel
from masking import MASKS, attention_mask
from model import ARCHS, POOLS, ema_update
from objectives import (OBJECTIVES, RECIPES, TOKENIZERS, System, check, defaults, least_images,
                        parse_loss)
from randomness import fold
from weights import write_file


def options():
    parser = Parser(__doc__)
    fraction = number(0, 1)

    add = parser.add_argument_group("what to learn by, from what").add_argument
    add("--recipe", choices=RECIPES, help="published hyper-parameters; what you add still wins")
    add("--loss", default="rkd", metavar="SUM",
        help=f"a term or a weighted sum, as dino+0.5*rkd, of {', '.join(OBJECTIVES)}")
    add("--data", default="textures", choices=DATASETS,
        help="textures is built in, folder any of yours")
    add("--data-path",
        help="folder: train/CLASS/image and val/CLASS/image; else where the set is or goes")
    add("--workers", type=whole(0, 512), default=4,
        help="decoding processes for each process, for folders")

    add = parser.add_argument_group("student").add_argument
    add("--arch", default="vit_micro", choices=ARCHS, help="size of the ViT")
    add("--image-size", type=whole(1, 8192), default=32, help="side of a global view in pixels")
    add("--patch-size", type=whole(1, 8192), default=8,
        help="side in pixels; smaller learns more, costs more")
    add("--pool", default="mean", choices=POOLS, help="feature of an image: of its patches, or CLS")
    add("--projection", type=whole(0, 2**16), default=0,
        help="width of what simclr, moco, byol, dino, ibot compare; 0: as published")
    add("--head", type=whole(0, 2**16), default=0,
        help="rkd: width of a projection head; 0 relates the features")
    add("--head-hidden", type=whole(0, 2**16), default=0,
        help="width inside heads; 0: 4 times the ViT's")
    add("--head-batchnorm", action=argparse.BooleanOptionalAction, default=False,
        help="in rkd's, as simclr has it; in dino's and ibot's, when they collapse")
    add("--predictor", action="store_true", help="rkd: a second MLP on the student alone")
    add("--prototypes", type=whole(1, 2**20), default=1024, help="of dino and ibot; words of beit")
    add("--decoder", type=whole(1, 2**14), nargs=2, default=[128, 2],
        help="width and depth, of mae, dbot")
    add("--tokenizer", default="random", choices=TOKENIZERS, help="where beit's words come from")
    add("--drop-path", type=number(0, 0.99), default=0.0, help="stochastic depth; .1 for vit_base")
    add("--fixed-pos", action="store_true", help="sine-cosine positions that are not learned")
    add("--freeze-patch-embed", action="store_true", help="leave it random (steadies moco)")

    add = parser.add_argument_group("teacher").add_argument
    add("--teacher", default="ema", choices=["ema", "frozen"],
        help="the student's moving average; or random, then the student of the stage before")
    add("--teacher-checkpoint", metavar="FILE", help="a given, frozen network of any width")
    add("--teacher-arch", choices=ARCHS, help="only for weights that do not say theirs")
    add("--stages", type=positive, default=1, help="of a frozen teacher; each runs all schedules")
    add("--momentum", type=fraction, default=0.95, help="of ema, rising to 1; .99 for long runs")

    add = parser.add_argument_group("views and masks").add_argument
    add("--mask", default="random", choices=[*MASKS, "attention"], help="which patches to hide")
    add("--mask-ratio", type=fraction, default=0.75, help="share of hidden patches; 0 hides none")
    add("--mask-spread", type=fraction, default=0.0, help="ratio ± this, drawn for each view")
    add("--mask-probability", type=fraction, default=1.0, help="share of the views with a mask")
    add("--mask-unit", type=positive, default=1, help="random hides squares of so many patches")
    add("--hide", default="drop", choices=["drop", "token"],
        help="leave them out (faster), or a token")
    add("--global-crops", type=int, choices=[1, 2], default=2,
        help="views of an image; published masked prediction has 1")
    add("--crop-scale", type=fraction, nargs=2, default=[0.4, 1.0], help="area of a global view")
    add("--local-crops", type=whole(0, 64), default=0,
        help="more, small student views (DINO's multi-crop)")
    add("--jitter", type=fraction, default=0.4, help="of brightness, contrast and saturation")
    add("--hue", type=number(0, 0.5), default=0.5,
        help="shift in turns; .1 where colour tells classes")
    add("--grey", type=fraction, default=0.2, help="share of grey views")
    add("--blur", type=fraction, nargs=2, default=[0.5, 0.5], help="share of either global view")
    add("--solarize", type=fraction, nargs=2, default=[0.0, 0.0], help="share of either")
    add("--weak-teacher", action="store_true", help="the teacher's views keep their colours")

    add = parser.add_argument_group("losses").add_argument
    add("--distance-weight", type=number(0), default=1.0, help="rkd: of distances")
    add("--distance-power", type=number(0), default=1.0,
        help="rkd: the teacher's distances to this power; 0: all equal (a control)")
    add("--angle-weight", type=number(0), default=2.0, help="rkd: of angles; Park et al.: 2 : 1")
    add("--pull-weight", type=number(0), default=0.05,
        help="rkd: between two views; 0: pure relations (default with --teacher-checkpoint)")
    add("--patch-weight", type=number(0), default=0.0, help="rkd: among an image's patches")
    add("--temperature", type=number(1e-3),
        help="the student's; default: .1, of moco .2, as published")
    add("--teacher-temperature", type=number(1e-3), nargs=2, default=[0.04, 0.04],
        help="start and end, of dino, ibot, ressl; lower start if they collapse")
    add("--teacher-warmup", type=fraction, default=0.3, help="share of the run from start to end")
    add("--freeze-last-layer", type=fraction, default=0.0,
        help="share of the run in which prototypes stay; more if the loss rises")

    add = parser.add_argument_group("optimizer").add_argument
    add("--batch-size", type=positive, default=128, help="images a step, over all processes; "
        "relations grow with its square, so the largest that fits")
    add("--grad-accum", type=positive, default=1,
        help="pieces of a batch; relations do not span them")
    add("--epochs", type=number(1e-6),
        help="length, fractions allowed; default: 20 unless --max-steps")
    add("--max-steps", type=positive,
        help="stop there; without --epochs the schedules end there too")
    add("--lr", type=number(0), default=3e-3,
        help="peak, absolute (AdamW); halve it if the loss jumps")
    add("--min-lr", type=number(0), default=0.0, help="at the end")
    add("--warmup", type=fraction, default=0.1,
        help="share of the run in which lr rises; more if unstable")
    add("--weight-decay", type=number(0), nargs=2, default=[0.05, 0.05],
        help="start and end (cosine)")
    add("--beta2", type=number(0, 0.99999), default=0.95, help="AdamW's; lower if the loss jumps")
    add("--clip-grad", type=number(0), default=3.0, help="largest gradient norm; 0: no clipping")
    add("--clip-each", action="store_true", help="clip each parameter by itself (DINO)")

    add = parser.add_argument_group("the run").add_argument
    add("--seed", type=natural, default=0, help="of everything random")
    add("--device", default="auto", choices="auto cuda mps cpu".split(), help="where to run")
    add("--compile", action="store_true", help="torch.compile both networks (CUDA)")
    add("--timeout", type=number(1), default=300.0,
        help="seconds without progress of any process, after which all end")
    add("--out-dir", help="folder of the run; default: runs/LOSS-DATA")
    add("--resume", default="auto",
        help="auto: go on if --out-dir holds this run; none: start over; a path")
    add("--save-every", type=positive, default=500, help="steps between checkpoints")
    add("--log-every", type=positive, default=20, help="steps between rows of log.jsonl")
    add("--eval-every", type=positive,
        help="steps between k-NN evaluations; default: ten in the run")
    return parser


def parse(words=None):
    """The options of a run: the command line's, else the recipe's, else those of its system."""
    parser = options()
    try:
        recipe = RECIPES.get(parser.parse_args(words).recipe, {})
        parser.set_defaults(**recipe)
        args = parser.parse_args(words)
        parser.set_defaults(**defaults(args.loss) | recipe)
        if args.teacher_checkpoint:
            parser.set_defaults(teacher="frozen", stages=1, pull_weight=0.0)
        args = parser.parse_args(words)
        check(args)
        if not any(OBJECTIVES[name].teacher for name in parse_loss(args.loss)):
            args.teacher = "none"
    except ValueError as error:
        parser.error(error)
    return args


# ---- the parts of a run ------------------------------------------------------------------------

def schedules(step, total, args):
    """Learning rate (linear warm-up, cosine down), weight decay and momentum (cosine) of a step."""
    def cosine(start, end, progress):
        return end + (start - end) * (1 + math.cos(math.pi * progress)) / 2

    warm = round(args.warmup * total)
    decay, momentum = (cosine(*args.weight_decay, step / total),
                       cosine(args.momentum, 1, step / total))
    if step < warm:
        return args.lr * (step + 1) / warm, decay, momentum
    lr = cosine(args.lr, args.min_lr, (step - warm) / max(1, total - warm))
    return lr, decay, momentum


def sample_order(count, start, stop, args, rank, world):
    """(epoch, indices) of this process for every piece of every step: a permutation an epoch."""
    each_epoch, epoch = count // args.batch_size, None
    for step in range(start, stop):
        now, place = divmod(step, each_epoch)
        if now != epoch:
            epoch, order = now, torch.randperm(count, generator=generator(args.seed, 1, now))
        batch = order[place * args.batch_size:(place + 1) * args.batch_size]
        for piece in batch.view(args.grad_accum, world, -1)[:, rank]:
            yield epoch, piece


def generator(*keys):
    return torch.Generator().manual_seed(fold(*keys))


def draw_masks(run, step, piece, weak):
    """Masks of this process's G global views, (G·B, N): a cut of those of the whole batch."""
    args, vit = run.args, run.system.student.backbone
    G, B = args.global_crops, args.batch_size // args.grad_accum
    if not args.mask_ratio:
        return None
    random, ratio = generator(args.seed, 2, step, piece), args.mask_ratio
    if args.mask_spread or args.mask_probability < 1:  # each view its own ratio, or none
        ratio = ratio + args.mask_spread * (2 * torch.rand(G * B, generator=random) - 1)
        some = torch.rand(G * B, generator=random) < args.mask_probability
        ratio = ratio.clamp(0, 1) * some
    if args.mask == "attention":
        seen = [run.system.teacher.backbone.last_attention(view).mean(1) for view in weak[:G]]
        return attention_mask(torch.cat(seen).float(), share(run, ratio))
    unit = dict(unit=args.mask_unit) if args.mask == "random" else {}
    mask = share(run, MASKS[args.mask](G * B, vit.grid, ratio, random, **unit))
    return mask.pin_memory() if run.device.type == "cuda" else mask


def share(run, x):
    """This process's part of what was drawn for the global views of all processes, (G·B, ..)."""
    if not torch.is_tensor(x):
        return x
    x = x.view(run.args.global_crops, run.world, -1, *x.shape[1:])
    return x[:, run.rank].flatten(0, 1)


# ---- what a run measures, hears and skips ------------------------------------------------------

def evaluate(run):
    """k-NN accuracy of frozen features, plain and centred, in percent: the teacher's, if ema."""
    with interruptible(run):
        train, test = features_for(run, run.args.pool)
        return dict(knn_top1=knn_top1(train, test), test_effective_rank=effective_rank(test[0]),
                    knn_top1_centered=knn_top1(train, test, center=True))


def features_for(run, pool, most=50000):
    """(References, test) features of the kept network; of large sets some, evenly spaced."""
    some = [torch.linspace(0, len(data) - 1, min(len(data), most)).long()
            for data in (run.train_set, run.test_set)]
    return [extract_features(run.system.kept.backbone, data, run.args.image_size, pool, run.device,
                             indices, run.args.workers, run.watch.mark)
            for data, indices in zip((run.train_set, run.test_set), some)]


def listen(run):
    """Note SIGTERM, SIGINT and SIGUSR1: the loop finishes its step, saves and leaves."""
    me = os.getpid()  # workers inherit the handler

    def heard(number, _):
        run.asked.append(number)
        if run.evaluating and os.getpid() == me:
            sys.exit(128 + number)

    for name in ("SIGTERM", "SIGINT", "SIGUSR1"):
        if hasattr(signal, name):  # not all on Windows
            signal.signal(getattr(signal, name), heard)


@contextlib.contextmanager
def interruptible(run):
    """An evaluation takes minutes; the state is saved before it, so a signal ends it at once."""
    if run.asked:
        sys.exit(128 + run.asked[-1])
    run.evaluating = True
    try:
        yield
    finally:
        run.evaluating = False


def first_row(run):
    """Step 0: what (centred) raw pixels and the untrained network reach, for training to beat."""
    row = dict(step=0, epoch=0.0)
    if run.test_set is not None:
        row |= evaluate(run)
        row["untrained_knn_top1"] = max(row["knn_top1"], row["knn_top1_centered"])
        with interruptible(run):
            row["raw_pixels_knn_top1"] = knn_top1(*features_for(run, "pixels"), center=True)
    return row


PATIENCE = 5  # skipped steps in a row


def skip(run, log, row):
    """Count a step whose gradient is not finite; stop after several, with something to look at."""
    run.skipped = [run.skipped[0] + 1, run.skipped[1] + 1]
    many = min(PATIENCE, run.stop)
    if run.rank == 0 and run.skipped[1] == 1:
        warn(f"step {run.step + 1}: the loss or its gradient is not finite: skipped (after {many} "
             "in a row the run stops)")
    if run.skipped[1] < many:
        return
    path = os.path.join(run.args.out_dir, "dump.json")
    order = sample_order(len(run.train_set), run.step, run.step + 1, run.args, 0, 1)
    images = torch.cat([index for _, index in order]).tolist()
    squares = {}
    for name, p in run.system.student.named_parameters():
        if p.grad is not None:
            block = ".".join(name.split(".")[:3 if "blocks" in name else 2])
            squares[block] = squares.get(block, 0.0) + p.grad.float().square().sum().item()
    norms = {block: math.sqrt(x) for block, x in squares.items()}
    files = getattr(run.train_set, "files", None)
    dump = dict(step=run.step + 1, **row, gradient_norms=norms, images=images,
                files=files and [files[i] for i in images], last_rows=log.rows[-100:])
    lines = ",\n".join(f"{json.dumps(name)}: {json.dumps(in_words(x))}" for name, x in dump.items())
    if run.rank == 0:
        try:
            write_file(path, lambda file: file.write(f"{{{lines}}}\n".encode()))
        except OSError as error:
            warn(f"could not write {path} ({error})")
        good = run.places[0]
        again = (f"--resume {good} goes on from the last good state" if os.path.exists(good)
                 else "start again")
        print(f"step {run.step + 1}: {many} steps in a row were not finite: see {path} for images, "
              f"gradients and the last rows; {again}, with a lower --lr or a longer --warmup",
              file=sys.stderr)
    sys.exit(1)


def in_words(x):
    """Plain data as JSON can have it: a float that is not finite as a word."""
    if isinstance(x, dict):
        return {name: in_words(value) for name, value in x.items()}
    return str(x) if isinstance(x, float) and not math.isfinite(x) else x


def numbers(run, logs):
    """What the terms report, as numbers: means over the processes, by name."""
    with torch.no_grad():
        logs = {name: x() if callable(x) else x for name, x in logs.items()}
    values = torch.stack([torch.as_tensor(x, dtype=torch.float, device=run.device).detach()
                          for x in logs.values()])
    if run.world > 1:
        dist.all_reduce(values)
    return dict(zip(logs, (values / run.world).tolist()))


def clip(run, parameters):
    """Clip gradients, together or (--clip-each, as DINO) each by itself -> their norm before.

    Where that is not finite nothing is touched.
    """
    gradients = [p.grad for p in parameters if p.grad is not None]
    limit, norms = run.args.clip_grad or math.inf, torch.stack(torch._foreach_norm(gradients))
    norm = norms.norm()
    value = norm.item()  # the one wait for the GPU in a step
    if not math.isfinite(value) or limit == math.inf:
        return value
    if run.args.clip_each:
        torch._foreach_mul_(gradients, list((limit / (norms + 1e-6)).clamp(max=1)))
    else:
        nn.utils.clip_grads_with_norm_(parameters, limit, norm)
    return value


# ---- one run, top to bottom --------------------------------------------------------------------

def refuse(args):
    """What no single option can know: pieces and sizes that do not fit each other."""
    pieces = args.grad_accum * int(os.environ.get("WORLD_SIZE", 1))
    name, least = least_images(args)
    if args.batch_size % pieces or args.batch_size // args.grad_accum < least:
        raise ValueError(f"--batch-size {args.batch_size} must be a multiple of {pieces} (processes"
                         f" x --grad-accum) and leave {least} images a piece: {name} compares them")
    if not 0 < args.crop_scale[0] <= args.crop_scale[1]:
        raise ValueError(f"--crop-scale {args.crop_scale}: from above 0 to at least that")


def refuse_masks(args, grid):
    """Masks that leave the student nothing to see, or a term nothing to predict."""
    patches = math.prod(grid)
    least, most = (round(ratio * patches) for ratio in (args.mask_ratio - args.mask_spread,
                                                        args.mask_ratio + args.mask_spread))
    visible = patches - most
    if args.mask_ratio and not most:
        raise ValueError(f"--mask-ratio {args.mask_ratio} hides none of {patches} patches: raise "
                         "it, or set it to 0")
    if visible < 1:
        raise ValueError(f"--mask-ratio {args.mask_ratio} hides all {patches} patches: lower it")
    if any(side % args.mask_unit for side in grid):
        raise ValueError(f"--mask-unit {args.mask_unit} does not divide {grid[0]} x {grid[1]} "
                         "patches: take 1")
    needed = 3 if args.angle_weight else 2
    if args.patch_weight and args.hide == "drop" and visible < needed:
        raise ValueError(f"--patch-weight {args.patch_weight} needs {needed} patches and the "
                         f"student has {visible}: lower --mask-ratio or --hide token")


def prepare(args):
    """All before the first step: whatever can be wrong with the options is found out here."""
    # -- set-up
    run = types.SimpleNamespace(args=args, step=0, device=None, row={}, skipped=[0, 0], asked=[],
                                evaluating=False)
    problem = None
    try:
        run.device = pick_device(args.device)
        refuse(args)
    except ValueError as error:
        problem = str(error)
    run.rank, run.world = join_processes(run.device, args.timeout, problem)
    try:
        set_up(run)
    except ValueError as error:
        problem = str(error)
    problem = first_problem(problem, dict(step=run.step, images=getattr(run, "count", None)))
    if not problem:  # all agree, so there may be a folder
        try:
            if run.rank == 0:
                open_folder(run)
        except ValueError as error:
            problem = str(error)
        problem = first_problem(problem)
    if problem:
        raise ValueError(problem)

    # -- over processes, compiled
    run.network = run.system  # the raw one is saved
    if args.compile:
        run.system.student.backbone.compile()
        if run.system.teacher:
            run.system.teacher.backbone.compile()
    if run.world > 1:
        now = inspect.signature(nn.parallel.DistributedDataParallel).parameters
        buffers = ("forward_sync_buffers" if "forward_sync_buffers" in now  # torch 2.14
                   else "broadcast_buffers")
        run.network = nn.parallel.DistributedDataParallel(run.system, **{buffers: False})
    run.watch = Watch(run.rank, run.world, args.timeout)

    # -- views; colours of the local ones as BYOL's of both together
    small = max(1, round(args.image_size * 96 / 224 / args.patch_size)) * args.patch_size
    local = args.local_crops  # DINO: 96 of 224, area from .05 to that of the global ones
    views = ([(args.image_size, args.crop_scale)] * args.global_crops
             + [(small, (0.05, args.crop_scale[0]))] * local)
    order = sample_order(run.count, run.step, run.stop, args, run.rank, run.world)
    run.batches = train_batches(
        run.train_set, order, views, args.seed, run.device, args.workers,
        weak=args.weak_teacher or args.mask == "attention", jitter=args.jitter, hue=args.hue,
        grey_probability=args.grey,
        blur_probability=args.blur[:args.global_crops] + [0.5 * any(args.blur)] * local,
        solarize_probability=args.solarize[:args.global_crops] + [0.0] * local)
    return run


def set_up(run):
    """What each process does alone, so that all can hear of the problem of one."""
    args = run.args

    # -- student, teacher and what is asked of them
    run.system = System(args).to(run.device)
    refuse_masks(args, run.system.student.backbone.grid)

    # -- data
    run.train_set, run.test_set = load_data(args.data, args.data_path, args.image_size)
    run.count = len(run.train_set)
    if run.count < args.batch_size:
        raise ValueError(f"--batch-size {args.batch_size} is more than the {run.count} training "
                         "images")
    run.total = round((args.epochs or 20) * (run.count // args.batch_size))
    if args.max_steps and not args.epochs:
        run.total = args.max_steps
    run.stop = min(run.total, args.max_steps or run.total)
    if run.stop < args.stages:
        raise ValueError(f"{run.stop} steps ({run.count} images, batches of {args.batch_size}) are "
                         f"less than one for each of --stages {args.stages}: raise --epochs (now "
                         f"{args.epochs or 'not given'}) or --max-steps")
    run.stage = math.ceil(run.total / args.stages)  # its length

    # -- optimizer. Weight decay: matrices only. eps: relations see no norm.bias, attention no bias
    # of its keys; their gradients are rounding noise that the usual 1e-8 would raise to full steps
    parameters = [p for p in run.system.parameters() if p.requires_grad]
    groups = [dict(params=[p for p in parameters if p.dim() in (2, 4)]),
              dict(params=[p for p in parameters if p.dim() in (1, 3)])]
    run.optimizer = torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, args.beta2), eps=1e-6,
                                      fused=run.device.type != "mps")

    # -- resume
    args.out_dir = args.out_dir or f"runs/{args.loss.replace('*', 'x')}-{args.data}"
    run.places = [os.path.join(args.out_dir, name) for name in ("checkpoint.pt", "previous.pt")]
    restarted = (os.environ.get(name, "0") for name in ("TORCHELASTIC_RESTART_COUNT",
                                                        "SLURM_RESTART_COUNT"))
    run.restarted = any(count != "0" for count in restarted)  # by a launcher, with the same options
    resume(run)


def train(run):
    """The loop, and what is written before, in and after it."""
    args, every, watch = run.args, run.args.eval_every or math.ceil(run.stop / 10), run.watch
    listen(run)
    log, system = Log(run), run.system
    parameters = [p for p in system.parameters() if p.requires_grad]
    if run.test_set is None and run.rank == 0:
        print(f"{args.data_path} has no classes, or no val/ or test/: training without k-NN")
    if run.step == 0:
        log.write(first_row(run))
    elif run.row and (not log.rows or log.rows[-1]["step"] < run.step):
        evaluating = run.row.pop("evaluating", 0)  # it was stopped before its row was written
        log.write(run.row | (evaluate(run) if evaluating else {}))
    bf16 = run.device.type == "cuda" and torch.cuda.is_bf16_supported()
    autocast = torch.autocast("cuda", torch.bfloat16) if bf16 else contextlib.nullcontext()
    bar = tqdm(initial=run.step * args.batch_size, total=run.stop * args.batch_size, unit="img",
               unit_scale=True, disable=None if run.rank == 0 else True)
    since, waited, steps, stopping = time.perf_counter(), 0.0, 0, 0

    def fetch():
        nonlocal waited
        start = time.perf_counter()
        watch.mark(f"waiting for images after step {run.step}")
        batch = next(run.batches, None)
        waited += time.perf_counter() - start
        return batch

    batch = fetch()
    for step in range(run.step, run.stop):
        stage, place = divmod(step, run.stage)
        if stage and not place:
            system.next_stage(stage)
        lr, decay, momentum = schedules(place, run.stage, args)
        for group, weight_decay in zip(run.optimizer.param_groups, (decay, 0)):
            group.update(lr=lr, weight_decay=weight_decay)
        torch.manual_seed(fold(args.seed, 3, step, run.rank))  # of drop-path, the only draw from it
        remembered = dict(system.state)
        for piece in range(args.grad_accum):
            _, weak, strong = batch
            watch.mark(f"drawing masks at step {step + 1}")
            mask = draw_masks(run, step, piece, weak)
            watch.mark(f"computing step {step + 1}")
            wait = run.world > 1 and piece < args.grad_accum - 1  # the last averages over processes
            with run.network.no_sync() if wait else contextlib.nullcontext():
                with autocast:
                    loss, logs, points = run.network(strong, weak, mask, place / run.stage)
                # outside autocast: geometry keeps its float32. The factor is 1, or NaN where the
                # loss is not finite: so all processes learn it from their common gradient
                (loss * (1 + 0 * loss.detach()) / args.grad_accum).backward()
            batch = fetch()  # the next, while a GPU still computes
        norm = clip(run, parameters)
        finite = math.isfinite(norm)
        if finite:
            if place < args.freeze_last_layer * run.stage:
                system.student.rest_prototypes()
            run.optimizer.step()
            if args.teacher == "ema":
                ema_update(system.teacher, system.student, momentum)
            run.skipped[1] = 0
        else:
            system.state = remembered
            skip(run, log, dict(loss=loss.item(), lr=lr, weight_decay=decay, momentum=momentum))
        run.optimizer.zero_grad(set_to_none=True)
        run.step, steps = step + 1, steps + 1
        bar.update(args.batch_size)

        evaluating = run.test_set is not None and (run.step % every == 0 or run.step == run.stop)
        saving = run.step % args.save_every == 0 or run.step == run.stop
        logging = evaluating or saving or run.step == 1 or run.step % args.log_every == 0
        if logging or run.device.type == "cpu":
            stopping = largest(max(run.asked, default=0), run.device)
        row = {}
        if logging or stopping:
            rate = steps * args.batch_size / (time.perf_counter() - since)
            row = dict(step=run.step, epoch=run.step * args.batch_size / len(run.train_set),
                       **numbers(run, dict(loss=loss, **logs)),
                       lr=lr, weight_decay=decay, momentum=momentum, gradient_norm=norm,
                       **(panel(*points) if finite else {}), skipped_steps=run.skipped[0],
                       images_per_second=rate, data_seconds=waited / steps)
            row = {name: rounded(x) for name, x in row.items()}
            run.train_set.share()
        # saved before it is evaluated, which can take long; not while steps are being skipped
        if (saving or evaluating) and finite or stopping or run.step == run.stop:
            save_run(run, row | dict(evaluating=int(evaluating)))
        if row and not (evaluating and stopping):
            log.write(row | (evaluate(run) if evaluating else {}))
            since, waited, steps = time.perf_counter(), 0.0, 0
        if stopping:
            break

    bar.close()
    watch.over = True
    if not os.path.exists(run.places[0]):  # taken from elsewhere, and there was nothing left to do
        save_run(run)
    if run.rank == 0:
        try:
            analyze.curves(args.out_dir)
            if not stopping:  # seconds count
                analyze.masks(args.out_dir, args.data_path, args.teacher_checkpoint,
                              (run.train_set, run.test_set))
        except (OSError, ValueError) as error:  # a full disk; or no checkpoint, for one was full
            warn(f"could not draw into {args.out_dir} ({error})")
        done = "stopped" if stopping else "finished"
        print(f"{done} at step {run.step} of {run.total}: see {args.out_dir}")
    if run.world > 1:
        dist.destroy_process_group()
    return 128 + stopping if stopping else 0  # a scheduler restarts it; the same command goes on


def main():
    args, parser, run = parse(), options(), None
    try:
        run = prepare(args)
    except ValueError as error:
        parser.error(error)
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    try:
        return train(run)
    except UnreadableImages as error:
        parser.error(error)
    except RuntimeError:
        gone = run.watch.gone() if run.world > 1 else []
        if run.asked:  # a signal for all, and another process has left already
            return 128 + run.asked[-1]
        if not gone:
            raise
        print(f"process {run.rank} leaves at step {run.step}, because {run.watch.names(gone)} is "
              "gone; the same command goes on from the newest checkpoint", file=sys.stderr)
        return 1


if __name__ == "__main__":
    leave_by(main)
