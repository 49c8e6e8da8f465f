"""Data: crops and colours against torchvision, batches as functions of their keys, folders."""
import contextlib
import math
import os
import shutil
import signal
from functools import partial
from unittest.mock import Mock

import numpy as np
import pytest
import torch
import torchvision
import torchvision.transforms.functional as TF
from PIL import Image
from torch.testing import assert_close

from data import (MEAN, STD, DataError, Folder, Images, colour, crop, eval_batches, fingerprint,
                  load_data, loaded, train_batches)
from textures import textures

CPU = torch.device("cpu")
VIEWS = [(16, (0.4, 1.0)), (8, (0.1, 0.4))]
OFF = dict(jitter=0, hue=0, grey_probability=0, blur_probability=0)


def pictures(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)


def draws(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def write(path, size=(32, 32), seed=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pictures(size[1], size[0], 3, seed=seed).numpy()).save(path)


def write_folder(root, broken=(), grows=1):
    """20 images root/train/only/00.png ..: of several sizes where it grows, some unreadable."""
    for i in range(20):
        path = root / "train" / "only" / f"{i:02}.png"
        write(path, (33 + i * grows, 40), seed=i)
        if i in broken:
            path.write_bytes([b"", b"no image", path.read_bytes()[:2000]][i % 3])
    return root


def folder_of(*files):
    return Folder([*map(str, files)], [0] * len(files), ["only"])


def views_of(data, *steps, workers=0, **colours):
    return list(train_batches(data, steps, VIEWS, 7, CPU, workers, **colours))


def seen(normalised):  # as images are looked at, 0 to 1
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in (MEAN, STD))
    return normalised * std + mean


# ---------- crops and colours ----------

def first_box_that_fits(draw, height, width, scale):
    """RandomResizedCrop.get_params of torchvision, written for given draws: top, left, h, w."""
    for k in range(10):
        area = height * width * (scale[0] + (scale[1] - scale[0]) * draw[k])
        aspect = math.exp(math.log(3 / 4) + (math.log(4 / 3) - math.log(3 / 4)) * draw[10 + k])
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            return int(draw[20] * (height - h + 1)), int(draw[21] * (width - w + 1)), h, w
    w, h = min(width, round(height * 4 / 3)), min(height, round(width * 4 / 3))
    return (height - h) // 2, (width - w) // 2, h, w


@pytest.mark.parametrize("height, width, size", [
    (32, 32, 32), (40, 24, 16), (20, 31, 48), (10, 400, 16), (400, 10, 16), (1, 1, 4)])
@pytest.mark.parametrize("bicubic", [False, True])
def test_crop_is_torchvisions_random_resized_crop_and_flip(height, width, size, bicubic):
    mode = TF.InterpolationMode.BICUBIC if bicubic else TF.InterpolationMode.BILINEAR
    images, draw, expected = pictures(24, 3, height, width), draws(24, 23), []
    for image, row in zip(images, draw.tolist()):
        box = first_box_that_fits(row, height, width, (0.05, 1.0))
        view = TF.resized_crop(image.float() / 255, *box, [size, size], mode, antialias=True)
        expected.append(view.flip(2) if row[22] < 0.5 else view)
    found = crop(images, draw, size, (0.05, 1.0), bicubic)
    assert_close(found, torch.stack(expected).clamp(0, 1), atol=1e-5, rtol=0)


def no_change(count):
    draw = torch.full((count, 9), 0.99)  # every "with probability p" says no
    draw[:, 1:5] = 0.5  # a factor of 1
    return draw


