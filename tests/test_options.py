"""Wrong options of all five scripts: status 2, a line that names value and way out, no traces.

    pytest tests/test_options.py
"""
import runpy
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
import eval_knn
import eval_linear
import train
from data import textures
from model import ARCHS

torch.set_num_threads(1)
SCRIPTS = dict(train=train, eval_knn=eval_knn, eval_linear=eval_linear, analyze=None, model=None)
EVALUATE = "--checkpoint {run}/checkpoint.pt --data-path {data} --device cpu --workers 0 "
BASE = dict(
    train="--data folder --data-path {data} --batch-size 16 --device cpu --workers 0 "
          "--max-steps 2 --out-dir {new}/run ",
    eval_knn=EVALUATE, eval_linear=EVALUATE, analyze="", model="")


def call(script, *words):
    """The status of a script that runs in this process, as from the command line."""
    handlers = {name: signal.getsignal(name) for name in (signal.SIGTERM, signal.SIGINT)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [f"{script}.py", *words])
        try:
            if SCRIPTS[script]:
                return SCRIPTS[script].main() or 0
            runpy.run_path(str(ROOT / f"{script}.py"), run_name="__main__")
            return 0
        except SystemExit as stop:
            return stop.code
        finally:
            for name, handler in handlers.items():
                signal.signal(name, handler)


def write_images(place, *classes, broken=False):
    """Eight textures of 32 px for each class, or eight files that only look like images."""
    images = textures(8 * len(classes), 0)[0].images
    for i, pixels in enumerate(images.permute(0, 2, 3, 1).numpy()):
        path = place / classes[i % len(classes)] / f"{i:02}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        if broken:
            path.write_bytes(b"no image")
        else:
            Image.fromarray(pixels).save(path)


LONG = "x" * 200  # a name of a folder
FIVE = [f"class{i}" for i in range(5)]
LOGS = dict(  # what analyze.py finds instead of rows
    words="no json\n", numbers="5\n", null="null\n", bytes=b"\xff\xfe\x00{}\n",
    stepless='{"loss": 1, "knn_top1": 3}\n', deep="[" * 10**5 + "\n",
    nested='{"step": {"a": 1}, "loss": [2], "knn_top1": {}}\n', digits="9" * 5000 + "\n",
    strings='{"step": "one", "loss": "high", "rkd": "low", "knn_top1": "none"}\n')


@pytest.fixture(scope="module")
def things(tmp_path_factory):
    """What the options below name: images, runs, checkpoints, and things in their place."""
    root = tmp_path_factory.mktemp("things")
    names = {name: root / name for name in (
        "data bare noval unknown strange broken empty text run tiny other foreign code step "
        "optimizer notours badargs hostile listed").split()}
    write_images(names["data"] / "train", *FIVE)
    write_images(names["data"] / "val", *FIVE)
    write_images(names["bare"], ".", ".")
    write_images(names["noval"] / "train", *FIVE)
    for name, unknown in ("unknown", ["zebra"]), ("strange", [f"{i}{LONG}" for i in range(5)]):
        write_images(names[name] / "train", *FIVE)
        write_images(names[name] / "val", *unknown)
    write_images(names["broken"] / "train", LONG, LONG, broken=True)
    names["empty"].mkdir()
    names["text"].write_text("words")
    words = (BASE["train"] + "--eval-every 1000").format_map(names | {"new": root}).split()
    assert call("train", *words) == 0

    state = torch.load(names["run"] / "checkpoint.pt", weights_only=True)
    tiny = ARCHS["vit_tiny"](image_size=32, patch_size=16).state_dict()
    torch.save(dict(student=tiny, args=dict(arch="vit_tiny", image_size=32, patch_size=16)),
               names["tiny"])
    torch.save(state | dict(args=state["args"] | dict(arch="vit_mini")), names["other"])
    torch.save({name: tiny[name] for name in ("cls_token", "pos_embed", "patch_embed.proj.weight")},
               names["foreign"])
    torch.save(dict(code=signal.getsignal), names["code"])
    torch.save(state | dict(step="two"), names["step"])
    torch.save(state | dict(optimizer={}), names["optimizer"])
    for name in "notours badargs hostile".split():
        shutil.copytree(names["run"], names[name])
    (names["notours"] / "checkpoint.pt").write_text("words")
    torch.save(state | dict(args={}), names["badargs"] / "checkpoint.pt")
    torch.save(state | dict(args=[1]), names["hostile"] / "checkpoint.pt")
    for name, rows in LOGS.items():
        names[name] = root / name
        names[name].mkdir()
        shutil.copy(names["run"] / "args.json", names[name])
        rows = rows if isinstance(rows, bytes) else rows.encode()
        (names[name] / "log.jsonl").write_bytes(rows)
    shutil.copytree(names["numbers"], names["listed"])
    shutil.copy(names["run"] / "log.jsonl", names["listed"])
    (names["listed"] / "args.json").write_text("[1]")
    here = dict(cuda=torch.cuda.is_available(), mps=torch.backends.mps.is_available())
    absent = next(name for name, there in here.items() if not there)
    return {name: str(path) for name, path in names.items()} | dict(
        root=str(root), absent=absent, long="x" * 2000, nines="9" * 5000)


