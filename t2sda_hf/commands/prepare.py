"""Turn the unpacked download of a public data set into parquet shards: class ids, original names, class counts.

    t2sda prepare gta5 --root /downloads/gta5 --output data/gta5 --size 720 1280
    t2sda prepare cityscapes --root /downloads/cityscapes --output data/cityscapes --unlabelled train

Then `path: data/gta5` in a config. A killed command goes on where it was. --size is that of training: what is already
small is read in a fraction of the time, and gives the same pixels. Test sets keep their size: labels are compared
there.
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
