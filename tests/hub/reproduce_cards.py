"""Train the models of model_cards/ again, by the command in each card, and compare all scores: make cards

Names of cards choose some (make cards ARGS=demo). A card whose data or weights are not here is left out, with the
reason. Exit code 1 if a score differs by more than 1e-6. On another processor sums are rounded otherwise.
"""

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

from t2sda_hf.cli import parser_of
from t2sda_hf.config import load_config
from t2sda_hf.hub.card import DRAWN, CardFacts, load_facts, method_folder

ROOT = Path(__file__).parents[2]
TOLERANCE = 1e-6


def absent(facts: CardFacts) -> list[str]:
    """What the run reads and this machine does not have. The config of a card has names in place of paths."""
    words = shlex.split(facts.command)
    args = parser_of("train").read(words[words.index("--config") :])
    file = ROOT / args.config
    cfg = load_config(file if file.exists() else args.config, args.overrides)
    paths = [domain.path for domain in (cfg.source, cfg.target, cfg.test) if domain.path not in (*DRAWN, "")]
    return [path for path in (*paths, cfg.model.pretrained) if path and not (ROOT / path).exists()]


def repeat(command: str, folder: Path) -> None:
    """Run the command of a card with another output folder."""
    words = shlex.split(command)
    settings = {}
    while "=" in words[0]:  # of the environment
        name, _, value = words.pop(0).partition("=")
        settings[name] = value
    program = str(Path(sys.executable).with_name(words[0]))
    subprocess.run([program, *words[1:], "--output_dir", str(folder)], cwd=ROOT, env=os.environ | settings, check=True)


def difference(one: float | None, other: float | None) -> float:
    if one is None or other is None:
        return 0.0 if one is other else float("inf")
    return abs(one - other)


def largest_difference(facts: CardFacts, folder: Path) -> float:
    """Of all scores in the card to those of the run, in percentage points."""
    again = json.loads((method_folder(folder) / "metrics.json").read_text(encoding="utf-8"))
    again["source_only"] = json.loads((folder / "source_only" / "metrics.json").read_text(encoding="utf-8"))["student"]
    worst = 0.0
    for name in ("student", "teacher", "source_only"):
        written = getattr(facts, name)
        if written is not None:
            pairs = [(written[key], again[name][key]) for key in written if key != "iou"]
            pairs += [(written["iou"][label], again[name]["iou"][label]) for label in written["iou"]]
            worst = max(worst, *(difference(*pair) for pair in pairs))
    return worst


def main(names: list[str]) -> int:
    known = {path.parent.name: path.parent for path in sorted((ROOT / "model_cards").glob("*/facts.json"))}
    failed = 0
    for name in names or known:
        facts = load_facts(known[name] / "facts.json")
        if missing := absent(facts):
            print(f"{name}: left out, not here: {', '.join(missing)}")
            continue
        with TemporaryDirectory() as temporary:
            repeat(facts.command, Path(temporary) / "run")
            worst = largest_difference(facts, Path(temporary) / "run")
        print(f"{name}: largest difference of a score {worst:.1e}: {facts.command}")
        failed += worst > TOLERANCE
    return min(failed, 1)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
