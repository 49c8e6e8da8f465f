"""Many processes: the same run as one, killed, stuck, unequal, signalled, and what they download.

    pytest tests/test_processes.py
    pytest -m slow tests/test_processes.py      # all losses on two and four, two nodes
"""
import builtins
import contextlib
import hashlib
import json
import os
import pickle
import re
import shutil
import signal
import socket
import subprocess
import sys
import tarfile
import threading
import time
from functools import cache, partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
import torchvision
from PIL import Image
from torch.testing import assert_close
from torchvision.datasets import cifar, imagenette

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # torchrun starts this file too: see the end

import data
import eval_knn
import eval_linear
import train
from conftest import write_textures
from launch import leave_by
from model import ARCHS, VisionTransformer
from objectives import OBJECTIVES

torch.set_num_threads(1)
ARCHS["vit_nano"] = partial(VisionTransformer, embed_dim=16, depth=2, num_heads=2)
NORMED = {"simclr", "moco", "byol"}  # BatchNorm within a process
LOSSES = [name for name in OBJECTIVES if name not in NORMED]
FEW = ["rkd", "ressl", "ibot", "mae"]
TINY = ("--data folder --batch-size 16 --device cpu --workers 0 --log-every 2 --arch vit_nano "
        "--eval-every 1000 --prototypes 24 --projection 12 --head-hidden 20 --decoder 64 1").split()