def traces(folder):
    """All that lies in a folder, so that a difference shows."""
    return {str(path): path.is_file() and (path.stat().st_mtime_ns, path.stat().st_size)
            for path in Path(folder).rglob("*")}


FINISHED = "finished run of train.py"
CHECKPOINT = "written by train.py"

# script, options behind its BASE, what the message must say: the wrong value and the way out
WRONG = [
    # no such option, or no such value
    ("train", "--unheard-of 3", ("--unheard-of",)),
    ("train", "--batchsize 3", ("--batchsize",)),
    ("train", "--mask- 0.5", ("--mask-", "--mask-ratio")),
    ("train", "junk", ("junk",)),
    ("train", "--unheard-of {long}", ("--unheard-of",)),
    ("train", "--lr", ("--lr",)),
    ("train", "--weight-decay 0.1", ("--weight-decay", "2")),
    ("train", "--recipe dino", ("'dino'", "dino-vits16-100ep")),
    ("train", "--arch vit_huge", ("vit_huge", "--arch", "vit_small")),
    ("train", "--data nowhere", ("nowhere", "--data", "textures")),
    ("train", "--mask checker", ("checker", "--mask", "block")),
    ("train", "--hide away", ("away", "--hide", "token")),
    ("train", "--pool max", ("max", "--pool", "cls+mean")),
    ("train", "--teacher student", ("student", "--teacher", "frozen")),
    ("train", "--tokenizer none", ("none", "--tokenizer", "random")),
    ("train", "--device tpu", ("tpu", "--device", "cpu")),
    ("train", "--device {absent}", ("--device {absent}", "leave it out")),
    ("train", "--global-crops 3", ("--global-crops", "choice: 3")),
    # sums of terms
    ("train", "--loss nothing", ("nothing", "choose from", "rkd")),
    ("train", "--loss ''", ("''", "choose from")),
    ("train", "--loss rkd+", ("'rkd+'", "choose from")),
    ("train", "--loss 'rkd\nmore'", ("more", "choose from")),
    ("train", "--loss {long}", ("xxxx", "choose from")),
    ("train", "--loss 0*rkd", ("'0'", "above 0")),
    ("train", "--loss=-1*rkd", ("'-1'", "above 0")),
    ("train", "--loss nan*rkd", ("'nan'", "above 0")),
    ("train", "--loss two*rkd", ("'two'", "number")),
    ("train", "--loss rkd+rkd", ("rkd", "twice", "one weight")),
    ("train", "--loss mae+simmim", ("mae", "simmim", "leave one out")),
    ("train", "--loss ibot+beit", ("ibot and beit", "choose one with --mask-ratio")),
    # numbers
    ("train", "--lr fast", ("fast", "--lr")),
    ("train", "--lr -1", ("--lr: -1 must")),
    ("train", "--lr nan", ("--lr: nan must")),
    ("train", "--lr inf", ("--lr: inf must")),
    ("train", "--min-lr=-inf", ("--min-lr: -inf must")),
    ("train", "--momentum 2", ("--momentum: 2 must")),
    ("train", "--momentum nan", ("--momentum: nan must")),
    ("train", "--beta2 1", ("1", "--beta2")),
    ("train", "--drop-path 1", ("1", "--drop-path")),
    ("train", "--warmup 1.5", ("--warmup: 1.5 must")),
    ("train", "--weight-decay 0 -1", ("--weight-decay: -1 must")),
    ("train", "--temperature 0", ("--temperature: 0 must")),
    ("train", "--teacher-temperature 0 0.1", ("--teacher-temperature: 0 must")),
    ("train", "--clip-grad -3", ("--clip-grad: -3 must")),
    ("train", "--hue 0.6", ("--hue: 0.6 must")),
    ("train", "--blur 0.5", ("--blur", "2")),
    ("train", "--crop-scale 0.9 0.3", ("0.9", "--crop-scale")),
    ("train", "--crop-scale 0 1", ("0.0", "--crop-scale")),
    ("train", "--epochs 0", ("--epochs: 0 must")),
    ("train", "--epochs inf", ("--epochs: inf must")),
    ("train", "--epochs 0.01", ("0.01", "raise --epochs")),
    ("train", "--max-steps 0", ("--max-steps: 0 must")),
    ("train", "--max-steps 1e3", ("1e3", "--max-steps")),
    ("train", "--workers -1", ("--workers: -1 must")),
    ("train", "--seed -1", ("--seed: -1 must")),
    ("train", "--seed 99999999999999999999", ("99999999999999999999", "--seed", "4294967295")),
    ("train", "--seed {nines}", ("--seed: 9999 must")),
    ("train", "--save-every 0", ("--save-every: 0 must")),
    ("train", "--grad-accum 0", ("--grad-accum: 0 must")),
    ("train", "--batch-size 0", ("--batch-size: 0 must")),
    ("train", "--batch-size 2", ("--batch-size 2", "3 images")),
    ("train", "--batch-size 41", ("--batch-size 41", "40")),
    ("train", "--batch-size 4294967295", ("--batch-size 4294967295", "40")),
    ("train", "--batch-size 15 --grad-accum 2", ("15", "multiple of 2")),
    # sizes that do not fit each other
    ("train", "--image-size 0", ("--image-size: 0 must")),
    ("train", "--image-size 30", ("30x30", "take 32x32")),
    ("train", "--image-size 4294967288", ("4294967288", "--image-size")),
    ("train", "--patch-size 64", ("64", "another patch size")),
    ("train", "--patch-size 2", ("2", "take 4")),
    ("train", "--loss mae --decoder 33 1", ("33", "decoder", "multiple of")),
    ("train", "--mask-unit 3", ("--mask-unit 3", "take 1")),
    ("train", "--mask-ratio 1.5", ("--mask-ratio: 1.5 must")),
    ("train", "--mask-ratio 1", ("--mask-ratio 1", "lower it")),
    ("train", "--mask-ratio 0.01", ("--mask-ratio 0.01", "raise it")),
    ("train", "--patch-weight 1 --mask-ratio 0.9", ("--patch-weight 1", "lower --mask-ratio")),
    # options that contradict each other
    ("train", "--loss dbot --teacher ema", ("dbot", "take --teacher frozen")),
    ("train", "--loss beit --hide drop", ("--hide drop", "beit", "--hide token")),
    ("train", "--loss mae --hide token", ("--hide token", "mae", "--hide drop")),
    ("train", "--loss mae --mask-ratio 0", ("--mask-ratio 0", "mae", "above 0")),
    ("train", "--global-crops 1", ("--global-crops 1", "set it to 2")),
    ("train", "--recipe mae-vitb16-800ep --loss rkd", ("--global-crops 1", "set it to 2")),
    ("train", "--mask-unit 2 --mask block", ("--mask-unit 2", "block", "leave one out")),
    ("train", "--mask-spread 0.1", ("--mask-spread", "--hide token")),
    ("train", "--mask-spread 0.5 --hide token", ("--mask-spread 0.5", "lower it")),
    ("train", "--mask attention --loss mae", ("--mask attention", "mae", "leave it out")),
    ("train", "--stages 2", ("--stages 2", "--teacher frozen")),
    ("train", "--stages 2 --loss simclr", ("--stages 2", "--stages 1")),
    ("train", "--stages 4294967295 --teacher frozen", ("4294967295", "raise --epochs")),
    ("train", "--distance-weight 0 --angle-weight 0", ("--angle-weight 0", "set one")),
    ("train", "--teacher-arch vit_tiny", ("vit_tiny", "--teacher-checkpoint")),
    # a teacher that is given
    ("train", "--teacher-checkpoint {new}.pt", ("{new}.pt", "--teacher-checkpoint")),
    ("train", "--teacher-checkpoint {text}", ("{text}", CHECKPOINT)),
    ("train", "--teacher-checkpoint {empty}", ("{empty}", CHECKPOINT)),
    ("train", "--teacher-checkpoint {foreign}", ("{foreign}", "--teacher-arch")),
    ("train", "--teacher-checkpoint {tiny}", ("{tiny}", "--patch-size 16")),
    ("train", "--teacher-checkpoint {run}/checkpoint.pt --teacher ema",
     ("--teacher-checkpoint", "--teacher frozen")),
    ("train", "--teacher-checkpoint {run}/checkpoint.pt --head 8", ("--head 8", "leave it out")),
    ("train", "--teacher-checkpoint {run}/checkpoint.pt --stages 2", ("--stages 2", "--stages 1")),
    ("train", "--teacher-checkpoint {run}/checkpoint.pt --loss moco", ("moco", "take rkd")),
    ("train", "--teacher-checkpoint {run}/checkpoint.pt --loss mae", ("mae", "leave it out")),
    ("train", "--teacher-checkpoint {run}/checkpoint.pt --teacher-arch vit_mini",
     ("vit_mini", "leave --teacher-arch out")),
    ("train", "--teacher-checkpoint {run}/checkpoint.pt --pull-weight 1 --arch vit_mini",
     ("--pull-weight 1", "--pull-weight 0")),
    # images
    ("train", "--data-path {new}/images", ("{new}/images", "--data-path", "train/CLASS")),
    ("train", "--data-path {text}", ("{text}", "--data-path", "train/CLASS")),
    ("train", "--data-path {empty}", ("{empty}", "--data-path", "train/CLASS")),
    ("train", "--data-path {long}", ("xxxx", "--data-path", "train/CLASS")),
    ("train", "--data-path {unknown}", ("zebra", "{unknown}/val", "train/ lacks")),
    ("train", "--data-path {strange}", ("xxxx", "{strange}/val", "train/ lacks")),
    ("train", "--data-path {broken}", ("{broken}", "repair or remove")),
    ("train", "--data cifar10 --data-path {text}", ("cifar10", "{text}", "--data-path")),
    # folders of runs, and going on
    ("train", "--out-dir {text}/run", ("{text}/run", "--out-dir")),
    ("train", "--out-dir {text}", ("{text}", "--out-dir")),
    ("train", "--out-dir {run} --seed 1", ("{run}", "--seed 0 (now 1)", "--resume none")),
    ("train", "--out-dir {run} --arch vit_mini", ("{run}", "vit_micro", "--resume none")),
    ("train", "--out-dir {run} --loss mae", ("{run}", "--loss rkd (now mae)", "--resume none")),
    ("train", "--out-dir {notours}", ("{notours}", "--resume none")),
    ("train", "--out-dir {badargs}", ("{badargs}", "--resume none")),
    ("train", "--resume {new}.pt", ("--resume {new}.pt", "--resume none")),
    ("train", "--resume {text}", ("--resume {text}", "--resume none")),
    ("train", "--resume {empty}", ("--resume {empty}", "--resume none")),
    ("train", "--resume {long}", ("xxxx", "--resume none")),
    ("train", "--resume {code}", ("--resume {code}", "--resume none")),
    ("train", "--resume {foreign}", ("--resume {foreign}", "--resume none")),
    ("train", "--resume {run}/checkpoint.pt --arch vit_mini",
     ("--resume {run}/checkpoint.pt", "--resume none")),
    ("train", "--resume {run}/checkpoint.pt --loss simclr",
     ("--resume {run}/checkpoint.pt", "--resume none")),
    ("train", "--resume {step}", ("--resume {step}", "--resume none")),
    ("train", "--resume {optimizer}", ("--resume {optimizer}", "--resume none")),
    # evaluations: weights
    ("eval_knn", "--checkpoint {new}.pt", ("{new}.pt", "no such file")),
    ("eval_knn", "--checkpoint {text}", ("{text}", CHECKPOINT)),
    ("eval_knn", "--checkpoint {empty}", ("{empty}", CHECKPOINT)),
    ("eval_knn", "--checkpoint {code}", ("{code}", "code", CHECKPOINT)),
    ("eval_knn", "--checkpoint {long}", ("xxxx",)),
    ("eval_knn", "--checkpoint {foreign}", ("{foreign}", "add --arch")),
    ("eval_knn", "--checkpoint {foreign} --arch vit_tiny", ("{foreign}", "--arch")),
    ("eval_knn", "--checkpoint {tiny}", ("{tiny}", "add --data")),
    ("eval_knn", "--checkpoint {other}", ("{other}", "does not fit")),
    ("eval_knn", "--checkpoint {hostile}/checkpoint.pt", ("{hostile}", "--arch")),
    ("eval_knn", "--arch vit_mini", ("vit_mini", "leave --arch out")),
    ("eval_knn", "--arch vit_huge", ("vit_huge", "--arch", "vit_mini")),
    ("eval_linear", "--checkpoint {new}.pt", ("{new}.pt", "no such file")),
    ("eval_linear", "--checkpoint {foreign}", ("{foreign}", "add --arch")),
    # evaluations: images and features
    ("eval_knn", "--data-path {new}", ("{new}", "--data-path")),
    ("eval_knn", "--data-path {text}", ("{text}", "--data-path")),
    ("eval_knn", "--data-path {empty}", ("{empty}", "--data-path")),
    ("eval_knn", "--data-path {noval} --cache {new}", ("{noval}", "--data-path", "val/")),
    ("eval_knn", "--data-path {bare}", ("{bare}", "--data-path", "val/")),
    ("eval_knn", "--data-path {unknown}", ("zebra", "train/ lacks")),
    ("eval_knn", "--data-path {broken} --cache {new}", ("{broken}", "repair or remove")),
    ("eval_linear", "--data-path {noval}", ("{noval}", "--data-path", "val/")),
    ("eval_linear", "--data-path {long}", ("xxxx", "--data-path")),
    ("eval_knn", "--data nowhere", ("nowhere", "--data", "folder")),
    ("eval_knn", "--image-size 30 --cache {new}", ("30x30", "take 32x32")),
    ("eval_knn", "--image-size 0", ("--image-size: 0 must")),
    ("eval_linear", "--image-size 7", ("7x7", "take 8x8")),
    ("eval_knn", "--pool max", ("max", "--pool", "last4")),
    ("eval_knn", "--cache {text}", ("{text}", "--cache")),
    ("eval_linear", "--cache {text}/features", ("{text}/features", "--cache")),
    ("eval_knn", "--device {absent}", ("--device {absent}", "leave it out")),
    # evaluations: numbers
    ("eval_knn", "--k 0 --cache {new}", ("--k: 0 must")),
    ("eval_knn", "--k 5 1.5", ("1.5", "--k")),
    ("eval_knn", "--k", ("--k",)),
    ("eval_knn", "--k 4294967296", ("4294967296", "--k", "4294967295")),
    ("eval_knn", "--temperature 0", ("--temperature: 0 must")),
    ("eval_knn", "--temperature nan", ("--temperature: nan must")),
    ("eval_knn", "--temperature inf", ("--temperature: inf must")),
    ("eval_knn", "--timeout 0", ("--timeout: 0 must")),
    ("eval_knn", "--workers -1", ("--workers: -1 must")),
    ("eval_knn", "--lrs 1", ("--lrs",)),
    ("eval_linear", "--lrs -1 --cache {new}", ("--lrs: -1 must")),
    ("eval_linear", "--lrs 0.1 nan", ("--lrs: nan must")),
    ("eval_linear", "--lrs inf", ("--lrs: inf must")),
    ("eval_linear", "--lrs 0", ("--lrs: 0 must")),
    ("eval_linear", "--epochs 0", ("--epochs: 0 must")),
    ("eval_linear", "--epochs 1.5", ("1.5", "--epochs")),
    ("eval_linear", "--batch-size 0", ("--batch-size: 0 must")),
    ("eval_linear", "--seed {nines}", ("--seed: 9999 must")),
    ("eval_linear", "--k 3", ("--k",)),
    # pictures
    ("analyze", "", ("figure", "folder")),
    ("analyze", "curves", ("folder",)),
    ("analyze", "pies {run}", ("pies", "curves", "masks")),
    ("analyze", "curves {new}", ("{new}", FINISHED)),
    ("analyze", "curves {text}", ("{text}", FINISHED)),
    ("analyze", "curves {empty}", ("{empty}", FINISHED)),
    ("analyze", "curves {long}", ("xxxx", FINISHED)),
    ("analyze", "curves {run} --size 3", ("--size",)),
    *(("analyze", f"curves {{{name}}}", (f"{{{name}}}", FINISHED)) for name in [*LOGS, "listed"]),
    ("analyze", "masks {new}", ("{new}", FINISHED)),
    ("analyze", "masks {empty}", ("{empty}", FINISHED)),
    ("analyze", "masks {notours}", ("{notours}", FINISHED)),
    ("analyze", "masks {badargs}", ("{badargs}", FINISHED)),
    ("analyze", "masks {hostile}", ("{hostile}", FINISHED)),
    # weights for others
    ("model", "", ("--checkpoint", "--export")),
    ("model", "--checkpoint {tiny}", ("--export",)),
    ("model", "--checkpoint {tiny} --export {new} --arch vit_huge", ("vit_huge", "vit_small")),
    ("model", "--checkpoint {tiny} --export {new} --arch vit_small",
     ("vit_small", "leave --arch out")),
    ("model", "--checkpoint {tiny} --export {new} --import 3", ("--import",)),
    ("model", "--checkpoint {new}.pt --export {new}", ("{new}.pt", "no such file")),
    ("model", "--checkpoint {text} --export {new}", ("{text}", CHECKPOINT)),
    ("model", "--checkpoint {empty} --export {new}", ("{empty}", CHECKPOINT)),
    ("model", "--checkpoint {long} --export {new}", ("xxxx",)),
    ("model", "--checkpoint {foreign} --export {new}", ("{foreign}", "add --arch")),
    ("model", "--checkpoint {foreign} --arch vit_base --export {new}", ("{foreign}", "--arch")),
    ("model", "--checkpoint {run}/checkpoint.pt --export {new}", ("vit_micro", "export vit_tiny")),
    ("model", "--checkpoint {tiny} --export {new}/weights", ("{new}/weights", "--export")),
    ("model", "--checkpoint {tiny} --export {text}/weights", ("{text}/weights", "--export")),
    ("model", "--checkpoint {tiny} --export {empty}", ("{empty}", "--export")),
    ("model", "--checkpoint {tiny} --export ''", ("--export",)),
]


