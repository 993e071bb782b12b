"""The kernels as others take them: a wheel and a source distribution that need torch alone, and the Hub's layout."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
KERNELS = ROOT / "kernels"
OUTSIDE = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
USE = """
import json, sys, torch, unif2ace_kernels as kernels
from unif2ace_kernels import explain, moe
layer = moe.GroupedMoE(16, 8, experts_per_group=4, top_k=2)
y, routing = layer(torch.randn(9, 16), torch.arange(9) % 2)
(y.sum() + routing.balance_loss).backward()
stranger = [name for name in ("transformers", "unif2ace", "numpy") if name in sys.modules]
print(json.dumps([kernels.__file__, explain("moe_experts").implementation, list(y.shape), stranger]))
"""


def torch_alone(folder: Path) -> Path:
    """Site packages with torch and what torch itself needs, as links; nothing else of this environment."""
    wanted, seen = ["torch"], set()
    while wanted:
        name = re.match(r"[\w.-]+", wanted.pop())[0]
        if name in seen:
            continue
        seen.add(name)
        try:
            distribution = importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:
            continue  # for another platform, or optional
        wanted += [each for each in distribution.requires or [] if "extra ==" not in each]
        for top in {file.parts[0] for file in distribution.files or [] if file.parts[0] not in ("..", "__pycache__")}:
            link = folder / top
            if not link.exists():
                link.symlink_to(distribution.locate_file(top))
    return folder


def environment(folder: Path, wheel: Path) -> Path:
    """The Python of a new environment with torch, without pip, and with `wheel`."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    python = folder / "bin" / "python"
    (site,) = folder.glob("lib/python*/site-packages")
    torch_alone(site)
    pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "-q", "--no-index", "--no-deps"]
    subprocess.run([*pip, str(wheel)], check=True, env=OUTSIDE)
    return python


def build(source: Path, target: Path, **variables: str) -> Path:
    """The wheel of `source`, by the command that the page of the kernels has."""
    command = ["pip", "wheel", "--no-build-isolation", "--no-deps", str(source), "-w", str(target)]
    assert "pip wheel --no-build-isolation --no-deps ./kernels -w dist" in (KERNELS / "README.md").read_text()
    done = subprocess.run(
        [sys.executable, "-m", *command], env={**os.environ, **variables}, capture_output=True, text=True, cwd=target
    )
    assert done.returncode == 0, done.stderr + done.stdout
    (wheel,) = target.glob("*.whl")
    return wheel


def use(python: Path, folder: Path) -> tuple[str, str, list[int], list[str]]:
    done = subprocess.run([str(python), "-c", USE], capture_output=True, text=True, cwd=folder, env=OUTSIDE)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture
def tree(tmp_path):
    """A copy of what the build reads, so that it leaves nothing in the working tree."""
    ignore = shutil.ignore_patterns("_C*.so", "_build.json", "__pycache__", "build", "*.egg-info")
    for name in ("csrc", "kernels"):
        shutil.copytree(ROOT / name, tmp_path / "tree" / name, ignore=ignore)
    shutil.copy(ROOT / "LICENSE", tmp_path / "tree")
    return tmp_path / "tree"


def test_a_wheel_of_the_kernels_needs_torch_alone(tree, tmp_path):
    wheel = build(tree / "kernels", tmp_path, CXX="none")
    with zipfile.ZipFile(wheel) as file:
        names = set(file.namelist())
        (metadata,) = (file.read(name).decode() for name in names if name.endswith("/METADATA"))
    assert {name.partition("/")[0] for name in names} == {
        "unif2ace_kernels",
        wheel.name.partition("-cp")[0] + ".dist-info",
    }
    sources = {str(path.relative_to(KERNELS)) for path in (KERNELS / "unif2ace_kernels").rglob("*.py")}
    assert sources | {"unif2ace_kernels/py.typed", "unif2ace_kernels/moe/README.md"} <= names
    assert re.findall("^Requires-Dist: (.*)$", metadata, re.MULTILINE) == ["torch>=2.11"]
    python = environment(tmp_path / "environment", wheel)
    where, implementation, shape, stranger = use(python, tmp_path)
    assert Path(where).is_relative_to(tmp_path / "environment") and shape == [9, 16] and stranger == []
    assert implementation == "torch"