def test_jitter_is_torchvisions_brightness_contrast_saturation_hue_in_this_order():
    levels = torch.tensor([0., 0.5, 1.0])
    corners = torch.cartesian_prod(levels, levels, levels).T.view(1, 3, 27, 1)  # black .. white
    x, draw = torch.cat([draws(6, 3, 27, 1), corners]), no_change(7)
    draw[:, 0], draw[:, 1:5] = 0.79, draws(7, 4, seed=1)
    factor, turns = (0.6 + 0.8 * draw[:, 1:4]).tolist(), (draw[:, 4] - 0.5).tolist()
    expected = []
    for image, (brightness, contrast, saturation), turn in zip(x, factor, turns):
        image = TF.adjust_contrast(TF.adjust_brightness(image, brightness), contrast)
        image = TF.adjust_saturation(image, 1 + (saturation - 1) / 2)  # half as strong, as BYOL
        expected.append(TF.adjust_hue(image, turn))
    options = OFF | dict(jitter=0.4, hue=0.5)
    assert_close(colour(x, draw, **options), torch.stack(expected), atol=2e-5, rtol=0)
    draw[:, 0] = 0.81
    assert colour(x, draw, **options).equal(x)  # with probability 0.8


@pytest.mark.parametrize("side", [4, 32, 64])
def test_blur_is_torchvisions_with_a_kernel_of_a_tenth_of_the_side(side):
    x, draw = draws(3, 3, side, side), no_change(3)
    draw[:, 6], draw[:, 7] = 0, torch.tensor([0, 0.4, 1])
    kernel, largest = [2 * math.ceil(side / 20) + 1] * 2, min(2.0, side / 32)
    sigmas = (0.1 + (largest - 0.1) * draw[:, 7]).tolist()
    expected = [TF.gaussian_blur(image, kernel, [sigma] * 2) for image, sigma in zip(x, sigmas)]
    blurred = colour(x, draw, **(OFF | dict(blur_probability=0.5)))
    assert_close(blurred, torch.stack(expected), atol=1e-5, rtol=0)


@pytest.mark.parametrize("slot, option, change", [
    (5, "grey_probability", lambda x: TF.rgb_to_grayscale(x, 3)),
    (8, "solarize_probability", lambda x: TF.solarize(x, 0.5))])
def test_grey_and_solarise_happen_with_their_probability(slot, option, change):
    x, draw = draws(2, 3, 16, 16), no_change(2)
    draw[:, slot] = torch.tensor([0.29, 0.31])
    changed, same = colour(x, draw, **(OFF | {option: 0.3}))
    assert_close(changed, change(x)[0])
    assert same.equal(x[1])


# ---------- batches ----------

def test_a_view_depends_on_seed_epoch_index_and_view_alone():
    data, alike = Images(*textures(12, 0)[:2], ["any"]), [(16, (0.4, 1.0))] * 2

    def views(*index, epoch=3, seed=7):
        steps = [(epoch, torch.tensor(index))]
        [(_, weak, strong)] = train_batches(data, steps, alike, seed, CPU, jitter=0.4, hue=0.5)
        return torch.stack(weak + strong)[:, -1]  # of the last image

    alone = views(9)
    assert_close(views(5, 0, 9), alone, atol=1e-5, rtol=0)
    for other in (views(9, epoch=4), views(9, seed=8), alone[[1, 0, 3, 2]]):
        assert (alone - other).abs().amax((1, 2, 3)).min() > 0.1


def test_the_strong_view_is_the_weak_crop_with_colours_of_its_own_epoch_and_view():
    data, index, grey = Images(*textures(40, 0)[:2], ["any"]), torch.arange(40), []
    options = OFF | dict(grey_probability=[0.3, 0.7])  # one value per view
    batches = views_of(data, (0, index), (1, index), **options)
    for weak, strong in [pair for _, *views in batches for pair in zip(*views)]:
        weak, strong = seen(weak), seen(strong)
        luma = TF.rgb_to_grayscale(weak, 3)
        grey.append((strong - luma).abs().amax((1, 2, 3)) < 1e-4)
        expected = torch.where(grey[-1].view(-1, 1, 1, 1), luma, weak)
        assert_close(strong, expected, atol=1e-4, rtol=0)
    assert all(0 < few.sum() < 20 < many.sum() < 40 for few, many in (grey[:2], grey[2:]))
    assert not grey[0].equal(grey[2]) and (grey[0] & ~grey[1]).any()  # unrelated draws


