"""The page, in a real browser that can reach nothing but this machine."""

import asyncio
import json
import shutil
import time
import urllib.request

import gradio as gr
import numpy as np
import pytest
from fastapi.testclient import TestClient
from PIL import Image

from magic141_jax.demo import page
from magic141_jax.errors import UserError
from magic141_jax.pipelines import media
from magic141_jax.serve.app import make_app
from magic141_jax.serve.buckets import Limits, make_catalog
from magic141_jax.serve.jobs import Folder
from magic141_jax.serve.worker import Worker

webdriver = pytest.importorskip("selenium.webdriver")
BROWSER, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
FLAGS = """--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking
--disable-component-update --disable-sync --disable-dev-shm-usage --window-size=1200,1100"""
PROMPT = "a red shark moves left"


@pytest.fixture
def browser(tmp_path):
    if not (BROWSER and DRIVER):
        pytest.skip("the page is tested where Debian's chromium and chromium-driver are installed")
    options = webdriver.ChromeOptions()
    options.binary_location = BROWSER
    for flag in [*FLAGS.split(), f"--user-data-dir={tmp_path / 'browser'}"]:
        options.add_argument(flag)
    options.add_argument("--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1")
    options.add_experimental_option("prefs", {"download.default_directory": str(tmp_path / "downloads")})
    options.set_capability("goog:loggingPrefs", {"performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    yield driver
    driver.quit()


class Page:
    """The page as a person sees it."""

    def __init__(self, browser, url):
        self.browser = browser
        browser.get(url)
        self.wait(lambda: self.all("#prompt textarea"))

    def all(self, selector):
        return self.browser.find_elements("css selector", selector)

    def text(self, selector):
        """The text as it is when it is read: what is shown is replaced at any moment."""
        return self.browser.execute_script("return document.querySelector(arguments[0])?.innerText ?? ''", selector)

    def type(self, selector, text):
        (field,) = self.all(selector)
        field.clear()
        field.send_keys(text + "\t")

    def click(self, selector):
        self.wait(lambda: self.all(f"{selector}:not([disabled])"))[0].click()

    def wait(self, condition, seconds=60):
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            if value := condition():
                return value
            time.sleep(0.05)
        raise AssertionError(f"it did not happen; the page says {self.text('body')!r}")


def hosts(browser):
    """Where the page sent requests."""
    messages = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    sent = [m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"]
    return {url.split("/")[2].split(":")[0] for url in sent if url.startswith(("http", "ws"))}


@pytest.mark.heavy
def test_the_page(start_server, browser, tmp_path):
    state = tmp_path / "state"
    _, url = start_server("magic141_jax.demo", state, "--max_seconds", "3600")
    shown = Page(browser, url)

    shown.click("#make")
    shown.wait(lambda: "the prompt is empty" in shown.text("body"))

    picture = tmp_path / "photo.png"
    Image.radial_gradient("L").resize((50, 40)).save(picture)
    shown.all("#image input[type=file]")[0].send_keys(str(picture))
    shown.wait(lambda: shown.all("#image img"))
    shown.type("#prompt textarea", PROMPT)
    shown.type("#seconds input[type=number]", "3")
    shown.type("#seed textarea, #seed input", "7")
    shown.type("#schedule textarea", "1.5 a blue cat")
    shown.click("#make")
    shown.wait(lambda: shown.text("#status") == "Done, with seed 7")
    shown.wait(lambda: shown.all("#video video"))
    assert "a blue cat" in shown.text("#metadata")
    shown.click("#download")
    (file,) = shown.wait(lambda: list((tmp_path / "downloads").glob("*.mp4")))
    about = media.read_metadata(file)
    assert (about["prompt"], about["seed"], about["frames"], about["image"]) == (PROMPT, 7, 24, "input_reference")
    assert about["prompt_schedule"] == [{"time": 1.5, "prompt": "a blue cat"}]

    shown.type("#seconds input[type=number]", "3600")
    shown.click("#make")
    shown.wait(lambda: shown.all("#preview img[src^='data:image/webp']") and "window" in shown.text("#status"))
    shown.click("#cancel")
    shown.wait(lambda: shown.text("#status") == "Cancelled")

    def stopped():
        with urllib.request.urlopen(f"{url}/metrics") as answer:
            text = answer.read().decode()
        return "magic141_jobs_running 0.0" in text and "magic141_queue_length 0.0" in text

    shown.wait(stopped)
    shown.click("#make")
    shown.wait(lambda: "Making" in shown.text("#status"))
    assert not stopped()
    assert hosts(browser) == {"127.0.0.1"}
    browser.get("about:blank")
    shown.wait(stopped)
    assert len(list((state / "jobs").iterdir())) == 1, "a page that goes takes its job along"


def test_a_password(pipeline, tmp_path):
    folder = Folder(tmp_path / "state")
    worker = Worker(pipeline, make_catalog(pipeline.components, limits=Limits()), folder)
    client = TestClient(page.mount(make_app(worker, api_key="secret"), worker))
    for password, status in (("wrong", 400), ("secret", 200)):
        assert client.get("/config").status_code == 401
        assert client.post("/login", data={"username": "me", "password": password}).status_code == status
    assert client.get("/config").status_code == 200
    assert client.get("/v1/videos").status_code == 401, "the page's cookie is no key"
    folder.close()


def test_a_schedule_in_lines():
    assert page.read_schedule(" 0 a cat\n\n4.5: a dog runs \n") == [
        {"time": 0.0, "prompt": "a cat"},
        {"time": 4.5, "prompt": "a dog runs"},
    ]
    with pytest.raises(UserError, match="line 2 of the other prompts begins with no second"):
        page.read_schedule("0 a cat\na dog")


def test_a_preview_is_small():
    frames = np.zeros((129, 72, 1280, 3), np.float32)
    html = page._animated(frames, 24)
    assert html.startswith("<img") and len(html) < 50_000


def test_what_is_wrong_is_said():
    class Nobody:
        catalog = None

    form = {"prompt": "", "seconds": 1, "size": "", "steps": 1, "seed": "x", "schedule": "", "image": None}
    with pytest.raises(gr.Error, match="seed"):
        asyncio.run(anext(page.make_video(Nobody(), form)))
