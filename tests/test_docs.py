"""README and guides: their blocks run from top to bottom in an empty folder with small pictures, or are at least words
that the command understands.

Every `t2sda` line goes through the real front. Runs are shortened by flags that stand behind the reader's own words:
few images, one update, small crops. A block under "parsed only" needs what a test cannot have.
"""

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from running import unpainted
from transformers import SegformerConfig, SegformerModel

from t2sda_hf.cli import COMMANDS, main, parser_of

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
FEW = ["--source.num_images=5", "--target.num_images=5", "--test.num_images=2", "--evaluation.source_images=0"]
SHORT = ["--train.max_steps=1", "--train.evaluate_every=1", "--train.batch_size=1", "--train.log_with=[]"]
SMALL = ["--data.crop_size=[64, 64]", "--data.outer_crop_size=[64, 96]", "--rcs.min_pixels=1"]
SHORTENED = {"train": [*FEW, *SHORT, *SMALL]}
SHORTENED |= {"translator train": [*FEW[:2], "--steps=1"], "translator apply": ["--source.num_images=2"]}
SHORTENED |= {"evaluate": ["--limit=2"], "analyze": ["--limit=2", "--per_class=8", "--num_pictures=1"]}
SHORTENED |= {"check": ["--processes=1"], "predict": ["--limit=2"]}
SHORTENED |= {"estimate": ["--data={crop_size: [256, 256], outer_crop_size: [256, 512]}", "--model.size=mit_b0"]}


@dataclass(frozen=True)
class Block:
    language: str
    text: str
    runs: bool
    line: int


def blocks(page: Path) -> Iterator[Block]:
    text = page.read_text(encoding="utf-8")
    for found in re.finditer(r"^(<!-- parsed only: [^>]+ -->\n)?```(\w*)\n(.*?)^```$", text, re.M | re.S):
        yield Block(found[2], found[3], found[1] is None, text[: found.start()].count("\n") + 1)


def commands(block: Block) -> Iterator[list[str]]:
    for line in block.text.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        if words:
            yield words


def pictures(folder: Path, count: int, labelled: bool) -> list[Path]:
    """Photographs of blocks, and ids 0 to 5 beside them in `labels`."""
    random, made = np.random.default_rng(len(str(folder))), []
    for index in range(count):
        ids = random.integers(0, 6, (3, 4)).astype(np.uint8).repeat(32, 0).repeat(32, 1)
        image = (ids[..., None] * 40 + random.integers(0, 30, (*ids.shape, 3))).astype(np.uint8)
        for name, array in [("images", image), *([("labels", ids)] if labelled else [])]:
            (folder / name).mkdir(parents=True, exist_ok=True)
            Image.fromarray(array).save(folder / name / f"{index}.png")
        made.append(folder / "images" / f"{index}.png")
    return made


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of somebody who reads: data of a game, photographs, some with labels, and an encoder."""
    monkeypatch.chdir(tmp_path)
    pictures(Path("data/game"), 6, labelled=True)
    photographs = pictures(Path("data/photos"), 6, labelled=False)
    pictures(Path("data/checked"), 3, labelled=True)
    for index in range(3):  # the checked ones have five names
        path = Path(f"data/checked/labels/{index}.png")
        Image.fromarray(np.minimum(np.array(Image.open(path)), 4)).save(path)
    pairs = "".join(f"images/{index}.png,labels/{index}.png\n" for index in range(3))
    Path("data/checked/pairs.csv").write_text(f"image,label\n{pairs}", encoding="utf-8")
    Image.open(photographs[0]).save("holiday.jpg")
    Path("photos").mkdir()
    Image.open(photographs[1]).save("photos/street.png")
    torch.manual_seed(0)
    SegformerModel(SegformerConfig()).save_pretrained("nvidia/mit-b0")  # stands in for the one of the Hub
    return tmp_path


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_line_of_a_page_is_understood(page: Path) -> None:
    for words in (words for block in blocks(page) if block.language == "bash" for words in commands(block)):
        while "=" in words[0]:  # settings of the environment
            words = words[1:]
        if words[0] == "t2sda":
            assert words[1] in COMMANDS, words
            parser_of(words[1]).read(words[2:])
        elif words[0] == "make":
            assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M), words
        elif words[0] == "python" or words[:2] == ["accelerate", "launch"]:
            script = next(word for word in words if word.endswith(".py"))
            assert (ROOT / script).is_file(), words
        else:
            assert words[0] in ("python3", ".venv/bin/pip", "source", "hf"), words


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_of_a_page_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)]+)\)", page.read_text(encoding="utf-8")):
        if target.startswith(("http", "#")):
            continue
        path, _, heading = target.partition("#")
        assert (page.parent / path).exists(), target
        if heading:
            titles = re.findall(r"^#+ (.*)$", (page.parent / path).read_text(encoding="utf-8"), re.M)
            assert heading in [re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles], target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_the_blocks_of_a_page_run(
    page: Path, world: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    if page.name != "README.md":
        unpainted(monkeypatch)
    for block in blocks(page):
        if block.language == "yaml":
            Path("mine.yaml").write_text(block.text, encoding="utf-8")
        elif block.language == "python":
            exec(compile(block.text, f"{page.name}, line {block.line}", "exec"), {})
        elif block.language == "bash" and block.runs:
            for words in (words for words in commands(block) if words[0] == "t2sda"):
                if words[1] in (
                    "export",
                    "repeat",
                ):  # half a minute each, in tests of their own
                    continue
                own = SHORTENED.get(words[1], SHORTENED.get(" ".join(words[1:3]), []))
                if words[1] == "predict" and "--compare" not in words:  # which has no limit without labels
                    own = []
                code = main([*words[1:], *own])
                said = capsys.readouterr()
                assert code == 0, f"{page.name}, line {block.line}: {shlex.join(words)}\n{said.err[-2000:]}"


def test_the_readme_is_short() -> None:
    assert len(PAGES[0].read_text(encoding="utf-8").splitlines()) <= 150
