"""The client of an endpoint against one that answers well, late, wrongly, with errors and not at all."""

from __future__ import annotations

import base64
import json
import logging
import os
import signal
import socket
import subprocess
import sys
import textwrap
import time
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
from endpoints import Server, half, reset, said, script, serving

from unif2ace.endpoint.client import Endpoint, Question, data_url
from unif2ace.endpoint.config import EndpointConfig
from unif2ace.endpoint.limits import Budget, BudgetSpent, Pace
from unif2ace.endpoint.prompts import load_prompt
from unif2ace.errors import UserError
from unif2ace.journal import Journal

HERE = Path(__file__).parent
KEY = "sk-very-secret-0123456789"
WORD = """
user: "Say a word on {thing}."
form: json
schema: {type: object, properties: {word: {type: string, maxLength: 8}}, required: [word], additionalProperties: false}
"""
GOOD = '{"word": "oak"}'


class Clock:
    """Time that passes when someone waits, and in no other way."""

    def __init__(self):
        self.time, self.waits = 0.0, []

    def now(self):
        return self.time

    def wait(self, seconds):
        self.waits.append(seconds)
        self.time += seconds


@pytest.fixture
def prompt(tmp_path):
    (tmp_path / "word.yaml").write_text(WORD)
    return load_prompt(tmp_path / "word.yaml")


@pytest.fixture
def asked(tmp_path, prompt):
    """Ask one question, or several, of an endpoint that follows a script: outcomes, client, server, clock."""

    def ask(*steps, names=("tree",), folder="kept", check=lambda value: None, **settings):
        clock = Clock()
        with serving(*steps) as server:
            config = EndpointConfig(url=server.url, model="m", **{"concurrency": 1, "timeout": 5.0, **settings})
            with Endpoint(config, tmp_path / folder, clock.now, clock.wait) as client:
                questions = [Question(name, prompt, {"thing": name}, check=check) for name in names]
                outcomes = [client.ask(each) for each in questions]
                return outcomes, client.counts(), server, clock

    return ask


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


def test_json_is_found_among_words_but_never_a_part_of_a_broken_one(prompt):
    assert prompt.read('Sure!\n```json\n{"word": "oak"}\n```')["word"] == "oak"
    with pytest.raises(ValueError, match="not JSON"):
        prompt.read('{"list": [{"word": "oak"}')


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


# --------------------------------------------------------------------------------------- what leaves the machine


def test_the_key_goes_into_one_header_and_nowhere_else(tmp_path, prompt, monkeypatch, caplog, capfd):
    monkeypatch.setenv("A_KEY", KEY)
    caplog.set_level(logging.DEBUG)
    steps = [(500, {}, KEY.encode()), said(f"your key is {KEY}"), said(f"still {KEY}"), said(f"and {KEY}")]
    clock = Clock()
    with serving(*steps) as server:
        config = EndpointConfig(url=server.url, model="m", key="A_KEY")
        with Endpoint(config, tmp_path / "kept", clock.now, clock.wait) as client:
            outcome = client.ask(Question("a", prompt, {"thing": "x"}))
    assert outcome.kind == "quarantined" and len(server.seen) == 4
    for headers, body, path in server.seen:
        assert headers["authorization"] == f"Bearer {KEY}" and KEY not in json.dumps(body) + path
    kept = "".join(path.read_text() for path in (tmp_path / "kept").iterdir())
    printed = "".join(capfd.readouterr())
    assert KEY not in kept + caplog.text + printed + repr(client.config) + str(outcome)
    assert (tmp_path / "kept" / "answers.jsonl").stat().st_mode & 0o077 == 0


def test_a_key_that_is_not_set_is_named_not_guessed(tmp_path, monkeypatch):
    monkeypatch.delenv("NO_KEY", raising=False)
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    with pytest.raises(UserError, match="'NO_KEY' is not set"):
        Endpoint(EndpointConfig(url="https://x/v1", model="m", key="NO_KEY"), tmp_path)
    with serving("hello") as server, Endpoint(EndpointConfig(url=server.url, model="m"), tmp_path / "b") as client:
        client.transport.send({"messages": []})
    assert "authorization" not in {name.lower() for name in server.seen[0][0]}


