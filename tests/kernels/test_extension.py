"""The compiled extension: what it exposes, what it says when a part is missing, and that every .cu compiles clean."""

import importlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from unif2ace_kernels import _library

ROOT = Path(__file__).parents[2]
CUDA_SOURCES = sorted((ROOT / "csrc").glob("*/*.cu"))

needs_ops = pytest.mark.skipif(
    _library.EXTENSION_MISSING is not None, reason=f"extension not built: {_library.EXTENSION_MISSING}"
)
needs_module = pytest.mark.skipif(
    importlib.util.find_spec("unif2ace_kernels._C") is None, reason="extension not built: no _C module"
)


@needs_module
def test_build_information():
    information = _library.build_information()
    assert set(information) == {"compiler", "nvcc", "cuda_archs", "torch"}
    assert information["compiler"]


@needs_ops
def test_native_ops_have_the_schemas_of_the_public_ones():
    native = [name for name in torch._C._dispatch_get_all_op_names() if name.startswith("unif2ace_native::")]
    assert "unif2ace_native::gumbel" in native
    for name in native:
        short = name.partition("::")[2]
        if short not in _library.registered_ops():
            continue
        ours = str(getattr(torch.ops.unif2ace_native, short).default._schema)
        public = str(getattr(torch.ops.unif2ace, short).default._schema)
        assert ours.partition("::")[2] == public.partition("::")[2].replace("SymInt", "int")


@needs_ops
def test_native_ops_check_what_memory_safety_hangs_on():
    with pytest.raises(RuntimeError, match="seed: expected one int64"):
        torch.ops.unif2ace_native.gumbel(torch.zeros(1), torch.zeros(1, dtype=torch.int64), 2, 2, 0)


def test_compiled_gives_the_reason_when_it_cannot_run(monkeypatch):
    monkeypatch.setattr(_library, "EXTENSION_MISSING", "not built: no C++ compiler")
    assert _library.compiled("gumbel", "cpu").missing == "not built: no C++ compiler"
    monkeypatch.setattr(_library, "EXTENSION_MISSING", None)
    monkeypatch.setattr(_library, "_LEFT_OUT", {"cuda c++": "no nvcc: none of nvcc found"})
    assert _library.compiled("no_such_op", "cuda").missing == "built without it: no nvcc: none of nvcc found"
    monkeypatch.setattr(_library, "_LEFT_OUT", {})
    absent = _library.compiled("no_such_op", "cpu")
    assert absent.missing == "the extension that was built has no no_such_op for cpu: build it again"
    assert absent.function is None


@pytest.mark.parametrize("text", ["", "{", "[]", '{"missing": null}', '{"missing": []}', '{"compiler": "c++"}'])
def test_a_damaged_build_record_is_told_and_breaks_nothing(tmp_path, text):
    (tmp_path / "_build.json").write_text(text)
    missing, left_out = _library._load_extension(tmp_path)
    assert missing.startswith("not built: _build.json cannot be read (")
    assert left_out.keys() == {"c++", "cuda c++"}


def test_without_a_build_the_reason_says_how_to_build(tmp_path):
    missing, left_out = _library._load_extension(tmp_path)
    assert "pip install --no-build-isolation ." in missing and left_out == {}


@pytest.fixture
def build(tmp_path):
    """Runs the build in a copy of the tree; returns (record, names of the files it left in the package)."""
    built = shutil.ignore_patterns("*.so", "_build.json", "__pycache__")
    for name in ("csrc", "kernels"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=built)
    shutil.copy(ROOT / "setup.py", tmp_path)

    def run(**environment: str) -> tuple[dict, set[str]]:
        done = subprocess.run(
            [sys.executable, "setup.py", "-q", "build_ext", "--inplace"],
            cwd=tmp_path,
            env={**os.environ, **environment},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        package = tmp_path / "kernels" / "unif2ace_kernels"
        return json.loads((package / "_build.json").read_text()), {path.name for path in package.glob("_C*.so")}

    return run


def test_build_without_a_compiler_is_no_error(build):
    record, libraries = build(CXX="none")
    assert libraries == set()
    assert record["missing"]["compiler"] == "no C++ compiler: CXX=none"
    assert all(record["missing"].values())


def test_build_with_a_failing_compiler_is_no_error(build):
    record, libraries = build(CXX="false")
    assert libraries == set()
    assert "false failed with status 1" in record["missing"]["compiler"]


def test_build_with_tools_that_say_something_odd_is_no_error(build, tmp_path):
    silent, toy = tmp_path / "silent", tmp_path / "toy"
    silent.write_text("#!/bin/sh\n")
    toy.write_text("#!/bin/sh\necho toy 1\n[ $1 = --version ]\n")
    for tool in (silent, toy):
        tool.chmod(0o755)
    record, _ = build(CXX=str(silent))
    assert record["missing"]["compiler"] == f"{silent} does not say which version it is: ''"
    record, libraries = build(CXX=str(toy), NVCC=str(toy), UNIF2ACE_CUDA_ARCHS="90a")
    assert record["compiler"] == "toy 1" and libraries == set()
    assert record["missing"]["cuda c++"] == f"{toy} does not say which version it is: 'toy 1'"
    assert "toy failed with status 1" in record["missing"]["c++"]


def test_an_object_whose_compiler_was_cut_off_is_compiled_again(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(ROOT / "kernels")
    module = importlib.import_module("build_extension")
    compiler, source = tmp_path / "compiler", tmp_path / "source.cpp"
    source.touch()
    command = [(source, [str(compiler)])]
    for ends in ("kill -9 $$", "true"):
        compiler.write_text(f"#!/bin/sh\nwhile [ $1 != -o ]; do shift; done\nprintf '{ends}' >$2\n{ends}\n")
        compiler.chmod(0o755)
        if ends == "true":
            [built] = module.compile_objects(command, tmp_path / "objects")
        else:
            with pytest.raises(module.CannotBuild):
                module.compile_objects(command, tmp_path / "objects")
    assert Path(built).read_text() == "true"


@pytest.mark.skipif(shutil.which("c++") is None, reason="needs a C++ compiler")
@pytest.mark.slow  # compiles every room's C++
def test_build_without_nvcc_leaves_out_cuda_alone(build):
    record, libraries = build(NVCC="none", UNIF2ACE_CUDA_ARCHS="90a")
    assert "_C_ops.so" in libraries
    assert record["missing"]["c++"] is None
    assert record["missing"]["cuda c++"] == "no nvcc: NVCC=none"


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")
@pytest.mark.parametrize("source", CUDA_SOURCES, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_cuda_source_compiles_without_a_warning(source, tmp_path):
    command = ["nvcc", "-std=c++17", "-O3", "-Werror", "all-warnings", "-Xcompiler", "-fPIC,-Wall,-Wextra,-Werror"]
    command += [f"-I{ROOT / 'csrc'}", "-gencode", "arch=compute_90a,code=sm_90a", "-c", str(source)]
    done = subprocess.run([*command, "-o", str(tmp_path / "out.o")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
