"""The widgets as people meet them: JupyterLab and `mtx app` on loopback, in Chromium driven by Playwright.

The model is the committed reference run: one of a few steps makes the same music whatever its latent.
"""

import base64
import io
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from contextlib import contextmanager, suppress
from urllib.error import HTTPError

import nbformat
import numpy as np
import pytest
import soundfile
from symusic import Score

import mtxlib
from mtxlib.config import Config
from mtxlib.music.display import TAIL

CHROMIUM = shutil.which("chromium")
pytestmark = pytest.mark.skipif(not CHROMIUM, reason="needs Chromium: apt-get install chromium")
FLAGS = ("--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
         "--disable-component-update --disable-sync").split()
SETTINGS = {"notebook-extension/tracker": {"windowingMode": "none"},  # all cells are in the page, seen or not
            "apputils-extension/notification": {"fetchNews": "false", "checkForUpdates": False}}


@pytest.fixture(scope="module")
def folder(music, tmp_path_factory):
    """The reference model as a run on the small corpus."""
    folder = tmp_path_factory.mktemp("browser") / "run"
    folder.mkdir()
    for name in ("model.safetensors", "tokenizer.json"):
        shutil.copy(mtxlib.ROOT / "outputs" / "reference" / name, folder)
    config = Config.load(mtxlib.ROOT / "outputs" / "reference" / "config.json")
    config = config.replace(source="folder", archive=str(music), data_dir=str(music.parent / "data"), limit=0)
    (folder / "config.json").write_text(json.dumps(config.to_dict()))
    return folder


@pytest.fixture(scope="module")
def open_page():
    """Opens a page; it notes where answers came from."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=FLAGS)

        def opened(url: str, width: int = 1280):
            page = browser.new_page(viewport={"width": width, "height": 1000})
            page.set_default_timeout(300_000)  # on a busy machine; a quiet one needs seconds
            page.answered = []
            page.on("response", lambda response: page.answered.append(response.url))
            page.goto(url)
            return page

        yield opened
        browser.close()


@contextmanager
def serving(command: list[str], ready: str, folder):
    """A server that is up, and is gone afterwards; its settings lie in `folder` alone."""
    for name, values in SETTINGS.items():
        path = folder / "settings" / "@jupyterlab" / f"{name}.jupyterlab-settings"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(values))
    environment = {**os.environ, "PYTHONPATH": str(mtxlib.ROOT), "OMP_NUM_THREADS": "1",
                   "JUPYTERLAB_SETTINGS_DIR": str(folder / "settings"),
                   **{f"JUPYTER_{name}_DIR": str(folder / name) for name in ("CONFIG", "DATA", "RUNTIME")}}
    with open(folder / "log.txt", "w") as log:
        server = subprocess.Popen([sys.executable, "-m", *command], cwd=folder, env=environment, stdout=log, stderr=log)
    try:
        wait_for(lambda: answers(ready), lambda: (folder / "log.txt").read_text())
        yield
    finally:
        server.terminate()
        with suppress(subprocess.TimeoutExpired):
            server.wait(10)
        server.kill()  # its kernels end when they miss it
        server.wait()


def answers(url: str) -> bool:
    try:
        return bool(urllib.request.urlopen(url, timeout=5))
    except HTTPError:
        return True
    except OSError:
        return False


def wait_for(condition, says=lambda: "", seconds: float = 300):
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end, says()
        time.sleep(0.1)
    return found


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def sound_of(page) -> tuple[str, np.ndarray, int]:
    """The address of the clip that can be seen, and what it holds."""
    source = page.locator(".mtx audio").locator("visible=true").first.get_attribute("src")
    assert source.startswith("data:audio/ogg;base64,")
    return source, *soundfile.read(io.BytesIO(base64.b64decode(source.partition(",")[2])))


def move_listen_and_save(page) -> None:
    """Moves the slider by keys: the roll changes, and a new clip is as long as the music in the file that is saved. The
    page puts the picture in its place last, so with a new one the sound is new too."""
    slider = page.locator(".mtx .widget-hslider", has_text="A to B")
    slider.wait_for()
    picture = page.locator(".mtx img").locator("visible=true").first
    picture.wait_for()
    clip = sound_of(page)[0]
    slider.locator(".noUi-handle").focus()
    for _ in range(4):
        roll = picture.get_attribute("src")
        page.keyboard.press("ArrowRight")
        wait_for(lambda roll=roll: picture.get_attribute("src") != roll)
    assert slider.locator(".widget-readout").inner_text() == "α 0.70"
    page.get_by_role("button", name="Save MIDI").locator("visible=true").click()
    said = wait_for(lambda: re.search(r"Saved as (.*_0\.70(_2)?\.mid)", page.locator(".mtx").first.inner_text()))
    source, samples, rate = sound_of(page)
    saved = Score(said[1])
    assert source != clip and np.sqrt(np.mean(samples ** 2)) > 0.01 and saved.note_num() > 8
    last = max(note.end for track in saved.to("second").tracks for note in track.notes)
    assert len(samples) / rate == pytest.approx(last + TAIL, abs=0.1)


def stays_here(page) -> bool:
    return all(re.match(r"http://127\.0\.0\.1:|data:|blob:", url) for url in page.answered)


def test_the_slider_in_jupyterlab(folder, open_page, tmp_path):
    notebook = nbformat.read(mtxlib.ROOT / "notebooks" / "06_interpolation.ipynb", 4)
    [parameters] = [cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", [])]
    small = {"steps_between": 3, "samples": 2, "long_bars": 8, "pairs": 2, "pair_steps": 3, "attribute_windows": 1,
             "prior_steps": 2, "judged_pieces": 1, "judged_bars": 4}
    parameters.source += f"\n{', '.join(small)}, run_dir = {', '.join(map(str, small.values()))}, {str(folder)!r}"
    nbformat.write(notebook, tmp_path / "06.ipynb")
    address = f"http://127.0.0.1:{(port := free_port())}"
    with serving(["jupyterlab", "--allow-root", "--no-browser", "--ip=127.0.0.1", f"--port={port}",
                  "--IdentityProvider.token=t", f"--ServerApp.root_dir={tmp_path}",
                  "--KernelSpecManager.ensure_native_kernel=True"], f"{address}/api/status?token=t", tmp_path):
        page = open_page(f"{address}/lab/tree/06.ipynb?token=t")
        page.get_by_text("| Idle").wait_for()  # before its kernel is there, cells are run by nobody
        page.get_by_text("Run", exact=True).first.click()
        page.get_by_text("Run All Cells", exact=True).click()
        wait_for((folder / "samples" / "index.html").exists, seconds=600)  # the last thing 06 makes
        move_listen_and_save(page)
        assert stays_here(page)


def test_the_same_as_a_page(folder, open_page, tmp_path):
    address = f"http://127.0.0.1:{(port := free_port())}"
    with serving(["mtxlib.book.cli", "app", "--run", str(folder), f"--port={port}", "--no-browser"],
                 f"{address}/nothing", tmp_path):
        page = open_page(address)
        move_listen_and_save(page)
        assert stays_here(page) and "load_run" not in page.content()
