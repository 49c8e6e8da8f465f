"""Trust: kills, resumes, signals, full disks, broken files and bad numbers cost a run nothing.

    pytest tests/test_trust.py              # pytest -m slow tests/test_trust.py -s: a hundred kills
"""
import json
import math
import os
import random
import signal
import subprocess
import sys
import time
import traceback
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import checkpoint
import model
import objectives
import train
from data import textures

torch.set_num_threads(1)
SIGNALS = signal.SIGTERM, signal.SIGINT, signal.SIGUSR1


# ---------- a process that bears runs and kills them ----------

def bear(options, out):
    """Fork a run of train.py; its parent has one thread and imported all -> its process id."""
    pid = os.fork()
    if pid:
        return pid
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    sys.argv, status = ["train.py", *options, "--out-dir", str(out)], 99
    try:
        status = train.main()
    except SystemExit as stop:
        status = stop.code
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(status)


def end(pid):
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def steps_on_disk(out):
    """Steps of checkpoint.pt and previous.pt, which must load whenever they are there."""
    paths = [out / name for name in ("checkpoint.pt", "previous.pt")]
    return [checkpoint.open_state(path)["step"] if path.exists() else 0 for path in paths]


def nursery_of_kills(root, kills, seed, options):
    """SIGKILL runs at random moments, start them again until they end -> their folders."""
    start, chance, killed, folders, last = time.monotonic(), random.Random(seed), 0, [], None
    assert end(bear(options, root / "whole")) == 0
    length = time.monotonic() - start
    while killed < kills:
        if last is None:
            folders, last = [*folders, root / f"run{len(folders)}"], [0, 0]
        pid = bear(options, folders[-1])
        time.sleep(chance.uniform(0, length / 3))
        os.kill(pid, signal.SIGKILL)
        status, now = end(pid), steps_on_disk(folders[-1])
        assert status in (0, -signal.SIGKILL), status
        assert now[0] >= last[0] and now[1] >= last[1] and now[0] >= now[1], (last, now)
        killed, last = killed + (status != 0), now if status else None
    for out in folders:
        assert end(bear(options, out)) == 0
    return [str(out) for out in folders]


def nursery_of_signals(root, options):
    """Signal runs that have saved once -> [status, seconds to the end, saved step] of each."""
    told = []
    for number in SIGNALS:
        out = root / number.name
        pid = bear(options, out)
        while not (out / "checkpoint.pt").exists():
            time.sleep(0.005)
        time.sleep(0.1)
        start = time.monotonic()
        os.kill(pid, number)
        told.append([end(pid), time.monotonic() - start, steps_on_disk(out)[0]])
    return told


def nursery(*words):
    done = subprocess.run([sys.executable, __file__, *map(str, words)], capture_output=True,
                          env=os.environ | {"OMP_NUM_THREADS": "1"}, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


# ---------- what the tests share ----------

@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """Options of a short run on textures of 32 px: 40 to train by, 20 to measure by; two steps an
    epoch."""
    root = tmp_path_factory.mktemp("images")
    for i, pixels in enumerate(textures(60, 0)[0].images):
        place = root / ("train" if i < 40 else "val") / f"class{i % 5}"
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(place / f"{i:02}.png")
    return ("--data", "folder", "--data-path", root, "--batch-size", 16, "--device", "cpu",
            "--workers", 0, "--log-every", 2, "--drop-path", 0.2)


@pytest.fixture(scope="module")
def short(base):
    """Six steps of three epochs, each of them saved, evaluated at both ends."""
    return *base, "--epochs", 3, "--save-every", 1, "--eval-every", 1000


@pytest.fixture(scope="module")
def whole(short, tmp_path_factory):
    """The folder of an undisturbed run of `short`."""
    out = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train.analyze, "masks", lambda *_: None)
        patch.setattr(train.analyze, "curves", lambda *_: None)
        assert call(*short, out_dir=out) == 0
    return out


@pytest.fixture(autouse=True)
def undrawn(monkeypatch):
    """Pictures take longer than six steps."""
    monkeypatch.setattr(train.analyze, "masks", lambda *_: None)
    monkeypatch.setattr(train.analyze, "curves", lambda *_: None)


def call(*options, out_dir, max_steps=None):
    """train.main() as from the command line -> its status, however it ended."""
    handlers = {name: signal.getsignal(name) for name in SIGNALS}
    options = [*options, "--out-dir", out_dir] + ["--max-steps", max_steps] * bool(max_steps)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["train.py", *map(str, options)])
        try:
            return train.main()
        except SystemExit as stop:
            return stop.code
        finally:
            for name, handler in handlers.items():
                signal.signal(name, handler)


