"""Weights: every published layout is read, strictly; a bad file is one error; the export."""
import argparse
import os
import re
import runpy
import sys
from functools import partial
from unittest.mock import Mock

import pytest
import torch
from torch.testing import assert_close

from conftest import ROOT, call, cloud, parse, state_of
from model import ARCHS, VisionTransformer
from objectives import System
from weights import export_backbone, load_backbone, open_backbone, write_file
from test_model import D, EXTRAS, IMAGES, randomized, small


def prefixed(prefix, weights):
    return {prefix + name: x for name, x in weights.items()}


def without(weights, name):
    return {other: x for other, x in weights.items() if other != name}


def written(folder, content, name="weights.pt"):
    """Bytes as they are, anything else by torch.save -> the path of the file."""
    if isinstance(content, bytes):
        (folder / name).write_bytes(content)
    else:
        torch.save(content, folder / name)
    return folder / name


THEIRS = {"cls_token": "embeddings.cls_token", "mask_token": "embeddings.mask_token",
          "pos_embed": "embeddings.position_embeddings", "blocks.": "encoder.layer.",
          "patch_embed.proj": "embeddings.patch_embeddings.projection", "norm.": "layernorm.",
          "attn.proj": "attention.output.dense", "mlp.fc1": "intermediate.dense",
          "mlp.fc2": "output.dense", "norm1": "layernorm_before", "norm2": "layernorm_after"}
FIVE = THEIRS | {"blocks.": "layers.", "attn.proj": "attention.o_proj", "mlp.fc1": "mlp.fc1",
                 "mlp.fc2": "mlp.fc2"}  # transformers 5
DINO2 = THEIRS | {"mlp.fc1": "mlp.fc1", "mlp.fc2": "mlp.fc2", "norm1": "norm1", "norm2": "norm2",
                  "ls1.gamma": "layer_scale1.lambda1", "ls2.gamma": "layer_scale2.lambda1",
                  "reg_token": "embeddings.register_tokens"}  # Dinov2WithRegistersModel


def hugging_face(weights, names=THEIRS, qkv="attention.query attention.key attention.value"):
    """timm's names -> those of transformers' ViTModel, with query, key and value apart."""
    renamed = {}
    for name, x in weights.items():
        for ours, theirs in names.items():
            name = name.replace(ours, theirs)
        parts = qkv.split() if "qkv" in name else [""]
        for part, piece in zip(parts, x.chunk(len(parts))):
            renamed[name.replace("attn.qkv", f"attention.{part}")] = piece.clone()
    return renamed


def layouts():
    """The layout's name -> a file whose backbone is small(1); small(2) must not be taken."""
    full, other = small(1).state_dict(), prefixed("backbone.", small(2).state_dict())
    timm, token = without(full, "mask_token"), full["mask_token"]
    head = {"head.weight": cloud(10, D), "head_dist.weight": cloud(10, D)}
    dino_head = {"head.mlp.0.weight": cloud(8, D), "head.last_layer.weight_g": cloud(8, 1)}
    decoder = {"mask_token": cloud(1, 1, 512), "decoder_pos_embed": cloud(1, 17, 512),
               "decoder_embed.weight": cloud(512, D), "decoder_blocks.0.norm1.bias": cloud(512)}
    options = argparse.Namespace(arch="vit_small", patch_size=4)  # in the official files
    dino = {"student": prefixed("module.", other), "args": options, "epoch": 100,
            "teacher": prefixed("backbone.", timm) | dino_head}
    moco = prefixed("module.momentum_encoder.", small(2).state_dict()) | prefixed(
        "module.base_encoder.", timm | {"head.0.weight": cloud(8, D)})
    return {
        "ours": {"student": other, "teacher": prefixed("backbone.", full) | dino_head, "step": 7},
        "ours without a teacher": {"frozen": other, "student": prefixed("backbone.", full)},
        "a wrapper": {"epoch": 3, "optimizer": {"state": {0: {"exp_avg": cloud(3)}}},
                      "model_state_dict": full},
        "two wrappers": {"net": {"weights": prefixed("encoder.", full)}, "ema": {"weights": other}},
        "student around its state": {"model": {"state_dict": {"student": other, "teacher": full}}},
        "compiled and distributed": prefixed("module._orig_mod.backbone.", full),
        "both in one dict": prefixed("student.", other) | prefixed("teacher.backbone.", full),
        "timm": timm | head,
        "dino": dino,
        "ibot": dino | {"teacher": dino["teacher"] | {"backbone.masked_embed": token[0]}},
        "mae": {"model": timm | decoder, "optimizer": {"state": {}}, "args": options},
        "mae of hugging face": prefixed("vit.", hugging_face(timm)) | prefixed("decoder.", decoder),
        "moco v3": {"arch": "vit_small", "state_dict": moco},
        "hugging face": prefixed("vit.", hugging_face(full)) | {"pooler.dense.bias": cloud(D)},
        "transformers 5": prefixed("vit.", hugging_face(full, FIVE, "q_proj k_proj v_proj"))}


