"""The sampling kernels in Triton: interpreted, the ids and masks of torch bit for bit; on a GPU those of the CPU."""

import contextlib

import pytest
import torch

pytest.importorskip("triton", reason="needs Triton")

from aot import compile_ahead  # noqa: E402
from sampling_cases import CONFIDENCES, DRAWS, FIRST, confidences, logits, words  # noqa: E402

from unif2ace_kernels import _library, _philox, sampling  # noqa: E402
from unif2ace_kernels.sampling import (  # noqa: E402
    configs,
    draw_torch,
    draw_triton,
    head_triton,
    reference,
    remask_triton,
)

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")


def assert_same_draw(ours, want, atol=5e-6):
    assert torch.equal(ours[0].cpu(), want[0])
    torch.testing.assert_close(ours[1].cpu(), want[1], rtol=1e-5, atol=atol)


@pytest.mark.parametrize(("codes", "dtype"), [(1, "float32"), (5, "float16"), (300, "bfloat16"), (300, "float32")])
def test_the_draw_is_that_of_torch(triton_interpreter, codes, dtype):
    cond, uncond, *places = logits(codes, getattr(torch, dtype))
    for i, draw in enumerate(DRAWS if codes > 1 else DRAWS[:2]):
        guidance, confidence = (0.0, 1.25, 30.0)[(i + codes) % 3], CONFIDENCES[(i + i // 3) % 3]
        arguments = (cond, uncond if guidance else None, *places, *words(), FIRST, codes, guidance, *draw, confidence)
        want = draw_torch.sample_logits(*arguments, True)
        assert_same_draw(draw_triton.sample_logits(*arguments, True), want)
        assert_same_draw(torch.ops.unif2ace.sample_logits(*arguments, True), want)


def test_ties_at_the_border_of_a_filter_stay_in(triton_interpreter):
    cond = torch.tensor([3.0, 2.0, 2.0, 2.0, -1.0]).expand(16, 5)
    ids, rows = torch.full((16,), -1), torch.arange(16)
    for top_k, top_p in ((2, 1.0), (0, 0.6), (0, 1e-9)):
        arguments = (cond, None, ids, ids == -1, rows, *words(), 0, 5, 0.0, 1.0, top_k, top_p, "log_prob", True)
        ours = draw_triton.sample_logits(*arguments)
        assert_same_draw(ours, draw_torch.sample_logits(*arguments))
        drawn = set(ours[0].tolist())
        assert drawn == {0} if top_p < 0.5 else (len(drawn) >= 3 and 4 not in drawn)


@pytest.mark.parametrize("draw", [(1.0, 0, 1.0), (1.3, 9, 0.6), (0.0, 0, 1.0)], ids=str)
def test_the_tile_width_changes_no_id(triton_interpreter, monkeypatch, draw):
    cond, uncond, *places = (each[[0, 3, 6, 7, 13]] for each in logits(300))
    arguments = (cond, uncond, *places, *words(), FIRST, 300, 1.25, *draw, "margin", True)
    want = draw_torch.sample_logits(*arguments)
    for block in (128, 512):
        monkeypatch.setattr(configs, "draw_tile", lambda codes, filtered, block=block: configs.RowTile(block, 4))
        assert_same_draw(draw_triton.sample_logits(*arguments), want)


def test_the_draw_over_8192_codes(triton_interpreter):
    """The widest row in registers, where a key's room for the column is the tightest."""
    cond, uncond, *places = (each[6:10] for each in logits(8192))
    arguments = (cond, uncond, *places, *words(), FIRST, 8192, 2.0, 1.0, 0, 1.0, "log_prob", True)
    assert_same_draw(draw_triton.sample_logits(*arguments), draw_torch.sample_logits(*arguments))


def test_a_part_of_a_batch_is_drawn_alike(triton_interpreter):
    cond, uncond, ids, unknown, rows = logits(130)
    options = (*words(), FIRST, 130, 1.5, 1.0, 0, 0.9, "neg_entropy", False)
    whole = draw_triton.sample_logits(cond, uncond, ids, unknown, rows, *options)
    part = torch.tensor([9, 0, 12, 6])
    alone = draw_triton.sample_logits(cond[part], uncond[part], ids[part], unknown[part], rows[part], *options)
    assert all(torch.equal(each[part], other) for each, other in zip(whole, alone))


def test_confidences_are_as_near_to_float64_as_those_of_torch(triton_interpreter):
    cond, uncond, *places = logits(1000)
    plain = torch.tensor([0, 6, 7, 8, 13])
    truth = reference.guide(cond[plain, FIRST:-2], uncond[plain, FIRST:-2], 1.5)
    arguments = (cond, uncond, *places, *words(), FIRST, 1000, 1.5, 1.0, 0, 1.0, "log_prob", True)
    ids, ours = draw_triton.sample_logits(*arguments)
    want = reference.log_confidence(truth, ids[plain] - FIRST)
    theirs = truth.float().log_softmax(-1).gather(-1, ids[plain, None] - FIRST)[:, 0]
    assert (ours[plain] - want).abs().max() <= 2 * (theirs - want).abs().max() + 2e-6


def test_the_race_bound_is_one(triton_interpreter):
    """Never below 1 / E beyond rounding, or a winner could be left out; near it where winners come from."""
    import triton
    import triton.language as tl

    bound = draw_triton.race_bound

    @triton.jit
    def kernel(p_word, p_out, N: tl.constexpr):
        o = tl.arange(0, N)
        tl.store(p_out + o, bound(tl.load(p_word + o).to(tl.uint32)))

    kernel.fn.__globals__["bound"] = bound
    edges = [0, 1, 511, 512, 513, 2**20, 2**31, 2**32 - 512, 2**32 - 1]
    word = torch.cat([torch.tensor(edges), torch.arange(0, 2**32, 2**32 // (16384 - len(edges) - 1))])[:16384]
    out = torch.full((16384,), torch.nan)
    kernel[(1,)](word, out, N=16384)
    exact = -1 / torch.log1p(-_philox.uniform(word))
    assert (out.double() >= exact * (1 - 1e-6)).all()
    often = (word > 2**20) & (word < 2**29)
    assert (out[often] <= exact[often] * (1 + 1e-3)).all()


# ---- head and draw in one


def head(rows, hidden, codes, dtype=torch.float32, seed=3):
    rng = torch.Generator().manual_seed(seed)
    h = torch.randn(2, rows, hidden, generator=rng).to(dtype)
    weight = (2 * torch.randn(codes + FIRST + 2, hidden, generator=rng) / hidden**0.5).to(dtype)
    bias = torch.randn(codes + FIRST + 2, generator=rng).to(dtype)
    bias[FIRST + codes // 2] = 0 if codes == 1 else -torch.inf
    ids = torch.where(torch.rand(rows, generator=rng) < 0.3, 4, -1)
    return h, weight, bias, ids, torch.randint(2**32, (rows,), generator=rng)


def clear(h, weight, bias, rows, codes, guidance, temperature):
    """Rows whose best score leads by more than any rounding of their float32 sums, and the best codes, in float64."""
    folded = ((1 + guidance) * h[0].float() - guidance * h[1].float()).to(weight.dtype).double()
    z = (folded @ weight.double().T + (0 if bias is None else bias.double()))[:, FIRST : FIRST + codes]
    score = z
    if temperature:
        noise = _philox.gumbel(_philox.random_words(*words(), rows, codes, _philox.TOKEN_STREAM))
        score = z / temperature + noise.double()
    best = score.topk(min(2, codes)).values
    return best[:, 0] - best[:, -1] > 1e-4 if codes > 1 else torch.ones(len(z), dtype=torch.bool), score.argmax(-1), z


@pytest.mark.parametrize(
    ("rows", "hidden", "codes", "dtype"), [(5, 16, 1, "float32"), (70, 37, 130, "float32"), (40, 64, 300, "float16")]
)
@pytest.mark.parametrize(("temperature", "guidance"), [(1.0, 1.25), (0.0, 0.0), (0.4, 3.0)])
def test_the_head_draws_what_float64_draws(triton_interpreter, rows, hidden, codes, dtype, temperature, guidance):
    h, weight, bias, ids, row = head(rows, hidden, codes, getattr(torch, dtype))
    kind = CONFIDENCES[(codes + int(guidance)) % 3]
    bias = None if guidance == 3.0 else bias
    unknown = ids == -1
    second = h[1] if guidance else None
    arguments = (h[0], second, weight, bias, ids, unknown, row, *words(), FIRST, codes, guidance, temperature, 0, 1.0)
    got, confidence = head_triton.sample_hidden(*arguments, kind, True)
    is_clear, want, z = clear(h, weight, bias, row, codes, guidance, temperature)
    assert (is_clear & unknown).sum() >= 0.98 * unknown.sum()
    assert torch.equal(got[is_clear & unknown], want[is_clear & unknown] + FIRST)
    assert torch.equal(got[~unknown], ids[~unknown]) and (confidence[~unknown] == torch.inf).all()
    law = z.softmax(-1)
    truth = {
        "log_prob": reference.log_confidence(z[unknown], got[unknown] - FIRST),
        "neg_entropy": -torch.special.entr(law).sum(-1)[unknown],
        "margin": (law.topk(2).values @ torch.tensor([1.0, -1.0]).double())[unknown] if codes > 1 else 1.0,
    }
    assert (confidence[unknown] - truth[kind]).abs().max() < 1e-5
    want, confidence = draw_torch.sample_hidden(*arguments, kind, True)
    assert dtype != "float32" or torch.equal(got[is_clear], want[is_clear])


@pytest.mark.parametrize("draw", [(1.0, 0, 1.0), (1.2, 20, 0.9)], ids=str)
def test_the_head_draws_a_part_of_a_batch_alike(triton_interpreter, draw):
    """Another place in a row tile, other neighbours: not one bit changes."""
    rows = 90 if draw[2] == 1 else 12
    h, weight, bias, ids, row = head(rows, 48, 150)
    options = (*words(), FIRST, 150, 1.5, *draw, "log_prob", True)
    whole = head_triton.sample_hidden(*h, weight, bias, ids, ids == -1, row, *options)
    part = torch.randperm(rows)[: rows // 3]
    alone = head_triton.sample_hidden(*h[:, part], weight, bias, ids[part], ids[part] == -1, row[part], *options)
    assert all(torch.equal(each[part], other) for each, other in zip(whole, alone))


def test_the_head_under_a_filter_is_that_of_torch(triton_interpreter):
    h, weight, bias, ids, row = head(10, 24, 140)
    for draw in ((1.0, 0, 0.7), (0.8, 12, 1.0)):
        arguments = (*h, weight, bias, ids, ids == -1, row, *words(), FIRST, 140, 1.5, *draw, "margin", True)
        assert_same_draw(head_triton.sample_hidden(*arguments), draw_torch.sample_hidden(*arguments), 1e-5)


def test_a_row_of_the_head_without_a_distribution_keeps_its_id(triton_interpreter):
    h, weight, bias, _, row = head(6, 16, 200)
    h[0, 1, 0], h[0, 2, 3] = torch.nan, torch.inf
    ids = torch.tensor([-1, -1, -1, -1, 8, -1])
    options = (*words(), FIRST, 200, 0.0, 1.0, 0, 1.0, "log_prob", True)
    arguments = (h[0], None, weight, bias, ids, ids == -1, row, *options)
    got, confidence = head_triton.sample_hidden(*arguments)
    assert_same_draw((got, confidence), draw_torch.sample_hidden(*arguments))
    assert got[1:3].tolist() == [-1, -1] and (confidence[1:3] == -torch.inf).all() and got[4] == 8
    none = head_triton.sample_hidden(*arguments[:3], torch.full_like(bias, -torch.inf), *arguments[4:])
    assert torch.equal(none[0], ids) and (none[1][ids == -1] == -torch.inf).all()
    known = head_triton.sample_hidden(*arguments[:5], torch.zeros(6, dtype=torch.bool), *arguments[6:])
    assert torch.equal(known[0], ids) and (known[1] == torch.inf).all()
    empty = [each[:0] for each in (h[0], ids, ids == -1, row)]
    out = head_triton.sample_hidden(empty[0], None, weight, bias, *empty[1:], *options)
    assert out[0].shape == out[1].shape == (0,)


# ---- re-mask


@pytest.mark.parametrize(("length", "temperature"), [(1, 0.0), (2, 0.7), (31, 0.0), (64, 0.7), (257, 0.3)])
@pytest.mark.parametrize("ties", ["index", "showo"])
def test_the_remask_is_that_of_torch(triton_interpreter, ties, temperature, length):
    arguments = (*confidences(length), *words(), torch.tensor(temperature), ties)
    assert torch.equal(remask_triton.remask(*arguments), draw_torch.remask(*arguments))


def test_a_sample_too_long_for_the_remask_is_refused():
    length = configs.LARGEST_ROW + 1
    arguments = (*confidences(length), *words(), torch.tensor(0.0), "index")
    with pytest.raises(ValueError, match=f"confidence: expected at most {configs.LARGEST_ROW} positions"):
        remask_triton.remask(*arguments)


# ---- launches


def calls():
    """(module, kernels, a call) of each launcher."""
    cond, uncond, *places = (each[:2] for each in logits(5))
    h, weight, bias, ids, row = head(3, 16, 5)
    options = (*words(), FIRST, 5, 1.5, 1.0, 0, 1.0, "log_prob", True)
    some = (each[:2] for each in confidences(4))
    return [
        (draw_triton, ["draw_kernel"], lambda: draw_triton.sample_logits(cond, uncond, *places, *options)),
        (head_triton, ["fold_kernel", "head_kernel"],
         lambda: head_triton.sample_hidden(*h, weight, bias, ids, ids == -1, row, *options)),
        (remask_triton, ["remask_kernel"],
         lambda: remask_triton.remask(*some, *words(), torch.tensor(0.5), "index")),
    ]  # fmt: skip


@pytest.mark.parametrize("i", range(3))
def test_launches_are_few_on_the_right_device_and_never_fused(triton_interpreter, monkeypatch, i):
    module, names, call = calls()[i]
    current, launched = [], []

    @contextlib.contextmanager
    def device_of(tensor):
        current.append(tensor)
        yield
        current.pop()

    class Watched:
        def __init__(self, name):
            self.name, self.kernel = name, getattr(module, name)

        def __getitem__(self, grid):
            def launch(*args, **kwargs):
                assert current, "launched outside torch.cuda.device_of(out)"
                assert kwargs["enable_fp_fusion"] is False  # else the noise has other bits than torch's
                launched.append(self.name)
                return self.kernel[grid](*args, **kwargs)

            return launch

    monkeypatch.setattr(torch.cuda, "device_of", device_of)
    for name in names:
        monkeypatch.setattr(module, name, Watched(name))
    call()
    assert launched == names and current == []


def test_a_size_of_one_compiles():
    """Triton makes a constant of an argument that is 1: a kernel must not take it for a tensor."""
    signature = {"p_confidence": "*fp32", "p_unknown": "*u8", "p_count": "*i64", "p_rows": "*i64", "p_seed": "*i64"}
    signature |= {"p_offset": "*i64", "p_temperature": "*fp32", "p_mask": "*u8"}
    constexprs = {"length": 1, "SHOWO": True, "BLOCK": 32}
    assert compile_ahead(remask_triton.remask_kernel, signature, constexprs, 90, num_warps=1).spill_bytes == 0
    free = {name for kernel in (draw_triton.draw_kernel, head_triton.head_kernel, head_triton.fold_kernel)
            for name in kernel.do_not_specialize}  # fmt: skip
    assert free == {"first_code", "codes", "top_k", "row_tiles", "rows", "tickets"}


def test_explain_names_them():
    for op in ("sample_logits", "sample_hidden", "remask"):
        first = _library._IMPLEMENTATIONS[op][0]
        assert first.name == "triton" and first.missing is None and torch.float64 not in first.dtypes


# ---- on a GPU


def on_gpu(arguments):
    return [each.cuda() if isinstance(each, torch.Tensor) else each for each in arguments]


def implementation(op, name):
    [found] = [each for each in _library._IMPLEMENTATIONS[op] if each.name == name and "cuda" in each.devices]
    if found.missing:
        pytest.skip(f"extension not built: {found.missing}")
    return found.function


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("name", ["triton", "cuda c++", "torch"])
@pytest.mark.parametrize(
    ("codes", "dtype"),
    [(1, "float32"), (300, "bfloat16"), (8192, "float16"), (12288, "bfloat16"), (58498, "float32")],
)
def test_gpu_draws_the_ids_of_the_cpu(name, codes, dtype):
    draw_on_gpu = implementation("sample_logits", name)
    cond, uncond, *places = logits(codes, getattr(torch, dtype))
    for i, draw in enumerate(DRAWS):
        arguments = (cond, uncond, *places, *words(), FIRST, codes, 1.25, *draw, CONFIDENCES[i % 3], True)
        ours = draw_on_gpu(*on_gpu(arguments))
        assert_same_draw(ours, draw_torch.sample_logits(*arguments), 2e-5)
        again = draw_on_gpu(*on_gpu(arguments))
        assert all(torch.equal(one.view(torch.uint8), two.view(torch.uint8)) for one, two in zip(ours, again))


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("name", ["triton", "cuda c++", "torch"])
@pytest.mark.parametrize("length", [1, 31, 256, 1024, 4096])
def test_gpu_masks_what_the_cpu_masks(name, length):
    remask_on_gpu = implementation("remask", name)
    for ties in ("index", "showo"):
        for temperature in (0.0, 0.7):
            arguments = (*confidences(length), *words(), torch.tensor(temperature), ties)
            assert torch.equal(remask_on_gpu(*on_gpu(arguments)).cpu(), draw_torch.remask(*arguments))


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_gpu_head_draws_what_float64_draws(dtype):
    rows, codes, guidance = 700, 1000, 1.25
    h, weight, bias, ids, row = head(rows, 256, codes, getattr(torch, dtype))
    unknown = ids == -1
    shared = (*words(), FIRST, codes, guidance)
    draws = ((1.0, 0, "log_prob"), (0.0, 0, "margin"), (0.7, 0, "neg_entropy"), (1.0, 40, "margin"))
    for temperature, top_k, kind in draws:
        options = (*shared, temperature, top_k, 1.0, kind, True)
        arguments = on_gpu((*h, weight, bias, ids, unknown, row, *options))
        got, confidence = head_triton.sample_hidden(*arguments)
        is_clear, want, z = clear(h, weight, bias, row, codes, guidance, temperature)
        assert is_clear.double().mean() > 0.99 and torch.equal(got.cpu()[~unknown], ids[~unknown])
        chosen = is_clear & unknown
        if top_k == 0:
            assert torch.equal(got.cpu()[chosen], want[chosen] + FIRST)
        if kind == "log_prob":
            truth = reference.log_confidence(z[unknown], got.cpu()[unknown] - FIRST)
            assert (confidence.cpu()[unknown] - truth).abs().max() < 5e-5
        part = torch.randperm(rows)[:200].cuda()
        some = [each[part] for each in (*arguments[:2], *arguments[4:7])]
        alone = head_triton.sample_hidden(*some[:2], *arguments[2:4], *some[2:], *arguments[7:])
        assert torch.equal(alone[0], got[part]) and torch.equal(alone[1], confidence[part])


def a_step(guidance=1.5):
    """(from logits, from hidden states): each a whole step on the GPU by the public functions, and its offset."""
    B, N, codes = 4, 64, 512
    h, weight, bias, ids, row = head(B * N, 64, codes, torch.bfloat16)
    h, ids, row = h.view(2, B, N, 64).cuda(), ids.view(B, N).cuda(), row.view(B, N).cuda()
    weight, bias = weight.cuda(), bias.cuda()
    branches = torch.nn.functional.linear(h, weight, bias)
    seed, offset = (each.cuda() for each in words())
    count, temperature = torch.full((B,), 9).cuda(), torch.tensor(0.5).cuda()
    unknown = ids == -1
    options = {"code_range": (FIRST, FIRST + codes), "guidance": guidance, "seed": seed, "offset": offset, "rows": row}

    def then_remask(drawn, confidence):
        again = {"seed": seed, "offset": offset, "rows": row}
        return drawn, confidence, sampling.remask(confidence, unknown, count, temperature, **again)

    def from_logits():
        return then_remask(*sampling.sample_from_logits(*branches, ids, -1, unknown=unknown, **options))

    def from_hidden():
        return then_remask(*sampling.sample_from_hidden(*h, weight, bias, ids, -1, unknown=unknown, **options))

    return [(from_logits, 2), (from_hidden, 3)], offset


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("i", range(2))
def test_gpu_step_is_a_few_launches_that_wait_for_nothing(monkeypatch, i):
    steps, offset = a_step()
    step, launches = steps[i]
    monkeypatch.undo()  # filling unwritten memory takes launches of its own
    step()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        step()
        torch.cuda.synchronize()
    kernels = [event.name for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    assert len(kernels) == launches <= 3, kernels


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("i", range(2))
def test_gpu_graph_reads_the_offset_anew(i):
    steps, offset = a_step()
    step = steps[i][0]
    start = offset.clone()
    want = []
    for _ in range(3):
        want.append([each.clone() for each in step()])
        offset.add_(1)
    offset.copy_(start)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = step()
        offset.add_(1)
    offset.copy_(start)
    for expected in want:
        graph.replay()
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(out, expected))
    assert not torch.equal(want[0][0], want[1][0])
