"""What a run leaves in its folder, and how it takes it up again.

    checkpoint.pt   student, teacher, the objectives' state, optimizer, step, options: all that the
                    next step depends on, for every random draw is a function of (seed, step, index)
    previous.pt     the one before, for the day that the newest is broken
    log.jsonl       one object a logged step, each step once, also after a resume
    args.json       the options

A state is written beside its place, flushed to disk and only then renamed: a process killed at any
moment leaves a whole one. What was damaged later is found by its checksum, and the one before is
taken. A full disk is a warning, and tried again; a stranger's file is plain data or an error.

Left out: keeping every so many checkpoints; copy the file.
"""
import contextlib
import itertools
import json
import math
import os
import sys

import torch
from tqdm import tqdm

from weights import listed, misfits, one_line, read_file, write_file



def warn(text):
    tqdm.write(f"warning: {text}", file=sys.stderr)


def made(run):
    """What a run may change on its way without becoming another, but no longer bitwise the same."""
    return dict(processes=run.world, device=run.device.type, torch=str(torch.__version__),
                threads=torch.get_num_threads(), images=len(run.train_set))


def save_run(run, row=None):
    """Replace checkpoint.pt, keep the one before as previous.pt; `row` goes to the log next."""
    if run.rank:
        return
    state = dict(run.system.save(), optimizer=run.optimizer.state_dict(), step=run.step,
                 args=vars(run.args), skipped=run.skipped, row=row or {}, made=made(run))
    path, previous = run.places
    try:
        write_file(path, lambda file: torch.save(state, file), keep=previous)
    except (OSError, RuntimeError) as error:  # RuntimeError: torch's, when the disk is full
        warn(f"could not save {path} ({error}): training goes on, and will try again")


# options that may change when a run goes on
FREE = ("recipe data_path workers max_steps device compile out_dir resume "
        "save_every log_every eval_every timeout").split()


def open_state(path):
    """A checkpoint of train.py, as plain data; ValueError where it is none."""
    state = read_file(path)
    if not (isinstance(state, dict) and isinstance(state.get("args"), dict)
            and type(state.get("step")) is int and 0 <= state["step"] < 2**40):
        raise ValueError(f"{path} is no checkpoint of train.py")
    return state


def differences(was, now, but=()):
    """["name value (now other)", ..] of plain values; of anything else in a file, its type."""
    plain = {name: x if isinstance(x, (int, float, str, list, type(None))) else type(x).__name__
             for name, x in was.items()} if isinstance(was, dict) else {}
    return [f"{name} {str(plain.get(name))[:60]} (now {value})" for name, value in now.items()
            if name not in but and (name not in plain or plain[name] != value)]


def load_state(run, state):
    """Take over student, teacher, optimizer and counts: all, or nothing and a ValueError."""
    parameters = [p for group in run.optimizer.param_groups for p in group["params"]]
    optimizer, wrong = state.get("optimizer"), []
    moments = optimizer.get("state") if isinstance(optimizer, dict) else None
    if not isinstance(moments, dict) or not all(
            type(index) is int and 0 <= index < len(parameters) for index in moments):
        raise ValueError("its optimizer is of other parameters")
    for index, entry in moments.items():
        own = dict(step=torch.tensor(0.0), exp_avg=parameters[index], exp_avg_sq=parameters[index])
        each = misfits(own, entry) or ["negative"] * bool(
            entry["step"] < 0 or (entry["exp_avg_sq"] < 0).any())
        wrong += [f"optimizer of parameter {index}: {text}" for text in each]
    skipped = state.get("skipped", [0, 0])
    if not (isinstance(skipped, list) and [type(x) for x in skipped] == [int, int]):
        wrong.append("skipped is no pair of counts")
    if wrong:
        raise ValueError(listed(wrong))
    run.system.load(state)
    # moments alone: the options of this run rule, not those in the file
    run.optimizer.load_state_dict(dict(run.optimizer.state_dict(), state={
        index: {name: x.clone() for name, x in entry.items()} for index, entry in moments.items()}))
    run.step, run.skipped = state["step"], skipped
    row = state.get("row") if isinstance(state.get("row"), dict) else {}
    plain = all(type(name) is str and (x is None or type(x) in (int, float) and abs(x) < 2**60)
                for name, x in row.items())
    run.row = row if plain and row.get("step") == run.step else {}