def check(status, out, err, says):
    lines = err.splitlines()
    assert "Traceback" not in err
    assert status == 2 and out == ""
    assert 1 <= len(lines) <= 2 and [len(line) for line in lines if len(line) >= 1000] == []
    assert [text for text in says if text not in err] == [], err


def name_of(case):
    return f"{case[0]} {case[1]}"


@pytest.mark.parametrize("case", WRONG, ids=name_of)
def test_a_wrong_option_is_refused_in_a_line_that_helps_and_leaves_no_trace(
        case, things, tmp_path, monkeypatch, capsys):
    script, options, says = case
    names = things | {"new": str(tmp_path / "new")}
    monkeypatch.chdir(tmp_path)
    before = traces(things["root"])
    status = call(script, *shlex.split((BASE[script] + options).format_map(names)))
    check(status, *capsys.readouterr(), [text.format_map(names) for text in says])
    assert traces(things["root"]) == before and traces(tmp_path) == {}


def test_the_table_is_long_and_asks_all_five_scripts():
    assert len(WRONG) >= 60 and len({case[:2] for case in WRONG}) == len(WRONG)
    assert {case[0] for case in WRONG} == set(SCRIPTS) and all(case[2] for case in WRONG)


def test_so_it_is_for_whole_processes(things, tmp_path):
    cases = [("train", "--lr nan --out-dir {new}", ("nan", "--lr")),
             ("eval_knn", "", ("--checkpoint",)),
             ("eval_linear", "--checkpoint {text} --cache {new}", ("{text}", CHECKPOINT)),
             ("analyze", "curves {numbers}", ("{numbers}", FINISHED)),
             ("model", "--checkpoint {text} --export {new}", ("{text}", CHECKPOINT))]
    names, before = things | {"new": str(tmp_path / "new")}, traces(things["root"])
    started = [subprocess.Popen(
        [sys.executable, ROOT / f"{script}.py", *shlex.split(options.format_map(names))],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tmp_path)
        for script, options, _ in cases]
    ended = [(process, *process.communicate(timeout=120)) for process in started]
    for (process, out, err), (*_, says) in zip(ended, cases):
        check(process.returncode, out, err, [text.format_map(names) for text in says])
    assert traces(things["root"]) == before and traces(tmp_path) == {}


