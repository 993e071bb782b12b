"""experts_implementation="unif2ace" in whole models of transformers: logits, gradients, generation, saved in shards."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

transformers = pytest.importorskip("transformers", reason="transformers is not installed (it is in the dev extra)")

from transformers.activations import ACT2FN  # noqa: E402
from transformers.integrations.moe import use_experts_implementation  # noqa: E402

from unif2ace_kernels import moe  # noqa: E402
from unif2ace_kernels import transformers as ours  # noqa: E402

SMALL = {"vocab_size": 61, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "pad_token_id": 0,
         "num_key_value_heads": 2, "max_position_embeddings": 64, "bos_token_id": 1, "eos_token_id": None,
         "initializer_range": 0.2}  # fmt: skip
CONFIGS = {
    "mixtral": lambda: transformers.MixtralConfig(
        **SMALL, intermediate_size=24, num_local_experts=5, num_experts_per_tok=2
    ),
    "qwen3_moe": lambda: transformers.Qwen3MoeConfig(
        **SMALL, intermediate_size=48, moe_intermediate_size=20, num_experts=6, num_experts_per_tok=3, head_dim=8
    ),
    "olmoe": lambda: transformers.OlmoeConfig(**SMALL, intermediate_size=24, num_experts=7, num_experts_per_tok=3),
    "deepseek_v3": lambda: transformers.DeepseekV3Config(
        **{**SMALL, "num_key_value_heads": 4}, intermediate_size=48, moe_intermediate_size=16, n_routed_experts=8,
        num_experts_per_tok=3, n_group=2, topk_group=1, n_shared_experts=1, first_k_dense_replace=1, q_lora_rank=16,
        kv_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=8, v_head_dim=8,
    ),
}  # fmt: skip


@pytest.fixture(scope="module", params=CONFIGS)
def saved(request, tmp_path_factory):
    """A folder with a tiny random model in several shards."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp(request.param)
    model = transformers.AutoModelForCausalLM.from_config(CONFIGS[request.param](), dtype=torch.float32)
    model.save_pretrained(folder, max_shard_size="30KB")
    assert len(list(folder.glob("model-*.safetensors"))) > 1
    return folder


def load(folder, implementation, dtype=torch.float32):
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, experts_implementation=implementation, dtype=dtype
    )
    assert model.config._experts_implementation == implementation
    return model


def tokens():
    return torch.randint(2, 61, (3, 17), generator=torch.Generator().manual_seed(1))


def outcome(model):
    """Logits, and the gradient of every parameter."""
    ids = tokens()
    output = model(input_ids=ids, labels=ids)
    output.loss.backward()
    return output.logits, {name: each.grad for name, each in model.named_parameters() if each.grad is not None}


def count_calls(monkeypatch):
    calls = []
    run = ours.experts

    def counted(*arguments, **options):
        calls.append(arguments)
        return run(*arguments, **options)

    monkeypatch.setattr(ours, "experts", counted)
    return calls


def test_float32_logits_and_gradients(saved, monkeypatch):
    calls = count_calls(monkeypatch)
    theirs = outcome(load(saved, "eager"))
    assert calls == []
    logits, gradients = outcome(load(saved, "unif2ace"))
    assert len(calls) == (1 if "deepseek" in saved.name else 2)
    torch.testing.assert_close(logits, theirs[0], rtol=2e-5, atol=2e-5)
    assert gradients.keys() == theirs[1].keys() and any("experts.gate_up_proj" in name for name in gradients)
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, theirs[1][name], rtol=1e-4, atol=1e-5, msg=name)
        assert gradient.is_contiguous(), name