@pytest.mark.parametrize("status", [301, 302, 307, 308])
def test_redirects_are_refused(tmp_path, prompt, monkeypatch, status):
    monkeypatch.setenv("A_KEY", KEY)
    with (
        serving(GOOD) as other,
        serving((status, {"location": f"{other.url}/chat/completions?k={KEY}"}, b"")) as server,
    ):
        with Endpoint(EndpointConfig(url=server.url, model="m", key="A_KEY"), tmp_path) as client:
            with pytest.raises(UserError, match="sends its requests on to http://127.0.0.1:") as raised:
                client.ask(Question("a", prompt, {"thing": "x"}))
        assert not other.seen and len(server.seen) == 1 and KEY not in str(raised.value)


def test_proxies_and_netrc_of_the_environment_are_not_used(tmp_path, prompt, monkeypatch):
    with serving(said("from the proxy")) as proxy, serving(GOOD) as server:
        for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY", "https_proxy"):
            monkeypatch.setenv(name, proxy.url)
        for name in ("no_proxy", "NO_PROXY"):
            monkeypatch.delenv(name, raising=False)
        (tmp_path / "netrc").write_text("machine 127.0.0.1 login a password b\n")
        monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
        with Endpoint(EndpointConfig(url=server.url, model="m"), tmp_path / "kept") as client:
            assert client.ask(Question("a", prompt, {"thing": "x"})).kind == "answered"
        assert not proxy.seen and "authorization" not in {name.lower() for name in server.seen[0][0]}
        config = EndpointConfig(url=server.url, model="m", proxy=proxy.url.removesuffix("/v1"), answers=1)
        with Endpoint(config, tmp_path / "other") as client:
            client.ask(Question("a", prompt, {"thing": "x"}))
        assert len(proxy.seen) == 1, "one that is named is used"


def test_a_picture_is_sent_as_pixels_alone(tmp_path):
    (tmp_path / "seen.yaml").write_text(WORD + "image: true\n")
    prompt = load_prompt(tmp_path / "seen.yaml")
    image = np.random.default_rng(0).integers(0, 255, (90, 120, 3), np.uint8)
    with serving(GOOD) as server:
        config = EndpointConfig(url=server.url, model="m", vision=True, image_side=60)
        with Endpoint(config, tmp_path / "kept") as client:
            client.ask(Question("secret-name.jpg", prompt, {"thing": "x"}, image))
        with Endpoint(replace(config, vision=False), tmp_path / "blind") as client:
            with pytest.raises(UserError, match="endpoint.vision of m is false"):
                client.ask(Question("a", prompt, {"thing": "x"}, image))
    sent = json.dumps(server.seen[0][1])
    assert "secret-name" not in sent and len(server.seen) == 1
    picture, text = server.seen[0][1]["messages"][0]["content"]
    assert text == {"type": "text", "text": "Say a word on x."}
    content = base64.b64decode(picture["image_url"]["url"].removeprefix("data:image/jpeg;base64,"))
    assert cv2.imdecode(np.frombuffer(content, np.uint8), 1).shape == (45, 60, 3) and b"Exif" not in content
    red = np.zeros((9, 9, 3), np.uint8) + np.array([250, 0, 0], np.uint8)
    content = base64.b64decode(data_url(red, 60).partition(",")[2])
    assert cv2.imdecode(np.frombuffer(content, np.uint8), 1)[4, 4].argmax() == 2, "OpenCV's order is blue first"


def test_nothing_but_words_goes_into_a_prompt(prompt):
    for value in (np.zeros(128), [0.1, 0.2], 5, None, b"x"):
        with pytest.raises(ValueError, match="thing: expected a text"):
            prompt.messages({"thing": value})
    with pytest.raises(ValueError, match=r"expected values of \['thing'\], got \['name', 'thing'\]"):
        prompt.messages({"thing": "x", "name": "y"})
    assert prompt.messages({"thing": "{thing} {other}"})[0]["content"] == "Say a word on {thing} {other}."


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"url": "http://example.org/v1"}, "endpoint.url: http to example.org shows pictures"),
        ({"url": "ftp://x/v1"}, "endpoint.url: expected http"),
        ({"url": f"https://user:{KEY}@x/v1"}, "without name, password"),
        ({"url": f"https://x/v1?key={KEY}"}, "without name, password"),
        ({"url": "https://x:99999/v1"}, "endpoint.url"), ({"model": ""}, "endpoint.model"),
        ({"concurrency": 0}, "endpoint.concurrency: expected at least 1, got 0"),
        ({"top_p": 0.0}, "endpoint.top_p"), ({"timeout": float("nan")}, "endpoint.timeout"),
        ({"temperature": float("nan")}, "endpoint.temperature"), ({"budget_cost": 1.0}, "prices beside it"),
    ],
)  # fmt: skip
def test_a_config_that_is_not_possible(settings, message):
    with pytest.raises(UserError, match=message) as raised:
        EndpointConfig(**{"url": "https://x/v1", "model": "m", **settings}).check()
    assert KEY not in str(raised.value)
    EndpointConfig("http://192.168.0.9/v1", "m", insecure=True).check()


