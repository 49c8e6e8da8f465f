"""Lets the tests import the flat files of the repository: `from losses import ...`.

`pytest -m slow` runs the long versions of some tests, which are left out otherwise.
"""
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: the long version of a test; run by pytest -m slow")


def pytest_collection_modifyitems(config, items):
    if "slow" not in config.option.markexpr:
        for item in items:
            if "slow" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="long: pytest -m slow"))
