"""How fast, against what? Every row is a ratio to a plain reference of the same mathematics.

    ratio = time of the reference / time of ours, both in this process, taking turns

The references stand here, written as the papers' own code does it: a tensor of all differences, a
forward a view, a loop over parameters. tests/test_bench.py holds each to what it is compared with,
in float64. A ratio can be checked on any machine; seconds cannot. Medians of interleaved
repetitions, with the quartiles of the ratio; on a CPU one thread and the peak of the resident
memory (Linux), on a GPU that of the allocator.

    python bench.py --quick              # two minutes; without it, ten
    python bench.py --only angle views   # some rows
    python bench.py --scale scale.png    # the cost of relations, steps and processes as they grow
    python bench.py --only train --arch vit_small --batch-size 256         # on a GPU: images/s, MFU

Left out: absolute claims about other people's code, which has other aims.
"""
import contextlib
import ctypes
import io
import itertools
import json
import math
import os
import platform
import random
import socket
import statistics
import sys
import tempfile
import time
from functools import partial

import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision.transforms as T
from PIL import Image, ImageFilter, ImageOps
from torch import nn

import train
from data import (COLOUR_DRAWS, MEAN, STD, Images, collate, colour, coloured, cut, train_batches,
                  unit)
from eval_knn import Parser, knn_scores, whole
from eval_linear import Heads
from losses import rkd_angle_loss, rkd_distance_loss
from masking import block_mask, random_mask
from model import ARCHS, VisionTransformer, ema_update
from objectives import System, gather
from randomness import uniform
from textures import TEXTURES, textures


# ---- relations -----------------------------------------------------------------------------------

def dense_distance(student, teacher):
    """RKD-D from all differences: (N, N, D) in memory."""
    def normalized(x):
        distances = (x.unsqueeze(0) - x.unsqueeze(1)).norm(dim=-1)
        N = len(x)
        return distances / (distances.sum() / (N * (N - 1)))

    N = len(student)
    with torch.no_grad():
        target = normalized(teacher)
    return F.smooth_l1_loss(normalized(student), target) * N / (N - 1)


def dense_angle(student, teacher):
    """RKD-A from all unit vectors (N, N, D) and all cosines (N, N, N)."""
    def cosines(x):
        unit = F.normalize(x.unsqueeze(0) - x.unsqueeze(1), dim=-1)
        return unit @ unit.mT

    N = len(student)
    with torch.no_grad():
        target = cosines(teacher)
    return F.smooth_l1_loss(cosines(student), target) * N**2 / ((N - 1) * (N - 2))


def relation(N, ours, dense, device, D=256):
    student = torch.randn(N, D, device=device, requires_grad=True)
    teacher = torch.randn(N, D, device=device)

    def step(loss):
        def run():
            student.grad = None
            loss(student, teacher).backward()
        return run
    return step(dense) if dense else None, step(ours)


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


def plain_cross_entropy(student, teacher, center, args):
    target = ((teacher - center) / args.teacher_temperature[0]).softmax(-1)
    return -(target * (student / args.temperature).log_softmax(-1)).sum(-1)


def plain_dino(system, views, mask=None):
    """DINO, a forward for each view; mask: iBOT, with the head on every token of every view."""
    args, name = system.args, "dino" if mask is None else "ibot"
    masks = [None] * len(views) if mask is None else mask.chunk(len(views))
    student, teacher = system.student, system.teacher
    with torch.no_grad():
        theirs = [plain_vit(teacher.backbone, view) for view in views]
        theirs = [teacher.heads[name](x if mask is not None else x[:, 0]) for x in theirs]
    ours = [plain_vit(student.backbone, *both) for both in zip(views, masks)]
    ours = [student.heads[name](x if mask is not None else x[:, 0]) for x in ours]
    if mask is None:
        pairs = [(s, t) for (i, s), (j, t) in itertools.product(enumerate(ours), enumerate(theirs))
                 if i != j]
        loss = sum(plain_cross_entropy(*pair, system.state[name], args).mean() for pair in pairs)
        batch = torch.cat(theirs).mean(0)
        system.state[name] = 0.9 * system.state[name] + 0.1 * batch
        return loss / len(pairs)
    image = sum(plain_cross_entropy(ours[i][:, 0], theirs[1 - i][:, 0], system.state[name],
                                    args).mean() for i in range(2)) / 2
    patch = 0
    for s, t, hidden in zip(ours, theirs, masks):
        each = plain_cross_entropy(s[:, 1:], t[:, 1:], system.state["ibot_patch"], args)
        patch = patch + ((each * hidden).sum(1) / hidden.sum(1).clamp_min(1)).mean() / 2
    for key, part in ((name, slice(0, 1)), ("ibot_patch", slice(1, None))):
        batch = torch.stack([t[:, part] for t in theirs]).mean((0, 1, 2))
        system.state[key] = 0.9 * system.state[key] + 0.1 * batch
    return image + patch