def test_views_from_disk_are_those_in_memory_and_the_same_for_any_number_of_workers(tmp_path):
    memory, _ = load_data("folder", str(write_folder(tmp_path, grows=0)))
    disk = folder_of(*sorted(tmp_path.rglob("*.png")))
    steps = [(0, torch.arange(8)), (0, torch.arange(8, 16)), (1, torch.tensor([3, 1]))]
    batches = [views_of(disk, *steps, workers=n, jitter=0.4) for n in (0, 2)]
    for (_, index), one, two, third in zip(steps, *batches, views_of(memory, *steps), strict=True):
        assert all(x[0].equal(index) for x in (one, two, third))
        assert all(a.equal(b) for a, b in zip(one[1] + one[2], two[1] + two[2], strict=True))
        for a, b in zip(one[1], third[1]):
            assert (seen(a) - seen(b))[..., 1:-1, 1:-1].abs().max() < 1.6 / 255  # PIL rounds twice


@pytest.mark.parametrize("width, height", [(300, 200), (256, 223), (112, 112), (50, 90), (600, 40)])
def test_images_on_disk_are_measured_by_resize_and_centre_crop(tmp_path, width, height):
    write(tmp_path / "a.png", (width, height))  # 128: 112 · 256 / 224
    image = TF.resize(Image.open(tmp_path / "a.png"), 128, TF.InterpolationMode.BICUBIC)
    [(images, labels)] = eval_batches(folder_of(tmp_path / "a.png"), [0], 112, CPU)
    expected = TF.to_tensor(TF.center_crop(image, 112))
    assert_close(seen(images)[0], expected, atol=1e-5, rtol=0)
    assert labels.tolist() == [0]


def test_sets_in_memory_are_measured_at_any_size():
    data = Images(pictures(3, 3, 48, 64), torch.arange(3), list("abc"))
    [(images, labels)] = eval_batches(data, torch.tensor([2, 0]), 24, CPU)
    expected = TF.center_crop(TF.resize(data.images[[2, 0]].float() / 255, 24, antialias=True), 24)
    assert labels.tolist() == [2, 0]
    assert_close(seen(images), expected, atol=1e-5, rtol=0)


# ---------- folders ----------

def populate(root, places):
    """An image per place; `link>target` is a link."""
    for number, place in enumerate(places.split()):
        name, _, target = place.partition(">")
        if target:
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).symlink_to(target)
        elif os.path.splitext(name)[1] in (".png", ".jpg"):
            write(root / name, seed=number)
        else:
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).write_text("words")
    return str(root)


def test_a_wrong_folder_is_an_error_that_names_it(tmp_path):
    populate(tmp_path, "empty/train/cat/notes.txt newt/train/cat/a.png newt/val/cat/b.png "
             "newt/val/newt/c.png")  # a class that train/ lacks
    for path in ("/no/such/place", None, f"{tmp_path}/empty", f"{tmp_path}/newt"):
        with pytest.raises(ValueError, match=str(path)):
            load_data("folder", path)


@pytest.mark.parametrize("more, why", [
    *((f"train/{name}/x.png", "") for name in (
        ".ipynb_checkpoints", "__MACOSX", "@eaDir", "$RECYCLE.BIN", "lost+found", ".git", "@tmp",
        "#recycle", "cat/.thumbnails", "__pycache__")),
    ("train/dog/._0.png", ""),
    *((f"train/{link}", "1 link to a folder that is visited anyway")
      for link in ("cat/back>..", "cat/up>../..", "cow>cat", "ant>cat", "ant/a>../cat")),
    ("train/gone>/no/such", "1 dead link"), ("train/cat/b.txt", "1 .txt file without a reader"),
    ("train/cat/a.heic", "1 .heic file without a reader")])
def test_what_lies_beside_the_images_is_left_out_and_said_unless_hidden(
        tmp_path, capsys, more, why):
    train, _ = load_data("folder", populate(
        tmp_path, "train/cat/0.png train/dog/1.png val/dog/2.png " + more))
    assert len(train) == 2 and train.classes == ["cat", "dog"]
    first = tmp_path / more.partition(">")[0]
    assert capsys.readouterr().out == ("2 images, 2 classes ['cat', 'dog'], 1 test images"
                                       + f"; left out: {why} ('{first}')" * bool(why) + "\n")


