"""Masked relational knowledge distillation of Vision Transformers, on a laptop or on several nodes.

A student sees an augmented view with most patches hidden; a teacher, the moving average (EMA) of
the student, sees another view, whole. The student learns the teacher's *relations* among the images
of a batch. losses.py holds the formulas, objectives.py the systems, and this file one run: options,
schedules and masks, saving, one step, then `main` (set-up) and `train` (loop).

    python train.py                                  # built-in images, three minutes, any machine
    torchrun --nproc_per_node=8 train.py --loss rkd --data folder --data-path /imagenet \\
        --arch vit_small --image-size 224 --patch-size 16 --batch-size 1024 --epochs 100 --hue 0.1
    torchrun --nnodes=4 --nproc_per_node=8 --rdzv_backend=c10d --rdzv_endpoint=IP:29500 train.py ..

--out-dir receives checkpoint.pt, args.json, log.jsonl, curves.png and masks.png. A killed run
continues with the same command. One process or many give the same run.
"""
import argparse
import itertools
import json
import math
import os
import signal
import sys
import threading
import time

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.elastic.multiprocessing.errors import record
from tqdm import tqdm

import analyze
from data import DATASETS, DataError, fingerprint, load_data, train_batches
from eval_knn import (Parser, all_gather, extract_features, knn_top1, number, ranks,
                      start_processes, watch, whole)
from losses import effective_rank, panel
from masking import MASKS, attention_mask
from model import ARCHS, POOLS, ema_update
from objectives import OBJECTIVES, RECIPES, System, defaults, parse_loss
from randomness import fold, generator
from weights import listed, misfits, one_line, read_file, write_file

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None


# ---- options -----------------------------------------------------------------------------------

# --decay: which parameters decay? `tokens`, with positions, in DINO, iBOT, MAE, dBOT; `all` in MoCo
DECAY = dict(matrices=lambda p: p.dim() in (2, 4), tokens=lambda p: p.dim() > 1, all=lambda p: True)