def plain_ema(teacher, student, momentum):
    for t, s in zip(teacher.parameters(), student.parameters()):  # predictors come last
        t.data.mul_(momentum).add_((1 - momentum) * s.detach())


def training_system(loss, arch, device, batch, size=224, **options):
    """(system, views, mask) of one batch, with the published heads."""
    words = {"loss": loss, "arch": arch, "image-size": size, "patch-size": 16, "pool": "cls",
             "prototypes": 8192, "projection": 256, "head-hidden": 2048} | options
    args = train.parse([*itertools.chain(*(([f"--{name}", str(x)]) for name, x in words.items())),
                        "--no-head-batchnorm"])
    args.temperature = args.temperature or 0.1
    system = System(args).to(device)
    random_numbers = torch.Generator().manual_seed(0)
    views = [torch.randn(batch, 3, size, size, generator=random_numbers).to(device)
             for _ in range(args.global_crops)]
    args.batch_size, args.grad_accum = batch, 1
    return system, views, train.draw_masks(args, system, 0, 0, views)


def step(loss, arch, device, batch):
    """A whole step, plain and ours: loss, gradient, clipping, AdamW, moving average."""
    def contender(plain):
        system, views, mask = training_system(loss, arch, device, batch)
        parameters = [p for p in system.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(parameters, lr=1e-4, foreach=False, fused=not plain)

        def run():
            if plain:
                value = plain_dino(system, views, mask)
            else:
                value = system(views, views, mask)[0]
            value.backward()
            nn.utils.clip_grad_norm_(parameters, 3.0)
            optimizer.step()
            optimizer.zero_grad()
            (plain_ema if plain else ema_update)(system.teacher, system.student, 0.99)
        return run
    return contender(True), contender(False)


def fresh_views(device, batch):
    """A step of `rkd` on images of 32 px in memory: the same views again, or new ones each time."""
    system, _, mask = training_system("rkd", "vit_mini", device, batch, 32, **{"patch-size": 4})
    data, parameters = Images(*textures(2000, 0)[:2], TEXTURES), list(system.student.parameters())
    orders = ((0, torch.randperm(len(data))[:batch]) for _ in itertools.count())
    batches = train_batches(data, orders, [(32, (0.4, 1.0))] * 2, 0, torch.device(device),
                            weak=False, jitter=0.4, hue=0.1)
    _, _, again = next(batches)
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, fused=True)

    def run(views):
        system(views, views, mask)[0].backward()
        optimizer.step()
        optimizer.zero_grad()
        ema_update(system.teacher, system.student, 0.99)
    return lambda: run(again), lambda: run(next(batches)[2])


def dropped(arch, device, batch, ratio=0.75, side=224):
    """Forward and backward of a student with mask tokens, and with hidden patches left out."""
    vit = ARCHS.get(arch, arch)(image_size=side, patch_size=16).to(device)
    images = torch.randn(batch, 3, side, side, device=device)
    mask = random_mask(batch, vit.grid, ratio)

    def run(drop):
        return lambda: vit(images, mask, drop).square().mean().backward()
    return run(False), run(True)


# ---- views and masks -----------------------------------------------------------------------------

