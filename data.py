"""Images in, batches of views out.

    view = colour(crop(image)),    parameters = hash(seed, epoch, index, view)

So neither the order of work nor the number of workers or processes changes a sample. Small sets are
one uint8 tensor, and their views are cut batched on the training device: a crop with its resize and
flip is one small matrix for the rows and one for the columns. Images on disk are decoded and cut by
DataLoader workers. Colours are batched on the device for both: the operations of SimCLR (arXiv
2002.05709, appendix A), as torchvision defines them, with the probabilities per view of BYOL (arXiv
2006.07733, appendix B).

Left out: SimCLR's random order of the jitters; here brightness, contrast, saturation, hue. BYOL's
own brightness (added), contrast (per channel) and saturation (HSV). DINO's blur of small views
beyond a tenth of the side.
Letters: B images, S side of a view in pixels.
"""
import hashlib
import itertools
import math
import os
import sys
import unicodedata
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torchvision
from PIL import Image, ImageOps
from torchvision.transforms import InterpolationMode
from torchvision.transforms.functional import (adjust_contrast, adjust_hue, center_crop,
                                               gaussian_blur, pil_to_tensor, resize, rotate)
from torchvision.transforms.v2.functional import resized_crop  # as PIL's, four times faster

from randomness import uniform
from textures import TEXTURES, textures

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet, used for every set


# ---- sets of images ----------------------------------------------------------------------------

class Images:
    """A set in memory: uint8 images (N, 3, height, width), labels (N,), -1 where there is none."""

    def __init__(self, images, labels, classes, files=(), root=""):
        self.images, self.labels, self.classes, self.unreadable = images, labels, classes, {}
        self.files, self.root = files, root  # of a set that was read from disk

    def __len__(self):
        return len(self.labels)


class DataError(ValueError):
    """The run cannot go on, since images cannot be read: why, in one line, and the way out."""


def eight_bits(image):
    """A grey PIL image of floats or of more than 8 bits (mode F, I or I;16) -> one of 8 bits.

    White is the smallest of 1 (floats), 255, 1023 .. 65535 (8 .. 16 bits) that no pixel exceeds.
    """
    values = np.asarray(image, np.float32)
    low, high = values.min(), values.max()
    white = next((w for w in (1, 255, 1023, 4095, 16383, 65535) if high <= w), None)
    if not low >= 0 or not white:
        raise ValueError(f"values {low:g} .. {high:g}, not 0 .. 1 or 0 .. 255 or up to 16 bits")
    return Image.fromarray((values * (255 / white)).round().astype(np.uint8))


class Folder(torch.utils.data.Dataset):
    """Images on disk: folder[make, index] -> (make(image, index), index, {unreadable index: why}).

    The next index replaces one that cannot be read. `files` lie below the folder `root`.
    """

    def __init__(self, files, labels, classes, root=""):
        self.files, self.labels, self.classes = files, torch.tensor(labels), classes
        self.root, self.unreadable = root, {}  # index -> why

    def __len__(self):
        return len(self.files)

    def open(self, index):
        """A PIL image in RGB, upright; the reason, a string, where it cannot be read."""
        try:
            with Image.open(self.files[index]) as image:
                image = ImageOps.exif_transpose(image)
                return (eight_bits(image) if image.mode[0] in "IF" else image).convert("RGB")
        except Exception as error:  # PIL raises many kinds for a broken file
            return getattr(error, "strerror", None) or str(error) or repr(error)

    def __getitem__(self, key):
        make, index = key
        bad = {}
        for other in itertools.chain(range(index, len(self)), range(index)):
            image = self.open(other)
            if not isinstance(image, str):
                return make(image, other), other, bad
            bad[other] = image
        raise DataError(f"no image of this set can be read: {bad[index]}")

    def report(self, bad, looked_at=None):
        """Name files found unreadable, once; DataError where they are too many.

        That is above a tenth of the set; of a sample of it above a fifth, as its share varies.
        """
        def text(i):
            return f"{self.files[i]} ({self.unreadable[i]})"

        new = [i for i in sorted(bad) if i not in self.unreadable]
        self.unreadable |= bad
        count, looked_at = len(self.unreadable), looked_at or len(self)
        most = 10 if looked_at == len(self) else 20  # percent
        if count > most / 100 * looked_at:
            raise DataError(f"{count} of {looked_at} images cannot be read, more than {most} %: "
                            f"repair or remove {', '.join(map(text, [*self.unreadable][:10]))}")
        for i in new:
            print(f"unreadable, skipped: {text(i)}", file=sys.stderr)