def test_classes_are_the_sorted_names_of_folders_and_of_links_to_elsewhere(tmp_path):
    path = populate(tmp_path, "store/x/0.png store/x/a/1.png store/y/2.png set/train/@/3.png "
                    "set/train/#1/4.png set/train/x>../../store/x set/train/y>../../store/y "
                    "set/val/x/5.png")
    train, test = load_data("folder", f"{path}/set")
    assert train.classes == ["#1", "@", "x", "y"]
    assert train.labels.tolist() == [0, 1, 2, 2, 3] and test.labels.tolist() == [2]


@pytest.mark.parametrize("closed", ["train/cat", "val/cat", "train/dog/deep", "train"])
def test_a_folder_that_cannot_be_read_is_refused(tmp_path, monkeypatch, closed):
    path = populate(tmp_path, "train/cat/0.png train/dog/1.png train/dog/deep/2.png "
                    "val/cat/3.png val/dog/4.png")
    scandir = os.scandir  # chmod would not keep root out

    def guarded(place):
        if os.fspath(place).rstrip("/").endswith(closed):
            raise PermissionError(13, "Permission denied", place)
        return scandir(place)
    monkeypatch.setattr(os, "scandir", guarded)
    with pytest.raises(ValueError, match=f"{path}/{closed}.* cannot be read .Permission denied"):
        load_data("folder", path)


@pytest.mark.parametrize("places, way_out", [
    ("train/images/cat/0.png train/images/dog/1.png val/images/cat/2.png", "train/images"),
    ("train/all/a/b/0.png train/all/1.png train/all/a/2.png", "train/all"),
    ("birds/train/cat/0.png birds/train/dog/1.png birds/val/cat/2.png", "birds"),
    ("Testing/cat/0.png Training/cat/1.png Training/dog/2.png", "Testing"),
    ("val/cat/0.png val/dog/1.png", "val")])
def test_a_folder_too_much_is_refused_with_the_way_out(tmp_path, places, way_out):
    with pytest.raises(ValueError, match=f"folder too much.*--data-path {tmp_path}/{way_out}$"):
        load_data("folder", populate(tmp_path, places))


CAFE, CAFE_APART = "caf\u00e9", "cafe\u0301"  # one letter, or a letter and its accent


@pytest.mark.parametrize("places, classes, test, said", [
    (" ".join(f"{k}/{i}.png" for k in "ab" for i in range(20)), 2, 4, "every tenth per class"),
    ("a/0.png a/1.png a/2.png valve/3.png", 2, 1, "every tenth per class"),
    *((f"train/a/0.png train/b/1.png {name}/b/2.png", 2, 1, "1 test images")
      for name in ("val", "valid", "validation", "test")),
    (f"train/{CAFE}/0.png val/{CAFE_APART}/1.png", 1, 1, "1 test images"),
    (f"train/{CAFE_APART}/0.png train/{CAFE}/1.png test/{CAFE}/2.png", 1, 1, "2 images"),
    ("train/a/0.png test/1.png", 1, 0, "1 images without classes"),
    ("train/a/0.png val/1.png val/2.png test/a/3.png", 1, 1, "2 images without classes"),
    ("train/a/0.png test/unknown/1.png", 1, 0, "holds folders 'unknown'"),
    ("train/a/0.png val/notes.txt", 1, 0, "0 images without classes"),
    ("train/a/0.png", 1, 0, "needs train/CLASS/image and val/CLASS/image"),
    ("0.png 1.png 2.png notes.txt .hidden.png", 0, 0, "left out: 1 .txt file without a reader"),
    ("train/0.png train/1.png train/2.png", 0, 0, "3 images, 0 classes [], 0 test images"),
    ("train/a/0.png val/a/1.png val/2.png", 1, 1, "1 image without a class"),
    ("0.png a/1.png a/2.png", 0, 0, "2 image in a sub-folder")])