def strict(text):
    """Parsed JSON; NaN and Infinity, which JSON does not have, are errors."""
    def refuse(word):
        raise ValueError(word)
    return json.loads(text, parse_constant=refuse)


def rows_of(out):
    """The log without what a clock said."""
    rows = [strict(line) for line in (Path(out) / "log.jsonl").read_text().splitlines()]
    clock = "images_per_second", "data_seconds"
    return [{name: x for name, x in row.items() if name not in clock} for row in rows]


def state_of(out, name="checkpoint.pt"):
    return torch.load(Path(out) / name, weights_only=True)


def assert_same_state(a, b, kinds=("student", "teacher", "frozen", "objective")):
    """Bitwise: networks, what the terms remember, and the moments of the optimizer."""
    assert a.keys() == b.keys()
    for kind in set(kinds) & b.keys():
        assert a[kind].keys() == b[kind].keys()
        assert [name for name, x in b[kind].items() if not a[kind][name].equal(x)] == []
    a, b = a["optimizer"]["state"], b["optimizer"]["state"]
    assert a.keys() == b.keys() and len(b) > 20
    for index, moments in b.items():
        assert all(a[index][name].equal(x) for name, x in moments.items())


def assert_same_run(out, whole):
    a, b = state_of(out), state_of(whole)
    assert a["step"] == b["step"] and a["skipped"] == b["skipped"]
    assert_same_state(a, b)
    assert rows_of(out) == rows_of(whole)


# ---------- kills ----------

def kill(base, root, kills, seed):
    options = (*base, "--max-steps", 60, "--save-every", 1, "--eval-every", 20)
    folders = nursery("kills", root, kills, seed, *options)
    assert [row["step"] for row in rows_of(root / "whole")] == list(range(61))
    for out in folders:
        assert_same_run(out, root / "whole")
    return len(folders)


def test_a_run_killed_at_any_moment_ends_bitwise_as_if_nothing_had_happened(base, tmp_path):
    kill(base, tmp_path, 7, seed=0)


@pytest.mark.slow
def test_a_hundred_kills_change_nothing(base, tmp_path):
    runs = kill(base, tmp_path, 100, seed=1)
    print(f"\n100 kills survived by {runs} runs, which end bitwise as the unkilled one")


@pytest.mark.parametrize("step", [3, 6])
def test_a_run_killed_between_saving_and_logging_a_step_loses_no_row(
        step, short, whole, tmp_path, monkeypatch):
    class Killed(BaseException):
        pass

    def put(log):
        if log.rows and log.rows[-1]["step"] == step:
            raise Killed
        return real(log)

    real = checkpoint.Log.put
    monkeypatch.setattr(checkpoint.Log, "put", put)
    with pytest.raises(Killed):
        call(*short, out_dir=tmp_path)
    monkeypatch.setattr(checkpoint.Log, "put", real)
    assert state_of(tmp_path)["step"] == step
    assert call(*short, out_dir=tmp_path) == 0
    assert [row["step"] for row in rows_of(tmp_path)] == list(range(7))
    assert_same_run(tmp_path, whole)


# ---------- stopped, and going on ----------

EXTRA = {"dino+0.5*rkd": ("--local-crops", 1, "--grad-accum", 2)}
ELSEWHERE = "dino", "ibot", "dbot"  # in test_train.py


@pytest.mark.parametrize("loss", [
    *(name for name in objectives.OBJECTIVES if name not in ELSEWHERE), "dino+0.5*rkd"])
def test_an_epoch_is_taken_up_in_its_middle(loss, short, tmp_path):
    options = *short, "--loss", loss, *EXTRA.get(loss, ())
    assert call(*options, out_dir=tmp_path / "whole") == 0
    assert call(*options, out_dir=tmp_path / "parts", max_steps=3) == 0
    assert state_of(tmp_path / "parts")["step"] == 3
    assert call(*options, out_dir=tmp_path / "parts") == 0
    a, b = state_of(tmp_path / "parts"), state_of(tmp_path / "whole")
    assert a["step"] == b["step"] == 6
    assert_same_state(a, b)


@pytest.fixture
def two_threads():
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(1)


