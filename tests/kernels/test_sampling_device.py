"""The loop on a device: no step reads from it or copies to it, and on CUDA a captured step is the loop."""

import contextlib
import functools
from typing import NamedTuple
from unittest import mock

import pytest
import torch
from sampler_models import MASK, batch, model, run

from unif2ace_kernels.sampling import MaskedDiffusionSampler, draw_torch
from unif2ace_kernels.sampling.graph import StepGraph

SETTINGS = {
    "default": {},
    "entropy": {"policy": "entropy"},
    "margin": {"policy": "margin"},
    "random": {"policy": "random"},
    "Show-o": dict.fromkeys(("temperature_mode", "ties", "known", "counts", "last_step", "confidence_floor"), "showo"),
}


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_a_step_number_on_the_device_is_the_step(settings):
    step_fn, head = model()
    sampler = MaskedDiffusionSampler(lambda ids, step: step_fn(ids, 0), 5, MASK, head=head, guidance=1.0, **settings)
    ids = batch()
    ids[1, 5:20] = 3
    numbered, steps = run(sampler, ids, seed=4, offset=9)
    tables = sampler.begin(ids, None, 4, 9)
    for step, want in enumerate(steps):
        ids, sample, confidence = sampler.advance(ids, torch.tensor(step), tables)
        assert torch.equal(ids, want.ids) and torch.equal(sample, want.sample)
        assert torch.equal(confidence, want.confidence)
    assert torch.equal(sample, numbered)


class Tables(NamedTuple):
    rows: torch.Tensor


class NothingOnTheHost(torch.utils._python_dispatch.TorchDispatchMode):
    """Fails where a tensor of the host takes part: on a GPU it would be copied there, which no graph can hold.

    torch.tensor and torch.as_tensor copy too, and show no op of it.
    """

    def __enter__(self):
        self._patch = pytest.MonkeyPatch()
        for name in ("tensor", "as_tensor"):
            self._patch.setattr(torch, name, functools.partial(self._refuse, name))
        return super().__enter__()

    def __exit__(self, *args):
        self._patch.undo()
        return super().__exit__(*args)

    @staticmethod
    def _refuse(name, *args, **kwargs):
        raise AssertionError(f"torch.{name} copies from the host")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for each in torch.utils._pytree.tree_leaves((args, kwargs, out)):
            assert not (isinstance(each, torch.Tensor) and each.device.type == "cpu"), func
        return out


@pytest.mark.parametrize("head", [True, False])
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_a_step_reads_nothing_from_the_device_and_copies_nothing_to_it(settings, head):
    """Tensors of the device "meta" have no data: what reads one, or asks how many are masked, raises."""
    weight = torch.empty(40, 24, device="meta"), torch.empty(40, device="meta")

    def step_fn(ids, step):
        return tuple(torch.empty(*ids.shape, 24 if head else 40, device="meta") for _ in range(2))

    sampler = MaskedDiffusionSampler(
        step_fn, 5, MASK, head=weight if head else None, guidance=1.0, top_p=0.9, **settings
    )
    tables = sampler.begin(batch(), None, 4, 9)
    tables = type(tables)(*(each.to("meta") for each in tables))
    start = batch().to("meta")
    for step in (1, torch.empty((), dtype=torch.int64, device="meta")):
        with NothingOnTheHost():
            ids, sample, confidence = sampler.advance(start, step, tables)
        assert ids.shape == sample.shape == confidence.shape == (3, 48)


@pytest.mark.parametrize("ties", ["index", "showo"])
def test_the_torch_ops_neither_read_nor_copy(ties):
    """As above for the op bodies, which run on a GPU where no kernel does."""
    on_meta = {"device": "meta"}
    ids, words = torch.empty(6, dtype=torch.int64, **on_meta), [torch.empty((), dtype=torch.int64, **on_meta)] * 2
    unknown, logits = torch.empty(6, dtype=torch.bool, **on_meta), torch.empty(2, 6, 9, **on_meta)
    draw = (0.7, 3, 0.9, "log_prob")
    with NothingOnTheHost():
        draw_torch.draw(*logits, ids, *words, 1.5, *draw)
        draw_torch.sample_logits(*logits, ids, unknown, ids, *words, 1, 7, 1.5, *draw, True)
        head = torch.empty(9, 4, **on_meta), torch.empty(9, **on_meta)
        draw_torch.sample_hidden(*logits[..., :4], *head, ids, unknown, ids, *words, 1, 7, 1.5, *draw, True)
        pairs = [each.view(2, 3) for each in (logits[0, :, 0].contiguous(), unknown, ids)]
        temperature, count = torch.empty((), **on_meta), torch.empty(2, dtype=torch.int64, **on_meta)
        draw_torch.remask(*pairs[:2], count, pairs[2], *words, temperature, ties)