def fingerprint(data):
    """Which images and labels a set holds: 16 hex digits, the same for a folder that was moved.

    Of a folder: its classes, the names of its images below it and, of fewer than 200,000, their
    sizes in bytes. Of another set: its classes and labels.
    """
    if data.files:
        facts = [file[len(data.root):] for file in data.files]
        if len(data) < 200_000:
            facts += [str(os.path.exists(file) and os.path.getsize(file)) for file in data.files]
    else:
        facts = map(str, data.labels.tolist())
    return hashlib.sha256(os.fsencode("\n".join([*data.classes, *facts]))).hexdigest()[:16]


def center_view(image, index, size):
    """Of a PIL image for evaluation, as published: short side to size·256/224, then the centre."""
    image = resize(image, round(size * 256 / 224), InterpolationMode.BICUBIC)
    return [pil_to_tensor(center_crop(image, size))]


HIDDEN = (".", "@eaDir", "@tmp", "#recycle", "#snapshot", "$RECYCLE.BIN", "lost+found", "__MACOSX",
          "__pycache__", "System Volume Information")  # beginnings of names, of systems and tools


def scan(root, left_out):
    """root/CLASS/../image -> [(file, class)], "." for images straight in root.

    A real folder is visited once, links to folders last. Classes are named in one unicode form
    (NFC). `left_out` collects {why: files}, hidden and system files aside.
    """
    readable = {end for end, kind in Image.registered_extensions().items() if kind in Image.OPEN}
    images, starts = [], [root]
    visited = {*map(str, Path(root).resolve().parents)}  # links to these would lead back to root

    def failed(error):
        raise ValueError(f"{error.filename} cannot be read ({error.strerror}): move it elsewhere, "
                         "or make it readable")

    for place, folders, names in itertools.chain.from_iterable(
            os.walk(start, onerror=failed) for start in starts):  # links are appended to starts
        real = os.path.realpath(place)
        if real in visited:
            left_out["link to a folder that is visited anyway"].append(place)
            folders.clear()
            continue
        visited.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith(HIDDEN))
        starts += filter(os.path.islink, (os.path.join(place, name) for name in folders))
        class_name = unicodedata.normalize("NFC", os.path.relpath(place, root).split(os.sep)[0])
        for name in sorted(name for name in names if not name.startswith(HIDDEN)):
            file, end = os.path.join(place, name), os.path.splitext(name)[1].lower()
            if end in readable:
                images.append((file, class_name))
            else:
                left_out[f"{end or 'nameless'} file without a reader" if os.path.exists(file)
                         else "dead link"].append(file)
    return images


def find_test(path, classes, left_out):
    """[(file, class)] of the first of P/val .. P/test with classes of train/, and what to say."""
    note = ""
    places = [os.path.join(path, name) for name in ("val", "valid", "validation", "test")]
    for place in filter(os.path.isdir, places):
        images = scan(place, left_out)
        known = [pair for pair in images if pair[1] in classes]
        unknown = ", ".join(sorted({name for _, name in images} - {*classes, "."})[:5])
        if known and unknown:
            raise ValueError(f"{place} has classes that train/ lacks: {unknown}{told(left_out)}")
        if known:
            left_out["image without a class"] = [file for file, name in images if name == "."]
            return known, note
        found = f"folders {unknown!a}" if unknown else f"{len(images)} images without classes"
        note += f"; {place!a} is not used: it holds {found}"
    return [], note + "; no evaluation: that needs train/CLASS/image and val/CLASS/image"


def told(left_out):
    """In words: how many files were left out, why, and the first of each reason."""
    return "".join(f"; left out: {len(files)} {why} ({files[0]!a})"
                   for why, files in left_out.items() if files)