def test_layouts_that_people_have(tmp_path, capsys, places, classes, test, said):
    train, held = load_data("folder", populate(tmp_path, places))
    assert len(train.classes) == classes and (len(held) if held else held) == (test or None)
    assert (train.labels < 0).all() == (not classes)
    assert said in capsys.readouterr().out
    if held:
        names = [{os.path.relpath(file, tmp_path) for file in x.files} for x in (train, held)]
        assert not names[0] & names[1] and {*held.labels.tolist()} <= {*train.labels.tolist()}


def test_a_set_is_known_by_its_names_sizes_and_labels(tmp_path):
    def found(path):
        return [fingerprint(part) for part in load_data("folder", str(path))]

    first = tmp_path / "first"
    places = "train/a/0.png train/b/1.png train/b/2.png val/a/3.png"
    whole = found(populate(first, places))
    assert whole == found(f"{first}/") and len({*whole}) == 2
    moved = shutil.move(first, tmp_path / "moved")
    assert found(moved) == whole
    Image.new("RGB", (300, 300)).save(moved / "train/a/0.png")  # no longer held in memory
    changed = [whole, found(moved)]
    for change in (lambda: (moved / "train/b/2.png").unlink(),
                   lambda: os.renames(moved / "train/b/1.png", moved / "train/a/1.png"),
                   lambda: write(moved / "train/a/4.png")):
        change()
        changed.append(found(moved))
    assert len({train for train, _ in changed}) == len(changed)
    assert {test for _, test in changed[:2]} == {whole[1]}
    sets = [Images(pictures(2, 3, 4, 4), torch.tensor(labels), classes)
            for labels, classes in (([0, 1], "ab"), ([1, 0], "ab"), ([0, 1], "ac"))]
    assert len({fingerprint(x) for x in sets}) == 3


RAMP = np.linspace(0, 1, 1024, dtype=np.float32).reshape(32, 32)


@pytest.mark.parametrize("values, end", [
    *(((RAMP * (2**bits - 1)).round().astype(np.uint16), end)
      for bits in (8, 10, 12, 14, 16) for end in ("png", "tif")),
    *((values, "tif") for values in ((RAMP * 65535).astype(np.int32), RAMP, RAMP * 255, RAMP * 4095,
                                     (RAMP * 4095).astype(np.int32)))])
def test_grey_of_any_range_becomes_eight_bits(tmp_path, values, end):
    Image.fromarray(values).save(tmp_path / f"a.{end}")
    opened = folder_of(tmp_path / f"a.{end}").open(0)
    assert np.abs(np.asarray(opened)[..., 1] - 255 * RAMP).max() <= 1


@pytest.mark.parametrize("values", [
    RAMP - 0.5, RAMP * 1e5, np.where(RAMP > 0.5, np.nan, RAMP).astype(np.float32),
    (RAMP * 4000 - 1000).astype(np.int32), (RAMP * 1e6).astype(np.int32)])
def test_other_ranges_are_refused_by_name(tmp_path, values):
    write(tmp_path / "0.png")
    Image.fromarray(values).save(tmp_path / "wide.tif")
    with pytest.raises(DataError, match="wide.tif .values .*not 0 .. 1"):
        load_data("folder", str(tmp_path))


@pytest.mark.parametrize("constant, warned", [(3, True), (2, False)])
def test_images_of_a_single_level_are_warned_of(tmp_path, capsys, constant, warned):
    for i in range(5):
        write(tmp_path / f"{i}.png")
        if i < constant:
            Image.new("RGB", (8, 8), (i, 2, 3)).save(tmp_path / f"{i}.png")
    load_data("folder", str(tmp_path))
    assert ("3 of 5 images looked at hold a single" in capsys.readouterr().err) == warned


