"""The site as it is built: links and images lead somewhere, and each screen can show each page.

It looks at the site that DOCS_SITE names; ``python -m nox -s docs`` builds one and runs this.
"""

from __future__ import annotations

import importlib
import json
import os
import pkgutil
import re
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from html import unescape
from html.parser import HTMLParser
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from urllib.parse import unquote

import pytest

import fictive_sqlalchemy

pytestmark = pytest.mark.skipif(
    "DOCS_SITE" not in os.environ,
    reason="DOCS_SITE names no built site: python -m nox -s docs makes one",
)
SITE = Path(os.environ.get("DOCS_SITE", "")).resolve()
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
BROWSER = next(filter(None, map(shutil.which, BROWSERS)), None)

# Pixels.
WIDTHS = [390, 1280]
COLUMN = 45
LETTER = 9

# Characters: a longer part of a name may be broken anywhere.
WORD = {390: 12, 1280: 30}

# A table with this many columns or more scrolls beside the names of its rows.
COLUMNS = 6

LOOK = """
<!doctype html>
<iframe id="screen" style="width: WIDTHpx; height: 800px; border: 0"></iframe>
<script>
async function smallestLetter(image) {
    const source = await (await fetch(image.src)).text();
    const drawn = new DOMParser().parseFromString(source, "image/svg+xml").documentElement;
    const scale = image.clientWidth / drawn.viewBox.baseVal.width;
    const sizes = [...drawn.querySelectorAll("text")].map(text => {
        const size = /(\\d+(\\.\\d+)?)px/.exec(text.getAttribute("style") || "");
        return Number(text.getAttribute("font-size") || (size ? size[1] : Infinity));
    });
    return scale * Math.min(...sizes);
}
function broken(shown, code) {
    // The parts between which code may be broken are text nodes, and words in these.
    const found = [], nodes = shown.createTreeWalker(code, NodeFilter.SHOW_TEXT);
    while (nodes.nextNode()) {
        for (const word of nodes.currentNode.data.matchAll(/[^\\s\\u2026-]+/g)) {
            const range = shown.createRange();
            range.setStart(nodes.currentNode, word.index);
            range.setEnd(nodes.currentNode, word.index + word[0].length);
            const lines = new Set([...range.getClientRects()].map(each => Math.round(each.top)));
            if (lines.size > 1 && word[0].length <= WORD) found.push(word[0]);
        }
    }
    return found;
}
async function look() {
    const screen = document.getElementById("screen"), wrong = [];
    for (const page of PAGES) {
        await new Promise(done => { screen.onload = done; screen.src = page; });
        const shown = screen.contentDocument;
        const width = shown.documentElement.scrollWidth;
        if (width > WIDTH) wrong.push(`${page} is ${width} pixels wide`);
        for (const cell of shown.querySelectorAll("table.docutils :is(th, td)"))
            if (cell.clientWidth < COLUMN)
                wrong.push(`${page} breaks the words of a column: ${cell.textContent}`);
        for (const code of shown.querySelectorAll("table.docutils code"))
            for (const word of broken(shown, code))
                wrong.push(`${page} breaks ${word} in the table with ${code.textContent}`);
        for (const table of shown.querySelectorAll("table.docutils")) {
            const around = table.parentElement, columns = table.querySelectorAll("th").length;
            if (around.scrollWidth > around.clientWidth && columns < COLUMNS)
                wrong.push(`${page} cuts a table: ${table.textContent.slice(0, 60)}`);
        }
        for (const image of shown.images) {
            image.loading = "eager";
            await image.decode().catch(() => wrong.push(`${page} does not show ${image.src}`));
            if (image.src.endsWith(".svg") && await smallestLetter(image) < LETTER)
                wrong.push(`${page} has letters that are too small in ${image.src}`);
        }
    }
    document.body.textContent = "LOOKED" + JSON.stringify(wrong) + "LOOKED";
}
look();
</script>
"""


class Page(HTMLParser):
    """What a page of the site links to, and where links may lead to in it."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.links: set[str] = set()
        self.anchors: set[str] = set()
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Note what a tag links to."""
        for name, value in attrs:
            if name == "id" and value:
                self.anchors.add(value)
            elif name in ("href", "src") and value and not re.match(r"[a-z]+:|//", value):
                self.links.add(value)


def pages() -> dict[Path, Page]:
    return {path: Page(path) for path in sorted(SITE.rglob("*.html"))}


@contextmanager
def served() -> Iterator[str]:
    """Serve the site, as a browser lets a page look into another only on one host."""

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, format: str, *args: object) -> None: ...

    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(SITE))) as server:
        thread = Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}"
        finally:
            server.shutdown()
            thread.join()


def test_each_link_and_image_leads_somewhere() -> None:
    found = pages()
    broken: list[str] = []
    for path, page in found.items():
        for link in page.links:
            name, _, anchor = unquote(link).partition("#")
            target = (path.parent / name.partition("?")[0]).resolve() if name else path
            there = found.get(target)
            is_missing = anchor and there is not None and anchor not in there.anchors
            if not target.is_file() or is_missing:
                broken.append(f"{path.relative_to(SITE)}: {link}")
    assert broken == []
    assert len(found) > 20


def test_the_reference_has_each_public_name() -> None:
    anchors = {anchor for page in pages().values() for anchor in page.anchors}
    names: set[str] = set()
    for module in pkgutil.walk_packages(fictive_sqlalchemy.__path__, "fictive_sqlalchemy."):
        public = getattr(importlib.import_module(module.name), "__all__", [])
        names |= {f"{module.name}.{name}" for name in public}
    names |= {f"fictive_sqlalchemy.{name}" for name in fictive_sqlalchemy.__all__}
    assert names - anchors == set()
    assert len(names) > 15


def test_the_site_has_what_github_shows() -> None:
    page = (SITE / "docs" / "service-layer.html").read_text(encoding="utf-8")
    assert "caption-text" in page  # the file that a block is
    assert "```" not in page


@pytest.mark.skipif(
    BROWSER is None, reason=f"No browser to look at the site with: none of {', '.join(BROWSERS)}."
)
@pytest.mark.parametrize("width", WIDTHS)
def test_a_screen_shows_each_page_and_its_images(width: int, tmp_path: Path) -> None:
    assert BROWSER is not None
    names = [f"/{path.relative_to(SITE).as_posix()}" for path in pages()]
    harness = SITE / "screen-test.html"
    values = {"COLUMNS": COLUMNS, "COLUMN": COLUMN, "LETTER": LETTER, "WORD": WORD[width]}
    values["WIDTH"] = width
    text = LOOK.replace("PAGES", json.dumps(names))
    for name, value in values.items():
        text = text.replace(name, str(value))
    harness.write_text(text, encoding="utf-8")
    try:
        with served() as url:
            seen = subprocess.run(
                [
                    BROWSER,
                    "--headless",
                    "--disable-gpu",
                    *(["--no-sandbox"] if os.geteuid() == 0 else []),
                    f"--user-data-dir={tmp_path}",
                    f"--window-size={width + 20},900",
                    "--virtual-time-budget=600000",
                    "--dump-dom",
                    f"{url}/{harness.name}",
                ],
                capture_output=True,
                text=True,
                timeout=300,
            )
    finally:
        harness.unlink()
    looked = seen.stdout.split("LOOKED")
    assert len(looked) == 3, seen.stderr
    assert json.loads(unescape(looked[1])) == []
