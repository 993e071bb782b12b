"""Experts over the one rank of an NCCL group."""

from __future__ import annotations

import functools
import warnings

import pytest
import torch
import torch.distributed as dist
from parallel_cases import Case, gradients, leaves, problem, routed

from unif2ace_kernels import moe


@pytest.mark.gpu
def test_one_gpu_over_nccl(tmp_path):
    """Values, gradients, and one wait for the device."""
    case = Case((300,), 9, 3, "groups", "swiglu")
    given = problem(case, torch.float32)
    dist.init_process_group("nccl", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        group, results = dist.group.WORLD, []
        x, logits = given.x[0].cuda(), given.logits[0].float()
        routing = moe.Routing(*(each.detach().cuda() for each in routed(case, logits)))
        for call in (moe.experts, functools.partial(moe.parallel_experts, group=group)):
            own, weight, *parameters = leaves([x, routing.weight, *(each.cuda() for each in given.parameters)])
            y = call(own, routing._replace(weight=weight), *parameters, activation=case.activation)
            y.backward(given.grad[0].cuda())
            results.append([y.detach(), own.grad, weight.grad, *gradients(parameters)])
        for one, other in zip(*results, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            y = moe.parallel_experts(
                own, routing._replace(weight=weight), *parameters, activation=case.activation, group=group
            )
            y.backward(y.detach())
            torch.cuda.set_sync_debug_mode("default")
        assert len([each for each in seen if "synchroniz" in str(each.message)]) == 1
    finally:
        torch.cuda.set_sync_debug_mode("default")
        dist.destroy_process_group()
