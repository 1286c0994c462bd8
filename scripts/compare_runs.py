"""Several runs on one page that opens offline: scores, curves, and in what their configs differ.

python scripts/compare_runs.py outputs/demo_0 outputs/demo_1 --output outputs/comparison

The page of each run, its index.html, is brought up to date first.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from t2sda_hf.evaluation.page import write_comparison, write_page
from t2sda_hf.masking import run_masked


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="output_dirs of train_uda.py")
    parser.add_argument("--output", type=Path, default=Path("outputs/comparison"), metavar="FOLDER")
    args = parser.parse_args(arguments)
    try:
        for folder in args.runs:
            write_page(folder)
        print(write_comparison(args.runs, args.output))
    except ValueError as error:
        print(f"ValueError: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(run_masked(main))