def test_bfloat16_as_near_the_truth_as_eager(saved):
    """One layer's experts, the same choice for all: a whole model in 16 bits may choose other experts."""
    truth, eager, unif2ace = (
        next(m for name, m in load(saved, implementation, dtype).named_modules() if name.endswith("mlp.experts"))
        for implementation, dtype in (
            ("eager", torch.float64), ("eager", torch.bfloat16), ("unif2ace", torch.bfloat16)
        )
    )  # fmt: skip
    with torch.no_grad():
        for mine, its in zip(truth.parameters(), eager.parameters(), strict=True):
            mine.copy_(its)  # the truth of the rounded weights
    rng = torch.Generator().manual_seed(2)
    x = torch.randn(64, 32, generator=rng, dtype=torch.float64).bfloat16()
    expert = torch.rand(64, truth.num_experts, generator=rng).topk(3).indices
    weight = torch.rand(64, 3, generator=rng).bfloat16()
    results = []
    for module in (truth, eager, unif2ace):
        dtype = module.down_proj.dtype
        leaves = [x.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_()]
        y = module(leaves[0], expert, leaves[1])
        assert y.dtype == dtype
        y.backward(torch.ones_like(y))
        results.append([y, *(each.grad for each in (*leaves, *module.parameters()))])
    for exact, theirs, mine in zip(*results, strict=True):
        error, peer = ((each.double() - exact).abs().max() for each in (mine, theirs))
        assert error <= 2 * peer + 1e-5 * exact.abs().max()


def test_generation(saved):
    ids = tokens()[:, :5]
    eager, mine = (
        load(saved, name).eval().generate(ids, max_new_tokens=12, do_sample=False) for name in ("eager", "unif2ace")
    )
    assert mine.shape == (3, 17) and torch.equal(mine, eager)


