"""Look into models as the paper does: figures, each with a CSV of its numbers beside it.

python scripts/analyze.py source-only=outputs/demo/source_only/student T2S-DA=outputs/demo/t2sda/student \
    --domain streets-target --source streets-source --output outputs/demo/analysis

similarity.png  per class: similarity of source and target features, and IoU on the target (Fig. 1)
relation.png    the same as points, with Pearson and Spearman correlation
distances.png   CCD and PDD per class on the target, lower is better (equations 19 and 20, Fig. 7)
tsne_*.png      features of 256 pixels per class and domain in a plane (Fig. 8)
pictures.png    images, truth, predictions, errors of the last model (Fig. 9-11)

--no_labels is for a domain that has none: proxies.csv, class shares, pictures. Needs pip install "t2sda_hf[analysis]"
"""

import argparse
import csv
import re
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from scipy.stats import pearsonr, spearmanr

from t2sda_hf.analysis.distances import (
    Centres,
    centres,
    class_center_distance,
    cross_domain_similarity,
    pixel_discrimination_distance,
)
from t2sda_hf.analysis.embedding import embed, sample_pixels
from t2sda_hf.analysis.features import KINDS, labelled_features
from t2sda_hf.analysis.plots import save_bars, save_relation, save_scatter
from t2sda_hf.analysis.unlabelled import measure
from t2sda_hf.config import DomainConfig
from t2sda_hf.data.domains import Domain, load_domain
from t2sda_hf.evaluation.evaluator import Part, evaluate_model, evenly_spread, readable_part
from t2sda_hf.evaluation.inference import load_model, predict_labels, saved_image_size, to_pixel_values
from t2sda_hf.evaluation.models import titled
from t2sda_hf.evaluation.pictures import Column, save_grid
from t2sda_hf.evaluation.report import save_panel
from t2sda_hf.labels import LABEL_SPACES
from t2sda_hf.masking import run_masked

PARTS = ("similarity", "distances", "tsne", "pictures")


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", metavar="[TITLE=]MODEL", help="model folders or Hub ids, of equal classes")
    parser.add_argument("--domain", required=True, help="the target: name, parquet file, folder or data set")
    parser.add_argument("--split", default="validation")
    parser.add_argument("--label_space", default="cityscapes", help=f"what ids mean: {', '.join(LABEL_SPACES)}")
    parser.add_argument("--class_names", nargs="+", default=[], help="or the names themselves, in the order of the ids")
    parser.add_argument("--no_labels", action="store_true", help="--domain has no labels")
    parser.add_argument("--source", help="the source, for similarity and t-SNE")
    parser.add_argument("--source_split", default="train")
    parser.add_argument("--source_label_space", default="cityscapes")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--feature", choices=KINDS, default="head", help="which map of the model")
    parser.add_argument("--limit", type=int, default=500, help="at most so many images of each domain")
    parser.add_argument("--per_class", type=int, default=256, help="pixels per class and domain for t-SNE")
    parser.add_argument("--threshold", type=float, default=0.968, help="confidence for the coverage, with --no_labels")
    parser.add_argument("--num_pictures", type=int, default=4)
    parser.add_argument("--output", type=Path, default=Path("outputs/analysis"))
    return parser.parse_args(arguments)


def run(args: argparse.Namespace) -> None:
    models, sizes, classes = {}, {}, None
    for given in args.models:
        title, name = titled(given)
        model, names = load_model(name)
        if classes is not None and names != classes:
            raise ValueError(f"the models have different classes: {', '.join(classes)}; {title}: {', '.join(names)}.")
        models[title], sizes[title], classes = model, saved_image_size(name), names
    target = DomainConfig(
        path=args.domain, split=args.split, label_space=args.label_space, class_names=tuple(args.class_names)
    )
    args.output.mkdir(parents=True, exist_ok=True)
    if args.no_labels:
        without_labels(args, models, sizes, classes, load_domain(target, classes, labelled=False))
        return
    try:
        domain = load_domain(target, classes)
    except ValueError as error:
        advice = " To look at a domain that has no labels: --no_labels." if "has no column" in str(error) else ""
        raise ValueError(f"{error}{advice}") from error
    first = range(min(args.limit, len(domain)))
    with_labels(args, models, sizes, classes, readable(Part(domain, first, domain.name)))


def readable(images: Part) -> Part:
    """Leave out what cannot be read, and list and count it."""
    part, unreadable = readable_part(images)
    if unreadable:
        print(f"{len(unreadable)} of {len(images)} images of {images.name} could not be read:", file=sys.stderr)
        print("\n".join(unreadable), file=sys.stderr)
    return part


