"""How fast, against what? Every row is a ratio to a plain reference of the same mathematics.

    ratio = time of the reference / time of ours, both in this process, taking turns

    angle N        angle relation of N points; reference: all cosines at once
    ibot, dino     training step, 2 x 224 px, batch 8; reference: a forward per view
    dropped        student with 75 % of its patches left out; reference: mask tokens
    fresh views    training step at 32 px with new views; reference: the same views again
    views          500 x 375 JPEGs to 2 x 224 + 8 x 96 px; reference: PIL
    block masks    1024 masks of 14 x 14 patches; reference: BEiT's generator
    k-NN           200 queries, four k; reference: one search per k
    probe          linear probe at ten learning rates; reference: one probe per learning rate
    train          on a GPU, without a reference: images/s, peak memory and utilisation

tests/test_bench.py holds each reference to our result. A ratio can be checked on any machine,
seconds cannot. Printed are medians, quartiles of the ratio and peak memory: of the process on a
CPU (Linux, one thread), of the allocator on a GPU.

    python bench.py --quick              # two minutes; without it, ten
    python bench.py --only angle views   # some rows
    python bench.py --scale scale.png    # time and memory of the relations as their points grow
    python bench.py --only train --arch vit_small --batch-size 256         # on a GPU
"""
import ctypes
import io
import json
import math
import multiprocessing
import random
import statistics
import time
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
import torchvision.transforms as T
from PIL import Image, ImageFilter
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from torchvision.io import encode_jpeg

import train
from data import MEAN, STD, Folder, load_data, train_batches
from eval_knn import Parser, knn_scores, whole
from eval_linear import Heads
from losses import rkd_angle_loss, rkd_distance_loss
from masking import block_mask, random_mask
from model import ARCHS, ema_update
from objectives import System


# ---- relations -----------------------------------------------------------------------------------

def dense_distance(student, teacher):
    """RKD-D from all differences: (N, N, D) in memory."""
    def normalized(x):
        distances = (x.unsqueeze(0) - x.unsqueeze(1)).norm(dim=-1)
        return distances / (distances.sum() / (N * (N - 1)))

    N = len(student)
    loss = F.smooth_l1_loss(normalized(student), normalized(teacher.detach()))
    return loss * N / (N - 1)  # distinct pairs only


def dense_angle(student, teacher):
    """RKD-A from all unit vectors (N, N, D) and all cosines (N, N, N)."""
    def cosines(x):
        unit = F.normalize(x.unsqueeze(0) - x.unsqueeze(1), dim=-1)
        return unit @ unit.mT

    N = len(student)
    loss = F.smooth_l1_loss(cosines(student), cosines(teacher.detach()))
    return loss * N**2 / ((N - 1) * (N - 2))  # distinct triplets only


def relation(loss, N, device):
    """Forward and backward of a relation between N points, as a function to time."""
    student, teacher = torch.randn(2, N, 256, device=device)
    student.requires_grad_()
    return lambda: torch.autograd.grad(loss(student, teacher), student)


# ---- a step of training --------------------------------------------------------------------------

def plain_vit(vit, images, mask=None):
    """The same network as written on paper: a convolution, explicit attention -> (B, 1 + N, D)."""
    x = vit.patch_embed.proj(images).flatten(2).mT
    if mask is not None:
        x = torch.where(mask.unsqueeze(-1), vit.mask_token, x)
    x = torch.cat([vit.cls_token.expand(len(x), -1, -1), x], 1) + vit.pos_embed
    for block in vit.blocks:
        q, k, v = block.attn.heads(block.norm1(x))
        mixed = (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1) @ v
        x = x + block.attn.proj(mixed.transpose(1, 2).flatten(2))
        x = x + block.mlp(block.norm2(x))
    return vit.norm(x)