def read_folder(path):
    """P/train/CLASS/image, P/val/CLASS/image -> train, test; test None: nothing to evaluate by.

    val may be called valid, validation or test. Of P/CLASS/image every tenth image per class is
    held out. P/image and P/train/image have no class. One line says what was found and left out.
    """
    if not path or not os.path.isdir(path):
        raise ValueError(f"--data-path {path!r} is no folder: give one that holds "
                         "train/CLASS/image and val/CLASS/image, or just images")
    whole, left_out = os.path.join(path, ""), defaultdict(list)
    split = os.path.isdir(os.path.join(path, "train"))
    place = os.path.join(path, "train", "") if split else whole
    train = scan(place, left_out)
    if not split and any(name == "." for _, name in train):  # what lies deeper is no class
        left_out["image in a sub-folder"] = [file for file, name in train if name != "."]
        train = [pair for pair in train if pair[1] == "."]
    if not train:
        raise ValueError(f"--data-path {path!r} has no images in train/CLASS/, in train/, in "
                         f"CLASS/ or beside it{told(left_out)}")
    classes = sorted({name for _, name in train} - {"."})
    deep = sum(file.count(os.sep, len(place)) > 1 for file, _ in train) > len(train) / 2
    if deep and (not split or len(classes) == 1):
        raise ValueError(f"{place} would have the classes {', '.join(classes[:5])}: is there one "
                         "folder too much? Move them to train/CLASS/, or --data-path "
                         f"{os.path.join(place, classes[0])}")
    if split or not classes:
        test, note = find_test(path, {*classes}, left_out)
    else:
        of_class = {name: [] for name in classes}
        for pair in train:
            of_class[pair[1]].append(pair)
        test = [pair for own in of_class.values() for pair in own[9::10] or own[1:][-1:]]
        train, note = sorted({*train} - {*test}), ", every tenth per class"
    if not dist.is_initialized() or dist.get_rank() == 0:
        print(f"{len(train)} images, {len(classes)} classes {classes[:3]!a}, {len(test)} test "
              f"images{note}{told(left_out)}")
    number = {name: k for k, name in enumerate(classes)} | {".": -1}
    return [in_memory(Folder([file for file, _ in part], [number[name] for _, name in part],
                             classes, whole)) if part else None for part in (train, test)]


def in_memory(folder, probes=256, side=128, limit=2**30):
    """Look at some images: many broken stop the run here; small ones of one size move to memory."""
    def look(index):
        image = folder.open(index)
        return image if isinstance(image, str) else (image.size, image.getextrema())

    with ThreadPoolExecutor(8) as pool:
        some = np.unique(np.linspace(0, len(folder) - 1, probes).astype(int)).tolist()
        found = dict(zip(some, pool.map(look, some)))
        folder.report({i: why for i, why in found.items() if isinstance(why, str)}, len(some))
        good = [x for x in found.values() if not isinstance(x, str)]
        single = sum(all(low == high for low, high in levels) for _, levels in good)
        if single > max(1, len(some) / 2):
            print(f"warning: {single} of {len(some)} images looked at hold a single grey level or "
                  "colour each: is the range of their values right?", file=sys.stderr)
        sizes = {size for size, _ in good}
        width, height = max(sizes)
        if len(sizes) > 1 or max(width, height) > side or 3 * width * height * len(folder) > limit:
            return folder

        def make(image, index):
            return [pil_to_tensor(ImageOps.fit(image, (width, height)))]

        items = pool.map(folder.__getitem__, ((make, i) for i in range(len(folder))))
        [pixels], _, bad = collate(items)
    folder.report(bad)
    folder.labels[[*bad]] = -1  # never evaluated
    return Images(pixels, folder.labels, folder.classes, folder.files, folder.root)


