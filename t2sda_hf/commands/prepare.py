"""Turn the unpacked download of a public data set into parquet files, with class ids, file names and class counts.

    t2sda prepare gta5 --root /downloads/gta5 --output data/gta5 --size 720 1280
    t2sda prepare cityscapes --root /downloads/cityscapes --output data/cityscapes --unlabelled train

Then write `path: data/gta5` in a config. If the command was stopped, call it again: it continues its work.

For --size give the size at which you will train. Images that are already small are read in a fraction of the time, and
training sees the same pixels. Do not change the size of test sets, because scores are measured at the size of their
labels.
"""

from argparse import Namespace

from ..data.layouts import LAYOUTS
from ..data.preparing import prepare_layout
from ..labels import LABEL_SPACES


def run(args: Namespace) -> int:
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
    space = LAYOUTS[args.name].space
    print(f"{args.output}: {', '.join(f'{count} images ({split})' for split, count in lengths.items())}")
    print(f"In a config: path: {args.output}, label_space: {space} ({len(LABEL_SPACES[space])} names)")
    return 0