def plain_dino(system, views, mask=None):
    """DINO of two views, a forward per view; with a mask iBOT, the head on every token."""
    def logits(network, view, hidden=None):
        return network.heads[name](plain_vit(network.backbone, view, hidden)[:, tokens])

    def cross_entropy(student, teacher, center):
        target = ((teacher - center) / system.args.teacher_temperature[0]).softmax(-1)
        return -(target * (student / system.args.temperature).log_softmax(-1)).sum(-1)

    name, tokens, masks = "dino", slice(0, 1), [None, None]
    if mask is not None:
        name, tokens, masks = "ibot", slice(None), mask.to(views[0].device).chunk(2)
    with torch.no_grad():
        teacher = [logits(system.teacher, view) for view in views]  # (B, 1 or 1 + N, K) each
    student = [logits(system.student, *both) for both in zip(views, masks)]
    state, loss = system.state, 0
    for s, t, other, hidden in zip(student, teacher, teacher[::-1], masks):
        loss = loss + cross_entropy(s[:, 0], other[:, 0], state[name]).mean() / 2
        if mask is not None:
            each = cross_entropy(s[:, 1:], t[:, 1:], state["ibot_patch"]) * hidden  # (B, N)
            loss = loss + (each.sum(1) / hidden.sum(1).clamp_min(1)).mean() / 2
    mean = (teacher[0] + teacher[1]).mean(0) / 2  # (1 or 1 + N, K)
    state[name] = 0.9 * state[name] + 0.1 * mean[0]
    if mask is not None:
        state["ibot_patch"] = 0.9 * state["ibot_patch"] + 0.1 * mean[1:].mean(0)
    return loss


def plain_ema(teacher, student, momentum):
    for t, s in zip(teacher.parameters(), student.parameters()):  # predictors come last
        t.data.mul_(momentum).add_((1 - momentum) * s.detach())


def training_system(loss, arch, device, batch, size=224, **options):
    """(system, views, mask) of one batch, with the published heads."""
    options = {"image-size": size, "patch-size": 16, "pool": "cls", "prototypes": 8192,
               "projection": 256, "head-hidden": 2048, "temperature": 0.1} | options
    args = train.parse([f"--loss={loss}", f"--arch={arch}", f"--batch-size={batch}",
                        "--no-head-batchnorm", *(f"--{name}={x}" for name, x in options.items())])
    system = System(args).to(device)
    views = list(torch.randn(args.global_crops, batch, 3, size, size).to(device))
    return system, views, train.draw_masks(args, system, 0, 0, views)


def stepper(system, plain=False, autocast=False):
    """A function of (views, mask): loss, gradient, clipping, AdamW and moving average."""
    parameters = [p for p in system.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, foreach=False, fused=not plain)

    def step(views, mask):
        with torch.autocast(views[0].device.type, torch.bfloat16, enabled=autocast):
            loss = plain_dino(system, views, mask) if plain else system(views, views, mask)[0]
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 3.0)
        optimizer.step()
        optimizer.zero_grad()
        if system.teacher:
            (plain_ema if plain else ema_update)(system.teacher, system.student, 0.99)
    return step


def training_step(loss, arch, device):
    contenders = []
    for plain in (True, False):
        system, views, mask = training_system(loss, arch, device, 8)
        contenders.append(partial(stepper(system, plain), views, mask))
    return contenders


def fresh_views(device, batch):
    system, _, mask = training_system("rkd", "vit_mini", device, batch, 32, **{"patch-size": 4})
    data, _ = load_data("textures")
    batches = train.open_batches(system.args, data, 0, 10**9, 0, 1, torch.device(device))
    step, (_, _, same) = stepper(system), next(batches)
    return lambda: step(same, mask), lambda: step(next(batches)[2], mask)


def dropped(device):
    """Forward and backward of a student with mask tokens, and with hidden patches left out."""
    vit = ARCHS["vit_tiny"]().to(device)
    images, mask = torch.randn(8, 3, 224, 224, device=device), random_mask(8, vit.grid, 0.75)
    return (lambda: vit(images, mask).square().mean().backward(),
            lambda: vit(images, mask, drop=True).square().mean().backward())


# ---- views and masks -----------------------------------------------------------------------------

MULTI_CROP = [(224, (0.4, 1.0))] * 2 + [(96, (0.05, 0.4))] * 8
BLUR, SOLARIZE = [1.0, 0.1] + [0.5] * 8, [0.0, 0.2] + [0.0] * 8  # probabilities per view


