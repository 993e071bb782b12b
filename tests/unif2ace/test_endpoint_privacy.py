"""What leaves the machine: the key in one header, pictures as pixels, nothing to any other address."""

from __future__ import annotations

import base64
import json
import logging
from dataclasses import replace

import cv2
import numpy as np
import pytest
from endpoints import GOOD, KEY, WORD, Clock, said, serving

from unif2ace.endpoint.client import Endpoint, Question, data_url
from unif2ace.endpoint.config import EndpointConfig
from unif2ace.endpoint.prompts import load_prompt
from unif2ace.errors import UserError


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


def test_addresses_that_are_none(tmp_path, prompt):
    question = Question("a", prompt, {"thing": "x"})
    for url in (f"https://{'a' * 70}.org/v1", "https://xn--a/v1", "https://\u0660x..y/v1"):
        with Endpoint(EndpointConfig(url, "m", tries=1), tmp_path) as client:
            with pytest.raises(UserError, match="is no address that can be asked"):
                client.ask(question)
    for proxy in (f"ftp://user:{KEY}@x", "nonsense", f"socks9://{KEY}"):
        with pytest.raises(UserError, match="^proxy: expected http") as raised:
            Endpoint(EndpointConfig("https://x/v1", "m", proxy=proxy), tmp_path)
        assert KEY not in str(raised.value)
