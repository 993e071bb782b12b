"""Philox, uniform, exponential and Gumbel numbers: known answers, float64 truth, and equal bits everywhere."""

import contextlib
import importlib.util
import math

import pytest
import torch
from cuda_on_cpu import execute

from unif2ace_kernels import _library, _philox, _triton
from unif2ace_kernels.random import NOISE_STREAM, REMASK_STREAM, TOKEN_STREAM, gumbel, reference
from unif2ace_kernels.random.ops import _gumbel_torch

# Random123's kat_vectors, philox4x32 with 10 rounds: key, counter, words.
KNOWN_ANSWERS = [
    ((0, 0), (0, 0, 0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 2, (0xFFFFFFFF,) * 4, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0xA4093822, 0x299F31D0),
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]
# Where the pieces of the logarithm meet, and a spread of all words.
EDGES = [0, 1, 2, 2**23 - 1, 2**24, 2**24 + 1, _philox.LOG1P_BELOW - 1, _philox.LOG1P_BELOW, 2**31 - 1, 2**31]
EDGES += [2714937127, 2714937128, 2**32 - 2**24, 2**32 - 256, 2**32 - 2, 2**32 - 1]  # 2714937127.5: gumbel is 0
WORDS = torch.cat([torch.tensor(EDGES), torch.arange(0, 2**32, 2**32 // 200_003)])

needs_module = pytest.mark.skipif(
    importlib.util.find_spec("unif2ace_kernels._C") is None, reason="extension not built: no _C module"
)
needs_ops = pytest.mark.skipif(
    _library.EXTENSION_MISSING is not None, reason=f"extension not built: {_library.EXTENSION_MISSING}"
)


def assert_bits_equal(actual: torch.Tensor, expected: torch.Tensor) -> None:
    """Equal shapes and bits, NaN and the sign of zero included; without numpy, which a GPU machine may not have."""
    assert actual.dtype == expected.dtype == torch.float32
    assert torch.equal(actual.cpu().view(torch.int32), expected.view(torch.int32))


def seed_and_offset(seed: int = 2**63 - 25, offset: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.tensor([seed]), torch.tensor([offset])


@pytest.mark.parametrize(("key", "counter", "words"), KNOWN_ANSWERS)
def test_philox_known_answers(key, counter, words):
    assert tuple(int(each) for each in _philox.philox(key, counter)) == words


@needs_module
@pytest.mark.parametrize(("key", "counter", "words"), KNOWN_ANSWERS)
def test_philox_known_answers_in_cpp(key, counter, words):
    from unif2ace_kernels import _C

    assert _C.philox(key, counter) == words


def test_words_of_rows_are_the_words_at_each_place():
    words = _philox.random_words(5, 9, 4, 11, REMASK_STREAM)
    row, column = torch.arange(4)[:, None], torch.arange(11)
    assert torch.equal(words, _philox.words_at(5, 9, row, column, REMASK_STREAM))
    for r, c in [(0, 0), (3, 7), (2, 10)]:
        assert words[r, c] == _philox.philox((5, 0), (c // 4, r, 9, REMASK_STREAM))[c % 4]


def test_words_do_not_change_with_compaction_or_width():
    words = _philox.random_words(*seed_and_offset(), 6, 40, TOKEN_STREAM)
    rows = torch.tensor([4, 1])
    assert torch.equal(_philox.random_words(*seed_and_offset(), rows, 13, TOKEN_STREAM), words[rows, :13])


def test_seed_offset_and_stream_each_give_other_words():
    draws = [(1, 0, TOKEN_STREAM), (2, 0, TOKEN_STREAM), (1 + 2**32, 0, TOKEN_STREAM), (-1, 0, TOKEN_STREAM)]
    draws += [(1, 1, TOKEN_STREAM), (1, 0, REMASK_STREAM), (1, 0, NOISE_STREAM)]
    words = torch.stack([_philox.random_words(s, o, 8, 64, stream).flatten() for s, o, stream in draws])
    assert len(torch.unique(words)) > words.numel() - 3  # 3,584 words: a collision has odds of 1 in 700


def test_uniform_stays_inside_and_close():
    exact, u = _philox.uniform(WORDS), _philox.uniform32(WORDS)
    assert u.dtype == torch.float32 and u.min() == 2.0**-33 and u.max() == 1 - 2.0**-24
    assert ((u.double() - exact).abs() <= 2.0**-23 * exact).all()


def test_gumbel_is_finite_and_within_its_stated_error():
    u = _philox.uniform(WORDS)
    exponential = -torch.log1p(-u)
    assert ((_philox.exponential(WORDS).double() - exponential).abs() <= 2e-7 * exponential).all()
    truth = -torch.log(exponential)
    ours = _philox.gumbel(WORDS).double()
    assert torch.isfinite(ours).all()
    assert ((ours - truth).abs() <= 3e-7 * truth.abs().clamp(min=1)).all()


def test_gumbel_is_as_good_as_float32_allows_and_better_where_winners_are():
    words = torch.arange(0, 4096)
    truth = -torch.log(-torch.log1p(-_philox.uniform(words)))
    plain = -torch.log(-torch.log(1 - _philox.uniform32(words)))  # what is usually written
    assert torch.isinf(plain).any()
    assert (_philox.gumbel(words).double() - truth).abs().max() < 2e-6


def test_gumbel_falls_as_the_word_grows():
    values = _philox.gumbel(torch.sort(WORDS).values)
    assert (values.diff() <= 4e-7).all()  # up to rounding


@pytest.mark.parametrize("stream", [TOKEN_STREAM, REMASK_STREAM, NOISE_STREAM])
def test_gumbel_has_its_distribution(stream):
    scipy_stats = pytest.importorskip("scipy.stats", reason="needs scipy")
    draws = gumbel(*seed_and_offset(17, 1), 100, 1000, stream=stream)
    assert scipy_stats.kstest(draws.flatten().numpy(), "gumbel_r").pvalue > 1e-3
    # Gumbel-max picks each class with its softmax probability.
    logits = torch.linspace(-1, 2, 10)
    winners = (draws.view(-1, 10) + logits).argmax(1)
    counts = torch.bincount(winners, minlength=10).numpy()
    expected = torch.softmax(logits.double(), 0).numpy() * len(winners)
    assert scipy_stats.chisquare(counts, expected).pvalue > 1e-3
    # Neighbours, which share a Philox call, are independent.
    pairs = torch.stack([draws[:, :-1].flatten(), draws[:, 1:].flatten()])
    assert abs(torch.corrcoef(pairs)[0, 1]) < 4 / math.sqrt(99_900)


def test_op_equals_reference():
    seed, offset = seed_and_offset()
    truth = reference.gumbel(seed, offset, 7, 1030, TOKEN_STREAM)
    ours = gumbel(seed, offset, 7, 1030, stream=TOKEN_STREAM)
    assert ours.shape == truth.shape and ours.dtype == torch.float32
    assert ((ours.double() - truth).abs() <= 3e-7 * truth.abs().clamp(min=1)).all()


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (3, 5), (2, 1024), (5, 257), (0, 4), (4, 0)])
@needs_ops
def test_cpp_has_the_bits_of_torch(rows, columns):
    seed, offset = seed_and_offset(-7, 2**33 + 6)  # of the offset the low 32 bits count
    ours = torch.ops.unif2ace_native.gumbel(seed, offset, rows, columns, 2)
    assert_bits_equal(ours, _gumbel_torch(seed, offset, rows, columns, 2))
    assert_bits_equal(ours, _gumbel_torch(seed, torch.tensor([6]), rows, columns, 2))


@needs_module
@pytest.mark.parametrize("function", ["uniform", "exponential", "gumbel"])
def test_header_has_the_bits_of_torch(function):
    from unif2ace_kernels import _C

    expected = getattr(_philox, {"uniform": "uniform32"}.get(function, function))(WORDS)
    np = pytest.importorskip("numpy", reason="needs numpy")
    ours = getattr(_C, function)(WORDS.numpy().astype(np.uint32))
    assert_bits_equal(torch.from_numpy(ours), expected)


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (3, 5), (2, 1030)])
def test_cuda_kernel_on_fibers_has_the_bits_of_torch(rows, columns):
    ours = execute("gumbel.cpp", "gumbel", -7, 6, rows, columns, TOKEN_STREAM)
    assert_bits_equal(torch.from_numpy(ours), _gumbel_torch(*seed_and_offset(-7, 6), rows, columns, TOKEN_STREAM))


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (3, 5), (2, 1030)])
def test_triton_kernel_interpreted_has_the_bits_of_torch(triton_interpreter, rows, columns):
    from unif2ace_kernels.random import gumbel_triton

    seed, offset = seed_and_offset(-7, 2**33 + 6)
    ours = gumbel_triton.gumbel(seed, offset, rows, columns, REMASK_STREAM)
    assert_bits_equal(ours, _gumbel_torch(seed, offset, rows, columns, REMASK_STREAM))
    truth = reference.gumbel(seed, offset, rows, columns, REMASK_STREAM)
    assert ((ours.double() - truth).abs() <= 3e-7 * truth.abs().clamp(min=1)).all()


def test_triton_launches_on_the_device_of_its_output(triton_interpreter, monkeypatch):
    from unif2ace_kernels.random import gumbel_triton

    kernel, current = gumbel_triton.gumbel_kernel, []

    class Watched:
        def __getitem__(self, grid):
            assert current == [torch.Size([2, 5])], "launched outside torch.cuda.device_of(out)"
            return kernel[grid]

    @contextlib.contextmanager
    def device_of(tensor):
        current.append(tensor.shape)
        yield
        current.pop()

    monkeypatch.setattr(gumbel_triton, "gumbel_kernel", Watched())
    monkeypatch.setattr(torch.cuda, "device_of", device_of)
    gumbel_triton.gumbel(*seed_and_offset(), 2, 5, TOKEN_STREAM)
    assert current == []


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["triton", "cuda c++", "torch"])
def test_gpu_has_the_bits_of_the_cpu(name):
    candidates = {each.name: each for each in _library._IMPLEMENTATIONS["gumbel"] if "cuda" in each.devices}
    if candidates[name].missing:
        pytest.skip(f"extension not built or Triton missing: {candidates[name].missing}")
    seed, offset = seed_and_offset()
    for rows, columns in [(1, 1), (3, 5), (65_537, 9), (64, 8192)]:
        ours = candidates[name].function(seed.cuda(), offset.cuda(), rows, columns, 1)
        assert_bits_equal(ours, gumbel(seed, offset, rows, columns, stream=1))


