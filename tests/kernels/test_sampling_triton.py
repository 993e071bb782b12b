"""The sampling kernels in Triton, interpreted: the ids and masks of torch bit for bit."""

import contextlib

import pytest
import torch

pytest.importorskip("triton", reason="needs Triton")

from aot import compile_ahead  # noqa: E402
from sampling_cases import (  # noqa: E402
    CONFIDENCES,
    DRAWS,
    FIRST,
    assert_same_draw,
    clear,
    confidences,
    head,
    logits,
    words,
)

from unif2ace_kernels import _library, _philox  # noqa: E402
from unif2ace_kernels.sampling import (  # noqa: E402
    configs,
    draw_torch,
    draw_triton,
    head_triton,
    reference,
    remask_triton,
)


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


def test_a_winner_whose_bound_is_rounded_below_another_s_is_drawn(triton_interpreter):
    """Row 1785 is the first of these words where, of 8192 equal logits, the leading key is not the winner's."""
    row, ids = torch.tensor([1785]), torch.tensor([-1])
    arguments = (torch.zeros(1, 8192), None, ids, ids == -1, row, *words(), 0, 8192, 0.0, 1.0, 0, 1.0, "log_prob", True)
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


@pytest.mark.parametrize(
    ("rows", "hidden", "codes", "dtype"),
    [(5, 16, 1, "float32"), (70, 37, 130, "float32"), (40, 192, 300, "float16"), (64, 16, 20, "float32")],
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


def test_the_margin_of_two_peaks_is_0(triton_interpreter):
    h, weight, _, ids, row = head(6, 16, 40)
    weight[FIRST + 1 : FIRST + 41] = weight[FIRST]
    options = (*words(), FIRST, 40, 0.0, 1.0, 0, 1.0, "margin", True)
    _, confidence = head_triton.sample_hidden(h[0], None, weight, None, ids, ids == -1, row, *options)
    assert (ids == -1).any() and (confidence[ids == -1] == 0).all()


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