MULTI_CROP = [(224, (0.4, 1.0))] * 2 + [(96, (0.05, 0.4))] * 8
COLOURS = [dict(jitter=0.4, hue=0.1, grey_probability=0.2, blur_probability=blur,
                solarize_probability=solarize)
           for blur, solarize in [(1.0, 0.0), (0.1, 0.2)] + [(0.5, 0.0)] * 8]


def photographs(count, folder=None, width=500, height=375):
    """JPEGs of ImageNet's median size, as bytes: noise of two scales, or those in a folder."""
    if folder:
        found = [os.path.join(place, name) for place, _, names in os.walk(folder)
                 for name in sorted(names) if name.lower().endswith((".jpg", ".jpeg"))]
        return [open(path, "rb").read() for path in sorted(found)[:count]]
    made, generator = [], torch.Generator().manual_seed(0)
    for _ in range(count):
        x = 0.5 + sum(scale * F.interpolate(torch.randn(1, 3, height // coarse, width // coarse,
                                                        generator=generator), (height, width),
                                            mode="bicubic")[0]
                      for scale, coarse in ((0.2, 32), (0.05, 2)))
        file = io.BytesIO()
        T.functional.to_pil_image(x.clamp(0, 1)).save(file, "JPEG", quality=92)
        made.append(file.getvalue())
    return made


def pil_pipeline(size, scale, blur_probability, solarize_probability, **_):
    """DINO's augmentation of one crop: operations of torchvision and PIL in the published order."""
    def maybe(probability, change):
        return lambda image: change(image) if random.random() < probability else image
    return T.Compose([
        T.RandomResizedCrop(size, scale=scale, interpolation=T.InterpolationMode.BICUBIC),
        T.RandomHorizontalFlip(), T.RandomApply([T.ColorJitter(0.4, 0.4, 0.2, 0.1)], p=0.8),
        T.RandomGrayscale(0.2),
        maybe(blur_probability, lambda image: image.filter(
            ImageFilter.GaussianBlur(random.uniform(0.1, 2)))),
        maybe(solarize_probability, ImageOps.solarize), T.ToTensor(), T.Normalize(MEAN, STD)])


def views(images, on_device=False):
    """Bytes -> batches of ten views: PIL crop by crop, and ours. on_device: colours cost nothing
    here, for a GPU makes them."""
    pipelines = [pil_pipeline(*view, **options) for view, options in zip(MULTI_CROP, COLOURS)]

    def plain():
        pictures = [Image.open(io.BytesIO(file)).convert("RGB") for file in images]
        return [torch.stack([change(picture) for picture in pictures]) for change in pipelines]

    def ours():
        crops, index, _ = collate([(cut(Image.open(io.BytesIO(file)).convert("RGB"), 0, i, 0,
                                        MULTI_CROP), i, []) for i, file in enumerate(images)])
        return crops if on_device else [
            coloured(x, uniform(COLOUR_DRAWS, 0, 0, index, 1000 + view), COLOURS[view])
            for view, x in enumerate(crops)]
    return plain, ours


def grey_levels(files):
    """Mean difference of our colours from PIL's by the same factors, of 255; PIL always rounds."""
    crops, index, _ = collate([(cut(Image.open(io.BytesIO(file)).convert("RGB"), 0, i, 0,
                                    MULTI_CROP), i, []) for i, file in enumerate(files)])
    errors = []
    for view, x in enumerate(crops):
        draw = uniform(COLOUR_DRAWS, 0, 0, index, 1000 + view)
        ours = colour(unit(x), draw, 0.4, 0.1, blur_probability=0)
        for pixels, found, d in zip(x, ours, draw.tolist()):
            image = T.functional.to_pil_image(pixels)
            if d[0] < 0.8:
                factors = [1 + 0.4 * (2 * number - 1) for number in d[1:4]]
                image = T.functional.adjust_brightness(image, factors[0])
                image = T.functional.adjust_contrast(image, factors[1])
                image = T.functional.adjust_saturation(image, (1 + factors[2]) / 2)
                image = T.functional.adjust_hue(image, 0.1 * (2 * d[4] - 1))
            if d[5] < 0.2:
                image = T.functional.rgb_to_grayscale(image, 3)
            theirs = T.functional.pil_to_tensor(image).float()
            errors.append((255 * found - theirs).abs().mean().item())
    return statistics.mean(errors)


