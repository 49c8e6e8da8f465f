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
from data import DATASETS, UnreadableImages, fold, load_data, train_batches
from eval_knn import (Parser, extract_features, join_processes, knn_top1, natural, number,
                      pick_device, positive)
from losses import effective_rank, panel
from masking import MASKS, attention_mask
from model import ARCHS, POOLS, ema_update
from objectives import (OBJECTIVES, RECIPES, TOKENIZERS, System, check, defaults, least_images,
                        parse_loss)


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
    add("--workers", type=natural, default=4,
        help="decoding processes for each process, for folders")

    add = parser.add_argument_group("student").add_argument
    add("--arch", default="vit_micro", choices=ARCHS, help="size of the ViT")
    add("--image-size", type=positive, default=32, help="side of a global view in pixels")
    add("--patch-size", type=positive, default=8,
        help="side in pixels; smaller learns more, costs more")
    add("--pool", default="mean", choices=POOLS, help="feature of an image: of its patches, or CLS")
    add("--projection", type=natural, default=0,
        help="width of what simclr, moco, byol, dino, ibot compare; 0: as published")
    add("--head", type=natural, default=0,
        help="rkd: width of a projection head; 0 relates the features")
    add("--head-hidden", type=natural, default=0, help="width inside heads; 0: 4 times the ViT's")
    add("--head-batchnorm", action=argparse.BooleanOptionalAction, default=False,
        help="in dino's and ibot's; try it when they collapse")
    add("--predictor", action="store_true", help="rkd: a second MLP on the student alone")
    add("--prototypes", type=positive, default=1024, help="of dino and ibot; words of beit")
    add("--decoder", type=positive, nargs=2, default=[128, 2], help="width and depth, of mae, dbot")
    add("--tokenizer", default="random", choices=TOKENIZERS, help="where beit's words come from")
    add("--drop-path", type=fraction, default=0.0, help="stochastic depth; .1 for vit_base")
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
    add("--local-crops", type=natural, default=0,
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
    add("--beta2", type=fraction, default=0.95, help="AdamW's; lower if the loss jumps")
    add("--clip-grad", type=number(0), default=3.0, help="largest gradient norm; 0: no clipping")
    add("--clip-each", action="store_true", help="clip each parameter by itself (DINO)")

    add = parser.add_argument_group("the run").add_argument
    add("--seed", type=natural, default=0, help="of everything random")
    add("--device", default="auto", choices="auto cuda mps cpu".split(), help="where to run")
    add("--compile", action="store_true", help="torch.compile both networks (CUDA)")
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


def save(path, state):
    """Write a whole state, or leave the old one: temporary file, flush to disk, rename."""
    try:
        with open(path + ".tmp", "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(path + ".tmp", path)
    except OSError as error:
        print(f"could not save {path} ({error}): training goes on, and will try again",
              file=sys.stderr)


# options that may change when a run goes on
FREE = ("recipe data_path workers max_steps device compile out_dir resume "
        "save_every log_every eval_every").split()


def resume(run):
    """Load the newest state of this run, if there is one and it is asked for."""
    args, path = run.args, os.path.join(run.args.out_dir, "checkpoint.pt")
    if args.resume == "none":
        for old in (path, os.path.join(args.out_dir, "log.jsonl")):  # nothing saved is lost
            if run.rank == 0 and os.path.exists(old):
                os.replace(old, old + ".old")
        return
    if args.resume == "auto" and not os.path.exists(path):
        return
    path = path if args.resume == "auto" else args.resume
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        was = state["args"]
        other = [f"--{name.replace('_', '-')} {was.get(name)} (now {value})"
                 for name, value in vars(args).items()
                 if name not in FREE and was.get(name) != value]
        if other and args.resume == "auto":
            raise ValueError(f"{path} is of another run: {', '.join(other[:6])}; choose another "
                             "--out-dir, the same options, --resume none to start over, or "
                             "--resume with its path")
        run.system.load(state)
        run.optimizer.load_state_dict(state["optimizer"])
        run.step = state["step"]
    except ValueError:
        raise
    except Exception as error:  # missing, cut, not ours, of another size
        raise ValueError(f"--resume {path}: no checkpoint of such a run ({type(error).__name__}: "
                         f"{str(error)[:200]}); --resume none starts over") from error
    if run.rank == 0:
        print(f"resumed {path} at step {run.step}" + f"; it had {', '.join(other)}" * bool(other))


def evaluate(run):
    """k-NN accuracy of frozen features, plain and centred, in percent: the teacher's, if ema."""
    train, test = features_for(run, run.args.pool)
    return dict(knn_top1=knn_top1(train, test), test_effective_rank=effective_rank(test[0]),
                knn_top1_centered=knn_top1(train, test, center=True))


def features_for(run, pool, most=50000):
    """(References, test) features of the kept network; of large sets some, evenly spaced."""
    some = [torch.linspace(0, len(data) - 1, min(len(data), most)).long()
            for data in (run.train_set, run.test_set)]
    return [extract_features(run.system.kept.backbone, data, run.args.image_size, pool, run.device,
                             indices, run.args.workers)
            for data, indices in zip((run.train_set, run.test_set), some)]


class Log:
    """log.jsonl, written by the first process: one object a step, none twice after a resume."""

    def __init__(self, run):
        self.run, self.on = run, run.rank == 0
        self.path = os.path.join(run.args.out_dir, "log.jsonl")
        self.rows, self.said = [], set()
        if self.on and os.path.exists(self.path):
            with open(self.path) as file:
                rows = [json.loads(line) for line in file if line.endswith("}\n")]
            self.rows = [row for row in rows if row["step"] <= run.step and run.step]
        if self.on:
            with open(self.path, "w") as file:
                file.writelines(json.dumps(row) + "\n" for row in self.rows)

    def write(self, row):
        if not self.on:
            return
        self.rows.append({name: float(f"{x:.6g}") if isinstance(x, float) else x
                          for name, x in row.items()})
        with open(self.path, "a") as file:
            file.write(json.dumps(self.rows[-1]) + "\n")
        if "knn_top1" in row:
            shown = "step loss knn_top1 raw_pixels_knn_top1 effective_rank images_per_second"
            tqdm.write("  ".join(f"{name} {row[name]:.4g}"
                                 for name in shown.split() if name in row))
        self.watch()

    def watch(self):
        """Say once, in plain words, what a collapse looks like in the rows."""
        rows = [row for row in self.rows if "loss" in row]
        if len(rows) < 5:
            return
        if max(row["effective_rank"] for row in rows[-3:]) < rows[0]["effective_rank"] / 2:
            self.say("the effective rank of the points fell below half of its start: they collapse "
                     "onto few directions; try a lower --lr, a smaller --pull-weight or a "
                     "--momentum closer to 1")
        for name in [name for name in rows[-1] if f"collapsed_{name}" in rows[-1]]:
            plateau = f"collapsed_{name}"
            if self.run.step > self.run.total / 5 and all(
                    abs(row[name] - row[plateau]) < 0.02 * row[plateau] for row in rows[-5:]):
                self.say(f"the {name} loss stays at {rows[-1][name]:.4g}, its value for a student "
                         "whose points are all one: nothing is learned; try a lower --lr or a "
                         "longer --warmup")

    def say(self, text):
        if text not in self.said:
            self.said.add(text)
            tqdm.write(f"warning: {text}", file=sys.stderr)


def agree(run, flag):
    """The largest of a number over the processes, so that all stop at the same step."""
    if run.world > 1:
        flag = torch.tensor(flag, device=run.device)
        dist.all_reduce(flag, dist.ReduceOp.MAX)
    return int(flag)


def first_row(run):
    """Step 0: what (centred) raw pixels and the untrained network reach, for training to beat."""
    row = dict(step=0, epoch=0.0)
    if run.test_set is not None:
        row |= evaluate(run)
        row["untrained_knn_top1"] = max(row["knn_top1"], row["knn_top1_centered"])
        row["raw_pixels_knn_top1"] = knn_top1(*features_for(run, "pixels"), center=True)
    return row


def check_finite(run, row):
    """Stop, with what was seen last, before a broken state is saved."""
    if not math.isfinite(row["loss"]) or not math.isfinite(row["gradient_norm"]):
        print(f"step {run.step}: the loss or its gradient is not finite: {json.dumps(row)}; try a "
              f"lower --lr or a longer --warmup; {run.args.out_dir} keeps the last good state",
              file=sys.stderr)
        sys.exit(1)


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
    """Clip gradients, together or (--clip-each, as DINO) each by itself -> their norm before."""
    limit = run.args.clip_grad or math.inf
    if not run.args.clip_each:
        return nn.utils.clip_grad_norm_(parameters, limit)
    gradients = [p.grad for p in parameters if p.grad is not None]
    norms = torch.stack(torch._foreach_norm(gradients))
    torch._foreach_mul_(gradients, list((limit / (norms + 1e-6)).clamp(max=1)))
    return norms.norm()


def save_run(run):
    if run.rank == 0:
        save(os.path.join(run.args.out_dir, "checkpoint.pt"),
             dict(run.system.save(), optimizer=run.optimizer.state_dict(), step=run.step,
                  args=vars(run.args)))


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
    run = types.SimpleNamespace(args=args, step=0, device=pick_device(args.device))
    refuse(args)

    # -- student, teacher and what is asked of them
    run.system = System(args).to(run.device)
    vit = run.system.student.backbone
    refuse_masks(args, vit.grid)

    # -- data
    run.rank, run.world = join_processes(run.device)
    run.train_set, run.test_set = load_data(args.data, args.data_path, args.image_size)
    count = len(run.train_set)
    if count < args.batch_size:
        raise ValueError(f"--batch-size {args.batch_size} is more than the {count} training images")
    run.total = round((args.epochs or 20) * (count // args.batch_size))
    if args.max_steps and not args.epochs:
        run.total = args.max_steps
    run.stop = min(run.total, args.max_steps or run.total)
    if run.stop < args.stages:
        raise ValueError(f"{run.stop} steps (--epochs {args.epochs} of {count} images, batches of "
                         f"{args.batch_size}) are less than one a stage: raise --epochs")
    run.stage = math.ceil(run.total / args.stages)  # its length

    # -- over processes, compiled
    run.network = run.system  # the raw one is saved
    if args.compile:
        vit.compile()
        if run.system.teacher:
            run.system.teacher.backbone.compile()
    if run.world > 1:
        run.network = nn.parallel.DistributedDataParallel(run.system, broadcast_buffers=False)

    # -- optimizer. Weight decay: matrices only. eps: relations see no norm.bias, attention no bias
    # of its keys; their gradients are rounding noise that the usual 1e-8 would raise to full steps
    parameters = [p for p in run.system.parameters() if p.requires_grad]
    groups = [dict(params=[p for p in parameters if p.dim() in (2, 4)]),
              dict(params=[p for p in parameters if p.dim() in (1, 3)])]
    run.optimizer = torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, args.beta2), eps=1e-6,
                                      fused=run.device.type == "cuda")

    # -- resume
    args.out_dir = args.out_dir or f"runs/{args.loss.replace('*', 'x')}-{args.data}"
    try:
        os.makedirs(args.out_dir, exist_ok=True)
    except OSError as error:
        raise ValueError(f"--out-dir {args.out_dir} cannot be made: {error}") from error
    resume(run)

    # -- views; colours of the local ones as BYOL's of both together
    small = max(1, round(args.image_size * 96 / 224 / args.patch_size)) * args.patch_size
    local = args.local_crops  # DINO: 96 of 224, area from .05 to that of the global ones
    views = ([(args.image_size, args.crop_scale)] * args.global_crops
             + [(small, (0.05, args.crop_scale[0]))] * local)
    order = sample_order(count, run.step, run.stop, args, run.rank, run.world)
    run.batches = train_batches(
        run.train_set, order, views, args.seed, run.device, args.workers, jitter=args.jitter,
        hue=args.hue, grey_probability=args.grey,
        blur_probability=args.blur[:args.global_crops] + [0.5 * any(args.blur)] * local,
        solarize_probability=args.solarize[:args.global_crops] + [0.0] * local)
    return run


def train(run):
    """The loop, and what is written before, in and after it."""
    args, log, every = run.args, Log(run), run.args.eval_every or math.ceil(run.stop / 10)
    system, parameters = run.system, [p for p in run.system.parameters() if p.requires_grad]
    asked = []  # signals received: finish the step, save, leave
    for name in (signal.SIGTERM, signal.SIGINT):
        signal.signal(name, lambda number, _: asked.append(number))
    if run.rank == 0:
        with open(os.path.join(args.out_dir, "args.json"), "w") as file:
            json.dump(vars(args), file, indent=1)
    if run.test_set is None and run.rank == 0:
        print(f"{args.data_path} has no classes, or no val/ or test/: training without k-NN")
    if run.step == 0:
        log.write(first_row(run))
    bf16 = run.device.type == "cuda" and torch.cuda.is_bf16_supported()
    autocast = torch.autocast("cuda", torch.bfloat16) if bf16 else contextlib.nullcontext()
    bar = tqdm(initial=run.step * args.batch_size, total=run.stop * args.batch_size, unit="img",
               unit_scale=True, disable=None if run.rank == 0 else True)
    since, waited, steps, stopping = time.perf_counter(), 0.0, 0, 0

    for step in range(run.step, run.stop):
        stage, place = divmod(step, run.stage)
        if stage and not place:
            system.next_stage(stage)
        lr, decay, momentum = schedules(place, run.stage, args)
        for group, weight_decay in zip(run.optimizer.param_groups, (decay, 0)):
            group.update(lr=lr, weight_decay=weight_decay)
        torch.manual_seed(fold(args.seed, 3, step, run.rank))  # of drop-path, the only draw from it
        for piece in range(args.grad_accum):
            start = time.perf_counter()
            _, weak, strong = next(run.batches)
            waited += time.perf_counter() - start
            mask = draw_masks(run, step, piece, weak)
            wait = run.world > 1 and piece < args.grad_accum - 1  # the last averages over processes
            with run.network.no_sync() if wait else contextlib.nullcontext():
                with autocast:
                    loss, logs, points = run.network(strong, weak, mask, place / run.stage)
                (loss / args.grad_accum).backward()  # outside: geometry keeps its float32
        norm = clip(run, parameters)
        if place < args.freeze_last_layer * run.stage:
            system.student.rest_prototypes()
        run.optimizer.step()
        run.optimizer.zero_grad(set_to_none=True)
        if args.teacher == "ema":
            ema_update(system.teacher, system.student, momentum)
        run.step, steps = step + 1, steps + 1
        bar.update(args.batch_size)

        evaluating = run.test_set is not None and (run.step % every == 0 or run.step == run.stop)
        saving = run.step % args.save_every == 0 or run.step == run.stop
        logging = evaluating or saving or run.step == 1 or run.step % args.log_every == 0
        stopping = agree(run, max(asked, default=0)) if logging or run.device.type == "cpu" else 0
        if logging or stopping:
            rate = steps * args.batch_size / (time.perf_counter() - since)
            row = dict(step=run.step, epoch=run.step * args.batch_size / len(run.train_set),
                       **numbers(run, dict(loss=loss, **logs)),
                       lr=lr, weight_decay=decay, momentum=momentum, gradient_norm=norm.item(),
                       **panel(*points), images_per_second=rate, data_seconds=waited / steps)
            check_finite(run, row)
            run.train_set.share()
            log.write(row | (evaluate(run) if evaluating else {}))
            since, waited, steps = time.perf_counter(), 0.0, 0
        if saving or stopping:
            save_run(run)
        if stopping:
            break

    bar.close()
    if run.rank == 0:
        analyze.curves(args.out_dir)
        analyze.masks(args.out_dir, (run.train_set, run.test_set))
        done = "stopped" if stopping else "finished"
        print(f"{done} at step {run.step} of {run.total}: see {args.out_dir}")
    if run.world > 1:
        dist.destroy_process_group()
    return 128 + stopping if stopping else 0  # a scheduler restarts it; the same command goes on


def main():
    args, parser = parse(), options()
    try:
        run = prepare(args)
    except ValueError as error:
        parser.error(error)
    try:
        return train(run)
    except UnreadableImages as error:
        parser.error(error)


if __name__ == "__main__":
    sys.exit(main())
