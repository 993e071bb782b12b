"""The five rules of the house, held by the import statements and by what importing does.

Each rule is a function that returns its violations in a tree of sources, so that a second test can show, on a small
tree that breaks it, that the rule is able to fail.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
KERNELS = "kernels/unif2ace_kernels"
STANDARD = set(sys.stdlib_module_names)
# Modules of the kernels that bring them to a library which they do not need: each may import that library, and stays
# outside until a user imports it by name.
BRIDGES = {"transformers.py": "transformers"}


def imported_modules(file: Path, package_root: Path) -> set[str]:
    """Absolute dotted names that `file` imports, relative ones resolved, functions' own imports included."""
    parts = file.relative_to(package_root).with_suffix("").parts
    names = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = list(parts[: len(parts) - node.level]) if node.level else []
            prefix = ".".join([*base, *([node.module] if node.module else [])])
            names |= {f"{prefix}.{alias.name}" for alias in node.names}
    return names


def sources(root: Path, folder: str) -> list[Path]:
    return sorted((root / folder).rglob("*.py"))


def kernels_import_torch_and_triton_alone(root: Path) -> list[str]:
    """Rule 1, downwards: the kernels know torch and Triton, nothing above and nothing beside them but a bridge's."""
    allowed = STANDARD | {"torch", "triton", "unif2ace_kernels"}
    return [
        f"{file.relative_to(root)} imports {name}"
        for file in sources(root, KERNELS)
        for name in sorted(imported_modules(file, root / "kernels"))
        if name.partition(".")[0] not in allowed | {BRIDGES.get(file.relative_to(root / KERNELS).as_posix())}
    ]


def nothing_imports_a_bridge(root: Path) -> list[str]:
    """Rule 1: the kernels are whole without their bridges."""
    bridges = tuple(f"unif2ace_kernels.{Path(each).stem}" for each in BRIDGES)
    return [
        f"{file.relative_to(root)} imports {name}"
        for file in sources(root, KERNELS)
        for name in sorted(imported_modules(file, root / "kernels"))
        if name.startswith(bridges)
    ]


def references_import_torch_alone(root: Path) -> list[str]:
    """Rule 2: reference.py stands alone; of the package it may use the shared truth, _philox and _checks."""
    shared = ("unif2ace_kernels._philox", "unif2ace_kernels._checks")
    return [
        f"{file.relative_to(root)} imports {name}"
        for file in sources(root, KERNELS)
        if file.name == "reference.py"
        for name in sorted(imported_modules(file, root / "kernels"))
        if name.partition(".")[0] not in STANDARD | {"torch"} and not name.startswith(shared)
    ]


def rooms_are_strangers(root: Path) -> list[str]:
    """Rule 2: no room imports another; what they share goes up to a _*.py."""
    rooms = {path.parent.name for path in (root / KERNELS).glob("*/__init__.py")}
    return [
        f"{file.relative_to(root)} imports {name}"
        for room in sorted(rooms)
        for file in sources(root, f"{KERNELS}/{room}")
        for name in sorted(imported_modules(file, root / "kernels"))
        for other in sorted(rooms - {room})
        if f"{name}.".startswith(f"unif2ace_kernels.{other}.")
    ]