@pytest.mark.gpu
def test_captured_graph_reads_the_offset_anew():
    seed, offset = (each.cuda() for each in seed_and_offset())
    gumbel(seed, offset, 4, 64)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = gumbel(seed, offset, 4, 64)
        offset.add_(1)
    for step in range(3, 6):
        graph.replay()
        assert_bits_equal(out, gumbel(*seed_and_offset(offset=step), 4, 64))


def test_opcheck():
    torch.library.opcheck(torch.ops.unif2ace.gumbel.default, (*seed_and_offset(), 3, 10, 1))


def test_compiles_without_a_graph_break():
    seed, offset = seed_and_offset()
    compiled = torch.compile(lambda s, o: gumbel(s, o, 3, 10) * 2, backend="eager", fullgraph=True)
    assert torch.equal(compiled(seed, offset), gumbel(seed, offset, 3, 10) * 2)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"seed": torch.tensor([1.0])}, "seed: expected dtype int64, got float32"),
        ({"seed": torch.tensor([1, 2])}, r"seed: expected one element, got shape \[2\]"),
        ({"seed": 3}, "seed: expected a torch.Tensor, got int"),
        ({"offset": torch.tensor([1], device="meta")}, r"offset: expected device cpu \(as seed\), got meta"),
        ({"offset": torch.tensor([], dtype=torch.int64)}, r"offset: expected one element, got shape \[0\]"),
        ({"rows": -1}, r"rows: expected an int in \[0, 2\*\*32\), got -1"),
        ({"columns": 2**32}, r"columns: expected an int in \[0, 2\*\*32\), got 4294967296"),
        ({"stream": 7}, "stream: expected one of 0, 1, 2, got 7"),
    ],
)
def test_bad_input_is_named(changed, message):
    seed, offset = seed_and_offset()
    arguments = {"seed": seed, "offset": offset, "rows": 2, "columns": 3, **changed}
    with pytest.raises(ValueError, match=message):
        gumbel(**arguments)


def test_explain_says_what_runs():
    explanation = _library.explain("gumbel", torch.empty(1))
    assert explanation.implementation == ("c++" if _library.EXTENSION_MISSING is None else "torch")
    names = [each.name for each in _library._IMPLEMENTATIONS["gumbel"]]
    assert names == ["triton", "cuda c++", "c++", "torch"]
    triton = _library._IMPLEMENTATIONS["gumbel"][0]
    assert triton.missing == _triton.TRITON_MISSING
