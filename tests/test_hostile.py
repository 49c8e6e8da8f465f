"""Hostile files: whatever is in a file of weights, it loads whole or is refused in a sentence.

    pytest tests/test_hostile.py
    pytest tests/test_hostile.py -m slow -s    # thousands of files
"""
import argparse
import collections
import contextlib
import copy
import io
import itertools
import math
import os
import pickle
import random
import re
import resource
import signal
import struct
import subprocess
import sys
import time
import traceback
import warnings
import zipfile
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
import model
import objectives
import train
from conftest import call, parse, write_textures

torch.set_num_threads(1)
pytestmark = [pytest.mark.filterwarnings(f"ignore:.*{text}") for text in
              ("quantize_per_tensor", "TypedStorage is deprecated", "sparse tensor invariants")]
NAN, INF = math.nan, math.inf
GIB = 2**30


# ---------- a true checkpoint ----------

@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """Options of a run of two steps on a few PNGs."""
    root = write_textures(tmp_path_factory.mktemp("images"), 16, 8, classes=2)
    return ("--data", "folder", "--data-path", root, "--batch-size", 16, "--max-steps", 2,
            "--loss", "dino", "--prototypes", 16, "--projection", 8, "--head-hidden", 16,
            "--device", "cpu", "--workers", 0)


@pytest.fixture(scope="module")
def state(base, tmp_path_factory):
    out = tmp_path_factory.mktemp("true")
    assert call(*base, "--out-dir", out) == 0
    return torch.load(out / "checkpoint.pt", weights_only=True)


@pytest.fixture(scope="module", autouse=True)
def ends():
    """Twenty seconds, or an alarm; 3 GiB more, or an error in place of a machine out of memory."""
    def late(*_):
        raise AssertionError("it takes longer than 20 seconds")

    before, old = signal.signal(signal.SIGALRM, late), resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + 3 * GIB, old[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, old)
    signal.signal(signal.SIGALRM, before)


# ---------- what is done to it ----------

def packed(thing, **options):
    """The bytes of torch.save."""
    file = io.BytesIO()
    torch.save(thing, file, **options)
    return file.getvalue()


def rezipped(content, change=lambda name, part: part, method=zipfile.ZIP_STORED):
    """A torch zip with each of its parts as `change(name, bytes)` wants it."""
    file = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(file, "w", method) as new:
        for name in old.namelist():
            new.writestr(name, change(name, old.read(name)))
    return file.getvalue()


def with_pickle(content, code):
    return rezipped(content, lambda name, part: code if name.endswith("data.pkl") else part)


def flipped(content, draw):
    content = bytearray(content)
    for _ in range(draw.choice([1, 1, 3, 30])):
        content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    return bytes(content)


def flipped_in_the_pickle(content, draw):
    return rezipped(content, lambda name, part: flipped(part, draw)
                    if name.endswith("data.pkl") else part)


def flipped_in_the_directory(content, draw):
    """Names, sizes and places of the parts stand at the end of a zip."""
    cut = content.index(b"PK\x01\x02")
    return content[:cut] + flipped(content[cut:], draw)


def cut(content, draw):
    start = draw.choice([0, 0, 0, draw.randrange(100)])
    return content[start:draw.randrange(len(content))]


def blanked(content, draw):
    start, length = draw.randrange(len(content)), draw.choice([4, 100, 10000])
    return content[:start] + bytes(length) + content[start + length:]


def with_short_parts(content, draw):
    return rezipped(content, lambda name, part: part[:draw.randrange(len(part) + 1)]
                    if "/data/" in name and draw.random() < 0.2 else part)


def cycle(*_):
    x = {}
    x["teacher"] = x["student"] = x["model"] = x
    return x


def endless(*_):
    x = []
    x.append(x)
    return x


def nest(x, names, depth):
    for _ in range(depth):
        x = {name: x for name in names}
    return x


def of(x):
    """x where it is a tensor with something in it, else one."""
    return x if isinstance(x, torch.Tensor) and x.numel() and x.layout == torch.strided \
        else torch.ones(2, 3)


