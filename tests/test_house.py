"""The files: which imports which, that none runs what it reads, and that the READMEs are true.

Code in the READMEs is run, and each command is split into words by bash, where `python` and
`torchrun` only write down their words, and read by the script's own parser.
"""
import argparse
import ast
import re
import runpy
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from torch.distributed.run import parse_args as parse_torchrun

import analyze
import conftest
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


# ---------- the READMEs ----------

README, PROMISES = ((ROOT / place / "README.md").read_text() for place in ("", "tests"))
STUDY = "\n".join(path.read_text() for path in sorted((ROOT / "study").glob("*.md")))
FENCED = re.compile(r"^```.*?^```", re.M | re.S)
PYTHON = re.findall(r"^```python\n(.*?)^```", README, re.M | re.S)
RECORD = """
python() { printf '%s\\0' python "$@" '' >> words; }
torchrun() { printf '%s\\0' torchrun "$@" '' >> words; }
srun() { local task="${!#}"; eval "${task/exec /}"; }
.() { :; }
exit() { :; }
command_not_found_handle() { :; }
"""


def commands(text):
    """The words of each `python X.py ..` and `torchrun .. X.py ..` of a page, by bash."""
    blocks = re.findall(r"^```sh\n(.*?)^```", text, re.M | re.S)
    inline = [x.replace("\n", " ") for x in re.findall(r"`([^`]+)`", FENCED.sub("", text))]
    found = []
    for code in ["\n".join(blocks), *(x for x in inline if re.search(r"(python|torchrun) ", x))]:
        with tempfile.TemporaryDirectory() as place:
            Path(place, "words").touch()
            done = subprocess.run([shutil.which("bash"), "-c", RECORD + code], cwd=place,
                                  env=dict(PATH="/none"), capture_output=True, text=True)
            found += [x.split("\0") for x in Path(place, "words").read_text().split("\0\0")]
        assert "syntax error" not in done.stderr, done.stderr
    return [words for words in found if any(word.endswith(".py") for word in words)]


def parse_with(script, words):
    """The options of a script, from its own parser; nothing behind it runs."""
    if script == "train.py":
        return conftest.parse(*words)
    real = argparse.ArgumentParser.parse_args

    def parse_and_leave(parser):
        real(parser, words)
        raise StopIteration

    with pytest.MonkeyPatch.context() as patch, pytest.raises(StopIteration):
        patch.setattr(argparse.ArgumentParser, "parse_args", parse_and_leave)
        patch.syspath_prepend((ROOT / script).parent)  # as `python script` does
        runpy.run_path(str(ROOT / script), run_name="__main__")


STUDY_COMMANDS = commands(STUDY)


@pytest.mark.parametrize("words", commands(README) + STUDY_COMMANDS, ids=" ".join)
def test_each_command_is_understood(words):
    program, *words = words
    if program == "torchrun":
        given = parse_torchrun(words)
        words = [given.training_script, *given.training_script_args]
    parse_with(words[0], words[1:])


def test_the_method_in_the_readme_learns(capsys):
    method = PYTHON[0].replace("range(1001)", "range(101)")
    assert method != PYTHON[0]
    scope = {}
    exec(method, scope)
    assert not any(p.requires_grad for p in scope["teacher"].parameters())
    rows = re.findall(r"loss ([\d.]+), k-NN ([\d.]+)", capsys.readouterr().out)
    (first_loss, untrained), (last_loss, trained) = [map(float, row) for row in rows]
    assert last_loss < 0.6 * first_loss and trained > untrained + 5


@pytest.mark.parametrize("code", PYTHON[1:])
def test_other_code_in_the_readme_runs(code):
    exec(code, {})


def test_the_reading_order_names_each_file_and_its_length():
    lengths = dict(re.findall(r"^\d+\. \[`(\w+\.py)`\]\(\1\) \((\d+)\)", README, re.M))
    assert sorted(lengths) == [path.name for path in FILES]
    for name, lines in lengths.items():
        assert int(lines) == pytest.approx(len((ROOT / name).read_text().splitlines()), rel=0.1)


def test_the_readme_is_read_in_one_sitting():
    prose = [line for line in FENCED.sub("", README).splitlines() if not line.startswith("|")]
    assert len(README.splitlines()) <= 180 and len(README.split()) <= 2000
    assert max(map(len, prose)) <= 130


@pytest.mark.parametrize("words", [words for words in STUDY_COMMANDS
                                   if "study/runs.jsonl" in words], ids=" ".join)
def test_each_table_and_figure_of_the_runs_can_be_made(words, tmp_path, monkeypatch, capsys):
    out = ["--out", str(tmp_path / "picture.png")] * ("--out" in words)
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", [*words[1:], *out])
    analyze.main()
    assert "| n |" in capsys.readouterr().out or (tmp_path / "picture.png").exists()


@pytest.mark.parametrize("place, text", [("", README), ("study", STUDY), ("tests", PROMISES)])
def test_links_to_files_lead_somewhere(place, text):
    for path in re.findall(r"\]\((?!http)([^)#]+)", FENCED.sub("", text)):
        assert (ROOT / place / path).exists(), path


def test_each_promise_names_a_test_that_exists():
    promised, _ = PROMISES.split("## Not promised")
    for promise in promised.split("\n- ")[1:]:
        named = re.findall(r"`(test_\w+\.py)::(test_\w+)`", promise)
        assert named, promise
        for file, name in named:
            assert f"def {name}(" in (ROOT / "tests" / file).read_text(), name
