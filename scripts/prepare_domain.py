"""Turn the unpacked download of a public data set into parquet shards: class ids, original names, class counts.

python scripts/prepare_domain.py gta5 --root /downloads/gta5 --output data/gta5 --size 720 1280
python scripts/prepare_domain.py cityscapes --root /downloads/cityscapes --output data/cityscapes --unlabelled train

Then `path: data/gta5` in a config. A killed run goes on where it was. --size is that of training: what is already small
is read in a fraction of the time, and gives the same pixels. Test sets keep their size: labels are compared there.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from t2sda_hf.data.layouts import LAYOUTS
from t2sda_hf.data.preparing import prepare_layout
from t2sda_hf.labels import LABEL_SPACES
from t2sda_hf.masking import run_masked


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=LAYOUTS, metavar="NAME", help=", ".join(LAYOUTS))
    parser.add_argument("--root", required=True, help="folder that holds the unpacked download; only read")
    parser.add_argument("--output", required=True, type=Path, metavar="DIR")
    parser.add_argument("--size", type=int, nargs=2, metavar=("HEIGHT", "WIDTH"), help="default: keep the files")
    parser.add_argument("--resize_mode", choices=("keep_ratio", "exact"), default="keep_ratio")
    parser.add_argument("--encoding", choices=("png", "jpeg", "raw"), default="png", help="of resized images")
    parser.add_argument("--splits", nargs="+", default=[], help="default: all")
    parser.add_argument("--unlabelled", nargs="+", default=[], metavar="SPLIT", help="splits prepared without labels")
    parser.add_argument("--incomplete", action="store_true", help="accept fewer images than the complete download has")
    parser.add_argument("--processes", type=int, help="default: one per core")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    args = parse_arguments(arguments)
    try:
        lengths = prepare_layout(
            args.name,
            args.root,
            args.output,
            size=tuple(args.size) if args.size else None,
            resize_mode=args.resize_mode,
            encoding=args.encoding,
            splits=args.splits,
            unlabelled=args.unlabelled,
            incomplete=args.incomplete,
            num_processes=args.processes,
        )
    except ValueError as error:
        print(f"ValueError: {error}", file=sys.stderr)
        return 2
    space = LAYOUTS[args.name].space
    print(f"{args.output}: {', '.join(f'{count} images ({split})' for split, count in lengths.items())}")
    print(f"In a config: path: {args.output}, label_space: {space} ({len(LABEL_SPACES[space])} names)")
    return 0


if __name__ == "__main__":
    sys.exit(run_masked(main))