def test_two_threads_go_on_bitwise_too(two_threads, short, tmp_path, capsys):
    assert call(*short, out_dir=tmp_path / "whole") == 0
    for stop in (3, 6):
        assert call(*short, out_dir=tmp_path / "parts", max_steps=stop) == 0
    assert_same_state(state_of(tmp_path / "parts"), state_of(tmp_path / "whole"))
    assert "it was made with" not in capsys.readouterr().out


def test_a_resume_says_what_makes_it_another_run(short, tmp_path, capsys):
    assert call(*short, out_dir=tmp_path, max_steps=2) == 0
    state = state_of(tmp_path)
    state["made"] |= dict(processes=8, torch="0.1")
    torch.save(state, tmp_path / "checkpoint.pt")
    assert call(*short, out_dir=tmp_path, max_steps=3) == 0
    [line] = [line for line in capsys.readouterr().out.splitlines() if "resumed" in line]
    assert "made with processes 8 (now 1), torch 0.1 (now" in line and "not bitwise" in line
    assert "threads" not in line and "images 40" not in line
    assert call(*short, out_dir=tmp_path, max_steps=4) == 0
    [line] = [line for line in capsys.readouterr().out.splitlines() if "resumed" in line]
    assert line.endswith("at step 3")


def test_a_resume_says_that_the_threads_are_others(short, tmp_path, capsys):
    assert call(*short, out_dir=tmp_path, max_steps=2) == 0
    torch.set_num_threads(2)
    try:
        assert call(*short, out_dir=tmp_path, max_steps=3) == 0
    finally:
        torch.set_num_threads(1)
    assert "threads 1 (now 2)" in capsys.readouterr().out


# ---------- signals ----------

def test_signals_save_the_state_and_end_the_run_soon(base, tmp_path):
    options = (*base, "--max-steps", 100000, "--save-every", 5, "--eval-every", 10**6)
    told = nursery("signals", tmp_path, *options)
    for number, (status, seconds, step) in zip(SIGNALS, told, strict=True):
        assert status == 128 + number and seconds < 5
        out = tmp_path / number.name
        assert step >= 5 and rows_of(out)[-1]["step"] == state_of(out)["step"] == step


@pytest.mark.parametrize("name, count, saved", [
    ("knn_top1", 1, None), ("knn_top1", 3, None),  # of the untrained network and of raw pixels
    ("knn_top1", 5, 3), ("knn_top1", 6, 6),  # at step 3 and 6
    ("clip", 2, 2), ("clip", 3, 3), ("clip", 6, 6)])  # in a step: the third is to be evaluated
def test_a_signal_in_a_step_or_an_evaluation_changes_nothing(
        name, count, saved, base, tmp_path, monkeypatch):
    options = (*base, "--epochs", 3, "--eval-every", 3)
    real, calls = getattr(train, name), []

    def signalled(*args, **more):
        calls.append(args)
        if len(calls) == count:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(*args, **more)

    assert call(*options, out_dir=tmp_path / "whole") == 0
    monkeypatch.setattr(train, name, signalled)
    assert call(*options, out_dir=tmp_path / "parts") == 143 and len(calls) == count
    parts = tmp_path / "parts"
    assert (state_of(parts)["step"] if (parts / "checkpoint.pt").exists() else None) == saved
    assert call(*options, out_dir=parts) == 0
    a, b = rows_of(parts), rows_of(tmp_path / "whole")
    assert [row for row in a if "knn_top1" in row] == [row for row in b if "knn_top1" in row]
    assert [row["step"] for row in a] == [row["step"] for row in b] == [0, 1, 2, 3, 4, 6]
    assert_same_state(state_of(parts), state_of(tmp_path / "whole"))


# ---------- disks, and broken files ----------

def fill_the_disk(monkeypatch, steps):
    """Saving at one of these steps meets a full disk."""
    real = train.save_run

    def save_run(run, *row):
        tmp = Path(run.places[0] + ".tmp")
        if run.step in steps:
            tmp.symlink_to("/dev/full")
        return real(run, *row)

    monkeypatch.setattr(train, "save_run", save_run)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full")
def test_a_full_disk_is_a_warning_and_the_old_state_stays(short, tmp_path, monkeypatch, capsys):
    assert call(*short, out_dir=tmp_path, max_steps=2) == 0
    before = (tmp_path / "checkpoint.pt").read_bytes()
    fill_the_disk(monkeypatch, range(3, 7))
    capsys.readouterr()
    assert call(*short, out_dir=tmp_path) == 0
    warnings = capsys.readouterr().err.splitlines()
    assert len(warnings) == 4 and all("could not save" in line for line in warnings)
    assert (tmp_path / "checkpoint.pt").read_bytes() == before
    assert state_of(tmp_path, "previous.pt")["step"] == 1
    assert not os.path.lexists(tmp_path / "checkpoint.pt.tmp")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full")
