"""The client of an endpoint against one that answers well, late, wrongly, with errors and not at all."""

from __future__ import annotations

import json
import socket
import time
from dataclasses import replace

import numpy as np
import pytest
from endpoints import GOOD, KEY, WORD, Clock, half, reset, said, script, serving

from unif2ace.endpoint.client import Endpoint, Question
from unif2ace.endpoint.config import EndpointConfig
from unif2ace.endpoint.prompts import load_prompt
from unif2ace.errors import UserError


def test_a_good_answer_is_kept_and_never_asked_for_again(asked, tmp_path):
    (first,), counts, server, clock = asked(GOOD)
    assert (first.kind, first.value, first.cached) == ("answered", {"word": "oak"}, False)
    assert counts["tokens_in"] == 10 and counts["tokens_out"] == 5 and not clock.waits
    body = server.seen[0][1]
    assert body["messages"] == [{"role": "user", "content": "Say a word on tree."}]
    assert (body["model"], body["temperature"], body["max_tokens"]) == ("m", 0.7, 512)
    (again,), _, other, _ = asked(GOOD)
    assert other.url != server.url and other.seen, "another address is another model"


def test_what_is_cached_hangs_on_all_that_an_answer_hangs_on(tmp_path, prompt):
    image = np.zeros((8, 8, 3), np.uint8)
    (tmp_path / "seen.yaml").write_text(WORD + "image: true\n")
    seen = load_prompt(tmp_path / "seen.yaml")
    (tmp_path / "word.yaml").write_text(WORD + "\n# another version\n")
    other = load_prompt(tmp_path / "word.yaml")
    assert other.version != prompt.version and other.name == prompt.name
    with serving(GOOD) as server:
        config = EndpointConfig(url=server.url, model="m", vision=True)
        base = Question("a", prompt, {"thing": "x"})
        looks = Question("a", seen, {"thing": "x"}, image)
        cases = [
            (config, base), (replace(config, model="n"), base), (replace(config, temperature=0.5), base),
            (replace(config, top_p=0.5), base), (replace(config, max_tokens=9), base), (replace(config, seed=1), base),
            (config, replace(base, prompt=other)), (config, replace(base, values={"thing": "y"})),
            (config, replace(base, seed=5)), (config, looks), (config, replace(looks, image=image + 9)),
        ]  # fmt: skip
        for expected in (len(cases), len(cases)):
            for each, question in cases:
                with Endpoint(each, tmp_path / "kept") as client:
                    assert client.ask(question).kind == "answered"
            assert len(server.seen) == expected
        with Endpoint(config, tmp_path / "kept") as client:  # its name, and how it is sent, change no answer
            assert client.ask(replace(base, name="b")).cached
        with Endpoint(replace(config, timeout=9.0, concurrency=2), tmp_path / "kept") as client:
            assert client.ask(base).cached


@pytest.mark.parametrize(
    "wrong",
    [
        (429, {}, b"slow down"), (500, {}, b"oops"), (503, {}, b""), reset, half, b"<html>", b'{"choices": [', b"[]",
        b'{"choices": []}', b'{"choices": [{"message": {"content": 5}}]}', b"\xff\xfe", b"[" * 5000,
    ],
    ids=lambda wrong: getattr(wrong, "__name__", str(wrong)[:40]),  # the same in every process
)  # fmt: skip
def test_what_is_no_answer_is_tried_again_with_growing_waits(asked, wrong):
    (outcome,), counts, server, clock = asked(wrong, wrong, wrong, GOOD)
    assert outcome.kind == "answered" and len(server.seen) == 4 and counts["retries_of_this_run"] == 3
    assert all(0.5 * 2**n <= each <= 2**n for n, each in enumerate(clock.waits)) and len(set(clock.waits)) == 3
    assert len({json.dumps(body) for _, body, _ in server.seen}) == 1


@pytest.mark.parametrize("value", ["7", "date"])
def test_it_waits_as_long_as_it_is_asked_to(asked, value):
    value = value if value == "7" else time.strftime("%a, %d %b %Y %H:%M:%S GMT", time.gmtime(time.time() + 8))
    (outcome,), _, _, clock = asked((429, {"retry-after": value}, b""), GOOD)
    assert outcome.kind == "answered" and 6 <= sum(clock.waits) <= 8.1


def test_a_wait_of_hours_ends_the_run(asked):
    with pytest.raises(UserError, match="asks to wait for 7200 s"):
        asked((429, {"retry-after": "7200"}, b""), GOOD)