@pytest.mark.parametrize("layout", layouts())
def test_the_backbone_is_found_in_every_layout(layout, tmp_path):
    vit, path = small(3), written(tmp_path, layouts()[layout])
    assert load_backbone(vit, path) is vit
    expected = small(1).state_dict()
    if layout.split()[0] in ("timm", "dino", "mae", "moco"):
        expected["mask_token"] = small(3).mask_token  # the file has none: it stays
    assert all(x.equal(expected[name]) for name, x in vit.state_dict().items())


def extra_layouts(vit):
    """A network with LayerScale and registers as DINOv2, timm and Hugging Face write it."""
    full = vit.state_dict()
    token = {"mask_token": full["mask_token"][0]}  # (1, D)
    dino = without(full, "reg_token") | {"register_tokens": full["reg_token"]} | token
    timm = without(full, "mask_token") | {  # CLS has no position there: it is added to the token
        "cls_token": full["cls_token"] + full["pos_embed"][:, :1],
        "pos_embed": full["pos_embed"][:, 1:]}
    return {"dinov2": dino, "dinov2 in training": {"teacher": prefixed("backbone.", dino)},
            "timm": timm, "hugging face": hugging_face(full | token, DINO2)}


@pytest.mark.parametrize("layout", extra_layouts(small(**EXTRAS)))
@pytest.mark.parametrize("image_size", [16, (12, 20)])  # 1 + 15 positions are a square number
def test_layer_scale_and_registers_are_read_in_every_layout(layout, image_size, tmp_path):
    vit, other = (small(seed, image_size, **EXTRAS) for seed in (1, 3))
    path = written(tmp_path, extra_layouts(vit)[layout])
    assert_close(load_backbone(other, path)(IMAGES), vit(IMAGES))
    assert layout == "timm" or other.mask_token.equal(vit.mask_token)
    for options in ({}, EXTRAS | {"layer_scale": False}, EXTRAS | {"registers": 2}):
        with pytest.raises(ValueError, match="ls1.gamma|reg_token"):
            load_backbone(small(3, image_size, **options), path)


def test_safetensors_hold_the_same_as_pickles(tmp_path):
    save = pytest.importorskip("safetensors.torch").save
    path = written(tmp_path, save(layouts()["hugging face"]), "model.safetensors")
    assert load_backbone(small(3), path).cls_token.equal(small(1).cls_token)


def test_safetensors_without_the_package_asks_for_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)  # as if it were not installed
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(ValueError, match="model.safetensors cannot be read: .*safetensors"):
        load_backbone(small(3), tmp_path / "model.safetensors")


@pytest.mark.parametrize("message, change", [
    ("missing norm.bias", lambda w: without(w, "norm.bias")),
    ("missing blocks.1.attn.qkv.bias", lambda w: without(
        hugging_face(w), "encoder.layer.1.attention.attention.key.bias")),
    ("; and 16 more", lambda w: {name: x for name, x in w.items() if "blocks." not in name}),
    ("unexpected blocks.0.ls1.gamma", lambda w: w | {"blocks.0.ls1.gamma": cloud(D)}),
    ("norm.bias is (33,), not (32,)", lambda w: w | {"norm.bias": cloud(33)}),
    ("norm.bias is no dense tensor of floats", lambda w: w | {"norm.bias": torch.ones(D).int()}),
    ("blocks.0.index is no dense tensor", lambda w: w | {"blocks.0.index": torch.zeros(3).int()}),
    ("mask_token is no dense", lambda w: w | {"mask_token": cloud(1, 1, D).to_sparse()}),
    ("mask_token is (1, 1, 9), not (1, 1, 32)", lambda w: w | {"mask_token": cloud(1, 1, 9)})])
