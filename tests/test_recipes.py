"""Every value of every recipe against a table that says where it was published.

    pytest tests/test_recipes.py

Repositories at github.com; FILE names the file or the command in it. A number is written here as
its source writes it (base lr and what it is per, warm-up in epochs), and converted by the test.
"""
import pytest

import train
from objectives import RECIPES

DINO = "facebookresearch/dino main_dino.py, defaults (README: vanilla ViT-S, 100 epochs, 8 GPUs)"
IBOT = "bytedance/ibot README, ViT-S/16; else main_ibot.py, defaults"
MOCO = "facebookresearch/moco-v3 CONFIG.md, ViT-S on one node; else main_moco.py, defaults"
MAE = "facebookresearch/mae PRETRAIN.md, ViT-B; else main_pretrain.py, defaults"
SIMMIM = "microsoft/SimMIM configs/vit_base__800ep, pretrain; else config.py"
BEIT = "microsoft/unilm beit README, base on ImageNet-1k; else run_beit_pretraining.py, defaults"
DBOT = "liuxingbin/dbot PRETRAIN.md, ViT-B/16; else main_pretrain.py, defaults"
SIMCLR = "Chen et al. 2020, section 2, appendix A and B.9 (temperature .1), in MoCo v3's frame"
BYOL = "Grill et al. 2020, section 3 and appendix B (momentum .996, MLPs 4096-256), in that frame"

# source; epochs, batch; lr, per how many images (None: absolute), min lr; warm-up in epochs (of how
# many); weight decay; beta2; clip, each by itself; momentum (None: no moving average)
FRAME = {
    "dino-vits16-100ep": (DINO, 100, 512, 5e-4, 256, 1e-6, (10, 100), (0.04, 0.4), 0.999, 3.0, True,
                          0.996),
    "ibot-vits16-800ep": (IBOT, 800, 1024, 5e-4, 256, 1e-6, (10, 800), (0.04, 0.4), 0.999, 3.0,
                          True, 0.996),
    "moco-vits16-300ep": (MOCO, 300, 1024, 1.5e-4, 256, 0, (40, 300), (0.1, 0.1), 0.999, 0, False,
                          0.99),
    "simclr-vits16-300ep": (SIMCLR, 300, 1024, 1.5e-4, 256, 0, (40, 300), (0.1, 0.1), 0.999, 0,
                            False, None),
    "byol-vits16-300ep": (BYOL, 300, 1024, 1.5e-4, 256, 0, (40, 300), (0.1, 0.1), 0.999, 0, False,
                          0.996),
    "mae-vitb16-800ep": (MAE, 800, 4096, 1.5e-4, 256, 0, (40, 800), (0.05, 0.05), 0.95, 0, False,
                         None),
    "simmim-vitb16-800ep": (SIMMIM, 800, 2048, 1e-4, 512, 0, (10, 800), (0.05, 0.05), 0.999, 5.0,
                            False, None),
    "beit-vitb16-800ep": (BEIT, 800, 2048, 1.5e-3, None, 1e-5, (10, 800), (0.05, 0.05), 0.999, 3.0,
                          False, None),
    "dbot-vitb16-1600ep": (DBOT, 1600, 4096, 1.5e-4, 256, 0, (40, 800), (0.05, 0.05), 0.95, 3.0,
                           False, None),
}

BYOLS = dict(jitter=0.4, hue=0.1, grey=0.2, blur=[1.0, 0.1], solarize=[0.0, 0.2])
FLIP_ONLY = dict(jitter=0, hue=0, grey=0, blur=[0, 0], solarize=[0, 0])
VIT_S = dict(arch="vit_small", patch_size=16, image_size=224, pool="cls")
TWELVE_HEADS = VIT_S | dict(arch="vit_small_12heads")  # moco-v3 vits.py: vit_small, num_heads=12
VIT_B = VIT_S | dict(arch="vit_base")
FROZEN = dict(freeze_patch_embed=True, fixed_pos=True)  # moco-v3 --stop-grad-conv1, vits.py

