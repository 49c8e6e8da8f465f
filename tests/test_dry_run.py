"""The step on a GPU without one: CUDA tensors with a shape, a dtype and a device, but no memory.

Operations on CPU tensors run for real. Operations with a CUDA tensor only compute shapes: mixed
devices raise, and each wait for the GPU is noted, which is a result that the CPU reads, or a copy
to the GPU from memory that is not pinned. Autograd needs a driver, so only forward passes are run.
Attention is counted in its explicit form; a GPU has one fused kernel for it and writes less.
"""
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._pytree import tree_leaves

import losses
import train
from conftest import cloud, parse
from data import coloured, crop
from eval_knn import features_of, knn_scores
from eval_linear import Heads
from objectives import OBJECTIVES, System
from randomness import uniform

aten = torch.ops.aten
FREE = "empty", "_unsafe_view"  # no kernel: memory, or another shape
READS = {aten._local_scalar_dense.default, aten.nonzero.default, aten.equal.default}
OPTIONS = {"dino": "--local-crops 2", "mae+rkd": "--pool cls",
           "ibot+0.5*rkd": "--local-crops 1 --head 8",
           "dino+rkd": "--mask attention --mask-ratio 0.5",
           "beit+simmim": "--mask block --mask-ratio 0.4", "dbot": "--patch-size 4"}


class DryGPU(FakeTensorMode):
    """Counts kernels and the bytes that they write, and lists all waits for the GPU."""

    def __init__(self):
        super().__init__(allow_non_fake_inputs=True)
        self.pinned = set()
        self.restart()

    def restart(self):
        self.kernels, self.bytes, self.waits = 0, 0, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs, device = kwargs or {}, str((kwargs or {}).get("device"))
        given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        if func is aten._pin_memory.default:  # needs a driver
            self.pinned.add(args[0].data_ptr())
            return args[0]
        if not any(isinstance(x, FakeTensor) for x in given) and not device.startswith("cuda"):
            return func(*args, **kwargs)
        copied = func is aten._to_copy.default and device != "None"
        if func in READS or copied and (device == "cpu" or not isinstance(args[0], FakeTensor)
                                        and args[0].data_ptr() not in self.pinned):
            self.waits.append(str(func))
        if func in (aten.index.Tensor, aten.index_put.default, aten.index_put_.default):
            assert all(isinstance(x, FakeTensor) and x.dtype != torch.bool
                       for x in args[1] if x is not None), f"{func} by bools, or from the CPU"
        before = self.kernels
        out = super().__torch_dispatch__(func, types, args, kwargs)
        composite = self.kernels > before  # it is made of operations that have been counted
        if not (composite or func.is_view or func.namespace == "prim"
                or any(word in func.name() for word in FREE)):
            self.kernels += 1
            self.bytes += sum(x.nbytes for x in tree_leaves(out) if isinstance(x, torch.Tensor))
        return out


@pytest.fixture
def dry():
    with DryGPU() as mode:
        yield mode


def to_gpu(module):
    for part in module.modules():
        for table in (part._parameters, part._buffers):
            table.update({name: torch.nn.Parameter(x.detach().to("cuda"), False)
                          for name, x in table.items() if x is not None})
    return module


@pytest.mark.parametrize("loss", dict.fromkeys([*OBJECTIVES, *OPTIONS]))
def test_a_step_mixes_no_devices_and_waits_for_nothing(loss, dry):
    args = parse("--loss", loss, "--batch-size", 8, "--prototypes", 64, "--device", "cpu",
                 *OPTIONS.get(loss, "").split())
    system = to_gpu(System(args))
    system.state = {name: x.to("cuda") for name, x in system.state.items()}
    views = [cloud(8, 3, 32, 32).to("cuda") for _ in range(args.global_crops)]
    views += [cloud(8, 3, 16, 16).to("cuda") for _ in range(args.local_crops)]
    dry.restart()
    mask = train.draw_masks(args, system, 0, 0, views)
    if args.mask == "attention":  # its values are not here: a mask like it
        assert dry.waits == ["aten._to_copy.default"] and mask.device.type == "cpu"
        dry.waits, mask = [], torch.arange(16).expand(16, 16) < 8
    found, logs, points = system(views, views, mask, 0.5)
    assert all(x.device.type == "cuda" for x in (found, *filter(torch.is_tensor, points)))
    assert dry.waits == [] and 50 < dry.kernels < 1500 and dry.bytes < 10**8


def test_views_are_cut_and_coloured_without_a_wait(dry):
    images = torch.zeros(8, 3, 32, 32, dtype=torch.uint8, device="cuda")
    draws = [uniform(count, 0, torch.arange(8, device="cuda")) for count in (23, 9)]
    dry.restart()
    coloured(crop(images, draws[0], 32, (0.4, 1.0), True), draws[1], dict(solarize_probability=0.2))
    assert dry.waits == [] and dry.kernels < 300


def test_evaluations_mix_no_devices(dry):
    args = parse("--device", "cpu")
    vit = to_gpu(System(args)).student.backbone
    features = features_of(vit, torch.zeros(8, 3, 32, 32, device="cuda"), "mean")
    labels = torch.zeros(8, dtype=torch.int64, device="cuda")
    assert knn_scores(features, labels, features, 3, [1, 5])[5].device.type == "cuda"
    heads = Heads([0.1, 1.0], features.shape[1], 3, "cuda")
    heads.step(features, labels, 0.5)
    assert heads.logits(features).device.type == "cuda"


def test_angles_at_32_of_1024_images_cost_few_kernels_and_bytes(dry):
    student, teacher = (torch.zeros(1024, 384, device="cuda") for _ in range(2))
    vertices = torch.arange(32)
    dry.restart()
    losses.rkd_angle_loss(student, teacher, vertices)
    assert dry.kernels <= 75 and dry.bytes <= 1.5e9 and dry.waits == []