def resume(run):
    """Take over the newest whole state of this run, if there is one and it is asked for."""
    args, other = run.args, []
    here = [path for path in run.places if os.path.exists(path)]
    if args.resume == "none" and not run.restarted:
        return
    given = args.resume not in ("auto", "none")
    own = given and os.path.exists(args.resume) and any(
        os.path.samefile(args.resume, path) for path in here)
    free = given and (own or not here)  # else a state in --out-dir must be of this very run
    problems = []
    for path in [args.resume] if free else here:
        try:
            state = open_state(path)
            other = [f"--{name.replace('_', '-')} {text}" for name, _, text in (
                x.partition(" ") for x in differences(state["args"], vars(args), FREE))]
            changed = differences(state.get("made"), made(run)) if "made" in state else []
            begun = str(state["args"].get("resume"))[:60]
            if given and not free and begun != args.resume[:60]:
                other.append(f"--resume {begun} (now {args.resume})")
            if not other or free:
                load_state(run, state)
        except (ValueError, RuntimeError) as error:  # broken: the one before may be whole
            problems.append(f"--resume {path}: no checkpoint of such a run ({str(error)[:400]})")
            continue
        run.row = run.row if path in run.places else {}  # of another log
        if other and not free:
            raise ValueError(f"{path} is of another run: {', '.join(other[:6])}; choose another "
                             "--out-dir, the same options, --resume none to start over, or "
                             "--resume with its path")
        break
    else:
        if problems:
            raise ValueError("; ".join(problems)[:900] + "; --resume none starts over")
        return
    if run.rank == 0:
        for text in problems:
            warn(f"{text}; took the state before")
        print(one_line(
            f"resumed {path} at step {run.step}" + f"; it had {', '.join(other)}" * bool(other)
            + f"; it was made with {', '.join(changed)}, so from here it is not bitwise the same "
            "run, and with other images another order" * bool(changed)))


def open_folder(run):
    """Make --out-dir and see that it can be written; what --resume none finds there is kept."""
    args = run.args
    log = os.path.join(args.out_dir, "log.jsonl")
    try:
        os.makedirs(args.out_dir, exist_ok=True)
        if args.resume == "none" and not run.restarted:
            for path in (*run.places, log):  # nothing saved is lost
                names = (f"{path}.old{n or ''}" for n in itertools.count())
                if os.path.exists(path):
                    os.replace(path, next(name for name in names if not os.path.exists(name)))
        write_file(os.path.join(args.out_dir, "args.json"),
                   lambda file: file.write(json.dumps(vars(args), indent=1).encode()))
    except OSError as error:
        if not run.step:
            raise ValueError(f"--out-dir {args.out_dir} cannot be written: {error}") from error
        warn(f"--out-dir {args.out_dir} cannot be written ({error}): training goes on")


def rounded(x):
    """A float as a log has it; what is not finite becomes None, for JSON has no word for it."""
    if not isinstance(x, float):
        return x
    return float(f"{x:.6g}") if math.isfinite(x) else None


class Log:
    """log.jsonl, written by the first process: one object a step, none twice after a resume."""

    def __init__(self, run):
        self.run, self.on = run, run.rank == 0
        self.path = os.path.join(run.args.out_dir, "log.jsonl")
        self.rows, self.points, self.said, self.torn = [], [], set(), True
        if not self.on:
            return
        with contextlib.suppress(OSError), open(self.path, errors="replace") as file:
            for line in file:
                with contextlib.suppress(ValueError, KeyError, TypeError):  # a line that was cut
                    row = json.loads(line)
                    self.rows += [row] * (line.endswith("\n") and 0 <= row["step"] <= run.step)
        self.rows *= bool(run.step)
        for row in self.rows:
            self.watch(row, quiet=True)  # what was said before the resume
        self.put()

    def put(self):
        """Append the last row, or write all where the file is not as it should be."""
        try:
            if self.torn:
                write_file(self.path, lambda file: file.writelines(
                    json.dumps(row).encode() + b"\n" for row in self.rows))
            else:
                with open(self.path, "a") as file:
                    file.write(json.dumps(self.rows[-1]) + "\n")
            self.torn = False
        except OSError as error:
            if not self.torn:
                warn(f"could not write {self.path} ({error}): its rows are kept and written later")
            self.torn = True

    def write(self, row):
        if not self.on:
            return
        self.rows.append({name: rounded(x) for name, x in row.items()})
        self.put()
        if "knn_top1" in row:
            shown = "step loss knn_top1 raw_pixels_knn_top1 effective_rank images_per_second"
            tqdm.write("  ".join(f"{name} {row[name]:.4g}"
                                 for name in shown.split() if row.get(name) is not None))
        self.watch(self.rows[-1])

    def watch(self, row, quiet=False):
        """Say once, in plain words, what a collapse looks like in the rows."""
        rows, step = self.points, row["step"]
        rows += [row] * ("effective_rank" in row and None not in row.values())  # finite
        if len(rows) < 5:
            return
        if max(row["effective_rank"] for row in rows[-3:]) < rows[0]["effective_rank"] / 2:
            self.say("rank", quiet, "the effective rank of the points fell below half of its "
                     "start: they collapse onto few directions; try a lower --lr, a smaller "
                     "--pull-weight or a --momentum closer to 1")
        if max(row["feature_std"] for row in rows[-3:]) < rows[0]["feature_std"] / 10:
            self.say("spread", quiet, "the spread of the points fell below a tenth of its start: "
                     "they are nearly all one; try a lower --lr, a longer --warmup or a --momentum "
                     "closer to 1")
        for name in [name for name in rows[-1] if f"collapsed_{name}" in rows[-1]]:
            plateau = f"collapsed_{name}"
            if step > self.run.total / 5 and all(
                    abs(row[name] - row[plateau]) < 0.02 * row[plateau] for row in rows[-5:]):
                self.say(name, quiet, f"the {name} loss stays at {rows[-1][name]:.4g}, its value "
                         "for a student whose points are all one: nothing is learned; try a lower "
                         "--lr or a longer --warmup")

    def say(self, what, quiet, text):
        if what not in self.said and not quiet:
            warn(text)
        self.said.add(what)
