"""What only a GPU can show of training: the same losses as the CPU's, states over FSDP2 and NCCL, bf16."""

from __future__ import annotations

import signal

import pytest
import torch
import training_runs as runs

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gpu")
    return folder, runs.prepare_drawn(folder)


def losses(prepared, name: str, hook: str | None = None, **parallel):
    folder, values = prepared
    values = values | {"run": str(folder / name), "parallel": values["parallel"] | parallel}
    return runs.train(runs.write(values, folder / f"{name}.json"), hook=hook)


def test_a_gpu_computes_what_the_cpu_does(prepared):
    torch.backends.cuda.matmul.allow_tf32 = False
    expected = losses(prepared, "cpu")
    for ours, theirs in zip(losses(prepared, "cuda", device="cuda"), expected, strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-3)
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=2e-2)
    for ours, theirs in zip(losses(prepared, "bf16", device="cuda", precision="bf16"), expected, strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=3e-2)
        assert ours["memory_bytes"] > 0


@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_sharded_over_nccl_it_is_the_same_run(prepared, precision):
    """FSDP2, its reductions and its states, on a world of the one GPU that there is."""
    alone = losses(prepared, f"alone-{precision}", device="cuda", precision=precision)
    hook = "training_hooks:sharded_alone"
    sharded = losses(prepared, f"sharded-{precision}", hook, device="cuda", precision=precision)
    for ours, theirs in zip(sharded, alone, strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-4 if precision == "float32" else 3e-2)


def test_stopped_it_goes_on_where_it_was(prepared):
    folder, _ = prepared
    whole = losses(prepared, "whole", device="cuda")
    given = f"--run={folder / 'halves'}"
    with runs.Ranks(folder / "whole.json", given, hook="training_hooks:slow_steps") as ranks:
        while not (folder / "halves" / "log.jsonl").exists() or len(runs.records(folder / "halves")) < 2:
            assert ranks.wait(0.05) == [None], ranks.said
        ranks.signal(signal.SIGTERM)
        assert ranks.wait() == [128 + signal.SIGTERM], ranks.said
    for ours, theirs in zip(runs.train(folder / "whole.json", given), whole, strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-4)
