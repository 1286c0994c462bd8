"""The layer table of CONTRIBUTING.md, read from there and checked against every import."""

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "t2sda_hf"
# Parts in the order of the table: a part may import those of lower rows, and of its own row only what EQUALS allows.
LAYERS = [
    {"labels", "batch", "config", "device", "errors", "files", "listing", "masking", "storage"},
    {"models", "translate", "augment", "losses"},
    {"data", "teacher"},
    {"methods"},
    {"evaluation", "training", "hub"},
    {"analysis"},
    {"launching", "cli", "commands", "__main__"},
]
WITHIN_ROW = {
    ("labels", "config"),
    ("config", "labels"),
    ("config", "listing"),
    ("batch", "labels"),
    ("files", "labels"),
    ("files", "listing"),
    ("batch", "device"),
    ("batch", "errors"),
    ("device", "errors"),
    ("translate", "augment"),
    ("training", "evaluation"),
    ("hub", "evaluation"),
    ("hub", "training"),
    ("cli", "launching"),
    ("commands", "cli"),
    ("commands", "launching"),
    ("__main__", "cli"),
}
NEVER = {("methods", "data"), *(("models", part) for part in LAYERS[0])}


def part_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported_parts(path: Path) -> Iterator[str]:
    """Parts of the package that a file imports, absolute or relative, at the top or inside a function."""
    package = ["t2sda_hf", *path.relative_to(PACKAGE).parts[:-1]]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = [*base, *(node.module or "").split(".")] if node.module else base
            names = [".".join([*module, alias.name]) for alias in node.names]
        else:
            continue
        yield from (name.split(".")[1] for name in names if name.startswith("t2sda_hf."))


def files() -> list[Path]:
    return [path for path in sorted(PACKAGE.rglob("*.py")) if part_of(path) != "__init__"]


def test_every_part_stands_in_one_layer() -> None:
    parts = {part_of(path) for path in files()}
    assert parts == set().union(*LAYERS)
    assert sum(len(layer) for layer in LAYERS) == len(parts)


def test_the_table_in_contributing_is_this_one() -> None:
    rows = re.findall(r"^\| \d [^|]*\|([^|]*)\|", (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"), re.M)
    assert [set(re.findall(r"`(\w+)`", row)) for row in rows[: len(LAYERS)]] == LAYERS


@pytest.mark.parametrize("path", files(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_nothing_downstream_is_imported_upstream(path: Path) -> None:
    part = part_of(path)
    level = next(i for i, layer in enumerate(LAYERS) if part in layer)
    below = set().union(*LAYERS[:level])
    for other in set(imported_parts(path)) - {part}:
        allowed = other in below or (part, other) in WITHIN_ROW
        assert allowed, f"{part} imports {other}"
        assert (part, other) not in NEVER, f"{part} imports {other}"


def test_the_model_files_stand_alone() -> None:
    """They are copied next to the weights for trust_remote_code, so they may import each other and libraries only."""
    for path in (PACKAGE / "models").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom):
                assert node.level < 2, f"{path.name} imports from outside models/"


def test_masking_waits_for_no_library() -> None:
    """A command masks what it prints before it loads anything."""
    for node in ast.walk(ast.parse((PACKAGE / "masking.py").read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [f"{node.module}"]
            assert {name.split(".")[0] for name in names} <= sys.stdlib_module_names
            assert isinstance(node, ast.Import) or node.level == 0


def test_the_dotted_switches_stay_out_of_the_maths() -> None:
    """Layer 1 knows values, not the run: no file there reads RunConfig."""
    for part in ("models", "augment", "losses"):
        for path in (PACKAGE / part).glob("*.py"):
            assert "config" not in set(imported_parts(path)), path


def test_the_picture_in_contributing_shows_what_there_is() -> None:
    """Every `part.name` in it is a class or function of that part."""
    picture = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8").split("```")[3]
    shown = re.findall(rf"\b({'|'.join(set().union(*LAYERS))})\.(\w+)", picture)
    assert len(shown) > 15
    for part, name in shown:
        places = [path for path in files() if part_of(path) == part]
        defined = rf"^(class|def) {name}\b"
        assert any(re.search(defined, path.read_text(encoding="utf-8"), re.M) for path in places), f"{part}.{name}"


def test_contributing_is_short() -> None:
    assert len((ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8").splitlines()) <= 80
