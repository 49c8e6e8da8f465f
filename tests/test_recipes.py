"""Every value of every recipe against a table that says where it was published.

Repositories at github.com; FILE names the file or the command in it. A number is written here as
its source writes it: base lr * batch / images that it is per, warm-up epochs / epochs.
"""
import itertools
import math

import pytest
import torch
import torch.nn.functional as F

import conftest
import train
from objectives import RECIPES, System

BYOLS = dict(jitter=0.4, saturation=0.2, jitter_probability=0.8, hue=0.1, grey=0.2,
             blur=[1.0, 0.1], solarize=[0.0, 0.2])
FLIP_ONLY = dict(jitter=0, hue=0, grey=0, blur=[0, 0], solarize=[0, 0])
# RandomResizedCrop: interpolation=BICUBIC, or torchvision's default; which parameters decay
ADAM = dict(adam_eps=1e-8)  # torch's default
VIT_S = dict(arch="vit_small", patch_size=16, image_size=224, pool="cls")
DINO = VIT_S | BYOLS | ADAM | dict(
    bicubic=True, decay="tokens",  # utils.get_params_groups
    min_lr=1e-6, weight_decay=[0.04, 0.4], beta2=0.999, clip_grad=3, clip_each=True, momentum=0.996,
    temperature=0.1, head_batchnorm=False, projection=256, head_hidden=2048, drop_path=0.1,
    global_crops=2)
MOCO = VIT_S | ADAM | dict(
    decay="all",  # main_moco.py: AdamW without groups
    epochs=300, batch_size=1024, lr=1.5e-4 * 1024 / 256, min_lr=0, warmup=40 / 300,
    weight_decay=[0.1, 0.1], beta2=0.999, clip_grad=0, clip_each=False, mask_ratio=0,
    arch="vit_small_12heads", crop_scale=[0.08, 1],  # vits.py: vit_small, num_heads=12
    drop_path=0, local_crops=0, freeze_patch_embed=True, fixed_pos=True)  # --stop-grad-conv1
PIXELS = VIT_S | FLIP_ONLY | ADAM | dict(
    arch="vit_base", min_lr=0, weight_decay=[0.05, 0.05], clip_each=False, global_crops=1)

PUBLISHED = {
    # facebookresearch/dino main_dino.py, defaults (README: vanilla ViT-S, 100 epochs, 8 GPUs)
    "dino-vits16-100ep": DINO | dict(
        loss="dino", epochs=100, batch_size=512, lr=5e-4 * 512 / 256, warmup=10 / 100,
        teacher_temperature=[0.04, 0.04], prototypes=65536, freeze_last_layer=1 / 100,
        crop_scale=[0.4, 1], local_crops=8, mask_ratio=0),
    # bytedance/ibot README, ViT-S/16; else main_ibot.py, defaults
    "ibot-vits16-800ep": DINO | dict(
        loss="ibot", epochs=800, batch_size=1024, lr=5e-4 * 1024 / 256, warmup=10 / 800,
        teacher_temperature=[0.04, 0.07], teacher_warmup=30 / 800, prototypes=8192,
        freeze_last_layer=1 / 800, crop_scale=[0.25, 1], local_crops=10, mask="block",
        mask_ratio=0.3, mask_spread=0.2,  # pred_ratio 0 .3, pred_ratio_var 0 .2
        mask_probability=0.5, hide="token"),
    # facebookresearch/moco-v3 CONFIG.md, ViT-S on one node; else main_moco.py, defaults
    "moco-vits16-300ep": MOCO | BYOLS | dict(
        bicubic=False, loss="moco", momentum=0.99, temperature=0.2, projection=256, head_hidden=4096),
    # Chen et al. 2020, section 2, appendix A, table 5 (temperature .1), in MoCo v3's frame
    "simclr-vits16-300ep": MOCO | dict(
        bicubic=True, loss="simclr", temperature=0.1, projection=128, head_hidden=2048,
        jitter=0.8, saturation=0.8, jitter_probability=0.8, hue=0.2,
        grey=0.2, blur=[0.5, 0.5], solarize=[0, 0]),
    # Grill et al. 2020, section 3, appendices B, F (momentum .99, MLPs 4096-256), in MoCo v3's frame
    "byol-vits16-300ep": MOCO | BYOLS | dict(
        bicubic=True, loss="byol", momentum=0.99, projection=256, head_hidden=4096),
    # facebookresearch/mae PRETRAIN.md, ViT-B; else main_pretrain.py, defaults
    "mae-vitb16-800ep": PIXELS | dict(
        loss="mae", epochs=800, batch_size=4096, lr=1.5e-4 * 4096 / 256, warmup=40 / 800,
        bicubic=True, decay="tokens",  # timm's add_weight_decay
        beta2=0.95, clip_grad=0, crop_scale=[0.2, 1], mask="random", mask_ratio=0.75, hide="drop",
        decoder=[512, 8], fixed_pos=True, drop_path=0),
    # microsoft/SimMIM configs/vit_base__800ep, pretrain; else config.py
    "simmim-vitb16-800ep": PIXELS | dict(
        loss="simmim", epochs=800, batch_size=2048, lr=1e-4 * 2048 / 512, warmup=10 / 800,
        beta2=0.999, clip_grad=5, crop_scale=[0.67, 1], mask="random", bicubic=False,
        mask_ratio=30 / 49,  # ceil(.6 * 49)
        mask_unit=32 / 16, hide="token", drop_path=0.1),  # MASK_PATCH_SIZE 32, patches of 16
    # microsoft/unilm beit README, base on ImageNet-1k; else run_beit_pretraining.py, defaults
    "beit-vitb16-800ep": PIXELS | dict(
        loss="beit", epochs=800, batch_size=2048, lr=1.5e-3, min_lr=1e-5, warmup=10 / 800,
        bicubic=True, saturation=0.4, jitter_probability=1,  # ColorJitter(.4, .4, .4), always
        beta2=0.999, clip_grad=3, jitter=0.4, crop_scale=[0.08, 1], mask="block",
        mask_ratio=75 / 196, hide="token", prototypes=8192, drop_path=0.1),
    # liuxingbin/dbot PRETRAIN.md, ViT-B/16; else main_pretrain.py, defaults
    "dbot-vitb16-1600ep": PIXELS | dict(
        loss="dbot", epochs=1600, stages=2, teacher="frozen", batch_size=4096,
        lr=1.5e-4 * 4096 / 256, warmup=40 / 800, beta2=0.95, clip_grad=3, crop_scale=[0.2, 1],
        bicubic=True, decay="tokens",  # timm's add_weight_decay
        mask="random", mask_ratio=0.75, hide="drop", decoder=[512, 8], fixed_pos=True,
        drop_path=0.2),  # stage_epochs 0 800 1600, sdpr .2
}