def options():
    parser, fraction, positive, width = Parser(__doc__), number(0, 1), whole(1), whole(0, 2**16)
    flag = dict(action="store_true")
    add = parser.add_argument_group("objective and data").add_argument
    add("--recipe", choices=RECIPES, help="published hyper-parameters; options given here win")
    add("--loss", default="rkd", metavar="SUM",
        help=f"a term or a weighted sum, as dino+0.5*rkd, of {', '.join(OBJECTIVES)}")
    add("--data", choices=DATASETS, help="default: textures (built in); folder with --data-path")
    add("--data-path", help="folder: train/CLASS/image, val/CLASS/image; else where the set is")
    add("--workers", type=whole(0, 512), default=4, help="decoding workers per process (folders)")

    add = parser.add_argument_group("student").add_argument
    add("--arch", default="vit_micro", choices=ARCHS, help="size of the ViT")
    add("--image-size", type=whole(1, 8192), default=32, help="side of a global view, pixels")
    add("--patch-size", type=whole(1, 8192), default=8, help="pixels; smaller: better, slower")
    add("--pool", default="mean", choices=POOLS, help="feature of an image: mean of patches or CLS")
    add("--projection", type=width, default=0, help="output width of heads; 0: as published")
    add("--head", type=width, default=0, help="rkd: width of its head; 0: no head")
    add("--head-hidden", type=width, default=0, help="hidden width of heads; 0: 4 x feature width")
    add("--head-batchnorm", action=argparse.BooleanOptionalAction, default=False,
        help="BatchNorm in the head of rkd, dino or ibot (against collapse)")
    add("--prototypes", type=whole(1, 2**20), default=1024, help="of dino and ibot; words of beit")
    add("--decoder", type=whole(1, 2**14), nargs=2, default=[128, 2], help="width depth: mae, dbot")
    add("--drop-path", type=number(0, 0.99), default=0.0, help="stochastic depth; .1 for vit_base")
    add("--fixed-pos", **flag, help="sine-cosine positions, not learned")
    add("--freeze-patch-embed", **flag, help="keep the patch embedding random (steadies moco)")

    add = parser.add_argument_group("teacher").add_argument
    add("--teacher", default="ema", choices=["ema", "frozen"],
        help="ema: average of the student; frozen: random, then the student of the last stage")
    add("--teacher-checkpoint", metavar="FILE", help="a given, frozen network of any width")
    add("--teacher-arch", choices=ARCHS, help="only for weights that do not say theirs")
    add("--stages", type=positive, default=1, help="frozen teachers in turn; schedules start anew")
    add("--momentum", type=fraction, default=0.95, help="of ema, rises to 1; .99 for long runs")

    add = parser.add_argument_group("views and masks").add_argument
    add("--mask", default="random", choices=[*MASKS, "attention"], help="which patches to hide")
    add("--mask-ratio", type=fraction, default=0.75, help="share of hidden patches")
    add("--mask-spread", type=fraction, default=0.0, help="ratio ± this, drawn per view")
    add("--mask-probability", type=fraction, default=1.0, help="share of views with a mask")
    add("--mask-unit", type=positive, default=1, help="random: side of a hidden square, patches")
    add("--hide", default="drop", choices=["drop", "token"], help="drop is faster; or a mask token")
    add("--global-crops", type=int, choices=[1, 2], default=2, help="whole views per image")
    add("--crop-scale", type=fraction, nargs=2, default=[0.4, 1.0], help="area of a global view")
    add("--local-crops", type=whole(0, 64), default=0, help="small views per image (multi-crop)")
    add("--bicubic", **flag, help="crops as published; bilinear is faster")
    add("--jitter", type=fraction, default=0.4, help="strength for brightness and contrast")
    add("--saturation", type=fraction, help="its strength; default: half of --jitter")
    add("--jitter-probability", type=fraction, default=0.8, help="share of jittered views")
    add("--hue", type=number(0, 0.5), default=0.5, help="jitter, turns; .1 if colour tells classes")
    add("--grey", type=fraction, default=0.2, help="share of grey views")
    add("--blur", type=fraction, nargs=2, default=[0.5, 0.5], help="blurred share, per global view")
    add("--solarize", type=fraction, nargs=2, default=[0.0, 0.0], help="solarized share")
    add("--weak-teacher", **flag, help="the teacher's views keep their colours")

    add = parser.add_argument_group("losses").add_argument
    add("--distance-weight", type=number(0), default=1.0, help="rkd: weight of distances")
    add("--distance-power", type=number(0), default=1.0, help="exponent of the teacher's distances")
    add("--angle-weight", type=number(0), default=2.0, help="rkd: weight; Park et al.: 2")
    add("--angle-vertices", type=positive, help="rkd: images with angles; default: 256 at most")
    add("--pull-weight", type=number(0), default=0.05, help="rkd: weight; 0 with a given teacher")
    add("--temperature", type=number(1e-3), help="the student's; default .1, moco .2")
    add("--teacher-temperature", type=number(1e-3), nargs=2, default=[0.04, 0.04],
        help="dino, ibot, ressl: start and end; a lower start against collapse")
    add("--teacher-warmup", type=fraction, default=0.3, help="share of the run to reach the end")
    add("--freeze-last-layer", type=fraction, default=0.0, help="share with fixed prototypes")

    add = parser.add_argument_group("optimizer").add_argument
    add("--batch-size", type=positive, default=128, help="images per step, all processes together")
    add("--grad-accum", type=positive, default=1, help="pieces per batch; no relations across")
    add("--epochs", type=number(1e-6), help="length; default: 20 unless --max-steps")
    add("--max-steps", type=positive, help="stop there; without --epochs schedules end there too")
    add("--lr", type=number(0), default=3e-3, help="peak, absolute; halve it if the loss jumps")
    add("--min-lr", type=number(0), default=0.0, help="learning rate at the end")
    add("--warmup", type=fraction, default=0.1, help="share of the run; more if unstable")
    add("--weight-decay", type=number(0), nargs=2, default=[0.05, 0.05], help="start end (cosine)")
    add("--decay", default="matrices", choices=DECAY, help="of matrices, also of tokens, of all")
    add("--beta2", type=number(0, 0.99999), default=0.95, help="AdamW; lower if the loss jumps")
    add("--adam-eps", type=number(0), default=1e-6, help="AdamW; published: 1e-8")
    add("--clip-grad", type=number(0), default=3.0, help="largest gradient norm; 0: no clipping")
    add("--clip-each", **flag, help="clip each parameter by itself (DINO)")

    add = parser.add_argument_group("the run").add_argument
    add("--seed", type=whole(0), default=0, help="of every random number")
    add("--device", default="auto", choices="auto cuda mps cpu".split(), help="where to run")
    add("--compile", **flag, help="torch.compile both networks (CUDA)")
    add("--timeout", type=number(1), default=300.0, help="end a job without progress: seconds")
    add("--out-dir", help="folder of the run; default: runs/LOSS-DATA")
    add("--resume", default="auto", help="auto: continue the run in --out-dir; none; or a path")
    add("--save-every", type=positive, default=500, help="steps between checkpoints")
    add("--log-every", type=positive, default=20, help="steps between rows of log.jsonl")
    add("--eval-every", type=positive, help="steps between k-NN evaluations; default: ten per run")
    return parser


def parse(words=None):
    """Options from the command line, else from the recipe, else the defaults of the loss."""
    parser = options()
    with parser.one_line_errors():
        recipe = RECIPES.get(parser.parse_args(words).recipe, {})
        parser.set_defaults(**recipe)
        args = parser.parse_args(words)
        parser.set_defaults(**defaults(args.loss) | recipe)
        if args.teacher_checkpoint:
            parser.set_defaults(teacher="frozen", stages=1, pull_weight=0.0)
        args = parser.parse_args(words)
        args.data = args.data or ("folder" if args.data_path else "textures")
        refuse(args)
        if not any(OBJECTIVES[name].teacher for name in parse_loss(args.loss)):
            args.teacher = "none"
    return args


