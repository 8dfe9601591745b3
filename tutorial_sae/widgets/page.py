"""Pages that need no kernel and no network: a script, its data, and a place on the page that the script fills."""

from __future__ import annotations

import base64
import html
import json
from pathlib import Path
from typing import Any

BOTH = "document.documentElement.style.colorScheme = 'light dark';"  # as the reader's system has it


class Page:
    """Shown in a notebook in a frame of its own, or `.save(path)`; `.inline` is the same as a part of another page.

    `script` is a JS module with `mount(place, data)`. Data go in as JSON in which `<` is escaped: whatever a text says,
    it ends no script.
    """

    def __init__(self, title: str, script: Path, data: Any, height: int):
        coded = json.dumps(data, default=lambda array: base64.b64encode(array).decode(), ensure_ascii=False)
        self.title, self.script, self.height = title, script.read_text(encoding="utf-8"), height
        self.data = coded.replace("<", "\\u003c")

    @property
    def page(self) -> str:
        head = f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{html.escape(self.title)}</title>'
        return f"{head}<body>{self._script(f'{BOTH} mount(document.body')}</html>"

    @property
    def inline(self) -> str:
        return f'<div id="here"></div>{self._script("mount(document.getElementById(`here`)")}'

    def _script(self, start: str) -> str:
        return f'<script type="module">{self.script}\n{start}, {self.data});</script>'

    def save(self, path: str | Path) -> None:
        Path(path).write_text(self.page, encoding="utf-8")

    def _repr_html_(self) -> str:
        style = f"width:100%;height:{self.height}px;border:0"
        return f'<iframe srcdoc="{html.escape(self.page)}" sandbox="allow-scripts" style="{style}"></iframe>'
