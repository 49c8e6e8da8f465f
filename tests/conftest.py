"""Lets the tests import the flat files of the repository, and call train.py as a command.

`pytest -m slow` runs the long versions of some tests, which are left out otherwise.
"""
import signal
import sys
from pathlib import Path

import pytest
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import train  # found by the line above
from textures import textures


def drawn(count, seed=0, size=32):
    """Built-in images: uint8 (N, 3, S, S), labels (N,), factors (N, 9)."""
    return textures(count, seed, size)


def write_textures(root, train, val, classes=5):
    """A folder of 32 px PNGs, so many to train by and to measure by -> its path."""
    for i, pixels in enumerate(drawn(train + val)[0]):
        place = root / ("train" if i < train else "val") / f"class{i % classes}"
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(place / f"{i:02}.png")
    return root


def parse(*options):
    return train.parse([str(x) for x in options])


def call(*options):
    """train.main() as from the command line."""
    names = signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1
    handlers = {name: signal.getsignal(name) for name in names}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["train.py", *map(str, options)])
        try:
            return train.main()
        finally:
            for name, handler in handlers.items():
                signal.signal(name, handler)


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: the long version of a test; run by pytest -m slow")


def pytest_collection_modifyitems(config, items):
    if "slow" not in config.option.markexpr:
        for item in items:
            if "slow" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="long: pytest -m slow"))