# ---------------------------------------------------------------------------------------------- limits and budget


def test_requests_and_tokens_a_minute():
    clock = Clock()
    pace = Pace(3, 0, clock.now, clock.wait)
    for _ in range(7):
        pace.enter(1)
    assert clock.time == 120
    clock = Clock()
    pace = Pace(0, 100, clock.now, clock.wait)
    pace.settle(pace.enter(90), 10)
    pace.enter(90)
    assert clock.time == 0, "what was set aside and not used is there for the next"
    pace.enter(500)
    assert clock.time == 60, "one that is larger than a minute goes alone"
    pace.pause(30)
    pace.enter(1)
    assert clock.time == 120


def test_a_budget_is_never_passed_and_goes_on_where_it_stood(tmp_path, prompt):
    clock = Clock()
    with serving(said(GOOD, (40, 10))) as server:
        config = EndpointConfig(url=server.url, model="m", max_tokens=20, budget_tokens=170)
        asked = []
        for budget in (170, 170, 300):
            with Endpoint(replace(config, budget_tokens=budget), tmp_path, clock.now, clock.wait) as client:
                with pytest.raises(BudgetSpent, match="budget_tokens is spent"):
                    for number in range(99):
                        client.ask(Question("a", prompt, {"thing": str(number)}))
                assert client.budget.tokens_in + client.budget.tokens_out <= budget
            asked.append(len(server.seen))
        assert asked == [3, 3, 6]
    budget = Budget(0, 1.0, price_in=1e6, price_out=5e5)
    budget.hold(0, 1)
    with pytest.raises(BudgetSpent, match="budget_cost"):
        budget.hold(1, 0)
    budget.settle((0, 1), (0, 0))
    budget.hold(1, 0)
    budget.settle((1, 0), (1, 0))
    assert budget.spent == 1.0


def test_an_endpoint_that_counts_nothing_is_counted_for(asked):
    _, counts, *_ = asked(said(GOOD, None))
    assert counts["tokens_in"] > 5 and counts["tokens_out"] > 3


# ---------------------------------------------------------------------------------------------------- going on

KILLED = """
import sys
from unif2ace.endpoint.client import Endpoint, Question
from unif2ace.endpoint.config import EndpointConfig
from unif2ace.endpoint.prompts import load_prompt
prompt = load_prompt(sys.argv[2])
with Endpoint(EndpointConfig(url=sys.argv[1], model="m", concurrency=3), sys.argv[3]) as client:
    for each in client.ask_all(Question(str(n), prompt, {"thing": str(n)}) for n in range(40)):
        print(each.question.name, each.kind, each.cached, flush=True)
"""


def test_killed_at_any_moment_nothing_done_is_lost_or_paid_twice(tmp_path, prompt):
    def slow(body):
        time.sleep(0.02)
        return GOOD

    with Server(slow) as server:
        command = [sys.executable, "-c", KILLED, server.url, str(tmp_path / "word.yaml"), str(tmp_path / "kept")]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
        seen = []
        for _ in range(2):
            process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
            for _ in range(10):
                seen.append(process.stdout.readline().split())
            process.send_signal(signal.SIGKILL)
            process.wait()
            process.stdout.close()
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        assert done.returncode == 0, done.stderr
        last = {name: cached for name, kind, cached in map(str.split, done.stdout.splitlines())}
    assert len(last) == 40 and all(kind == "answered" for _, kind, _ in seen)
    assert all(last[name] == "True" for name, *_ in seen), "what was told is kept"
    assert 40 <= len(server.seen) <= 40 + 2 * 3, "no more than what was under way at a kill is asked for twice"


def test_many_at_once_end_cleanly_when_one_ends_the_run(tmp_path, prompt):
    def answer(body):
        time.sleep(0.01)
        return (401, {}, b"no") if "on 9." in body["messages"][0]["content"] else GOOD

    with Server(answer) as server:
        config = EndpointConfig(url=server.url, model="m", concurrency=4)
        with Endpoint(config, tmp_path) as client:
            with pytest.raises(UserError, match="refuses"):
                list(client.ask_all(Question(str(n), prompt, {"thing": str(n)}) for n in range(500)))
        assert len(server.seen) < 30
        with Endpoint(config, tmp_path) as client:
            assert len(client.answers) == len(server.seen) - 1