def from_torchvision(name, path):
    """CIFAR-10, CIFAR-100, STL-10 (train: with unlabelled) and Imagenette, downloaded on demand."""
    sets, root, grouped = torchvision.datasets, path or "downloads", dist.is_initialized()
    make, train, test = {
        "cifar10": (sets.CIFAR10, True, False),
        "cifar100": (sets.CIFAR100, True, False),
        "stl10": (sets.STL10, "train+unlabeled", "test"),
        "imagenette": (partial(sets.Imagenette, size="160px"), "train", "val")}[name]
    try:
        if not grouped or dist.get_rank() == 0:
            make(root, test, download=True)  # both parts; torchvision checks the md5
        if grouped:
            dist.barrier()
        parts = [make(root, split) for split in (train, test)]
    except (OSError, RuntimeError) as error:
        raise ValueError(f"--data {name} is not in {root!r} and cannot be downloaded ({error}): "
                         "name its --data-path, or use --data folder or textures") from error
    if name == "imagenette":
        return read_folder(os.path.join(root, "imagenette2-160"))
    axes, labels = ((0, 1, 2, 3), "labels") if name == "stl10" else ((0, 3, 1, 2), "targets")
    return [Images(torch.from_numpy(part.data).permute(axes).contiguous(),
                   torch.as_tensor(getattr(part, labels)).long(), part.classes) for part in parts]


DATASETS = "textures cifar10 cifar100 stl10 imagenette folder".split()


def load_data(name, path=None, image_size=32):
    """-> train, test (None where there is nothing to evaluate by), each `Images` or `Folder`."""
    if name == "textures":
        if path:
            raise ValueError(f"--data textures is drawn, and reads no --data-path {path}: leave "
                             "one of them out")
        return [Images(*textures(count, seed, image_size)[:2], TEXTURES)
                for count, seed in ((10000, 0), (1000, 1))]
    return read_folder(path) if name == "folder" else from_torchvision(name, path)


# ---- views -------------------------------------------------------------------------------------

CROP_DRAWS, COLOUR_DRAWS = 23, 9


def unit(x):
    """uint8 0 .. 255 -> float32 0 .. 1; other tensors are returned unchanged."""
    return x.float().div_(255) if x.dtype == torch.uint8 else x


def crop_boxes(draw, height, width, scale):
    """torchvision's RandomResizedCrop.get_params: draws (B, 23) -> top, left, h, w, (B,) int64."""
    low, high = scale  # of the area; the aspect is log-uniform in 3/4 .. 4/3, each drawn ten times
    area = height * width * (low + (high - low) * draw[:, :10])
    aspect = torch.exp(math.log(4 / 3) * (2 * draw[:, 10:20] - 1))
    w, h = (area * aspect).sqrt().round(), (area / aspect).sqrt().round()
    fits = (w >= 1) & (w <= width) & (h >= 1) & (h <= height)
    first = fits.int().argmax(1, keepdim=True)
    some = fits.any(1)  # else the largest central crop of an allowed aspect
    w = torch.where(some, w.gather(1, first).squeeze(1), min(width, round(height * 4 / 3)))
    h = torch.where(some, h.gather(1, first).squeeze(1), min(height, round(width * 4 / 3)))
    top = torch.where(some, (draw[:, 20] * (height - h + 1)).floor(), ((height - h) / 2).floor())
    left = torch.where(some, (draw[:, 21] * (width - w + 1)).floor(), ((width - w) / 2).floor())
    return top.long(), left.long(), h.long(), w.long()


def resize_matrix(start, length, size_in, size_out, bicubic=False):
    """Antialiased resize of pixels start .. start + length, as PIL's: (B, size_out, size_in)."""
    scale = length.view(-1, 1, 1) / size_out
    out = torch.arange(size_out, device=start.device).unsqueeze(1)
    source = torch.arange(size_in, device=start.device) - start.view(-1, 1, 1)  # within the crop
    distance = (source + 0.5 - (out + 0.5) * scale).abs() / scale.clamp_min(1)
    if bicubic:  # Keys 1981, a = -1/2
        x = distance.clamp_max(2)
        weight = torch.where(x < 1, (1.5 * x - 2.5) * x * x + 1, ((2.5 - x / 2) * x - 4) * x + 2)
    else:
        weight = (1 - distance).clamp_min(0)
    weight = weight * ((source >= 0) & (source < length.view(-1, 1, 1)))
    return weight / weight.sum(2, keepdim=True)