def spoilt(value):
    def spoil(x):
        x = of(x).float().clone()
        x.view(-1)[x.numel() // 2] = value
        return x
    return spoil


def bomb(x):
    return torch.ones(1).expand(2**20, 2**20)


ODD = dict(
    zero=lambda x: 0, minus=lambda x: -1, huge=lambda x: 10**9, giant=lambda x: 10**600,
    nan=lambda x: NAN, inf=lambda x: INF, float=lambda x: 1.5, true=lambda x: True,
    complex=lambda x: 1j, string=lambda x: "vit_micro", long=lambda x: "x" * 10**6,
    surrogate=lambda x: "\ud800", lines=lambda x: "a\nb\n" * 100, none=lambda x: None,
    list=lambda x: [x], tuple=lambda x: (x,), empty=lambda x: {}, nothing=lambda x: [],
    bytes=lambda x: bytearray(b"ab"), names=lambda x: {(1, 2): x, None: x, 1.5: x},
    cycle=cycle, endless=endless, nested=lambda x: {"teacher": {"teacher": x}},
    complex_tensor=lambda x: of(x).to(torch.complex64), meta=lambda x: of(x).to("meta"),
    sparse=lambda x: of(x).detach().to_sparse(), ints=lambda x: of(x).int(),
    bools=lambda x: of(x) > 0, bomb=bomb, expanded=lambda x: torch.ones(1).expand(of(x).shape),
    bomb_of_one_more=lambda x: torch.ones(1).expand(2**30, *of(x).shape),
    scalar=lambda x: torch.tensor(1.0), no_values=lambda x: torch.empty(0),
    none_of_many=lambda x: torch.empty(0, 2**40), flat=lambda x: of(x).flatten(),
    turned=lambda x: of(x).mT if of(x).dim() > 1 else of(x)[None], more=lambda x: of(x)[None],
    doubled=lambda x: torch.cat([of(x), of(x)]) if of(x).dim() else of(x).expand(2),
    nan_in=spoilt(NAN), inf_in=spoilt(INF), minus_in=spoilt(-1e30), large_in=spoilt(3e38),
    double=lambda x: of(x).double() * 1e300, half=lambda x: of(x).half() * 1e5,
    float8=lambda x: of(x).to(torch.float8_e4m3fn), many=lambda x: torch.ones([1] * 500),
    parameter=lambda x: torch.nn.Parameter(of(x).float()),
    quantized=lambda x: torch.quantize_per_tensor(of(x).float(), 0.1, 0, torch.qint8))


def replaced(tree, path, value):
    """A copy of a tree of dicts, with the value at `path` put through a function."""
    if not path:
        return value(tree)
    tree = dict(tree)
    tree[path[0]] = replaced(tree[path[0]], path[1:], value)
    return tree


def place(tree, draw):
    """The path to something in a tree of dicts."""
    path = []
    while isinstance(tree, dict) and tree and not (path and draw.random() < 0.15):
        path.append(draw.choice(list(tree)))
        tree = tree[path[-1]]
    return path


def odd(state, draw):
    for _ in range(draw.choice([1, 1, 1, 2, 5])):
        path = place(state, draw)
        with contextlib.suppress(RuntimeError, TypeError):  # torch makes no such tensor
            state = replaced(state, path, ODD[draw.choice(list(ODD))])
    return state


def odd_in(*path):
    def change(state, draw):
        inner = state
        for name in path:
            inner = inner[name]
        try:
            return replaced(state, [*path, *place(inner, draw)], ODD[draw.choice(list(ODD))])
        except (RuntimeError, TypeError):
            return state
    return change


def lacking(state, draw):
    path = place(state, draw)
    return replaced(state, path[:-1], lambda x: {k: v for k, v in x.items() if k != path[-1]})


def renamed(state, draw):
    """Prefixes, and prefixes of prefixes."""
    prefixes = ["module.", "teacher.", "momentum_encoder.", "cls_token", "backbone.", "", "head."]
    prefix = "".join(draw.choices(prefixes, k=draw.randrange(1, 4)))
    both = draw.random() < 0.5
    return replaced(state, [draw.choice(["teacher", "student"])], lambda x:
                    {prefix + k: v for k, v in x.items()} | (x if both else {}))


def enclosed(state, draw):
    return nest(state, draw.sample(["teacher", "state_dict", "model", "student"], 2),
                draw.choice([1, 2, 9]))


CHANGES = dict(odd=odd, lacking=lacking, renamed=renamed, enclosed=enclosed, args=odd_in("args"),
               student=odd_in("student"), teacher=odd_in("teacher"), step=odd_in("step"),
               moments=odd_in("optimizer", "state"), optimizer=odd_in("optimizer"),
               centre=odd_in("objective"), made=odd_in("made"), row=odd_in("row"),
               skipped=odd_in("skipped"))
CUTS = dict(flipped=flipped, cut=cut, blanked=blanked, pickle=flipped_in_the_pickle,
            directory=flipped_in_the_directory, short=with_short_parts)


def mutants(n, seed, state):
    """n mutilated copies of a checkpoint, as (name, bytes)."""
    state = state | {"made": state.get("made") or {}, "row": state.get("row") or {"loss": 1.0}}
    content = packed(state)
    kinds = itertools.cycle([*CHANGES, *CUTS])
    for i, kind in zip(range(n), kinds):
        draw = random.Random(f"{seed} {i}")
        if kind in CUTS:
            yield f"{kind} {seed} {i}", CUTS[kind](content, draw)
            continue
        try:
            yield f"{kind} {seed} {i}", packed(CHANGES[kind](state, draw))
        except (RuntimeError, pickle.PicklingError):  # torch writes no such file
            yield f"cut {seed} {i}", cut(content, draw)


# ---------- what is done with it ----------

def tensors(x):
    return [x] if isinstance(x, torch.Tensor) else \
        [y for value in x.values() for y in tensors(value)] if isinstance(x, dict) else []


def network():
    torch.manual_seed(0)
    return model.ARCHS["vit_micro"](image_size=32, patch_size=8)


def load(path, base):
    vit = network()
    try:
        assert model.load_backbone(vit, path) is vit
    except ValueError:
        assert all(x.equal(y) for x, y in zip(vit.state_dict().values(),
                                              network().state_dict().values())), "half-loaded"
        raise
    assert all(x.isfinite().all() for x in vit.state_dict().values())


def open_it(path, base):
    vit, options = model.open_backbone(path)
    assert {"arch", "patch_size", "image_size"} <= set(options)
    assert all(x.isfinite().all() for x in vit.state_dict().values())
    size = options["image_size"]
    assert vit(torch.zeros(1, 3, size, size)).shape[0] == 1


def resume(path, base):
    """train.prepare --resume; what it takes over must be good for another step."""
    out, systems = path.parent / f"out{time.monotonic_ns()}", []
    args = parse(*base, "--out-dir", out, "--resume", path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "System", lambda args: systems.append(objectives.System(args))
                      or systems[0])
        try:
            run = train.prepare(args)
        except ValueError as error:
            assert not out.exists(), "a folder is left behind"
            assert str(path) in str(error), f"it does not name the file: {str(error)[:100]}"
            assert len(str(error)) < 1000, "a long message"
            new = objectives.System(args)
            pairs = zip(tensors(systems[0].state_dict() | systems[0].state),
                        tensors(new.state_dict() | new.state))
            assert all(x.equal(y) for x, y in pairs), "half-loaded"
            raise
    assert type(run.step) is int and run.step >= 0
    run.watch.over = True
    draw = torch.Generator().manual_seed(0)
    for p in run.system.student.parameters():
        if p.requires_grad:
            p.grad = 1e-3 * torch.randn(p.shape, generator=draw)
    run.optimizer.step()
    kept = [*run.system.state_dict().values(), *run.system.state.values()]
    assert all(x.isfinite().all() for x in kept), "it trains to what is not finite"


READERS = dict(load_backbone=load, open_backbone=open_it, resume=resume)
each_reader = pytest.mark.parametrize("reader", READERS.values(), ids=READERS)


def peak():
    """The most memory that this process had, in GiB."""
    return int(re.search(r"VmHWM:\s*(\d+)", Path("/proc/self/status").read_text())[1]) / 2**20


def outcome(reader, path, base):
    """"loaded", "refused", or what else went wrong, with its place."""
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    memory = peak()
    signal.alarm(20)
    try:
        reader(path, base)
        said = "loaded"
    except ValueError as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        said = "refused" if not isinstance(error, UnicodeError) else \
            f"{type(error).__name__} at {Path(where.filename).name}:{where.lineno}"
    except Exception as error:
        frames = [f"{Path(frame.filename).name}:{frame.lineno}"
                  for frame in traceback.extract_tb(error.__traceback__)
                  if Path(frame.filename).parent in (ROOT, ROOT / "tests")]
        said = f"{type(error).__name__}: {str(error)[:150]} at {' '.join(frames[-2:])}"
    finally:
        signal.alarm(0)
    grown = peak() - memory
    return said if grown < 1 else f"it takes {grown:.1f} GiB"


def feed(files, base, folder, readers=READERS):
    """How many files were loaded and refused, and a list of what else happened."""
    counts, wrong, path = collections.Counter(), [], folder / "hostile.pt"
    for name, content in files:
        path.write_bytes(content)
        for reader in readers:
            said = outcome(READERS[reader], path, base)
            counts[said if said in ("loaded", "refused") else "wrong"] += 1
            if said not in ("loaded", "refused"):
                wrong.append(f"{reader}, {name}: {said}")
    return counts, wrong


def test_the_checkpoint_itself_is_read_by_all(state, base, tmp_path):
    counts, wrong = feed([("true", packed(state))], base, tmp_path)
    assert counts == {"loaded": 3}, wrong


def test_mutilated_files_load_whole_or_are_refused(state, base, tmp_path):
    counts, wrong = feed(mutants(50, 0, state), base, tmp_path)
    assert not wrong, "\n".join(wrong)
    assert counts["refused"] > 40 and counts["loaded"] > 10


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, 9))
def test_thousands_of_mutilated_files_load_whole_or_are_refused(seed, state, base, tmp_path):
    counts, wrong = feed(mutants(500, seed, state), base, tmp_path)
    print(f"\n500 files fed to 3 readers: {counts['refused']} refused, {counts['loaded']} loaded, "
          f"{len(wrong)} wrong")
    assert not wrong, "\n".join(wrong)