def options_of(recipe, *more):
    return vars(train.parse(["--recipe", recipe, *more]))


@pytest.mark.parametrize("recipe", dict.fromkeys([*RECIPES, *PUBLISHED]))
def test_every_value_is_the_published_one(recipe):
    args = options_of(recipe)
    args["saturation"] = args["jitter"] / 2 if args["saturation"] is None else args["saturation"]
    for name, value in PUBLISHED[recipe].items():
        assert args[name] == pytest.approx(value), name
    assert ("momentum" in PUBLISHED[recipe]) == (args["teacher"] == "ema")
    assert set(RECIPES[recipe]) <= {"data", "workers", *PUBLISHED[recipe]}


def test_options_on_the_command_line_win_and_a_term_can_be_added():
    args = options_of("dino-vits16-100ep", "--loss", "dino+0.5*rkd", "--lr", "0.5")
    assert (args["loss"], args["lr"], args["prototypes"]) == ("dino+0.5*rkd", 0.5, 65536)


def test_the_heads_of_moco_are_the_published_ones():
    words = "--image-size 32 --arch vit_micro"  # 64 wide; the heads do not depend on the rest
    system = System(train.parse(["--recipe", "moco-vits16-300ep", *words.split()]))
    head, predictor = (x["moco"] for x in (system.student.heads, system.student.predictors))
    widths = [[tuple(w.shape) for w in x.parameters() if w.dim() == 2] for x in (head, predictor)]
    assert widths == [[(4096, 64), (4096, 4096), (256, 4096)], [(4096, 256), (256, 4096)]]
    assert all(x.bias is None for x in [*head, *predictor] if type(x).__name__ == "Linear")
    assert type(head[-1]).__name__ == "BatchNorm" and head[-1].weight is None


@pytest.mark.parametrize("recipe", ["mae-vitb16-800ep", "dbot-vitb16-1600ep"])
def test_weights_and_tokens_decay_and_no_bias_or_norm_as_in_timms_add_weight_decay(recipe):
    args = train.parse(["--recipe", recipe, *"--arch vit_tiny --image-size 32 --workers 0".split()])
    student = System(args).student
    kept = {name for name, p in student.named_parameters()
            if p.requires_grad and not train.DECAY[args.decay](p)}
    assert kept == {name for name, p in student.named_parameters()
                    if name.endswith("bias") or "norm" in name}


