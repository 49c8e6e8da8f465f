"""Data: random numbers as a function, crops and colours against torchvision, folders of every kind.

    pytest tests/test_data.py
"""
import colorsys
import hashlib
import math
import sys
import zlib

import numpy as np
import pytest
import torch
import torchvision.transforms.functional as TF
from PIL import Image
from torch.testing import assert_close

from data import (FACTORS, MEAN, STD, Folder, Images, UnreadableImages, blur, colour, crop,
                  crop_boxes, crop_pil, eval_batches, grey, hsv_to_rgb, load_data, resize_center,
                  shift_hue, textures, train_batches, uniform)

CPU = torch.device("cpu")
VIEWS = [(16, (0.4, 1.0)), (8, (0.1, 0.4))]
LEVELS = torch.tensor([0., 0.5, 1.0])
CORNERS = torch.cartesian_prod(LEVELS, LEVELS, LEVELS).T.view(1, 3, 27, 1)  # black .. white


def pictures(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)


def draws(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def correlation(a, b):
    return torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1].abs().item()


def write(path, size=(32, 32), seed=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pictures(size[1], size[0], 3, seed=seed).numpy()).save(path)


def write_folder(root, count=20, broken=()):
    """Images 00.png .. of different sizes in train/only and val/only; some hold no image."""
    for split, number in (("train", count), ("val", 2)):
        for i in range(number):
            write(root / split / "only" / f"{i:02}.png", (33 + i, 40), seed=i)
    for i in broken:
        (root / "train" / "only" / f"{i:02}.png").write_bytes(b"no image at all")
    return root


# ---------- randomness as a function ----------

def test_equal_keys_give_equal_numbers_whatever_was_drawn_before():
    first = uniform(4, 1, 2, 3)
    uniform(100, 9, 9), torch.rand(7)
    assert uniform(4, 1, 2, 3).equal(first) and first.shape == (1, 4)


def test_a_number_does_not_depend_on_the_rest_of_the_batch():
    batch = uniform(5, 0, 1, torch.tensor([8, 3, 5]), 2)
    assert batch[1].equal(uniform(5, 0, 1, torch.tensor([3]), 2)[0])
    assert batch[2].equal(uniform(5, 0, 1, 5, 2)[0])
    assert batch[:, :2].equal(uniform(2, 0, 1, torch.tensor([8, 3, 5]), 2))


@pytest.mark.parametrize("changed", range(4))
def test_each_key_alone_changes_all_numbers_to_unrelated_ones(changed):
    index, other = [0, 0, torch.arange(5000), 0], [0, 0, torch.arange(5000), 0]
    other[changed] = other[changed] + 1
    a, b = uniform(4, *index), uniform(4, *other)
    assert (a == b).float().mean() < 0.001
    assert correlation(a, b) < 0.02


def test_the_order_of_the_keys_matters():
    assert not uniform(4, 1, 2).equal(uniform(4, 2, 1))


def test_numbers_are_uniform_and_neighbours_are_unrelated():
    x = uniform(32, 0, 0, torch.arange(4096), 0)  # 131072 numbers: the mean varies by 0.0008
    assert x.min() >= 0 and x.max() < 1
    assert abs(x.mean() - 1 / 2) < 0.004 and abs(x.var() - 1 / 12) < 0.001
    assert correlation(x[1:], x[:-1]) < 0.01 and correlation(x[:, 1:], x[:, :-1]) < 0.01
    assert (torch.histc(x, 16, 0, 1) / x.numel() - 1 / 16).abs().max() < 0.003


# ---------- the built-in set ----------

def test_textures_depend_on_the_seed_alone():
    first, again, other = (textures(20, seed)[0].images for seed in (0, 0, 1))
    assert first.equal(again) and not first.equal(other)
    assert textures(30, 0)[0].images[:20].equal(first)


def test_twenty_textures_are_these_very_bytes():
    pixels = textures(20, 0)[0].images.numpy().tobytes()
    assert len(pixels) == 20 * 3 * 32 * 32
    assert hashlib.sha256(pixels).hexdigest() == \
        "0ccde554c350a877649dd623693b457982710da4168cc62cb3fb8fbf27145df4"


