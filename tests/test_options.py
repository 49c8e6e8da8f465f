"""Wrong options of every script: status 2, one line with the value and the way out, no traces."""
import runpy
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from conftest import ROOT, call, write_textures
from model import ARCHS

EXPORT = "weights"  # the script with --export
EVALUATE = "--checkpoint {run}/checkpoint.pt --data-path {data} --device cpu --workers 0 "
BASE = {  # options in front of those of the table
    "train": "--data folder --data-path {data} --batch-size 16 --device cpu --workers 0 "
             "--max-steps 2 --eval-every 99 --out-dir {new}/run ",
    "eval_knn": EVALUATE, "eval_linear": EVALUATE, "analyze": "", "bench": "--device cpu ",
    EXPORT: "--checkpoint {tiny} --export {new} "}


def run_script(script, words):
    """The status of `python SCRIPT.py WORDS`, run in this process."""
    try:
        call(*words, main=lambda: runpy.run_path(str(ROOT / f"{script}.py"), run_name="__main__"))
    except SystemExit as stop:
        return stop.code or 0


@pytest.fixture(scope="module")
def things(tmp_path_factory):
    """Paths by name: images, runs, weights (`foreign` says no arch, `other` a wrong one)."""
    root = tmp_path_factory.mktemp("things")
    names = {name: root / name for name in
             "data noval unknown text run tiny foreign other code damaged rowless".split()}
    for name in "data", "unknown":
        write_textures(names[name], 40, 20)
    write_textures(names["noval"], 40, 0)
    (names["unknown"] / "val" / "class0").rename(names["unknown"] / "val" / "zebra")
    names["text"].write_text("words")
    words = (BASE["train"] + "--out-dir {run}").format_map(names | {"new": root})
    assert run_script("train", words.split()) == 0
    for name, file, content in ("damaged", "checkpoint.pt", "words"), ("rowless", "log.jsonl", "5"):
        shutil.copytree(names["run"], names[name])
        (names[name] / file).write_text(content)
    state = torch.load(names["run"] / "checkpoint.pt", weights_only=True)
    tiny = ARCHS["vit_tiny"](image_size=32, patch_size=16).state_dict()
    for name, content in dict(
            tiny=dict(student=tiny, args=dict(arch="vit_tiny", image_size=32, patch_size=16)),
            other=state | dict(args=state["args"] | dict(arch="vit_mini")),
            foreign=tiny, code=dict(code=signal.getsignal)).items():
        torch.save(content, names[name])
    more = dict(absent="mps" if torch.cuda.is_available() else "cuda", long="x" * 2000, root=root)
    return {name: str(path) for name, path in (names | more).items()}


