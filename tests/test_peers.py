"""Other people's libraries take what the adapters give them: transformers' for real, others where they are installed.

Where a library needs a GPU, its entry is replaced by one that binds the arguments to the library's own signature and
says which shape came under which name.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import peers
from benchmarks.cases import heads
from benchmarks.cases.moe_layer import loop
from benchmarks.peers import OURS, OUT_IN, SPLIT, Peer, Task

T, S, E, D, WIDTH = 10, 2, 4, 8, 32
CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def _given(peer: Peer, activation: str = "swiglu", dtype: torch.dtype = torch.float32) -> tuple[tuple, tuple]:
    """Arguments for plain torch and for the peer, which keeps weights in its own layout."""
    torch.manual_seed(0)
    gated = activation == "swiglu"
    x, w_in, w_out = torch.randn(T, D), torch.randn(E, D, WIDTH * (1 + gated)), torch.randn(E, WIDTH, D)
    x, w_in, w_out = (each.to(dtype).requires_grad_() for each in (x, w_in, w_out))
    biases = (None, None) if gated else tuple(torch.randn(E, n, dtype=dtype) for n in (WIDTH, D))
    choice = torch.randint(E, (T, S)), torch.rand(T, S)
    plain = (x, *choice, w_in, biases[0], w_out, biases[1], activation)
    theirs = (x, *choice, peer.layout.w_in(w_in), biases[0], peer.layout.w_out(w_out), biases[1], activation)
    return plain, theirs


@pytest.mark.parametrize("layout", [OURS, OUT_IN, SPLIT], ids=["ours", "out, in", "split"])
def test_layouts_come_back_as_they_were(layout) -> None:
    w_in, w_out = torch.randn(E, D, 2 * WIDTH), torch.randn(E, WIDTH, D)
    assert torch.equal(layout.w_in_back(layout.w_in(w_in)), w_in)
    assert torch.equal(layout.w_out_back(layout.w_out(w_out)), w_out)
    assert layout.w_in(w_in).is_contiguous() and layout.w_out(w_out).is_contiguous()


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm"])
def test_transformers_experts_give_what_a_loop_gives(implementation: str) -> None:
    pytest.importorskip("transformers", reason="needs transformers")
    found = peers.transformers(implementation)
    assert [each.activations[0] for each in found] == ["swiglu", "gelu_tanh"][: len(found)]
    assert len(found) == 1 + (implementation != "eager")
    for peer in found:
        plain, theirs = _given(peer, peer.activations[0])
        y, expected = peer.call(*theirs), loop(*plain)
        torch.testing.assert_close(y, expected)
        seed, leaves = torch.randn_like(y), [plain[0], plain[3], plain[5]]
        for ours, true in zip(*(torch.autograd.grad(each, leaves, seed) for each in (y, expected)), strict=True):
            torch.testing.assert_close(ours, true)


def test_refusals_name_the_reason() -> None:
    peer = Peer("a", None, dtypes=(torch.bfloat16,), devices=("cuda",), missing="not installed")
    asked = {"activation": "swiglu", "bias": False, "dtype": torch.bfloat16, "device": CUDA, "training": True}

    def refusal(peer: Peer, **changes) -> str | None:
        return peer.refusal(Task(**{"copies": 0.0, **asked, **changes}))

    assert refusal(peer, device=CPU) == "runs on cuda, not on cpu"
    assert refusal(peer, activation="gelu_tanh") == "has no gelu_tanh experts without biases"
    assert refusal(peer, bias=True) == "has no swiglu experts with biases"
    assert refusal(peer, dtype=torch.float32) == "does not take torch.float32"
    assert refusal(peer) == "not installed"
    pytest.importorskip("transformers", reason="needs transformers")
    gated, ungated = peers.transformers("batched_mm")
    assert refusal(gated) is None and "3 GiB" in refusal(gated, copies=3.0 * 2**30)
    gelu = {"activation": "gelu_tanh", "bias": True}
    assert refusal(ungated, **gelu) is None
    assert "4 % off" in refusal(ungated, **gelu, device=CPU)
    assert refusal(ungated, **gelu, device=CPU, training=False) is None


def _catch(monkeypatch, owner: object, name: str, result: Callable, signature: Callable | None = None) -> list[dict]:
    """Replace owner.name: calls are bound to the signature it has, kept, and answered by `result`."""
    real, kept = inspect.signature(signature or getattr(owner, name)), []

    def entry(*arguments, **options):
        kept.append(real.bind(*arguments, **options).arguments)
        return result(*arguments, **options)

    monkeypatch.setattr(owner, name, entry)
    return kept


def _shapes(arguments: dict) -> dict[str, tuple]:
    return {name: tuple(each.shape) for name, each in arguments.items() if isinstance(each, Tensor)}


def _package(name: str):
    """Where it is not installed, or not for this machine, there is nothing to hold the adapter to."""
    module, missing = peers.imported(name)
    return pytest.skip(f"needs {name.partition('.')[0]}: {missing}") if module is None else module


def test_liger_takes_the_mixture(monkeypatch) -> None:
    library = _package("liger_kernel.ops").LigerFusedMoEFunction

    def forward(x, gate_up_proj, down_proj, top_k_index, top_k_weights):
        back = gate_up_proj.transpose(1, 2), None, down_proj.transpose(1, 2), None
        return loop(x, top_k_index.long(), top_k_weights, *back, "swiglu")

    kept = _catch(monkeypatch, library, "apply", forward, lambda *given: library.forward(None, *given))
    peer = peers.liger()
    plain, theirs = _given(peer)
    torch.testing.assert_close(peer.call(*theirs), loop(*plain))
    names = list(inspect.signature(library.forward).parameters)[-5:]
    assert names == ["x", "gate_up_proj", "down_proj", "top_k_index", "top_k_weights"]
    assert kept and kept[0]["given"][3].dtype == torch.int32


def test_sonic_takes_the_mixture(monkeypatch) -> None:
    library = _package("sonicmoe")
    kept = _catch(monkeypatch, library, "moe_general_routing_inputs", lambda x, *_, **__: (x, None))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: SimpleNamespace(cuda_stream=0))
    peer = peers.sonic()
    peer.call(*_given(peer)[1])
    assert _shapes(kept[0]) == {
        "x": (T, D), "router_scores": (T * S,), "token_indices": (T * S,), "expert_indices": (T * S,),
        "w1": (2 * WIDTH, D, E), "w2": (D, WIDTH, E),
    }  # fmt: skip
    assert torch.equal(kept[0]["token_indices"], kept[0]["token_indices"].sort().values)
    assert kept[0]["E"] == E and kept[0]["is_inference_mode_enabled"] is False and kept[0]["concat_layout"] is True


def test_scattermoe_takes_the_mixture(monkeypatch) -> None:
    library = _package("scattermoe.parallel_experts")

    def sort(expert_idxs, num_experts):
        ordered, order = expert_idxs.flatten().sort(stable=True)
        return ordered, order, torch.bincount(ordered, minlength=num_experts).cumsum(-1)

    def linear(inputs, expert_weights, k, experts, order, offsets, expert_biases=None, gates=None, grouped_in=False,
               grouped_out=False):  # fmt: skip
        rows = inputs if grouped_in else inputs[order // k]
        out = (rows[:, None] @ expert_weights[experts])[:, 0]
        out = out if expert_biases is None else out + expert_biases[experts]
        if grouped_out:
            return out
        spread = torch.zeros_like(out).index_copy(0, order, out)
        return (gates[:, None] @ spread.view(*gates.shape, -1))[:, 0]

    _catch(monkeypatch, library, "flatten_sort_count", sort, lambda expert_idxs, num_experts: None)
    kept = _catch(monkeypatch, library, "parallel_linear", linear)
    peer = peers.scattermoe()
    for activation in peer.activations:
        plain, theirs = _given(peer, activation)
        torch.testing.assert_close(peer.call(*theirs), loop(*plain))
    assert {"inputs", "expert_weights", "k", "sorted_expert_idxs", "expert_offsets"} <= kept[0].keys()


def test_megablocks_takes_the_mixture(monkeypatch) -> None:
    library = _package("megablocks.layers.dmoe")
    _package("grouped_gemm")
    kept = _catch(monkeypatch, library.ParallelDroplessMLP, "grouped_forward_once", lambda self, x, *_: (x, None))
    peer = peers.megablocks()
    peer.call(*_given(peer, dtype=torch.bfloat16)[1])
    assert _shapes(kept[0]) == {"x": (1, T, D), "expert_weights": (T, S), "top_experts": (T, S)}


def test_flashinfer_draws_from_logits() -> None:
    library = _package("flashinfer.sampling")
    assert next(iter(inspect.signature(library.sampling_from_logits).parameters)) == "logits"


def _head() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    return torch.randn(2, T // 2, D), torch.randn(E, D), torch.randn(E), torch.randint(E, (T,))


def _problem(mode: str = "forward+backward") -> heads.Problem:
    x, weight, bias, labels = _head()
    rows = heads.Rows(torch.arange(T), labels, None)
    return heads.Problem(lambda: rows, labels, (0, E), [x, weight, bias], mode, [torch.ones(())])


def test_liger_takes_the_head(monkeypatch) -> None:
    library = _package("liger_kernel.transformers")

    def forward(self, lin_weight, _input, target, bias=None):
        return F.cross_entropy(F.linear(_input, lin_weight, bias), target)

    kept = _catch(monkeypatch, library.LigerFusedLinearCrossEntropyLoss, "forward", forward)
    monkeypatch.setattr(heads, "_on_gpu", lambda device: True)
    problem = _problem()
    baseline = heads.peers(problem)["Liger fused linear CE"]
    _, *gradients = baseline.run()
    assert len(gradients) == 3 and _shapes(kept[0]) == {
        "lin_weight": (E, D), "_input": (T, D), "target": (T,), "bias": (E,)
    }  # fmt: skip
    expected = F.cross_entropy(F.linear(*problem.inputs).flatten(0, 1), problem.labels)
    torch.testing.assert_close(baseline.run()[0], expected)


def test_cut_cross_entropy_takes_the_head(monkeypatch) -> None:
    library = _package("cut_cross_entropy")
    with_bias = heads.has_bias(library.linear_cross_entropy)

    def loss(e, c, targets, bias=None, reduction="mean", **_):
        return F.cross_entropy(F.linear(e, c, bias), targets, reduction=reduction)

    real = library.linear_cross_entropy
    kept = _catch(monkeypatch, library, "linear_cross_entropy", loss)
    monkeypatch.setattr(heads, "has_bias", lambda _: "bias" in inspect.signature(real).parameters)
    monkeypatch.setattr(heads, "_on_gpu", lambda device: True)
    baseline = heads.peers(_problem())["cut-cross-entropy"]
    assert baseline.rate_only is not with_bias and len(baseline.run()) == (4 if with_bias else 3)
    assert _shapes(kept[0]) == {"e": (T, D), "c": (E, D), "targets": (T,), **({"bias": (E,)} if with_bias else {})}
    assert kept[0]["reduction"] == "none"