def test_texture_classes_are_balanced_and_no_class_is_a_colour():
    data, factors = textures(400, 0)
    assert data.labels.bincount().tolist() == [40] * 10 and len(data.classes) == 10
    colours = [data.images[data.labels == k].float().mean((0, 2, 3)) for k in range(10)]
    assert torch.stack(colours).std(0).max() < 20  # of 255: means of 40 that vary by about 50


def test_factors_lie_in_their_ranges_and_the_first_is_the_class():
    data, factors = textures(1000, 0)
    column = dict(zip(FACTORS, factors.T))
    assert column["class"].equal(data.labels.double())
    ranges = dict(frequency=(3.5, 4.5), rotation=(-0.2, 0.2), illumination=(0, 0.6))
    for name in FACTORS[1:]:
        low, high = ranges.get(name, (0, 1))  # hues in turns, phases in periods
        assert low <= column[name].min() and column[name].max() <= high
        assert abs(column[name].mean() - (low + high) / 2) < 0.05 * (high - low)


# ---------- crops ----------

def resized_crop(image, box, size, flip):
    box = [int(x) for x in box]
    view = TF.resized_crop(image.float() / 255, *box, [size, size], antialias=True)
    return view.flip(2) if flip else view


@pytest.mark.parametrize("height, width, size", [(32, 32, 32), (40, 24, 16), (20, 31, 48)])
def test_crop_is_torchvisions_resized_crop_and_flip(height, width, size):
    images, draw = pictures(24, 3, height, width), draws(24, 23)
    boxes = zip(*crop_boxes(draw, height, width, (0.05, 1.0)))
    expected = [resized_crop(image, box, size, flip)
                for image, box, flip in zip(images, boxes, (draw[:, 22] < 0.5).tolist())]
    assert_close(crop(images, draw, size, (0.05, 1.0)), torch.stack(expected), atol=1e-5, rtol=0)


def test_crop_of_the_whole_image_at_its_own_size_is_the_image_or_its_mirror():
    images, draw = pictures(2, 3, 32, 32), torch.full((2, 23), 0.5)
    draw[:, 22] = torch.tensor([0.9, 0.1])
    same, mirrored = crop(images, draw, 32, (1.0, 1.0))
    assert_close(same, images[0].float() / 255)
    assert_close(mirrored, images[1].float().flip(2) / 255)


def first_box_that_fits(draw, height, width, scale):
    """RandomResizedCrop.get_params of torchvision, written for given draws."""
    for k in range(10):
        area = height * width * (scale[0] + (scale[1] - scale[0]) * draw[k])
        aspect = math.exp(math.log(3 / 4) + (math.log(4 / 3) - math.log(3 / 4)) * draw[10 + k])
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            return int(draw[20] * (height - h + 1)), int(draw[21] * (width - w + 1)), h, w
    w, h = min(width, round(height * 4 / 3)), min(height, round(width * 4 / 3))
    return (height - h) // 2, (width - w) // 2, h, w


@pytest.mark.parametrize("height, width", [(32, 32), (96, 160), (10, 1000), (1000, 10), (1, 1)])
def test_boxes_follow_torchvisions_rule(height, width):
    draw = draws(200, 23)
    boxes = torch.stack(crop_boxes(draw, height, width, (0.2, 1.0)), 1)
    expected = [first_box_that_fits(row, height, width, (0.2, 1.0)) for row in draw.tolist()]
    assert boxes.tolist() == [list(box) for box in expected]


@pytest.mark.parametrize("scale", [(0.05, 0.4), (0.4, 1.0)])
def test_boxes_lie_inside_and_have_the_asked_area_and_aspect(scale):
    top, left, h, w = crop_boxes(draws(2000, 23), 96, 128, scale)
    assert (top >= 0).all() and (top + h <= 96).all()
    assert (left >= 0).all() and (left + w <= 128).all()
    assert ((h + 0.5) * (w + 0.5) >= scale[0] * 96 * 128).all()  # sides are rounded
    assert ((h - 0.5) * (w - 0.5) <= scale[1] * 96 * 128).all()
    assert ((w + 0.5) / (h - 0.5) >= 3 / 4).all() and ((w - 0.5) / (h + 0.5) <= 4 / 3).all()