ENVIRONMENT = {name: x for name, x in os.environ.items()
               if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")} | {
    "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT),
    "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]
TRAIN = [sys.executable, ROOT / "train.py"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_textures(tmp_path_factory.mktemp("images"), 40, 20)


@pytest.fixture(scope="module")
def base(folder):
    return ["--data", "folder", "--data-path", folder, "--batch-size", 16, "--device", "cpu",
            "--workers", 0, "--log-every", 2, "--eval-every", 1000, "--save-every", 1]


def state_of(out):
    return torch.load(out / "checkpoint.pt", weights_only=True)


def assert_same_run(a, b):
    """Bitwise: weights of student and teacher, moments, step."""
    a, b = state_of(a), state_of(b)
    assert a["step"] == b["step"]
    for kind in ("student", "teacher"):
        assert_close(a[kind], b[kind], rtol=0, atol=0)
    assert_close(a["optimizer"]["state"], b["optimizer"]["state"], rtol=0, atol=0)


def free_port():
    with socket.socket() as sock:
        sock.bind(("localhost", 0))
        return sock.getsockname()[1]


def until(found, seconds=60):
    end = time.monotonic() + seconds
    while not found():
        assert time.monotonic() < end, "it never came"
        time.sleep(0.05)


def saved(out):
    """Wait for the second state: the run is in its midst."""
    until(lambda: (out / "previous.pt").exists())


class Started:
    """Processes of this test: what they say goes to files; all are gone at its end."""

    def __init__(self, place):
        self.place, self.all = place, []

    def __call__(self, words, **environment):
        path = self.place / f"said{len(self.all)}.txt"
        with open(path, "w") as file:
            process = subprocess.Popen([str(x) for x in words], stdout=file, stderr=file, cwd=ROOT,
                                       env=ENVIRONMENT | {k: str(v) for k, v in
                                                          environment.items()})
        process.said = path.read_text
        self.all.append(process)
        return process

    def ranks(self, *commands):
        """One process a command, as Slurm would start them: rank 0 first."""
        common = dict(MASTER_ADDR="localhost", MASTER_PORT=free_port(), WORLD_SIZE=len(commands))
        return [self(words, RANK=rank, LOCAL_RANK=rank, **common)
                for rank, words in enumerate(commands)]


@pytest.fixture
def start(tmp_path):
    started = Started(tmp_path)
    yield started
    for process in started.all:
        for pid in [process.pid, *workers(process.pid)] if process.poll() is None else []:
            with contextlib.suppress(OSError):
                os.kill(pid, signal.SIGKILL)
        process.wait()


def workers(parent):
    """Pids of the children of a process."""
    found = []
    for place in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if int((place / "stat").read_text().rsplit(")", 1)[1].split()[1]) == parent:
                found.append(int(place.name))
    return found


def worker(out, rank):
    """Pid of this rank of the run in `out`, whoever started it."""
    found = []
    for place in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            words = (place / "cmdline").read_bytes().split(b"\0")
            if (f"RANK={rank}".encode() in (place / "environ").read_bytes().split(b"\0")
                    and str(out).encode() in words):
                found.append(int(place.name))
    assert len(found) == 1
    return found[0]


def ends(process, seconds):
    """Exit status, within so many seconds."""
    try:
        return process.wait(seconds)
    except subprocess.TimeoutExpired:
        pytest.fail(f"still there after {seconds} s: {process.said()[-2000:]}")


# ---------- one process = two = four ----------

def of_all_losses(world, folder, out, losses):
    """{loss: weights of the student after ten steps} by so many processes."""
    launcher = TORCHRUN + ["--standalone", f"--nproc_per_node={world}"]
    words = [*(launcher if world > 1 else [sys.executable]), __file__, folder, out, *losses]
    done = subprocess.run(list(map(str, words)), env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return {loss: state_of(out / loss)["student"] for loss in losses}


@pytest.fixture(scope="module")
def by_one(folder, tmp_path_factory):
    return of_all_losses(1, folder, tmp_path_factory.mktemp("one"), LOSSES)


def test_all_objectives_without_batch_normalisation_are_here():
    assert {*LOSSES} | NORMED == {*OBJECTIVES} and len(LOSSES) >= 10


@pytest.mark.parametrize("world, losses", [
    (4, FEW), pytest.param(2, LOSSES, marks=pytest.mark.slow),
    pytest.param(4, LOSSES, marks=pytest.mark.slow)], ids=["4-few", "2-all", "4-all"])
def test_many_processes_end_where_one_does(world, losses, folder, by_one, tmp_path):
    for loss, weights in of_all_losses(world, folder, tmp_path, losses).items():
        for name, x in weights.items():
            assert_close(x, by_one[loss][name], rtol=0, atol=1e-4,
                         msg=lambda text: f"{loss}, {name}: {text}")


# ---------- torchrun brings back what was killed ----------

STEPS = 40


@pytest.fixture(scope="module")
def undisturbed(base, tmp_path_factory):
    """Folder of a whole run of two processes."""
    out = tmp_path_factory.mktemp("undisturbed")
    words = [*TORCHRUN, "--standalone", "--nproc_per_node=2", ROOT / "train.py", *base,
             "--max-steps", STEPS, "--out-dir", out]
    done = subprocess.run(list(map(str, words)), env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return out


def test_torchrun_brings_back_a_killed_worker_and_the_run_ends_bitwise_as_undisturbed(
        base, undisturbed, start, tmp_path):
    out = tmp_path / "run"
    job = start([*TORCHRUN, "--standalone", "--nproc_per_node=2", "--max-restarts=3",
                 ROOT / "train.py", *base, "--max-steps", STEPS, "--out-dir", out])
    saved(out)
    os.kill(worker(out, 1), signal.SIGKILL)
    assert ends(job, 120) == 0, job.said()[-3000:]
    at = re.search(r"resumed \S+ at step (\d+)", job.said())
    assert 2 <= int(at[1]) < STEPS
    assert_same_run(out, undisturbed)


@pytest.mark.slow
def test_two_nodes_come_back_when_a_worker_of_one_is_killed(base, undisturbed, start, tmp_path):
    out, port = tmp_path / "run", free_port()
    agents = [start([*TORCHRUN, "--nnodes=2", "--nproc_per_node=1", "--max-restarts=3",
                     "--rdzv_backend=c10d", f"--rdzv_endpoint=localhost:{port}", "--rdzv_id=here",
                     ROOT / "train.py", *base, "--max-steps", STEPS, "--out-dir", out])
              for _ in range(2)]
    saved(out)
    os.kill(worker(out, 1), signal.SIGKILL)
    assert [ends(agent, 180) for agent in agents] == [0, 0]
    assert any("resumed" in agent.said() for agent in agents)
    assert_same_run(out, undisturbed)


# ---------- a peer that is stuck, or dead ----------

def pair(start, base, out, *more, second=TRAIN):
    """Two processes of a run that would last for hours, in its midst."""
    words = [*base, "--max-steps", 10**6, "--out-dir", out, *more]
    both = start.ranks([*TRAIN, *words], [*second, *words])
    saved(out)
    return both


@pytest.mark.parametrize("rank", [1, 0])
def test_a_stopped_peer_ends_the_other_which_names_it(rank, base, start, tmp_path):
    both = pair(start, base, tmp_path / "run", "--timeout", 5)
    both[rank].send_signal(signal.SIGSTOP)
    assert ends(both[1 - rank], 20) not in (0, None)
    said = both[1 - rank].said()
    assert f"process {rank} " in said and f"process {1 - rank} (" not in said
    if rank:  # the store of pids is in rank 0, unless torchrun keeps it
        assert f"pid {both[rank].pid}" in said


@pytest.mark.slow
def test_a_peer_that_hangs_in_its_main_thread_is_named_and_all_end(base, start, tmp_path):
    hangs = ("import sys, time, train; real = train.draw_masks; train.draw_masks = lambda run, "
             "step, *x: time.sleep(1000) if step == 3 else real(run, step, *x); "
             "train.leave_by(train.main)")
    both = pair(start, base, tmp_path / "run", "--timeout", 5,
                second=[sys.executable, "-c", hangs])
    statuses = [ends(process, 20) for process in both]
    said = both[0].said() + both[1].said()
    assert 0 not in statuses and "nothing has moved for 5 s" in said
    assert f"process 1 (pid {both[1].pid} on" in said and "process 0 (pid" not in said


@pytest.mark.parametrize("rank", [1, 0])
def test_a_peer_that_dies_ends_the_other_within_seconds_which_names_it(rank, base, start, tmp_path):
    both = pair(start, base, tmp_path / "run")
    both[rank].kill()
    assert ends(both[1 - rank], 15) == 1
    said = both[1 - rank].said()
    assert f"process {1 - rank} leaves at step" in said and f"process {rank} " in said
    assert "the same command goes on" in said and "Traceback" not in said


# ---------- a problem of one alone ----------

def assert_both_end_with_status_2(both, *words):
    assert [ends(process, 60) for process in both] == [2, 2]
    said = both[0].said() + both[1].said()
    lines = [line for line in said.splitlines() if "error:" in line]
    assert len(lines) == 1 and all(word in lines[0] for word in words)


@pytest.mark.parametrize("options, words", [
    (["--lr", "fast"], "argument --lr: invalid number value: 'fast'"),  # before anything is set up
    (["--device", "mps"], "--device mps: there is none here"),
    (["--data-path", "/no/such"], "--data-path '/no/such'")], ids=lambda x: str(x[0]))
@pytest.mark.parametrize("rank", [1, 0])
def test_a_problem_of_one_process_ends_both_and_is_named(
        rank, options, words, base, start, tmp_path):
    common = [*TRAIN, *base, "--max-steps", 5, "--out-dir", tmp_path / "run"]
    both = [common, common]
    both[rank] = common + options
    assert_both_end_with_status_2(start.ranks(*both), *["process 1: "] * rank, words)
    assert not (tmp_path / "run").exists()


def test_another_state_in_the_folder_of_one_ends_both(base, undisturbed, start, tmp_path):
    shutil.copytree(undisturbed, tmp_path / "run")
    common = [*TRAIN, *base, "--max-steps", STEPS, "--out-dir"]
    both = start.ranks(common + [undisturbed], common + [tmp_path / "fresh"])
    assert_both_end_with_status_2(both, "process 1 found", f"'step': {STEPS}", "'step': 0")
    assert_same_run(undisturbed, tmp_path / "run")


# ---------- evaluation: unequal shares ----------

@pytest.fixture(scope="module")
def checkpoint(base, tmp_path_factory):
    out = tmp_path_factory.mktemp("trained")
    words = [*TRAIN, *base, "--max-steps", 2, "--out-dir", out]
    subprocess.run(list(map(str, words)), env=ENVIRONMENT, check=True, capture_output=True)
    return out / "checkpoint.pt"


def measured(script, words, capsys):
    """The JSON of an evaluation in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["eval", *map(str, words)])
        script.main()
    return json.loads(capsys.readouterr().out.splitlines()[-1])


@pytest.mark.parametrize("script, sizes, more", [
    (eval_knn, (41, 2), []),  # the third process has no test image
    (eval_linear, (31, 4), ["--augment", "--batch-size", 2, "--epochs", 3]),
    (eval_linear, (29, 7), ["--augment", "--batch-size", 4, "--epochs", 3])])  # 26 of 29: 4 .. 4, 2
def test_three_processes_measure_what_one_does_even_where_only_one_sees_the_cache(
        script, sizes, more, checkpoint, start, tmp_path, capsys):
    caches = [tmp_path / f"cache{rank}" for rank in range(3)]
    words = ["--checkpoint", checkpoint, "--device", "cpu", "--data-path",
             write_textures(tmp_path / "set", *sizes), "--workers", 0, *more, "--cache"]
    one = measured(script, words + [caches[0]], capsys)  # fills the cache of rank 0
    assert len(list(caches[0].iterdir())) == 1
    three = start.ranks(*([sys.executable, script.__file__, *words, cache] for cache in caches))
    assert [ends(process, 60) for process in three] == [0, 0, 0], three[0].said()[-2000:]
    many = json.loads(three[0].said().splitlines()[-1])
    assert many.keys() == one.keys() and many == pytest.approx(one, abs=0.01)


# ---------- signals ----------

@pytest.mark.slow
def test_after_sigterm_to_both_both_save_and_end_with_143(base, start, tmp_path):
    both = pair(start, base, tmp_path / "run", "--save-every", 1)
    for process in both:
        process.send_signal(signal.SIGTERM)
    assert [ends(process, 30) for process in both] == [143, 143]
    step = re.search(r"stopped at step (\d+)", both[0].said())
    assert state_of(tmp_path / "run")["step"] == int(step[1])


@pytest.mark.slow
def test_the_lines_for_slurm_start_two_stop_after_usr1_to_one_and_come_back_exactly(
        base, undisturbed, start, tmp_path):
    line = re.search(r"^srun (bash -c '.*?exec python train.py) [^']*'", (
        ROOT / "README.md").read_text(), re.M)[1].split("'")[1]
    options = " ".join(map(str, [*base, "--max-steps", STEPS, "--out-dir", tmp_path / "run"]))
    for status in (138, 0):
        common = dict(MASTER_ADDR="localhost", MASTER_PORT=free_port(), WORLD_SIZE=2,
                      SLURM_RESTART_COUNT=int(status == 0))
        both = [start(["bash", "-c", f"{line} {options}"], SLURM_PROCID=rank, SLURM_LOCALID=rank,
                      **common) for rank in range(2)]
        if status:
            saved(tmp_path / "run")
            both[1].send_signal(signal.SIGUSR1)
        assert [ends(process, 60) for process in both] == [status, status]
    assert 2 <= state_of(tmp_path / "run")["step"] == STEPS
    assert "stopped at step" in start.all[0].said() and "resumed" in start.all[2].said()
    assert_same_run(tmp_path / "run", undisturbed)


# ---------- downloads ----------

def md5(path):
    return hashlib.md5(path.read_bytes()).hexdigest()


@pytest.fixture
def away(tmp_path):
    """Folder and address of a server of this machine: torchvision's code reads no file:// URL."""
    class Silent(SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass
    (tmp_path / "away").mkdir()
    server = ThreadingHTTPServer(("localhost", 0), partial(Silent, directory=tmp_path / "away"))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield tmp_path / "away", f"http://localhost:{server.server_port}"
    server.shutdown()
    server.server_close()


def packed(place, archive, address):
    with tarfile.open(archive, "w:gz") as file:
        file.add(place, place.name)
    return f"{address}/{archive.name}", md5(archive)


def counted(monkeypatch, module):
    """Downloads, real ones that take a moment, as they come."""
    count, real = [], module.download_and_extract_archive

    def download(url, *args, **options):
        count.append(url)
        time.sleep(0.3)
        return real(url, *args, **options)
    monkeypatch.setattr(module, "download_and_extract_archive", download)
    return count


@pytest.fixture
def cifar10(away, monkeypatch):
    """A CIFAR-10 of four images, that torchvision's own code fetches -> the list of downloads."""
    place, kind = away[0] / "cifar-10-batches-py", torchvision.datasets.CIFAR10
    place.mkdir(parents=True)
    batch = dict(data=torch.arange(2 * 3072).remainder(251).byte().view(2, -1).numpy(),
                 labels=[0, 1])
    files = dict(train_list=batch, test_list=batch, meta=dict(label_names=["a", "b"]))
    for name, content in files.items():
        (place / name).write_bytes(pickle.dumps(content))
    for name in ("train_list", "test_list"):
        monkeypatch.setattr(kind, name, [[name, md5(place / name)]])
    monkeypatch.setattr(kind, "meta", dict(filename="meta", key="label_names",
                                           md5=md5(place / "meta")))
    url, right = packed(place, away[0] / kind.filename, away[1])
    monkeypatch.setattr(kind, "url", url)
    monkeypatch.setattr(kind, "tgz_md5", right)
    return counted(monkeypatch, cifar)


@pytest.fixture
def nette(away, monkeypatch):
    """An Imagenette of twenty images, the same way; they pass for as many as there should be."""
    kind = torchvision.datasets.Imagenette
    place = away[0] / "imagenette2-160"
    for part in ("train", "val"):
        for wnid in kind._WNID_TO_CLASS:
            (place / part / wnid).mkdir(parents=True)
            Image.new("RGB", (8, 8)).save(place / part / wnid / "0.JPEG", "JPEG")
    monkeypatch.setattr(kind, "_ARCHIVES", {
        "160px": packed(place, away[0] / "imagenette2-160.tgz", away[1])})
    real, many = data.scan, {"train": 9469, "val": 3925}

    def scan(root):
        files, names = real(root)
        assert len(files) == 10
        copies = many[os.path.basename(root)]
        return (files * copies)[:copies], (names * copies)[:copies]
    monkeypatch.setattr(data, "scan", scan)
    monkeypatch.setattr(data, "in_memory", lambda folder: folder)
    return counted(monkeypatch, imagenette)


SETS = dict(cifar10="cifar10", imagenette="nette")


@pytest.fixture(params=SETS)
def remote(request):
    """(name, downloads, lengths of train and test) of either set."""
    downloads = request.getfixturevalue(SETS[request.param])
    return request.param, downloads, [2, 2] if request.param == "cifar10" else [9469, 3925]


def lengths(name, root):
    return [len(part) for part in data.load_data(name, str(root))]


def test_two_that_start_together_download_once(remote, tmp_path):
    name, downloads, sizes = remote
    found = []
    both = [threading.Thread(target=lambda: found.append(lengths(name, tmp_path / "here")))
            for _ in range(2)]  # flock is of the open file: threads exclude each other as well
    for thread in both:
        thread.start()
    for thread in both:
        thread.join(60)
    assert found == [sizes, sizes] and len(downloads) == 1


def test_half_an_archive_or_half_a_set_does_not_count(remote, tmp_path):
    name, downloads, sizes = remote
    root, archive = tmp_path / "here", next((tmp_path / "away").glob("*gz"))
    place = root / ("imagenette.part" if name == "imagenette" else "")
    place.mkdir(parents=True)
    (place / archive.name).write_bytes(archive.read_bytes()[:archive.stat().st_size // 2])
    (place / "imagenette2-160" / "train").mkdir(parents=True)  # unpacking was cut short
    assert lengths(name, root) == sizes and len(downloads) == 1
    if name == "cifar10":
        (root / "cifar-10-batches-py" / "test_list").write_bytes(b"half")
        assert lengths(name, root) == sizes


def test_an_archive_with_another_md5_is_an_error_of_one_line_with_status_2(
        remote, tmp_path, monkeypatch, capsys):
    name, downloads, _ = remote
    kind = torchvision.datasets.CIFAR10
    monkeypatch.setattr(kind, "tgz_md5", "0" * 32)
    archives = torchvision.datasets.Imagenette._ARCHIVES
    monkeypatch.setitem(archives, "160px", (archives["160px"][0], "0" * 32))
    monkeypatch.setattr(sys, "argv", ["train.py", "--data", name, "--data-path",
                                      str(tmp_path / "here"), "--device", "cpu", "--out-dir",
                                      str(tmp_path / "run")])
    with pytest.raises(SystemExit) as end:
        train.main()
    lines = [line for line in capsys.readouterr().err.splitlines() if "error:" in line]
    assert end.value.code == 2 and len(downloads) == 1
    assert len(lines) == 1 and f"--data {name}" in lines[0] and "corrupted" in lines[0]
    assert not (tmp_path / "run").exists()


def test_a_complete_folder_that_cannot_be_written_is_read(remote, tmp_path, monkeypatch):
    name, downloads, sizes = remote
    root = tmp_path / "here"
    assert lengths(name, root) == sizes
    real = builtins.open

    def refuse(*args, **options):
        raise PermissionError("read-only")
    for call in ("makedirs", "mkdir", "replace"):
        monkeypatch.setattr(os, call, refuse)
    monkeypatch.setattr(builtins, "open", lambda file, mode="r", *args, **options: (
        refuse if set(mode) & set("wax+") else real)(file, mode, *args, **options))
    assert lengths(name, root) == sizes and len(downloads) == 1


def main():
    """One of the processes: ten steps of every loss."""
    folder, out, *losses = sys.argv[1:]
    train.analyze.curves = train.analyze.masks = lambda *_: None
    leave, train.dist.destroy_process_group = train.dist.destroy_process_group, lambda: None
    train.join_processes = cache(train.join_processes)  # once, for all the runs
    for loss in losses:
        plain = ["--no-head-batchnorm"] if loss in ("dino", "ibot") else []
        train.train(train.prepare(train.parse([
            *TINY, "--loss", loss, "--data-path", folder, "--out-dir", f"{out}/{loss}",
            "--epochs", "20", "--max-steps", "10", "--drop-path", "0", *plain])))
    if "RANK" in os.environ:
        leave()


if __name__ == "__main__":
    leave_by(main)
