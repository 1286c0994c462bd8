"""The metric as a folder for the Hub, which `evaluate.load` runs without this package."""

import re
from pathlib import Path

from ..evaluation import confusion

NAME = "streaming_mean_iou"
HEADER = '''"""Mean intersection over union in constant memory: evaluate.load("<this folder>", num_labels=19).

Written by t2sda_hf.hub.metric from evaluation/confusion.py and evaluation/mean_iou.py of t2sda_hf; change it there.
"""

'''


def metric_source() -> str:
    """One file out of two: the metric, and the arithmetic that it imports."""
    first = Path(confusion.__file__)
    parts = [_without_docstring(path.read_text(encoding="utf-8")) for path in (first, first.with_name("mean_iou.py"))]
    imports: list[str] = []
    bodies = []
    for part in parts:
        lines = part.splitlines()
        own = [line for line in lines if re.match(r"(import|from) ", line)]
        imports += [line for line in own if "t2sda_hf" not in line and line not in imports]
        bodies.append("\n".join(line for line in lines if line not in own).strip())
    names = {name for line in imports if "collections.abc" in line for name in line.split("import ")[1].split(", ")}
    own = [f"from collections.abc import {', '.join(sorted(names))}", "from typing import Any"]
    others = sorted({line for line in imports if line.startswith("import ")})
    return HEADER + "\n".join([*own, "", *others]) + "\n\n" + "\n\n\n".join(bodies) + "\n"


def _without_docstring(source: str) -> str:
    return re.sub(r'\A""".*?"""\n', "", source, flags=re.S)