def test_saving_works_again_when_the_disk_has_room(short, whole, tmp_path, monkeypatch):
    fill_the_disk(monkeypatch, (3, 4))
    assert call(*short, out_dir=tmp_path) == 0
    assert_same_run(tmp_path, whole)


@pytest.mark.parametrize("room", [5, 1000])
def test_rows_that_the_log_has_no_room_for_are_written_later(
        room, short, whole, tmp_path, monkeypatch, capsys):
    now = [0]

    def full(real):
        def limited(path, *args, **more):
            if str(path).endswith("log.jsonl") and 3 <= now[0] < room:
                raise OSError(28, "No space left on device")
            return real(path, *args, **more)
        return limited

    def save_run(run, *row):
        now[0] = run.step
        return save(run, *row)

    save = train.save_run
    monkeypatch.setattr(train, "save_run", save_run)
    monkeypatch.setattr(checkpoint, "open", full(open), raising=False)
    monkeypatch.setattr(checkpoint, "write_file", full(checkpoint.write_file))
    assert call(*short, out_dir=tmp_path) == 0
    [warning] = capsys.readouterr().err.splitlines()  # not one a row
    assert "log.jsonl" in warning
    if room < 7:
        assert_same_run(tmp_path, whole)
    else:
        assert rows_of(tmp_path) == rows_of(whole)[:3]
        assert_same_state(state_of(tmp_path), state_of(whole))


def flip(content):
    """One bit in the middle, among the weights and moments: torch.load does not see it."""
    place = len(content) // 2
    return content[:place] + bytes([content[place] ^ 64]) + content[place + 1:]


@pytest.mark.parametrize("broken", [lambda x: x[:len(x) // 2], lambda x: b"", lambda x: bytes(9999),
                                    flip], ids=["cut", "empty", "zeros", "flipped bit"])
def test_a_broken_newest_state_costs_a_save_and_no_more(broken, short, whole, tmp_path, capsys):
    assert call(*short, out_dir=tmp_path, max_steps=4) == 0
    path = tmp_path / "checkpoint.pt"
    path.write_bytes(broken(path.read_bytes()))
    capsys.readouterr()
    assert call(*short, out_dir=tmp_path) == 0
    seen = capsys.readouterr()
    assert "took the state before" in seen.err and f"{tmp_path}/previous.pt at step 3" in seen.out
    assert_same_state(state_of(tmp_path), state_of(whole))
    assert [row["step"] for row in rows_of(tmp_path)] == list(range(7))


def test_without_any_whole_state_a_run_ends_and_deletes_nothing(short, tmp_path, capsys):
    assert call(*short, out_dir=tmp_path, max_steps=3) == 0
    for name in ("checkpoint.pt", "previous.pt"):
        (tmp_path / name).write_bytes(b"broken")
    log = (tmp_path / "log.jsonl").read_bytes()
    assert call(*short, out_dir=tmp_path) == 2
    assert "--resume none starts over" in capsys.readouterr().err
    assert (tmp_path / "checkpoint.pt").read_bytes() == b"broken"
    assert (tmp_path / "log.jsonl").read_bytes() == log


def test_a_disk_without_links_keeps_the_state_before_too(short, whole, tmp_path, monkeypatch):
    def link(*_):
        raise OSError(1, "Operation not permitted")

    monkeypatch.setattr(model.os, "link", link)
    assert call(*short, out_dir=tmp_path, max_steps=4) == 0
    assert steps_on_disk(tmp_path) == [4, 3]
    (tmp_path / "checkpoint.pt").unlink()  # killed between the two renames
    assert call(*short, out_dir=tmp_path) == 0
    assert_same_state(state_of(tmp_path), state_of(whole))


@pytest.mark.parametrize("line", [b'{"step": 3, "lo', b'{"step": 2, "loss": 0.1}', b"\xff\x00\n",
                                  b"null\n[1]\n3\n\n", b'{"step": "3"}\n{"loss": 1}\n',
                                  b'{"step": 4, "loss": 1}\n{"step": 5, "loss": 1}\n'])
def test_what_is_no_row_of_the_saved_steps_leaves_the_log(line, short, whole, tmp_path):
    assert call(*short, out_dir=tmp_path, max_steps=3) == 0
    with open(tmp_path / "log.jsonl", "ab") as file:
        file.write(line)
    assert call(*short, out_dir=tmp_path) == 0
    assert [row["step"] for row in rows_of(tmp_path)] == list(range(7))
    assert rows_of(tmp_path)[4:] == rows_of(whole)[4:]


def test_starting_over_twice_keeps_both_runs(short, tmp_path):
    kept = []
    for lr in (0.001, 0.002, 0.003):
        kept += [path.read_bytes() for path in tmp_path.iterdir() if path.name != "args.json"]
        options = *short, "--resume", "none", "--lr", lr
        assert call(*options, out_dir=tmp_path, max_steps=2) == 0
    there = [path.read_bytes() for path in tmp_path.iterdir()]
    assert len(kept) >= 6 and all(content in there for content in kept)
    assert state_of(tmp_path)["args"]["lr"] == 0.003


def test_a_launchers_restart_goes_on_where_the_user_asked_to_start_over(
        short, whole, tmp_path, monkeypatch, capsys):
    assert call(*short, "--resume", "none", out_dir=tmp_path, max_steps=3) == 0
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert call(*short, "--resume", "none", out_dir=tmp_path) == 0
    assert f"resumed {tmp_path}/checkpoint.pt at step 3" in capsys.readouterr().out
    assert not list(tmp_path.glob("*.old*"))
    assert_same_state(state_of(tmp_path), state_of(whole))


def test_a_given_state_does_not_overwrite_another_run(short, tmp_path, capsys):
    for name, lr in (("a", 0.001), ("b", 0.002)):
        assert call(*short, "--lr", lr, out_dir=tmp_path / name, max_steps=2) == 0
    before = {path: path.read_bytes() for path in (tmp_path / "b").iterdir()}
    resume = "--resume", tmp_path / "a" / "checkpoint.pt"
    assert call(*short, "--lr", 0.001, *resume, out_dir=tmp_path / "b") == 2
    assert "another --out-dir" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in (tmp_path / "b").iterdir()} == before


