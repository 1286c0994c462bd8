"""Score a trained model on a labelled domain: per-class IoU, mIoU and accuracies, in %.

python scripts/evaluate.py outputs/run/student --domain streets-target --output scores.json
accelerate launch scripts/evaluate.py outputs/run/student --domain data/cityscapes.parquet
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from accelerate import Accelerator

from t2sda_hf.config import DomainConfig
from t2sda_hf.data.domains import load_domain
from t2sda_hf.evaluation.evaluator import evaluate_model, format_table
from t2sda_hf.evaluation.inference import load_model, saved_image_size
from t2sda_hf.labels import LABEL_SPACES


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    size = {"type": int, "nargs": 2, "metavar": ("HEIGHT", "WIDTH")}
    parser.add_argument("model", help="folder or Hub id of a T2S-DA model or a SegFormer")
    parser.add_argument("--domain", required=True, help="name of a domain, parquet file, folder or Hub data set")
    parser.add_argument("--split", default="validation")
    parser.add_argument("--label_space", default="cityscapes", help=f"what ids mean: {', '.join(LABEL_SPACES)}")
    parser.add_argument("--class_names", nargs="+", default=[], help="or the names themselves, in the order of the ids")
    parser.add_argument("--limit", type=int, help="only the first so many images")
    parser.add_argument("--mode", choices=("whole", "slide"), default="whole")
    parser.add_argument("--window", **size, help="for --mode slide")
    parser.add_argument("--stride", **size, help="for --mode slide")
    parser.add_argument("--image_size", **size, help="network input; default: what is saved with MODEL")
    parser.add_argument("--output", type=Path, metavar="FILE.json", help="save scores and confusion matrix here")
    return parser.parse_args(arguments)


def run(args: argparse.Namespace) -> None:
    accelerator = Accelerator()
    model, classes = load_model(args.model)
    image_size = tuple(args.image_size) if args.image_size else saved_image_size(args.model)
    domain = load_domain(
        DomainConfig(
            path=args.domain, split=args.split, label_space=args.label_space, class_names=tuple(args.class_names)
        ),
        classes,
    )
    result = evaluate_model(
        # Not wrapped and not trained: this is autocast in forward, if the launcher asked for it, and the device.
        accelerator.prepare_model(model, evaluation_mode=True),
        domain,
        image_size=image_size,
        classes=classes,
        accelerator=accelerator,
        mode=args.mode,
        window=tuple(args.window) if args.window else None,
        stride=tuple(args.stride) if args.stride else None,
        limit=args.limit,
    )
    if accelerator.is_main_process:
        print(f"{result['domain']}, {result['num_images']} images\n\n{format_table({args.model: result})}")
        if args.output:
            settings = {"model": args.model, "image_size": image_size, "mode": args.mode}
            settings |= {"window": args.window, "stride": args.stride}
            args.output.parent.mkdir(parents=True, exist_ok=True)
            args.output.write_text(json.dumps(settings | result, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    accelerator.end_training()


def main(arguments: Sequence[str] | None = None) -> int:
    try:
        run(parse_arguments(arguments))
    except ValueError as error:
        print(f"ValueError: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
