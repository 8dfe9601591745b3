"""The three-cuts explorer on a real sentence: `python -m benchmarks.explorer` writes a page, and a picture of it.

The page, `runs/explorer.html`, needs neither kernel nor network. The picture is the one in the README; it takes
Chromium (`apt-get install chromium`) and Playwright (`pip install -e '.[dev]'`).
"""

from __future__ import annotations

from pathlib import Path

import torch

from tutorial_sae import load_model, load_pretrained
from tutorial_sae.widgets.explorer import explorer_data, explorer_html, three_cuts

ROOT = Path(__file__).parent.parent
PICTURE = Path(__file__).parent / "results" / "explorer.png"
SENTENCE = "In 1897 the physicist J. J. Thomson discovered the electron, the first particle smaller than an atom."
NEIGHBOURS = {
    "poor": ", , , , , , , , , , , , , , , , , , , , , , , , , , , , , , , ,",
    "rich": "Marie Curie isolated polonium and radium in Paris; Ernest Rutherford fired alpha particles at gold foil.",
}


def main() -> None:
    model = load_model("smollm2-135m", device="cpu", dtype=torch.float32)
    data = explorer_data(model, load_pretrained("batchtopk"), SENTENCE, neighbours=NEIGHBOURS)
    for beside in ("alone", *NEIGHBOURS):
        for name, cut in three_cuts(data, neighbours=beside).items():
            print(f"{beside:6} {name:10} mean L0 {cut.l0.double().mean():5.1f}  error {cut.error:.3f}")
    page = ROOT / "runs" / "explorer.html"
    page.parent.mkdir(exist_ok=True)
    explorer_html(data).save(page)
    print(f"{page}: {page.stat().st_size / 1000:.0f} kB")
    photograph(page)


def photograph(page: Path) -> None:
    from PIL import Image
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path="/usr/bin/chromium", args=["--no-sandbox", "--disable-gpu"]
        )
        view = browser.new_page(viewport={"width": 900, "height": 700}, device_scale_factor=1.25)
        view.goto(page.as_uri())
        view.get_by_label("each token’s entries, largest first").check()
        view.locator("canvas").hover(position={"x": 300, "y": 205})
        view.wait_for_timeout(300)
        view.locator(".cuts3").screenshot(path=PICTURE)
        browser.close()
    few = Image.open(PICTURE).convert("RGB").quantize(255, method=Image.Quantize.FASTOCTREE, dither=Image.Dither.NONE)
    few.save(PICTURE, optimize=True)
    print(f"{PICTURE}: {PICTURE.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