@pytest.mark.parametrize("break_it, why", [
    (lambda path: path.write_text("words"), "cannot identify"),
    (lambda path: path.write_bytes((path.parent / "00.png").read_bytes()[:2000]), "truncated"),
    (lambda path: path.symlink_to("/no/such"), "No such file"),
    (lambda path: Image.new("1", (14000, 14000)).save(path), "decompression bomb"),
    (lambda path: path.symlink_to(path), "Too many levels")])
def test_an_unreadable_file_is_named_with_its_reason(tmp_path, capsys, break_it, why):
    path = write_folder(tmp_path) / "train/only/05.png"
    path.unlink()
    break_it(path)
    load_data("folder", str(tmp_path))
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith(f"unreadable, skipped: {path} (") and why in line


# ---------- workers ----------

def process(image, index):
    return [torch.tensor([os.getpid(), index])]


def fail(image, index, how):
    if isinstance(how, Exception):
        raise how
    os.kill(os.getpid(), how)


@pytest.mark.parametrize("how, text", [
    (RuntimeError("out of\nshared memory"), "shared memory"), (OSError("disk"), "disk"),
    (signal.SIGKILL, "exited unexpectedly"), (signal.SIGBUS, "exited unexpectedly")])
def test_an_error_in_a_worker_ends_the_run_in_one_line(tmp_path, monkeypatch, how, text):
    loaders = torch.utils.data.dataloader  # looks for dead workers every 5 s
    monkeypatch.setattr(loaders._utils, "MP_STATUS_CHECK_INTERVAL", 0.1)
    waiting = loaders._MultiProcessingDataLoaderIter._try_get_data
    monkeypatch.setattr(waiting, "__defaults__", (0.1,))
    write(tmp_path / "a.png")
    folder, keys = folder_of(tmp_path / "a.png"), [[(partial(fail, how=how), 0)]]
    with pytest.raises(DataError, match=f"^a worker failed.*{text}.*--workers 0.*shm") as error:
        list(loaded(folder, keys, 1, CPU))
    assert "\n" not in str(error.value)
    assert signal.getsignal(signal.SIGCHLD) == signal.SIG_DFL  # no error within a step


def test_a_batch_that_a_worker_cannot_hand_over_ends_the_run(tmp_path, monkeypatch):
    write(tmp_path / "a.png")
    monkeypatch.setattr(torch.Tensor, "share_memory_", Mock(side_effect=RuntimeError("no space")))
    with pytest.raises(DataError, match="no space.*--workers 0"):
        list(loaded(folder_of(tmp_path / "a.png"), [[(process, 0)]], 1, CPU))


TURNED = Image.new("L", (20, 40), 128)
TURNED.getexif()[0x0112] = 6  # a photo on its side


@pytest.mark.parametrize("name, image", [
    ("a.png", Image.new("L", (40, 20), 128)), ("a.png", Image.new("RGBA", (40, 20), (128,) * 3)),
    ("a.png", Image.new("L", (40, 20), 128).convert("P")), ("a.jpg", TURNED),
    ("a.jpg", Image.new("CMYK", (40, 20), (0, 0, 0, 127))),
    ("a.png", Image.fromarray(np.full((20, 40), 128 * 257, np.uint16)))])
def test_odd_images_open_upright_in_rgb_of_the_right_brightness(tmp_path, name, image):
    image.save(tmp_path / name, exif=image.getexif())
    opened = folder_of(tmp_path / name).open(0)
    assert opened.mode == "RGB" and opened.size == (40, 20)
    assert np.abs(np.asarray(opened).astype(int) - 128).max() <= 3


@pytest.mark.parametrize("workers", [0, 2])
def test_a_broken_file_is_named_once_and_replaced_by_the_next(tmp_path, capfd, workers):
    train, _ = load_data("folder", str(write_folder(tmp_path, broken=[5, 19])))
    expected = [0, 1, 2, 3, 4, 6, *range(6, 19), 0]  # 5 by 6, the last by the first
    for index, weak, _ in views_of(train, (0, torch.arange(20)), (1, torch.arange(20)),
                                   workers=workers):
        assert index.tolist() == expected
        assert weak[0][5].equal(weak[0][6]) and weak[0][19].equal(weak[0][0])
    train.labels = torch.arange(20)  # evaluated: all others, beside their labels
    images, labels = zip(*eval_batches(train, torch.arange(20), 16, CPU, batch_size=5))
    assert torch.cat(labels).tolist() == [i for i in range(20) if i not in (5, 19)]
    assert len(torch.cat(images)) == 18 and list(eval_batches(train, [5], 16, CPU)) == []
    assert capfd.readouterr().err.count("05.png") == 1