@pytest.mark.skipif(shutil.which("c++") is None, reason="needs a C++ compiler")
@pytest.mark.slow  # compiles every room's C++
def test_a_source_distribution_builds_the_extension(tree, tmp_path):
    command = [sys.executable, "setup.py", "-q", "sdist", "-d", str(tmp_path)]
    subprocess.run(command, check=True, cwd=tree / "kernels", capture_output=True)
    (archive,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as file:
        file.extractall(tmp_path / "alone", filter="data")
    (source,) = (tmp_path / "alone").iterdir()
    assert (source / "csrc/moe/experts.cpp").exists() and (source / "csrc/common/philox.cuh").exists()
    wheel = build(source, tmp_path)
    python = environment(tmp_path / "environment", wheel)
    assert use(python, tmp_path)[1] == "c++"


# ---------------------------------------------------------------------------------------------- the Hub's layout

# Of kernels-data/src/config/v5.rs in github.com/huggingface/kernels: unknown fields are refused there.
GENERAL = {"name": str, "version": int, "edition": int, "license": str, "backends": list}
OPTIONAL = {"upstream", "source", "cuda", "hub", "kernel-depends", "python-depends"}
BACKENDS = {"cann", "cpu", "cuda", "metal", "neuron", "rocm", "tpu", "xpu"}
NOARCH = {"pyext", "cuda_capabilities", "rocm_archs"}
# What the builder writes into the package: kernel-builder/src/pyproject/templates/torch/noarch/_ops.py there.
OPS = """
import torch
ops = getattr(torch.ops, "_unif2ace_kernels_cpu_{id}")
def add_op_namespace_prefix(op_name):
    return f"_unif2ace_kernels_cpu_{id}::{{op_name}}"
"""
# As the kernels package loads a build: by path, under a name of its own.
LOAD = """
import importlib.util, json, sys, torch
loaded = []
for number, path in enumerate(sys.argv[1:]):
    name = f"unif2ace_kernels_{number}"
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    loaded.append(module)
results = []
for module in loaded:
    layer = module.moe.GroupedMoE(16, 8, experts_per_group=4, top_k=2)
    y, _ = layer(torch.ones(9, 16), torch.arange(9) % 2)
    y.sum().backward()
    ids = module.sampling.sample_from_logits(torch.randn(1, 3, 5), None, torch.full((1, 3), 5), 5, seed=1)[0]
    results.append([list(y.shape), list(ids.shape), module._library.NAMESPACE])
print(json.dumps([results, "unif2ace_kernels" in sys.modules, hasattr(torch.ops.unif2ace, "moe_route")]))
"""


@pytest.fixture
def hub(tmp_path):
    subprocess.run([sys.executable, str(KERNELS / "hub" / "assemble.py"), str(tmp_path / "hub")], check=True)
    return tmp_path / "hub"


def problems(build: dict) -> list[str]:
    """What the kernel builder would refuse in a build.toml of edition 5 without compiled kernels."""
    general, noarch = build.get("general", {}), build.get("torch-noarch", {})
    found = [f"unknown section {name}" for name in sorted(build.keys() - {"general", "torch-noarch"})]
    found += [f"no {name}" for name in sorted(GENERAL.keys() - general.keys())]
    found += [f"unknown {name}" for name in sorted(general.keys() - GENERAL.keys() - OPTIONAL)]
    found += [f"{name} is no {kind.__name__}" for name, kind in GENERAL.items()
              if name in general and type(general[name]) is not kind]  # fmt: skip
    found += [f"unknown backend {name}" for name in general.get("backends", []) if name not in BACKENDS]
    found += [f"unknown torch-noarch {name}" for name in sorted(noarch.keys() - NOARCH)]
    if "torch-noarch" not in build:
        found.append("no torch-noarch")
    if general.get("edition") != 5:
        found.append("edition is not 5")
    if not re.fullmatch(r"[a-z][-a-z0-9]*[a-z0-9]", str(general.get("name"))):
        found.append("name")
    return found


def read_toml(path: Path) -> dict:
    tomllib = pytest.importorskip("tomllib", reason="needs Python 3.11 or later")
    return tomllib.loads(path.read_text())


def test_the_hub_accepts_the_layout(hub):
    build = read_toml(hub / "build.toml")
    assert problems(build) == []
    name = build["general"]["name"].replace("-", "_")
    assert (hub / "torch-ext" / name / "__init__.py").exists()
    assert not list((hub / "torch-ext" / name).glob("_C*")) + list((hub / "torch-ext" / name).glob("_ops.py"))
    assert {path.name for path in hub.iterdir()} == {"build.toml", "flake.nix", "CARD.md", "torch-ext"}


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda build: build["general"].update(name="unif2ace_kernels"), "name"),
        (lambda build: build["general"].pop("license"), "no license"),
        (lambda build: build["general"].update(universal=True), "unknown universal"),
        (lambda build: build["general"].update(backends=["cuda", "gpu"]), "unknown backend gpu"),
        (lambda build: build["general"].update(edition=4), "edition is not 5"),
        (lambda build: build.update(torch={}), "unknown section torch"),
        (lambda build: build["torch-noarch"].update({"cuda-capabilities": ["9.0"]}),
         "unknown torch-noarch cuda-capabilities"),
    ],
)  # fmt: skip
def test_what_the_hub_refuses_is_seen(hub, change, problem):
    build = read_toml(hub / "build.toml")
    change(build)
    assert problems(build) == [problem]


def test_two_builds_load_by_path_in_one_process(hub, tmp_path):
    """Under any module name and beside one another: relative imports, and a namespace of ops for each build."""
    paths = []
    for number in range(2):
        variant = tmp_path / f"variant{number}"
        shutil.copytree(hub / "torch-ext" / "unif2ace_kernels", variant)
        (variant / "_ops.py").write_text(OPS.format(id=number))
        paths.append(str(variant / "__init__.py"))
    done = subprocess.run(
        [sys.executable, "-c", LOAD, *paths], capture_output=True, text=True, cwd=tmp_path, env=OUTSIDE
    )
    assert done.returncode == 0, done.stderr
    results, has_ours, has_our_ops = json.loads(done.stdout)
    assert results == [[[9, 16], [1, 3], f"_unif2ace_kernels_cpu_{number}"] for number in range(2)]
    assert not has_ours and not has_our_ops
