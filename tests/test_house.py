"""The files: which imports which, what README says of them, and that none runs what it reads."""
import ast
import re

import pytest

from conftest import ROOT

FILES = sorted(ROOT.glob("*.py"))
MAY_IMPORT = {  # in the order of reading: a file imports only files above it
    "losses": "", "masking": "", "model": "", "randomness": "",
    "textures": "randomness",
    "data": "randomness textures",
    "weights": "model",
    "objectives": "losses model randomness weights",
    "eval_knn": "data model randomness weights",
    "eval_linear": "data eval_knn randomness",
    "analyze": "losses masking model data randomness textures weights objectives eval_knn",
    "train": "losses masking model data randomness weights objectives eval_knn analyze",
    "bench": "losses masking model data objectives eval_knn eval_linear train"}
README_ROW = re.compile(r"^\|\s*\[`(\w+\.py)`\]\(\1\)\s*\|\s*(\d+)\s*\|", re.M)
KNOWN = {*MAY_IMPORT, "tests", "conftest", "."}
each_file = pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)


def nodes(path, *kinds):
    return [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, kinds)]


def imported(path):
    """Top-level names of all modules that a file imports, wherever in it."""
    names = [alias.name for node in nodes(path, ast.Import) for alias in node.names]
    names += ["" if node.level else node.module for node in nodes(path, ast.ImportFrom)]
    return {name.split(".")[0] or "." for name in names}


def test_there_are_these_files_and_imports_point_upwards():
    assert sorted(MAY_IMPORT) == [path.stem for path in FILES]
    for place, allowed in enumerate(MAY_IMPORT.values()):
        assert set(allowed.split()) <= {*list(MAY_IMPORT)[:place]}


@each_file
def test_a_file_imports_what_the_table_says(path):
    assert imported(path) & KNOWN == set(MAY_IMPORT[path.stem].split())


@pytest.mark.parametrize("name", ["losses", "masking"])
def test_the_mathematics_needs_nothing_but_torch(name):
    assert imported(ROOT / f"{name}.py") <= {"torch", "math"}


@each_file
def test_weights_are_read_as_tensors_only(path):
    for call in nodes(path, ast.Call):
        if ast.unparse(call.func) in ("torch.load", "torch.jit.load", "load"):
            assert {k.arg: ast.unparse(k.value) for k in call.keywords}["weights_only"] == "True"


@each_file
def test_nothing_runs_what_it_reads(path):
    called = {ast.unparse(node.func) for node in nodes(path, ast.Call)}
    assert not called & {"eval", "exec", "compile", "__import__", "os.system"}
    assert not imported(path) & {"pickle", "dill", "joblib", "yaml", "subprocess", "importlib"}
    assert "allow_pickle" not in path.read_text()


def test_the_file_map_names_each_file_and_its_length():
    lengths = dict(README_ROW.findall((ROOT / "README.md").read_text()))
    assert sorted(lengths) == [path.name for path in FILES]
    for name, lines in lengths.items():
        assert int(lines) == pytest.approx(len((ROOT / name).read_text().splitlines()), rel=0.1)


def test_each_promise_names_a_test_that_exists():
    promised, _ = (ROOT / "tests" / "README.md").read_text().split("## Not promised")
    for promise in promised.split("\n- ")[1:]:
        named = re.findall(r"`(test_\w+\.py)::(test_\w+)`", promise)
        assert named, promise
        for file, name in named:
            assert f"def {name}(" in (ROOT / "tests" / file).read_text(), name
