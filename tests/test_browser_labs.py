"""JupyterLab for real: started as `make lab` starts it, used in Chromium by mouse and keyboard. `python tests/test_browser_labs.py`
renews README's picture."""

import io
import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from contextlib import contextmanager
from pathlib import Path

import pytest
from conftest import ROOT
from nbformat.v4 import new_code_cell, new_notebook
from PIL import Image

from tunebook.kit.editions import BEGIN, END

TOKEN, WAIT = "9f2c", 60  # seconds that nothing should ever need
SOLUTION = "return torch.arange(S) <= torch.arange(S - T, S)[:, None]"
PICTURE, SIZE = "nbs/figures/labs-L1.png", (1080, 1440)
WORKS = ".jp-NotebookPanel:not(.lm-mod-hidden)"
MOVING = """from tunebook.attention.lens import viewer
from tunebook.kit.widgets import bars, slide
slide(lambda ax, t: bars(ax, torch.tensor([2 / t, 1.0, 0.0]).softmax(-1), "abc"), "Three choices", temperature=[0.5, 1, 2])
viewer("abcde", torch.rand(2, 1, 3, 5, 5).softmax(-1))"""
EXTRA = ("formgrader", "validate_assignment", "assignment_list", "course_list")


def make_lab():
    """The words of the command that `make lab` runs."""
    line = re.search(r"^lab:.*\n\t@(.+)$", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)[1]
    return shlex.split(line.replace("$(BIN)/jupyter", f"{shlex.quote(sys.executable)} -m jupyter"))


def checkout(folder):
    """One that may be written to: links, and a copy of the labs."""
    for path in ROOT.iterdir():
        if path.name not in (".git", "tutorial"): (folder / path.name).symlink_to(path)
    shutil.copytree(ROOT / "tutorial", folder / "tutorial")
    return folder


def as_a_student_has_it(own):
    """JupyterLab's folders in `own`, without what only developers and instructors install."""
    (own / "config" / "labconfig").mkdir(parents=True)
    off = {f"nbgrader.server_extensions.{name}": False for name in EXTRA} | {"jupyterlab_jupytext": False, "notebook": False}
    (own / "config" / "jupyter_server_config.json").write_text(json.dumps({"ServerApp": {"jpserver_extensions": off}}))
    shut = {"disabledExtensions": {name: True for name in ("@jupyter/nbgrader", "@jupyter-notebook/lab-extension", "jupyterlab-jupytext")}}
    (own / "config" / "labconfig" / "page_config.json").write_text(json.dumps(shut))
    env = {**os.environ, "PYTHONPATH": str(ROOT), **{f"JUPYTER_{k}_DIR": str(own / k.lower()) for k in ("CONFIG", "DATA", "RUNTIME")}}
    return {k: v for k, v in env.items() if k not in ("TUNEBOOK_CLAIMS", "TUNEBOOK_PROGRESS", "TUNEBOOK_WIDGETS", "JPY_SESSION_NAME")}


@contextmanager
def jupyterlab(course, own):
    """A server of our own, on loopback, with a token: its address."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    words = [*make_lab(), "--no-browser", "--allow-root", "--ip=127.0.0.1", f"--port={port}", f"--IdentityProvider.token={TOKEN}"]
    env = as_a_student_has_it(own)
    with open(own / "log", "w") as log:
        server = subprocess.Popen(words, cwd=course, env=env, stdout=log, stderr=log, start_new_session=True)
    try:
        end = time.monotonic() + WAIT
        while True:
            try: urllib.request.urlopen(f"http://127.0.0.1:{port}/api", timeout=5).close()
            except OSError:
                told = (own / "log").read_text()[-2000:]
                assert server.poll() is None and time.monotonic() < end, f"JupyterLab does not answer:\n{told}"
                time.sleep(0.1)
            else: break
        yield f"http://127.0.0.1:{port}"
    finally:
        os.killpg(server.pid, signal.SIGKILL)  # its kernels see that it is gone, and stop
        server.wait()


@contextmanager
def chromium(address, width=1280, height=900):
    """The system's Chromium, logged in and at the index of the labs: its page."""
    api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: pip install 'tunebook[dev]'")
    binary = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
    if binary is None: pytest.skip("no chromium on this machine")
    with api.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=binary, args=["--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"])
        page = browser.new_page(viewport={"width": width, "height": height})
        page.set_default_timeout(1000 * WAIT)
        page.goto(f"{address}/?token={TOKEN}")
        page.locator(".jp-MarkdownViewer h1").wait_for()
        yield page
        browser.close()


@pytest.fixture(scope="module")
def course(tmp_path_factory):
    """A checkout with one notebook more."""
    folder = checkout(tmp_path_factory.mktemp("course"))
    spec = {"kernelspec": {"name": "python3", "display_name": "python3", "language": "python"}}
    nb = new_notebook(metadata=spec, cells=[new_code_cell("import torch"), new_code_cell(MOVING)])
    (folder / "tutorial" / "moving.ipynb").write_text(json.dumps(nb))
    return folder


@pytest.fixture(scope="module")
def page(course, tmp_path_factory):
    """One server and one browser for all tests."""
    with jupyterlab(course, tmp_path_factory.mktemp("jupyter")) as address, chromium(address) as page: yield page


