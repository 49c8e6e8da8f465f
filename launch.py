"""How a script starts and how it ends: its options, its processes, and who watches them.

One process or many is the same program. Started by torchrun, Slurm or by hand (RANK, WORLD_SIZE,
LOCAL_RANK, MASTER_ADDR, MASTER_PORT), they

    meet          wait for each other at a common store; a wrong option of one ends all
    join          make the group whose collectives training uses (nccl on GPUs, else gloo)
    agree         on what each found alone (`first_problem`) and on when to stop (`largest`)
    are watched   who dies or stands still is named, and the others end (`Watch`)
    leave         at once, by `leave_by`

A group alone is not enough: its collectives wait half an hour for a dead peer, know nothing of
whose fault it was, and its threads can abort a process that ends as it should.

Left out: any change of the number of processes within a run; start again with --resume auto.
"""
import argparse
import contextlib
import json
import math
import multiprocessing
import os
import socket
import sys
import threading
import time
import traceback
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from weights import one_line



# ---- options -------------------------------------------------------------------------------------

class Parser(argparse.ArgumentParser):
    """argparse whose errors are one line of the first process, and status 2 for all."""

    def __init__(self, doc):
        super().__init__(description=doc, formatter_class=HelpFormatter)

    def error(self, message):
        if os.environ.get("RANK") and not Meeting.over:
            with contextlib.suppress(Exception):  # nobody else is there: say it here
                message = Meeting(timedelta(seconds=600)).hear(message)
        if int(os.environ.get("RANK", 0)) == 0:
            print(f"{self.prog}: error: {one_line(message)}", file=sys.stderr)
        sys.exit(2)


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """The header of the file as it is written, and each default behind its help."""


def whole(least, most):
    """An argparse type: a whole number in least .. most."""
    def whole(text):
        value = int(text)
        if not least <= value <= most:
            raise argparse.ArgumentTypeError(f"{value} must lie in {least} .. {most}")
        return value
    return whole


natural, positive = whole(0, 2**32 - 1), whole(1, 2**32 - 1)


def number(low, high=math.inf):
    """An argparse type: a finite float in [low, high]."""
    def number(text):
        value = float(text)
        if not low <= value <= high or value == math.inf:
            raise argparse.ArgumentTypeError(f"{text} must lie in {low} .. {high}")
        return value
    return number


def pick_device(name):
    """cuda (the one of this process), mps or cpu: `auto` takes the first that is there."""
    there = dict(cuda=torch.cuda.is_available(), mps=torch.backends.mps.is_available(), cpu=True)
    if name == "auto":
        name = next(device for device in there if there[device])
    if not there[name]:
        raise ValueError(f"--device {name}: there is none here; leave it out to take what is there")
    return torch.device(name, int(os.environ.get("LOCAL_RANK", 0)) if name == "cuda" else None)


# ---- meet, join, agree ---------------------------------------------------------------------------

class Meeting:
    """All processes of a start at one store, before they can be a group: who cannot go on says so.

    torchrun's store outlives a restart, and so would the addresses in it of those who died: every
    start has a store of its own within it.
    """
    over = False

    def __init__(self, limit):
        store, self.rank, self.world = next(rendezvous("env://", timeout=limit))
        start = store.add(f"starts/{self.rank}", 1)
        self.store = dist.PrefixStore(f"start{start}", store)
        Meeting.over = True

    def hear(self, problem=None):
        """The problem of this process or else of the first that has one, once all have come."""
        if problem:
            self.store.compare_set("problem", "", f"process {self.rank}: {one_line(problem)}")
        self.all_pass("come")
        found = self.store.get("problem").decode() if self.store.check(["problem"]) else None
        if found:
            with contextlib.suppress(RuntimeError):  # the store goes with who keeps it
                self.all_pass("heard")
        return problem or found

    def all_pass(self, gate):
        """Wait for all."""
        if self.store.add(gate, 1) == self.world:
            self.store.set(f"all {gate}", "")
        self.store.wait([f"all {gate}"])


def join_processes(device, seconds=300, problem=None):
    """Join the processes that torchrun (or RANK and its like) started, if any -> (rank, how many).

    `problem`: why this process cannot go on, if so; that of any of them is a ValueError of all. A
    peer that never comes, or a collective that never ends, is an error after twice `seconds`;
    `Watch` is faster and knows whose fault it is.
    """
    rank, world, limit = 0, 1, timedelta(seconds=2 * seconds)
    if "RANK" in os.environ:
        meeting = Meeting(limit)
        rank, world, problem = meeting.rank, meeting.world, meeting.hear(problem)
    if problem:
        raise ValueError(problem)
    if "RANK" in os.environ:
        if device.type == "cuda":
            torch.cuda.set_device(device)
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", store=meeting.store,
                                rank=rank, world_size=world, timeout=limit)
    return rank, world


def everywhere(x):
    """A plain object of every process, in order of rank, on all of them."""
    found = [x]
    if dist.is_initialized():
        found = [None] * dist.get_world_size()
        dist.all_gather_object(found, x)
    return found


