"""A project for Hugging Face's kernel builder in a folder of its own: python kernels/hub/assemble.py FOLDER

    FOLDER/build.toml, flake.nix, CARD.md     from here
    FOLDER/torch-ext/unif2ace_kernels/        the package, without the compiled extension and without _ops.py, which
                                              the builder writes: a namespace for every build

Then, with the builder installed, `cd FOLDER && git init && git add . && kernel-builder build`. It is put together and
not kept because the builder puts a pyproject.toml and a setup.py of its own beside build.toml.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

HERE = Path(__file__).parent
PACKAGE = HERE.parent / "unif2ace_kernels"


def assemble(folder: Path) -> None:
    """Write the project; `folder` must be empty or not there."""
    if folder.exists() and any(folder.iterdir()):
        raise SystemExit(f"{folder}: expected an empty folder")
    target = folder / "torch-ext" / PACKAGE.name
    left_out = shutil.ignore_patterns("_C*.so", "_build.json", "_ops.py", "transformers.py", "__pycache__")
    shutil.copytree(PACKAGE, target, ignore=left_out)
    for name in ("build.toml", "flake.nix", "CARD.md"):
        shutil.copy(HERE / name, folder)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise SystemExit("usage: assemble.py FOLDER")
    assemble(Path(sys.argv[1]))
