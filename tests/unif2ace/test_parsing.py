"""Libraries that parse files from outside stand behind one boundary; what a file claims is held against its size."""

from __future__ import annotations

import ast
import errno
import io
import json
import resource
import struct
import tarfile
import tokenize
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest

from unif2ace.data.samples import SampleError
from unif2ace.errors import UserError
from unif2ace.parsing import array, array_header, parsing, read_arrays, reading
from unif2ace.settings import read_settings

ROOT = Path(__file__).parents[2] / "unif2ace"
# Calls by which a library parses a file's bytes.
PARSERS = {
    "json.loads", "json.load", "yaml.safe_load", "np.load", "Image.open", "tarfile.open", "gzip.open", "torch.load",
    "safe_open", "load_file", "read_metadata", "read_row_group", "load_from_disk", "InferenceSession", "from_file",
    "from_pretrained", "imdecode", "raw_decode", "read_array_header_1_0", "create_model", "ZipFile",
}  # fmt: skip
# What reads a text of their own making, a line of an own journal, or an answer: each with account of its damage.
ELSEWHERE = {
    "journal.py", "training/journal.py", "planning/plan.py", "safety/watermark.py",
    "endpoint/transport.py", "endpoint/serving.py", "endpoint/prompts.py",
}  # fmt: skip


def outside(source: str) -> list[str]:
    """Calls of PARSERS that stand in no `with parsing(...)` or `with reading(...)`."""
    found = []

    def walk(node: ast.AST, guarded: bool) -> None:
        if isinstance(node, ast.With):
            calls = {ast.unparse(item.context_expr).partition("(")[0] for item in node.items}
            guarded = guarded or bool(calls & {"parsing", "reading"})
        if isinstance(node, ast.Call) and not guarded:
            name, writes = ast.unparse(node.func), any(mark in ast.unparse(node) for mark in ("dumps", "'w'", "'wb'"))
            if (name in PARSERS or name.rpartition(".")[2] in PARSERS) and not writes:
                found.append(f"line {node.lineno}: {name}")
        for child in ast.iter_child_nodes(node):
            walk(child, guarded)

    walk(ast.parse(source), False)
    return found


def test_every_parser_of_files_stands_behind_the_boundary():
    files = {path.relative_to(ROOT).as_posix(): path for path in ROOT.rglob("*.py")}
    found = {name: outside(path.read_text()) for name, path in files.items() if name not in ELSEWHERE}
    assert {name: calls for name, calls in found.items() if calls} == {}


def test_a_parser_before_the_boundary_is_found():
    assert outside("with reading(path, 'x'):\n    pass\nx = json.loads(y)") == ["line 3: json.loads"]
    assert outside("with parsing(z), open(p) as f:\n    x = np.load(f)") == []


KINDS = [
    ValueError, SyntaxError, OverflowError, KeyError, IndexError, RecursionError, AssertionError, EOFError,
    struct.error, zlib.error, tokenize.TokenError, UnicodeError, AttributeError, TypeError, Exception,
]  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_whatever_a_parser_raises_is_one_line_that_names_the_file(kind):
    with pytest.raises(UserError, match=r"^some\.bin is damaged or no thing \(.+\): copy it again$") as raised:
        with reading("some.bin", "thing"):
            raise kind("a\nb")
    assert "\n" not in str(raised.value) and isinstance(raised.value.__cause__, kind)


@pytest.mark.parametrize("kind", [MemoryError, KeyboardInterrupt, SystemExit, GeneratorExit])
def test_what_is_the_machines_or_the_users_goes_through(kind):
    with pytest.raises(kind), reading("some.bin", "thing"):
        raise kind


def test_a_file_that_is_missing_or_cannot_be_read(tmp_path):
    with pytest.raises(UserError, match="x is missing$"), reading(tmp_path / "x", "thing"):
        (tmp_path / "x").read_bytes()
    with pytest.raises(UserError, match="^cannot read .*: Is a directory$"), reading(tmp_path, "thing"):
        tmp_path.read_bytes()
    with pytest.raises(UserError, match="^cannot read x: Input/output error$"), reading("x", "thing"):
        raise OSError(errno.EIO, "Input/output error")
    with pytest.raises(UserError, match="^x is damaged or no thing"), reading("x", "thing"):
        raise OSError("a library's own word")
    with pytest.raises(UserError, match="^x is damaged or no thing"), reading("x", "thing"):
        raise OSError(errno.EINVAL, "Invalid argument")  # as of a seek to a negative place


def test_other_errors_can_be_asked_for():
    with pytest.raises(SampleError, match=r"here: not JSON \(Expecting value"):
        with parsing(lambda why: SampleError("here", f"not JSON ({why})")):
            json.loads("")


# ------------------------------------------------------------------------------------------- headers that lie


