"""Experts over two and three gloo processes: the values and gradients of one process, and what travels."""

from __future__ import annotations

import copy
import functools
import math
import re
from contextlib import contextmanager
from pathlib import Path

import pytest
import ranks
import torch
import torch.distributed as dist
from parallel_cases import (
    CASES,
    Case,
    D,
    F,
    Problem,
    alone,
    assert_equal_to_one_process,
    problem,
    routed,
    together,
)
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard, distribute_tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from unif2ace_kernels import moe
from unif2ace_kernels.moe import GroupedMoE

README = Path(moe.__file__).parent / "README.md"


@contextmanager
def recorded():
    """(columns, bytes an element, elements sent to other ranks, to this one) of every all_to_all."""
    sent, real = [], dist.all_to_all_single

    def record(output, rows, output_split_sizes, input_split_sizes, group):
        own, width = input_split_sizes[dist.get_rank(group)], math.prod(rows.shape[1:])
        assert sum(input_split_sizes) == len(rows) and sum(output_split_sizes) == len(output)
        sent.append((width, rows.element_size(), len(rows) - own, own))
        return real(output, rows, output_split_sizes, input_split_sizes, group=group)

    dist.all_to_all_single = record
    try:
        yield sent
    finally:
        dist.all_to_all_single = real


# ------------------------------------------------------------------------------------- run on each rank of a group


def values_and_gradients(group, name):
    assert_equal_to_one_process(CASES[name], group)


def same_bits(group):
    case = CASES["swiglu"]
    runs = [together(case, problem(case, torch.float32), group) for _ in range(3)]
    flat = [[y, x, logits, *parameters] for y, x, logits, parameters in runs]
    assert all(torch.equal(a, b) for again in flat[1:] for a, b in zip(flat[0], again, strict=True))


