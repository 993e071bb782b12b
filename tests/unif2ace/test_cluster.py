"""The cost model of clusters: its bytes against counted ones of two processes, its times against arithmetic by hand."""

from __future__ import annotations

import functools
import itertools
import random
from contextlib import contextmanager
from dataclasses import replace

import pytest
import ranks
import tiny
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks import cluster as pages
from unif2ace.cli import main
from unif2ace.configs import TokenMoEConfig, UniF2aceConfig
from unif2ace.model.modeling import UniF2aceForConditionalGeneration
from unif2ace.planning.activations import Step
from unif2ace.planning.cluster import (
    EXCHANGE,
    GATHER,
    REDUCE,
    SCATTER,
    Cluster,
    Layout,
    dispatch,
    efficiency,
    expert_parameters,
    gather,
    reduce_across,
    step_cost,
)
from unif2ace.planning.plan import Training, counts, scaled, step_flops
from unif2ace_kernels.moe import GroupedMoE

H100S = Cluster()
BASE = Training(UniF2aceConfig.base(), scaled(Step(5, 2, 1, 392), 16))


class Counter(TorchDispatchMode):
    """Bytes of the whole of what the collectives gather, scatter and reduce."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = {GATHER: 0, SCATTER: 0, REDUCE: 0}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.name()
        if name.startswith("c10d::_allgather_base_"):
            self.bytes[GATHER] += args[0].nbytes
        elif name.startswith("c10d::_reduce_scatter_base_"):
            self.bytes[SCATTER] += args[1].nbytes
        elif name.startswith("c10d::allreduce_"):
            self.bytes[REDUCE] += sum(each.nbytes for each in args[0])
        return function(*args, **(kwargs or {}))


def a_step(group, within_node):
    """A training step of the model, sharded over two processes, or by both; in bfloat16 with float32 masters."""
    model = UniF2aceForConditionalGeneration(tiny.CONFIG)
    names = ("replicate", "shard")
    mesh = init_device_mesh("cpu", (2, 1), mesh_dim_names=names) if within_node else init_device_mesh("cpu", (2,))
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for block in model.blocks:
        fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)
    batch = tiny.single(tiny.mixed(config=tiny.CONFIG))
    with Counter() as counter:
        model(**vars(batch)).loss.backward()
    assert all(each.grad is not None for each in model.parameters())
    machines = replace(H100S, gpus_per_node=1 if within_node else 2)
    foreseen = step_cost(machines, Training(tiny.CONFIG, Step(3, 3, 0, 13)), Layout(2, within_node)).collectives
    sent = {kind: each.sent for kind, each in foreseen.items() if kind != EXCHANGE}
    if within_node:  # a ring sends all but its own part, there and back
        assert sent == {GATHER: 0, SCATTER: 0, REDUCE: counter.bytes[REDUCE]}
    else:  # FSDP fills a first dimension that two processes do not halve
        blocks, root = _filled(model.blocks), _filled(model) - _filled(model.blocks)
        sent[GATHER] += (2 * blocks + root) * 2 / 2
        sent[SCATTER] += (blocks + root) * 4 / 2
        assert sent == {kind: size / 2 for kind, size in counter.bytes.items()}


def _filled(module):
    """Elements that halving the first dimensions of the parameters adds to them."""
    return sum(each.shape[0] % 2 * each[0].numel() for each in module.parameters())


@contextmanager
def _rows_sent(width, rows):
    """Rows of `width` that each all_to_all sends to the other process."""
    real = dist.all_to_all_single

    def count(output, given, arriving, leaving, group):
        if given.dim() == 2 and given.shape[1] == width:
            rows.append(len(given) - leaving[dist.get_rank(group)])
        return real(output, given, arriving, leaving, group=group)

    dist.all_to_all_single = count
    try:
        yield
    finally:
        dist.all_to_all_single = real


def a_mixture(group):
    """Rows that travel, where no choice is left: as many experts as a token uses, or one rank that has them all."""
    for experts, shared in (((2, 2), 0), ((2, 2), 1), ((2, 4), 1)):
        config = tiny.config(token_moe=TokenMoEConfig(experts=experts, top_k=2, width=16, shared_width=16 * shared))
        rank, hidden, tokens = dist.get_rank(group), config.hidden_size, (5, 3)
        layer = GroupedMoE(hidden, 16, experts, top_k=2, shared_width=16 * shared, balance_coef=0.0)
        for name in ("experts_w_in", "experts_w_out", "experts_b_in", "experts_b_out"):
            part = getattr(layer, name).detach().chunk(2)[rank].clone()
            setattr(layer, name, torch.nn.Parameter(part))
        layer.group = group
        rows = []
        with _rows_sent(hidden, rows):
            y, _ = layer(torch.randn(8, hidden, requires_grad=True), torch.tensor([0] * 5 + [1] * 3))
            y.sum().backward()
        total = torch.tensor(sum(rows))
        dist.all_reduce(total, group=group)
        if experts[1] == 2:
            assert total == 2 * 4 * dispatch(config, tokens, 2, 2).sent, (experts, shared, rows)
        else:  # which of four experts mmu takes is the router's choice: every token is sent at least where it must be
            assert total >= 2 * 4 * dispatch(config, (5, 0), 2, 2).sent


CHECKS = [
    ("FSDP", functools.partial(a_step, within_node=False)),
    ("HSDP", functools.partial(a_step, within_node=True)),
    ("experts", a_mixture),
]


def test_bytes_are_those_that_two_processes_send():
    found = ranks.run(2, CHECKS, ["unif2ace.model.modeling"])
    wrong = {name: error for name, error in found.items() if error}
    assert not wrong, "\n".join(f"{name}:\n{error}" for name, error in wrong.items())


@pytest.mark.parametrize(("experts", "top_k", "shared"), [((4, 4), 2, 0), ((8, 4), 3, 1), ((5, 6), 2, 2)])
@pytest.mark.parametrize("parts", [2, 3, 8])
def test_rows_are_the_mean_of_random_choices(experts, top_k, shared, parts):
    config = tiny.config(token_moe=TokenMoEConfig(experts=experts, top_k=top_k, width=16, shared_width=16 * shared))
    share = -(-(sum(experts) + 2 * shared) // parts)
    draw, trials = random.Random(0), 4000
    sent, received, slots = [0.0] * parts, [0.0] * parts, [0.0] * parts
    for source, group, _ in itertools.product(range(parts), range(2), range(trials)):
        first = sum(experts[:group])
        chosen = draw.sample(range(first, first + experts[group]), top_k)
        chosen += [sum(experts) + shared * group + each for each in range(shared)]
        for expert in chosen:
            slots[expert // share] += 1
        for home in {expert // share for expert in chosen} - {source}:
            sent[source] += 1
            received[home] += 1
    found = dispatch(config, (trials, trials), parts, 8)
    assert found.sent == pytest.approx(sum(sent) / parts, rel=0.02)
    assert found.fullest == pytest.approx(max(sent + received), rel=0.02) and found.fullest_between == 0
    assert found.load == pytest.approx(max(slots) * parts / sum(slots), rel=0.02)
    apart = dispatch(config, (trials, trials), parts, 1)
    assert apart.fullest_between == apart.fullest == found.fullest


def test_collectives_by_hand():
    pair = gather(H100S, 720e6, 2)
    assert pair.sent == 360e6 and pair.seconds == pytest.approx(8.4e-6 + 3.4e-6 + 1e-3)
    nodes = gather(H100S, 32e9, 32)  # four nodes: 24 GB go into each through eight adapters
    assert nodes.seconds == pytest.approx(8.4e-6 + 28 * 3.4e-6 + 3 * 9.6e-6 + max(31e9 / 360e9, 24e9 / 320e9))
    assert gather(replace(H100S, network=10e9), 32e9, 32).seconds == pytest.approx(8.4e-6 + 124e-6 + 24e9 / 80e9)
    one_each = replace(H100S, gpus_per_node=1)
    assert gather(one_each, 8e9, 2).seconds == pytest.approx(8.4e-6 + 9.6e-6 + 4e9 / 40e9)
    ring, tree = reduce_across(H100S, 4e9, 2), reduce_across(H100S, 4e3, 128)
    assert ring.sent == 4e9 and ring.seconds == pytest.approx(8.4e-6 + 2 * 9.6e-6 + 0.1)
    assert tree.seconds == pytest.approx(8.4e-6 + 14 * 9.6e-6 + 8e3 / 40e9)
    assert gather(H100S, 1e9, 1).seconds == reduce_across(H100S, 1e9, 1).seconds == 0


def test_what_a_step_sends_by_hand():
    number, layers = counts(BASE.config), BASE.config.num_hidden_layers
    found = step_cost(H100S, BASE, Layout(64)).collectives
    assert found[GATHER].sent == pytest.approx(2 * (2 * number.blocks + number.root) * 63 / 64)
    assert found[SCATTER].sent == pytest.approx(4 * number.all * 63 / 64)
    assert found[REDUCE].sent == found[EXCHANGE].sent == 0
    node = step_cost(H100S, BASE, Layout(64, within_node=True)).collectives
    assert node[SCATTER].sent == pytest.approx(4 * number.all * 7 / 8)
    assert node[REDUCE].sent == pytest.approx(2 * 4 * number.all / 8 * 7 / 8)
    experts = expert_parameters(BASE.config)
    assert experts == 8 * (2 * 2048 * 384 + 384 + 2048)
    spread = step_cost(H100S, BASE, Layout(64, expert_ranks=8)).collectives
    assert spread[SCATTER].sent == pytest.approx(4 * (number.all - layers * experts) * 63 / 64)
    assert spread[REDUCE].sent == pytest.approx(2 * 4 * layers * experts / 8 * 7 / 8)
    tensors = [reduce_across(H100S, size, 8).seconds for size in (4 * experts / 8, 0, 0, 0)]
    assert spread[REDUCE].seconds == pytest.approx(layers * sum(tensors))
    rows = dispatch(BASE.config, (10 * 392, 6 * 392), 8, 8)
    assert spread[EXCHANGE].sent == pytest.approx(layers * 2 * 2 * rows.sent * 2048 * 2)
    passes = 4 * rows.fullest * 2048 * 2 / 360e9 + 8 * (8.4e-6 + 3.4e-6)  # five collectives forward, three backward
    assert spread[EXCHANGE].seconds == pytest.approx(layers * passes)
    again = step_cost(H100S, replace(BASE, checkpointing="block"), Layout(64, expert_ranks=8)).collectives
    assert again[EXCHANGE].sent == pytest.approx(1.5 * spread[EXCHANGE].sent)
    assert again[GATHER].sent == spread[GATHER].sent


def test_efficiency_is_what_is_not_hidden():
    free = replace(H100S, nvlink=1e30, network=1e30, base=0.0, nvlink_step=0.0, network_step=0.0)
    assert efficiency(free, BASE, Layout(1024)) == pytest.approx(1)
    assert efficiency(H100S, BASE, Layout(1)) == 1
    for checkpointing in ("none", "block"):
        alone = replace(BASE, checkpointing=checkpointing)
        run = step_flops(alone)[1] / (H100S.peak * H100S.share)
        assert step_cost(H100S, alone, Layout(64)).compute == pytest.approx(run)
    curve = [efficiency(H100S, BASE, Layout(8 * 2**each)) for each in range(8)]
    assert curve == sorted(curve, reverse=True) and curve[0] < 1
    assert efficiency(replace(H100S, overlap=0.0), BASE, Layout(64)) < efficiency(H100S, BASE, Layout(64))
    cost = step_cost(replace(H100S, overlap=0.0), BASE, Layout(64, True, 8))
    assert cost.exposed == pytest.approx(sum(each.seconds for each in cost.collectives.values()))
    slow = step_cost(replace(H100S, share=1e-3), BASE, Layout(64, True, 8))
    shown = slow.collectives[EXCHANGE].seconds
    assert shown < slow.exposed < shown + slow.collectives[REDUCE].seconds  # a layer's sums are hidden, the root's not
    load = dispatch(BASE.config, (10, 6), 8, 8).load
    assert load == pytest.approx(1.25)  # ten of sixteen tokens on half of the ranks
    assert efficiency(free, BASE, Layout(64, expert_ranks=8)) < 1


@pytest.mark.parametrize(
    ("layout", "words"),
    [
        (Layout(12), "gpus: expected one node's at most, or whole nodes of 8, got 12"),
        (Layout(0), "gpus: expected one node's at most, or whole nodes of 8, got 0"),
        (Layout(64, True, 4), "expert_ranks: expected 1, or whole nodes that divide the 64 GPUs, got 4"),
        (Layout(64, True, 24), "expert_ranks: expected 1, or whole nodes that divide the 64 GPUs, got 24"),
    ],
)
def test_a_wrong_layout_is_named(layout, words):
    with pytest.raises(ValueError, match=words):
        step_cost(H100S, BASE, layout)
    if layout.expert_ranks > 1:
        with pytest.raises(ValueError, match="expert_ranks: expected 1 for a model without token-level experts"):
            step_cost(H100S, replace(BASE, config=BASE.config.replace(token_moe=None)), Layout(64, False, 8))


def test_the_command_prints_a_model(capsys):
    assert main(["plan", "base", "--batch", "16", "--gpus", "8", "--cluster", "64", "1024"]) == 0
    told = capsys.readouterr().out
    assert "A model of a step of 16 rows a GPU, not a measurement" in told and "none of it measured" in told
    table = [line.split(" | ") for line in told.splitlines() if line.startswith(("| 64 |", "| 1,024 |"))]
    assert [line[1] for line in table] == 2 * ["FSDP", "HSDP", "FSDP, experts over 8", "HSDP, experts over 8"]
    assert table[0][-1] == f"{efficiency(H100S, BASE, Layout(64)):.0%} |"
    assert main(["plan", "base", "--batch", "16", "--gpus", "8"]) == 0
    assert "not a measurement" not in capsys.readouterr().out
    assert main(["plan", "base", "--batch", "16", "--cluster", "12"]) == 1
    assert "--cluster: gpus: expected one node's at most" in capsys.readouterr().err
    assert main(["plan", "base", "--cluster", "0"]) == 1
    assert "--cluster: expected a number above 0" in capsys.readouterr().err


def test_the_committed_page_is_the_models(tmp_path):
    assert pages.stale() == []
    assert "Nothing here was measured" in pages.page()
    assert pages.stale(tmp_path) == [str(pages.PAGE), str(pages.PICTURE)]
