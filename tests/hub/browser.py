"""Open a page in a real browser (Debian's chromium), walk through the demo as a visitor does, and look for errors."""

import json
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from playwright.sync_api import Page, sync_playwright

# Pictures of some size, which thumbnails and icons are not.
SOURCES = "[...document.images].filter(one => one.complete && one.naturalWidth > 50).map(one => one.src)"


@dataclass
class Seen:
    """What a visit showed: errors of the console, requests to other hosts, and the text of the page at its end."""

    errors: list[str] = field(default_factory=list)
    foreign: list[str] = field(default_factory=list)
    text: str = ""


@contextmanager
def served(command: list[str], folder: Path, environment: dict[str, str]) -> Iterator[str]:
    """Address of a gradio app that runs until the block ends; it listens on 127.0.0.1 only."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    own = {"GRADIO_SERVER_NAME": "127.0.0.1", "GRADIO_SERVER_PORT": str(port), "GRADIO_ANALYTICS_ENABLED": "False"}
    server = subprocess.Popen(
        [sys.executable, *command],
        cwd=folder,
        env=environment | own | {"PYTHONUNBUFFERED": "1"},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert server.stdout is not None
    try:
        assert any("Running on local URL" in line for line in server.stdout)
        yield f"http://127.0.0.1:{port}/"
    finally:
        server.terminate()
        server.wait()
        server.stdout.close()


@contextmanager
def visit(url: str, width: int = 1280, height: int = 1000) -> Iterator[tuple[Page, Seen]]:
    """`url` in a window of `width` x `height` pixels from the start: a picture is chosen while a page loads."""
    seen = Seen()
    with sync_playwright() as tool:
        browser = tool.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": width, "height": height})
        page.set_default_timeout(200_000)
        page.on("console", lambda line: seen.errors.append(line.text) if line.type == "error" else None)
        page.on("pageerror", lambda error: seen.errors.append(str(error)))
        page.on(
            "request",
            lambda one: None if one.url.startswith((url, "data:", "blob:", "file:")) else seen.foreign.append(one.url),
        )
        page.goto(url)
        yield page, seen
        seen.text = page.locator("body").inner_text()
        browser.close()


def walk(url: str, image: Path, folder: Path) -> Seen:
    """Pick an example, upload an image, click, move the slider, look at the confidence; screenshots go to `folder`."""

    def others_than(before: list[str], number: int = 3) -> None:
        """Wait for `number` pictures, one of them new."""
        test = f"now => now.length >= {number} && now.some(one => !{json.dumps(before)}.includes(one))"
        page.wait_for_function(f"({test})({SOURCES})")

    with visit(url) as (page, seen):
        segment, remove = page.get_by_role("button", name="Segment"), page.get_by_label("Remove Image").first
        segment.wait_for()
        page.screenshot(path=folder / "1_empty.png")
        page.locator(".gallery-item").first.click()
        remove.wait_for()
        segment.click()
        page.get_by_text("mean confidence").first.wait_for(state="attached")
        page.screenshot(path=folder / "2_example.png", full_page=True)
        remove.click()
        remove.wait_for(state="detached")
        page.locator("input[type=file]").first.set_input_files(image)
        remove.wait_for()
        for name, act in (
            ("3_classes", segment.click),
            ("4_overlay", lambda: page.get_by_role("slider").first.fill("1")),
            ("5_confidence", lambda: page.get_by_label("confidence", exact=True).check()),
        ):
            before = page.evaluate(SOURCES)
            act()
            others_than(before)
            page.screenshot(path=folder / f"{name}.png", full_page=True)
    return seen
