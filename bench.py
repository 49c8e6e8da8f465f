"""Speed and memory: each row is a ratio to what the authors' code does, written out here.

    ratio = time of the reference / time of ours, both in this process, taking turns

    distance N     relation of N points; reference: RKD (lenscloth/RKD), one product per side
    angle N        relation of N points; reference: RKD's unit vectors (N, N, D) and all cosines
    ibot ARCH      step, 2 x 224 px, batch 8, 8192 prototypes; reference: bytedance/ibot
    dino ARCH      step, 2 x 224 + 8 x 96 px, 65,536 prototypes; reference: facebookresearch/dino
    views          500 x 375 JPEGs to 2 x 224 + 8 x 96 px; reference: DINO's augmentation by PIL
    block masks    1024 masks of 14 x 14 patches; reference: BEiT's generator (microsoft/unilm)
    k-NN four      200 queries at four values of k; reference: DINO's eval_knn.py, a search per k
    probe 10       linear probe, 10 classes, ten learning rates; reference: DINO's, one by one
    train          on a GPU, without a reference: images/s, peak memory and utilisation

tests/test_bench.py checks that each reference gives our result. The table shows medians, quartiles
of the ratio and peak memory (on a CPU: of the process, Linux only; on a GPU: of the allocator).

Measured on one quiet core of a shared Xeon (float32, torch 2.14, medians and quartiles): views 2.07
(2.02 .. 2.12), dino 1.09 (1,098 -> 993 MB), angle 512 14 (2,149 -> 18 MB); with --quick distance
0.84 (.81 .. .86), angle 19 (19 .. 20; memory 404 -> 7 MB), ibot vit_tiny 1.75 (1,159 -> 644 MB),
k-NN four 9.6, probe 10 2.9, views 1.99, block masks 2.08. Beside other work and whole: ibot
vit_small 1.3, probe 10 4.9 to 6.2.

    python bench.py --quick --only angle views   # some rows; all: ten minutes, --quick: three
    python bench.py --only train --arch vit_small --batch-size 256   # on a GPU
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
from itertools import groupby
from pathlib import Path

import torch
import torch.nn.functional as F
import torchvision.transforms as T
from PIL import Image, ImageFilter
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from torchvision.io import encode_jpeg

import train
from data import MEAN, STD, Folder, train_batches
from eval_knn import Parser, knn_scores, whole
from eval_linear import Heads
from losses import rkd_angle_loss, rkd_distance_loss
from masking import block_mask
from model import ARCHS, ema_update
from objectives import System


# ---- relations -----------------------------------------------------------------------------------

def original_distance(student, teacher):
    """RKD-D as in metric/loss.py of lenscloth/RKD: squared distances by one product, in float32."""
    def normalized(x):
        lengths = x.square().sum(1)
        squares = lengths.unsqueeze(1) + lengths - 2 * x @ x.T
        distances = squares.clamp(min=1e-12).sqrt().clone()
        distances[range(N), range(N)] = 0
        return distances / distances[distances > 0].mean()

    N = len(student)
    loss = F.smooth_l1_loss(normalized(student), normalized(teacher.detach()))
    return loss * N / (N - 1)  # ours: distinct pairs only


def original_angle(student, teacher):
    """RKD-A as in the same file: all unit vectors (N, N, D) and all cosines (N, N, N)."""
    def cosines(x):
        unit = F.normalize(x.unsqueeze(0) - x.unsqueeze(1), dim=-1)
        return torch.bmm(unit, unit.mT)

    N = len(student)
    loss = F.smooth_l1_loss(cosines(student), cosines(teacher.detach()))
    return loss * N**2 / ((N - 1) * (N - 2))  # ours: distinct triplets only


def relation(N, device, *losses):
    """Forward and backward pass of each loss between N points, as functions to time."""
    student, teacher = torch.randn(2, N, 256, device=device)
    student.requires_grad_()
    return [lambda loss=loss: torch.autograd.grad(loss(student, teacher), student)
            for loss in losses]


# ---- a step of training --------------------------------------------------------------------------

def original_vit(vit, images, mask=None):
    """The forward pass of DINO and iBOT: a convolution, explicit attention -> (B, 1 + N, D)."""
    x = vit.patch_embed.proj(images)
    grid, x = tuple(x.shape[2:]), x.flatten(2).mT
    if mask is not None:
        x = torch.where(mask.to(x.device).unsqueeze(-1), vit.mask_token, x)
    x = torch.cat([vit.cls_token.expand(len(x), -1, -1), x], 1) + vit.positions(grid)
    for block in vit.blocks:
        q, k, v = block.attn.heads(block.norm1(x))
        mixed = (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1) @ v
        x = x + block.attn.proj(mixed.transpose(1, 2).flatten(2))
        x = x + block.mlp(block.norm2(x))
    return vit.norm(x)


def original_logits(network, name, tokens, views, mask=None):
    """Logits (B, tokens, K) per view: one forward pass per image size, one call of the head."""
    sizes = [torch.cat([*group]) for _, group in groupby(views, key=lambda x: x.shape[-1])]
    x = torch.cat([original_vit(network.backbone, images, mask)[:, tokens] for images in sizes])
    head = network.heads[name]
    unit = torch._weight_norm(head.prototypes, torch.ones_like(head.prototypes[:, :1]), 0)
    return F.linear(F.normalize(head.mlp(x), dim=-1), unit).chunk(len(views))


def original_loss(system, views, mask=None):
    """DINO's loss (main_dino.py), or with a mask iBOT's (main_ibot.py), its head on every token.

    As in their code the softmax of a teacher's view is computed once, that of a student's once per
    pair of views.
    """
    def target(teacher, center):
        return ((teacher - center) / system.args.teacher_temperature[0]).softmax(-1)

    def cross_entropy(student, p):
        return -(p * (student / system.args.temperature).log_softmax(-1)).sum(-1)

    name, tokens = ("dino", slice(0, 1)) if mask is None else ("ibot", slice(None))
    with torch.no_grad():
        teacher = original_logits(system.teacher, name, tokens, views[:2])
    student = original_logits(system.student, name, tokens, views, mask)
    state, mean = system.state, torch.cat(teacher).mean(0)  # (tokens, K)
    targets = [target(t[:, 0], state[name]) for t in teacher]
    state[name] = 0.9 * state[name] + 0.1 * mean[0]
    pairs = [cross_entropy(s[:, 0], p).mean()
             for i, p in enumerate(targets) for j, s in enumerate(student) if i != j]
    loss = sum(pairs) / len(pairs)
    if mask is not None:
        for s, t, hidden in zip(student, teacher, mask.to(mean.device).chunk(2)):
            each = cross_entropy(s[:, 1:], target(t[:, 1:], state["ibot_patch"])) * hidden  # (B, N)
            loss = loss + (each.sum(1) / hidden.sum(1).clamp_min(1)).mean() / 2
        state["ibot_patch"] = 0.9 * state["ibot_patch"] + 0.1 * mean[1:].mean(0)
    return loss


def original_ema(teacher, student, momentum):
    for t, s in zip(teacher.parameters(), student.parameters()):  # predictors come last
        t.data.mul_(momentum).add_((1 - momentum) * s.detach())


def training_system(loss, arch, device, batch, size=224, **options):
    """(system, views, mask) of one batch, with published heads; local views: 3/7 of the side."""
    options = {"image-size": size, "patch-size": 16, "pool": "cls", "prototypes": 8192,
               "projection": 256, "head-hidden": 2048, "temperature": 0.1} | options
    args = train.parse([f"--loss={loss}", f"--arch={arch}", f"--batch-size={batch}",
                        "--no-head-batchnorm", *(f"--{name}={x}" for name, x in options.items())])
    system = System(args).to(device)
    views = [torch.randn(batch, 3, side, side, device=device)
             for side in [size] * args.global_crops + [size * 3 // 7] * args.local_crops]
    return system, views, train.draw_masks(args, system, 0, 0, views)


def stepper(system, original=False, autocast=False):
    """A step as a function of (views, mask): loss, gradient, clipping, AdamW, moving average."""
    parameters = [p for p in system.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, fused=None if original else True)

    def step(views, mask):
        with torch.autocast(views[0].device.type, torch.bfloat16, enabled=autocast):
            loss = original_loss(system, views, mask) if original else system(views, views, mask)[0]
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 3.0)
        optimizer.step()
        optimizer.zero_grad()
        if system.teacher:
            (original_ema if original else ema_update)(system.teacher, system.student, 0.99)
    return step


def training_step(loss, arch, device, **options):
    def contender(original):
        system, *batch = training_system(loss, arch, device, 8, **options)
        return partial(stepper(system, original), *batch)
    return contender(True), contender(False)


# ---- views and masks -----------------------------------------------------------------------------

MULTI_CROP = [(224, (0.4, 1.0))] * 2 + [(96, (0.05, 0.4))] * 8
BLUR, SOLARIZE = [1.0, 0.1] + [0.5] * 8, [0.0, 0.2] + [0.0] * 8  # probabilities per view


def photographs(count):
    """JPEGs as bytes: noise at two scales, of ImageNet's median size."""
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
    """JPEG bytes -> ten batches of views: by PIL, crop by crop, and ours."""
    pipelines = [pil_pipeline(*view) for view in zip(MULTI_CROP, BLUR, SOLARIZE)]
    folder = Folder([io.BytesIO(file) for file in files], [0] * len(files), ["one"])

    def plain():
        images = [Image.open(io.BytesIO(file)).convert("RGB") for file in files]
        return [torch.stack([pipeline(image) for image in images]) for pipeline in pipelines]

    def ours():
        batches = train_batches(folder, [(0, torch.arange(len(files)))], MULTI_CROP, 0,
                                torch.device("cpu"), weak=False, bicubic=True, hue=0.1,
                                blur_probability=BLUR, solarize_probability=SOLARIZE)
        return next(batches)[2]
    return plain, ours


