"""What lies so far below the largest that its exponential is 0 costs no arithmetic on denormal numbers.

Some processors take a hundred cycles for each, and every row's padding is such. The processor's flag of results that
lost digits below the smallest normal number says whether there was any.
"""

import ctypes
import platform

import pytest
import torch

from unif2ace_kernels import d3diff, moe, sampling
from unif2ace_kernels._library import EXTENSION_MISSING

pytestmark = [
    pytest.mark.skipif(EXTENSION_MISSING is not None, reason=f"no extension: {EXTENSION_MISSING}"),
    pytest.mark.skipif(
        (platform.system(), platform.machine()) != ("Linux", "x86_64"), reason="the flag's number is that of x86"
    ),
]
UNDERFLOW = 0x10
FAR = torch.tensor([0.0, -1.0, -88.0, -1000.0])


def underflows(call) -> bool:
    """Whether this thread lost digits below the smallest normal number in `call`."""
    libm = ctypes.CDLL("libm.so.6")
    libm.feclearexcept(UNDERFLOW)
    call()
    return bool(libm.fetestexcept(UNDERFLOW))


def test_the_flag_is_seen():
    small = torch.full((64,), 2e-38)
    assert underflows(lambda: small * 0.3) and not underflows(lambda: small * 3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_of_the_loss(dtype):
    logits = FAR.repeat(8, 75)[:, :-1].to(dtype)  # 299 columns: the rest of a block of the row is padding
    targets, m = torch.zeros(1, 8, dtype=torch.int64), torch.full((1,), 0.5)
    assert not underflows(lambda: d3diff.loss_from_logits(logits[None], targets, m, code_range=(0, 299)))


@pytest.mark.parametrize("temperature", [0.5, 1.0])
def test_of_a_draw(temperature):
    logits, ids = FAR.repeat(8, 75)[None], torch.full((1, 8), -1)

    def draw():
        sampling.sample_from_logits(logits, None, ids, -1, seed=0, temperature=temperature, top_p=0.9)

    assert not underflows(draw)


def test_of_routing():
    assert not underflows(lambda: moe.route(FAR.repeat(16, 4), torch.zeros(16, dtype=torch.int64), (16,), 4))
