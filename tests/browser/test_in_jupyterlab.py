"""The widget in a real JupyterLab: Run All, keys on its slider, sentences typed and answered by the kernel."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import nbformat
import pytest
from playwright.sync_api import Browser, expect

TESTS = Path(__file__).resolve().parent.parent

CELLS = [
    f"import sys; sys.path[:0] = [{str(TESTS)!r}, {str(TESTS.parent)!r}]\n"
    "from small_explorer import ByteModel, byte_sae\nfrom tutorial_sae.widgets.explorer import explorer",
    "explorer(ByteModel(), byte_sae(), 'The ferry leaves.', neighbours={'rich': 'Quick, vex my jazz!'})",
]


@pytest.fixture
def lab(tmp_path: Path) -> Iterator[str]:
    """The address of a JupyterLab with one notebook open to anyone on this machine."""
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in CELLS])
    notebook.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3", "language": "python"}
    (tmp_path / "files").mkdir()
    nbformat.write(notebook, tmp_path / "files" / "explorer.ipynb")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = [
        "--no-browser",
        "--allow-root",
        "--ip=127.0.0.1",
        f"--port={port}",
        f"--ServerApp.root_dir={tmp_path / 'files'}",
        "--IdentityProvider.token=",
        "--ServerApp.password=",
        "--LabApp.expose_app_in_browser=True",
        "--LabApp.news_url=",
        "--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate",
    ]
    with (tmp_path / "lab.log").open("w") as log:
        command = [sys.executable, "-m", "jupyterlab", *options]
        # settings of its own: the test changes the theme, and whoever runs it keeps theirs
        names = ("JUPYTERLAB_SETTINGS_DIR", "JUPYTERLAB_WORKSPACES_DIR", "JUPYTER_CONFIG_DIR")
        own = os.environ | {name: str(tmp_path / name) for name in names}
        server = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, cwd=tmp_path, env=own)
        try:
            for _ in range(240):
                try:
                    urllib.request.urlopen(f"http://127.0.0.1:{port}/api", timeout=5).close()
                    break
                except OSError:
                    time.sleep(0.5)
            yield f"http://127.0.0.1:{port}/lab/tree/explorer.ipynb?reset"
        finally:
            server.terminate()
            server.wait(30)


def test_in_jupyterlab(lab: str, browser: Browser):
    page = browser.new_page(viewport={"width": 1200, "height": 1500})
    page.set_default_timeout(120_000)
    expect.set_options(timeout=60_000)
    errors: list[str] = []
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.goto(lab)
    page.wait_for_function("() => window.jupyterapp && document.querySelector('.jp-Notebook .jp-CodeCell')")
    page.wait_for_selector("text=/Python 3.*Idle/")
    page.evaluate("() => window.jupyterapp.commands.execute('notebook:run-all-cells')")
    here = page.locator(".jp-OutputArea .cuts3")
    status, alert, text = here.locator("[role=status]"), here.locator("[role=alert]"), here.locator(".text")
    expect(status).to_contain_text("batch cut, k 6: ")

    before = status.inner_text()
    here.locator("input.k").press("ArrowRight")
    expect(status).to_contain_text("batch cut, k 7: ")
    assert status.inner_text() != before

    for typed, message in (
        ("", "the sentence is empty: write a few words"),
        ("long " * 40, "the sentence has 200 tokens, and the context holds 127 after BOS: shorten it"),
    ):
        text.fill(typed)
        text.press("Enter")
        expect(alert).to_have_text(message)
        expect(status).to_contain_text("batch cut, k 7: ")

    here.locator("summary").click()
    text.fill("<b>שלום</b> 🎉")
    here.get_by_role("button", name="cut it").click()
    expect(here.locator(".all tbody")).to_contain_text("🎉")
    expect(alert).to_be_hidden()
    expect(status).to_contain_text("batch cut, k 7: ")  # where the learner's hands left it
    assert here.locator("b").count() == 0

    assert here.evaluate("(one) => one.classList.contains('dark')") is False
    page.evaluate("() => window.jupyterapp.commands.execute('apputils:change-theme', { theme: 'JupyterLab Dark' })")
    page.wait_for_function("() => document.querySelector('.cuts3').classList.contains('dark')")
    assert page.locator(".jp-OutputArea", has_text="Traceback").count() == 0
    assert errors == []
    page.close()
