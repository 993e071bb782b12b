"""Benchmarks of the whole model: plain PyTorch gives what our ops give, and each second lands at its part."""

from __future__ import annotations

import importlib.util
import json
from unittest import mock

import pytest
import torch
from torch import nn
from torch.autograd.profiler_util import FunctionEvent

from benchmarks import gpu, measure, parts, plain, profiles, results
from benchmarks.cases import model as cases
from benchmarks.profiles import Size, Step, difference, on_plain
from unif2ace.configs import LossConfig, TokenMoEConfig

BESIDE = cases._SMOKE
IN_PLACE = BESIDE.replace(
    token_moe=TokenMoEConfig(experts=(3, 4), top_k=2, width=16, shared_width=16), parallel_block=False,
    loss=LossConfig(alpha=0.3, t2i=0.7, mmu=1.3, max_weight=2.0),
)  # fmt: skip


def size(config, words=None, text=None) -> Size:
    return Size("smoke", config, 2, 2, 3 if words is None else words, 4 if text is None else text, 2, 2)


@pytest.mark.parametrize("config", [BESIDE, IN_PLACE], ids=["beside", "in place"])
@pytest.mark.parametrize("experts", plain.EXPERTS)
@pytest.mark.parametrize("loss", plain.LOSSES)
def test_plain_ops_give_our_loss_and_gradients(config, experts, loss):
    step = Step(size(config))
    theirs = on_plain(step.result, experts, loss)()
    assert len(theirs) > 20 and difference(step.result(), theirs) < profiles.TOLERANCE


@pytest.mark.parametrize("broken", ["mix", "grouped_experts", "route", "full_logits_loss"])
def test_the_comparison_sees_a_plain_op_that_is_wrong(broken, monkeypatch):
    step, right = Step(size(IN_PLACE)), getattr(plain, broken)

    def wrong(*args, **named):
        out = right(*args, **named)
        if isinstance(out, torch.Tensor):
            return out * 1.001
        if broken == "route":
            return out._replace(weight=out.weight * 1.001)
        return out[0] * 1.001, out[1]

    monkeypatch.setattr(plain, broken, wrong)
    theirs = on_plain(step.result, plain.GROUPED, plain.FULL)()
    assert difference(step.result(), theirs) > profiles.TOLERANCE


def test_nothing_plain_is_left_behind():
    before = Step(size(BESIDE)).result()
    with pytest.raises(RuntimeError, match="out"), plain.plain_ops():
        raise RuntimeError("out")
    assert difference(Step(size(BESIDE)).result(), before) == 0


class _Small(nn.Linear):
    pass


class _Large(nn.Linear):
    def forward(self, x):
        for _ in range(8):
            x = super().forward(x)
        return x


def test_each_second_lands_at_its_part():
    """Were each event of the profile a second: eight layers have eight times one layer's, and none counts twice."""
    small, large = _Small(256, 256), _Large(256, 256)
    x = torch.randn(512, 256)
    events: list[FunctionEvent] = []

    def run():
        (small(x).relu() + large(x)).sum().backward()
        return []

    def counted(seen):
        events.extend(seen)
        return by_part(seen)

    by_part = parts.by_part
    with (
        mock.patch.object(parts, "by_part", counted),
        mock.patch.object(FunctionEvent, "self_cpu_time_total", new_callable=mock.PropertyMock, return_value=1e6),
    ):
        found = parts.shares(run, {"small": [(_Small, "forward")], "large": [(_Large, "forward")]})
    assert set(found) == {"small", "large", parts.OTHER}
    assert found["large"][0] - 1 == 8 * (found["small"][0] - 1) > 0  # a mark each
    assert found["large"][1] > 7 * found["small"][1] > 0  # the input needs no gradient, what is between layers does
    assert sum(map(sum, found.values())) == len(events)
    assert _Small.forward is nn.Linear.forward


def test_profiles_say_what_they_measured(tmp_path, capsys):
    path = tmp_path / "profiles.jsonl"
    assert profiles.main(["--seconds", "0", "--json", str(path)], [size(BESIDE)]) == 0
    records = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(each["mode"], each["contender"]) for each in records] == [
        ("training", profiles.OURS), ("training", profiles.PLAIN), ("training", profiles.CAREFUL),
        ("generation", profiles.OURS), ("generation", profiles.SHOWO),
    ]  # fmt: skip
    training, generation = records[0]["parts_ms"], records[3]["parts_ms"]
    for part in ("attention", "dense FFN", "routers", "experts", "sequence experts", "head and loss"):
        assert all(each > 0 for each in training[part]), part
    assert generation["head and draw"][0] > 0 and "head and loss" not in generation
    for record in records[1:3]:  # the plain parts are found too
        assert all(record["parts_ms"][part][0] > 0 for part in ("experts", "head and loss", "routers"))
    printed = capsys.readouterr().out
    assert profiles.main(["--table", str(path)]) == 0
    assert capsys.readouterr().out.strip() in printed
    assert "| smoke | training |" in printed and "smoke, generation: ms forward + backward" in printed


def test_contenders_that_are_all_long_end_their_rounds_together():
    calls: list[str] = []
    contenders = {name: (lambda name=name: calls.append(name) or []) for name in ("a", "b")}
    samples = measure.interleaved(contenders, torch.device("cpu"), 0.0, known={"a": 100.0, "b": 100.0})
    assert len(samples["a"]) == len(samples["b"]) == calls.count("a") >= 2


def test_stages_of_the_model_say_that_transformers_is_missing(tmp_path, monkeypatch):
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "transformers" else real(name))
    stages = {stage.name: stage for stage in gpu.plan({"cuda": True}, tmp_path, dry_run=True)}
    for name in ("tests gpu model", "bench model.step base", "bench sampling.generate base", "bench model.block base"):
        assert "transformers" in stages[name].missing
    assert stages["bench moe.layer gpu-core bfloat16"].missing is None
    (tmp_path / "transformers").mkdir()
    stages = {stage.name: stage for stage in gpu.plan({"cuda": True}, tmp_path, dry_run=True, path=[str(tmp_path)])}
    assert stages["bench model.step base"].missing is None


def test_the_report_leaves_records_of_other_kinds_alone(tmp_path):
    (tmp_path / "profiles.jsonl").write_text(json.dumps({"op": "profile", "size": "tiny", "contender": "ours"}) + "\n")
    assert results.load(tmp_path).files == {}