def crop(images, draw, size, scale, bicubic=False):
    """Crop, resize, flip: uint8 (B, 3, height, width), draws (B, 23) -> (B, 3, S, S), 0 to 1."""
    height, width = images.shape[2:]
    top, left, h, w = crop_boxes(draw, height, width, scale)
    rows = resize_matrix(top, h, height, size, bicubic)
    columns = resize_matrix(left, w, width, size, bicubic)
    columns = torch.where(draw[:, 22].view(-1, 1, 1) < 0.5, columns.flip(1), columns)
    crops = rows.unsqueeze(1) @ unit(images) @ columns.unsqueeze(1).mT
    return crops.clamp_(0, 1) if bicubic else crops


def grey(x):
    """ITU-R 601 luma, as torchvision: (B, 3, S, S) -> (B, 1, S, S)."""
    red, green, blue = x.split(1, 1)
    return (red * 0.2989).add_(green, alpha=0.587).add_(blue, alpha=0.114)


def shift_hue(x, turns):
    """Exact HSV hue shift of (B, 3, S, S) by `turns` (B, 1, 1).

    With c = max - min and the hue h in sixths of a turn, red is max - c·clamp(min(k, 4 - k), 0, 1),
    k = (5 + h) mod 6; green has 3 and blue 1 in place of 5.
    """
    red, green, blue = x.unbind(1)
    most, least = x.amax(1), x.amin(1)
    spread = most - least
    inverse = 1 / spread.clamp_min(1e-8)
    hue = torch.where(most == red, (green - blue) * inverse, torch.where(
        most == green, 2 + (blue - red) * inverse, 4 + (red - green) * inverse)) + 6 * turns

    def channel(n):
        k = (n + hue) % 6
        return most - spread * torch.minimum(k, 4 - k).clamp_(0, 1)

    return torch.stack([channel(n) for n in (5, 3, 1)], 1)


def blur(x, sigma):
    """Gaussian blur of sigma (B,) pixels: kernel of a tenth of the side, reflected borders."""
    S = x.shape[-1]
    radius = min(S - 1, math.ceil(S / 20), 8)  # sigma is at most 2: beyond 4 sigma is nothing
    offsets = torch.arange(-radius, radius + 1, device=x.device)
    weight = torch.exp(-0.5 * (offsets / sigma.unsqueeze(1)).square())
    weight.masked_fill_(weight < 1e-8, 0)  # denormal numbers are slow
    weight = weight / weight.sum(1, keepdim=True)  # (B, taps)
    at = torch.arange(S, device=x.device).unsqueeze(1) + offsets
    at = S - 1 - (S - 1 - at.abs()).abs()  # reflected
    matrix = x.new_zeros(len(x), S, S)
    matrix.scatter_add_(2, at.expand(len(x), -1, -1), weight.unsqueeze(1).expand(-1, S, -1))
    matrix = matrix.unsqueeze(1)

    def rows(x):  # matrix @ x, some rows at a time: a band of the matrix is all that is not zero
        step = 56 if x.device.type == "cpu" and S > 128 else S
        bands = [(slice(top, top + step), slice(max(0, top - radius), top + step + radius))
                 for top in range(0, S, step)]
        return torch.cat([matrix[:, :, out, band] @ x[:, :, band] for out, band in bands], 2)

    return rows(rows(x).mT).mT


def colour(x, draw, jitter=0.4, hue=0.1, grey_probability=0.2, blur_probability=0.5,
           solarize_probability=0.0, saturation=None, jitter_probability=0.8):
    """Jitter, grey, blur, solarise: (B, 3, S, S) in [0, 1], draws (B, 9) -> the same.

    Brightness and contrast vary by a factor in 1 ± jitter, saturation in 1 ± `saturation` (None:
    half of the jitter, as BYOL), hue by ± `hue` turns; sigma of the blur is uniform in .1 ..
    min(2, S / 32) pixels.
    """
    draw = draw.view(*draw.shape, 1, 1, 1)  # draw[:, k]: (B, 1, 1, 1)
    sizes = jitter, jitter, jitter / 2 if saturation is None else saturation

    def jittered(x, rows):
        brightness, contrast, s = (1 + size * (2 * d - 1)
                                   for size, d in zip(sizes, draw[rows, 1:4].unbind(1)))
        x = (x * brightness).clamp_(0, 1)
        mean = grey(x).mean((2, 3), keepdim=True)
        x.mul_(contrast).add_(mean * (1 - contrast)).clamp_(0, 1)
        shade = grey(x).mul_(1 - s)
        x.mul_(s).add_(shade).clamp_(0, 1)
        return shift_hue(x, hue * (2 * draw[rows, 4, 0] - 1)) if hue else x

    x = where_drawn(draw[:, 0] < jitter_probability, x, jittered)
    x = where_drawn(draw[:, 5] < grey_probability, x, lambda x, _: grey(x).expand_as(x))
    if blur_probability:
        sigma = 0.1 + (min(2.0, x.shape[-1] / 32) - 0.1) * draw[:, 7].flatten()
        x = where_drawn(draw[:, 6] < blur_probability, x, lambda x, rows: blur(x, sigma[rows]))
    if solarize_probability:
        x = where_drawn(draw[:, 8] < solarize_probability, x,
                        lambda x, _: torch.where(x >= 0.5, 1 - x, x))
    return x


