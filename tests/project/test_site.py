# SPDX-License-Identifier: Apache-2.0
"""The site in a browser, as wide as a phone and as a desk's: what is wide scrolls by itself, and the page does not."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.support.paths import ROOT

pytestmark = pytest.mark.slow
WIDTHS = {"phone": 390, "desk": 1280}  # in CSS pixels
BROWSERS = ("chromium", "google-chrome")

# Elements of the text that reach beyond the window, and are in nothing that scrolls by itself.
BEYOND = """() => {
    const width = document.documentElement.clientWidth
    const scrolls = element => element && element !== document.body &&
        (["auto", "scroll", "hidden"].includes(getComputedStyle(element).overflowX) || scrolls(element.parentElement))
    const beyond = [...document.querySelectorAll(".md-content *")].filter(element => {
        const box = element.getBoundingClientRect()
        return box.width && box.right > width + 1 && !scrolls(element.parentElement)
    })
    return beyond.map(element => element.outerHTML.slice(0, 80))
}"""


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    pytest.importorskip("mkdocs", reason="needs mkdocs: pip install 'gpu-rnn[docs]'")
    site = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "-q", "-f", str(ROOT / "mkdocs.yml"), "-d", str(site)]
    subprocess.run(command, env=os.environ | {"NO_MKDOCS_2_WARNING": "1"}, cwd=ROOT, check=True)
    return sorted(page for page in site.rglob("*.html") if page.name != "404.html")


@pytest.fixture(scope="module")
def browser() -> Any:
    api = pytest.importorskip(
        "playwright.sync_api", reason="needs playwright: pip install 'gpu-rnn[site]', or make test-clients"
    )
    path = next(filter(None, map(shutil.which, BROWSERS)), None)
    if path is None:
        pytest.skip("needs a browser: apt-get install chromium")
    with api.sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield opened
        opened.close()


@pytest.mark.parametrize("name", WIDTHS)
def test_no_page_is_wider_than_the_window(name: str, pages: list[Path], browser: Any) -> None:
    window = browser.new_page(viewport={"width": WIDTHS[name], "height": 844}, is_mobile=name == "phone")
    failed: list[str] = []
    window.on("pageerror", lambda error: failed.append(str(error)))
    window.on("requestfailed", lambda request: failed.append(request.url))
    for page in pages:
        window.goto(page.as_uri())
        window.wait_for_selector(".md-content")
        failed += [f"{page.name}: {text}" for text in window.evaluate(BEYOND)]
        assert window.evaluate("document.documentElement.scrollWidth") <= WIDTHS[name], page.name
    window.close()
    assert not failed
