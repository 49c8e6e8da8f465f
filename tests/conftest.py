"""Lets the tests import the flat files of the repository: `from losses import ...`."""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
