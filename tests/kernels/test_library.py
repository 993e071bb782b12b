"""Which implementation of an op runs: by what can be imported, by device and by dtype."""

from __future__ import annotations

import pytest
import torch

from unif2ace_kernels import _library, d3diff, moe
from unif2ace_kernels._library import KERNEL_DTYPES, Implementation, explain, register


def _named(name: str, **where) -> Implementation:
    return Implementation(name, ("cpu",), lambda x, by: x + len(name), **where)


@pytest.fixture
def op(request):
    """An op of the given implementations, gone after the test."""
    name = f"test_{request.node.name.split('[')[0]}"

    def define(*implementations):
        return register(
            f"{name}(Tensor x, Tensor? by) -> Tensor", implementations=implementations, fake=lambda x, by: x
        )

    yield name, define
    del _library._IMPLEMENTATIONS[name]


def test_the_first_that_takes_the_dtypes_runs(op):
    name, define = op
    call = define(_named("c++", missing="no compiler"), _named("tri", dtypes=KERNEL_DTYPES), _named("torch"))
    low, high, whole = torch.zeros(2, dtype=torch.float16), torch.zeros(2).double(), torch.zeros(2, dtype=torch.int64)
    assert call(low, None)[0] == 3 and call(whole, None)[0] == 3
    assert call(high, None)[0] == 5 and call(low, high)[0] == 5 and call(low, by=high)[0] == 5
    assert explain(name, low).implementation == "tri"
    explanation = explain(name, low, high)
    assert explanation.implementation == "torch"
    assert explanation.passed_over == (
        ("c++", "no compiler"), ("tri", "takes float32, bfloat16, float16, not float64")
    )  # fmt: skip
    assert [each.name for each in _library.runnable(name, "cpu")] == ["tri", "torch"]
    assert _library.runnable(name, "cuda") == ()


def test_dtypes_that_none_takes_are_refused_by_name(op):
    name, define = op
    call = define(_named("tri", dtypes=KERNEL_DTYPES), _named("half", dtypes=(torch.float16,)))
    expected = "tri takes float32, bfloat16, float16, not float64; half takes float16, not float64"
    with pytest.raises(ValueError, match=f"{name}: {expected}"):
        call(torch.zeros(2).double(), None)
    with pytest.raises(ValueError, match="no implementation runs: tri: takes .* not float64; half: takes float16"):
        explain(name, torch.zeros(2).double())


def _loss(x, loss=d3diff.loss_from_logits, **head):
    return loss(x, targets=torch.zeros(2, 3, dtype=torch.int64), mask_prob=torch.ones(2), code_range=(0, 4), **head)[0]


@pytest.mark.parametrize("function, x", [
    (lambda x: moe.route(x, torch.zeros(6, dtype=torch.int64), (4,), 2).weight, torch.randn(6, 4)),
    (lambda x: moe.experts(x, moe.arrange(torch.zeros(6, 1, dtype=torch.int64), torch.ones(6, 1), 1),
                           torch.ones(1, 4, 5), None, torch.ones(1, 5, 4), None, activation="relu"), torch.randn(6, 4)),
    (lambda x: moe.mix(x, torch.ones(2, 1), x.new_empty(2, 0, 3, 4)), torch.randn(2, 3, 4)),
    (lambda x: _loss(x, d3diff.loss, weight=torch.ones(4, 5), bias=None), torch.randn(2, 3, 5)),
    (_loss, torch.randn(2, 3, 4)),
], ids=["route", "experts", "mix", "loss", "loss_from_logits"])  # fmt: skip
def test_forward_mode_is_refused_where_it_would_give_zero(function, x):
    with pytest.raises(RuntimeError, match="has no forward-mode derivative"):
        torch.func.jvp(function, (x,), (torch.ones_like(x),))
    with torch.autograd.forward_ad.dual_level():
        assert function(x).isfinite().all()  # no tangent, nothing to refuse
