"""The client's limits and budget, and that it goes on: kills, many at once, a journal after a crash."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest
from endpoints import GOOD, Clock, Server, said, serving

from unif2ace.endpoint.client import Endpoint, Question
from unif2ace.endpoint.config import EndpointConfig
from unif2ace.endpoint.limits import Budget, BudgetSpent, Pace
from unif2ace.errors import UserError
from unif2ace.journal import Journal


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


def test_what_was_spent_stays_counted_after_damage(tmp_path, prompt):
    """A line that a disk lost takes no other line's place."""
    with serving(said(GOOD, (40, 10))) as server:
        config = EndpointConfig(url=server.url, model="m")
        with Endpoint(config, tmp_path) as client:
            for number in range(4):
                client.ask(Question("a", prompt, {"thing": str(number)}))
        path = tmp_path / "requests.jsonl"
        path.write_bytes(path.read_bytes().replace(b"{", b"?", 1))
        with Endpoint(config, tmp_path) as client:
            client.ask(Question("a", prompt, {"thing": "another"}))
        with Endpoint(config, tmp_path) as client:
            assert (client.counts()["requests"], client.counts()["tokens_in"]) == (4, 160)


def test_a_folder_that_cannot_be_opened_whole_is_let_go(tmp_path):
    config = EndpointConfig("http://localhost:1/v1", "m")
    with Journal(tmp_path / "requests.jsonl"):
        for _ in range(2):
            with pytest.raises(UserError, match="requests.jsonl is being written by another"):
                Endpoint(config, tmp_path)
    Endpoint(config, tmp_path).close()


def test_an_endpoint_that_counts_nothing_is_counted_for(asked):
    _, counts, *_ = asked(said(GOOD, None))
    assert counts["tokens_in"] > 5 and counts["tokens_out"] > 3


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
