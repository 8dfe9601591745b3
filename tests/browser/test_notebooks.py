"""Every notebook that holds a widget, in a real JupyterLab: Run All, then each control by mouse and by keyboard; what
must change, what must not, and no error anywhere. `TUTORIAL_SAE_SHOTS` names a folder for pictures of the widgets.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import nbformat
import pytest
from conftest import jupyterlab, run_all
from playwright.sync_api import Browser, Locator, Page, expect

ROOT = Path(__file__).resolve().parent.parent.parent
WIDGET = re.compile(r"^explorer\(|^ipywidgets\.VBox\(|^widgets\.VBox\(|^cut_widget\(", re.MULTILINE)


def with_widgets() -> list[Path]:
    """The solved notebooks in which a cell shows a widget."""
    found = []
    for path in sorted((ROOT / "solutions").glob("*.ipynb")):
        cells = nbformat.read(path, as_version=4).cells
        if any(cell.cell_type == "code" and WIDGET.search(cell.source) for cell in cells):
            found.append(path)
    return found


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A JupyterLab on copies of the notebooks without their outputs, beside the committed results."""
    place = tmp_path_factory.mktemp("lab")
    (place / "files" / "solutions").mkdir(parents=True)
    (place / "files" / "benchmarks").symlink_to(ROOT / "benchmarks")
    for path in with_widgets():
        notebook = nbformat.read(path, as_version=4)
        for cell in notebook.cells:
            if cell.cell_type == "code":
                cell.outputs, cell.execution_count = [], None
        nbformat.write(notebook, place / "files" / "solutions" / path.name)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.setenv("CUDA_VISIBLE_DEVICES", "")
        with jupyterlab(place) as address:
            yield f"{address}/solutions"


def shoot(place: Locator, name: str) -> None:
    if folder := os.environ.get("TUTORIAL_SAE_SHOTS"):
        place.screenshot(path=f"{folder}/{name}.png")


def drag(page: Page, track: Locator, share: float, handle: Locator | None = None) -> None:
    """Press the mouse on a slider's handle, or on its track near the start, and let go at `share` of the track."""
    track.scroll_into_view_if_needed()
    box, held = track.bounding_box(), handle.bounding_box() if handle else None
    assert box is not None
    middle = box["y"] + box["height"] / 2
    page.mouse.move(held["x"] + held["width"] / 2 if held else box["x"] + 0.12 * box["width"], middle)
    page.mouse.down()
    page.mouse.move(box["x"] + share * box["width"], middle, steps=5)
    page.mouse.up()


def table(explorer: Locator) -> dict[str, list[str]]:
    """Mean L0, L0 from - to, and error of each cut, as shown."""
    rows = explorer.locator(".three tbody tr").all()
    return {row.locator("input").get_attribute("value") or "": row.locator("td").all_inner_texts()[1:] for row in rows}


def move_the_explorer(page: Page, here: Locator) -> None:
    k, theta = here.get_by_label("k", exact=True), here.get_by_label("θ", exact=True)
    for slider, moving, still in ((k, ["row", "batch"], ["threshold"]), (theta, ["threshold"], ["row", "batch"])):
        before = table(here)
        slider.press("ArrowRight")
        by_key = table(here)
        drag(page, slider, 0.6)
        by_mouse = table(here)
        for cut in moving:
            assert before[cut] != by_key[cut] != by_mouse[cut], cut
        for cut in still:
            assert before[cut] == by_key[cut] == by_mouse[cut], cut
    here.get_by_role("button", name="reset").click()
    beside, before = here.locator("select.beside"), table(here)
    for name in beside.locator("option").evaluate_all("(all) => all.slice(1).map((one) => one.value)"):
        beside.select_option(value=name)
        assert table(here)["batch"] != before["batch"], name
        assert (table(here)["row"], table(here)["threshold"]) == (before["row"], before["threshold"])
    expect(here.locator("[role=alert]")).to_be_hidden()


def move_the_box(page: Page, box: Locator) -> None:
    """A box of ipywidgets: each slider and each choice moves what the box shows, by a key and by the mouse."""
    content = "(all) => all.map((one) => one.innerHTML + one.src).join('')"
    output = box.locator(".widget-html-content, img")

    def changes(act: Callable[[], object]) -> None:
        before = output.evaluate_all(content)
        assert before
        act()
        for _ in range(100):
            if output.evaluate_all(content) != before:
                return
            page.wait_for_timeout(100)
        raise AssertionError("the control moved, and what is shown stayed")

    for slider in box.locator(".widget-slider").all():
        track, handle, number = (slider.locator(f) for f in (".noUi-target", ".noUi-handle", ".widget-readout"))
        said = number.inner_text()
        changes(partial(handle.press, "ArrowRight"))
        expect(number).not_to_have_text(said)
        said = number.inner_text()
        place, knob = track.bounding_box(), handle.bounding_box()
        assert place is not None
        assert knob is not None
        right = knob["x"] + knob["width"] / 2 > place["x"] + place["width"] / 2
        changes(partial(drag, page, track, 0.2 if right else 0.8, handle))  # away from where it is
        expect(number).not_to_have_text(said)
    for choice in box.locator("select").all():
        changes(partial(choice.select_option, index=1))
        changes(partial(choice.press, "Home"))  # JupyterLab keeps the arrows for its cells


@pytest.mark.parametrize("path", with_widgets(), ids=lambda path: path.stem)
def test_every_control_moves_what_it_should(path: Path, lab: str, browser: Browser):
    page = browser.new_page(viewport={"width": 1280, "height": 1400})
    page.set_default_timeout(60_000)
    expect.set_options(timeout=30_000)
    errors: list[str] = []
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("console", lambda message: errors.extend([message.text] * (message.type == "error")))
    run_all(page, f"{lab}/{path.name}")
    last = sum(cell.cell_type == "code" for cell in nbformat.read(path, as_version=4).cells)
    prompts = page.locator(".jp-CodeCell .jp-InputArea-prompt")
    expect(prompts.last).to_have_text(f"[{last}]:", timeout=300_000)
    errors += page.locator("[data-mime-type='application/vnd.jupyter.stderr']").all_inner_texts()

    explorers = page.locator(".jp-OutputArea .cuts3").all()
    boxes = page.locator(".jp-OutputArea .widget-vbox:has(.widget-slider)").all()
    assert explorers or boxes
    before = page.locator(".jp-OutputArea pre").all_inner_texts()
    for i, here in enumerate(explorers):
        move_the_explorer(page, here)
        shoot(here, f"{path.stem[:2]}-explorer-{i}")
    for i, box in enumerate(boxes):
        move_the_box(page, box)
        shoot(box, f"{path.stem[:2]}-slider-{i}")
    assert page.locator(".jp-OutputArea pre").all_inner_texts() == before, "nothing else on the page has moved"
    assert errors == []
    page.close()