# options behind BASE, then all that the line must contain, separated by |
WRONG = {
    "train": [  # the command line; sums; sizes; contradictions; given teachers; images; folders
        ("--unheard-of {long}", "--unheard-of"),
        ("--arch vit_giant", "--arch|vit_giant|vit_small"),
        ("--recipe dino", "--recipe|'dino'|dino-vits16-100ep"),
        ("--device {absent}", "--device {absent}|leave it out"),
        ("--lr fast", "--lr|fast"),
        ("--seed 99999999999999999999", "--seed|99999999999999999999|4294967295"),
        ("--loss 'rkd\nmore'", "more|choose from"),
        ("--loss dino+", "''|choose from"),
        ("--loss half*dino", "'half'|above 0"),
        ("--loss nan*dino", "'nan'|above 0"),
        ("--loss rkd+0*cka", "'0'|above 0"),
        ("--loss rkd+rkd", "rkd|twice|one weight"),
        ("--loss mae+simmim", "mae|simmim|leave one out"),
        ("--loss ibot+beit", "ibot and beit|choose one with --mask-ratio"),
        ("--image-size 30", "30x30|take 32x32"),
        ("--batch-size 2", "--batch-size 2|3 images"),
        ("--batch-size 2 --loss cka", "--batch-size 2|3 images|cka"),
        ("--loss ibot --pool cls+mean", "cls+mean|ibot|take cls or mean"),
        ("--batch-size 41", "--batch-size 41|40"),
        ("--batch-size 15 --grad-accum 2", "--batch-size 15|multiple of 2"),
        ("--epochs 0.01", "0.01|raise --epochs"),
        ("--crop-scale 0.9 0.3", "--crop-scale|0.9"),
        ("--patch-size 64", "--patch-size 64|--image-size 32|lower it"),
        ("--mask-unit 3", "--mask-unit 3|take 1"),
        ("--mask-unit 2 --mask-ratio 0.9", "--mask-ratio 0.9|lower it"),
        ("--loss beit --mask-probability 0", "--mask-probability 0|raise"),
        ("--loss mae --mask-ratio 0", "--mask-ratio 0|mae|above 0"),
        ("--loss beit --hide drop", "--hide drop|beit|--hide token"),
        ("--mask-spread 0.1", "--mask-spread|--hide token"),
        ("--mask-unit 2 --mask block", "--mask-unit 2|block|leave one out"),
        ("--mask attention --loss mae", "--mask attention|mae|leave it out"),
        ("--global-crops 1", "--global-crops 1|set it to 2"),
        ("--loss dbot --teacher ema", "dbot|take --teacher frozen"),
        ("--distance-weight 0 --angle-weight 0", "--angle-weight 0|set one"),
        ("--angle-vertices 17", "--angle-vertices 17|16"),
        ("--teacher-arch vit_tiny", "vit_tiny|--teacher-checkpoint"),
        ("--teacher-checkpoint {foreign}", "--teacher-checkpoint|{foreign}|--teacher-arch"),
        ("--teacher-checkpoint {tiny}", "--teacher-checkpoint|{tiny}|--patch-size 16"),
        ("--teacher-checkpoint {tiny} --loss moco", "--teacher-checkpoint|moco|take rkd"),
        ("--teacher-checkpoint {run}/checkpoint.pt --head 8", "--head 8|leave it out"),
        ("--teacher-checkpoint {tiny} --patch-size 16 --mask-ratio 0 --pull-weight 1", "weight 0"),
        ("--data-path {new}/images", "--data-path|{new}/images|train/CLASS"),
        ("--data-path {unknown}", "zebra|{unknown}/val|train/ lacks"),
        ("--data cifar10 --data-path {text}", "cifar10|{text}|--data-path"),
        ("--data textures", "textures|--data-path {data}|leave"),
        ("--out-dir {text}/run", "--out-dir|{text}/run"),
        ("--out-dir {damaged}", "{damaged}|--resume none"),
        ("--out-dir {run} --loss mae", "{run}|another run|--loss|--resume none"),
        ("--out-dir {run} --lr 0.002", "{run}|another run|(now 0.002)|another --out-dir"),
        ("--out-dir {run} --resume {rowless}/checkpoint.pt", "{run}|another --out-dir"),
        ("--resume {new}.pt", "--resume {new}.pt|--resume none"),
        ("--resume {run} --arch vit_mini", "--resume {run}|--arch vit_micro (now vit_mini)")],
    "eval_knn": [
        ("--checkpoint {new}.pt", "{new}.pt|no such file"),
        ("--checkpoint {code}", "{code}|code|written by train.py"),
        ("--checkpoint {foreign}", "{foreign}|add --arch, one of vit_micro|vit_base"),
        ("--checkpoint {foreign} --arch vit_tiny --pool last5", "--pool|last5"),
        ("--pool last4", "--pool last4|take cls or mean"),
        ("--checkpoint {other}", "{other}|does not fit"),
        ("--arch vit_mini", "--arch vit_mini contradicts|a vit_micro: leave --arch out"),
        ("--image-size 30", "30x30"),
        ("--k 0", "--k: 0 must"),
        ("--temperature nan", "--temperature: nan must"),
        ("--shots 9", "--shots 9|smallest class|8 images|at most"),
        ("--shots 0", "--shots: 0 must"),
        ("--shots 1 --data-path {noval}/train/class0", "{noval}/train/class0|needs classes"),
        ("--draws 3", "--draws has no effect|--shots"),
        ("--shots 1 --whiten 0.5", "--whiten has no effect|--shots"),
        ("--shift zoom", "--shift|zoom|rotate"),
        ("--cache {text}", "--cache|{text}")],
    "eval_linear": [
        ("--data-path {noval}", "--data-path|{noval}|val/"),
        ("--epochs 0", "--epochs: 0 must"),
        ("--shots 1 --augment", "--augment has no effect|--shots"),
        ("--lrs 0.1 -1 --cache {new}", "--lrs: -1 must")],
    "analyze": [
        ("", "figure|folder"),
        ("pies {run}", "pies|curves|masks"),
        ("curves {rowless}", "{rowless}|finished run of train.py"),
        ("masks {damaged}", "{damaged}|finished run of train.py"),
        ("curves {new}", "{new} cannot be read as a run|finished run of train.py"),
        ("curves {run} --out {new}/x.png",
         "no curves: [Errno 2]|{new}/x.png'; name a file that can be written with --out\n"),
        ("table {run}/log.jsonl", "log.jsonl cannot be read|run of train.py, or study/runs.jsonl"),
        ("pca {run}/args.json", "no pca: {run}/args.json is no checkpoint|MoCo v3\n")],
    "bench": [("--only tables", "--only tables|angle")],
    EXPORT: [
        ("--checkpoint {run}/checkpoint.pt", "vit_micro|export vit_tiny"),
        ("--export {tiny}", "--export {tiny}|take another"),
        ("--export {new}/weights", "--export {new}/weights")]}


