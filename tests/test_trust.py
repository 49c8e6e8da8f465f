"""Trust: kills, resumes, signals, full disks, broken files and bad numbers cost a run nothing.

    pytest tests/test_trust.py              # pytest -m slow tests/test_trust.py: a hundred kills
"""
import itertools
import math
import os
import random
import resource
import shutil
import signal
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch.testing import assert_close

import objectives
import train
from conftest import (FORKS, assert_same_run, call, rows_of, run, state_of, tensors,
                      write_textures)

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def base(on_folder):
    """Options of six steps in three epochs, all saved; evaluated at steps 0, 3 and 6."""
    return [*on_folder, "--drop-path", 0.2, "--epochs", 3, "--log-every", 1, "--save-every", 1,
            "--eval-every", 3]


@pytest.fixture(scope="module")
def whole(base, tmp_path_factory):
    """Folder of an undisturbed run."""
    out = tmp_path_factory.mktemp("whole")
    assert run(out, base) == 0
    return out


def each_step(monkeypatch, change):
    """From here on the loss of the 1st, 2nd, .. step (or piece of one) is change(count, loss)."""
    counts, real = itertools.count(1), objectives.System.forward
    def forward(system, *views):
        loss, logs, points = real(system, *views)
        return change(next(counts), loss), logs, points
    monkeypatch.setattr(objectives.System, "forward", forward)


def in_fork(out, options):
    sys.exit(run(out, options))


@pytest.mark.parametrize("kills", [6, pytest.param(100, marks=pytest.mark.slow)])
def test_a_run_killed_at_any_moment_ends_bitwise_as_undisturbed(kills, base, tmp_path):
    options = [*base, "--epochs", 12, "--eval-every", 12]
    start, chance, out = time.monotonic(), random.Random(kills), tmp_path / "run0"
    assert run(tmp_path / "whole", options) == 0
    length = time.monotonic() - start
    for kill in range(kills):
        process = FORKS.Process(target=in_fork, args=(out, options))
        process.start()
        time.sleep(chance.uniform(0, length / 2))
        process.kill()
        process.join()
        assert process.exitcode in (0, -signal.SIGKILL)
        assert all(torch.load(path, weights_only=True)["step"] for path in out.glob("*.pt"))
        if process.exitcode == 0 or kill == kills - 1:
            assert run(out, options) == 0
            assert_same_run(out, tmp_path / "whole")
            out = tmp_path / f"run{kill + 1}"


@pytest.mark.parametrize("options", [
    "dino+rkd --local-crops 1 --grad-accum 2", "ibot", "moco", "beit", "mae", "dbot --stages 3"])
def test_a_run_resumed_in_mid_epoch_ends_bitwise_as_undisturbed(options, base, tmp_path):
    options = [*base, "--loss", *options.split()]
    assert run(tmp_path / "whole", options) == 0
    assert run(tmp_path / "parts", options, "--max-steps", 3) == 0
    assert run(tmp_path / "parts", options) == 0
    assert_same_run(tmp_path / "parts", tmp_path / "whole")


EDITS = dict(cut=lambda log: log + b'{"step": 7, "lo',
             ahead=lambda log: log + b'{"step": 7, "loss": 1}\n',
             unlogged=lambda log: log[:log.rindex(b'{"step"')])  # killed after saving


@pytest.mark.parametrize("edit", EDITS)
def test_a_resume_repairs_the_log(edit, base, whole, tmp_path):
    for stop in (3, 6):
        assert run(tmp_path, base, "--max-steps", stop) == 0
        log = tmp_path / "log.jsonl"
        log.write_bytes(EDITS[edit](log.read_bytes()))
    own_state = f"{tmp_path}/./checkpoint.pt"  # in another spelling
    assert run(tmp_path, base, "--resume", own_state) == 0
    assert_same_run(tmp_path, whole)


