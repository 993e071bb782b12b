"""The kernels are typed: strict for mypy; around the Triton kernels, which no checker reads, annotated all the same."""

import ast
import re
from pathlib import Path

import pytest

import unif2ace_kernels

PACKAGE = Path(unif2ace_kernels.__file__).parent
ROOT = Path(__file__).parents[2]
SETTINGS = (ROOT / "pyproject.toml").read_text()
# What `mypy --strict` turns on and a part of the code can have of its own; --no-untyped-calls but for torch.
STRICT = {
    "check_untyped_defs", "disallow_any_generics", "disallow_incomplete_defs", "disallow_subclassing_any",
    "disallow_untyped_calls", "disallow_untyped_decorators", "disallow_untyped_defs", "extra_checks",
    "no_implicit_reexport", "strict_equality", "warn_return_any", "warn_unused_ignores",
}  # fmt: skip


def bare(source: str) -> list[str]:
    """Functions without an annotation of an argument or of the result, Triton's own left out."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.FunctionDef) or any("triton.jit" in ast.unparse(d) for d in node.decorator_list):
            continue
        given = node.args
        arguments = [*given.posonlyargs, *given.args, *given.kwonlyargs, given.vararg, given.kwarg]
        typed = all(each is None or each.annotation or each.arg in ("self", "cls") for each in arguments)
        if not typed or node.returns is None:
            found.append(node.name)
    return found


def test_both_packages_say_that_they_are_typed():
    assert (PACKAGE / "py.typed").exists() and (ROOT / "unif2ace" / "py.typed").exists()


@pytest.mark.parametrize("file", sorted(PACKAGE.rglob("*.py")), ids=lambda file: str(file.relative_to(PACKAGE)))
def test_every_function_is_annotated(file):
    assert bare(file.read_text()) == []


@pytest.mark.parametrize(
    "source", ["def f(x): ...", "def f(x: int): ...", "def f(*x) -> None: ...", "def f(x) -> int: ..."]
)
def test_a_bare_function_is_seen(source):
    assert bare(source) == ["f"]
    assert bare("@triton.jit\n" + source) == []


def test_mypy_is_strict_on_the_kernels():
    parts = SETTINGS.split("[[tool.mypy.overrides]]")[1:]
    (strict,) = [part for part in parts if 'module = "unif2ace_kernels.*"' in part]
    assert set(re.findall(r"^(\w+) = true$", strict, re.MULTILINE)) >= STRICT
    (loose,) = [part for part in parts if "_triton" in part]
    exempt = set(re.findall(r'"(unif2ace_kernels[\w.]+)"', loose))
    files = {
        f"unif2ace_kernels.{'.'.join(f.relative_to(PACKAGE).with_suffix('').parts)}"
        for f in PACKAGE.rglob("*_triton.py")
    }
    assert exempt == files