def test_an_answer_that_is_late_is_none(asked):
    def late(handler):
        time.sleep(0.4)

    (outcome,), _, server, clock = asked(late, GOOD, timeout=0.2)
    assert outcome.kind == "answered" and len(server.seen) == 2 and len(clock.waits) == 1


def test_an_answer_in_drops_is_late_as_a_whole(asked):
    def drops(handler):
        handler.send_response(200)
        handler.send_header("content-length", "1000")
        handler.end_headers()
        for _ in range(30):
            handler.wfile.write(b" ")
            handler.wfile.flush()
            time.sleep(0.05)

    start = time.monotonic()
    (outcome,), _, _, _ = asked(drops, GOOD, timeout=0.3)
    assert outcome.kind == "answered" and time.monotonic() - start < 1.2


def test_an_answer_without_end_is_let_go(asked, monkeypatch):
    monkeypatch.setattr("unif2ace.endpoint.transport._LARGEST", 1000)
    (outcome,), _, server, _ = asked(said("x" * 5000), GOOD)
    assert outcome.kind == "answered" and len(server.seen) == 2


def test_what_never_answers_puts_a_request_off_and_then_ends_the_run(asked, tmp_path):
    outcomes, _, server, _ = asked((500, {}, b"ill"), tries=3, give_up=2)
    assert outcomes[0].kind == "put off" and "ill" in outcomes[0].reason and len(server.seen) == 3
    assert not (tmp_path / "kept" / "quarantine.jsonl").read_text()
    with pytest.raises(UserError, match="did not answer 2 requests in a row, 3 tries each; the last: status 500: ill"):
        asked((500, {}, b"ill"), names=("a", "b"), tries=3, give_up=2)
    mixed = script((500, {}, b""), GOOD, (500, {}, b""), GOOD, (500, {}, b""), GOOD)
    outcomes, *_ = asked(mixed, names="abcdef", tries=1, give_up=2)
    assert [each.kind for each in outcomes] == ["put off", "answered"] * 3


def test_nobody_at_the_address(tmp_path, prompt):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}/v1"
    clock = Clock()
    with Endpoint(EndpointConfig(url=url, model="m", give_up=1), tmp_path, clock.now, clock.wait) as client:
        with pytest.raises(UserError, match="did not answer 1 requests.*ConnectError"):
            client.ask(Question("a", prompt, {"thing": "x"}))


@pytest.mark.parametrize(
    "wrong, reason",
    [
        ("no idea", "not JSON"), ('{"word": "oa', "not JSON"), ('{"word": 5}', r"\['word'\]: 5 is not of type"),
        ('{"word": "sycamore-tree"}', "too long"), ("{}", "'word' is a required"), ("[]", "not of type 'object'"),
        (said(GOOD, finish_reason="length"), "longer than 512 tokens"),
        (said("", message={"content": None, "refusal": "not faces"}), "declines: not faces"),
    ],
)  # fmt: skip
def test_a_wrong_answer_is_told_what_is_wrong_and_in_the_end_quarantined(asked, tmp_path, wrong, reason):
    (outcome,), counts, server, clock = asked(wrong, GOOD)
    assert outcome.kind == "answered" and not clock.waits and counts["requests"] == 2
    first, second = (body["messages"] for _, body, _ in server.seen)
    assert second[: len(first)] == first and second[-2]["role"] == "assistant"
    assert "That is not right" in second[-1]["content"] and server.seen[0][1]["seed"] != server.seen[1][1]["seed"]

    (outcome,), counts, server, _ = asked(wrong, folder="other")
    assert outcome.kind == "quarantined" and len(server.seen) == 3 and counts["tokens_in"] == 30
    (line,) = (tmp_path / "other" / "quarantine.jsonl").read_text().splitlines()
    kept = json.loads(line)["value"]
    with pytest.raises(AssertionError, match=reason):
        raise AssertionError(kept["reason"])
    assert kept["name"] == "tree" and kept["prompt"] == "word" and "said" in kept


def test_quarantined_is_not_asked_again_and_checks_count(tmp_path, prompt):
    question = Question("tree", prompt, {"thing": "x"}, check=lambda value: "an oak, again")
    with serving(GOOD) as server:
        config = EndpointConfig(url=server.url, model="m", answers=2)
        for expected in (2, 2):
            with Endpoint(config, tmp_path) as client:
                outcome = client.ask(question)
            assert (outcome.kind, outcome.reason) == ("quarantined", "an oak, again") and len(server.seen) == expected
        with Endpoint(config, tmp_path) as client:  # with another check it is another matter
            assert client.ask(replace(question, check=lambda value: None)).kind == "quarantined"