def run_all(page):
    """Once the kernel is there, from the menu."""
    page.locator(WORKS).locator("[data-jp-item-name=kernelName]", has_text="Python 3").wait_for()
    page.locator(".jp-StatusBar-Item", has_text="| Idle").wait_for()
    page.click(".lm-MenuBar-itemLabel:text-is('Run')")
    page.click(".lm-Menu-item[data-command='runmenu:run-all']")
    return page.locator(WORKS)


def until(page, expression, wanted):
    """Wait until an expression of JavaScript is the JSON that is wanted."""
    page.wait_for_function(f"JSON.stringify({expression}) === {json.dumps(json.dumps(wanted, separators=(',', ':')))}")


def test_from_the_index_to_a_solved_task(page, course):
    """The index is shown rendered and leads to the lab; all checks say what is open; a solution is typed, and its check turns green."""
    index = page.locator(".jp-MarkdownViewer")
    assert index.locator("h1").inner_text() == "The labs" and page.url.endswith("/lab/tree/tutorial/README.md")
    index.locator("a", has_text="Attention and masks").click()
    lab = run_all(page)
    assert page.url.endswith("/lab/tree/tutorial/L1_attention.ipynb")
    until(page, f"document.querySelectorAll('{WORKS} pre.tunebook-not-yet').length", 6)
    assert lab.locator("pre.tunebook-passed, .jp-OutputArea-output[data-mime-type*=error]").count() == 0
    lab.locator(".jp-CodeCell", has_text="def causal_mask").locator(".cm-line", has_text="NotImplementedError").click()
    page.keyboard.press("End")
    page.keyboard.press("Shift+Home")
    page.keyboard.type(SOLUTION)
    page.keyboard.press("Shift+Enter")
    page.keyboard.press("Shift+Enter")
    lab.locator("pre.tunebook-passed", has_text="L1.causal_mask").wait_for()
    assert lab.locator("pre.tunebook-not-yet").count() == 5
    kept = json.loads((course / "tutorial" / "progress.json").read_text())
    assert kept.pop("L1.causal_mask") == "passed" and len(kept) == 5 and set(kept.values()) == {"not yet"}
    summary = lab.locator("summary", has_text="It is right when T and S are equal").first
    summary.click()
    assert summary.evaluate("e => e.parentElement.open")
    picture = Image.open(io.BytesIO(page.screenshot()))
    assert picture.size == (1280, 900) and (26, 127, 55) in {color for _, color in picture.convert("RGB").getcolors(1 << 24)}  # green


def test_what_moves_is_moved_by_keyboard(page):
    """A slider changes its picture, above which the row of a few values stands; radio buttons choose the map that a viewer shows."""
    page.locator(".jp-DirListing-item", has_text="moving.ipynb").dblclick()
    page.wait_for_url("**/lab/tree/tutorial/moving.ipynb")
    lab = run_all(page)
    lab.locator("[role=slider]").focus()
    for value in (1, 2):
        page.keyboard.press("ArrowRight")
        lab.locator(f"img[alt^='temperature {value}: a has the largest weight']").wait_for()
    assert lab.locator(".jp-RenderedImage img").is_visible()  # the row that is kept in the file
    viewer = lab.locator(".tblens")
    viewer.scroll_into_view_if_needed()
    maps = f"[...document.querySelectorAll('{WORKS} .tblens pre')].filter(e => e.checkVisibility())"
    shown = maps + ".map(e => e.textContent.split('\\n').pop())"
    until(page, shown, ["layer 0, head 0"])
    viewer.locator("input[name=layer]:checked").focus()
    page.keyboard.press("ArrowDown")
    until(page, shown, ["layer 1, head 0"])
    page.keyboard.press("Tab")
    page.keyboard.press("ArrowRight")
    until(page, shown, ["layer 1, head 1"])


def test_the_picture_in_readme_is_there():
    alt, path = re.search(r"!\[([^\]]+)\]\((nbs/figures/labs-[^)]+)\)", (ROOT / "README.md").read_text()).groups()
    size = (ROOT / path).stat().st_size
    assert path == PICTURE and 10_000 < size < 200_000 and len(alt.split()) > 20
    assert Image.open(ROOT / path).size == SIZE


def picture(path):
    """README's picture: the first lab solved, as a student would have it, its slider moved."""
    with tempfile.TemporaryDirectory() as tmp:
        course = checkout(Path(tmp))
        nb = json.loads((course / "tutorial" / "solutions" / "L1_attention.ipynb").read_text())
        for c in nb["cells"]: c["source"] = "".join(line for line in c["source"] if line.strip() not in (BEGIN, END)).rstrip()
        (course / "tutorial" / "L1_attention.ipynb").write_text(json.dumps(nb))
        with jupyterlab(course, Path(tmp)) as address, chromium(address, *SIZE) as page:
            page.locator(".jp-MarkdownViewer a", has_text="Attention and masks").click()
            lab = run_all(page)
            until(page, f"document.querySelectorAll('{WORKS} pre.tunebook-passed').length", 6)
            page.keyboard.press("Control+b")
            lab.locator("[role=slider]").focus()
            page.keyboard.press("ArrowRight")
            lab.locator("img[alt^='mask causal: ']").wait_for()
            lab.locator(".jp-CodeCell", has_text="def padding_mask").evaluate("e => e.scrollIntoView()")
            image = Image.open(io.BytesIO(page.screenshot()))
    image.convert("RGB").quantize(255, method=Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE).save(path, optimize=True)


if __name__ == "__main__":
    picture(ROOT / PICTURE)
