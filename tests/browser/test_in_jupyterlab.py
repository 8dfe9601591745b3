"""The widget in a real JupyterLab: Run All, keys on its slider, sentences typed and answered by the kernel."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import nbformat
import pytest
from conftest import jupyterlab, run_all
from playwright.sync_api import Browser, expect

TESTS = Path(__file__).resolve().parent.parent

CELLS = [
    f"import sys; sys.path[:0] = [{str(TESTS)!r}, {str(TESTS.parent)!r}]\n"
    "from small_explorer import ByteModel, byte_sae\nfrom tutorial_sae.widgets.explorer import explorer",
    "explorer(ByteModel(), byte_sae(), 'The ferry leaves.', neighbours={'rich': 'Quick, vex my jazz!'})",
]


@pytest.fixture
def lab(tmp_path: Path) -> Iterator[str]:
    """The address of a JupyterLab with one notebook."""
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in CELLS])
    notebook.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3", "language": "python"}
    (tmp_path / "files").mkdir()
    nbformat.write(notebook, tmp_path / "files" / "explorer.ipynb")
    with jupyterlab(tmp_path) as address:
        yield f"{address}/explorer.ipynb"


def test_in_jupyterlab(lab: str, browser: Browser):
    page = browser.new_page(viewport={"width": 1200, "height": 1500})
    page.set_default_timeout(120_000)
    expect.set_options(timeout=60_000)
    errors: list[str] = []
    page.on("pageerror", lambda error: errors.append(str(error)))
    run_all(page, lab)
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
