"""examples/ and the snippets of kernels/README.md run, and do what they say."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from types import ModuleType

import pytest
import torch

from unif2ace_kernels.moe import reference

ROOT = Path(__file__).parents[1]
ROOMS = ROOT / "kernels" / "unif2ace_kernels"
PAGE = (ROOT / "kernels" / "README.md").read_text()


def example(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "examples" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("reading", ["llada", "mdlm"])
def test_masked_lm_beats_single_characters_and_samples_the_text(reading):
    """On a text of one sentence: what a model without context cannot, this one can after seconds."""
    masked_lm = example("masked_lm")
    sentence = "a fox, a hen, a pig. "
    model, characters, losses = masked_lm.train(sentence * 30, reading, steps=100, batch=16, width=48, layers=2)
    entropy = masked_lm.unigram_entropy(sentence)
    assert entropy > 2 and losses[0] > 0.9 * entropy
    assert sum(losses[-30:]) / 30 < 0.5 * entropy
    lines = masked_lm.sample(model.eval(), characters, 4, prompt="a fo")
    assert all(line.startswith("a fo") and len(line) == masked_lm.LENGTH for line in lines)
    words = re.findall(r"[a-z]+", " ".join(line[:-4] for line in lines))
    assert sum(word in ("a", "fox", "hen", "pig") for word in words) > 0.5 * len(words)


def test_masked_lm_reads_text_that_comes_with_the_package():
    masked_lm = example("masked_lm")
    text = masked_lm.read_text()
    assert len(text) > 20_000 and 2 < masked_lm.unigram_entropy(text) < 4


def test_moe_swap_is_equal():
    moe_swap = example("moe_swap")
    before, after = (kind(hidden=16, width=8, experts=5, top_k=2) for kind in (moe_swap.Mixture, moe_swap.Swapped))
    x = torch.randn(30, 16)
    assert moe_swap.difference(before, after, x) > 0.1  # of two mixtures that are not the same
    after.load_state_dict(before.state_dict())
    assert moe_swap.difference(before, after, x) < 1e-5


def snippets() -> list[str]:
    return re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)


def test_the_page_swaps_a_mixture_within_ten_lines():
    (snippet,) = [each for each in snippets() if "def mixture" in each]
    assert len([line for line in snippet.splitlines() if line.strip()]) <= 10
    names: dict = {}
    exec(snippet, names)  # noqa: S102
    hidden, width, experts, top_k = 12, 7, 5, 2
    router = torch.nn.Linear(hidden, experts)
    w_in, w_out = torch.randn(experts, hidden, 2 * width), torch.randn(experts, width, hidden)
    x = torch.randn(9, hidden)
    weight, expert = router(x).softmax(-1).topk(top_k)
    truth = reference.experts(x.double(), expert, weight.double(), w_in.double(), None,
                                  w_out.double(), None, "swiglu")  # fmt: skip
    torch.testing.assert_close(names["mixture"](x, router, w_in, w_out, top_k).double(), truth, rtol=1e-4, atol=1e-4)


def test_the_pages_other_snippets_run(tmp_path):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed (it is in the dev extra)")
    config = transformers.OlmoeConfig(
        vocab_size=11, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, num_experts=4
    )
    transformers.OlmoeForCausalLM(config).save_pretrained(tmp_path)
    names: dict = {"folder": tmp_path}
    for snippet in snippets():
        exec(snippet, names)  # noqa: S102
    assert names["model"].config._experts_implementation == "unif2ace"
    assert names["y"].shape == (1024, 256)


@pytest.mark.parametrize("room", ["d3diff", "moe", "random", "sampling"])
def test_the_snippets_of_a_room_run_as_they_stand(room):
    """Each page from its first line on, in the order in which it is read."""
    torch.manual_seed(0)
    names: dict = {}
    for snippet in re.findall(r"```python\n(.*?)```", (ROOMS / room / "README.md").read_text(), re.DOTALL):
        exec(snippet, names)  # noqa: S102
    if room == "d3diff":
        assert names["loss"] > 0 and names["head"].weight.grad.any()
    if room == "sampling":
        assert names["ids"].shape == (4, 64) and int(names["ids"].max()) < names["mask_id"]


def test_the_page_lists_every_public_function():
    """What the rooms export is in the table of ops, and the table names nothing that is not there."""
    import unif2ace_kernels

    rows = re.findall(r"^\| (`.*?`) \| (?:\[|moe|d3diff|sampling|random)", PAGE, re.MULTILINE)
    named = set()
    for row in rows:
        first = None
        for each in re.findall(r"`([^`]+)`", row):
            room, _, name = each.rpartition(".")
            first = room or first
            assert hasattr(getattr(unif2ace_kernels, first), name), each
            named.add(f"{first}.{name}")
    assert {"moe.route", "moe.arrange", "moe.experts", "moe.mix", "moe.GroupedMoE", "d3diff.loss"} <= named