# the rest, by the same sources
REST = {
    "dino-vits16-100ep": VIT_S | BYOLS | dict(
        loss="dino", temperature=0.1, teacher_temperature=[0.04, 0.04], prototypes=65536,
        head_batchnorm=False, projection=256, head_hidden=2048, freeze_last_layer=1 / 100,
        drop_path=0.1, crop_scale=[0.4, 1], local_crops=8, mask_ratio=0, global_crops=2),
    "ibot-vits16-800ep": VIT_S | BYOLS | dict(
        loss="ibot", temperature=0.1, teacher_temperature=[0.04, 0.07], teacher_warmup=30 / 800,
        prototypes=8192, projection=256, head_hidden=2048, head_batchnorm=False,
        freeze_last_layer=1 / 800, drop_path=0.1,
        crop_scale=[0.25, 1], local_crops=10, mask="block", mask_ratio=0.3, mask_spread=0.2,
        mask_probability=0.5, hide="token", global_crops=2),  # pred_ratio 0 .3, pred_ratio_var 0 .2
    "moco-vits16-300ep": TWELVE_HEADS | BYOLS | FROZEN | dict(
        loss="moco", temperature=0.2, projection=256, head_hidden=4096, crop_scale=[0.08, 1],
        drop_path=0, mask_ratio=0, local_crops=0),
    "simclr-vits16-300ep": TWELVE_HEADS | FROZEN | dict(
        loss="simclr", temperature=0.1, projection=128, head_hidden=2048, crop_scale=[0.08, 1],
        jitter=0.8, hue=0.2, grey=0.2, blur=[0.5, 0.5], solarize=[0, 0], mask_ratio=0),
    "byol-vits16-300ep": TWELVE_HEADS | BYOLS | FROZEN | dict(
        loss="byol", projection=256, head_hidden=4096, crop_scale=[0.08, 1], mask_ratio=0),
    "mae-vitb16-800ep": VIT_B | FLIP_ONLY | dict(
        loss="mae", crop_scale=[0.2, 1], mask="random", mask_ratio=0.75, hide="drop",
        decoder=[512, 8], fixed_pos=True, drop_path=0, global_crops=1),
    "simmim-vitb16-800ep": VIT_B | FLIP_ONLY | dict(
        loss="simmim", crop_scale=[0.67, 1], mask="random", mask_ratio=0.6, mask_unit=32 / 16,
        hide="token", drop_path=0.1, global_crops=1),  # MASK_PATCH_SIZE 32, patches of 16
    "beit-vitb16-800ep": VIT_B | FLIP_ONLY | dict(
        loss="beit", jitter=0.4, crop_scale=[0.08, 1], mask="block", mask_ratio=75 / 196,
        hide="token", prototypes=8192, drop_path=0.1, global_crops=1),
    "dbot-vitb16-1600ep": VIT_B | FLIP_ONLY | dict(
        loss="dbot", stages=2, teacher="frozen", crop_scale=[0.2, 1], mask="random",
        mask_ratio=0.75, hide="drop", decoder=[512, 8], fixed_pos=True, drop_path=0.2,
        global_crops=1),  # stage_epochs 0 800 1600, sdpr .2
}
each = pytest.mark.parametrize("recipe", RECIPES)


def options_of(recipe, *more):
    return vars(train.parse(["--recipe", recipe, *more]))


@each
def test_schedule_and_optimizer_are_the_published_ones(recipe):
    _, epochs, batch, lr, per, min_lr, warm, decay, beta2, limit, alone, momentum = FRAME[recipe]
    args = options_of(recipe)
    expected = dict(epochs=epochs, batch_size=batch, lr=lr * (batch / per if per else 1),
                    min_lr=min_lr, warmup=warm[0] / warm[1], beta2=beta2, clip_grad=limit)
    assert {name: args[name] for name in expected} == pytest.approx(expected)
    assert args["weight_decay"] == list(decay) and args["clip_each"] == alone
    assert args["momentum"] == momentum or momentum is None and args["teacher"] != "ema"


@each
def test_everything_else_is_too(recipe):
    args = options_of(recipe)
    assert {name: args[name] for name in REST[recipe]} == REST[recipe]


@each
def test_a_recipe_sets_nothing_that_the_tables_do_not_source(recipe):
    framed = set("""epochs batch_size lr min_lr warmup weight_decay beta2 clip_grad clip_each
                    momentum""".split())
    assert set(RECIPES[recipe]) <= framed | set(REST[recipe]) | {"data", "workers"}
    assert FRAME[recipe][0].split()[0].count("/") == 1 or "et al." in FRAME[recipe][0]


@each
def test_options_on_the_command_line_still_win(recipe):
    args = options_of(recipe, "--lr", "0.5", "--arch", "vit_tiny", "--crop-scale", "0.3", "0.9")
    assert (args["lr"], args["arch"], args["crop_scale"]) == (0.5, "vit_tiny", [0.3, 0.9])
    assert args["epochs"] == RECIPES[recipe]["epochs"]


def test_a_term_can_be_added_to_a_recipe():
    args = options_of("dino-vits16-100ep", "--loss", "dino+0.5*rkd")
    assert args["loss"] == "dino+0.5*rkd" and args["mask_ratio"] == 0 and args["head"] == 0
    assert args["prototypes"] == 65536


def test_what_a_recipe_builds_has_the_published_heads():
    small = dict(image_size=32, patch_size=16, arch="vit_micro")  # the heads do not know of it
    words = [str(x) for name, value in small.items()
             for x in ("--" + name.replace("_", "-"), value)]
    system = train.System(train.parse(["--recipe", "moco-vits16-300ep", *words]))
    head, predictor = (x["moco"] for x in (system.student.heads, system.student.predictors))
    widths = [[tuple(w.shape) for w in x.parameters() if w.dim() == 2] for x in (head, predictor)]
    assert widths == [[(4096, 64), (4096, 4096), (256, 4096)], [(4096, 256), (256, 4096)]]
    assert [type(x).__name__ for x in head][-1] == "BatchNorm" and head[-1].weight is None