def test_keys_and_shapes_that_do_not_fit_are_listed_and_change_nothing(message, change, tmp_path):
    vit, path = small(3), written(tmp_path, change(small(1).state_dict()))
    with pytest.raises(ValueError, match="weights.pt .*" + re.escape(message)):
        load_backbone(vit, path)
    assert all(x.equal(small(3).state_dict()[name]) for name, x in vit.state_dict().items())


@pytest.mark.parametrize("key, shape", [
    ("blocks.0.mlp.w12.weight", (8, D)),  # SwiGLU blocks
    ("rope_embed.periods", (4,)), ("fc_norm.weight", (D,)), ("blocks.1.attn.q_norm.weight", (8,)),
    ("dist_token", (1, 1, D)), ("rel_pos_bias.relative_position_bias_table", (9, 4)),
    ("patch_embed.proj.weight", (192, 4, 8, 8)), ("norm_pre.weight", (D,))])
def test_what_this_network_lacks_is_refused_by_its_name(key, shape, tmp_path):
    for vit, read in ((small(1), partial(load_backbone, small(3))),
                      (network(), partial(open_backbone, arch="vit_tiny"))):
        path = written(tmp_path, {"model": vit.state_dict() | {key: cloud(*shape)}})
        with pytest.raises(ValueError, match=rf"does not fit this model .*{key}") as caught:
            read(path=path)
        assert not re.search("--arch|itself", str(caught.value))


def test_a_grid_of_another_shape_with_as_many_patches_is_not_taken_for_the_files(tmp_path):
    wide, weights = small(3, image_size=(8, 32)), small(1).state_dict()  # 2 x 8 patches, 4 x 4
    own = {"args": {"arch": "vit_tiny", "image_size": 16, "patch_size": 4}, "student": weights}
    with pytest.raises(ValueError, match="square images, not on 2 x 8 patches"):
        load_backbone(wide, written(tmp_path, own))
    load_backbone(wide, written(tmp_path, weights))  # says nothing of its grid: the caller's word
    weights = ARCHS["vit_tiny"](image_size=(24, 40), patch_size=8).state_dict()
    with pytest.raises(ValueError, match=r"pos_embed is \(1, 16, 192\), not \(1, 17, 192\)"):
        open_backbone(written(tmp_path, weights), "vit_tiny")  # 1 + 15 are no 16 without CLS
    weights["pos_embed"] = cloud(1, 1 + 10, 192)
    with pytest.raises(ValueError, match="11 positions .* square images"):
        open_backbone(written(tmp_path, weights), "vit_tiny")


BAD = {"empty": b"", "page": b"<!DOCTYPE html><html></html>\n", "zeros": bytes(9999),
       "git lfs": b"version https://git-lfs.github.com/spec/v1\n", "cut": b"PK\x03\x04" + bytes(99),
       "resnet": {"conv1.weight": cloud(3)}, "tensor": cloud(3), "list": [cloud(3)],
       "numbers for names": {0: cloud(3)}, "empty teacher": {"teacher": {}},
       "missing": "nowhere.pt", "folder": ""}  # these two are paths


@pytest.mark.parametrize("content", BAD.values(), ids=BAD)
def test_damaged_and_alien_files_are_one_error_that_names_the_path(content, tmp_path):
    path = tmp_path / content if isinstance(content, str) else written(tmp_path, content)
    with pytest.raises(ValueError, match="no such file|no checkpoint|no ViT backbone") as caught:
        load_backbone(small(3), path)
    assert str(path) in str(caught.value) and "holds code" not in str(caught.value)


def test_a_disk_that_fails_is_told_from_a_file_that_is_broken(tmp_path, monkeypatch):
    monkeypatch.setattr(torch, "load", Mock(side_effect=PermissionError(13, "Permission denied")))
    with pytest.raises(ValueError, match="weights.pt cannot be read: .*denied"):
        load_backbone(small(3), written(tmp_path, small(1).state_dict()))