def one_block_mask(gh, gw, count, least=16):
    """BEiT's generator: rectangle by rectangle, cell by cell, of one image."""
    mask, hidden = [[False] * gw for _ in range(gh)], 0
    while hidden < count:
        for _ in range(10):
            area = random.uniform(least, max(least, count - hidden))
            aspect = math.exp(random.uniform(math.log(0.3), math.log(1 / 0.3)))
            h, w = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            if h < gh and w < gw:
                top, left = random.randint(0, gh - h), random.randint(0, gw - w)
                for i, j in itertools.product(range(top, top + h), range(left, left + w)):
                    if not mask[i][j] and hidden < count:
                        mask[i][j], hidden = True, hidden + 1
                break
    return mask


def block_masks(batch):
    count = round(0.4 * 14 * 14)
    return (lambda: torch.tensor([one_block_mask(14, 14, count) for _ in range(batch)]),
            lambda: block_mask(batch, (14, 14), 0.4))


def random_masks(batch):
    def plain():
        masks = torch.zeros(batch, 196, dtype=torch.bool)
        for mask in masks:
            mask[torch.randperm(196)[:147]] = True
        return masks
    return plain, lambda: random_mask(batch, (14, 14), 0.75)


# ---- evaluation ----------------------------------------------------------------------------------

def plain_knn(train_features, train_labels, test_features, num_classes, k, temperature=0.07):
    """DINO's k-NN: a search for one k, one-hot votes, a hundred test images at a time."""
    scores = []
    for part in F.normalize(test_features, dim=1).split(100):
        cos, nearest = (part @ F.normalize(train_features, dim=1).T).topk(k)
        votes = F.one_hot(train_labels[nearest], num_classes)
        scores.append((votes * (cos / temperature).exp().unsqueeze(2)).sum(1))
    return torch.cat(scores)


def knn(references, tests, ks=(10, 20, 100, 200), D=384, device="cpu", classes=1000):
    features = torch.randn(references + tests, D, device=device)
    labels = torch.randint(classes, (references,), device=device)
    known, asked = features[:references], features[references:]
    return (lambda: [plain_knn(known, labels, asked, classes, k) for k in ks],
            lambda: knn_scores(known, labels, asked, classes, ks))


LRS = [1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 0.1, 0.3, 1.0, 3.0]


def plain_probe(features, labels, classes, lr, epochs, batch=1024):
    """One linear layer, its optimizer and its schedule: what a sweep does once a learning rate."""
    layer = nn.Linear(features.shape[1], classes).to(features)
    nn.init.zeros_(layer.weight), nn.init.zeros_(layer.bias)
    optimizer = torch.optim.SGD(layer.parameters(), lr=lr, momentum=0.9)
    total = epochs * math.ceil(len(features) / batch)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, total)
    for _ in range(epochs):
        for x, y in zip(features.split(batch), labels.split(batch)):
            optimizer.zero_grad()
            F.cross_entropy(layer(x), y).backward()
            optimizer.step()
            schedule.step()
    return layer


def fast_probe(features, labels, classes, epochs, batch=1024):
    heads = Heads(LRS, features.shape[1], classes, features.device)
    parts = list(zip(features.split(batch), labels.split(batch)))
    for number, (x, y) in enumerate(parts * epochs):
        heads.step(x, y, number / (epochs * len(parts)))
    return heads


def probe(count, epochs, D=384, classes=10, device="cpu"):
    features = torch.randn(count, D, device=device)
    labels = torch.randint(classes, (count,), device=device)
    return (lambda: [plain_probe(features, labels, classes, lr, epochs) for lr in LRS],
            lambda: fast_probe(features, labels, classes, epochs))


# ---- the rows ------------------------------------------------------------------------------------

