"""The optional compiled extension of unif2ace_kernels, for both setup.py: the kernels' own, and the whole project's.

It is two libraries in the package:

    _C.<abi>.so  pybind11 module: build information and host mathematics; needs a C++ compiler and pybind11
    _C_ops.so    the C++ (and, with nvcc, CUDA C++) ops over torch's stable ABI; needs torch at build time, so build
                 with --no-build-isolation

What cannot be built is left out, never an error: the reason is written to unif2ace_kernels/_build.json, from where
`unif2ace_kernels.explain` repeats it. No GPU is asked for. Environment: CXX, NVCC (paths, or "none"), and
UNIF2ACE_CUDA_ARCHS (default "80;90a;100"; named outright, they are built for a torch without CUDA too).
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools.command.build_ext import build_ext
from setuptools.command.sdist import sdist

ROOT = Path(__file__).parent.resolve()
# A source distribution of the kernels has the sources beside this file, the repository above it.
CSRC = ROOT / "csrc" if (ROOT / "csrc").exists() else ROOT.parent / "csrc"
ASKED_ARCHS = os.environ.get("UNIF2ACE_CUDA_ARCHS")
CUDA_ARCHS = [arch for arch in (ASKED_ARCHS or "80;90a;100").split(";") if arch]
TORCH_TARGET_VERSION = "0x020b000000000000ULL"  # 2.11: the stable ABI that every later torch keeps

# No contraction: csrc/common/gumbel.cuh must round as torch and Triton do. Loops with a select in them vectorise only
# where nobody watches the floating-point flags; values are the same.
HOST_FLAGS = ["-std=c++17", "-O3", "-fPIC", "-ffp-contract=off", "-fno-trapping-math", "-fno-math-errno"]
HOST_FLAGS += ["-fvisibility=hidden", "-Wall", "-Wextra"]
NVCC_FLAGS = ["-std=c++17", "-O3", "-Xcompiler", "-fPIC,-ffp-contract=off,-fvisibility=hidden,-Wall,-Wextra"]


class CannotBuild(Exception):
    """Why a part of the extension is left out."""


def run(command: list[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", cwd=ROOT)
    except OSError as error:
        raise CannotBuild(f"{command[0]} does not start: {error}") from error
    if done.returncode:
        lines = [line for line in (done.stderr + done.stdout).splitlines() if "error" in line] or ["no message"]
        raise CannotBuild(f"{Path(command[0]).name} failed with status {done.returncode}: {lines[0].strip()[:300]}")
    return done.stdout


def find_in(text: str, pattern: str, what: str) -> str:
    match = re.search(pattern, text, re.MULTILINE)
    if match is None:
        raise CannotBuild(f"{what} does not say which version it is: {text.strip()[:100]!r}")
    return match[1]


def find_tool(variable: str, names: list[str], what: str) -> str:
    asked = os.environ.get(variable)
    found = next(filter(None, map(shutil.which, [asked] if asked else names)), None)
    if found is None:
        raise CannotBuild(f"no {what}: " + (f"{variable}={asked}" if asked else f"none of {', '.join(names)} found"))
    return found


def compile_objects(jobs: list[tuple[Path, list[str]]], folder: Path) -> list[str]:
    """Compile (source, command) pairs; an object newer than every source and header is kept."""
    folder.mkdir(parents=True, exist_ok=True)
    headers = max(path.stat().st_mtime for path in CSRC.rglob("*.*h") if path.is_file())

    def compile_one(job: tuple[Path, list[str]]) -> str:
        source, command = job
        key = hashlib.sha256(" ".join([*command, str(source)]).encode()).hexdigest()[:12]
        target = folder / f"{source.stem}-{key}.o"
        if not target.exists() or target.stat().st_mtime <= max(headers, source.stat().st_mtime):
            part = target.with_suffix(".part")  # one that was cut off is not taken for an object
            run([*command, "-c", str(source), "-o", str(part)])
            part.replace(target)
        return str(target)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(compile_one, jobs))


class BuildExtension(build_ext):
    """Builds what this machine can, and records the rest with its reason."""

    def run(self) -> None:
        self.folder = Path(self.get_ext_fullpath("unif2ace_kernels._C")).resolve().parent
        self.folder.mkdir(parents=True, exist_ok=True)
        for old in self.folder.glob("_C*.so"):
            old.unlink()
        self.objects = Path(self.build_temp).resolve()
        self.record: dict = {"compiler": None, "nvcc": None, "cuda_archs": [], "torch": None}
        missing: dict[str, str | None] = {}
        cuda_objects: list[str] = []
        # Order matters: the libraries know what the steps before found out.
        for part, step in [
            ("compiler", self.find_compiler),
            ("cuda c++", lambda: cuda_objects.extend(self.compile_cuda())),
            ("c++", lambda: self.build_ops(cuda_objects)),
            ("_C", self.build_module),
        ]:
            try:
                step()
                missing[part] = None
            except CannotBuild as reason:
                missing[part] = str(reason)
                self.warn(f"unif2ace_kernels is built without {part}: {reason}")
        if missing["c++"]:
            missing["cuda c++"] = missing["cuda c++"] or missing["c++"]
        self.record["missing"] = missing
        part_written = self.folder / "_build.json.part"
        part_written.write_text(json.dumps(self.record, indent=1) + "\n")
        part_written.replace(self.folder / "_build.json")

    def find_compiler(self) -> None:
        compiler = find_tool("CXX", ["c++", "g++", "clang++"], "C++ compiler")
        self.record["compiler"] = find_in(run([compiler, "--version"]), r"^(.*\S.*)$", compiler)
        self.cxx = compiler

    def host_command(self) -> list[str]:
        if self.record["compiler"] is None:
            raise CannotBuild("no C++ compiler was found when it was built")
        return [self.cxx, *HOST_FLAGS, f"-I{CSRC}"]

    def torch_folder(self) -> Path:
        # Looked up, not imported: importing torch would start it up for the sake of a path.
        spec = importlib.util.find_spec("torch")
        if spec is None or spec.origin is None:
            raise CannotBuild("no torch at build time; install with --no-build-isolation")
        folder = Path(spec.origin).parent
        version = folder / "version.py"
        text = version.read_text() if version.exists() else ""
        self.record["torch"] = find_in(text, r"^__version__\b[^'\"]*['\"]([^'\"]+)", str(version))
        return folder

    def compile_cuda(self) -> list[str]:
        self.host_command()
        if not ((self.torch_folder() / "lib" / "libtorch_cuda.so").exists() or ASKED_ARCHS):
            raise CannotBuild("this torch has no CUDA; set UNIF2ACE_CUDA_ARCHS to build its kernels all the same")
        self.nvcc = find_tool("NVCC", ["nvcc"], "nvcc")
        self.record["nvcc"] = find_in(run([self.nvcc, "--version"]), r"release (.+)$", self.nvcc)
        command = [self.nvcc, *NVCC_FLAGS, "-ccbin", self.cxx, f"-I{CSRC}"]
        for arch in CUDA_ARCHS:
            command += ["-gencode", f"arch=compute_{arch},code=sm_{arch}"]
        if CUDA_ARCHS and CUDA_ARCHS[-1].isdigit():  # processors to come compile the last one's PTX
            command += ["-gencode", f"arch=compute_{CUDA_ARCHS[-1]},code=compute_{CUDA_ARCHS[-1]}"]
        objects = compile_objects([(source, command) for source in sorted(CSRC.glob("*/*.cu"))], self.objects)
        self.record["cuda_archs"] = CUDA_ARCHS
        return objects

    def build_ops(self, cuda_objects: list[str]) -> None:
        torch = self.torch_folder()
        command = [*self.host_command(), f"-DTORCH_TARGET_VERSION={TORCH_TARGET_VERSION}"]
        command += ["-isystem", str(torch / "include")]
        if cuda_objects:
            command.append("-DUNIF2ACE_WITH_CUDA")
        objects = compile_objects([(source, command) for source in sorted(CSRC.glob("*/*.cpp"))], self.objects)
        libraries = ["-ltorch_cpu"]
        if (torch / "lib" / "libtorch_cuda.so").exists():
            libraries.append("-ltorch_cuda")
        # nvcc links its own static runtime, so the library loads on machines without CUDA.
        linker = [self.nvcc, "-ccbin", self.cxx, "-cudart", "static"] if cuda_objects else [self.cxx]
        # torch_cuda is named by weak symbols only, which the linker would not count as a need.
        keep = ["-Xlinker", "--no-as-needed"] if cuda_objects else ["-Wl,--no-as-needed"]
        target = ["-o", str(self.folder / "_C_ops.so")]
        run([*linker, "-shared", *objects, *cuda_objects, *keep, f"-L{torch / 'lib'}", *libraries, *target])

    def build_module(self) -> None:
        try:
            import pybind11
        except ImportError as error:
            raise CannotBuild("no pybind11 at build time") from error
        command = [*self.host_command(), "-isystem", pybind11.get_include()]
        command += ["-isystem", sysconfig.get_path("include")]
        for name, value in [
            ("COMPILER", self.record["compiler"]),
            ("NVCC", self.record["nvcc"] or ""),
            ("CUDA_ARCHS", ";".join(self.record["cuda_archs"])),
            ("TORCH", self.record["torch"] or ""),
        ]:
            command.append(f"-DUNIF2ACE_{name}={json.dumps(value)}")
        objects = compile_objects([(CSRC / "bindings.cpp", command)], self.objects)
        target = self.folder / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"
        run([self.cxx, "-shared", *objects, "-o", str(target)])

    # setuptools asks for what was built, to copy it into wheels and to remove it again.
    def get_outputs(self) -> list[str]:
        package = Path(self.get_ext_fullpath("unif2ace_kernels._C")).resolve().parent
        return [str(path) for path in [*package.glob("_C*.so"), package / "_build.json"] if path.exists()]

    def get_output_mapping(self) -> dict[str, str]:
        return {}

    def get_source_files(self) -> list[str]:
        project = Path.cwd()
        inside = [path for path in sorted(CSRC.rglob("*")) if path.is_file() and path.is_relative_to(project)]
        return [str(path.relative_to(project)) for path in inside]


class SourceDistribution(sdist):
    """With the C++ sources, which lie outside the folder of the kernels."""

    def make_release_tree(self, base_dir: str, files: list[str]) -> None:
        super().make_release_tree(base_dir, files)
        shutil.copytree(CSRC, Path(base_dir) / "csrc", dirs_exist_ok=True)