@pytest.mark.parametrize("links", [True, False])
def test_the_file_before_is_kept_on_disks_with_and_without_links(links, tmp_path, monkeypatch):
    path, keep = tmp_path / "checkpoint.pt", tmp_path / "previous.pt"
    if not links:
        monkeypatch.setattr(os, "link", Mock(side_effect=OSError(1, "not permitted")))
    for content in (b"first", b"second", b"third"):
        write_file(path, lambda file: file.write(content), keep)
    assert path.read_bytes() == b"third" and keep.read_bytes() == b"second"
    assert len([*tmp_path.iterdir()]) == 2


class Code:
    def __reduce__(self):
        return os.mkdir, ("it ran",)


@pytest.mark.parametrize("zipped", [True, False])
def test_pickled_code_is_refused_and_not_run(zipped, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"args": Code()}, "weights.pt", _use_new_zipfile_serialization=zipped)
    with pytest.raises(ValueError, match="weights.pt .*it holds code"):
        load_backbone(small(3), "weights.pt")
    assert not os.path.exists("it ran")
    torch.load("weights.pt", weights_only=False)  # and it would have run
    assert os.path.exists("it ran")


@pytest.mark.parametrize("file, width, right, wrong", [
    ("dino", 384, 6, 12), ("mae", 768, 12, 16), ("moco v3", 384, 12, 6),
    ("ours", 384, 12, 8)])  # our file says its heads itself
def test_another_number_of_heads_is_refused(file, width, right, wrong, tmp_path):
    fitting, vit = (VisionTransformer(16, 8, width, 1, heads) for heads in (right, wrong))
    weights, before = fitting.state_dict(), vit.cls_token.clone()
    path = written(tmp_path, {
        "dino": {"teacher": weights}, "mae": {"model": weights},
        "moco v3": {"state_dict": prefixed("module.base_encoder.", weights)},
        "ours": {"args": {"arch": "vit_small_12heads"}, "student": weights}}[file])
    with pytest.raises(ValueError, match=f"{right} attention heads, not {wrong}: .* with {right}"):
        load_backbone(vit, path)
    assert vit.cls_token.equal(before) and load_backbone(fitting, path)
    assert load_backbone(vit, path, num_heads=wrong).cls_token.equal(weights["cls_token"])


TINY = dict(arch="vit_tiny", image_size=24, patch_size=8)


def network(**options):
    return randomized(ARCHS["vit_tiny"](**(dict(image_size=24, patch_size=8) | options)), std=0.1)


@pytest.mark.parametrize("content, arch, options", [
    ({"args": TINY | {"lr": 0.1}}, None, TINY | {"lr": 0.1}),  # ours says it all
    ({"args": argparse.Namespace(arch="?")}, "vit_tiny", TINY)])  # sizes from the weights
def test_open_backbone_builds_the_network_of_a_file(content, arch, options, tmp_path):
    path = written(tmp_path, content | {"teacher": prefixed("backbone.", network().state_dict())})
    vit, found = open_backbone(path, arch)
    assert found == options and vit.pos_embed.equal(network().pos_embed)


@pytest.mark.parametrize("arch, lacking, message", [
    ("vit_small", "", r"cls_token is \(1, 1, 192\), not \(1, 1, 384\)"),
    ("vit_tiny", "pos_embed", "pos_embed"),
    ("vit_tiny", "patch_embed.proj.weight", "patch_embed.proj.weight")])
def test_a_file_without_a_fitting_arch_or_sizes_is_refused(arch, lacking, message, tmp_path):
    weights = without(network().state_dict(), lacking)
    with pytest.raises(ValueError, match=message):
        open_backbone(written(tmp_path, {"model": weights}), arch)