def rows(args):
    """name -> (maker of (reference or None, ours), items a call, what it is, target)."""
    device, quick = args.device, args.quick
    table = {}

    def wanted(name):
        return not args.only or any(name.startswith(word) for word in args.only)

    def add(name, make, what, target="", items=0, full=False):
        if wanted(name) and not (full and quick):
            table[name] = (make, items, what, target)

    for N in (64, 256, 512):
        add(f"angle {N}", lambda N=N: relation(N, rkd_angle_loss, dense_angle, device),
            f"angle relation, N = {N}, D = 256, forward and backward",
            {256: "10 x, memory 25 x", 512: "memory 80 x"}.get(N, ""), full=N > 256)
    add("angle 1024", lambda: relation(1024, rkd_angle_loss, None, device),
        "N = 1024, where the dense way needs about 20 GB", full=True)
    add("distance 256", lambda: relation(256, rkd_distance_loss, dense_distance, device),
        "distance relation, N = 256, D = 256")
    for loss, arch, target in (("ibot", "vit_tiny", "1.6 x, memory 1.5 x"),
                               ("ibot", "vit_small", "1.4 x, memory 1.5 x"),
                               ("dino", "vit_tiny", "1.2 x")):
        add(f"{loss} {arch}", lambda loss=loss, arch=arch: step(loss, arch, device, 8),
            f"{loss} step, 2 x 224 px, batch 8", target, items=8, full=arch != "vit_tiny")
    add("dropped", lambda: dropped("vit_tiny", device, 8),
        "student with 75 % of its patches left out, against mask tokens", "3.5 x", items=8)
    batch = 64 if device == "cpu" else 512
    add("fresh views", lambda: fresh_views(device, batch),
        f"a step of ViT-mini/4, 32 px, batch {batch}, with new views against the same again",
        "0.97 x on a GPU", items=batch)
    if device == "cpu" and any(map(wanted, ("views", "views, colours on a GPU"))):
        images = photographs(4 if quick else 8, args.images)
        what = ("500 x 375 JPEGs to 2 x 224 + 8 x 96 px, one core; colours "
                f"{grey_levels(images):.2f} grey levels from PIL's")
        add("views", lambda: views(images), what, "2.5 x", items=len(images))
        add("views, colours on a GPU", lambda: views(images, True), what, items=len(images))
    if device == "cpu":
        add("block masks", lambda: block_masks(1024), "14 x 14, 40 %, 1024 at once", "20000 / s",
            items=1024)
        add("random masks", lambda: random_masks(1024), "14 x 14, 75 %, 1024 at once", items=1024)
    known = 10000 if quick else 50000
    add("k-NN", lambda: knn(known, 200, device=device), f"four k, {known} x 384 references",
        "4 x", items=200)
    add("k-NN, ImageNet", lambda: (None, knn(1281167, 64, device=device)[1]),
        "four k, 1,281,167 x 384 references", items=64, full=True)
    add("probe", lambda: probe(5000 if quick else 20000, 2, device=device),
        "linear probe, ten learning rates", "6 x")
    return table


def timed(run, device):
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def interleaved(contenders, device, seconds, least=3):
    """Times of each contender, who take turns for so many seconds."""
    for run in contenders:
        run()  # warm
    times, end = [[] for _ in contenders], time.monotonic() + seconds
    while len(times[0]) < least or time.monotonic() < end:
        for run, found in zip(contenders, times):
            found.append(timed(run, device))
    return times


def peak_memory(run, device):
    """Bytes that a call needs at most beyond what is there; None where nobody can tell."""
    if device == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        return torch.cuda.max_memory_allocated() - before
    if not os.path.exists("/proc/self/clear_refs") or torch.get_num_threads() > 1:
        return None

    def resident(name):
        with open("/proc/self/status") as file:
            return next(int(line.split()[1]) * 1024 for line in file if line.startswith(name))

    ends = os.pipe()
    child = os.fork()  # its allocator is made to give everything back; ours stays as it is
    if not child:
        with contextlib.suppress(Exception):
            libc = ctypes.CDLL("libc.so.6")
            libc.mallopt(-3, 2**16)  # M_MMAP_THRESHOLD
            run()
            peaks, end = [], time.monotonic() + 1
            while not peaks or time.monotonic() < end:  # the least: code that is read in counts too
                libc.malloc_trim(0)
                with open("/proc/self/clear_refs", "w") as file:
                    file.write("5")  # the peak starts anew
                before = resident("VmRSS")
                run()
                peaks.append(resident("VmHWM") - before)
            os.write(ends[1], str(min(peaks)).encode())
        os._exit(0)
    os.close(ends[1])
    with open(ends[0]) as file:
        found = file.read()
    os.waitpid(child, 0)
    return int(found) if found else None