def one_block_mask(side, count, least=16):
    """BEiT's generator (masking_generator.py) for one image: ten tries per rectangle."""
    mask, hidden, tries = [[0] * side for _ in range(side)], 0, 0
    while hidden < count and tries < 10:
        tries += 1
        area = random.uniform(least, count - hidden)
        aspect = math.exp(random.uniform(math.log(0.3), math.log(1 / 0.3)))
        height, width = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if height < side and width < side:
            top, left = random.randint(0, side - height), random.randint(0, side - width)
            rows = mask[top:top + height]
            new = height * width - sum(sum(row[left:left + width]) for row in rows)
            if 0 < new <= count - hidden:
                for row in rows:
                    row[left:left + width] = [1] * width
                hidden, tries = hidden + new, 0
    return mask


def block_masks(batch):
    return (lambda: torch.tensor([one_block_mask(14, 75) for _ in range(batch)]).bool(),
            lambda: block_mask(batch, (14, 14), 75 / 196))


# ---- evaluation ----------------------------------------------------------------------------------

def knn(references, tests, ks=(10, 20, 100, 200), D=384, device="cpu", classes=1000):
    """DINO's eval_knn.py (unit features, then a search per k and one-hot votes), and ours."""
    known, asked = torch.randn(references + tests, D, device=device).split([references, tests])
    labels = torch.randint(classes, (references,), device=device)

    def search(known, asked, k):
        scores = []
        for part in asked.split(500):  # its chunk of ImageNet
            cos, nearest = (part @ known.T).topk(k)
            votes = torch.zeros(len(part) * k, classes, device=device)
            votes.scatter_(1, labels[nearest].view(-1, 1), 1)
            weights = (cos / 0.07).exp().unsqueeze(2)
            scores.append((votes.view(len(part), k, classes) * weights).sum(1))
        return torch.cat(scores)

    def original():
        unit = F.normalize(known, dim=1), F.normalize(asked, dim=1)
        return [search(*unit, k) for k in ks]
    return original, lambda: knn_scores(known, labels, asked, classes, ks)