# ---------- containers ----------

class Code:
    def __reduce__(self):
        return os.mkdir, ("ran",)


def overlapping(n=100, size=2**24):
    """A zip whose n stored parts are all one and the same piece of the file: n times its size."""
    names = ["cls_token", *(f"blocks.{i}" for i in range(n - 1))]
    file, many, out = packed({name: torch.zeros(1) for name in names}), b"J", io.BytesIO()
    many += struct.pack("<i", size // 4)  # in place of 1, K\x01: the length of storage and tensor
    with zipfile.ZipFile(io.BytesIO(file)) as old, zipfile.ZipFile(out, "w") as new:
        first = None
        for name in old.namelist():
            part = old.read(name).replace(b"K\x01t", many + b"t")
            part = re.sub(rb"QK\x00K\x01\x85", b"QK\x00" + many + b"\x85", part)
            if "/data/" in name and first:
                new.filelist.append(copy.copy(first))
                new.filelist[-1].filename = name
                continue
            new.writestr(name, bytes(size) if "/data/" in name else part)
            first = new.getinfo(name) if "/data/" in name else None
    return out.getvalue()


def qkv_bomb(state):
    """Hugging Face's names: each layer's query, key and value of one element become 768 MiB."""
    x = torch.ones(1).expand(2**26)
    return {"embeddings.cls_token": torch.zeros(1, 1, 64)} | {
        f"encoder.layer.{i}.attention.attention.{part}.weight": x
        for i in range(12) for part in ("query", "key", "value")}


CONTAINERS = dict(
    empty=lambda c, s: b"", text=lambda c, s: b"words", zeros=lambda c, s: bytes(10000),
    zip_of_nothing=lambda c, s: b"PK\x05\x06" + bytes(18),
    deflated=lambda c, s: rezipped(c, method=zipfile.ZIP_DEFLATED),
    deflated_bomb=lambda c, s: rezipped(c, lambda name, part: bytes(2**25) if name.endswith("/0")
                                        else part, zipfile.ZIP_DEFLATED),
    code=lambda c, s: packed(s | {"args": Code()}), code_alone=lambda c, s: pickle.dumps(Code()),
    old_code=lambda c, s: packed(s | {"x": Code()}, _use_new_zipfile_serialization=False),
    deep_list=lambda c, s: with_pickle(c, b"\x80\x02" + b"]" * 50000 + b"a" * 49999 + b"."),
    deep_dict=lambda c, s: with_pickle(c, b"\x80\x02" + b"}X\x07\x00\x00\x00teacher" * 50000
                                       + b"}" + b"s" * 50000 + b"."),
    no_pickle=lambda c, s: with_pickle(c, b""), stop=lambda c, s: with_pickle(c, b"\x80\x02."),
    twice=lambda c, s: c + c, half=lambda c, s: c[:len(c) // 2], tail=lambda c, s: c[100:],
    overlapping=lambda c, s: overlapping(), qkv_bomb=lambda c, s: packed(qkv_bomb(s)),
    tensor=lambda c, s: packed(torch.ones(3)), list=lambda c, s: packed([s]),
    cycle=lambda c, s: packed(cycle()), endless=lambda c, s: packed(endless()),
    deep_teachers=lambda c, s: packed(nest(s, ["teacher"], 100)),
    arguments=lambda c, s: packed(s | {"args": argparse.Namespace(**s["args"])}))


@each_reader
@pytest.mark.parametrize("name", CONTAINERS)
def test_a_strange_container_is_refused(name, reader, state, base, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "hostile.pt").write_bytes(CONTAINERS[name](packed(state), state))
    said = outcome(reader, tmp_path / "hostile.pt", base)
    whole = name in ("twice", "tail", "deep_teachers", "arguments")  # some readers find all in it
    assert said == "refused" or whole and said == "loaded", said
    assert not (tmp_path / "ran").exists()


@each_reader
def test_a_folder_a_missing_file_and_one_without_rights_are_refused(reader, base, tmp_path):
    (tmp_path / "closed.pt").touch(0)
    for name in (".", "none.pt", "closed.pt"):
        assert outcome(reader, tmp_path / name, base) == "refused"


def test_a_tensor_longer_than_its_part_of_the_file_is_refused(tmp_path):
    big = torch.ones(2**24)
    content = rezipped(packed({"args": {}, "teacher": {"cls_token": big}}), lambda name, part:
                       part[:4] if "/data/" in name and len(part) > 100 else part)
    (tmp_path / "short.pt").write_bytes(content)
    code = ("import model, sys\ntry: file = model.read_file(sys.argv[1])\n"
            "except ValueError: sys.exit(7)\nprint(file['teacher']['cls_token'].sum())")
    done = subprocess.run([sys.executable, "-c", code, tmp_path / "short.pt"], cwd=ROOT,
                          capture_output=True, text=True, timeout=60)
    assert done.returncode == 7, (done.returncode, done.stdout, done.stderr[-500:])


def test_mutilated_safetensors_are_refused(state, base, tmp_path):
    save = pytest.importorskip("safetensors.torch").save
    content = save({k: v.contiguous() for k, v in state["teacher"].items()})
    path, draw = tmp_path / "x.safetensors", random.Random(0)
    for i in range(12):
        path.write_bytes([flipped, cut, blanked][i % 3](content[:3000] if i % 2 else content, draw))
        for reader in READERS.values():
            assert outcome(reader, path, base) in ("loaded", "refused")
    path.write_bytes(struct.pack("<Q", 2**62) + b"{}")
    assert outcome(load, path, base) == "refused"


CONFIGS = dict(
    deep="[" * 10**6, list="[1, 2]", word="hidden", empty="", null="null",
    inf='{"hidden_size": 64, "num_attention_heads": Infinity}',
    nan='{"hidden_size": 64, "num_attention_heads": NaN}',
    dict='{"hidden_size": 64, "num_attention_heads": {}}', none='{"hidden_size": 64}',
    digits='{"hidden_size": 64, "num_attention_heads": ' + "9" * 5000 + "}",
    zero='{"hidden_size": 64, "num_attention_heads": 0}',
    minus='{"hidden_size": 64, "num_attention_heads": -2}',
    word_of_heads='{"hidden_size": 64, "num_attention_heads": "many"}',
    true='{"hidden_size": true, "num_attention_heads": true}', bytes="\udcff\udcfe")


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_a_hostile_config_beside_the_weights_does_nothing_or_is_refused(config, state, tmp_path):
    weights = {name: x for name, x in state["teacher"].items() if name.startswith("backbone")}
    torch.save(weights, tmp_path / "weights.pt")
    (tmp_path / "config.json").write_bytes(config.encode(errors="surrogateescape"))
    assert outcome(load, tmp_path / "weights.pt", ()) in ("loaded", "refused")


# ---------- names, shapes and options ----------

WEIGHTS = {  # other layouts, one thing wrong in each
    "no shape": {"cls_token": torch.tensor(1.0)}, "no width": {"cls_token": torch.empty(1, 1, 0)},
    "turned iBOT token": {"cls_token": torch.zeros(1, 1, 64),
                          "masked_embed": torch.ones(3, 5, 7).permute(2, 0, 1)},
    "iBOT token bomb": {"cls_token": torch.zeros(1, 1, 64), "masked_embed": bomb(0)},
    "cls_token bomb": {"cls_token": bomb(0)}, "no name": {"": torch.zeros(1), "cls_token": 1},
    "scalar query": {"embeddings.cls_token": torch.zeros(1, 1, 64)} | {
        f"encoder.layer.0.attention.attention.{part}.weight": torch.tensor(1.0)
        for part in ("query", "key", "value")},
    "unequal queries": {"embeddings.cls_token": torch.zeros(1, 1, 64)} | {
        f"encoder.layer.0.attention.attention.{part}.weight": torch.ones(3, 2 + i)
        for i, part in enumerate(("query", "key", "value"))},
    "half queries": {"embeddings.cls_token": torch.zeros(1, 1, 64)} | {
        f"encoder.layer.0.attention.attention.{part}.weight":
            torch.ones(4, 4).to(torch.float8_e4m3fn if part == "key" else torch.half)
        for part in ("query", "key", "value")},
    "numbers for names": {1: torch.zeros(1), (2, "cls_token"): torch.zeros(1, 1, 64)},
    "long names": {"x" * 10**6 + str(i): torch.zeros(1) for i in range(5)},
    "kernel bomb": {"cls_token": torch.zeros(1, 1, 192), "pos_embed": torch.zeros(1, 5, 192),
                    "patch_embed.proj.weight": torch.ones(1).expand(192, 3, 2**20, 2**20)},
    "place bomb": {"cls_token": torch.zeros(1, 1, 192),
                   "pos_embed": torch.ones(1).expand(1, 2**40 + 1, 192),
                   "patch_embed.proj.weight": torch.ones(192, 3, 2, 2)},
}


@pytest.mark.parametrize("name", WEIGHTS)
def test_weights_of_strange_names_and_shapes_are_refused(name, tmp_path):
    for i, tree in enumerate((WEIGHTS[name], {"teacher": WEIGHTS[name]})):
        torch.save(tree, tmp_path / f"{i}.pt")
        readers = load, lambda path, base: model.open_backbone(path, "vit_tiny"), open_it
        assert [outcome(reader, tmp_path / f"{i}.pt", ()) for reader in readers] == ["refused"] * 3


OPTIONS = [("image_size", x) for x in (10**9, 0, -32, 10**600, "32", 32.0, NAN, None, [32], True,
                                       torch.tensor(32), torch.tensor([32, 32]), "\ud800")] + [
    ("patch_size", x) for x in (0, -1, 10**9, "8", 8.0, NAN, None, [8], {}, torch.tensor(8))] + [
    ("arch", x) for x in ([], {}, {"vit_micro": 1}, NAN, 1, None, "vit_base", "x" * 10**6,
                          torch.ones(3), torch.ones(3).to("meta"), torch.ones(2).to_sparse())]


@pytest.mark.parametrize("name, value", OPTIONS, ids=lambda x: repr(x)[:20].replace("\n", " "))
def test_hostile_options_of_a_file_are_refused(name, value, state, tmp_path):
    torch.save(state | {"args": state["args"] | {name: value}}, tmp_path / "x.pt")
    assert outcome(open_it, tmp_path / "x.pt", ()) == "refused"
    also = lambda path, base: model.open_backbone(path, "vit_micro")
    assert outcome(also, tmp_path / "x.pt", ()) == "refused"


# ---------- --resume ----------

def moment(name, value, key=0):
    return lambda s: replaced(s, ["optimizer", "state", key, name], value)


def keyed(change):
    return lambda s: replaced(s, ["optimizer", "state"], lambda x:
                              {change(k): v for k, v in x.items()})


def aliased(s):
    return replaced(s, ["optimizer", "state", 0], lambda x: x | {"exp_avg": x["exp_avg_sq"]})


def args_of(**options):
    return lambda s: s | {"args": s["args"] | options}


REFUSED = {
    **{f"step {str(x)[:9]}": lambda s, x=x: s | {"step": x}
       for x in (-1, 1.5, NAN, INF, "2", True, None, [2], {}, torch.tensor(2), -10**600)},
    **{f"centre {name}": lambda s, name=name: replaced(s, ["objective", "dino"], ODD[name])
       for name in ("nan_in", "inf_in", "more", "doubled", "string", "none", "meta", "sparse",
                    "complex_tensor", "ints", "bomb", "scalar", "double")},
    "no centre": lambda s: s | {"objective": {}}, "centres": lambda s: s | {"objective": [1]},
    "another centre": lambda s: s | {"objective": s["objective"] | {"ibot": torch.zeros(16)}},
    **{f"{name} {odd}": moment(name, ODD[odd])
       for name in ("exp_avg", "exp_avg_sq", "step")
       for odd in ("nan_in", "inf_in", "more", "doubled", "flat", "none", "string", "meta",
                   "sparse", "complex_tensor", "bomb")},
    "negative second moments": moment("exp_avg_sq", spoilt(-1e-3)),
    "negative count": moment("step", lambda x: -x), "moments of no name": keyed(str),
    "moments of other parameters": keyed(lambda k: k + 1000),
    "moments of half numbers": keyed(lambda k: k + 0.5),
    "no optimizer": lambda s: s | {"optimizer": 0},
    "optimizer of a list": lambda s: s | {"optimizer": []},
    "student of NaN": lambda s: replaced(s, ["student", "backbone.norm.bias"], ODD["nan_in"]),
    "head of NaN": lambda s: replaced(s, ["teacher", "heads.dino.prototypes"], ODD["nan_in"]),
    "teacher lacks one": lambda s: s | {"teacher": dict(list(s["teacher"].items())[1:])},
    "student is its teacher's key": lambda s: s | {"student": s["teacher"] | {"x": torch.ones(1)}},
    "frozen": lambda s: {"frozen" if k == "teacher" else k: v for k, v in s.items()},
    "args of a list": lambda s: s | {"args": [1]}, "no args": lambda s: s | {"args": None},
    "skipped": lambda s: s | {"skipped": [1, NAN]}}
EITHER = {
    "moments of float names": keyed(float), "moments of complex names": keyed(complex),
    "moments of one element": moment("exp_avg", ODD["expanded"]),
    "moments of one memory": aliased, "one moment": lambda s: replaced(
        s, ["optimizer", "state"], lambda x: {0: x[0]}),
    "moments of 8 bits": moment("exp_avg_sq", ODD["float8"]),
    "second moments twice transposed": moment("exp_avg_sq", lambda x: x.mT.contiguous().mT),
    "param_groups": lambda s: replaced(s, ["optimizer", "param_groups"], lambda x: [{"lr": "x"}]),
    "no param_groups": lambda s: replaced(s, ["optimizer", "param_groups"], lambda x: None),
    "hostile param_groups": lambda s: replaced(s, ["optimizer", "param_groups"], lambda x: [
        g | dict(lr=NAN, betas=(2, NAN), eps=-1, params=[10**9], foreach="x") for g in x]),
    "far step": lambda s: s | {"step": 10**600},
    "made of tensors": lambda s: s | {"made": {"processes": torch.ones(2), "torch": torch.ones(2)}},
    "made of meta": lambda s: s | {"made": {"processes": torch.ones(1).to("meta")}},
    "made of surrogates": lambda s: s | {"made": {"torch": "\ud800"}},
    "options of tensors": args_of(lr=torch.ones(2)), "options of surrogates": args_of(lr="\ud800"),
    "options of meta": args_of(lr=torch.ones(1).to("meta")),
    "options of cycles": args_of(lr=cycle()),
    "options of bombs": args_of(lr=bomb(0), seed=torch.ones(1).expand(2**40)),
    "options of long words": args_of(**{name: "x" * 10**6 for name in ("lr", "seed", "pool")}),
    "skipped far": lambda s: s | {"skipped": [10**600, -10**600]},
    **{f"row {key} {str(x)[:9]}": lambda s, key=key, x=x: s | {"row": {key: x}}
       for key in ("step", "knn_top1", "\ud800") for x in (10**600, NAN)}}


@pytest.mark.parametrize("name", REFUSED)
def test_a_hostile_state_is_refused(name, state, base, tmp_path):
    torch.save(REFUSED[name](state), tmp_path / "x.pt")
    assert outcome(resume, tmp_path / "x.pt", base) == "refused"


@pytest.mark.parametrize("name", EITHER)
def test_a_strange_state_is_refused_or_good_for_another_step(name, state, base, tmp_path):
    torch.save(EITHER[name](state), tmp_path / "x.pt")
    assert outcome(resume, tmp_path / "x.pt", base) in ("refused", "loaded")


@pytest.mark.parametrize("name", EITHER)
def test_a_strange_state_is_refused_or_its_run_ends_well(name, state, base, tmp_path, capsys):
    torch.save(EITHER[name](state | {"step": 1}), tmp_path / "x.pt")
    try:
        status = call(*base, "--out-dir", tmp_path / "run", "--resume", tmp_path / "x.pt")
    except SystemExit as stop:
        status = stop.code
    assert status == 0 or status == 2 and "x.pt" in capsys.readouterr().err


@pytest.mark.parametrize("make", [
    lambda c, s: b"", lambda c, s: c[:1000], lambda c, s: packed(cycle()),
    lambda c, s: packed(s | {"args": Code()}), lambda c, s: packed(s | {"step": -1}),
    lambda c, s: packed(s | {"objective": {"x" * 10**6: 1, "\n\ud800" * 500: 2}}),
    lambda c, s: packed(s | {"student": {f"{i}\n" * 1000: 0 for i in range(1000)}}),
    lambda c, s: packed(replaced(s, ["teacher", "backbone.cls_token"], ODD["many"])),
    lambda c, s: packed(replaced(s, ["optimizer", "state"], lambda x: {i: 0 for i in x})),
    lambda c, s: packed(replaced(s, ["teacher", "backbone.cls_token"], ODD["sparse"])),
    lambda c, s: packed(replaced(s, ["teacher", "backbone.cls_token"], ODD["quantized"])),
], ids="empty cut cycle code step centres names many moments sparse quantized".split())
def test_a_hostile_state_ends_with_status_2_and_a_short_line(
        make, state, base, tmp_path, capsys, recwarn):
    path = tmp_path / "x.pt"
    path.write_bytes(make(packed(state), state))
    recwarn.clear()
    warnings.simplefilter("always")
    with pytest.raises(SystemExit) as stop:
        call(*base, "--out-dir", tmp_path / "run", "--resume", path)
    lines = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2 and len(lines) <= 2 and max(map(len, lines)) <= 1000
    assert any(str(path) in line for line in lines) and not (tmp_path / "run").exists()
    assert not recwarn.list, "torch's warnings are lines on standard error, too"


def test_a_folder_of_hostile_states_is_left_as_it_was(state, base, tmp_path, capsys):
    for name in ("checkpoint.pt", "previous.pt"):
        torch.save(state | {"step": NAN}, tmp_path / name)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(SystemExit) as stop:
        call(*base, "--out-dir", tmp_path)
    assert stop.value.code == 2 and "checkpoint.pt" in capsys.readouterr().err
    assert before == {path.name: path.read_bytes() for path in tmp_path.iterdir()}


def test_a_hostile_newest_state_gives_way_to_the_one_before(state, base, tmp_path, capsys):
    torch.save(state | {"step": 1, "args": state["args"] | {"out_dir": str(tmp_path)}},
               tmp_path / "previous.pt")
    torch.save(replaced(state, ["optimizer", "state", 0, "exp_avg"], ODD["nan_in"]),
               tmp_path / "checkpoint.pt")
    run = train.prepare(parse(*base, "--out-dir", tmp_path))
    assert run.step == 1 and "checkpoint.pt" in capsys.readouterr().err