def calls(file: Path) -> set[str]:
    """Names of the functions and methods that `file` calls."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Call):
            found.add(node.func.id if isinstance(node.func, ast.Name) else getattr(node.func, "attr", ""))
    return found


def only_ops_register(root: Path) -> list[str]:
    """Rule 3: ops come into being in ops.py, through _library.register."""
    registering = {"register", "register_fake", "register_autograd", "custom_op", "triton_op", "register_kernel"}
    return [
        f"{file.relative_to(root)} calls {name}"
        for file in sources(root, KERNELS)
        for name in sorted(calls(file) & registering)
        if not (file.name == "_library.py" or (file.name == "ops.py" and name == "register"))
    ]


def only_library_touches_the_extension(root: Path) -> list[str]:
    """Rule 3: the compiled extension is loaded, and its namespace named, in _library.py alone."""
    return [
        f"{file.relative_to(root)} mentions {word}"
        for file in sources(root, KERNELS) + sources(root, "unif2ace")
        if file.name != "_library.py"
        for word in ("unif2ace_native", "load_library", "import _C", "_C_ops", "_C_", "unif2ace_kernels._C")
        if word in file.read_text()
    ]


def kernels_is_no_package(root: Path) -> list[str]:
    """`kernels` is the import name of a Hugging Face package, which an __init__.py here would hide."""
    return [str(path.relative_to(root)) for path in (root / "kernels").glob("__init__.py")]


# Rule, and the smallest tree that breaks it: path -> content.
RULES = [
    (kernels_import_torch_and_triton_alone, {f"{KERNELS}/moe/ops.py": "def f():\n    from unif2ace.model import x\n"}),
    (kernels_import_torch_and_triton_alone, {f"{KERNELS}/moe/ops.py": "import transformers\n"}),
    (kernels_import_torch_and_triton_alone, {f"{KERNELS}/transformers.py": "import numpy\n"}),
    (kernels_import_torch_and_triton_alone, {f"{KERNELS}/moe/transformers.py": "import transformers\n"}),
    (nothing_imports_a_bridge, {f"{KERNELS}/__init__.py": "from . import transformers\n"}),
    (nothing_imports_a_bridge, {f"{KERNELS}/moe/ops.py": "def f():\n    from ..transformers import NAME\n"}),
    (references_import_torch_alone, {f"{KERNELS}/moe/reference.py": "from .ops import route\n"}),
    (references_import_torch_alone, {f"{KERNELS}/moe/reference.py": "import numpy\n"}),
    (
        rooms_are_strangers,
        {
            f"{KERNELS}/moe/__init__.py": "",
            f"{KERNELS}/d3diff/__init__.py": "",
            f"{KERNELS}/moe/ops.py": "from ..d3diff import ops\n",
        },
    ),
    (only_ops_register, {f"{KERNELS}/moe/modules.py": "from .._library import register\nregister('f()')\n"}),
    (only_ops_register, {f"{KERNELS}/moe/ops.py": "import torch\ntorch.library.custom_op('a::b')(f)\n"}),
    (only_library_touches_the_extension, {f"{KERNELS}/moe/ops.py": "torch.ops.unif2ace_native.gumbel\n"}),
    (only_library_touches_the_extension, {"unif2ace/a.py": "torch.ops.load_library('x')\n"}),
    (kernels_is_no_package, {"kernels/__init__.py": ""}),
]


@pytest.mark.parametrize("rule", dict.fromkeys(rule for rule, _ in RULES), ids=lambda rule: rule.__name__)
def test_rule_holds(rule):
    assert rule(ROOT) == []


@pytest.mark.parametrize(("rule", "tree"), RULES, ids=lambda each: getattr(each, "__name__", None))
def test_rule_can_fail(rule, tree, tmp_path):
    for name, content in tree.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(content)
    assert len(rule(tmp_path)) >= 1


# What importing does, in a process of its own. {blocked} names modules that must be neither needed nor imported.
IMPORT = """
import sys
sys.path.insert(0, {path!r})
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {blocked!r}:
            raise ImportError(name + " is blocked")
sys.meta_path.insert(0, Blocker())
import torch
def refuse(*arguments, **options):
    raise AssertionError("importing asked for a device")
for name in ("init", "_lazy_init", "is_available", "device_count", "current_device", "get_device_capability",
             "get_device_properties", "get_device_name", "mem_get_info"):
    setattr(torch.cuda, name, refuse)
import {module}
assert not torch.cuda.is_initialized()
assert not set({blocked!r}) & {{name.partition(".")[0] for name in sys.modules}}
print("imported")
"""


def import_in_a_new_process(path: Path, module: str, blocked: tuple[str, ...]) -> str:
    code = IMPORT.format(path=str(path), module=module, blocked=blocked)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=path)
    return done.stdout.strip() or done.stderr


@pytest.mark.parametrize("blocked", [(), ("triton",), ("transformers", "unif2ace", "einops")], ids=str)
def test_importing_needs_torch_alone_and_no_device(blocked):
    assert import_in_a_new_process(ROOT / "kernels", "unif2ace_kernels", blocked) == "imported"


@pytest.mark.parametrize(
    ("content", "blocked", "message"),
    [
        ("import triton", ("triton",), "triton is blocked"),
        ("import torch\ntorch.cuda.is_available()", (), "importing asked for a device"),
        ("import torch\ntorch.cuda.current_device()", (), "importing asked for a device"),
    ],
)
def test_importing_can_fail(content, blocked, message, tmp_path):
    (tmp_path / "toy.py").write_text(content)
    assert message in import_in_a_new_process(tmp_path, "toy", blocked)