def measure(name, row, args):
    """A row of the table, as plain numbers."""
    make, items, what, target = row
    contenders = [run for run in make() if run]
    times = interleaved(contenders, args.device, 3 if args.quick else 15)
    peaks = [peak_memory(run, args.device) for run in contenders]
    found = dict(row=name, what=what, target=target, seconds=statistics.median(times[-1]),
                 repetitions=len(times[0]), peak_bytes=peaks[-1])
    if items:
        found["items_per_second"] = items / found["seconds"]
    if len(contenders) == 2:
        ratios = sorted(a / b for a, b in zip(*times))
        low, high = (ratios[round(q * (len(ratios) - 1))] for q in (0.25, 0.75))
        found |= dict(ratio=statistics.median(ratios), ratio_quartiles=[low, high],
                      reference_seconds=statistics.median(times[0]),
                      reference_peak_bytes=peaks[0],
                      memory_ratio=peaks[0] / max(1, peaks[1]) if all(peaks) else None)
    return found


def line(found):
    """A row as a person reads it."""
    def seconds(x):
        return "" if x is None else f"{x:.2f} s" if x >= 1 else f"{1000 * x:.2f} ms"

    ratio = f"{found['ratio']:.2f} x ({found['ratio_quartiles'][0]:.2f} .. " \
            f"{found['ratio_quartiles'][1]:.2f})" if "ratio" in found else ""
    memory = "" if not found["peak_bytes"] else f"{found['peak_bytes'] / 1e6:.0f} MB"
    times = found.get("memory_ratio")
    if times:
        memory += f", {times:.1f} x less" if times > 1 else f", {1 / times:.1f} x more"
    return (f"{found['row']:<24}{seconds(found.get('reference_seconds')):>11}"
            f"{seconds(found['seconds']):>11}  {ratio:<26}{memory:<22}{found['target']}")


# ---- a GPU in training ---------------------------------------------------------------------------

def matrix_flops(device, side=8192):
    """Operations a second of a large bf16 matrix product: the peak that this device can reach."""
    a, b = (torch.randn(side, side, device=device, dtype=torch.bfloat16) for _ in range(2))
    [times] = interleaved([lambda: a @ b], device, 2)
    return 2 * side**3 / statistics.median(times)


def training(args, compiled):
    """Images a second, peak memory and model-FLOPs utilisation of --arch at --image-size, bf16."""
    from torch.utils.flop_counter import FlopCounterMode
    system, views, mask = training_system(args.loss, args.arch, args.device, args.batch_size,
                                          args.image_size)
    parameters = [p for p in system.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, fused=True)

    def run():
        with torch.autocast(args.device, torch.bfloat16):
            value = system(views, views, mask)[0]
        value.backward()
        nn.utils.clip_grad_norm_(parameters, 3.0)
        optimizer.step()
        optimizer.zero_grad()
        if system.teacher:
            ema_update(system.teacher, system.student, 0.99)

    with FlopCounterMode(display=False) as counter:
        run()
    if compiled:
        for network in (system.student, system.teacher):
            if network:
                network.backbone.compile()
    [times] = interleaved([run], args.device, 10)
    seconds = statistics.median(times)
    peak = matrix_flops(args.device)
    return dict(row=f"train {args.arch}{', compiled' * compiled}", seconds=seconds,
                what=f"{args.loss}, {args.image_size} px, batch {args.batch_size}, bf16",
                target="MFU 40 %", items_per_second=args.batch_size / seconds,
                peak_bytes=peak_memory(run, args.device), flops=counter.get_total_flops(),
                matrix_flops_per_second=peak,
                utilisation=counter.get_total_flops() / seconds / peak)


