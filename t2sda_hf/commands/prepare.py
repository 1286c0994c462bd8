"""Turn the unpacked download of a public data set into parquet files, with class ids, file names and class counts.
The same is made of the source or the target of a config, whatever it is.

    t2sda prepare gta5 --root /downloads/gta5 --output data/gta5 --size 720 1280
    t2sda prepare cityscapes --root /downloads/cityscapes --output data/cityscapes --unlabelled train
    t2sda prepare source --config mine.yaml --output data/mine

Then write `path: data/gta5` in a config. If the command was stopped, call it again: it continues its work.

For --size give the size at which you will train. Images that are already small are read in a fraction of the time, and
training sees the same pixels. Do not change the size of test sets, because scores are measured at the size of their
labels.
"""

from argparse import Namespace

from ..config import only
from ..data.layouts import LAYOUTS, ROLES
from ..data.preparing import prepare_domain, prepare_layout
from ..labels import LABEL_SPACES


def run(args: Namespace) -> int:
    if args.name in ROLES:
        return _run_role(args)
    if args.root is None:
        raise ValueError(f"--root is missing: give the folder of the unpacked download of {args.name}.")
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


def _run_role(args: Namespace) -> int:
    given = {"--root": args.root, "--size": args.size, "--splits": args.splits, "--unlabelled": args.unlabelled}
    if wrong := [flag for flag, value in given.items() if value]:
        raise ValueError(f"{', '.join(wrong)} is for a download; of the {args.name} of a config the config says it.")
    classes, labelled = args.cfg.classes, args.name == "source"
    count = prepare_domain(
        only(getattr(args.cfg, args.name), f"t2sda prepare takes one {args.name}"),
        classes,
        args.output,
        labelled=labelled,
        encoding=args.encoding,
        num_processes=args.processes,
    )
    print(f"{args.output}: {count} images")
    names = f", class_names: [{', '.join(classes)}]" if labelled else ""
    print(f"In a config: {args.name}: {{path: {args.output}{names}}}")
    return 0