def probe(count, classes, device="cpu", epochs=1, D=384):
    """DINO's probe (eval_linear.py) at ten learning rates, one run each, and ours, all at once."""
    lrs = [1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 0.1, 0.3, 1.0, 3.0]
    features = torch.randn(count, D, device=device)
    labels = torch.randint(classes, (count,), device=device)
    batches = list(zip(features.split(1024), labels.split(1024))) * epochs

    def original(lr):
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
    return lambda: [original(lr) for lr in lrs], ours


# ---- the table -----------------------------------------------------------------------------------

def rows(device, quick):
    """name -> maker of (reference, ours), two functions."""
    def relations(N):
        return {f"distance {N}": lambda: relation(N, device, original_distance, rkd_distance_loss),
                f"angle {N}": lambda: relation(N, device, original_angle, rkd_angle_loss)}

    files, known, features = (4, 10000, 5000) if quick else (8, 50000, 20000)
    table = relations(256) | {
        "ibot vit_tiny": lambda: training_step("ibot", "vit_tiny", device),
        "k-NN four": lambda: knn(known, 200, device=device),
        "probe 10": lambda: probe(features, 10, device)}
    if device == "cpu":
        table |= {"views": lambda: views(photographs(files)),
                  "block masks": lambda: block_masks(1024)}
    if not quick:
        published = {"prototypes": 65536, "local-crops": 8}
        table |= relations(512) | {
            "dino vit_tiny": lambda: training_step("dino", "vit_tiny", device, **published),
            "ibot vit_small": lambda: training_step("ibot", "vit_small", device)}
    return table