# ---- as things grow ------------------------------------------------------------------------------

def one_rank(rank, world, port, file):
    """A process of `gathering`: the time of a gather of 64 points of 384, forward and backward."""
    os.environ.update(MASTER_ADDR="localhost", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=world)
    x = torch.randn(64, 384, requires_grad=True)
    times = []
    for _ in range(50):
        dist.barrier()
        start = time.perf_counter()
        gather(x).sum().backward()
        times.append(time.perf_counter() - start)
    if rank == 0:
        with open(file, "w") as out:
            out.write(str(statistics.median(times[10:])))
    dist.destroy_process_group()


def gathering(world):
    with tempfile.TemporaryDirectory() as place, socket.socket() as sock:
        sock.bind(("localhost", 0))
        port, file = sock.getsockname()[1], os.path.join(place, "seconds")
        sock.close()
        torch.multiprocessing.spawn(one_rank, (world, port, file), world)
        with open(file) as found:
            return float(found.read())


def scale(args):
    """Four pictures: relations against N, steps against the image and the depth, many processes."""
    from matplotlib.figure import Figure
    device = args.device
    on_gpu, found = device == "cuda", []

    def median(run, seconds=1):
        return statistics.median(interleaved([run], device, seconds, least=1)[0])

    def note(**row):
        found.append(row)
        print(json.dumps(row), flush=True)
        return row

    sizes = [64, 128, 256, 512, 1024] + [2048, 4096, 8192] * on_gpu
    for name, ours, dense in (("angle", rkd_angle_loss, dense_angle),
                              ("distance", rkd_distance_loss, dense_distance)):
        for N in sizes:
            for who, loss in (("ours", ours), ("dense", dense)):
                if who == "dense" and N > (512 if name == "angle" else 1024) << on_gpu:
                    continue
                run = relation(N, loss, None, device)[1]
                note(relation=name, who=who, N=N, seconds=median(run),
                     bytes=peak_memory(run, device))
    for grows, times in itertools.product(("side", "depth"), (0.5, 1, 1.5, 2)):
        side, depth = (int(224 * times), 12) if grows == "side" else (224, int(12 * times))
        arch = partial(VisionTransformer, embed_dim=192, depth=depth, num_heads=3)
        for who, drop in (("all patches", False), ("a quarter", True)):
            note(grows=grows, times=times, who=who,
                 seconds=median(dropped(arch, device, 4, side=side)[drop]) / 4)
    if not on_gpu:
        for world in (2, 4, 8):
            note(processes=world, gather_seconds=gathering(world))

    figure = Figure(figsize=(11, 8), layout="constrained")
    axes = figure.subplot_mosaic("ab;cd")

    def curve(place, x, y, label, style, tint, **where):
        rows = [row for row in found if all(row.get(k) == v for k, v in where.items())
                and x in row and row.get(y)]
        axes[place].loglog([row[x] for row in rows], [row[y] for row in rows], style, color=tint,
                           label=label)

    def value(y, **where):
        return next((row[y] for row in found
                     if all(row.get(k) == v for k, v in where.items())), None)

    for name, tint in (("angle", "tab:blue"), ("distance", "tab:orange")):
        for who, style in (("ours", "o-"), ("dense", "s--")):
            for place, y in (("a", "seconds"), ("b", "bytes")):
                curve(place, "N", y, f"{name}, {who}", style, tint, relation=name, who=who)
    for place, y, what in (("a", "seconds", "takes"), ("b", "bytes", "needs")):
        both = [value(y, relation="angle", N=256, who=who) for who in ("dense", "ours")]
        times = f" 1/{both[0] / both[1]:.0f}" if all(both) else " a part"
        axes[place].set(title=f"The angle of 256 points {what}{times} of the dense way",
                        xlabel="points N (D = 256)", ylabel=f"{y}, forward and backward")
    for who, style in (("all patches", "s--"), ("a quarter", "o-")):
        for x, tint in (("side", "tab:blue"), ("depth", "tab:orange")):
            curve("c", "times", "seconds", f"{who}, by {x}", style, tint, who=who, grows=x)
    all_of_it, part = (value("seconds", grows="side", times=1, who=who)
                       for who in ("all patches", "a quarter"))
    axes["c"].set(title=f"A quarter of the patches: a ViT-Ti {all_of_it / part:.1f} x as fast",
                  xlabel="side / 224 pixels, depth / 12 blocks", ylabel="seconds an image")

    each, D = 64, 384  # images and width a process
    cost = max((row for row in found if row.get("relation") == "angle" and row["who"] == "ours"),
               key=lambda row: row["N"])
    triplet = cost["seconds"] / cost["N"]**3
    worlds = [1, 2, 4, 8, 16, 32, 64, 128, 256, 512]
    for label, look, work in (("all triplets on each", "s--", lambda w: (each * w)**3),
                              ("each its own vertices (ours)", "o-", lambda w: each**3 * w**2)):
        axes["d"].loglog(worlds, [triplet * work(w) for w in worlds], look, label=label,
                         color="tab:blue")
    # two views: students' points go out and their gradient comes back (twice), teachers' go out
    axes["d"].loglog(worlds, [2 * (1 + 2 + 1) * 4 * D * each * w / 25e9 for w in worlds], ":",
                     color="tab:green", label=f"moving the points ({D} wide) at 25 GB/s")
    axes["d"].set(title=f"MODEL, by the {1e9 * triplet:.2g} ns a triplet measured here: sharing\n"
                        "the vertices makes the cube of the processes a square",
                  xlabel=f"processes, {each} images each", ylabel="seconds of an angle loss")
    for place in axes.values():
        place.legend(fontsize=8)
        place.grid(alpha=0.3)
    figure.savefig(args.scale, dpi=100)