def test_saved_in_shards_and_loaded_again(saved, tmp_path):
    model = load(saved, "unif2ace")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.25)
    model.save_pretrained(tmp_path, max_shard_size="30KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    assert "unif2ace" not in (tmp_path / "config.json").read_text()  # who loads it without us can
    ids = tokens()
    for name in ("eager", "unif2ace"):
        torch.testing.assert_close(load(tmp_path, name)(ids).logits, model(ids).logits, rtol=2e-5, atol=2e-5)


class Config:
    _experts_implementation = "eager"


def experts_class(act, gate=None, **options):
    """An experts module of transformers with any layout, D 8, F 5, E 4, and its eager forward."""
    up, transposed = (
        ("gate_up_proj" if options.get("has_gate", True) else "up_proj"),
        options.get("is_transposed", False),
    )

    @use_experts_implementation(**options)
    class Experts(nn.Module):
        def __init__(self, config):
            super().__init__()
            self.num_experts, self.act_fn = 4, ACT2FN[act]
            wide = 10 if up == "gate_up_proj" else 5
            shapes = {up: (8, wide), "down_proj": (5, 8)}
            for name, shape in shapes.items():
                shape = shape if transposed else shape[::-1]
                self.register_parameter(name, nn.Parameter(torch.randn(4, *shape) * 0.5))
                if options.get("has_bias"):
                    self.register_parameter(f"{name}_bias", nn.Parameter(torch.randn(4, shapes[name][1])))

        def forward(self, hidden_states, top_k_index, top_k_weights):
            y = torch.zeros_like(hidden_states)
            for t, (own, weight) in enumerate(zip(top_k_index.tolist(), top_k_weights)):
                for e, w in zip(own, weight):
                    if e < self.num_experts:
                        y[t] += w * self.down(self.up(hidden_states[t], e), e)
            return y

        def linear(self, x, name, e):
            weight = getattr(self, name)[e]
            out = x @ (weight if transposed else weight.t())
            return out + getattr(self, f"{name}_bias")[e] if options.get("has_bias") else out

        def up(self, x, e):
            out = self.linear(x, up, e)
            return self._apply_gate(out[None])[0] if up == "gate_up_proj" else self.act_fn(out)

        def down(self, a, e):
            return self.linear(a, "down_proj", e)

    if gate is not None:
        Experts._apply_gate = gate
    return Experts


LAYOUTS = [
    ("silu", {}),
    ("gelu_pytorch_tanh", {"is_transposed": True}),
    ("gelu_new", {"has_bias": True}),
    ("silu", {"is_transposed": True, "has_bias": True}),
    ("gelu", {"has_gate": False, "has_bias": True}),
    ("relu", {"has_gate": False, "is_transposed": True}),
    ("swish", {"has_gate": False}),
]


def layer_outcome(module, implementation, expert, parallel=False):
    module.config = Config()
    module.config._experts_implementation = implementation
    module._is_expert_parallel = parallel
    module.zero_grad()
    rng = torch.Generator().manual_seed(3)
    x, weight = (torch.randn(13, n, generator=rng, dtype=torch.float64).requires_grad_() for n in (8, 2))
    y = module(x, expert, weight)
    y.backward(torch.ones_like(y))
    return [y, x.grad, weight.grad, *(each.grad.clone() for each in module.parameters())]


@pytest.mark.parametrize(("act", "options"), LAYOUTS, ids=str)
def test_every_layout(act, options):
    module = experts_class(act, **options)(Config()).double()
    expert = torch.randint(4, (13, 2), generator=torch.Generator().manual_seed(4))
    theirs, mine = (layer_outcome(module, name, expert) for name in ("eager", "unif2ace"))
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


def test_slots_of_other_ranks_count_for_nothing():
    module = experts_class("silu")(Config()).double()
    expert = torch.randint(5, (13, 2), generator=torch.Generator().manual_seed(5))
    assert (expert == 4).any()
    theirs, mine = (layer_outcome(module, name, expert, True) for name in ("eager", "unif2ace"))
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


def test_weights_are_not_copied(monkeypatch):
    calls = count_calls(monkeypatch)
    module = experts_class("silu")(Config())
    expert = torch.zeros(13, 2, dtype=torch.int64)
    module.config._experts_implementation = "unif2ace"
    module(torch.randn(13, 8), expert, torch.ones(13, 2)).sum().backward()
    ((_, _, w_in, _, w_out, _),) = calls
    for view, parameter in ((w_in, module.gate_up_proj), (w_out, module.down_proj)):
        assert view.data_ptr() == parameter.data_ptr() and view.shape == parameter.transpose(1, 2).shape
        assert parameter.grad.is_contiguous()


def test_autograd_keeps_the_gradient_that_was_made():
    """Of weights as transformers keeps them too: in another layout autograd would copy it."""
    made = []
    weights = [torch.randn(4, 10, 8, requires_grad=True), torch.randn(4, 8, 5, requires_grad=True)]
    views = [each.transpose(1, 2) for each in weights]
    for view in views:
        view.register_hook(lambda gradient: made.append(gradient.data_ptr()))
    routing = moe.arrange(torch.zeros(13, 1, dtype=torch.int64), torch.ones(13, 1), 4)
    moe.experts(torch.randn(13, 8), routing, views[0], None, views[1], None, activation="swiglu").sum().backward()
    assert {each.grad.data_ptr() for each in weights} == set(made)


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (experts_class("relu2", has_gate=False), "expected act_fn gelu, gelu_tanh, relu, silu in Experts, got ReLUSq"),
        (experts_class("gelu"), "expected act_fn gelu_tanh, silu in Experts, got GELUActivation"),
        (experts_class("silu", gate=lambda self, x: x[..., :5]), "expected the default gate"),
        (experts_class("silu", is_concatenated=False), "expected the gate before the up projection"),
    ],
)  # fmt: skip
def test_what_it_cannot_compute_is_refused(module, message):
    with pytest.raises(ValueError, match=message):
        ours.activation_of(module(Config()))


def test_gpt_oss_which_has_no_act_fn_is_refused_by_its_gate():
    config = transformers.GptOssConfig(**SMALL, intermediate_size=24, num_local_experts=4, num_experts_per_tok=2)
    model = transformers.AutoModelForCausalLM.from_config(config, experts_implementation="unif2ace")
    with pytest.raises(ValueError, match="expected the default gate, act.gate. . up, in GptOssExperts"):
        model(tokens())


def test_a_norm_after_each_expert_is_refused():
    module = experts_class("silu")(Config())
    module.has_post_expert_norm = True
    with pytest.raises(ValueError, match="has a norm after each expert"):
        ours.activation_of(module)


def test_kernels_alone_know_no_such_implementation():
    """Registered by the import that names it, and by no other."""
    code = (
        "import json, sys; import unif2ace_kernels; before = 'transformers' in sys.modules\n"
        "from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS as known; had = 'unif2ace' in known\n"
        "import unif2ace_kernels.transformers; print(json.dumps([before, had, 'unif2ace' in known]))"
    )
    path = os.pathsep.join([str(Path(moe.__file__).parents[2]), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path}
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == [False, False, True]