def where_drawn(drawn, x, change):
    """Images (B, ..) with `change(images, their rows)` where they were drawn, (B, 1, 1, 1)."""
    if x.device.type != "cpu":  # a GPU would have to wait to know how many those are
        return torch.where(drawn, change(x, slice(None)), x)
    rows = drawn.flatten().nonzero().flatten()
    return x.index_put((rows,), change(x[rows], rows))


def normalize(x):
    """(.., 3, S, S) in [0, 1] -> zero mean and unit variance by ImageNet's statistics."""
    out = torch.empty_like(x)
    for channel, (mean, std) in enumerate(zip(MEAN, STD)):  # numbers: a GPU would wait for a tensor
        torch.sub(x.select(-3, channel), mean, out=out.select(-3, channel)).div_(std)
    return out


def cut(image, index, epoch, seed, views, bicubic=False):
    """All crops of one PIL image, uint8 (3, S, S): `views` is a list of (side, scale of area)."""
    draws = uniform(CROP_DRAWS, seed, epoch, index, torch.arange(len(views)))  # one row per view
    scales = torch.tensor([scale for _, scale in views]).T.unsqueeze(2)
    boxes = torch.stack(crop_boxes(draws, image.height, image.width, scales), 1).tolist()
    mode = InterpolationMode.BICUBIC if bicubic else InterpolationMode.BILINEAR
    pixels = pil_to_tensor(image)
    crops = [resized_crop(pixels, *box, [size, size], mode) for box, (size, _) in zip(boxes, views)]
    return [x.flip(2) if flip else x for x, flip in zip(crops, draws[:, 22] < 0.5)]


def collate(items):
    views, index, bad = zip(*items)
    views = [torch.stack(x) for x in zip(*views)]
    if torch.utils.data.get_worker_info():  # here, since an error in a worker's queue is lost
        views = [x.share_memory_() for x in views]
    return views, index, {i: why for found in bad for i, why in found.items()}


def fetched(folder, keys, workers, device):
    """Batches of folder[key] as of `collate`; an error of a worker is a DataError of one line."""
    # torch's handler of signals is off: it would raise for a dead worker in the middle of a step
    torch.utils.data._utils.signal_handling._SIGCHLD_handler_set = True
    try:
        yield from torch.utils.data.DataLoader(
            folder, batch_sampler=keys, num_workers=workers, collate_fn=collate,
            pin_memory=device.type == "cuda")
    except (DataError, EOFError, OSError, RuntimeError) as error:
        if not workers:
            raise
        text = (str(error).strip() or repr(error)).splitlines()[-1]  # behind the traceback
        raise DataError(f"a worker failed to read images: {text} (if shared memory is short: "
                        "--workers 0, or docker run --shm-size 8g)") from error


def loaded(folder, keys, workers, device):
    """Batches of folder[key] -> (list of uint8 views (B, 3, S, S) on the device, index (B,))."""
    for views, index, bad in fetched(folder, keys, workers, device):
        folder.report(bad)
        yield [x.to(device, non_blocking=True) for x in views], torch.tensor(index)


