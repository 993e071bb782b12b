"""The mixture with the weights of transformers' sparse blocks: the same outputs and the same gradients."""

import re
from pathlib import Path

import pytest
import torch

from unif2ace_kernels import moe
from unif2ace_kernels.moe import GroupedMoE

transformers = pytest.importorskip("transformers", reason="transformers is not installed (it is in the dev extra)")

HIDDEN, WIDTH, EXPERTS, TOP_K = 16, 12, 7, 3


def mixtral():
    from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock as Block

    config = transformers.MixtralConfig(
        hidden_size=HIDDEN, intermediate_size=WIDTH, num_local_experts=EXPERTS, num_experts_per_tok=TOP_K
    )
    return Block, config, {}


def qwen3_moe():
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock as Block

    config = transformers.Qwen3MoeConfig(
        hidden_size=HIDDEN, moe_intermediate_size=WIDTH, num_experts=EXPERTS, num_experts_per_tok=TOP_K,
        norm_topk_prob=True,
    )  # fmt: skip
    return Block, config, {}


def olmoe():
    from transformers.models.olmoe.modeling_olmoe import OlmoeSparseMoeBlock as Block

    config = transformers.OlmoeConfig(
        hidden_size=HIDDEN, intermediate_size=WIDTH, num_experts=EXPERTS, num_experts_per_tok=TOP_K,
        norm_topk_prob=False,
    )  # fmt: skip
    return Block, config, {"normalize": False}


def deepseek_v3():
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3MoE as Block

    config = transformers.DeepseekV3Config(
        hidden_size=HIDDEN, moe_intermediate_size=WIDTH, n_routed_experts=EXPERTS, num_experts_per_tok=TOP_K,
        n_group=1, topk_group=1, n_shared_experts=2, norm_topk_prob=True, routed_scaling_factor=2.5,
    )  # fmt: skip
    return Block, config, {"scoring": "sigmoid", "routed_scale": 2.5, "shared_width": 2 * WIDTH}


def copy_weights(block, moe):
    """Ours from theirs; where each of ours came from, to compare gradients in the same places."""

    def swiglu(mlp, name):  # [F, D] pieces of a dense layer: [pieces, D, gate | value], [pieces, F, D]
        gate, up, down = (getattr(getattr(mlp, each).weight, name) for each in ("gate_proj", "up_proj", "down_proj"))
        pieces = [each.view(-1, WIDTH, HIDDEN).transpose(1, 2) for each in (gate, up)]
        return torch.cat(pieces, 2), down.t().reshape(-1, WIDTH, HIDDEN)

    def of(name):  # "data" or "grad"
        w_in = getattr(block.experts.gate_up_proj, name).transpose(1, 2)
        w_out = getattr(block.experts.down_proj, name).transpose(1, 2)
        if hasattr(block, "shared_experts"):
            shared = swiglu(block.shared_experts, name)
            w_in, w_out = torch.cat([w_in, shared[0]]), torch.cat([w_out, shared[1]])
        return {"router_weight": getattr(block.gate.weight, name), "experts_w_in": w_in, "experts_w_out": w_out}

    for name, value in of("data").items():
        getattr(moe, name).data.copy_(value)
    if moe.selection_bias is not None:
        moe.selection_bias.copy_(block.gate.e_score_correction_bias)
    return of


@pytest.mark.parametrize("model", [mixtral, qwen3_moe, olmoe, deepseek_v3])
def test_outputs_and_gradients_are_theirs(model):
    Block, config, options = model()
    config._experts_implementation = "eager"
    block = Block(config).double()
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
    if options.get("scoring") == "sigmoid":
        torch.nn.init.normal_(block.gate.e_score_correction_bias, std=0.3)
    ours = GroupedMoE(
        HIDDEN, WIDTH, EXPERTS, groups=1, top_k=TOP_K, activation="swiglu", bias=False, dtype=torch.float64, **options
    )
    of = copy_weights(block, ours)
    x = torch.randn(2, 15, HIDDEN, dtype=torch.float64)
    theirs_x, ours_x = x.clone().requires_grad_(), x.clone().requires_grad_()
    theirs, (y, routing) = block(theirs_x), ours(ours_x, torch.zeros(2, 15, dtype=torch.int64))
    grad_y = torch.randn_like(x)
    theirs.backward(grad_y)
    y.backward(grad_y)
    assert (routing.counts > 0).sum() > EXPERTS / 2 and routing.frequency.std() > 0
    # They score in float32, whatever the weights are.
    close = {"atol": 3e-6, "rtol": 3e-6}
    torch.testing.assert_close(y, theirs, **close)
    torch.testing.assert_close(ours_x.grad, theirs_x.grad, **close)
    for name, grad in of("grad").items():
        torch.testing.assert_close(getattr(ours, name).grad, grad, **close)


@pytest.mark.parametrize("model", [mixtral, qwen3_moe])
def test_readme_takes_their_weights(model):
    Block, config, _ = model()
    config._experts_implementation = "eager"
    block = Block(config).double()
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
    readme = (Path(moe.__file__).parent / "README.md").read_text()
    (example,) = re.findall(r"```python\n([^`]*def sparse_block[^`]*)```", readme)
    names = {}
    exec(example, names)  # noqa: S102
    x = torch.randn(15, HIDDEN, dtype=torch.float64)
    y, _ = names["sparse_block"](x, block.gate.weight, block.experts.gate_up_proj, block.experts.down_proj, TOP_K)
    torch.testing.assert_close(y, block(x[None])[0], atol=3e-6, rtol=3e-6)