def test_at_most_so_many_at_once(tmp_path, prompt):
    now, most = [], []

    def answer(body):
        now.append(1)
        most.append(len(now))
        time.sleep(0.02)
        now.pop()
        return GOOD

    with Server(answer) as server, Endpoint(EndpointConfig(server.url, "m", concurrency=3), tmp_path) as client:
        outcomes = list(client.ask_all(Question(str(n), prompt, {"thing": str(n)}) for n in range(12)))
    assert len(outcomes) == 12 and max(most) == 3


def test_a_journal_survives_what_a_crash_leaves(tmp_path):
    path = tmp_path / "a.jsonl"
    with Journal(path) as journal:
        journal.put("a", {"n": 1})
        journal.put("b", "é\n")
        with pytest.raises(UserError, match="being written by another"):
            Journal(path)
    whole = path.read_bytes()
    for cut in {*range(0, len(whole), 9), *range(len(whole) - 3, len(whole) + 1)}:
        path.write_bytes(whole[:cut])
        with Journal(path) as journal:
            lines = whole[:cut].count(b"\n")
            assert [key for key, _ in journal.items()] == ["a", "b"][:lines]
            journal.put("c", cut)
        with Journal(path) as journal:
            assert journal.get("c") == cut and len(journal) == lines + 1 and journal.get("x") is None
    path.write_bytes(whole.replace(b'"a"', b'"a', 1))
    with Journal(path) as journal:
        assert journal.damaged == 1 and "a" not in journal and journal.get("b") == "é\n"
        journal.put("b", 2)
        assert journal.get("b") == 2 and dict(journal.items()) == {"b": 2}


def test_a_full_disk_leaves_no_half_record(tmp_path, monkeypatch):
    with Journal(tmp_path / "a.jsonl") as journal:
        journal.put("a", 1)
        write = os.write
        monkeypatch.setattr(os, "write", lambda file, line: write(file, line[:5]))
        with pytest.raises(UserError, match="No space left"):
            journal.put("b", 2)
        monkeypatch.undo()
        journal.put("c", 3)
        assert dict(journal.items()) == {"a": 1, "c": 3} and "b" not in journal


@pytest.mark.parametrize(
    "text, message",
    [
        ("[1]", "expected a prompt's keys"), ("user: x", "schema: it is missing"),
        ("schema: {}", "user: it is missing"),
        ("user: x\nschema: {}\nwhat: 1", "what: expected one of"), ("user: 5\nschema: {}", "user: expected"),
        ("user: x\nschema: {type: wrong}", "is not valid"), ("user: x\nschema: {}\nform: xml", "form: expected"),
        ("user: x\nschema: {}\nform: lines", "form: expected"), ("user: [", "cannot read the prompt"),
        ("user: x\nschema: {}\nform: lines\nline: '('", "missing"),
        ("user: x\nschema: {}\nshots: [{user: a}]", "shots: expected turns"),
    ],
)  # fmt: skip
def test_a_prompt_that_is_none(tmp_path, text, message):
    (tmp_path / "p.yaml").write_text(text)
    with pytest.raises(UserError, match=message):
        load_prompt(tmp_path / "p.yaml")


def test_a_prompt_that_is_missing_and_one_of_lines(tmp_path):
    with pytest.raises(UserError, match="cannot read the prompt"):
        load_prompt(tmp_path / "none.yaml")
    (tmp_path / "p.yaml").write_text(
        textwrap.dedent("""
        system: be brief
        shots: [{user: a, assistant: b}]
        user: "{x}"
        form: lines
        line: 'Q: (?P<question>.+?) A: (?P<answer>.+)'
        schema: {type: array, minItems: 1}
        """)
    )
    prompt = load_prompt(tmp_path / "p.yaml")
    assert [each["role"] for each in prompt.messages({"x": "y"})] == ["system", "user", "assistant", "user"]
    assert prompt.read("Well:\nQ: one? A: yes.\n\n Q: two? A: no.\nQ: three?") == [
        {"question": "one?", "answer": "yes."},
        {"question": "two?", "answer": "no."},
    ]
    with pytest.raises(ValueError, match="non-empty|too short"):
        prompt.read("nothing")