def photographs(count, folder=None):
    """JPEGs as bytes: of a folder, or noise of two scales at ImageNet's median size."""
    if folder:
        return [path.read_bytes() for path in sorted(Path(folder).rglob("*.[jJ]*[gG]"))[:count]]
    generator, pixels = torch.Generator().manual_seed(0), 0.5
    for amplitude, cell in ((0.2, 32), (0.05, 2)):
        noise = torch.randn(count, 3, 375 // cell, 500 // cell, generator=generator)
        pixels = pixels + amplitude * F.interpolate(noise, (375, 500), mode="bicubic")
    return [encode_jpeg(x, quality=92).numpy().tobytes()
            for x in (255 * pixels.clamp(0, 1)).byte()]


def pil_pipeline(crop, blur, solarize):
    """DINO's augmentation of one crop: operations of torchvision and PIL in the published order."""
    def blurred(image):
        return image.filter(ImageFilter.GaussianBlur(random.uniform(0.1, 2)))

    return T.Compose([
        T.RandomResizedCrop(*crop, interpolation=T.InterpolationMode.BICUBIC),
        T.RandomHorizontalFlip(), T.RandomApply([T.ColorJitter(0.4, 0.4, 0.2, 0.1)], p=0.8),
        T.RandomGrayscale(0.2), T.RandomApply([blurred], p=blur),
        T.RandomSolarize(128, p=solarize), T.ToTensor(), T.Normalize(MEAN, STD)])


def views(files):
    """JPEG bytes -> ten batches of views: PIL crop by crop, and ours."""
    pipelines = [pil_pipeline(*view) for view in zip(MULTI_CROP, BLUR, SOLARIZE)]
    folder = Folder([io.BytesIO(file) for file in files], [0] * len(files), ["one"])

    def plain():
        images = [Image.open(io.BytesIO(file)).convert("RGB") for file in files]
        return [torch.stack([pipeline(image) for image in images]) for pipeline in pipelines]

    def ours():
        batches = train_batches(folder, [(0, torch.arange(len(files)))], MULTI_CROP, 0,
                                torch.device("cpu"), weak=False, jitter=0.4, hue=0.1,
                                blur_probability=BLUR, solarize_probability=SOLARIZE)
        return next(batches)[2]
    return plain, ours


def one_block_mask(side, count):
    """BEiT's generator for one image: rectangle by rectangle, cell by cell."""
    mask, hidden = [[False] * side for _ in range(side)], 0
    while hidden < count:
        area = random.uniform(16, max(16, count - hidden))
        aspect = math.exp(random.uniform(math.log(0.3), math.log(1 / 0.3)))
        height, width = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if height < side and width < side:
            top, left = random.randint(0, side - height), random.randint(0, side - width)
            for i in range(top, top + height):
                for j in range(left, left + width):
                    if not mask[i][j] and hidden < count:
                        mask[i][j] = True
                        hidden += 1
    return mask


def block_masks(batch):
    return (lambda: torch.tensor([one_block_mask(14, 78) for _ in range(batch)]),  # 40 %
            lambda: block_mask(batch, (14, 14), 0.4))


# ---- evaluation ----------------------------------------------------------------------------------

def knn(references, tests, ks=(10, 20, 100, 200), D=384, device="cpu", classes=1000):
    """DINO's k-NN: a search per k, one-hot votes, a hundred tests at a time; and ours."""
    known, asked = torch.randn(references + tests, D, device=device).split([references, tests])
    labels = torch.randint(classes, (references,), device=device)

    def plain(k):
        scores = []
        for part in F.normalize(asked, dim=1).split(100):
            cos, nearest = (part @ F.normalize(known, dim=1).T).topk(k)
            votes = F.one_hot(labels[nearest], classes)
            scores.append((votes * (cos / 0.07).exp().unsqueeze(2)).sum(1))
        return torch.cat(scores)

    return (lambda: [plain(k) for k in ks],
            lambda: knn_scores(known, labels, asked, classes, ks))


def probe(count, epochs, D=384, classes=10, device="cpu"):
    """Ten probes, each with its layer, optimizer and schedule, and ours: ten heads at once."""
    lrs = [1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 0.1, 0.3, 1.0, 3.0]
    features = torch.randn(count, D, device=device)
    labels = torch.randint(classes, (count,), device=device)
    batches = list(zip(features.split(1024), labels.split(1024))) * epochs

    def plain(lr):
        layer = nn.Linear(D, classes, device=device)
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)
        optimizer = torch.optim.SGD(layer.parameters(), lr=lr, momentum=0.9)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, len(batches))
        for x, y in batches:
            optimizer.zero_grad()
            F.cross_entropy(layer(x), y).backward()
            optimizer.step()
            schedule.step()
        return layer

    def ours():
        heads = Heads(lrs, D, classes, device)
        for number, (x, y) in enumerate(batches):
            heads.step(x, y, number / len(batches))
        return heads
    return lambda: [plain(lr) for lr in lrs], ours


