"""The exported page of all latents, opened as a file without network: search, order, addresses, keyboard, bad input."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Page, expect

from tutorial_sae.report import write_latents

Visit = Callable[..., Page]
EVIL = "</script><img src=x onerror=\"console.log('run')\">"


def latent(number: int) -> dict[str, Any]:
    word, strength = f" word{number}", 1.0 + number
    top = [[[" before", word, f" after{number}", "\n"], [0.0, strength, 0.4, 0.0], 1, "made up"]]
    middle = [[[EVIL, word], [0.0, strength / 2], 1, "made up"]]
    return {
        "density": (number % 7) / 100,
        "count": 10 * (number % 7),
        "peak": strength,
        "top": top if number % 7 else [],
        "middle": middle if number % 7 else [],
        "near": [((number + 2) % 40, 0.5)],
        "up": [EVIL, " north"],
        "down": [" south"],
    }


DATA = {
    "title": "Latents",
    "about": ["Forty latents, made up."],
    "tokens": 1000,
    "first": 3,
    "latents": [latent(number) for number in range(40)],
}


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_latents(DATA, tmp_path_factory.mktemp("page")).read_text("utf-8")


@pytest.fixture
def page(visit: Visit, exported: str) -> Page:
    return visit(exported)


def go(page: Page, address: str) -> None:
    page.evaluate("(address) => { location.hash = address; }", address)


def test_it_opens_at_the_first_and_shows_all_there_is(page: Page):
    expect(page.locator("h2")).to_have_text("Latent 3")
    expect(page.get_by_role("status")).to_have_text("40 of 40 latents")
    told = page.locator("article").inner_text()
    assert "Fires on 3.0 % of 1,000 tokens (30); its largest value is 4.0." in told
    for part in ("Where it is largest", " word3", "From the middle of its range", "latent 5", " north", " south"):
        assert part in told
    marks = page.locator("article mark").evaluate_all("(all) => all.map((m) => [m.innerText, m.title, m.className])")
    assert marks[:2] == [[" word3", "4.00", "peak"], [" after3", "0.40", ""]]
    assert page.locator("nav a[aria-current]").inner_text().startswith("3")


def test_every_latent_has_an_address(page: Page):
    go(page, "latent=25")
    expect(page.locator("h2")).to_have_text("Latent 25")
    page.get_by_role("link", name="latent 27").click()
    expect(page.locator("h2")).to_have_text("Latent 27")
    assert page.url.endswith("#latent=27")
    page.go_back()
    expect(page.locator("h2")).to_have_text("Latent 25")
    go(page, "latent=40")
    expect(page.get_by_role("alert")).to_have_text("There is no latent 40: choose 0 to 39.")
    go(page, "latent=7")
    expect(page.locator("article")).to_contain_text("Never fires on these 1,000 tokens.")
    assert page.locator("article .text").count() == 0


def test_search_by_number_and_by_words(page: Page):
    search, status = page.get_by_label("Search"), page.get_by_role("status")
    search.fill("WORD12 after12")
    expect(status).to_have_text("1 of 40 latents")
    search.press("Enter")
    expect(page.locator("h2")).to_have_text("Latent 12")
    search.fill("29")
    expect(status).to_have_text("1 of 40 latents")
    search.press("Enter")
    expect(page.locator("h2")).to_have_text("Latent 29")
    search.fill("no such thing")
    expect(status).to_have_text("0 of 40 latents")
    search.press("Enter")
    expect(page.locator("h2")).to_have_text("Latent 29")
    search.fill("")
    expect(status).to_have_text("40 of 40 latents")


def test_order_and_steps(page: Page):
    first = page.locator("nav a").first
    expect(first).to_contain_text("0")
    page.get_by_label("Order by").select_option("largest value")
    expect(first).to_contain_text("39")
    first.press("Enter")
    expect(page.locator("h2")).to_have_text("Latent 39")
    page.get_by_role("button", name="next").click()
    expect(page.locator("h2")).to_have_text("Latent 38")
    page.get_by_role("button", name="previous").press("Enter")
    page.get_by_role("button", name="previous").press("Enter")
    expect(page.locator("h2")).to_have_text("Latent 0")
    page.get_by_label("Order by").select_option("density")
    expect(first).to_contain_text("6.0 %")


def test_text_is_text(page: Page):
    expect(page.locator("article code").first).to_have_text(EVIL)
    expect(page.locator("article .text").last).to_contain_text(EVIL)
    assert page.locator("article img").count() == 0


def test_on_a_narrow_screen_nothing_is_wider_than_it(visit: Visit, exported: str):
    page = visit(exported, viewport={"width": 420, "height": 900})
    expect(page.locator("h2")).to_have_text("Latent 3")
    assert page.evaluate("() => document.documentElement.scrollWidth") <= 420


def test_a_link_from_elsewhere(page: Page, tmp_path: Path):
    page.goto(page.url.split("#")[0] + "#latent=31")
    page.reload()
    expect(page.locator("h2")).to_have_text("Latent 31")