# ---------- a folder that holds another run ----------

def contents(folder):
    return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


@pytest.fixture
def taken(things, tmp_path):
    """A copy of a finished run, and the words of a command that trains into it."""
    folder = shutil.copytree(things["run"], tmp_path / "taken")
    words = (BASE["train"] + "--eval-every 1000").format_map(things | {"new": tmp_path}).split()
    return folder, [*words, "--out-dir", str(folder)]


@pytest.mark.parametrize("other", ["--seed 1", "--lr 1", "--arch vit_mini", "--loss mae",
                                   "--batch-size 8", "--image-size 64"])
def test_a_folder_of_another_run_keeps_its_bytes(other, taken, capsys):
    folder, words = taken
    before = contents(folder)
    assert call("train", *words, *other.split()) == 2
    assert contents(folder) == before and len(before) == 5
    assert "another run" in capsys.readouterr().err


def test_it_is_overwritten_when_asked_to_and_the_old_weights_stay_beside(taken):
    folder, words = taken
    old = (folder / "checkpoint.pt").read_bytes()
    assert call("train", *words, "--seed", "1", "--resume", "none") == 0
    now = contents(folder)
    assert now.pop("checkpoint.pt") != old and old in now.values()
    assert torch.load(folder / "checkpoint.pt", weights_only=True)["args"]["seed"] == 1


def test_it_goes_on_when_asked_to(taken, capsys):
    folder, words = taken
    path = str(folder / "checkpoint.pt")
    assert call("train", *words, "--lr", "0.001", "--max-steps", "3", "--resume", path) == 0
    assert "resumed" in capsys.readouterr().out
    assert torch.load(path, weights_only=True)["step"] == 3
