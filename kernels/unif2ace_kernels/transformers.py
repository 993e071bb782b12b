"""transformers' mixtures on our experts: importing this registers the experts implementation "unif2ace".

    import unif2ace_kernels.transformers
    model = AutoModelForCausalLM.from_pretrained("allenai/OLMoE-1B-7B-0924", experts_implementation="unif2ace")

The one file of the package that imports transformers, and one that nothing else in it imports: who wants it names it.
It stands here, not above the kernels, because a user of transformers needs nothing above them.

Weights are read as transformers keeps them, gate_up_proj [E, 2F, D] and down_proj [E, D, F] or their transposes, gate
first: views, no copy, and gradients are made in the same layout. Under autocast they are cast in each call.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, _default_apply_gate

from ._autocast import autocast_dtype
from .moe import arrange, experts

NAME = "unif2ace"
# By the class that transformers' ACT2FN makes: of a layer without a gate, and of one with it.
_PLAIN = {"SiLU": "silu", "SiLUActivation": "silu", "GELUActivation": "gelu", "GELUTanh": "gelu_tanh",
          "NewGELUActivation": "gelu_tanh", "ReLU": "relu"}  # fmt: skip
_GATED = {"silu": "swiglu", "gelu_tanh": "geglu"}


def activation_of(module: Any) -> str:
    """The `activation` of `moe.experts` that an experts module of transformers computes.

    Raises:
        ValueError: it computes another one, or its weights lie as none of ours do.
    """
    name = type(module).__name__
    if getattr(module, "has_post_expert_norm", False):  # not there in older ones
        raise ValueError(f'experts_implementation "{NAME}": {name} has a norm after each expert, which it does not')
    if module.has_gate and type(module)._apply_gate is not _default_apply_gate:
        raise ValueError(f'experts_implementation "{NAME}": expected the default gate, act(gate) * up, in {name}')
    plain = _PLAIN.get(type(module.act_fn).__name__)
    if not module.has_gate:
        if plain is not None:
            return plain
    elif not module.is_concatenated:
        raise ValueError(f'experts_implementation "{NAME}": expected the gate before the up projection in {name}')
    elif plain in _GATED:
        return _GATED[plain]
    expected = ", ".join(sorted(_GATED if module.has_gate else set(_PLAIN.values())))
    raise ValueError(
        f'experts_implementation "{NAME}": expected act_fn {expected} in {name}, got {type(module.act_fn).__name__}'
    )


def experts_forward(self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """The experts of a transformers module on our op, in the signature of transformers' ExpertsInterface.

    Args:
        self: an nn.Module under transformers' use_experts_implementation.
        hidden_states: [T, D]. top_k_index: [T, K] int; top_k_weights: [T, K] float.

    Returns:
        [T, D] of hidden_states' dtype.

    Raises:
        ValueError: the module computes what our experts do not; see `activation_of`.
    """
    activation = activation_of(self)
    if getattr(self, "_is_expert_parallel", True):  # older ones do not say
        # Slots of another rank's experts have the index E: they go to any expert here, at weight 0, as in batched_mm.
        elsewhere = top_k_index >= self.num_experts
        top_k_index = top_k_index.clamp(0, self.num_experts - 1)
        top_k_weights = top_k_weights.masked_fill(elsewhere, 0)
    w_in, b_in = (self.gate_up_proj if self.has_gate else self.up_proj), None
    w_out, b_out = self.down_proj, None
    if self.has_bias:
        b_in, b_out = (self.gate_up_proj_bias if self.has_gate else self.up_proj_bias), self.down_proj_bias
    if not self.is_transposed:
        w_in, w_out = w_in.transpose(1, 2), w_out.transpose(1, 2)
    x = hidden_states.to(w_in.dtype) if autocast_dtype(hidden_states.device) is None else hidden_states
    routing = arrange(top_k_index, top_k_weights, self.num_experts)
    return experts(x, routing, w_in, b_in, w_out, b_out, activation=activation).to(hidden_states.dtype)


ALL_EXPERTS_FUNCTIONS[NAME] = experts_forward