def coloured(crops, draw, options):
    """Crops, uint8 or in [0, 1], normalised, with new colours where there are options."""
    if not options:
        return normalize(unit(crops))
    # on a CPU some images at a time: they stay in its cache
    few = max(1, 2**18 // crops.shape[-1]**2) if crops.device.type == "cpu" else len(crops)
    return torch.cat([normalize(colour(unit(x), d, **options))
                      for x, d in zip(crops.split(few), draw.split(few))])


def train_batches(data, steps, views, seed, device, workers=0, weak=True, bicubic=False,
                  **colours):
    """For each (epoch, index (B,)) of `steps`: (index, weak, strong), lists of one tensor per view.

    A view is (side, scale of area). Weak ones are cropped and flipped (none unless `weak`), strong
    ones have new colours besides. A colour option is a number, or a list with one per view.
    """
    def finish(crops, epoch, index):
        # 1000: other numbers than those of this view's crop
        strong = [coloured(x, uniform(COLOUR_DRAWS, seed, epoch, index, 1000 + view),
                           {name: value[view] if isinstance(value, list) else value
                            for name, value in colours.items()}) for view, x in enumerate(crops)]
        return index, [normalize(unit(x)) for x in (crops if weak else [])], strong

    if isinstance(data, Images):
        images = data.images.to(device)
        for epoch, index in steps:
            index = index.to(device)
            crops = [crop(images[index], uniform(CROP_DRAWS, seed, epoch, index, k), *view, bicubic)
                     for k, view in enumerate(views)]
            yield finish(crops, epoch, index)
        return
    steps, again = itertools.tee(steps)
    keys = ([(partial(cut, epoch=epoch, seed=seed, views=views, bicubic=bicubic), i)
             for i in index.tolist()] for epoch, index in steps)
    for (epoch, _), (crops, index) in zip(again, loaded(data, keys, workers, device)):
        yield finish(crops, epoch, index.to(device))


# test images that differ from those of the training set, by five strengths each
SHIFTS = dict(noise=(0.04, 0.08, 0.12, 0.16, 0.2),  # standard deviation, of values in 0 .. 1
              blur=(0.5, 0.75, 1.0, 1.25, 1.5),  # standard deviation, in 1/32 of the side
              contrast=(0.75, 0.5, 0.4, 0.3, 0.15),  # factor
              hue=(0.1, 0.2, 0.3, 0.4, 0.5),  # turns
              rotate=(10, 20, 30, 45, 60))  # degrees; the corners become black


def shifted(images, index, name, strength):
    """Images (B, 3, S, S) in [0, 1], changed as `SHIFTS` says; the same noise for the same index.

    In the manner of ImageNet-C (Hendrycks, Dietterich 2019, arXiv 1903.12261).
    """
    if name == "noise":
        u = uniform(images[0].numel(), 2, index.to(images.device)).view_as(images)
        normal = torch.special.ndtri(u.clamp(1e-6, 1 - 1e-6))
        return (images + strength * normal).clamp(0, 1)
    if name == "blur":
        sigma = strength * images.shape[-1] / 32
        radius = min(math.ceil(3 * sigma), images.shape[-1] - 1)
        return gaussian_blur(images, 2 * radius + 1, sigma)
    change = dict(contrast=adjust_contrast, hue=adjust_hue, rotate=rotate)[name]
    return change(images, strength)


def eval_batches(data, indices, size, device, workers=0, batch_size=256, shift=None):
    """Images as measured, centre-cropped -> batches (normalised (B, 3, S, S), labels (B,)).

    `shift` is a pair (name, strength) for `shifted`.
    """
    def finish(images, index):
        images = unit(images)
        return normalize(shifted(images, index, *shift) if shift else images), data.labels[index]

    pieces = [piece for piece in torch.as_tensor(indices).split(batch_size) if len(piece)]
    if isinstance(data, Images):
        for index in pieces:
            images = resize(unit(data.images[index].to(device)), size, antialias=True)
            yield finish(center_crop(images, size), index)
        return
    keys = [[(partial(center_view, size=size), i) for i in piece.tolist()] for piece in pieces]
    for asked, ([images], index) in zip(pieces, loaded(data, keys, workers, device)):
        good = index == asked  # the others replace unreadable images
        if good.any():
            yield finish(images[good.to(device)], index[good])