def first_problem(problem, same=None):
    """The problem of the first process that has one, for all to end by; None where there is none.

    `same`: what must be the same everywhere; where it is not, that is a problem too.
    """
    found = everywhere((problem, same))
    for rank, (text, value) in enumerate(found):
        if text:
            return text if text == found[0][0] else f"process {rank}: {text}"
        if value != found[0][1]:
            return (f"process {rank} found {value} and process 0 {found[0][1]}: all must see the "
                    "same folders and files")
    return None


def largest(flag, device):
    """The largest of a whole number over the processes, so that all stop at the same step."""
    if dist.is_initialized():
        flag = torch.tensor(flag, device=device)
        dist.all_reduce(flag, dist.ReduceOp.MAX)
    return int(flag)


# ---- watch, leave --------------------------------------------------------------------------------

class Watch:
    """Ends the processes when one of them stands still or is gone, and says which it was.

    Each tells a common store how far it is (`mark`), from a thread that also looks at the others.
    When nobody has moved for `seconds`, all end with status 1, and the one that is behind is named:
    the others are only waiting for it.
    """

    def __init__(self, rank, world, seconds):
        self.rank, self.world, self.seconds = rank, world, seconds
        self.marks, self.beats, self.doing, self.over = 0, 0, "starting", False
        if world > 1:
            self.store = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]),
                                       is_master=False, timeout=timedelta(seconds=seconds))
            self.name = f"watch{self.store.add(f'watches/{rank}', 1)}"  # by restart
            self.tell()
            self.answered = time.monotonic()
            for work in (self.look, self.guard):
                threading.Thread(target=work, daemon=True).start()

    def mark(self, doing):
        """There is progress, and this is what comes next."""
        self.marks, self.doing = self.marks + 1, doing

    def tell(self):
        self.beats += 1
        self.store.set(f"{self.name}/{self.rank}", json.dumps(
            [self.marks, self.beats, self.doing, socket.gethostname(), os.getpid()]))

    def ask(self):
        """What each process last told: {rank: [marks, beats, doing, host, pid]}."""
        names = [f"{self.name}/{rank}" for rank in range(self.world)]
        return {rank: json.loads(self.store.get(name)) for rank, name in enumerate(names)
                if self.store.check([name])}

    def look(self):
        since, before = time.monotonic(), None
        while not self.over:
            time.sleep(min(1, self.seconds / 10))
            try:
                self.tell()
                now = self.ask()
            except Exception:  # whose store it was has gone
                return
            self.answered = time.monotonic()
            moved = {rank: x[0] for rank, x in now.items()}
            if moved != before:
                since, before = time.monotonic(), moved
            elif time.monotonic() - since > self.seconds and not self.over:
                behind = self.gone() or [rank for rank, marks in moved.items()
                                         if marks == min(moved.values())]
                if self.rank == min(set(now) - set(behind) or behind):
                    print(f"nothing has moved for {self.seconds:g} s, because of "
                          f"{self.names(behind)}: all end; the same command goes on from the "
                          "newest checkpoint", file=sys.stderr, flush=True)
                else:
                    time.sleep(5)  # let that one speak: its clock may be a little behind
                os._exit(1)

    def guard(self):
        """Who keeps the store may stand still as well: then no answer comes, not even an error."""
        while not self.over:
            time.sleep(min(1, self.seconds / 10))
            if time.monotonic() - self.answered > self.seconds + 5 and not self.over:
                print(f"process {self.rank} leaves: process 0 or torchrun, which keeps what all "
                      f"know of each other, has not answered for {self.seconds:g} s",
                      file=sys.stderr, flush=True)
                os._exit(1)

    def gone(self, patience=3):
        """Ranks whose threads no longer tell anything: stopped, killed, or their machine is."""
        try:
            before = self.ask()
            time.sleep(patience)
            return [rank for rank, x in self.ask().items()
                    if x[1] == before[rank][1] and rank != self.rank]
        except Exception:
            return [0]  # it keeps the store, where torchrun does not

    def names(self, ranks):
        try:
            told = self.ask()
        except Exception:
            told = {}
        return " and ".join(
            f"process {rank}" + (" (pid {4} on {3}, {2})".format(*told[rank]) if rank in told
                                 else "") for rank in ranks)


def leave_by(main):
    """Run main() as a whole command, and end with its status.

    One of many processes ends without taking the interpreter apart: torch's group and `Watch` have
    threads that may still hold a tensor or wait for an answer, and a thread that meets the
    interpreter's end aborts the process (gloo's did, after one all-gather in fifty).
    """
    if "RANK" not in os.environ:
        sys.exit(main())
    try:
        status = main() or 0
    except SystemExit as end:
        status = end.code or 0
    except BaseException:
        traceback.print_exc()
        status = 1
    for child in multiprocessing.active_children():  # workers that decode images
        child.terminate()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status if isinstance(status, int) else 1)
