"""The compiled extension of the distribution unif2ace-kernels; pyproject.toml has all else."""

import sys
from pathlib import Path

from setuptools import Extension, setup

# pip runs this file without its folder on the path.
sys.path.insert(0, str(Path(__file__).parent))

from build_extension import BuildExtension, SourceDistribution  # noqa: E402

setup(
    ext_modules=[Extension("unif2ace_kernels._C", [])],
    cmdclass={"build_ext": BuildExtension, "sdist": SourceDistribution},
)