def test_a_loop_that_must_end_early_knows_it_without_looking():
    def sampler(**fields):
        return MaskedDiffusionSampler(lambda ids, step: None, 50, MASK, **fields)

    assert sampler().steps_at_most(3) == 3 and sampler().steps_at_most(1) == 1
    assert sampler(policy="random").steps_at_most(3) == sampler(known="showo").steps_at_most(3) == 50
    assert MaskedDiffusionSampler(lambda ids, step: None, 4, MASK).steps_at_most(48) == 4


def test_a_graph_needs_a_cuda_device():
    with pytest.raises(ValueError, match="^cuda_graph: expected False .* got True on cpu"):
        MaskedDiffusionSampler(lambda ids, step: None, 2, MASK, cuda_graph=True)(batch())


@pytest.mark.parametrize("is_ended", [False, True])
def test_a_capture_that_failed_gives_its_memory_back(monkeypatch, is_ended):
    """torch does not where the capture could not be ended, and then refuses every other one."""
    released = []

    def end_allocation(device, pool):
        if is_ended:
            raise RuntimeError("not currently recording")
        released.append(("ended", pool))

    @contextlib.contextmanager
    def graph(*_, **options):
        yield
        raise RuntimeError(f"operation not permitted in {options['pool']}")

    for name in ("CUDAGraph", "Stream", "current_stream", "stream", "device", "default_generators"):
        monkeypatch.setattr(torch.cuda, name, mock.MagicMock())
    monkeypatch.setattr(torch.cuda, "graph", graph)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: (0, 7))
    monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", end_allocation)
    monkeypatch.setattr(torch._C, "_cuda_releasePool", lambda device, pool: released.append(("released", pool)))
    with pytest.raises(ValueError, match=r"^step_fn: expected one that a CUDA graph can hold, got .* in \(0, 7\)"):
        StepGraph(lambda ids, step, run: (ids, ids, ids), batch(), Tables(batch()))
    assert released == ([] if is_ended else [("ended", (0, 7)), ("released", (0, 7))])


def cuda_sampler(**settings):
    """Its model reads no tensor of the host."""
    rng = torch.Generator().manual_seed(0)
    embed, place, weight = (torch.randn(size, 24, generator=rng).cuda() for size in (41, 48, 40))

    def step_fn(ids, step):
        h = embed[ids] + place
        return h + h.mean(1, keepdim=True), h

    return MaskedDiffusionSampler(step_fn, 6, MASK, head=(weight / 3, weight[:, 0] + 0), guidance=1.0, **settings)


@pytest.mark.gpu
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_on_cuda_no_step_waits_and_a_graph_is_the_loop(settings, no_wait):
    eager, graph = cuda_sampler(**settings), cuda_sampler(**settings, cuda_graph=True)
    ids = batch().cuda()
    ids[1, 5:20] = 3
    tables = eager.begin(ids, None, 4, 9)
    eager.advance(ids, 0, tables)  # what compiles or loads does so here
    with no_wait():
        state = ids
        for step in range(6):
            state, sample, _ = eager.advance(state, step, tables)
    want, steps = run(eager, ids, seed=4, offset=9)
    assert torch.equal(sample, want)
    got, replayed = run(graph, ids, seed=4, offset=9)
    assert torch.equal(got, want)
    for left, right in zip(replayed, steps, strict=True):
        assert torch.equal(left.ids, right.ids) and torch.equal(left.confidence, right.confidence)
    # The same graph for another seed, other known tokens and other rows.
    others = torch.full_like(ids, MASK)
    rows = torch.arange(1000, 1000 + ids.numel(), device="cuda").view(ids.shape)
    arguments = {"seed": torch.tensor(77, device="cuda"), "offset": 3, "rows": rows}
    assert torch.equal(graph(others, **arguments), eager(others, **arguments))
    assert len(graph._graphs) == 1
    assert torch.equal(graph(ids[:1], seed=4), eager(ids[:1], seed=4)) and len(graph._graphs) == 2


@pytest.mark.gpu
def test_on_cuda_the_ids_are_those_of_the_cpu():
    logits = torch.randn(2, 3, 48, 40, generator=torch.Generator().manual_seed(6))

    def sample(device):
        on_device = logits.to(device)
        sampler = MaskedDiffusionSampler(
            lambda ids, step: tuple(on_device), 6, MASK, guidance=1.5, policy="random", top_p=0.9
        )
        return sampler(batch().to(device), seed=12).cpu()

    assert torch.equal(sample("cuda"), sample("cpu"))


@pytest.mark.gpu
def test_a_step_function_that_waits_cannot_be_captured():
    def waits(ids, step):
        return torch.zeros(*ids.shape, 40, device="cuda") + float((ids == MASK).sum())

    with pytest.raises(ValueError, match="^step_fn: expected one that a CUDA graph can hold"):
        MaskedDiffusionSampler(waits, 3, MASK, cuda_graph=True)(batch().cuda())
    ids = batch().cuda()
    assert MaskedDiffusionSampler(waits, 3, MASK)(ids).shape == (3, 48)
    torch.cuda.empty_cache()  # the allocator knows that no capture is under way
    assert torch.equal(cuda_sampler(cuda_graph=True)(ids), cuda_sampler()(ids))