# ---- the table -----------------------------------------------------------------------------------

def rows(device, quick, images):
    """name -> (maker of (reference, ours), items per call)."""
    def angle(N):
        return lambda: [relation(loss, N, device) for loss in (dense_angle, rkd_angle_loss)]

    files, known, features = (4, 10000, 5000) if quick else (8, 50000, 20000)
    batch = 64 if device == "cpu" else 512
    table = {"angle 256": (angle(256), 1),
             "ibot vit_tiny": (partial(training_step, "ibot", "vit_tiny", device), 8),
             "dino vit_tiny": (partial(training_step, "dino", "vit_tiny", device), 8),
             "dropped": (partial(dropped, device), 8),
             "fresh views": (partial(fresh_views, device, batch), batch)}
    if device == "cpu":
        table["views"] = (lambda: views(photographs(files, images)), files)
        table["block masks"] = (partial(block_masks, 1024), 1024)
    table["k-NN"] = (partial(knn, known, 200, device=device), 200)
    table["probe"] = (partial(probe, features, 2, device=device), 1)
    if not quick:
        table["angle 512"] = (angle(512), 1)
        table["ibot vit_small"] = (partial(training_step, "ibot", "vit_small", device), 8)
    return table


def interleaved(contenders, device, seconds):
    """Times of each contender, taking turns for so many seconds; the first turn is a warm-up."""
    def timed(run):
        start = time.perf_counter()
        run()
        if device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start

    rounds, start = [], time.monotonic()
    while len(rounds) < 4 or time.monotonic() - start < seconds:
        rounds.append([timed(run) for run in contenders])
    return list(zip(*rounds[1:]))


def peak_memory(run, device):
    """Bytes that a call needs at most beyond what is there; None where that cannot be measured."""
    if device == "cuda":
        run()  # allocates what stays: workspaces, gradients, the state of AdamW
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        return torch.cuda.max_memory_allocated() - before
    if not Path("/proc/self/clear_refs").exists() or torch.get_num_threads() > 1:
        return None

    def peak():
        return 1024 * int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])

    def measured():  # in a child, because its allocator is made to return all freed memory
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(-3, 2**16)  # M_MMAP_THRESHOLD
        run()  # the same, and code is read into memory
        libc.malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # resets the peak to what is there
        before = peak()
        run()
        found.value = peak() - before

    fork = multiprocessing.get_context("fork")
    found, child = fork.Value("q"), fork.Process(target=measured)
    child.start()
    child.join()
    return found.value if child.exitcode == 0 else None


def measure(name, make, items, device, seconds):
    """Print a row of the table, and return it as plain numbers."""
    contenders = make()
    peaks = [peak_memory(run, device) for run in contenders]  # while the heap is unused
    times = interleaved(contenders, device, seconds)
    reference, ours = (statistics.median(each) for each in times)
    low, ratio, high = statistics.quantiles([a / b for a, b in zip(*times)], n=4,
                                            method="inclusive")
    print(f"{name:<16}{1000 * reference:9.2f} ms{1000 * ours:9.2f} ms{ratio:8.2f} x"
          f" ({low:.2f} .. {high:.2f})   {' '.join(f'{x / 1e6:.0f} MB' for x in peaks if x)}",
          flush=True)
    return dict(row=name, repetitions=len(times[0]), seconds=ours, reference_seconds=reference,
                ratio=ratio, ratio_quartiles=[low, high], items_per_second=items / ours,
                peak_bytes=peaks[1], reference_peak_bytes=peaks[0])