def main():
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--quick", action="store_true", help="smaller rows, fewer repetitions")
    add("--only", nargs="+", metavar="WORD", help="rows that start so, as angle, views; train: GPU")
    add("--images", help="folder of JPEGs for the views; default: noise of ImageNet's median size")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cuda", "cpu"],
        help="where to run")
    add("--threads", type=whole(1), default=1, help="of a CPU")
    add("--scale", metavar="PNG", help="draw the cost as things grow, instead of the table")
    add("--loss", default="rkd", help="train: what to learn by")
    add("--arch", default="vit_small", choices=ARCHS, help="train: the ViT")
    add("--image-size", type=whole(1), default=224, help="train: side in pixels")
    add("--batch-size", type=whole(1), default=256, help="train: images a step")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    where = torch.cuda.get_device_name() if args.device == "cuda" else platform.processor() or "CPU"
    print(f"torch {torch.__version__}, {where}, {args.threads} thread(s)")
    if args.scale:
        return scale(args)
    table, wanted = rows(args), not args.only or "train" in args.only
    if not table and not (args.device == "cuda" and wanted):
        parser.error(f"--only {' '.join(args.only)}: no such row on {args.device}; the first words "
                     "are angle, distance, ibot, dino, dropped, fresh, views, block, random, k-NN, "
                     "probe and, on a GPU, train")
    print(f"{'':<24}{'reference':>11}{'ours':>11}  {'ratio (quartiles)':<26}"
          f"{'peak memory':<22}target")
    results = []
    for name, row in table.items():
        results.append(measure(name, row, args))
        print(line(results[-1]), flush=True)
    if args.device == "cuda" and wanted:
        for compiled in (False, True):
            results.append(training(args, compiled))
            print(line(results[-1]) + f"; {results[-1]['items_per_second']:.0f} images/s, "
                  f"{100 * results[-1]['utilisation']:.0f} %", flush=True)
    for found in results:
        print(json.dumps({name: round(x, 6) if isinstance(x, float) else x
                          for name, x in found.items()}))


if __name__ == "__main__":
    sys.exit(main())