def test_in_memory_a_broken_file_is_replaced_by_the_next_and_never_evaluated(tmp_path, capsys):
    train, _ = load_data("folder", str(write_folder(tmp_path, broken=[5, 19], grows=0)))
    assert isinstance(train, Images) and len(train) == len(train.images) == 20
    for i, other in ((5, 6), (19, 0), (7, 7)):  # the other indices stay as they are
        assert train.images[i].equal(pictures(40, 33, 3, seed=other).permute(2, 0, 1))
    assert train.labels.tolist() == [-1 if i in (5, 19) else 0 for i in range(20)]
    assert capsys.readouterr().err.count("05.png") == 1


@pytest.mark.parametrize("grows", [0, 1])
def test_more_than_a_tenth_broken_stops_before_the_run_or_within_it(tmp_path, grows):
    train, _ = load_data("folder", str(write_folder(tmp_path)))  # read again from here on
    write_folder(tmp_path, broken=[1, 2, 3], grows=grows)
    with pytest.raises(ValueError, match="3 of 20 .*repair or remove"):
        load_data("folder", str(tmp_path))
    with pytest.raises(ValueError, match="3 of 20"):
        views_of(train, (0, torch.arange(10)))


@pytest.mark.parametrize("looked_at, bad, stops", [
    (2000, 200, False), (2000, 201, True), (256, 40, False), (256, 60, True)])
def test_a_tenth_of_the_set_counts_and_a_sample_of_it_may_hold_more(looked_at, bad, stops, capsys):
    folder = folder_of(*range(2000))
    with pytest.raises(DataError, match=f"{bad} of") if stops else contextlib.nullcontext():
        folder.report(dict.fromkeys(range(bad), "why"), looked_at)
    assert capsys.readouterr().err.count("why") == (0 if stops else bad)


@pytest.mark.parametrize("name, kind, axes", [("cifar10", "CIFAR10", (0, 3, 1, 2)),
                                              ("stl10", "STL10", (0, 1, 2, 3))])
def test_a_set_that_is_missing_is_downloaded_once(tmp_path, monkeypatch, name, kind, axes):
    pixels, downloads = pictures(6, 3, 3, 3).numpy(), []

    class Small:
        data, targets, labels, classes = pixels, [0] * 6, np.zeros(6, np.int64), ["only"]

        def __init__(self, root, split=None, train=None, download=False):
            if download and not downloads:
                downloads.append(root)
            if not downloads:
                raise RuntimeError("Dataset not found or corrupted")
    monkeypatch.setattr(torchvision.datasets, kind, Small)
    for _ in range(2):
        train, test = load_data(name, str(tmp_path / "sets"))
        assert train.images.equal(torch.from_numpy(pixels).permute(axes)) and len(test) == 6
    assert downloads == [str(tmp_path / "sets")]


def test_a_failed_download_names_the_set_and_the_way_out(tmp_path, monkeypatch):
    for kind, error in (("CIFAR10", OSError), ("CIFAR100", RuntimeError)):
        monkeypatch.setattr(torchvision.datasets, kind, Mock(side_effect=error("no network")))
        with pytest.raises(ValueError, match=f"--data {kind.lower()}.*no network.*--data-path"):
            load_data(kind.lower(), str(tmp_path))


def test_imagenette_is_read_as_a_folder(tmp_path):
    for part in ("train", "val"):
        write(tmp_path / "imagenette2-160" / part / "n01440764" / "a.jpeg")
    train, test = load_data("imagenette", str(tmp_path))
    assert train.classes == ["n01440764"] and len(train) == len(test) == 1
