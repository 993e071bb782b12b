"""What the ops would launch on a Hopper GPU at the paper's sizes, kernel by kernel, compiled with no GPU here.

The ops' own launchers run on tensors without memory, and each launch is compiled as it would be there: so its tiles and
warps are those that are chosen, and its arguments are specialised as a launch specialises them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest
import torch

triton = pytest.importorskip("triton", reason="needs Triton")

from aot import GPUTarget  # noqa: E402
from triton.runtime import driver  # noqa: E402
from triton.runtime.jit import JITFunction  # noqa: E402

from unif2ace_kernels.d3diff import configs as d3diff_configs  # noqa: E402
from unif2ace_kernels.d3diff import head_triton  # noqa: E402
from unif2ace_kernels.moe import experts_triton  # noqa: E402
from unif2ace_kernels.sampling import head_triton as sampling_triton  # noqa: E402

HOPPER, PROCESSORS = 90, 132
BFLOAT16 = torch.bfloat16


@dataclass(frozen=True)
class Launch:
    """A kernel's name, and the PTX that it was compiled to."""

    name: str
    ptx: str

    def found(self, pattern: str) -> list[str]:
        return re.findall(pattern, self.ptx)


class _Hopper:
    """As much of a driver as compiling asks for."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", HOPPER, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


@pytest.fixture
def launches(monkeypatch) -> Iterator[list[Launch]]:
    """The launches since the test began."""
    seen: list[Launch] = []
    run = JITFunction.run

    def compiled(self, *args, warmup, **kwargs):
        kernel = run(self, *args, warmup=True, **kwargs)
        seen.append(Launch(self.fn.__name__, kernel.asm["ptx"]))
        return kernel

    monkeypatch.setattr(JITFunction, "run", compiled)
    monkeypatch.setattr(driver, "_active", _Hopper())
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: divmod(HOPPER, 10))
    monkeypatch.setattr(d3diff_configs, "machine", lambda device: (HOPPER, PROCESSORS))
    yield seen


def empty(*shape: int, dtype: torch.dtype = BFLOAT16) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def experts(activation: str, backward: bool, T: int = 16384, D: int = 2048, F: int = 512, A: int = 16, S: int = 4):
    """A layer of transformers' weights where gated, else of ours with biases: the middle of "gpu-core"."""
    gated = activation == "swiglu"
    x, weight = empty(T, D), empty(T, S, dtype=torch.float32)
    order, offsets = empty(T * S, dtype=torch.int64), empty(A + 1, dtype=torch.int64)
    w_in = empty(A, 2 * F, D).transpose(1, 2) if gated else empty(A, D, F)
    w_out = empty(A, D, F).transpose(1, 2) if gated else empty(A, F, D)
    b_in, b_out = (None, None) if gated else (empty(A, F), empty(A, D))
    y, h = experts_triton.forward(x, weight, order, offsets, w_in, b_in, w_out, b_out, activation, backward)
    if backward:
        experts_triton.backward(y, x, h, weight, order, offsets, w_in, w_out, b_out, b_in is not None, activation)


def head(start: int, end: int, T: int = 4096, D: int = 2048, V: int = 58498) -> None:
    """The loss of "paper-16x256" and its gradients, over the columns from `start` to `end`."""
    hidden, weight, bias = empty(T, D), empty(V, D), empty(V)
    targets, ce_weight = empty(T, dtype=torch.int64), empty(T, dtype=torch.float32)
    head_triton.head_triton(
        hidden, weight, bias, targets, None, ce_weight, None, None, None, [start], [end], (50305, 58497), -100,
        BFLOAT16, True, True, True,
    )  # fmt: skip


def draw(R: int = 16384, D: int = 2048, V: int = 58498) -> None:
    """A step of "paper-64x256"."""
    hidden, ids = empty(R, D), empty(R, dtype=torch.int64)
    state = empty(1, dtype=torch.int64)
    sampling_triton.sample_hidden(
        hidden, hidden, empty(V, D), None, ids, empty(R, dtype=torch.bool), ids, state, state, 50305, 8192, 1.75, 1.0,
        0, 1.0, "log_prob", True,
    )  # fmt: skip


EXPERTS_BACKWARD = ["up_backward_kernel", "outer_kernel", "outer_kernel", "rows_kernel"]
HEAD = ["logits_kernel", "hidden_gradient_kernel", "weight_gradient_kernel"]
# A call, its products in the order in which they are launched, and the columns of each one's tile.
CALLS = [
    ("experts forward", lambda: experts("gelu_tanh", False), ["up_kernel", "rows_kernel"], [256, 128]),
    (
        "experts, gelu_tanh",
        lambda: experts("gelu_tanh", True),
        ["up_kernel", "rows_kernel", *EXPERTS_BACKWARD],
        [256, 128, 128, 256, 256, 128],
    ),
    (
        "experts, swiglu, weights as nn.Linear keeps them",
        lambda: experts("swiglu", True),
        ["up_kernel", "rows_kernel", *EXPERTS_BACKWARD],
        [128, 128, 128, 256, 256, 256],
    ),
    ("head, codes", lambda: head(50305, 58497), HEAD, [256] * 3),
    ("head, vocabulary", lambda: head(0, 58498), HEAD, [256] * 3),
    ("draw", draw, ["head_kernel"], [128]),
]
FAST = ("experts forward", "draw")


@pytest.mark.parametrize(
    ("call", "products", "columns"),
    [pytest.param(*rest, id=name, marks=() if name in FAST else (pytest.mark.slow,)) for name, *rest in CALLS],
)
def test_products_run_on_hoppers_tensor_cores_fed_asynchronously_and_memory_is_read_by_16_bytes(
    launches: list[Launch], call: Callable[[], None], products: list[str], columns: list[int]
) -> None:
    call()
    of_tensor_cores = [each for each in launches if each.found(r"\bw?mma\b|wgmma")]
    assert [each.name for each in of_tensor_cores] == products
    for launch, wide in zip(of_tensor_cores, columns):
        instructions = launch.found(r"wgmma\.mma_async\.sync\.aligned\.(m\w+)\.")
        assert set(instructions) == {f"m64n{wide}k16"} and not launch.found(r"\smma\.sync"), launch.name
        assert launch.found(r"wgmma\.wait_group\.sync\.aligned [12];"), f"{launch.name} waits for each product"
        copies = launch.found(r"cp\.async\.bulk\.tensor") + launch.found(r"cp\.async\.cg\.shared\.global .*0x10")
        assert copies, f"{launch.name} loads its operands into registers"
    for launch in launches:
        # One number a thread, such as a row's; a tile in such pieces takes dozens.
        narrow = launch.found(r"(?:ld|st)\.global(?:\.[a-z]\w*)*\.b16\b")
        assert len(narrow) <= 4, f"{launch.name} reads or writes 2 bytes at a time, {len(narrow)} times a thread"
