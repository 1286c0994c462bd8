"""Walk through the demo in a real browser (Debian's chromium), as a visitor does, and look for errors."""

import json
from pathlib import Path
from typing import Any

from playwright.sync_api import sync_playwright

# The picture that was uploaded and those of both models.
SHOWN = "[...document.images].filter(one => one.complete && one.naturalWidth > 50).length >= 3"
SOURCES = "[...document.images].map(one => one.src)"


def walk(url: str, image: Path, folder: Path, chromium: str) -> dict[str, Any]:
    """Upload, click, change the view; screenshots go to `folder`.

    Returns:
        "errors": what the console said of that kind; "foreign": requests to other hosts; "text": what the page says.
    """
    errors: list[str] = []
    foreign: list[str] = []
    with sync_playwright() as tool:
        browser = tool.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1280, "height": 1000})
        page.set_default_timeout(200_000)
        page.on("console", lambda line: errors.append(line.text) if line.type == "error" else None)
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on("request", lambda one: None if one.url.startswith((url, "data:", "blob:")) else foreign.append(one.url))
        page.goto(url)
        page.get_by_role("button", name="Segment").wait_for()
        page.screenshot(path=folder / "1_empty.png")
        page.locator("input[type=file]").first.set_input_files(image)
        page.locator("img").first.wait_for()
        page.get_by_role("button", name="Segment").click()
        page.get_by_text("mean confidence").first.wait_for(state="attached")
        page.wait_for_function(SHOWN)
        page.screenshot(path=folder / "2_classes.png", full_page=True)
        text = page.locator("body").inner_text()
        before = page.evaluate(SOURCES)
        page.get_by_label("confidence", exact=True).check()
        page.wait_for_function(f"JSON.stringify({SOURCES}) !== {json.dumps(json.dumps(before, separators=(',', ':')))}")
        page.wait_for_function(SHOWN)
        page.screenshot(path=folder / "3_confidence.png", full_page=True)
        browser.close()
    return {"errors": errors, "foreign": foreign, "text": text}