def with_labels(args: argparse.Namespace, models: dict, sizes: dict, classes: tuple[str, ...], domain: Part) -> None:
    source = None
    if args.source:
        config = DomainConfig(path=args.source, split=args.source_split, label_space=args.source_label_space)
        whole = load_domain(config, classes)
        chosen = np.random.default_rng(0).permutation(len(whole))[: args.limit].tolist()  # method 6.4: seed 0
        source = readable(Part(whole, sorted(chosen), whole.name))
    parts = [part for part in args.parts if source is not None or part not in ("similarity", "tsne")]
    of_target: dict[str, Centres] = {}
    similarity, iou, ccd, pdd = {}, {}, {}, {}

    def stream(title: str, of: Part):
        return labelled_features(models[title], of, sizes[title], args.feature)

    for title, model in models.items():
        if {"similarity", "distances"} & set(parts):
            of_target[title] = centres(stream(title, domain), len(classes))
        if "distances" in parts:
            ccd[title] = class_center_distance(of_target[title])
            pdd[title] = pixel_discrimination_distance(stream(title, domain), of_target[title])
        if "similarity" in parts:
            similarity[title] = cross_domain_similarity(centres(stream(title, source), len(classes)), of_target[title])
            scores = evaluate_model(model, domain, image_size=sizes[title], classes=classes)["iou"]
            iou[title] = np.array([np.nan if scores[name] is None else scores[name] for name in classes])
        if "tsne" in parts:
            samples = [sample_pixels(stream(title, of), len(classes), args.per_class) for of in (source, domain)]
            planes = dict(zip(("source", "target"), zip(embed(samples), samples, strict=True), strict=True))
            save_scatter(args.output / f"tsne_{_file_name(title)}.png", planes, classes)
    if ccd:
        save_bars(args.output / "distances.png", {"CCD": ccd, "PDD": pdd}, classes, f"{domain.name}: lower is better")
        for title in models:
            print(f"{title}: mean CCD {np.nanmean(ccd[title]):.3f}, mean PDD {np.nanmean(pdd[title]):.3f}")
    if similarity:
        panels = {"similarity to the source": similarity, "IoU, %": iou}
        save_bars(args.output / "similarity.png", panels, classes, domain.name)
        save_relation(args.output / "relation.png", _correlated(similarity, iou), classes)
    if "pictures" in parts:
        same = set(sizes.values())
        if len(same) > 1:
            raise ValueError(f"pictures need models of one input size, got {sizes}. Leave out --parts pictures.")
        save_panel(args.output / "pictures.png", domain, models, same.pop(), classes, args.num_pictures)
    print(f"Figures and their CSV files in {args.output}")


def without_labels(
    args: argparse.Namespace, models: dict, sizes: dict, classes: tuple[str, ...], domain: Domain
) -> None:
    both = {title: (model, sizes[title]) for title, model in models.items()}
    proxies, shares, unreadable = measure(both, domain, len(classes), args.threshold, args.limit)
    with (args.output / "proxies.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["model", "proxy", "value"])
        for title, values in proxies.items():
            writer.writerows([title, name, value] for name, value in values.items())
            print(f"{title}: " + ", ".join(f"{name} {value:.3f}" for name, value in values.items()))
    shown = {title: 100 * values for title, values in shares.items()}
    save_bars(args.output / "classes.png", {"% of pixels": shown}, classes, f"{domain.name}: predicted classes")
    some = evenly_spread(domain, args.num_pictures)
    images = [some.image(index) for index in range(len(some))]
    columns = [Column("image", images)]
    for title, (model, size) in both.items():
        inputs = [to_pixel_values(image, size, next(model.parameters()).device) for image in images]
        said = [predict_labels(model, x, image.shape[:2])[0].numpy() for x, image in zip(inputs, images, strict=True)]
        columns.append(Column(title, said, "classes"))
    save_grid(args.output / "pictures.png", columns, classes)
    if unreadable:
        print(f"{len(unreadable)} images could not be read:\n" + "\n".join(unreadable), file=sys.stderr)
    print(f"Proxies, class shares and pictures in {args.output}. Without labels there is no score.")


def _correlated(similarity: dict, iou: dict) -> dict:
    """Titles with both correlations over the classes that have both numbers."""
    found = {}
    for title, values in similarity.items():
        known = np.isfinite(values) & np.isfinite(iou[title])
        text = f"{title}: too few classes to correlate"
        if known.sum() > 2:
            pair = values[known], iou[title][known]
            text = f"{title}: Pearson {pearsonr(*pair)[0]:.2f}, Spearman {spearmanr(*pair)[0]:.2f}"
        print(text)
        found[text] = values, iou[title]
    return found


def _file_name(title: str) -> str:
    return re.sub(r"[^\w.-]+", "_", title).strip("_")


def main(arguments: Sequence[str] | None = None) -> int:
    try:
        run(parse_arguments(arguments))
    except ValueError as error:
        print(f"ValueError: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(run_masked(main))