def test_a_run_from_a_given_state_goes_on_from_its_own(short, tmp_path, capsys):
    assert call(*short, out_dir=tmp_path / "old", max_steps=2) == 0
    options = *short, "--resume", tmp_path / "old" / "checkpoint.pt", "--lr", 0.001
    assert call(*options, out_dir=tmp_path / "whole") == 0
    assert call(*options, out_dir=tmp_path / "new", max_steps=4) == 0
    capsys.readouterr()
    assert call(*options, out_dir=tmp_path / "new") == 0
    assert f"resumed {tmp_path}/new/checkpoint.pt at step 4" in capsys.readouterr().out
    assert_same_state(state_of(tmp_path / "new"), state_of(tmp_path / "whole"))
    assert [row["step"] for row in rows_of(tmp_path / "new")][-4:] == [3, 4, 5, 6]


# ---------- numbers ----------

BAD = dict(nan=lambda loss: loss * math.nan, inf=lambda loss: loss + math.inf,
           gradient=lambda loss: loss + (0 * loss).sqrt())  # its gradient alone is NaN


def break_loss(monkeypatch, kind, steps):
    """rkd's loss is not finite at these steps, counted from this call on."""
    count = [0]

    def broken(seen):
        count[0] += 1
        loss, logs = objectives.rkd(seen)
        return (BAD[kind](loss) if count[0] in steps else loss), logs

    monkeypatch.setattr(objectives.OBJECTIVES["rkd"], "loss", broken)


@pytest.mark.parametrize("kind", BAD)
def test_a_step_that_is_not_finite_leaves_all_as_it_was_and_is_counted(
        kind, short, tmp_path, monkeypatch, capsys):
    options = *short, "--loss", "dino+0.5*rkd"
    assert call(*options, out_dir=tmp_path, max_steps=2) == 0
    before = state_of(tmp_path)
    assert before["objective"]["dino"].any() and before["skipped"] == [0, 0]
    break_loss(monkeypatch, kind, [1])
    assert call(*options, out_dir=tmp_path, max_steps=3) == 0
    assert "step 3: the loss or its gradient is not finite: skipped" in capsys.readouterr().err
    after = state_of(tmp_path)
    assert after["step"] == 3 and after["skipped"] == [1, 1]
    assert_same_state(after, before)
    assert call(*options, out_dir=tmp_path) == 0
    assert [row.get("skipped_steps") for row in rows_of(tmp_path)] == [None, 0, 0, 1, 1, 1, 1]
    last = state_of(tmp_path)
    assert last["skipped"] == [1, 0] and all(x.isfinite().all() for x in last["student"].values())
    assert not last["student"]["backbone.pos_embed"].equal(after["student"]["backbone.pos_embed"])