def training(args, compiled):
    """Images/s, peak memory and utilisation of a GPU that trains --arch in bf16.

    Utilisation is against the FLOP/s that a large bf16 matrix product reaches in the same run.
    """
    system, *batch = training_system(args.loss, args.arch, args.device, args.batch_size,
                                     args.image_size)
    step = partial(stepper(system, autocast=True), *batch)
    with FlopCounterMode(display=False) as counter:
        step()
    for network in (system.student, system.teacher):
        if compiled and network:
            network.backbone.compile()
    a, b = torch.randn(2, 8192, 8192, device=args.device, dtype=torch.bfloat16)
    seconds, product = (statistics.median(interleaved([run], args.device, 10)[0])
                        for run in (step, lambda: a @ b))
    return dict(row=f"train {args.arch}{', compiled' * compiled}", seconds=seconds,
                items_per_second=args.batch_size / seconds,
                utilisation=counter.get_total_flops() / seconds / (2 * 8192**3 / product),
                peak_bytes=peak_memory(step, args.device))


def scale(path, device):
    """Draw time and memory of both relations against the number of points, ours and dense."""
    from matplotlib.figure import Figure
    figure = Figure(figsize=(11, 4), layout="constrained")
    axes = figure.subplots(1, 2)
    for loss, style in ((rkd_angle_loss, "o-"), (dense_angle, "o:"),
                        (rkd_distance_loss, "s-"), (dense_distance, "s:")):
        sizes = [64, 128, 256, 512, 1024][:4 if loss is dense_angle else 5]  # 1024 need 20 GB
        runs = [relation(loss, N, device) for N in sizes]
        peaks = [peak_memory(run, device) for run in runs]  # while the heap is unused
        seconds = [statistics.median(interleaved([run], device, 1)[0]) for run in runs]
        print(json.dumps(dict(loss=loss.__name__, N=sizes, seconds=seconds, bytes=peaks)))
        axes[0].loglog(sizes, seconds, style, label=loss.__name__)
        axes[1].loglog(sizes, peaks, style)
    for place, quantity in zip(axes, ("seconds", "bytes")):
        place.set(xlabel="points N (D = 256)", ylabel=f"{quantity}, forward and backward")
        place.grid(alpha=0.3)
    axes[0].legend()
    figure.savefig(path)


def main():
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--quick", action="store_true", help="smaller rows, fewer repetitions")
    add("--only", nargs="+", metavar="WORD", help="rows that start so, as angle, views; train: GPU")
    add("--images", help="folder of JPEGs for the views; default: noise of ImageNet's median size")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cuda", "cpu"],
        help="where to run")
    add("--threads", type=whole(1), default=1, help="of a CPU")
    add("--scale", metavar="PNG", help="draw the cost of relations instead of the table")
    add("--loss", default="rkd", help="train: what to learn by")
    add("--arch", default="vit_small", choices=ARCHS, help="train: the ViT")
    add("--image-size", type=whole(1), default=224, help="train: side in pixels")
    add("--batch-size", type=whole(1), default=256, help="train: images per step")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    where = torch.cuda.get_device_name() if args.device == "cuda" else "CPU"
    print(f"torch {torch.__version__}, {where}, {args.threads} thread(s)")
    if args.scale:
        return scale(args.scale, args.device)
    words = tuple(args.only or [""])  # every name starts with ""
    every = rows(args.device, args.quick, args.images)
    table = {name: row for name, row in every.items() if name.startswith(words)}
    in_training = args.device == "cuda" and "train".startswith(words)
    if not table and not in_training:
        parser.error(f"--only {' '.join(words)}: no such row on {args.device}: take "
                     f"the first words of {', '.join(every)} or, on a GPU, train")
    print("row                reference        ours   ratio (quartiles)    peak memory of both")
    results = [measure(name, *row, args.device, 3 if args.quick else 15)
               for name, row in table.items()]
    if in_training:
        results += [training(args, compiled) for compiled in (False, True)]
    for result in results:
        print(json.dumps(result))


if __name__ == "__main__":
    main()