@pytest.fixture
def little_memory():
    """256 MiB above what is there."""
    with open("/proc/self/statm") as file:
        used = int(file.read().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + (256 << 20), before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


def npy(header: str) -> bytes:
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header.encode() + bytes(64)


def described(shape: str, dtype: str = "<f4") -> str:
    return f"{{'descr': '{dtype}', 'fortran_order': False, 'shape': {shape}, }}\n"


LYING = {
    "nested": "[1," * 300,  # Python's parser calls this a lack of memory
    "signs": "-" * 9000 + "1",
    "large": described("(1099511627776,)"),
    "beyond a whole number": described(f"({10**30},)"),
    "negative": described("(-3,)"),
    "nothing in each": described("(1099511627776,)", "|V0"),
    "objects": described("(2,)", "|O"),
    "a shape of texts": described("('a',)"),
}


@pytest.mark.parametrize("header", LYING.values(), ids=LYING)
def test_an_array_that_lies_costs_no_memory(header, little_memory):
    with pytest.raises(ValueError, match="it h|its header"):
        array(memoryview(npy(header)))


@pytest.mark.parametrize("header", LYING.values(), ids=LYING)
def test_an_archive_that_lies_costs_no_memory(header, tmp_path, little_memory):
    with zipfile.ZipFile(tmp_path / "x.npz", "w") as file:
        file.writestr("a.npy", npy(header))
    with pytest.raises(UserError, match=r"x\.npz is damaged or no set"):
        read_arrays(tmp_path / "x.npz", "set")


def test_an_archive_is_read(tmp_path):
    arrays = {"a": np.arange(6, dtype=np.int16).reshape(2, 3), "b": np.array("words"), "c": np.empty((0, 3))}
    np.savez(tmp_path / "x.npz", **arrays)
    found = read_arrays(tmp_path / "x.npz", "set")
    assert found.keys() == arrays.keys() and all(np.array_equal(found[name], arrays[name]) for name in arrays)
    assert found["a"].flags.writeable and array_header.cache_info().maxsize


@pytest.mark.parametrize("kind", [tarfile.GNUTYPE_LONGNAME, tarfile.XHDTYPE], ids=["long name", "pax"])
@pytest.mark.parametrize("size", [2**33, 2**62, -512], ids=["8 GiB", "4 EiB", "negative"])
def test_a_tar_that_lies_costs_no_memory(kind, size, tmp_path, little_memory):
    """tarfile sets aside what the header of a long name claims."""
    from unif2ace.data.shards import ShardSource

    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        whole = tarfile.TarInfo("0.txt")
        whole.size = 6
        tar.addfile(whole, io.BytesIO(b"a face"))
    lie = tarfile.TarInfo("1.txt")
    lie.type, lie.size = kind, size
    content = (tmp_path / "a.tar").read_bytes()[:1024] + lie.tobuf(tarfile.GNU_FORMAT) + bytes(512)
    (tmp_path / "a.tar").write_bytes(content)
    source = ShardSource(tmp_path / "a.tar")
    assert source[0].captions == ("a face",) and len(source) == 1
    assert source.damaged == [(str(tmp_path / "a.tar"), "the tar file is damaged at byte 1024, after 1 samples")]


def test_a_pickle_that_lies_costs_no_memory(tmp_path, little_memory):
    """torch's reader of old files, and the index of a state, ask for as many bytes as a text in them claims."""
    from unif2ace.importers.weights import Weights
    from unif2ace.training import loop, states

    lie = b"\x80\x02X" + struct.pack("<I", 2**32 - 1) + b"a text"
    for name in ("w.bin", ".metadata"):
        (tmp_path / name).write_bytes(lie)
    for read in (
        lambda: Weights(tmp_path / "w.bin", allow_pickle=True),
        lambda: loop._read_state(tmp_path / "w.bin"),
        lambda: states.names(tmp_path),
    ):
        with pytest.raises(UserError, match="is damaged"):
            read()


def test_a_member_of_negative_size_is_met_once(tmp_path):
    from unif2ace.data.shards import ShardSource

    names = []
    for number, size in enumerate((0, -1024)):
        info = tarfile.TarInfo(f"{number}.txt")
        info.size = size
        names.append(info.tobuf(tarfile.GNU_FORMAT))
    (tmp_path / "a.tar").write_bytes(b"".join(names) + bytes(512))
    with pytest.raises(UserError, match="no caption"):  # the one sample that there is says nothing
        ShardSource(tmp_path / "a.tar")


# What YAML's own constructors raise where the words are not of their kind.
@pytest.mark.parametrize(
    "text", ["2001-99-99", "!!int x", "!!timestamp x", "!!bool x", "!!float x", "9" * 5000, "[" * 1000, "{[a]: 1}"]
)
def test_a_value_of_yaml_that_is_none(text, tmp_path):
    (tmp_path / "x.yaml").write_text(f"a: {text}\n")
    with pytest.raises(UserError, match=r"x\.yaml is damaged or no YAML"):
        read_settings(tmp_path / "x.yaml", [])
    with pytest.raises(UserError, match=r"^--a=.*its value is no YAML"):
        read_settings(None, [f"--a={text}"])