def test_a_piece_that_is_not_finite_takes_its_whole_step_with_it(short, tmp_path, monkeypatch):
    options = *short, "--loss", "dino+0.5*rkd", "--grad-accum", 2
    assert call(*options, out_dir=tmp_path, max_steps=2) == 0
    before = state_of(tmp_path)
    break_loss(monkeypatch, "nan", [1])  # the first of two
    assert call(*options, out_dir=tmp_path, max_steps=3) == 0
    assert state_of(tmp_path)["skipped"] == [1, 1]
    assert_same_state(state_of(tmp_path), before)


@pytest.mark.parametrize("first", [1, 7])
def test_five_such_steps_in_a_row_end_the_run_with_something_to_look_at(
        first, short, tmp_path, monkeypatch, capsys):
    options = *short[:-6], "--epochs", 10, "--save-every", 1, "--eval-every", 1000
    assert call(*options, out_dir=tmp_path, max_steps=first + 1) == 0
    before = (tmp_path / "checkpoint.pt").read_bytes()
    break_loss(monkeypatch, "nan", range(1, 6))
    assert call(*options, out_dir=tmp_path) == 1
    error = capsys.readouterr().err
    assert "not finite" in error and str(tmp_path / "dump.json") in error
    assert (tmp_path / "checkpoint.pt").read_bytes() == before
    dump = strict((tmp_path / "dump.json").read_text())
    assert dump["step"] == first + 6 and len(set(dump["images"])) == 16
    assert dump["lr"] == pytest.approx(train.schedules(first + 5, 20, train.parse([]))[0])
    assert {"backbone.blocks.0", "backbone.blocks.1"} <= set(dump["gradient_norms"])
    assert set(map(str, dump["gradient_norms"].values())) & {"nan", "inf"}
    assert [row["step"] for row in dump["last_rows"]] == list(range(first + 6))
    assert rows_of(tmp_path)[-1]["skipped_steps"] == 4  # and each line is strict JSON


def test_four_such_steps_and_a_good_one_start_the_count_again(short, tmp_path, monkeypatch):
    options = *short[:-6], "--epochs", 6, "--save-every", 1, "--eval-every", 1000
    break_loss(monkeypatch, "inf", [2, 3, 4, 5, 7, 8, 9, 10])
    assert call(*options, out_dir=tmp_path) == 0
    assert state_of(tmp_path)["skipped"] == [8, 0] and not (tmp_path / "dump.json").exists()


# ---------- a collapse ----------

BAD_ROWS = dict(
    rank=dict(effective_rank=2.0), spread=dict(feature_std=0.05), rkd=dict(rkd=0.501))
WORDS = dict(rank="effective rank", spread="spread", rkd="rkd loss stays")


@pytest.mark.parametrize("recovered", [False, True])
@pytest.mark.parametrize("what", BAD_ROWS)
def test_a_collapse_is_said_once_also_over_a_resume(what, recovered, tmp_path, capsys):
    run = SimpleNamespace(args=SimpleNamespace(out_dir=str(tmp_path)), rank=0, step=0, total=40)
    good = dict(effective_rank=10.0, feature_std=1.0, rkd=0.2, collapsed_rkd=0.5)
    log = checkpoint.Log(run)

    def go(count, row):
        for _ in range(count):
            run.step += 1
            log.write(dict(row, step=run.step))

    go(10, good)
    assert "warning" not in capsys.readouterr().err
    go(9, good | BAD_ROWS[what])
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("warning") and WORDS[what] in line
    go(6 * recovered, good)
    log = checkpoint.Log(run)  # as after a resume
    go(6, good | BAD_ROWS[what])
    assert "warning" not in capsys.readouterr().err


if __name__ == "__main__":
    mode, root, *words = sys.argv[1:]
    if mode == "kills":
        print(json.dumps(nursery_of_kills(Path(root), int(words[0]), int(words[1]), words[2:])))
    else:
        print(json.dumps(nursery_of_signals(Path(root), words)))