def test_a_strip_that_no_try_fits_gives_its_largest_central_crop():
    box = [x.tolist() for x in crop_boxes(draws(3, 23), 10, 1000, (0.5, 1.0))]
    assert box == [[0] * 3, [(1000 - 13) // 2] * 3, [10] * 3, [13] * 3]  # 13 = round(10 · 4/3)


def test_a_crop_from_disk_is_uint8_and_agrees_with_the_one_in_memory_inside_its_border():
    pixels, draw = pictures(1, 3, 40, 56), draws(1, 23)
    box = [int(x) for x in crop_boxes(draw, 40, 56, (0.3, 0.6))]
    view = crop_pil(TF.to_pil_image(pixels[0]), box, draw[0, 22] < 0.5, 16)
    assert view.dtype == torch.uint8 and view.shape == (3, 16, 16)
    difference = view.float() - 255 * crop(pixels, draw, 16, (0.3, 0.6))[0]
    assert difference[:, 1:-1, 1:-1].abs().max() < 1.6  # PIL rounds twice


# ---------- colours ----------

OFF = dict(jitter=0, hue=0, blur_probability=0)


def no_change(count=1):
    draw = torch.full((count, 9), 0.99)  # every "with probability p" says no
    draw[:, 1:5] = 0.5  # a factor of 1
    return draw


def test_colour_with_everything_off_is_the_identity():
    x = draws(2, 3, 16, 16)
    assert colour(x, no_change(2), **OFF).equal(x)
    applied = no_change(2)
    applied[:, 0] = 0  # jittered, by nothing
    assert_close(colour(x, applied, **OFF), x)


def test_jitter_is_torchvisions_four_adjustments_in_the_order_of_the_header():
    x, draw = draws(6, 3, 16, 16), no_change(6)
    draw[:, 0], draw[:, 1:5] = 0, draws(6, 4, seed=1)
    factor, turns = (0.6 + 0.8 * draw[:, 1:4]).tolist(), (0.2 * draw[:, 4] - 0.1).tolist()
    expected = []
    for image, (brightness, contrast, saturation), turn in zip(x, factor, turns):
        image = TF.adjust_contrast(TF.adjust_brightness(image, brightness), contrast)
        image = TF.adjust_saturation(image, 1 + (saturation - 1) / 2)  # half as strong, as BYOL
        expected.append(TF.adjust_hue(image, turn))
    assert_close(colour(x, draw, jitter=0.4, hue=0.1), torch.stack(expected), atol=1e-5, rtol=0)


@pytest.mark.parametrize("slot, below, option, change", [
    (5, 0.2, {}, lambda x: TF.rgb_to_grayscale(x, 3)),
    (8, 0.3, dict(solarize_probability=0.3), lambda x: TF.solarize(x, 0.5))])
def test_grey_and_solarise_happen_with_their_probability(slot, below, option, change):
    x, draw = draws(2, 3, 16, 16), no_change(2)
    draw[:, slot] = torch.tensor([below - 0.01, below + 0.01])
    changed, same = colour(x, draw, **(OFF | option))
    assert_close(changed, change(x)[0])
    assert same.equal(x[1])


def test_each_image_has_its_own_colours():
    x, draw = draws(8, 3, 16, 16), draws(8, 9, seed=2)
    options = dict(jitter=0.4, hue=0.1, blur_probability=0.5, solarize_probability=0.2)
    together = colour(x, draw, **options)
    assert together.min() >= 0 and together.max() <= 1
    for i in range(8):
        alone = colour(x[i:i + 1], draw[i:i + 1], **options)
        assert_close(together[i:i + 1], alone, atol=1e-6, rtol=0)


@pytest.mark.parametrize("turns", [-0.5, -0.3, -0.1, 0.0, 0.2, 0.5])
def test_hue_shift_is_torchvisions(turns):
    for x in (draws(1, 3, 16, 16), CORNERS):
        shifted = shift_hue(x, torch.full((1, 1, 1), turns))
        assert_close(shifted, TF.adjust_hue(x, turns), atol=1e-5, rtol=0)


def test_hue_shift_by_a_third_turns_red_to_green_and_leaves_grey():
    x = torch.tensor([[1., 0, 0], [0.4, 0.4, 0.4], [0, 0, 0]]).T.view(1, 3, 3, 1)
    expected = torch.tensor([[0., 1, 0], [0.4, 0.4, 0.4], [0, 0, 0]]).T.view(1, 3, 3, 1)
    assert_close(shift_hue(x, torch.tensor([[[1 / 3]]])), expected, atol=1e-6, rtol=0)


def test_hsv_to_rgb_is_colorsys():
    hsv = draws(50, 3)
    expected = torch.tensor([colorsys.hsv_to_rgb(*row) for row in hsv.double().tolist()])
    assert_close(hsv_to_rgb(*hsv.T), expected, atol=1e-6, rtol=0)


def test_grey_is_torchvisions():
    x = draws(2, 3, 8, 8)
    assert_close(grey(x), TF.rgb_to_grayscale(x))


@pytest.mark.parametrize("side", [4, 32, 64])
def test_blur_is_torchvisions_up_to_the_border(side):
    x, sigma = draws(3, 3, side, side), torch.tensor([0.1, 0.7, 2.0])
    kernel = [2 * math.ceil(side / 20) + 1] * 2  # a tenth of the side
    expected = [TF.gaussian_blur(image, kernel, [s, s]) for image, s in zip(x, sigma.tolist())]
    assert_close(blur(x, sigma), torch.stack(expected), atol=1e-5, rtol=0)


# ---------- batches ----------

def channels(values):
    return torch.tensor(values).view(3, 1, 1)


def views_of(data, *batches, workers=0, **colours):
    return list(train_batches(data, batches, VIEWS, 7, CPU, workers, **colours))


def test_views_in_memory_do_not_depend_on_their_neighbours():
    data, colours = textures(12, 0)[0], dict(jitter=0.4, hue=0.5)
    [(_, weak, strong)] = views_of(data, (3, torch.tensor([5, 0, 9])), **colours)
    [(index, weak_alone, strong_alone)] = views_of(data, (3, torch.tensor([9])), **colours)
    assert index.tolist() == [9]
    assert [x.shape for x in weak_alone] == [(1, 3, 16, 16), (1, 3, 8, 8)]
    for together, alone in zip(weak + strong, weak_alone + strong_alone):
        assert_close(together[2:], alone, atol=1e-5, rtol=0)


def test_epochs_and_views_are_cut_differently():
    data, index = Images(pictures(4, 3, 32, 32), torch.zeros(4), ["only"]), torch.arange(4)
    alike, steps = [(16, (0.4, 1.0))] * 2, [(0, index), (1, index)]
    (_, (a, b), _), (_, (later, _), _) = train_batches(data, steps, alike, 7, CPU)
    assert (a - b).abs().amax((1, 2, 3)).min() > 0.1
    assert (a - later).abs().amax((1, 2, 3)).min() > 0.1


def test_the_strong_view_is_the_weak_one_with_other_colours():
    data, index = textures(40, 0)[0], torch.arange(40)
    [(_, weak, strong)] = views_of(data, (0, index), jitter=0, hue=0, blur_probability=0)
    for a, b in zip(weak, strong):
        a, b = (x * channels(STD) + channels(MEAN) for x in (a, b))
        changed = (a - b).abs().amax((1, 2, 3)) > 1e-4
        assert 0 < changed.sum() < 20  # only the grey ones, one in five
        assert_close(b[changed], grey(a[changed]).expand(-1, 3, -1, -1), atol=1e-5, rtol=0)


def test_views_from_disk_are_the_same_for_any_number_of_workers(tmp_path):
    train, _ = load_data("folder", write_folder(tmp_path))
    assert isinstance(train, Folder)
    batches = [(0, torch.arange(8)), (0, torch.arange(8, 16)), (1, torch.tensor([3, 1]))]
    by_none, by_two = (views_of(train, *batches, workers=n, jitter=0.4) for n in (0, 2))
    for (index, weak, strong), (index_by_two, *views_by_two) in zip(by_none, by_two, strict=True):
        assert index.equal(index_by_two)
        assert all(a.equal(b) for a, b in zip(weak + strong, sum(views_by_two, []), strict=True))
    assert [len(index) for index, _, _ in by_none] == [8, 8, 2]


# ---------- folders ----------

@pytest.mark.parametrize("held", ["val", "test"])
def test_folders_of_classes_are_labelled_by_sorted_name(tmp_path, held):
    for place in ("train/dog/a", "train/cat/b", "train/cat/deep/c", f"{held}/dog/d"):
        write(tmp_path / f"{place}.png")
    train, test = load_data("folder", str(tmp_path))
    assert train.classes == ["cat", "dog"]
    assert train.labels.tolist() == [0, 0, 1] and test.labels.tolist() == [1]


@pytest.mark.parametrize("place", ["{}.png", "train/{}.png"])
def test_images_without_classes_are_a_set_without_a_test(tmp_path, place):
    for i in range(3):
        write(tmp_path / place.format(i), seed=i)
    train, test = load_data("folder", str(tmp_path))
    assert len(train) == 3 and train.labels.tolist() == [-1] * 3 and test is None


def test_what_is_no_image_by_name_is_passed_over(tmp_path):
    write(tmp_path / "a.png")
    for name in ("notes.txt", ".b.png", "c.csv"):
        (tmp_path / name).write_text("words")
    assert len(load_data("folder", str(tmp_path))[0]) == 1


def test_a_wrong_path_is_an_error_that_names_it(tmp_path):
    (tmp_path / "empty" / "train").mkdir(parents=True)
    for path in ("/no/such/place", "", None, str(tmp_path / "empty")):
        with pytest.raises(ValueError) as error:
            load_data("folder", path)
        assert repr(path) in str(error.value)


def test_a_class_of_val_that_train_lacks_is_an_error_that_names_it(tmp_path):
    for place in ("train/cat/a.png", "val/cat/b.png", "val/newt/c.png"):
        write(tmp_path / place)
    with pytest.raises(ValueError, match="newt"):
        load_data("folder", str(tmp_path))


def test_small_images_of_one_size_move_to_memory_as_they_are(tmp_path):
    for i in range(5):
        write(tmp_path / f"{i}.png", (40, 24), seed=i)
    train, _ = load_data("folder", str(tmp_path))
    assert isinstance(train, Images) and train.images.shape == (5, 3, 24, 40)
    assert train.images[3].equal(pictures(24, 40, 3, seed=3).permute(2, 0, 1))


def test_images_of_several_sizes_stay_on_disk(tmp_path):
    for i in range(5):
        write(tmp_path / f"{i}.png", (40 + i, 24))
    assert isinstance(load_data("folder", str(tmp_path))[0], Folder)


GREY = dict(L=128, LA=(128, 255), RGBA=(128, 128, 128, 0), CMYK=(0, 0, 0, 127))


@pytest.mark.parametrize("mode", ["L", "LA", "RGBA", "CMYK", "P", "1", "I;16"])
def test_odd_images_open_as_rgb_of_the_right_brightness(tmp_path, mode):
    path = tmp_path / ("a.jpg" if mode == "CMYK" else "a.png")
    if mode == "I;16":
        image = Image.fromarray(np.full((20, 40), 32768, np.uint16))
    else:
        image = Image.new(mode, (40, 20), GREY[mode]) if mode in GREY else \
            Image.new("L", (40, 20), 128 if mode == "P" else 255).convert(mode)
    image.save(path)
    opened = Folder([str(path)], [0], ["only"]).open(0)
    assert opened.mode == "RGB" and opened.size == (40, 20)
    assert np.abs(np.asarray(opened).astype(int) - (255 if mode == "1" else 128)).max() <= 3


def test_a_photo_on_its_side_is_turned_upright_by_its_exif(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # to be shown turned clockwise
    image = Image.new("RGB", (40, 20), "blue")
    image.paste((255, 0, 0), (0, 0, 20, 20))  # the left half comes to lie on top
    image.save(tmp_path / "a.jpg", exif=exif, quality=95)
    opened = Folder([str(tmp_path / "a.jpg")], [0], ["only"]).open(0)
    assert opened.size == (20, 40)
    assert opened.getpixel((10, 5))[0] > 200 and opened.getpixel((10, 35))[2] > 200


def test_the_name_does_not_matter_and_of_an_animation_the_first_picture_counts(tmp_path):
    frames = [Image.new("RGB", (40, 20), name) for name in ("red", "blue", "green")]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    frames[0].save(tmp_path / "b.png", format="JPEG")
    folder = Folder([str(tmp_path / name) for name in ("a.gif", "b.png")], [0, 0], ["only"])
    for index in (0, 1):
        red, green, blue = folder.open(index).getpixel((5, 5))
        assert red > 240 and green < 15 and blue < 15


@pytest.mark.parametrize("size", [(1, 30000), (30000, 1)])
def test_of_a_strip_the_middle_is_measured_and_memory_stays_small(tmp_path, size):
    strip = Image.new("RGB", size, "red")
    middle = tuple(slice(side // 2 - 1, side // 2 + 1) if side > 1 else slice(None)
                   for side in reversed(size))
    pixels = np.array(strip)
    pixels[middle] = (0, 0, 255)
    with pytest.MonkeyPatch.context() as patch:  # whole, it would become 7,680,000 pixels long
        resize = Image.Image.resize
        patch.setattr(Image.Image, "resize", lambda image, to, *more: (
            resize(image, to, *more) if max(to) < 2000 else pytest.fail(f"resized to {to}")))
        view = np.asarray(resize_center(Image.fromarray(pixels), 224)).astype(int)
    assert view.shape == (224, 224, 3)
    assert view[112, 112, 2] > 200 and view[112, 112, 0] < 60


# ---------- files that cannot be read ----------

def huge_png():
    """A PNG of a few bytes that says it has 60,000 x 60,000 pixels."""
    def chunk(name, data):
        return (len(data).to_bytes(4, "big") + name + data
                + zlib.crc32(name + data).to_bytes(4, "big"))

    header = (60000).to_bytes(4, "big") * 2 + bytes([8, 2, 0, 0, 0])
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(
        b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")


BROKEN = {"empty": b"", "words": b"no image", "huge": huge_png(), "zeros": bytes(1000)}


@pytest.mark.parametrize("content", BROKEN.values(), ids=BROKEN)
def test_what_cannot_be_read_is_none_and_costs_nothing(tmp_path, content, recwarn):
    (tmp_path / "a.png").write_bytes(content)
    assert Folder([str(tmp_path / "a.png")], [0], ["only"]).open(0) is None
    assert Folder([str(tmp_path / "gone.png")], [0], ["only"]).open(0) is None
    assert not recwarn.list


def test_a_cut_at_any_place_gives_a_whole_image_or_none(tmp_path):
    write(tmp_path / "whole.png", (40, 24), seed=1)
    whole = (tmp_path / "whole.png").read_bytes()
    image = Image.open(tmp_path / "whole.png").convert("RGB").tobytes()
    for length in range(0, len(whole), 97):
        (tmp_path / "cut.png").write_bytes(whole[:length])
        opened = Folder([str(tmp_path / "cut.png")], [0], ["only"]).open(0)
        assert opened is None or opened.tobytes() == image


def test_a_replacement_is_looked_for_without_listing_the_set():
    class Endless(Folder):
        def __len__(self):
            return sys.maxsize  # a list of that many indices is a MemoryError

    data = Endless([], [], ["only"])
    data.open = lambda index: Image.new("RGB", (8, 8)) if index > 6 else None
    data.cut = lambda image, epoch, index: index
    assert data[0, 5] == (7, 7, [5, 6])


def test_a_broken_file_is_named_once_over_epochs_and_an_evaluation(tmp_path, capfd):
    train, _ = load_data("folder", str(write_folder(tmp_path, broken=[5])))
    views_of(train, (0, torch.arange(20)), (1, torch.arange(20)), workers=2)
    list(eval_batches(train, torch.arange(20), 16, CPU))
    assert capfd.readouterr().err.count("05.png") == 1


def test_a_broken_file_is_replaced_by_the_next_the_same_one_each_time(tmp_path):
    train, _ = load_data("folder", str(write_folder(tmp_path, broken=[5, 19])))
    expected = [0, 1, 2, 3, 4, 6, *range(6, 19), 0]  # 5 by 6, the last by the first
    for index, weak, _ in views_of(train, (0, torch.arange(20)), (1, torch.arange(20))):
        assert index.tolist() == expected
        assert weak[0][5].equal(weak[0][6]) and weak[0][19].equal(weak[0][0])


def test_a_broken_file_of_a_set_in_memory_is_named_and_replaced_by_the_next(tmp_path, capsys):
    for i in range(20):
        write(tmp_path / "train" / "only" / f"{i:02}.png", seed=i)
    for i in (5, 19):
        (tmp_path / "train" / "only" / f"{i:02}.png").write_bytes(b"cut")
    train, _ = load_data("folder", str(tmp_path))
    assert isinstance(train, Images) and len(train) == len(train.images) == 20
    for i, other in ((5, 6), (19, 0), (7, 7)):  # the other indices stay what they are
        assert train.images[i].equal(pictures(32, 32, 3, seed=other).permute(2, 0, 1))
    assert train.labels.tolist() == [-1 if i in (5, 19) else 0 for i in range(20)]  # not evaluated
    assert capsys.readouterr().err.count("05.png") == 1


@pytest.mark.parametrize("size", [(32, 32), None])
def test_more_than_a_tenth_broken_stops_with_a_reason(tmp_path, size):
    write_folder(tmp_path, broken=[3, 4, 5])
    for i in set(range(20)) - {3, 4, 5} if size else ():
        write(tmp_path / "train" / "only" / f"{i:02}.png", size)
    with pytest.raises(UnreadableImages, match="3 of 20"):
        load_data("folder", str(tmp_path))
    assert issubclass(UnreadableImages, ValueError)


def test_a_file_that_breaks_during_the_run_counts_too(tmp_path):
    train, _ = load_data("folder", str(write_folder(tmp_path)))
    for i in (1, 2, 3):
        (tmp_path / "train" / "only" / f"{i:02}.png").unlink()
    with pytest.raises(UnreadableImages, match="3 of 20"):
        views_of(train, (0, torch.arange(10)))


# ---------- images as they are measured ----------

def test_evaluation_leaves_broken_images_out_and_keeps_labels_beside_their_images(tmp_path):
    for i in range(12):
        write(tmp_path / "train" / f"class{i % 3}" / f"{i:02}.png", (30 + i, 40), seed=i)
    write(tmp_path / "val" / "class0" / "a.png")
    (tmp_path / "train" / "class1" / "04.png").write_bytes(b"")
    train, _ = load_data("folder", str(tmp_path))
    images, labels = zip(*eval_batches(train, torch.arange(12), 16, CPU, batch_size=5))
    assert torch.cat(labels).tolist() == [0] * 4 + [1] * 3 + [2] * 4
    assert torch.cat(images).shape == (11, 3, 16, 16)


def test_a_batch_of_one_broken_image_is_none(tmp_path):
    train, _ = load_data("folder", str(write_folder(tmp_path, broken=[5])))
    assert list(eval_batches(train, [5], 16, CPU)) == []


@pytest.mark.parametrize("width, height, short", [(300, 200, 128), (200, 300, 128), (256, 224, 128),
                                                  (150, 100, 112), (112, 112, 112)])
def test_images_on_disk_are_measured_by_resize_and_centre_crop(width, height, short):
    image = TF.to_pil_image(pictures(3, height, width))  # larger ones: to 112 · 256 / 224
    expected = TF.center_crop(TF.resize(image, short, TF.InterpolationMode.BICUBIC), 112)
    assert np.array_equal(resize_center(image, 112), expected)


def test_sets_in_memory_are_measured_at_any_size():
    data = Images(pictures(3, 3, 48, 64), torch.arange(3), list("abc"))
    [(images, labels)] = eval_batches(data, torch.tensor([2, 0]), 24, CPU)
    expected = TF.center_crop(TF.resize(data.images[[2, 0]].float() / 255, 24, antialias=True), 24)
    expected = TF.normalize(expected, MEAN, STD)
    assert labels.tolist() == [2, 0]
    assert_close(images, expected, atol=1e-5, rtol=0)