def traces(folder):
    """All that lies in a folder, so that anything new or written again shows."""
    return {path: (path.is_file() and path.stat().st_mtime_ns, path.stat().st_size)
            for path in Path(folder).rglob("*")}


def assert_refused(status, err, says):
    assert status == 2 and len(err.splitlines()) == 1 and len(err) < 1000, err
    assert [text for text in says.split("|") if text not in err] == [], err


@pytest.mark.parametrize("script, options, says", [
    (script, *row) for script, rows in WRONG.items() for row in rows])
def test_a_wrong_option_ends_in_one_line_that_helps_and_leaves_no_trace(
        script, options, says, things, tmp_path, monkeypatch, capsys):
    names = things | {"new": str(tmp_path / "new")}
    monkeypatch.chdir(tmp_path)
    before = traces(things["root"])
    status = run_script(script, shlex.split((BASE[script] + options).format_map(names)))
    assert_refused(status, capsys.readouterr().err, says.format_map(names))
    assert traces(things["root"]) == before and traces(tmp_path) == {}


def test_a_process_of_its_own_is_refused_alike(tmp_path):
    words = [sys.executable, ROOT / "train.py", "--lr", "nan", "--out-dir", "new"]
    done = subprocess.run(words, cwd=tmp_path, text=True, capture_output=True, timeout=120)
    assert_refused(done.returncode, done.stderr, "--lr: nan must")
    assert traces(tmp_path) == {}


def test_tasks_of_slurm_that_know_nothing_of_each_other_are_refused(
        things, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("SLURM_NTASKS", "2")
    names = things | {"new": str(tmp_path)}
    status = run_script("train", shlex.split(BASE["train"].format_map(names)))
    assert_refused(status, capsys.readouterr().err, "2 tasks|RANK=$SLURM_PROCID")


def test_an_older_python_is_told_so():
    code = ("import sys, torchvision.utils, torch._dynamo; sys.version_info = (3, 10, 0); "
            "import train")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, text=True, capture_output=True)
    assert done.returncode == 1 and "3.11" in done.stderr and len(done.stderr.splitlines()) == 1