def test_a_dinov2_file_opens_in_two_layouts_and_teaches_by_relations_at_another_size(tmp_path):
    vit = network(patch_size=14, image_size=518, layer_scale=True, registers=4)  # 37 x 37 patches
    images, layouts = cloud(4, 3, 28, 28), extra_layouts(vit)
    for layout in ("timm", "dinov2"):
        path = written(tmp_path, layouts[layout], "dinov2_vits14_reg4_pretrain.pth")
        found, options = open_backbone(path, "vit_tiny")
        assert options == dict(arch="vit_tiny", patch_size=14, image_size=518)
        assert_close(found(images), vit(images), atol=1e-5, rtol=0)
    system = System(parse("--loss", "rkd", "--arch", "vit_tiny", "--patch-size", 14, "--image-size",
                          28, "--teacher-checkpoint", path, "--teacher-arch", "vit_tiny",
                          "--device", "cpu"))
    loss = system([images] * 2, [images] * 2, None)[0]
    loss.backward()
    assert loss.isfinite() and system.student.backbone.cls_token.grad.any()
    assert system.teacher.backbone.reg_token.equal(vit.reg_token)


@pytest.mark.parametrize("name, arch", [
    ("vit_small_patch14_dinov2", "vit_small"), ("vit_small_patch14_reg4_dinov2", "vit_small"),
    ("deit3_small_patch16_224", "vit_small"), ("vit_tiny_patch16_224", "vit_tiny")])
def test_tokens_equal_timms_also_at_another_size_where_its_interpolation_is_ours(
        name, arch, tmp_path):
    timm = pytest.importorskip("timm")
    theirs = timm.create_model(name, num_classes=0, img_size=112, dynamic_img_size=True).eval()
    vit, _ = open_backbone(written(tmp_path, randomized(theirs, std=0.1).state_dict()), arch)
    sizes = [(112, 112)] + [(336, 112), (224, 112)] * (arch != "vit_tiny")  # divided by 14 and 16
    for images in (cloud(1, 3, *size) for size in sizes):
        tokens = theirs.forward_features(images)
        tokens = torch.cat([tokens[:, :1], tokens[:, theirs.num_prefix_tokens:]], 1)
        assert_close(vit(images), tokens, atol=1e-4, rtol=0)


def test_timm_loads_an_export_by_the_printed_recipe(tmp_path, capsys):
    vit, images = network(), cloud(2, 3, 24, 24)
    path, out = written(tmp_path, {"args": TINY, "student": vit.state_dict()}), tmp_path / "out.pt"
    call("--checkpoint", path, "--export", out,
         main=lambda: runpy.run_path(f"{ROOT}/weights.py", run_name="__main__"))
    assert [*torch.load(out, weights_only=True)] == [*without(vit.state_dict(), "mask_token")]
    recipe = capsys.readouterr().out.split("in timm:\n")[1]
    assert "num_heads=3)" in recipe
    scope = {"timm": pytest.importorskip("timm"), "torch": torch}
    exec(recipe, scope)
    assert_close(scope["vit"].eval().forward_features(images), vit(images), atol=1e-5, rtol=0)


@pytest.mark.parametrize("options", [dict(layer_scale=True), dict(registers=2)])
def test_layer_scale_and_registers_are_not_exported(options, tmp_path):
    with pytest.raises(ValueError, match="LayerScale and registers have no place"):
        export_backbone(small(**options), tmp_path / "out.pt")
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize("message, spoil", [
    ("is no checkpoint", lambda s: b"PK\x03\x04" + bytes(99)),
    ("it holds code", lambda s: s | {"args": Code()}),
    ("is no checkpoint of train.py", lambda s: s["student"]),
    ("is no checkpoint of train.py", lambda s: s | {"step": -1}),
    ("norm.bias", lambda s: s | {"student": without(s["student"], "backbone.norm.bias")}),
    ("exp_avg is (3,), not", lambda s: s | {"optimizer": {"state": {0: {"exp_avg": cloud(3)}}}})])
def test_resume_refuses_a_hostile_state_and_keeps_it(
        message, spoil, on_folder, checkpoint, tmp_path, capsys):
    for name in ("checkpoint.pt", "previous.pt"):
        written(tmp_path, spoil(state_of(checkpoint.parent)), name)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    for resume in ("auto", tmp_path / "checkpoint.pt"):
        with pytest.raises(SystemExit, match="2"):
            call(*on_folder, "--max-steps", 4, "--out-dir", tmp_path, "--resume", resume)
        [line] = capsys.readouterr().err.splitlines()
        assert "checkpoint.pt" in line and message in line and len(line) <= 1000
    assert before == {path: path.read_bytes() for path in tmp_path.iterdir()}