def published_schedule(start, end, steps, warm=0):
    """DINO's utils.cosine_scheduler: linear from 0 over `warm` steps, then a cosine."""
    rest = steps - warm
    return [*torch.linspace(0, start, warm).tolist(),
            *(end + (start - end) * (1 + math.cos(math.pi * i / rest)) / 2 for i in range(rest))]


def published_dino(system, args, batches):
    """The student after facebookresearch/dino's train_one_epoch, written out, on these views.

    Its own are: order and grouping of crops, head, loss, clipping, decay, schedules, EMA. The ViT
    is ours, and with it the positions of local crops: of their exact grid, where DINO adds .1.
    """
    student, teacher = system.student, system.teacher
    K, center, steps = args.prototypes, torch.zeros(args.prototypes), len(batches)
    moving = [(name, p) for name, p in student.named_parameters() if p.requires_grad]
    plain = [p for name, p in moving if p.dim() == 1 or name.endswith(".bias")]
    decayed = [p for name, p in moving if not (p.dim() == 1 or name.endswith(".bias"))]
    optimizer = torch.optim.AdamW([dict(params=decayed), dict(params=plain, weight_decay=0.0)])
    lrs = published_schedule(args.lr, args.min_lr, steps, round(args.warmup * steps))
    decays = published_schedule(*args.weight_decay, steps)
    momenta = published_schedule(args.momentum, 1, steps)

    def logits(network, views):
        x = torch.cat([network.backbone(torch.cat(list(group)))[:, 0]
                       for _, group in itertools.groupby(views, lambda view: view.shape[-1])])
        head = network.heads["dino"]
        x, v = F.normalize(head.mlp(x), dim=-1), head.prototypes
        return (x @ (v / v.norm(dim=1, keepdim=True)).T).view(len(views), -1, K)

    for step, views in enumerate(batches):
        optimizer.param_groups[0].update(lr=lrs[step], weight_decay=decays[step])
        optimizer.param_groups[1].update(lr=lrs[step])
        with torch.no_grad():
            theirs = logits(teacher, views[:2])
        targets, log_p = ((theirs - center) / 0.04).softmax(-1), logits(student, views) / 0.1
        terms = [-(targets[i] * log_p[j].log_softmax(-1)).sum(-1).mean()
                 for i in range(2) for j in range(len(views)) if i != j]
        optimizer.zero_grad()
        torch.stack(terms).mean().backward()
        for _, p in moving:
            p.grad.mul_(min(1, args.clip_grad / (p.grad.norm().item() + 1e-6)))
        if step < args.freeze_last_layer * steps:
            student.heads["dino"].prototypes.grad = None
        optimizer.step()
        center = center * 0.9 + theirs.flatten(0, 1).mean(0) * 0.1
        with torch.no_grad():
            for t, s in zip(teacher.parameters(), student.parameters()):
                t.mul_(momenta[step]).add_(s, alpha=1 - momenta[step])
    return flat(moving)


def flat(parameters):
    """All in one vector, but the biases of keys: attention does not see them, and Adam with its
    published eps makes full steps of the rounding noise in their gradients."""
    return torch.cat([x.detach().unflatten(0, (3, -1))[::2].flatten() if name.endswith("qkv.bias")
                      else x.detach().flatten() for name, x in parameters])


def test_forty_steps_of_dinos_recipe_are_the_published_ones(tmp_path, monkeypatch):
    words = ["--recipe", "dino-vits16-100ep", "--data-path", str(tmp_path / "images"),
             *("--arch vit_micro --image-size 32 --patch-size 8 --batch-size 8 --epochs 5 --workers 0 "
               "--device cpu --prototypes 64 --head-hidden 64 --projection 32 --local-crops 3 "
               "--drop-path 0 --freeze-last-layer 0.2 --eval-every 99 --save-every 99").split()]
    conftest.write_textures(tmp_path / "images", 64, 0)
    batches, forward = [], System.forward
    monkeypatch.setattr(System, "forward",
                        lambda *batch: batches.append(batch[1]) or forward(*batch))
    assert conftest.run(tmp_path / "run", words) == 0
    args, start = train.parse(words), System(train.parse(words)).student
    expected = published_dino(System(args), args, batches)
    found = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)["student"]
    found, first = (flat((name, values[name]) for name, p in start.named_parameters()
                         if p.requires_grad) for values in (found, start.state_dict()))
    assert len(batches) == 40
    assert (found - expected).norm() < 1e-4 * (expected - first).norm()
