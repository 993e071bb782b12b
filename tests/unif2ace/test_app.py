"""The page in a real browser: paint, ask, paint anew, each once on an untrained model; and its buttons without one."""

import io
import shutil
import socket
import tempfile
import urllib.request
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from unif2ace.app.actions import EDITOR_SIDE, Studio, enlarged
from unif2ace.checkpoint import Checkpoint
from unif2ace.errors import UserError
from unif2ace.safety import watermark

SIDE = 64
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
MISSING = [name for name in ("gradio", "playwright") if find_spec(name) is None] + ([] if CHROMIUM else ["chromium"])
in_a_browser = pytest.mark.skipif(bool(MISSING), reason=f"not installed: {', '.join(MISSING)}")
# Its own connections to elsewhere would be noise among those of the page
FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"]
FLAGS += ["--disable-background-networking", "--disable-component-update"]


@pytest.fixture(scope="module")
def checkpoint(untrained):
    return Checkpoint.load(untrained)


def read(path) -> np.ndarray:
    return np.asarray(Image.open(path))


# ------------------------------------------------------------------------------------------------- without the browser


def test_painting_is_shown_step_by_step(checkpoint, tmp_path):
    shown = list(Studio(checkpoint, tmp_path).paint("dark hair", 6, 3, 1.0, 5))
    assert [each.status for each in shown][-1] == "done" and shown[0].status == "step 1 of 3"
    last = read(shown[-1].picture)
    assert last.shape == (2 * SIDE, 4 * SIDE, 3) and (last[SIDE:, 2 * SIDE :] > 230).all()
    assert watermark.detect(last).found and Image.open(shown[-1].picture).text["Prompt"] == "dark hair"
    assert read(shown[-1].strip).shape == (SIDE, 8 * SIDE, 3)
    assert len({each.picture for each in shown}) == len(shown)  # a browser keeps what it has under a name


def test_an_error_while_painting_reaches_the_page(checkpoint, tmp_path):
    with pytest.raises(UserError, match="empty"):
        list(Studio(checkpoint, tmp_path).paint(" ", 1, 2, 1.0, 0))
    with pytest.raises(UserError, match="draw over"):
        list(
            Studio(checkpoint, tmp_path).repaint(
                np.zeros((SIDE, SIDE, 3), np.uint8), np.zeros((8, 8), bool), "a", 1, 1, 0
            )
        )
    with pytest.raises(UserError, match="give a picture"):
        Studio(checkpoint, tmp_path).ask(None, "what?")


def test_the_safety_checker_sees_what_the_page_asks(checkpoint, tmp_path):
    def check(prompts, images):
        return ["never" if "hat" in prompt or images is not None else None for prompt in prompts]

    studio = Studio(checkpoint, tmp_path, check, marked=False)
    with pytest.raises(UserError, match="refused.*never"):
        list(studio.paint("a hat", 1, 2, 1.0, 0))
    with pytest.raises(UserError, match="refused.*never"):
        studio.ask(np.zeros((SIDE, SIDE, 3), np.uint8), "what?")
    shown = list(studio.paint("hair", 2, 2, 1.0, 0))
    assert all((read(each.picture) == 127).all() for each in shown)
    assert "2 blanked by the safety checker: never" in shown[-1].status


def test_what_is_drawn_on_the_enlarged_face_is_painted(checkpoint, tmp_path):
    face = np.random.default_rng(0).integers(0, 255, (SIDE, SIDE, 3), dtype=np.uint8)
    assert enlarged(face).shape == (EDITOR_SIDE, EDITOR_SIDE, 3)
    drawn = np.zeros((EDITOR_SIDE, EDITOR_SIDE), bool)
    drawn[60:200, 100:101] = True
    (*_, last) = Studio(checkpoint, tmp_path, marked=False).repaint(face, drawn, "hair", 2, 1.0, 0)
    changed = (read(last.picture) != face).any(axis=2)
    assert changed.any() and not changed[:, :16].any() and not changed[:, 17:].any() and not changed[34:].any()
    assert b"compositeWithTrainedAlgorithmicMedia" in last.picture.read_bytes()


# ---------------------------------------------------------------------------------------------------- in the browser


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@pytest.fixture(scope="module")
def server(checkpoint):
    from unif2ace.app.server import Server

    server = Server(checkpoint, port=_free_port())
    yield server
    server.close()


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