def bytes_in(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_starting_over_keeps_the_old_files_and_a_restart_by_torchrun_still_resumes(
        base, whole, tmp_path, monkeypatch):
    assert run(tmp_path, base, "--lr", 0.001, "--max-steps", 1) == 0
    old = bytes_in(tmp_path)
    assert run(tmp_path, base, "--resume", "none", "--max-steps", 3) == 0
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert run(tmp_path, base, "--resume", "none") == 0
    assert_same_run(tmp_path, whole)
    kept = bytes_in(tmp_path)
    assert {name for name in kept if ".old" in name} == {"checkpoint.pt.old", "log.jsonl.old"}
    assert all(kept[f"{name}.old"] == old[name] for name in ("checkpoint.pt", "log.jsonl"))


def test_a_run_from_a_given_state_later_resumes_its_own(base, tmp_path):
    assert run(tmp_path / "old", base, "--max-steps", 2) == 0
    options = [*base, "--resume", tmp_path / "old" / "checkpoint.pt", "--lr", 0.001]
    assert run(tmp_path / "whole", options) == 0
    assert run(tmp_path / "parts", options, "--max-steps", 3) == 0
    assert run(tmp_path / "parts", options) == 0
    assert_same_run(tmp_path / "parts", tmp_path / "whole")


@pytest.mark.parametrize("place, step, number", [
    ("step", 5, signal.SIGINT), ("step", 3, signal.SIGUSR1), ("step", 6, signal.SIGTERM),
    ("step", 2, signal.SIGHUP),
    ("evaluation", 0, signal.SIGTERM), ("evaluation", 3, signal.SIGINT)])
def test_a_signal_saves_and_ends_a_run_that_is_then_resumed_bitwise(
        place, step, number, base, whole, tmp_path):
    options, steps, knn_top1 = [*base, "--save-every", 1000], [], train.knn_top1
    def send(here, result):
        if (here, len(steps)) == (place, step):
            os.kill(os.getpid(), number)
        return result
    signal.signal(number, signal.SIG_DFL)  # nohup, under which these tests may run, ignores SIGHUP
    with pytest.MonkeyPatch.context() as patch:
        each_step(patch, lambda count, loss: send("step", steps.append(count) or loss))
        patch.setattr(train, "knn_top1", lambda *x, **y: send("evaluation", knn_top1(*x, **y)))
        assert run(tmp_path, options) == 128 + number
    assert (state_of(tmp_path)["step"] if step else 0) == len(steps) == step
    assert run(tmp_path, options) == 0
    assert_same_run(tmp_path, whole)


def test_a_full_disk_is_a_warning_keeps_the_old_states_and_later_has_room_again(
        base, whole, tmp_path, monkeypatch, capsys):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    def limit(room):  # no file can grow past it
        resource.setrlimit(resource.RLIMIT_FSIZE, (room, hard))
    assert run(tmp_path, base, "--max-steps", 3) == 0
    before = bytes_in(tmp_path)
    each_step(monkeypatch, lambda count, loss: limit(0 if count < 5 else soft) or loss)
    try:
        assert run(tmp_path, base) == 1
        assert "step 6 is not saved" in capsys.readouterr().err
        assert bytes_in(tmp_path) | {"args.json": before["args.json"]} == before
        assert run(tmp_path, base) == 0  # full in the first of these three steps
    finally:
        limit(soft)
    assert_same_run(tmp_path, whole)


def test_a_folder_that_vanishes_in_the_last_evaluation_is_no_success(
        base, tmp_path, monkeypatch, capsys):
    def top1(*_, **__):
        if (tmp_path / "out" / "previous.pt").exists():
            shutil.rmtree(tmp_path / "out")
        return 0.0
    monkeypatch.setattr(train, "knn_top1", top1)
    assert run(tmp_path / "out", base, "--eval-every", 6) == 1
    assert "step 6 of 6 is NOT saved" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["masks", "curves"])
def test_pictures_cannot_make_a_finished_run_fail(name, base, whole, tmp_path, capsys):
    shutil.copytree(whole, tmp_path / "run")
    def broken(*_):
        raise ModuleNotFoundError("No module named 'matplotlib'")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train.analyze, "masks", lambda *_: None)
        patch.setattr(train.analyze, "curves", lambda *_: None)
        patch.setattr(train.analyze, name, broken)
        assert call(*base, "--out-dir", tmp_path / "run") == 0
    assert "matplotlib" in capsys.readouterr().err


def test_images_that_cannot_be_read_any_more_end_a_run_after_it_was_saved(
        base, whole, tmp_path, monkeypatch, capsys):
    batches = train.train_batches
    def lost(*args, **options):
        yield from itertools.islice(batches(*args, **options), 3)
        raise train.DataError("the disk is gone")
    with monkeypatch.context() as patch:
        patch.setattr(train, "train_batches", lost)
        assert run(tmp_path, base, "--save-every", 99, "--eval-every", 99) == 2
    assert "the disk is gone" in capsys.readouterr().err.splitlines()[-1]
    assert state_of(tmp_path)["step"] == 3
    assert run(tmp_path, base) == 0
    assert_close(tensors(tmp_path), tensors(whole), rtol=0, atol=0)


def test_a_folder_belongs_to_one_run_at_a_time_and_is_free_when_that_is_killed(
        base, whole, tmp_path, capsys):
    process = FORKS.Process(target=in_fork, args=(tmp_path, [*base, "--epochs", 999]))
    process.start()
    while not (tmp_path / "previous.pt").exists():
        time.sleep(0.05)
    assert run(tmp_path, [*base, "--epochs", 999]) == 2
    assert f"--out-dir {tmp_path}" in capsys.readouterr().err
    process.kill()
    process.join()
    assert run(tmp_path, base, "--resume", "none") == 0
    assert_same_run(tmp_path, whole)


