"""Many processes: the same run as one, killed and hung workers, a problem of one, signals.

    pytest tests/test_processes.py
    pytest -m slow tests/test_processes.py      # every objective on four, two nodes, Slurm
"""
import contextlib
import gc
import json
import os
import re
import runpy
import signal
import socket
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.testing import assert_close

import analyze
import eval_knn
import eval_linear
from conftest import FORKS, ROOT, assert_same_run, call, state_of, write_textures
from objectives import OBJECTIVES

torch.set_num_threads(1)
TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]
TRAIN = ROOT / "train.py"
STEPS = 20
NORMED = {"simclr", "moco", "byol"}  # BatchNorm raises rounding errors above 1e-4
LOSSES = sorted({*OBJECTIVES} - NORMED)
SUMS = ["dino+cka+ressl+feature", "beit+simmim --mask block --mask-ratio 0.5", "mae", "dbot"]
BY_FOUR = ["ibot+rkd"]  # gathered relations, and a centre moved by all processes
SMALL = ("--prototypes 24 --projection 12 --head-hidden 20 --decoder 64 1 --no-head-batchnorm "
         "--epochs 20 --max-steps 10").split()


# ---------- processes of a test ----------

def run(words, environment, said):
    """In a fork: a Python script as __main__, or any other command."""
    gc.freeze()  # a collection would copy every page of the parent
    os.environ.update(environment)
    os.chdir(ROOT)
    for stream in (1, 2):
        os.dup2(os.open(said, os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)
    if not words[0].endswith(".py"):
        os.execvp(words[0], words)
    analyze.curves = analyze.masks = lambda *_: None  # pictures take longer than the runs
    sys.argv = words
    runpy.run_path(words[0], run_name="__main__")


class Start:
    """Starts processes that write to files of the test's folder."""

    def __init__(self, folder):
        self.folder, self.all = folder, []

    def __call__(self, words, **environment):
        said = self.folder / f"said{len(self.all)}.txt"
        environment |= dict(OMP_NUM_THREADS=1, PYTHONPATH=ROOT,
                            PATH=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
        process = FORKS.Process(target=run, args=(
            [str(x) for x in words], {name: str(x) for name, x in environment.items()}, said))
        process.start()
        process.said = said.read_text
        self.all.append(process)
        return process

    def ranks(self, *commands):
        """One process per command, with the variables of torchrun: rank 0 first."""
        common = dict(MASTER_ADDR="localhost", MASTER_PORT=free_port(), WORLD_SIZE=len(commands))
        return [self(words, RANK=rank, LOCAL_RANK=rank, **common)
                for rank, words in enumerate(commands)]


@pytest.fixture
def start(tmp_path):
    starter = Start(tmp_path)
    yield starter
    for process in starter.all:
        process.terminate()  # torchrun ends its workers too
        process.join(10)
        process.kill()


def free_port():
    with socket.socket() as sock:
        sock.bind(("localhost", 0))
        return sock.getsockname()[1]


def status(process, seconds):
    """Exit status, within so many seconds."""
    process.join(seconds)
    assert process.exitcode is not None, f"still there after {seconds} s: {process.said()[-2000:]}"
    return process.exitcode


def worker(out, rank):
    """Process id of a worker of torchrun by the --out-dir and the rank."""
    for place in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            words, names = ((place / name).read_bytes().split(b"\0")
                            for name in ("cmdline", "environ"))
            if str(out).encode() in words and f"RANK={rank}".encode() in names:
                return int(place.name)


def wait_for_second_save(out, seconds=60):
    end = time.monotonic() + seconds
    while not (out / "previous.pt").exists():
        assert time.monotonic() < end, "no second checkpoint"
        time.sleep(0.02)


# ---------- the runs of the tests ----------

@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = write_textures(tmp_path_factory.mktemp("images"), 40, 0)
    return ["--data", "folder", "--data-path", folder, "--batch-size", 16, "--device", "cpu",
            "--workers", 0, "--save-every", 1]


@pytest.fixture(scope="module")
def undisturbed(base, tmp_path_factory):
    """Folder of a whole run of two processes."""
    place = tmp_path_factory.mktemp("undisturbed")
    words = [TRAIN, *base, "--max-steps", STEPS, "--out-dir", place / "run"]
    for process in Start(place).ranks(words, words):
        assert status(process, 60) == 0, process.said()[-2000:]
    return place / "run"


# ---------- one process = two = four ----------

@pytest.mark.parametrize("world, losses", [
    (2, SUMS), (4, BY_FOUR),
    pytest.param(4, LOSSES, marks=pytest.mark.slow)], ids=["2", "4", "4-all"])
def test_many_processes_end_where_one_does(world, losses, base, start, tmp_path):
    for loss in losses:
        for count in (1, world):
            words = [TRAIN, *base, *SMALL, "--loss", *loss.split(),
                     "--out-dir", tmp_path / f"{loss}{count}"]
            for process in start.ranks(*[words] * count):
                assert status(process, 60) == 0, process.said()[-2000:]
        one, many = (state_of(tmp_path / f"{loss}{count}")["student"] for count in (1, world))
        assert_close(many, one, rtol=0, atol=1e-4, msg=lambda text: f"{loss}: {text}")


# ---------- a worker killed, a peer hung or dead ----------

NODES = ["--nnodes=2", "--nproc_per_node=1", "--rdzv_backend=c10d", "--rdzv_id=here"]


@pytest.mark.parametrize("agents", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_torchrun_brings_back_a_killed_worker_and_the_run_ends_bitwise_as_undisturbed(
        agents, base, undisturbed, start, tmp_path):
    out, nodes = tmp_path / "run", ["--standalone", "--nproc_per_node=2"]
    if agents == 2:
        nodes = [*NODES, f"--rdzv_endpoint=localhost:{free_port()}"]
    words = [*TORCHRUN, *nodes, "--max-restarts=3",
             TRAIN, *base, "--max-steps", STEPS, "--out-dir", out]
    jobs = [start(words) for _ in range(agents)]
    wait_for_second_save(out)
    os.kill(worker(out, 1), signal.SIGKILL)
    assert [status(job, 120) for job in jobs] == [0] * agents, jobs[0].said()[-3000:]
    steps = re.findall(r"resumed \S+ at step (\d+)", "".join(job.said() for job in jobs))
    assert 2 <= int(steps[0]) < STEPS
    assert_same_run(out, undisturbed)


def pair(start, base, out, *more):
    """Two processes of a run that would last for hours, past its second save."""
    both = start.ranks(*[[TRAIN, *base, "--max-steps", 10**6, "--out-dir", out, *more]] * 2)
    wait_for_second_save(out)
    return both


@pytest.mark.parametrize("rank, number", [(1, signal.SIGSTOP), (0, signal.SIGKILL)])
def test_a_hung_or_dead_peer_ends_the_job_within_the_timeout(rank, number, base, start, tmp_path):
    both = pair(start, base, tmp_path / "run", "--timeout", 5)
    os.kill(both[rank].pid, number)
    assert status(both[1 - rank], 5 + 20) != 0
    both[rank].kill()


@pytest.mark.parametrize("rank", [1, 0])
def test_a_problem_of_one_process_ends_all_and_its_text_is_said(rank, base, start, tmp_path):
    common = [TRAIN, *base, "--max-steps", 5, "--out-dir", tmp_path / "run", "--timeout", 5]
    wrong = [*common, "--data-path", "/no/such"]
    both = start.ranks(*[common, wrong][::1 if rank else -1])
    assert 0 not in [status(process, 40) for process in both]
    assert "/no/such" in both[0].said() + both[1].said()
    assert not (tmp_path / "run" / "checkpoint.pt").exists()


def test_images_that_cannot_be_read_count_over_all_processes(start, tmp_path):
    files = sorted(write_textures(tmp_path / "set", 600, 0).rglob("*.png"))
    Image.new("RGB", (40, 40)).save(files[0])  # sets of several sizes stay on disk
    looked_at = np.linspace(0, 599, 256).astype(int)  # by `in_memory`, before the run
    for i in np.setdiff1d(np.arange(600), looked_at)[:90]:  # each process meets less than a tenth
        files[i].write_text("words")
    words = [TRAIN, "--data-path", tmp_path / "set", "--batch-size", 40, "--max-steps", 15,
             "--device", "cpu", "--workers", 0, "--out-dir", tmp_path / "run"]
    both = start.ranks(words, words)
    assert [status(process, 60) for process in both] == [2, 2]
    assert all("of 600 images cannot be read, more than 10 %" in process.said() for process in both)
    assert state_of(tmp_path / "run")["step"] > 0


# ---------- evaluation ----------

@pytest.mark.parametrize("script, sizes, more", [
    (eval_knn, (41, 2), []),  # the third process has no test image
    (eval_linear, (29, 60), ["--augment", "--batch-size", 4, "--epochs", 3])])
def test_three_processes_measure_what_one_does(
        script, sizes, more, undisturbed, start, tmp_path, capsys):
    words = ["--checkpoint", undisturbed / "checkpoint.pt", "--device", "cpu", "--workers", 0,
             "--data-path", write_textures(tmp_path / "set", *sizes), *more]
    three = start.ranks(*[[script.__file__, *words]] * 3)
    assert [status(process, 60) for process in three] == [0, 0, 0], three[0].said()[-2000:]
    call(*words, main=script.main)
    one, many = (json.loads(text.splitlines()[-1])
                 for text in (capsys.readouterr().out, three[0].said()))
    assert many.keys() == one.keys() and many == pytest.approx(one, abs=0.01)


# ---------- signals ----------

@pytest.mark.slow
def test_the_slurm_lines_stop_after_usr1_to_one_and_come_back_exactly(
        base, undisturbed, start, tmp_path):
    line = re.search(r"^srun .*bash -c '(.*?exec python train.py) ",
                     (ROOT / "README.md").read_text(), re.M)[1]
    options = *base, "--max-steps", STEPS, "--out-dir", tmp_path / "run"
    words = ["bash", "-c", " ".join(map(str, [line, *options]))]
    for restarts, ends in enumerate((138, 0)):
        common = dict(MASTER_ADDR="localhost", MASTER_PORT=free_port(), WORLD_SIZE=2,
                      SLURM_RESTART_COUNT=restarts)
        both = [start(words, SLURM_PROCID=rank, SLURM_LOCALID=rank, **common) for rank in (0, 1)]
        if ends:
            wait_for_second_save(tmp_path / "run")
            os.kill(both[1].pid, signal.SIGUSR1)
        assert [status(process, 60) for process in both] == [ends, ends]
    assert "stopped at step" in start.all[0].said() and "resumed" in both[0].said()
    assert_same_run(tmp_path / "run", undisturbed)