def refuse(args):
    """ValueError for options that contradict each other, before anything is built or written."""
    terms = {name: OBJECTIVES[name] for name in parse_loss(args.loss)}
    predicting = " and ".join(name for name, term in terms.items() if term.hide)
    for name in defaults(args.loss):  # None: two terms want it differently
        if getattr(args, name) is None:
            option = "--" + name.replace("_", "-")
            raise ValueError(f"--loss {args.loss}: {predicting} have different defaults of "
                             f"{option}: choose one with {option}")
    hide = next((term.hide for term in terms.values() if term.hide), args.hide)
    taught = any(term.teacher for term in terms.values())
    through_head = " and ".join(name for name, term in terms.items() if term.through_head)
    views, viewer = max((term.views, name) for name, term in terms.items())
    least, comparing = max((term.least, name) for name, term in terms.items())
    given = args.teacher_checkpoint
    side = max(1, args.image_size // args.patch_size)
    units = max(1, side // args.mask_unit) ** 2  # a mask hides some of these
    most = round((args.mask_ratio + args.mask_spread) * units)
    uneven = args.mask_ratio and (args.mask_spread or args.mask_probability < 1)
    world = int(os.environ.get("WORLD_SIZE") or 1) if os.environ.get("RANK") else 1
    pieces = args.grad_accum * world
    frozen = "dbot" if "dbot" in terms else "--teacher-checkpoint" if given else (
        f"--stages {args.stages}" if args.stages > 1 else "")
    rules = [
        (args.patch_size > args.image_size, f"--patch-size {args.patch_size} is more than "
         f"--image-size {args.image_size}: lower it"),
        (args.hide != hide,
         f"--hide {args.hide} does not fit {predicting}: it needs --hide {hide}"),
        (args.hide == "drop" and uneven, "--mask-spread and --mask-probability hide more in one "
         "image than in another, and --hide drop needs equal numbers: take --hide token"),
        (args.mask_unit > 1 and args.mask != "random",
         f"--mask-unit {args.mask_unit} belongs to --mask random, not {args.mask}: leave one out"),
        (side % args.mask_unit,
         f"--mask-unit {args.mask_unit} does not divide {side} x {side} patches: take 1"),
        ((predicting or args.mask_ratio or args.mask_spread)
         and not (args.mask_ratio and most and args.mask_probability),
         f"--mask-ratio {args.mask_ratio} with --mask-probability {args.mask_probability} hides "
         f"none of {units} patches or squares, and {predicting or 'a mask'} needs some: raise both "
         "above 0"),
        (most >= units, f"--mask-ratio {args.mask_ratio} (with --mask-spread {args.mask_spread}) "
         f"hides all {units} patches or squares: lower it"),
        (args.global_crops < views, f"--global-crops {args.global_crops}: {viewer} compares "
         f"{views} views of an image: set it to {views}"),
        (not 0 < args.crop_scale[0] <= args.crop_scale[1],
         f"--crop-scale {args.crop_scale}: give smallest and largest area, above 0, in this order"),
        (args.batch_size % pieces or args.batch_size // args.grad_accum < least,
         f"--batch-size {args.batch_size} must be a multiple of {pieces} (processes x "
         f"--grad-accum), with at least {least} images per piece for {comparing}"),
        ("ibot" in terms and args.pool == "cls+mean",
         "--pool cls+mean: ibot has one head for images and patches: take cls or mean"),
        (args.angle_vertices
         and not world <= args.angle_vertices <= args.batch_size // args.grad_accum,
         f"--angle-vertices {args.angle_vertices} must lie between the number of processes, "
         f"{world}, and of images per piece, {args.batch_size // args.grad_accum}"),
        ("rkd" in terms and not args.distance_weight and not args.angle_weight,
         "--distance-weight 0 and --angle-weight 0 leave nothing to learn: set one"),
        (not taught and (given or args.mask == "attention"),
         ("--teacher-checkpoint" if given else "--mask attention") + " needs a teacher and no term "
         f"of --loss {args.loss} has one: leave it out, or add +rkd"),
        (given and through_head,
         f"--teacher-checkpoint is a backbone and {through_head} reads the head of the teacher: "
         "take rkd, cka, ressl, feature or dbot, or --teacher ema"),
        (given and args.head and "rkd" in terms, f"--head {args.head} has no partner on a "
         "--teacher-checkpoint: leave it out; relations need no common width"),
        (args.teacher_arch and not given, f"--teacher-arch {args.teacher_arch} names the network "
         "of a --teacher-checkpoint: add that, or leave it out"),
        (args.stages > 1 and (given or not taught),
         f"--stages {args.stages}: the next teacher is the student of the last stage, which "
         "--teacher-checkpoint and terms without a teacher do not allow: --stages 1"),
        (args.teacher == "ema" and frozen,
         f"{frozen} has a frozen teacher, not --teacher ema: take --teacher frozen"),
    ]
    for broken, sentence in rules:
        if broken:
            raise ValueError(sentence)


# ---- schedules, order of the images, masks, views ----------------------------------------------

def schedules(step, total, args):
    """Learning rate (linear warm-up, cosine down), weight decay and momentum (cosine) of a step."""
    def cosine(start, end, progress):
        return end + (start - end) * (1 + math.cos(math.pi * progress)) / 2

    warm = round(args.warmup * total)
    if step < warm:  # from 0, as DINO, iBOT, BEiT and MoCo v3
        lr = args.lr * step / max(1, warm - 1)
    else:
        lr = cosine(args.lr, args.min_lr, (step - warm) / max(1, total - warm))
    return lr, cosine(*args.weight_decay, step / total), cosine(args.momentum, 1, step / total)


def sample_order(count, start, stop, args, rank, world):
    """(epoch, indices) of this rank for every piece of every step: one permutation per epoch."""
    steps_per_epoch = count // args.batch_size
    for step in range(start, stop):
        epoch, place = divmod(step, steps_per_epoch)
        if step == start or place == 0:
            order = torch.randperm(count, generator=generator(args.seed, 1, epoch))
        batch = order[place * args.batch_size:(place + 1) * args.batch_size]
        for piece in batch.view(args.grad_accum, world, -1)[:, rank]:
            yield epoch, piece


def draw_masks(args, system, step, piece, views, rank=0, world=1):
    """Masks of this rank's part of the global batch: bool (G·B, N), or None without masks.

    `views`: as the teacher sees them, read by --mask attention alone.
    """
    if not args.mask_ratio:
        return None

    def of_rank(x):  # a draw for all ranks -> this rank's: (G·world·B, ..) -> (G·B, ..)
        x = x.view(args.global_crops, world, -1, *x.shape[1:])
        return x[:, rank].flatten(0, 1)

    count = args.global_crops * (args.batch_size // args.grad_accum)
    random, ratio = generator(args.seed, 2, step, piece), args.mask_ratio
    if args.mask_spread or args.mask_probability < 1:  # each view has its own ratio, or no mask
        ratio = ratio + args.mask_spread * (2 * torch.rand(count, generator=random) - 1)
        ratio = ratio.clamp(min=0) * (torch.rand(count, generator=random) < args.mask_probability)
    if args.mask == "attention":
        seen = [system.teacher.backbone.last_attention(view).mean(1)
                for view in views[:args.global_crops]]
        return attention_mask(torch.cat(seen).float().cpu(),  # a GPU has to finish here
                              of_rank(ratio) if torch.is_tensor(ratio) else ratio)
    unit = dict(unit=args.mask_unit) if args.mask == "random" else {}
    return of_rank(MASKS[args.mask](count, system.student.backbone.grid, ratio, random, **unit))


def open_batches(args, train_set, start, stop, rank, world, device):
    """Batches of this rank from step `start` on: (indices, weak views, strong views)."""
    # local views as in DINO: 96 pixels where the global ones have 224, smaller crops
    small = max(1, round(args.image_size * 96 / 224 / args.patch_size)) * args.patch_size
    n_global, n_local = args.global_crops, args.local_crops
    views = ([(args.image_size, args.crop_scale)] * n_global
             + [(small, (0.05, args.crop_scale[0]))] * n_local)
    return train_batches(
        train_set, sample_order(len(train_set), start, stop, args, rank, world), views, args.seed,
        device, args.workers, weak=args.weak_teacher, bicubic=args.bicubic,
        jitter=args.jitter, saturation=args.saturation, hue=args.hue,
        jitter_probability=args.jitter_probability, grey_probability=args.grey,
        blur_probability=args.blur[:n_global] + [0.5 * any(args.blur)] * n_local,
        solarize_probability=args.solarize[:n_global] + [0.0] * n_local)


# ---- saving and resuming -----------------------------------------------------------------------

def warn(text):
    tqdm.write(f"warning: {text}", file=sys.stderr)


def setting(system):
    """Facts that may change on resume; results are then no longer bitwise identical."""
    return dict(processes=ranks()[1], device=next(system.parameters()).device.type,
                torch=str(torch.__version__), threads=torch.get_num_threads())


def save(args, system, optimizer, **progress):
    """Replace checkpoint.pt atomically, keep the old one as previous.pt -> True if written."""
    state = dict(system.save(), optimizer=optimizer.state_dict(), args=vars(args),
                 setting=setting(system), **progress)
    path = os.path.join(args.out_dir, "checkpoint.pt")
    try:
        write_file(path, lambda file: torch.save(state, file),
                   keep=os.path.join(args.out_dir, "previous.pt"))
    except (OSError, RuntimeError) as error:  # torch makes a RuntimeError of a full disk's OSError
        reason = error.__context__ if isinstance(error.__context__, OSError) else error
        warn(f"step {progress['step']} is not saved: could not write {path} ({reason})")
        return False
    return True


# options that may change on resume
MAY_CHANGE = ("recipe data_path data_fingerprint workers max_steps device compile out_dir resume "
              "save_every log_every eval_every timeout").split()


def differences(old, new, prefix=""):
    """["name value (now other)", ..] for each entry of `new` that `old` lacks or has otherwise."""
    return [f"{prefix}{name.replace('_', '-')} {str(old.get(name))[:60]} (now {value})"
            for name, value in new.items() if name not in old or old[name] != value]


def load_state(state, system, optimizer):
    """Restore networks and optimizer, all or nothing: ValueError where the file does not fit."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    expected = {i: dict(step=torch.tensor(0.0), exp_avg=p, exp_avg_sq=p)
                for i, p in enumerate(parameters)}
    moments = state.get("optimizer", {}).get("state", {})
    wrong = [f"optimizer of parameter {i}: {text}"
             for i, found in moments.items() for text in misfits(expected.get(i, {}), found)]
    if wrong:
        raise ValueError(listed(wrong))
    system.load(state)
    # only the moments: learning rate and weight decay are those of this run's options
    optimizer.load_state_dict(optimizer.state_dict() | dict(state=moments))


def resume(args, system, optimizer):
    """Restore the newest readable checkpoint of this run -> (step, skipped steps, unlogged row)."""
    restarted = any(os.environ.get(f"{launcher}_RESTART_COUNT", "0") != "0"
                    for launcher in ("TORCHELASTIC", "SLURM"))
    if args.resume == "none" and not restarted:  # a launcher repeats the same command
        return 0, 0, {}
    if os.path.isdir(args.resume):
        args.resume = os.path.join(args.resume, "checkpoint.pt")
    ours = [os.path.join(args.out_dir, name) for name in ("checkpoint.pt", "previous.pt")]
    ours = [path for path in ours if os.path.exists(path)]
    # a path begins another run from that state; a state in --out-dir must be of this very run
    given = args.resume not in ("auto", "none")
    new_run = given and (not ours or os.path.realpath(args.resume) in map(os.path.realpath, ours))
    unreadable = []
    for path in [args.resume] if new_run else ours:
        try:
            state = read_file(path)
            step = state.get("step")
            if not isinstance(state.get("args"), dict) or type(step) is not int or step < 0:
                raise ValueError(f"{path} is no checkpoint of train.py")
            break
        except ValueError as error:  # the one before may be intact
            unreadable.append(f"--resume {path}: {error}")
    else:
        if unreadable:
            raise ValueError("; ".join(unreadable) + "; --resume none starts over")
        return 0, 0, {}

    options = {name: x for name, x in vars(args).items() if name not in MAY_CHANGE}
    if given and not new_run:  # a run that began from another path is another run
        options["resume"] = args.resume
    other = differences(state["args"], options, "--")
    if state["args"].get("data_fingerprint", args.data_fingerprint) != args.data_fingerprint:
        other.append(f"other images than {args.data_path} has now")
    had = f"; it had {', '.join(other[:6])}" if other else ""
    if other and not new_run:
        raise ValueError(f"{path} is of another run{had}: choose another --out-dir, the same "
                         "options, --resume none to start over, or --resume with its path")
    try:
        load_state(state, system, optimizer)
    except (ValueError, RuntimeError, AttributeError) as error:
        raise ValueError(f"--resume {path} does not fit: {str(error)[:400]}{had}; --resume none "
                         "starts over") from error
    if ranks()[0] == 0:
        for text in unreadable:
            warn(f"{text}; took the state before")
        changed = ", ".join(differences(state.get("setting", {}), setting(system)))
        if changed:
            changed = f"; it was made with {changed}: from here the run is not bitwise the same"
        print(one_line(f"resumed {path} at step {step}{had}{changed}"))
    return step, state.get("skipped_steps", 0), state.get("row", {}) if ours else {}


def open_folder(args, step):
    """Create and lock --out-dir, write args.json; --resume none renames the files of an old run."""
    try:
        os.makedirs(args.out_dir, exist_ok=True)
        if fcntl:  # the system drops this lock when the process ends, however that happens
            file = os.open(os.path.join(args.out_dir, "lock"), os.O_RDWR | os.O_CREAT)
            try:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except (BlockingIOError, PermissionError):
                raise ValueError(f"--out-dir {args.out_dir} is in use by a running job: wait for "
                                 "its end, or choose another") from None
        if args.resume == "none" and not step:
            for name in ("checkpoint.pt", "previous.pt", "log.jsonl"):
                path = os.path.join(args.out_dir, name)
                free = (f"{path}.old{n or ''}" for n in itertools.count())
                if os.path.exists(path):
                    os.replace(path, next(old for old in free if not os.path.exists(old)))
        write_file(os.path.join(args.out_dir, "args.json"),
                   lambda file: file.write(json.dumps(vars(args), indent=1).encode()))
    except OSError as error:
        if not step:
            raise ValueError(f"--out-dir {args.out_dir} cannot be written: {error}") from error
        warn(f"--out-dir {args.out_dir} cannot be written ({error}): training goes on")


def rounded(x):
    """A float with six digits; None if it is not finite, since JSON has no NaN."""
    if not isinstance(x, float):
        return x
    return float(f"{x:.6g}") if math.isfinite(x) else None


class Log:
    """log.jsonl: one object per logged step, each step once, also after a resume."""

    def __init__(self, folder, start):
        self.path, self.in_file = os.path.join(folder, "log.jsonl"), False
        rows = analyze.read_json_lines(self.path) if os.path.exists(self.path) else []
        self.rows = [row for row in rows if row.get("step", math.inf) <= start]

    def write(self, row):
        """Append a row; the first time, and after a failure to write, write all rows anew."""
        while self.rows and self.rows[-1]["step"] >= row["step"]:
            self.rows.pop()
        self.rows.append({name: rounded(x) for name, x in row.items()})
        new = self.rows[-1:] if self.in_file else self.rows
        lines = [json.dumps(row).encode() + b"\n" for row in new]
        try:
            if self.in_file:
                with open(self.path, "ab") as file:
                    file.writelines(lines)
            else:
                write_file(self.path, lambda file: file.writelines(lines))
            self.in_file = True
        except OSError as error:
            warn(f"could not write {self.path} ({error}): its rows are kept and written later")
            self.in_file = False
        if "knn_top1" in row:
            shown = "step loss knn_top1 raw_pixels_knn_top1 effective_rank images_per_second"
            tqdm.write("  ".join(f"{name} {row[name]:.4g}"
                                 for name in shown.split() if row.get(name) is not None))
        self.warn_of_collapse()

    def warn_of_collapse(self):
        """Warn at the third row in succession whose rank or spread is far below the first row's."""
        known = [row for row in self.rows
                 if None not in (row.get("effective_rank"), row.get("feature_std"))]
        low = [row["effective_rank"] < known[0]["effective_rank"] / 2
               or row["feature_std"] < known[0]["feature_std"] / 10 for row in known[-4:]]
        if low == [False, True, True, True]:
            warn("the effective rank of the points fell below half of its start, or their spread "
                 "below a tenth: they collapse; try a lower --lr, a smaller --pull-weight or a "
                 "--momentum closer to 1")


# ---- evaluation and one step -------------------------------------------------------------------

def report(args, system, sets, signals, log, row):
    """Evaluate if the row asks for it, then log it. A checkpoint holds its row, so a run that is
    killed during the evaluation repeats it on resume."""
    if row.pop("evaluating"):
        row |= evaluate(args, system, sets, signals, controls=row["step"] == 0)
    if log:
        log.write(row)


def evaluate(args, system, sets, signals=(), controls=False):
    """k-NN accuracy of frozen features, plain and centred, in percent, and their rank.

    `controls`: also what training has to beat, the untrained network and raw pixels.
    """
    labelled = [(data.labels >= 0).nonzero().flatten() for data in sets]
    # of large sets 50,000 images, evenly spaced
    some = [x[torch.linspace(0, len(x) - 1, min(len(x), 50000)).long()] for x in labelled]
    vit, device = system.eval_network.backbone, next(system.parameters()).device

    def alive():  # at every batch
        watch(args.timeout)
        if signals:  # by a signal to stop: the state was saved before the evaluation
            sys.exit(128 + max(signals))

    def features(pool):
        return [extract_features(vit, data, args.image_size, pool, device, indices, args.workers,
                                 alive) for data, indices in zip(sets, some)]

    train, test = features(args.pool)
    plain, centered = knn_top1(train, test), knn_top1(train, test, center=True)
    found = dict(knn_top1=plain, knn_top1_centered=centered,
                 test_effective_rank=effective_rank(test[0]))
    if controls:
        found["untrained_knn_top1"] = max(plain, centered)
        found["raw_pixels_knn_top1"] = knn_top1(*features("pixels"), center=True)
    alive()
    return found


def clip(system, limit, each=False):
    """Clip gradients, all together or (DINO) each by itself, or not (0) -> their norm before."""
    parameters = [p for p in system.parameters() if p.grad is not None]
    groups = [[p] for p in parameters] if each else [parameters]
    norms = [nn.utils.clip_grad_norm_(group, limit or math.inf) for group in groups]
    return torch.stack(norms).norm().item()  # the one wait for the GPU in a step


def over_ranks(logs, world):
    """Logged losses as numbers: means over the ranks."""
    values = torch.stack([x.detach().float() for x in logs.values()])
    if world > 1:
        dist.all_reduce(values)
    return dict(zip(logs, (values / world).tolist()))


def agree(signals, data, batches):
    """The largest signal of all ranks; files that any rank could not read count together."""
    received, unreadable = zip(*all_gather((max(signals, default=0), data.unreadable)))
    if any(unreadable):
        for found in unreadable:
            data.unreadable |= found
        try:
            data.report({})
        except DataError as error:
            batches.error = error
    return max(received)


class Prefetched:
    """The pieces of the current batch, and how fast batches came since the last row."""

    def __init__(self, args, pieces):
        self.args, self.pieces, self.error = args, pieces, None
        self.restart()
        self.advance()

    def restart(self):
        self.since, self.waited, self.batches = time.perf_counter(), 0.0, 0

    def advance(self):
        start = time.perf_counter()
        try:
            self.current = [*itertools.islice(self.pieces, self.args.grad_accum)]
        except DataError as error:  # raised when the step in hand is finished
            self.error = error
        self.waited, self.batches = self.waited + time.perf_counter() - start, self.batches + 1

    def speed(self):
        images = self.batches * self.args.batch_size
        return dict(images_per_second=images / (time.perf_counter() - self.since),
                    data_seconds=self.waited / self.batches)


def backward(args, system, network, batch, step, progress):
    """Gradients of one step, summed over its pieces -> loss, logs, points of the last piece."""
    rank, world = ranks()
    device = next(system.parameters()).device
    bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported()
    torch.manual_seed(fold(args.seed, 3, step, rank))  # only drop-path draws from it
    for piece, (_, weak, strong) in enumerate(batch):
        seen = weak if args.weak_teacher else strong  # by the teacher
        mask = draw_masks(args, system, step, piece, seen, rank, world)
        network.require_backward_grad_sync = piece == len(batch) - 1  # DDP: average once
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            loss, logs, points = network(strong, weak, mask, progress)
        # the factor is 1, or NaN where the loss is not finite: the gradient is then NaN too, and
        # its mean over the ranks tells all of them
        (loss * (1 + 0 * loss.detach()) / len(batch)).backward()
    return loss, logs, points


def complain(args, count, step, stop, lr, in_a_row):
    """Warn of a step that is not finite; end the run after five in a row."""
    many, rank = min(5, stop), ranks()[0]
    if in_a_row == 1 and rank == 0:
        warn(f"step {step + 1}: the loss or its gradient is not finite: skipped (after {many} in "
             "a row the run stops)")
    if in_a_row == many:
        order = sample_order(count, step, step + 1, args, 0, 1)
        indices = torch.cat([index for _, index in order]).tolist()
        if rank == 0:
            print(f"step {step + 1}: {many} steps in a row were not finite at lr {lr:.3g}: "
                  f"--resume {os.path.join(args.out_dir, 'checkpoint.pt')}, the last good state, "
                  "with a lower --lr or a longer --warmup; the images of this step are "
                  f"{indices}", file=sys.stderr)
        sys.exit(1)


def listen():
    """{signal: when it first came}, filled by every SIGTERM, SIGINT, SIGHUP and SIGUSR1.

    A second one, more than a second after the first, ends the process at once.
    """
    signals = {}

    def receive(signum, _):
        now = time.monotonic()
        # within a second torchrun and the terminal may both send the same signal
        if now > min(signals.values(), default=now) + 1:
            os._exit(128 + signum)
        signals.setdefault(signum, now)

    if threading.current_thread() is threading.main_thread():  # no other thread can listen
        for name in ("SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1"):
            signum = getattr(signal, name, None)  # Windows lacks two of them
            if signum and not (name == "SIGHUP" and signal.getsignal(signum) == signal.SIG_IGN):
                signal.signal(signum, receive)  # nohup ignores SIGHUP
    return signals


# ---- one run, top to bottom --------------------------------------------------------------------

@record
def main():
    args, parser = parse(), options()
    with parser.one_line_errors():
        # -- processes
        rank, world, device = start_processes(args.device, args.timeout)

        # -- data
        train_set, test_set = load_data(args.data, args.data_path, args.image_size)
        if len(train_set) < args.batch_size:
            raise ValueError(f"--batch-size {args.batch_size} is more than the {len(train_set)} "
                             "training images")
        total = round((args.epochs or 20) * (len(train_set) // args.batch_size))
        total = args.max_steps if args.max_steps and not args.epochs else total
        stop = min(total, args.max_steps or total)
        if stop < args.stages:
            raise ValueError(f"{stop} steps ({len(train_set)} images, batches of "
                             f"{args.batch_size}) are less than one for each of --stages "
                             f"{args.stages}: raise --epochs (now {args.epochs or 'not given'}) "
                             "or --max-steps")

        # -- student, teacher, optimizer. Why --adam-eps is 1e-6 by default: some parameters have no
        # effect (norm.bias on relations, the bias of keys on attention), their gradients are
        # rounding noise, and 1e-8 would turn that noise into full steps
        system = System(args).to(device)
        for network in (system.student, system.teacher):
            if args.compile and network:
                network.backbone.compile()
        parameters = [p for p in system.parameters() if p.requires_grad]
        groups = [dict(params=[p for p in parameters if DECAY[args.decay](p) == decayed])
                  for decayed in (True, False)]
        optimizer = torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, args.beta2),
                                      eps=args.adam_eps, fused=device.type != "mps")

        # -- resume
        args.data_fingerprint = fingerprint(train_set)
        name = args.data_path if args.data == "folder" else args.data
        name = os.path.basename(os.path.abspath(name))
        args.out_dir = args.out_dir or f"runs/{args.loss.replace('*', 'x')}-{name}"
        start, skipped, row = resume(args, system, optimizer)
        seen = all_gather((start, len(train_set)))
        if len({*seen}) > 1:
            raise ValueError(f"by rank, (step, images) are {seen}: all must see the same files")
        if rank == 0:
            open_folder(args, start)
    try:
        status = train(args, system, optimizer, (train_set, test_set), start, stop, total, skipped,
                       row)
    except DataError as error:
        parser.error(error)
    watch(None)
    if world > 1:
        dist.destroy_process_group()
    return status


def train(args, system, optimizer, sets, start, stop, total, skipped, row):
    """The loop from step `start` to `stop` -> exit status; `row`: not yet logged at `start`."""
    (rank, world), (train_set, test_set), signals = ranks(), sets, listen()
    device = next(system.parameters()).device
    network = nn.parallel.DistributedDataParallel(system) if world > 1 else system
    stage_length, every = math.ceil(total / args.stages), args.eval_every or math.ceil(stop / 10)
    log = Log(args.out_dir, start) if rank == 0 else None
    if start == 0:
        row = dict(step=0, epoch=0.0, evaluating=test_set is not None)
    if row:
        report(args, system, sets, signals, log, row)
    batches = Prefetched(args, open_batches(args, train_set, start, stop, rank, world, device))
    bar = tqdm(initial=start * args.batch_size, total=stop * args.batch_size, unit="img",
               unit_scale=True, disable=None if rank == 0 else True)
    done, in_a_row, stopped_by, saved = start, 0, 0, True
    for step in range(start, stop):
        watch(args.timeout)
        if batches.error:  # the images cannot be read any more
            if rank == 0:
                save(args, system, optimizer, step=step, skipped_steps=skipped)
            raise batches.error
        stage, stage_step = divmod(step, stage_length)
        if stage and stage_step == 0:  # the first step of a later stage
            system.next_stage(stage)
        lr, decay, momentum = schedules(stage_step, stage_length, args)
        for group, weight_decay in zip(optimizer.param_groups, (decay, 0)):
            group.update(lr=lr, weight_decay=weight_decay)
        centers = dict(system.state)
        loss, logs, points = backward(args, system, network, batches.current, step,
                                      stage_step / stage_length)
        batches.advance()  # while a GPU still computes
        norm = clip(system, args.clip_grad, args.clip_each)
        finite = math.isfinite(norm)
        if finite:
            if stage_step < args.freeze_last_layer * stage_length:
                system.student.freeze_prototypes()
            optimizer.step()
            if args.teacher == "ema":
                ema_update(system.teacher, system.student, momentum)
            in_a_row = 0
        else:  # the step leaves no trace but its count
            system.state, skipped, in_a_row = centers, skipped + 1, in_a_row + 1
            complain(args, len(train_set), step, stop, lr, in_a_row)
        optimizer.zero_grad()
        done = step + 1
        bar.update(args.batch_size)
        evaluating = test_set is not None and (done % every == 0 or done == stop)
        saving = evaluating or done % args.save_every == 0 or done == stop
        logging = saving or done == 1 or done % args.log_every == 0
        if logging or device.type == "cpu":  # a GPU would have to wait at every step
            stopped_by = agree(signals, train_set, batches)
        if logging or stopped_by:
            row = dict(step=done, epoch=done * args.batch_size / len(train_set),
                       **over_ranks(dict(loss=loss, **logs), world), lr=lr,
                       weight_decay=decay, momentum=momentum, gradient_norm=norm,
                       **(panel(*points) if finite else {}), skipped_steps=skipped,
                       **batches.speed(), evaluating=evaluating)
            # save before the evaluation, which can take long, but not while steps are skipped
            if rank == 0 and ((saving and finite) or stopped_by or done == stop):
                saved = save(args, system, optimizer, step=done, skipped_steps=skipped, row=row)
            if not (stopped_by and evaluating):  # then the resumed run evaluates
                report(args, system, sets, signals, log, row)
            batches.restart()
        if stopped_by:
            break
    bar.close()
    if rank == 0:
        # the folder was deleted, or --resume began from a finished run in another folder
        if not os.path.exists(os.path.join(args.out_dir, "checkpoint.pt")):
            saved = save(args, system, optimizer, step=done, skipped_steps=skipped)
        finish(args, sets, done, total, stopped_by, saved)
    # 128 + signal tells a scheduler to start the same command again
    return (128 + stopped_by if stopped_by else 0) if saved else 1


def finish(args, sets, done, total, stopped_by, saved):
    """Draw the pictures and say where everything is; an error in a picture is only a warning."""
    try:
        analyze.curves(args.out_dir)
        if not stopped_by:  # seconds count then
            analyze.masks(args.out_dir, args.data_path, args.teacher_checkpoint, sets)
    except Exception as error:
        warn(f"could not draw into {args.out_dir} ({type(error).__name__}: {error})")
    if saved:
        print(f"{'stopped' if stopped_by else 'finished'} at step {done} of {total}: see "
              f"{args.out_dir}")
    else:
        print(f"step {done} of {total} is NOT saved: make room in {args.out_dir}, and the same "
              "command continues from its last saved step", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
