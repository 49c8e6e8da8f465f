"""The house: who imports whom, what README says of the files, and that nothing runs what it reads.

    pytest tests/test_house.py
"""
import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FILES = sorted(ROOT.glob("*.py"))
NAMES = {path.stem for path in FILES}
LEAVES = {"losses", "masking", "model", "data"}
MAY_IMPORT = {"losses": set(), "masking": set(), "model": set(), "data": set(),
              "launch": {"model"},
              "checkpoint": {"model"},
              "eval_knn": {"model", "data", "launch"},
              "eval_linear": {"data", "eval_knn", "launch"},
              "objectives": LEAVES,
              "analyze": LEAVES | {"objectives", "eval_knn", "launch", "checkpoint"},
              "bench": LEAVES | {"launch", "objectives", "eval_knn", "eval_linear", "train"},
              "train": LEAVES | {"checkpoint", "launch", "objectives", "eval_knn", "analyze"}}
each_file = pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)


def nodes(path, *kinds):
    return [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, kinds)]


def imported(path):
    """Top-level names of all modules that a file imports, wherever in it."""
    names = [alias.name for node in nodes(path, ast.Import) for alias in node.names]
    names += ["." if node.level else node.module for node in nodes(path, ast.ImportFrom)]
    return {name.split(".")[0] for name in names}


@each_file
def test_imports_run_one_way(path):
    assert imported(path) & (NAMES | {"tests", "conftest", ""}) <= MAY_IMPORT[path.stem]


@pytest.mark.parametrize("name", ["losses", "masking"])
def test_the_mathematics_needs_nothing_but_torch(name):
    assert imported(ROOT / f"{name}.py") <= {"torch", "math"}


@each_file
def test_weights_are_read_as_tensors_only(path):
    for call in nodes(path, ast.Call):
        if ast.unparse(call.func) in ("torch.load", "torch.jit.load", "load"):
            assert {k.arg: ast.unparse(k.value) for k in call.keywords}["weights_only"] == "True"


def test_weights_are_read_somewhere():
    assert sum(path.read_text().count("torch.load(") for path in FILES) >= 2


@each_file
def test_nothing_runs_what_it_reads(path):
    called = {ast.unparse(node.func) for node in nodes(path, ast.Call)}
    assert not called & {"eval", "exec", "compile", "__import__", "os.system"}
    assert not imported(path) & {"pickle", "dill", "joblib", "yaml", "subprocess", "importlib"}
    assert "allow_pickle" not in path.read_text()


ROW = re.compile(r"^\|\s*\[`(\w+\.py)`\]\((\w+\.py)\)\s*\|\s*(\d+)\s*\|", re.M)


def test_the_file_map_names_each_file_and_its_length():
    rows = ROW.findall((ROOT / "README.md").read_text())
    assert sorted(name for name, _, _ in rows) == [path.name for path in FILES]
    for name, link, lines in rows:
        assert link == name
        assert int(lines) == pytest.approx(len((ROOT / name).read_text().splitlines()), rel=0.1)