def test_a_request_that_is_refused_is_quarantined_and_many_end_the_run(asked):
    outcomes, _, server, clock = asked((400, {}, b"too long a prompt"), GOOD, names="ab")
    assert [each.kind for each in outcomes] == ["quarantined", "answered"] and not clock.waits
    assert "too long a prompt" in outcomes[0].reason
    with pytest.raises(UserError, match="refused 4 requests in a row; the last: status 400: no field seed"):
        asked((400, {}, b"no field seed"), names="abcdef", folder="other")


@pytest.mark.parametrize("status", [401, 403, 404])
def test_a_wrong_key_or_model_ends_the_run_at_once(asked, status, monkeypatch):
    monkeypatch.setenv("A_KEY", KEY)
    with pytest.raises(UserError) as raised:
        asked((status, {}, f"key {KEY} is wrong".encode()), key="A_KEY")
    assert KEY not in str(raised.value) and "[API key]" in str(raised.value)


def test_what_a_sick_endpoint_refuses_is_asked_again(asked, tmp_path):
    """It refused them all, so it was not the requests: none of them is given up."""
    with pytest.raises(UserError, match="refused 4 requests in a row"):
        asked((400, {}, b"no model is loaded"), names="abcdef")
    assert not (tmp_path / "kept" / "quarantine.jsonl").read_text()
    outcomes, counts, *_ = asked((400, {}, b"too long"), GOOD, (400, {}, b"too long"), names="abc", known_as="it")
    assert [each.kind for each in outcomes] == ["quarantined", "answered", "quarantined"] and counts["quarantined"] == 2
    assert len((tmp_path / "kept" / "quarantine.jsonl").read_text().splitlines()) == 2, "the last one's at the end, too"
    outcomes, _, server, _ = asked(GOOD, names="abc", known_as="it")
    assert [each.cached for each in outcomes] == [True] * 3 and not server.seen


def test_an_account_without_money_ends_the_run_at_once(asked, tmp_path):
    with pytest.raises(UserError, match="wants to be paid first. It says: Insufficient Balance"):
        asked((402, {}, b"Insufficient Balance"))
    assert not (tmp_path / "kept" / "quarantine.jsonl").read_text()


@pytest.mark.parametrize(
    "choice, reason",
    [({"finish_reason": "length"}, "longer than 512 tokens"), ({}, "the answer is empty")],
)
def test_an_answer_without_words_was_paid_for(asked, choice, reason):
    """All its tokens went into thinking. It is asked afresh: a turn without words would be refused."""
    (outcome,), counts, server, clock = asked(said("", message={"content": None}, **choice))
    assert outcome.kind == "quarantined" and reason in outcome.reason and not clock.waits
    assert (counts["requests"], counts["tokens_out"]) == (3, 15)
    assert all(len(body["messages"]) == 1 for _, body, _ in server.seen)
    assert len({body["seed"] for _, body, _ in server.seen}) == 3


@pytest.mark.parametrize("text", ['{"word": NaN}', '{"word": "\\ud83d"}', '{"word": "\ud83d"}', "\ud83d no JSON"])
def test_half_a_character_and_no_number_are_wrong_answers_like_others(tmp_path, text):
    (tmp_path / "any.yaml").write_text("user: x\nschema: {type: object}\n")
    question = Question("a", load_prompt(tmp_path / "any.yaml"), {})
    with serving(said(text)) as server:
        with Endpoint(EndpointConfig(server.url, "m", answers=2), tmp_path / "kept") as client:
            outcome = client.ask(question)
    if text == '{"word": "\ud83d"}':  # half a character that the reply itself holds is a question mark
        assert outcome.value == {"word": "?"}
    else:
        assert outcome.kind == "quarantined" and len(server.seen) == 2


def test_the_seeds_of_one_question_s_answers_are_no_other_question_s(tmp_path, prompt):
    with serving("wrong") as server:
        with Endpoint(EndpointConfig(server.url, "m", seed=2**31 - 2, mend=False), tmp_path) as client:
            for repeat in range(5):
                client.ask(Question("a", prompt, {"thing": "x"}, seed=repeat))
    seeds = [body["seed"] for _, body, _ in server.seen]
    assert len(seeds) == len(set(seeds)) == 15 and max(seeds) < 2**31


def test_a_count_of_tokens_beyond_all_sense_is_none(asked):
    (outcome,), counts, *_ = asked(said(GOOD, (10**400, 5)), price_in=1.0)
    assert outcome.kind == "answered" and counts["tokens_in"] < 100
    zone = "Mon, 01 Jan 2024 00:00:00 +99999999999999"
    (outcome,), _, server, _ = asked((429, {"retry-after": zone}, b""), GOOD)
    assert outcome.kind == "answered" and len(server.seen) == 2