def what_travels(group, name):
    """One row for a token and other rank, each way, forward and backward; one pair a slot."""
    case = CASES[name]
    given, rank, size = problem(case), dist.get_rank(group), dist.get_world_size(group)
    share = -(-case.experts // size)
    goes = torch.zeros(size, size, dtype=torch.long)  # rows from rank to rank
    slots = torch.zeros(size, size, dtype=torch.long)
    for source in range(size):
        for experts in routed(case, given.logits[source]).expert.tolist():
            for home in {e // share for e in experts}:
                goes[source, home] += 1
            for e in experts:
                slots[source, e // share] += 1
    with recorded() as sent:
        together(case, given, group)
    out, back = goes[rank].sum() - goes[rank, rank], goes[:, rank].sum() - goes[rank, rank]
    pairs_out, pairs_back = slots[rank].sum() - slots[rank, rank], slots[:, rank].sum() - slots[rank, rank]
    forward = [(2, 8, size - 1), (1, 4, pairs_out), (D, 8, out), (1, 8, pairs_out), (D, 8, back)]
    backward = [(D, 8, out), (D, 8, back), (1, 8, pairs_back)]
    assert [each[:3] for each in sent] == forward + backward


def checkpointed(group, name):
    def run(call, *arguments):
        return checkpoint(call, *arguments, use_reentrant=False)

    assert_equal_to_one_process(CASES[name], group, run)


def one_read_of_the_device(group):
    case = CASES["swiglu"]
    given, reads = problem(case), []
    real = torch.Tensor.tolist
    torch.Tensor.tolist = lambda self: reads.append(1) or real(self)
    try:
        rank, own = dist.get_rank(group), moe.local_experts(case.experts, group)
        routing = routed(case, given.logits[rank])
        moe.parallel_experts(
            given.x[rank], routing, *[None if each is None else each[own] for each in given.parameters],
            activation=case.activation, group=group,
        )  # fmt: skip
    finally:
        torch.Tensor.tolist = real
    assert len(reads) == 1


class Waits(TorchDispatchMode):
    """Operations that read a tensor on the host, or whose result's shape hangs on its values."""

    found: list[str]

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.name()
        words = ("_local_scalar_dense", "item", "nonzero", "masked_select", "unique", "equal", "is_nonzero")
        indices = args[1] if name == "aten::index.Tensor" else ()
        masks = [each for each in indices if each is not None and each.dtype == torch.bool]
        if masks or name.partition("::")[2].partition(".")[0] in words:
            self.found.append(name)
        return function(*args, **(kwargs or {}))


def nothing_else_waits(group):
    case, waits = CASES["shared slots"], Waits()
    waits.found = []
    given = problem(case)
    torch.use_deterministic_algorithms(False)  # its check of memory reads some
    with waits:
        together(case, given, group)
    torch.use_deterministic_algorithms(True)
    assert waits.found == []
    with waits:
        torch.arange(3)[torch.arange(3) > 1].sum().item()
    assert waits.found  # it does see them


def reduced_precision(group, dtype, autocast):
    """At most twice the error of one process in the same dtype, plus a tiny constant, against float64."""
    case = Case((40, 30, 20), 8, 3)
    given, rank = problem(case), dist.get_rank(group)
    given = Problem(*[[each.to(dtype).double() for each in part] for part in given])
    own = moe.local_experts(case.experts, group)
    exact = alone(case, given)
    low = Problem(*[[each.to(torch.float32 if autocast else dtype) for each in part] for part in given])
    low = low._replace(logits=[each.float() for each in given.logits])
    with torch.autocast("cpu", dtype, enabled=autocast):
        single, ours = alone(case, low), together(case, low, group)
    assert ours[0].dtype == dtype
    for i in range(3):
        off = (ours[i] - exact[i][rank]).abs().max()
        assert off <= 2 * (single[i][rank] - exact[i][rank]).abs().max() + 1e-3, (i, off)
    for got, one, true in zip(ours[3], single[3], exact[3]):
        off = (got - true[own]).abs().max()
        assert off <= 2 * (one[own] - true[own]).abs().max() + 1e-3, off


def travels_in_the_dtype_of_autocast(group):
    case = CASES["swiglu"]
    given = problem(case, torch.float32)
    with recorded() as sent, torch.autocast("cpu", torch.bfloat16):
        together(case, given, group)
    assert {size for width, size, *_ in sent if width == D} == {2}


def frozen(group):
    """Experts, or x and the weights, without gradients: the others' are what they are otherwise."""
    case = CASES["a rank without experts"]
    given, rank, own = problem(case), dist.get_rank(group), moe.local_experts(case.experts, group)
    want = alone(case, given)
    for learns in (False, True):
        parameters = [each[own].detach().clone().requires_grad_(learns) for each in given.parameters]
        x = given.x[rank].clone().requires_grad_(not learns)
        routing = routed(case, given.logits[rank])
        y = moe.parallel_experts(x, routing, *parameters, activation=case.activation, group=group)
        (y * given.grad[rank]).sum().backward()
        if learns:
            for got, exact in zip(parameters, want[3]):
                torch.testing.assert_close(got.grad, exact[own], rtol=0, atol=1e-12)
        else:
            torch.testing.assert_close(x.grad, want[1][rank], rtol=0, atol=1e-12)


def bad_tokens_stay_alone(group):
    case = CASES["swiglu"]
    given, rank = problem(case), dist.get_rank(group)
    clean = together(case, given, group)[0]
    if rank == 1:
        given.x[1][2] = math.nan
    y = together(case, given, group)[0]
    bad = torch.zeros(len(y), dtype=torch.bool)
    bad[2] = rank == 1
    assert y[bad].isnan().all() and torch.equal(y[~bad], clean[~bad])


def bad_arguments(group):
    case = CASES["uneven experts, uneven tokens"]
    given, rank = problem(case), dist.get_rank(group)
    own = moe.local_experts(case.experts, group)
    held = own.stop - own.start
    whole = dict(zip(("w_in", "b_in", "w_out", "b_out"), given.parameters))
    for name, wrong, expected in (
        ("w_in", whole["w_in"], rf"w_in: expected shape \[{held}, 6, 4\], got shape \[5, 6, 4\]"),
        ("w_out", whole["w_out"], rf"w_out: expected shape \[{held}, \*, 6\]|w_out: expected shape \[{held}, F, 6\]"),
        ("b_in", whole["b_in"][own, :3], rf"b_in: expected shape \[{held}, 4\]"),
        ("b_out", whole["b_out"].float()[own], "b_out: expected dtype float64"),
    ):
        arguments = {key: value[own] for key, value in whole.items()} | {name: wrong}
        with pytest.raises(ValueError, match=expected):
            moe.parallel_experts(
                given.x[rank], routed(case, given.logits[rank]), **arguments, activation="gelu_tanh", group=group
            )
    with pytest.raises(ValueError, match="activation"):
        slices = [each[own] for each in given.parameters]
        moe.parallel_experts(given.x[rank], routed(case, given.logits[rank]), *slices, activation="tanh", group=group)


class Model(nn.Module):
    """A mixture between two layers that all ranks share."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.first, self.last = nn.Linear(D, D), nn.Linear(D, 1)
        self.moe = GroupedMoE(D, F, (3, 2), top_k=2, shared_width=F)
        self.double()

    def forward(self, x, groups, again=False):
        x = self.first(x)
        y, routing = checkpoint(self.moe, x, groups, use_reentrant=False) if again else self.moe(x, groups)
        return self.last(x + y).square().mean() + routing.balance_loss


EXPERTS = ("experts_w_in", "experts_w_out", "experts_b_in", "experts_b_out")


def whole_model(group):
    """The mean loss of two ranks and its gradients, in one process."""
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(2, 8, D, generator=generator, dtype=torch.float64)
    groups = torch.randint(2, (2, 8), generator=generator)
    model = Model()
    loss = sum(model(x[rank], groups[rank]) for rank in range(2)) / 2
    loss.backward()
    rank = dist.get_rank(group)
    return x[rank], groups[rank], loss, {name: each.grad for name, each in model.named_parameters()}


def assert_gradients(model, want, group):
    """Those of this rank's experts are of the sum of the losses, the others' of their mean."""
    for name, parameter in model.named_parameters():
        grad, exact = parameter.grad, want[name]
        if name.rpartition(".")[2] in EXPERTS:
            grad, exact = grad / 2, exact[moe.local_experts(len(exact), group)]
        else:
            grad = grad.full_tensor()
        torch.testing.assert_close(grad, exact, rtol=0, atol=1e-12, msg=lambda text, name=name: f"{name}: {text}")


def slices_under_fsdp(group, again):
    """fully_shard shards the rest and leaves the slices of the experts alone."""
    x, groups, loss, want = whole_model(group)
    model = Model()
    names = {}
    exec(re.findall(r"```python\n([^`]*def shard_experts[^`]*)```", README.read_text())[0], names)  # noqa: S102
    names["shard_experts"](model.moe, group)
    mesh = init_device_mesh("cpu", (2,))
    fully_shard(model, mesh=mesh, ignored_params={getattr(model.moe, name) for name in EXPERTS})
    ours = model(x, groups, again)
    ours.backward()
    assert_gradients(model, want, group)
    dist.all_reduce(total := ours.detach().clone(), group=group)
    torch.testing.assert_close(total / 2, loss.detach(), rtol=0, atol=1e-12)


def dtensors_on_a_mesh_of_their_own(group):
    """Experts as DTensors Shard(0), and sharded again by fully_shard on the other dimension of the mesh."""
    x, groups, _, want = whole_model(group)
    for fsdp in (False, True):
        model = Model()
        mesh = init_device_mesh("cpu", (1, 2), mesh_dim_names=("shard", "expert"))
        for name in EXPERTS:
            sliced = distribute_tensor(getattr(model.moe, name).detach(), mesh["expert"], [Shard(0)])
            setattr(model.moe, name, nn.Parameter(sliced))
        model.moe.group = mesh["expert"].get_group()
        if fsdp:
            fully_shard(model.moe, mesh=mesh["shard"])
            fully_shard(model, mesh=mesh["shard"])
        model(x, groups).backward()
        for name, parameter in model.named_parameters():
            grad, exact = parameter.grad, want[name]
            if hasattr(grad, "to_local"):
                grad = grad.to_local()
            if name.rpartition(".")[2] in EXPERTS:
                exact = exact[moe.local_experts(len(exact), group)]
            else:  # of this rank's loss alone: a mesh of two dimensions leaves the sum over this one to its user
                dist.all_reduce(grad, group=group)
            torch.testing.assert_close(grad / 2, exact, rtol=0, atol=1e-12)


def out_of_range_is_the_nearest(group):
    """As `arrange` has it on CUDA, where nobody looks."""
    case = CASES["uneven experts, uneven tokens"]
    given, rank, own = problem(case), dist.get_rank(group), moe.local_experts(case.experts, group)
    routing = moe.arrange(torch.full((3, 1), case.experts - 1), torch.ones(3, 1).double(), case.experts)
    call = functools.partial(moe.parallel_experts, activation="gelu_tanh", group=group)
    slices = [each[own] for each in given.parameters]
    want = call(given.x[rank][:3], routing, *slices)
    assert torch.equal(call(given.x[rank][:3], routing._replace(expert=routing.expert + 9), *slices), want)


def copies_share_the_group(group):
    """Averages of weights are deep copies, and no process group can be copied."""
    layer = GroupedMoE(D, F, (3, 2), top_k=2)
    layer.group = group
    other = copy.deepcopy(layer)
    assert other.group is group and other.router_weight is not layer.router_weight
    assert other.state_dict().keys() == layer.state_dict().keys() and len(layer.state_dict()) == 5


def _checks():
    found = []
    for name, case in CASES.items():
        found.append((name, len(case.tokens), functools.partial(values_and_gradients, name=name)))
    for name in ("shared slots", "an expert twice", "no tokens on one rank", "all to the last rank", "one rank alone"):
        found.append((f"what travels: {name}", len(CASES[name].tokens), functools.partial(what_travels, name=name)))
    for name in ("swiglu", "no tokens on one rank", "fewer experts than ranks"):
        found.append((f"checkpointing: {name}", len(CASES[name].tokens), functools.partial(checkpointed, name=name)))
    for dtype in (torch.bfloat16, torch.float16):
        for autocast in (False, True):
            words = f"{dtype}{' by autocast' * autocast}"
            found.append((words, 3, functools.partial(reduced_precision, dtype=dtype, autocast=autocast)))
    for again in (False, True):
        words = f"slices under FSDP{', checkpointing' * again}"
        found.append((words, 2, functools.partial(slices_under_fsdp, again=again)))
    for check, size in (
        (dtensors_on_a_mesh_of_their_own, 2), (bad_arguments, 2), (out_of_range_is_the_nearest, 2),
        (copies_share_the_group, 2), (same_bits, 3), (one_read_of_the_device, 3), (nothing_else_waits, 3),
        (travels_in_the_dtype_of_autocast, 3), (frozen, 3), (bad_tokens_stay_alone, 3),
    ):  # fmt: skip
        found.append((check.__name__.replace("_", " "), size, check))
    return found


CHECKS = _checks()


@pytest.mark.parametrize("size", sorted({size for _, size, _ in CHECKS}))
def test_on_ranks(size):
    """All checks of so many ranks, in one start of the processes."""
    found = ranks.run(size, [(name, check) for name, wanted, check in CHECKS if wanted == size])
    wrong = {name: error for name, error in found.items() if error}
    assert not wrong, "\n".join(f"{name}:\n{error}" for name, error in wrong.items())


@pytest.mark.parametrize(("total", "ranks_"), [(8, 2), (5, 2), (7, 3), (4, 3), (2, 3), (1, 3), (5, 4)])
def test_slices_are_those_of_chunk(monkeypatch, total, ranks_):
    monkeypatch.setattr(dist, "get_world_size", lambda group: ranks_)
    chunks = [each.tolist() for each in torch.arange(total).chunk(ranks_)]
    chunks += [[]] * (ranks_ - len(chunks))
    for rank, chunk in enumerate(chunks):
        monkeypatch.setattr(dist, "get_rank", lambda group, rank=rank: rank)
        assert list(range(total))[moe.local_experts(total, None)] == chunk
