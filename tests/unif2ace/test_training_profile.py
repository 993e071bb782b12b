"""A step's profile, and what it has to show: exchanging goes on behind computing."""

from __future__ import annotations

import gzip
import json

import pytest
import training_runs as runs

from unif2ace.errors import UserError
from unif2ace.training.profile import Timeline, path_of, union


def test_a_layers_weights_are_gathered_while_the_one_before_computes(tmp_path):
    """Were they waited for, rank 0 would wait for rank 1 and rank 1 for rank 0's computing."""
    values = runs.prepare_drawn(tmp_path)
    values["watch"]["profile"] = [1, 3]
    config = runs.write(values, tmp_path / "config.json")
    assert len(runs.train(config, ranks=2, hook="training_hooks:second_layer_late")) == 6
    for step in (1, 3):
        timelines = [Timeline.read(path_of(tmp_path / "run", step, rank)) for rank in (0, 1)]
        assert timelines[0].hidden > 0
        assert all(each.computing and each.exchanging for each in timelines)
    assert len(list((tmp_path / "run" / "profile").iterdir())) == 4


@pytest.mark.slow
def test_copies_of_experts_are_summed_before_the_backward_ends(tmp_path):
    values = runs.prepare_drawn(tmp_path)
    values["watch"]["profile"] = [1]
    values["parallel"]["experts"] = 2
    runs.train(runs.write(values, tmp_path / "config.json"), ranks=4)
    with gzip.open(path_of(tmp_path / "run", 1, 0)) as file:
        events = sorted(json.load(file)["traceEvents"], key=lambda each: each.get("ts", 0))
    names = [each["name"] for each in events]
    backward = names[names.index("FSDP::pre_backward") : names.index("FSDP::root_post_backward_callback")]
    assert backward.count("c10d::allreduce_") >= 2 * 2  # two weights of each layer but the first, at least


def _trace(path, *events):
    keys = ("cat", "name", "ts", "dur")
    with gzip.open(path, "wt") as file:
        json.dump(
            {"traceEvents": [{"ph": "M", "name": "x"}, *({"ph": "X", **dict(zip(keys, e))} for e in events)]}, file
        )


def test_timeline_of_a_cpu(tmp_path):
    """Operations of autograd may contain waiting: they are not computing."""
    path = tmp_path / "trace.json.gz"
    _trace(
        path,
        ("cpu_op", "aten::mm", 1e6, 2e6), ("cpu_op", "aten::add", 2e6, 5e5), ("cpu_op", "unif2ace::route", 5e6, 1e6),
        ("user_annotation", "gloo:all_gather", 2e6, 2e6), ("user_annotation", "gloo:all_reduce", 5.5e6, 2e6),
        ("cpu_op", "c10d::allreduce_", 5e6, 1e6), ("cpu_op", "autograd::engine::evaluate_function", 0.5e6, 9e6),
    )  # fmt: skip
    found = Timeline.read(path)
    assert found.computing == [(0.5, 2.5), (4.5, 5.5)]
    assert found.exchanging == [(1.5, 3.5), (5.0, 7.0)]
    assert found.hidden == (1.0 + 0.5) / 4.0


def test_timeline_of_a_gpu(tmp_path):
    """What its host does is left out."""
    path = tmp_path / "trace.json.gz"
    _trace(
        path,
        ("kernel", "gemm", 1e6, 2e6), ("kernel", "ncclDevKernel_AllGather", 2e6, 2e6), ("cpu_op", "aten::mm", 0, 9e6),
    )  # fmt: skip
    found = Timeline.read(path)
    assert (found.computing, found.exchanging, found.hidden) == ([(1.0, 3.0)], [(2.0, 4.0)], 0.5)


def test_nothing_exchanged_is_nothing_waited_for(tmp_path):
    values = runs.prepare_drawn(tmp_path)
    values["watch"]["profile"] = [0]
    runs.train(runs.write(values, tmp_path / "config.json"))
    found = Timeline.read(path_of(tmp_path / "run", 0, 0))
    assert found.computing and not found.exchanging and found.hidden == 1.0


def test_union_of_spans():
    assert union([(3, 4), (0, 1), (0.5, 2), (2, 2.5)]) == [(0, 2.5), (3, 4)]


def test_a_trace_that_is_none_is_told(tmp_path):
    path = tmp_path / "trace.json.gz"
    for content in (b"", b"no gzip", gzip.compress(b"{}"), gzip.compress(b"[")):
        path.write_bytes(content)
        with pytest.raises(UserError, match="trace.json.gz is damaged or no trace of a step"):
            Timeline.read(path)
    with pytest.raises(UserError, match="none.json.gz is missing"):
        Timeline.read(tmp_path / "none.json.gz")


def test_a_disk_that_refuses_a_profile_stops_nothing(tmp_path):
    values = runs.prepare_drawn(tmp_path)
    values["watch"]["profile"] = [1]
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "profile").write_text("no folder")
    config = runs.write(values, tmp_path / "config.json")
    assert len(runs.train(config)) == 6
    assert "goes on without this profile" in config.with_suffix(".0.log").read_text()


def test_a_step_that_cannot_be_is_named(tmp_path):
    values = runs.prepare_drawn(tmp_path)
    values["watch"]["profile"] = [3, -1]
    config = runs.write(values, tmp_path / "config.json")
    with runs.Ranks(config) as ranks:
        assert ranks.wait() == [1]
    assert "watch.profile[1]: expected a step, from 0, got -1" in config.with_suffix(".0.log").read_text()