class Page:
    """A fresh page of the app, and every request that it made."""

    def __init__(self, browser, url: str) -> None:
        self.page, self.url, self.requests = browser.new_page(viewport={"width": 1180, "height": 900}), url, []
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.goto(url)
        self.page.wait_for_selector("#paint", timeout=60_000)

    def tab(self, name: str) -> None:
        self.page.get_by_role("tab", name=name, exact=True).click()

    def done(self) -> None:
        """Wait until the painting of the tab that is open is done."""
        ready = "[...document.querySelectorAll('.status')].some(e => e.offsetParent && e.innerText.trim() == 'done')"
        self.page.wait_for_function(ready, timeout=60_000)

    def picture(self, index: int) -> np.ndarray:
        """The pixels of the painting (0) or of the strip (1) of the tab that is open, as the server gives them."""
        source = self.page.locator(".painting:visible img").nth(index).get_attribute("src")
        return np.asarray(Image.open(io.BytesIO(urllib.request.urlopen(source).read())).convert("RGB"))


@in_a_browser
def test_paint_ask_and_paint_anew_in_a_browser(server, browser, tmp_path, monkeypatch):
    import torch

    monkeypatch.setattr("unif2ace.generation.reading.face_encoder", lambda: lambda faces: torch.ones(len(faces), 128))
    page = Page(browser, server.url)
    page.page.locator("#paint-prompt textarea").fill("dark hair, big smile")
    page.page.click("#paint")
    page.done()
    painting = page.picture(0)
    assert painting.shape == (SIDE, 4 * SIDE, 3) and page.picture(1).shape == (SIDE, 8 * SIDE, 3)
    assert watermark.detect(painting).found

    Image.fromarray(painting[:, :SIDE]).save(tmp_path / "face.png")
    page.tab("Ask")
    page.page.locator("#ask-picture input[type=file]").set_input_files(tmp_path / "face.png")
    page.page.wait_for_selector("#ask-picture img")
    page.page.locator("#question textarea").fill("how light is the hair?")
    page.page.locator("#question textarea").press("Enter")
    page.page.wait_for_selector("[data-testid=bot]", timeout=60_000)
    assert page.page.locator("[data-testid=user]").inner_text().strip() == "how light is the hair?"

    page.tab("Paint anew")
    page.page.click("#take")
    page.page.locator("#hint").get_by_text("Draw over the part").wait_for(timeout=60_000)
    page.page.locator("#box textarea, #box input").first.fill("50, 50, 100, 100")
    page.page.locator("#anew-prompt textarea").fill("light hair")
    page.page.click("#repaint")
    page.done()
    anew = page.picture(0)
    assert anew.shape == (SIDE, SIDE, 3) and watermark.detect(anew).found
    change = np.abs(anew.astype(int) - painting[:, :SIDE])
    assert change[33:, 33:].max() > change[:31].max()  # there, only the second watermark changed a thing
    assert page.requests and all(each.startswith((server.url, "data:", "blob:")) for each in page.requests)


@in_a_browser
@pytest.mark.slow  # a browser and a server of its own, under many workers
def test_what_cannot_be_done_is_said_on_the_page(server, browser):
    page = Page(browser, server.url)
    page.page.locator("#paint-prompt textarea").fill("hair " * 100)
    page.page.click("#paint")
    page.page.get_by_text("shorten it").wait_for(timeout=60_000)
    page.tab("Paint anew")
    page.page.click("#repaint")
    page.page.get_by_text("give a picture first").wait_for(timeout=60_000)


@in_a_browser
@pytest.mark.slow  # a browser and a server of its own, under many workers
def test_no_browser_may_fetch_from_elsewhere(server, browser):
    """The policy is sent, and it is the browser that holds to it."""
    policy = urllib.request.urlopen(server.url).headers["content-security-policy"]
    assert policy.startswith("default-src 'self'") and "http" not in policy
    page = Page(browser, server.url)
    refused = "fetch('http://localhost:9/x').then(() => 'went', error => String(error))"
    blocked = (
        "new Promise(r => document.addEventListener('securitypolicyviolation', e => r(e.blockedURI), {once: true}))"
    )
    assert "localhost:9" in page.page.evaluate(f"() => {{ const seen = {blocked}; {refused}; return seen }}")
    assert "https://fonts." not in page.page.content()


@pytest.mark.skipif(find_spec("gradio") is None, reason="not installed: gradio")
def test_a_port_that_is_taken(checkpoint):
    from unif2ace.app.server import Server

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        before = set(Path(tempfile.gettempdir()).glob("unif2ace-app-*"))
        with pytest.raises(UserError, match="cannot listen.*--port"):
            Server(checkpoint, port=taken.getsockname()[1])
    assert set(Path(tempfile.gettempdir()).glob("unif2ace-app-*")) <= before


@pytest.mark.skipif(find_spec("gradio") is None, reason="not installed: gradio")
def test_pictures_go_with_the_server(checkpoint):
    from unif2ace.app.server import Server

    server = Server(checkpoint, port=_free_port())
    folder = Path(server._folder.name)
    assert folder.is_dir() and urllib.request.urlopen(server.url).status == 200
    server.close()
    assert not folder.exists()
    with pytest.raises(OSError):
        urllib.request.urlopen(server.url, timeout=5)
