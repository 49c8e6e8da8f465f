"""Lets the tests import the flat files of the repository, and call train.py as a command.

`pytest -m slow` runs the long versions of some tests, which are left out otherwise.
"""
import json
import multiprocessing
import signal
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch.testing import assert_close
from torch.utils._pytree import tree_leaves

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import train  # found by the line above
from textures import textures

FORKS = multiprocessing.get_context("forkserver")  # imports torch and the scripts once for all
FORKS.set_forkserver_preload(["train", "eval_knn", "eval_linear"])


def cloud(*shape, seed=0):
    """Normal numbers that depend on the seed alone."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def write_textures(root, train, val, classes=5):
    """A folder of 32 px PNGs, so many to train by and to measure by -> its path."""
    for i, pixels in enumerate(textures(train + val, 0)[0]):
        place = root / ("train" if i < train else "val") / f"class{i % classes}"
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(place / f"{i:02}.png")
    return root


def parse(*options):
    return train.parse([str(x) for x in options])


def call(*options, main=train.main):
    """main() of a script, train.py's if none is given, as from the command line."""
    names = signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1
    handlers = {name: signal.getsignal(name) for name in names}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["train.py", *map(str, options)])
        try:
            return main()
        finally:
            for name, handler in handlers.items():
                signal.signal(name, handler)


def run(out, options, *more):
    """Exit status of train.py, however it ended, without its slow pictures; out: its --out-dir."""
    where = ["--out-dir", out] if out else []
    with pytest.MonkeyPatch.context() as patch:
        for name in ("masks", "curves"):
            patch.setattr(train.analyze, name, lambda *_: None)
        try:
            return call(*options, *more, *where)
        except SystemExit as end:
            return end.code


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """Images of five classes: 40 to train by, 20 to measure by."""
    return write_textures(tmp_path_factory.mktemp("images"), 40, 20)


@pytest.fixture(scope="session")
def on_folder(folder):
    """Options of a small run on these images."""
    return ["--data", "folder", "--data-path", folder, "--batch-size", 16, "--device", "cpu",
            "--workers", 0]


@pytest.fixture(scope="session")
def checkpoint(on_folder, tmp_path_factory):
    """The state after three steps of such a run."""
    out = tmp_path_factory.mktemp("run")
    assert call(*on_folder, "--max-steps", 3, "--out-dir", out) == 0
    return out / "checkpoint.pt"


def state_of(out):
    return torch.load(out / "checkpoint.pt", weights_only=True)


def rows_of(out):
    """Rows of the log without wall-clock times; NaN and Infinity are no JSON, so an error."""
    rows = [json.loads(line, parse_constant=pytest.fail)
            for line in (out / "log.jsonl").read_text().splitlines()]
    clock = "images_per_second", "data_seconds"
    return [{name: x for name, x in row.items() if name not in clock} for row in rows]


def tensors(out):
    """All tensors of a checkpoint in order: networks, centres, moments."""
    return [x for x in tree_leaves(state_of(out)) if torch.is_tensor(x)]


def assert_same_run(out, whole):
    """Bitwise the same state, and the same log with each step once."""
    assert state_of(out)["step"] == state_of(whole)["step"]
    assert_close(tensors(out), tensors(whole), rtol=0, atol=0)
    assert rows_of(out) == rows_of(whole)


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: the long version of a test; run by pytest -m slow")
    config.option.markexpr = config.option.markexpr or "not slow"