def test_a_run_belongs_to_its_images_wherever_they_lie(base, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    places, base = [tmp_path / name / "images" for name in "abc"], base[4:]
    write_textures(places[0], 40, 20)
    shutil.copytree(places[0], places[1])
    shutil.copytree(places[0], places[2])
    moved = next((places[2] / "train" / "class0").iterdir())
    moved.rename(places[2] / "train" / "class1" / moved.name)  # relabelled
    assert run(None, base, "--data-path", places[0], "--max-steps", 2) == 0
    assert run(None, base, "--data-path", places[1], "--max-steps", 4) == 0
    assert "resumed runs/rkd-images/checkpoint.pt at step 2" in capsys.readouterr().out
    assert run(None, base, "--data-path", places[2]) == 2
    assert "other images" in capsys.readouterr().err
    assert state_of(tmp_path / "runs" / "rkd-images")["step"] == 4


def test_a_state_from_before_fingerprints_is_still_resumed(base, tmp_path):
    assert run(tmp_path, base, "--max-steps", 2) == 0
    state = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    del state["args"]["data_fingerprint"]
    torch.save(state, tmp_path / "checkpoint.pt")
    assert run(tmp_path, base, "--max-steps", 4) == 0
    assert state_of(tmp_path)["step"] == 4


def slow_steps(out, options):
    objectives.System.forward = lambda *_: time.sleep(60)
    in_fork(out, options)


def test_a_second_signal_ends_a_process_that_is_stuck(base, tmp_path):
    process = FORKS.Process(target=slow_steps, args=(tmp_path, [*base, "--eval-every", 99]))
    process.start()
    while not (tmp_path / "log.jsonl").exists():
        time.sleep(0.05)
    for _ in range(2):
        time.sleep(1.5)
        os.kill(process.pid, signal.SIGTERM)
    process.join(10)
    assert process.exitcode == 128 + signal.SIGTERM


def test_a_run_in_another_thread_and_with_leftover_variables(base, whole, tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "")
    monkeypatch.setenv("WORLD_SIZE", "3")
    monkeypatch.setattr(sys, "argv", ["train.py", *map(str, base), "--out-dir", str(tmp_path)])
    for name in ("masks", "curves"):
        monkeypatch.setattr(train.analyze, name, lambda *_: None)
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(train.main).result() == 0
    assert_same_run(tmp_path, whole)


@pytest.mark.parametrize("size", [10**5, 0])
def test_a_broken_newest_state_gives_way_to_the_one_before(size, base, whole, tmp_path, capsys):
    assert run(tmp_path, base, "--max-steps", 4) == 0
    os.truncate(tmp_path / "checkpoint.pt", size)
    assert run(tmp_path, base) == 0
    said = capsys.readouterr()
    assert "warning" in said.err and f"resumed {tmp_path}/previous.pt at step 3" in said.out
    assert_same_run(tmp_path, whole)


BAD = dict(nan=lambda loss: loss * math.nan, inf=lambda loss: loss + math.inf,
           gradient=lambda loss: loss + (0 * loss).sqrt())  # its gradient alone is NaN


@pytest.mark.parametrize("kind, pieces", [("nan", 1), ("inf", 1), ("gradient", 1), ("nan", 2)])
def test_a_step_that_is_not_finite_leaves_all_as_it_was_and_is_counted(
        kind, pieces, base, tmp_path, monkeypatch, capsys):
    options = [*base, "--loss", "dino+0.5*rkd", "--grad-accum", pieces]
    assert run(tmp_path, options, "--max-steps", 2) == 0
    before = tensors(tmp_path)
    each_step(monkeypatch, lambda count, loss: BAD[kind](loss) if count == 1 else loss)
    assert run(tmp_path, options, "--max-steps", 3) == 0
    assert "step 3" in capsys.readouterr().err
    assert_close(tensors(tmp_path), before, rtol=0, atol=0)
    assert run(tmp_path, options) == 0
    assert [row.get("skipped_steps", 0) for row in rows_of(tmp_path)] == [0, 0, 0, 1, 1, 1, 1]
    assert all(x.isfinite().all() for x in tensors(tmp_path))


def test_five_such_steps_in_a_row_end_a_run_in_a_line(base, tmp_path, monkeypatch, capsys):
    each_step(monkeypatch, lambda count, loss: loss * (1 if count in (1, 2, 7) else math.nan))
    assert run(tmp_path, base, "--epochs", 10, "--eval-every", 99) == 1
    line = capsys.readouterr().err.splitlines()[-1]
    assert "step 12" in line and "lr" in line
    assert state_of(tmp_path)["step"] == 7
    assert rows_of(tmp_path)[-1]["skipped_steps"] == 8


def test_a_collapse_is_warned_of_once_also_over_a_resume(base, tmp_path, monkeypatch, capsys):
    good = dict(effective_rank=10.0, feature_std=1.0)
    bad = dict(effective_rank=2.0, feature_std=0.05)
    for stop, panel, warnings in ((6, good, 0), (12, bad, 1), (18, bad, 0)):
        monkeypatch.setattr(train, "panel", lambda *_, now=panel: now)
        assert run(tmp_path, base, "--epochs", 12, "--eval-every", 99, "--max-steps", stop) == 0
        said = capsys.readouterr().err
        assert said.count("warning") == warnings
        assert ("rank" in said and "spread" in said) == bool(warnings)