def interleaved(contenders, device, seconds):
    """Times of each contender; they take turns for `seconds`, and the first turn is a warm-up."""
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
    """Peak bytes of a call beyond those allocated before; None where that cannot be measured."""
    if device == "cuda":
        run()  # allocates what stays: workspaces, gradients, the state of AdamW
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        return torch.cuda.max_memory_allocated() - before
    if not Path("/proc/self/clear_refs").exists():  # only Linux has it
        return None

    def peak():
        return 1024 * int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])

    def measured():  # in a child, since its allocator is made to return all freed memory
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(-3, 2**16)  # M_MMAP_THRESHOLD
        run()  # as above, and code is read into memory
        libc.malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # resets the peak to the present size
        before = peak()
        run()
        found.value = peak() - before

    fork = multiprocessing.get_context("fork")
    found, child = fork.Value("q"), fork.Process(target=measured)
    child.start()
    child.join()
    return found.value if child.exitcode == 0 else None


def measure(name, make, device, seconds):
    """Print a row of the table and return its numbers."""
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
                ratio=ratio, ratio_quartiles=[low, high],
                peak_bytes=peaks[1], reference_peak_bytes=peaks[0])


def training(args, compiled):
    """Images/s, peak memory and utilisation of a GPU that trains --arch in bf16.

    Utilisation is relative to the FLOP/s of a large bf16 matrix product in the same run.
    """
    system, *batch = training_system("rkd", args.arch, args.device, args.batch_size)
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


def main():
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--quick", action="store_true", help="smaller rows, fewer repetitions")
    add("--only", nargs="+", metavar="WORD", help="rows whose names start so: angle, views")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cuda", "cpu"],
        help="where to run")
    add("--arch", default="vit_small", choices=ARCHS, help="row train: the ViT")
    add("--batch-size", type=whole(1), default=256, help="row train: images per step")
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    where = torch.cuda.get_device_name() if args.device == "cuda" else "CPU"
    print(f"torch {torch.__version__}, {where}, one thread")
    words = tuple(args.only or [""])  # every name starts with ""
    every = rows(args.device, args.quick)
    table = {name: make for name, make in every.items() if name.startswith(words)}
    in_training = args.device == "cuda" and "train".startswith(words)
    if not table and not in_training:
        parser.error(f"--only {' '.join(words)}: no such row on {args.device}: take "
                     f"the first words of {', '.join(every)} or, on a GPU, train")
    print("row                reference        ours   ratio (quartiles)    peak memory of both")
    results = [measure(name, make, args.device, 3 if args.quick else 15)
               for name, make in table.items()]
    if in_training:
        results += [training(args, compiled) for compiled in (False, True)]
    for result in results:
        print(json.dumps(result))


if __name__ == "__main__":
    main()
