"""Look into models as the paper does. Each chart has a CSV file with its numbers beside it.

    t2sda analyze source-only=outputs/run/source_only/student T2S-DA=outputs/run/t2sda/student --config mine.yaml
    t2sda analyze outputs/demo/t2sda/student --domain streets-target --source streets-source --output outputs/analysis
    t2sda analyze outputs/run/t2sda/student --domain photos --no_labels

The command writes these files:

similarity.png  for each class: the similarity of its source and target features, and its IoU on the target (Fig. 1)
relation.png    the same numbers as points, with their Pearson and Spearman correlation
distances.png   CCD and PDD of each class on the target (equations 19 and 20, Fig. 7); lower is better for both
tsne_*.png      features of 256 pixels per class and domain, placed in a plane by t-SNE (Fig. 8)
pictures.png    images, true labels, predictions, and the errors of the last model (Fig. 9-11)

CCD (class center distance) is the spread of the features of a class, relative to the distance to the other classes.
PDD (pixel discrimination distance) compares each pixel with the centre of its own class and with the other centres.

The target is the test domain of the config, and the source is its source domain. Both are read as in training.
--domain and --source replace their paths. Without a source there are no similarity and no t-SNE.

If the domain has no labels, use --no_labels. Then the command writes pictures, the share of each predicted class, and
proxies.csv. A proxy is a number that needs no labels and may tell good models from bad ones.

The command needs pip install "t2sda_hf[analysis]".
"""

import csv
import re
import sys
from argparse import Namespace
from collections.abc import Iterator, Mapping
from dataclasses import replace

import numpy as np
from scipy.stats import pearsonr, spearmanr
from torch import Tensor

from ..analysis.distances import (
    Centres,
    centres,
    class_center_distance,
    cross_domain_similarity,
    pixel_discrimination_distance,
)
from ..analysis.embedding import embed, sample_pixels
from ..analysis.features import labelled_features
from ..analysis.plots import save_bars, save_relation, save_scatter
from ..analysis.unlabelled import measure
from ..config import DomainConfig, only
from ..data.domains import Domain, load_domain
from ..data.transforms import InputSize
from ..evaluation.evaluator import Part, evaluate_model, evenly_spread
from ..evaluation.inference import load_model, predict_labels, saved_image_size, to_pixel_values
from ..evaluation.models import model_of, titled
from ..evaluation.pictures import Column, save_grid
from ..evaluation.report import save_panel
from ..models import T2SDAForSemanticSegmentation
from ..storage import outputs, refuse_foreign
from .domains import open_labelled, readable, test_domain

Models = dict[str, T2SDAForSemanticSegmentation]
Sizes = dict[str, InputSize]


def run(args: Namespace) -> int:
    target = test_domain(args)
    refuse_foreign("analyze", [args.output], [target.path, target.label_path, args.source or source_of(args).path])
    models: Models = {}
    sizes: Sizes = {}
    classes: tuple[str, ...] = ()
    for given in args.models:
        title, name = titled(given)
        name = model_of(name)
        model, names = load_model(name)
        if classes and names != classes:
            raise ValueError(f"the models have different classes: {', '.join(classes)}; {title}: {', '.join(names)}.")
        models[title], sizes[title], classes = model, saved_image_size(name), names
    if args.no_labels:
        images = load_domain(target, classes, labelled=False)
        with outputs("analyze", args.output):
            args.output.mkdir(exist_ok=True)
            without_labels(args, models, sizes, classes, images)
        return 0
    domain = open_labelled(target, classes, "To look at a domain that has no labels: --no_labels.")
    part = readable(Part(domain, range(len(domain))[: args.limit], domain.name))
    with outputs("analyze", args.output):
        args.output.mkdir(exist_ok=True)
        with_labels(args, models, sizes, classes, part)
    return 0


def source_of(args: Namespace) -> DomainConfig:
    return only(args.cfg.source, "t2sda analyze compares with one source")


def with_labels(args: Namespace, models: Models, sizes: Sizes, classes: tuple[str, ...], domain: Part) -> None:
    given = source_of(args)
    source = None
    if args.source or given.path:
        whole = load_domain(replace(given, path=args.source or given.path), classes)
        chosen = np.random.default_rng(0).permutation(len(whole))[: args.limit].tolist()  # method 6.4: seed 0
        source = readable(Part(whole, sorted(chosen), whole.name))
    parts, of_features = set(args.parts), {"similarity", "distances"} if source else {"distances"}
    of_target: dict[str, Centres] = {}
    similarity: dict[str, np.ndarray] = {}
    iou: dict[str, np.ndarray] = {}
    ccd: dict[str, np.ndarray] = {}
    pdd: dict[str, np.ndarray] = {}

    def stream(title: str, of: Part) -> Iterator[tuple[Tensor, Tensor]]:
        return labelled_features(models[title], of, sizes[title], args.feature)

    for title, model in models.items():
        if of_features & parts:
            of_target[title] = centres(stream(title, domain), len(classes))
        if "distances" in parts:
            ccd[title] = class_center_distance(of_target[title])
            pdd[title] = pixel_discrimination_distance(stream(title, domain), of_target[title])
        if source and "similarity" in parts:
            similarity[title] = cross_domain_similarity(centres(stream(title, source), len(classes)), of_target[title])
            windows = args.cfg.evaluation.windows
            scores = evaluate_model(model, domain, image_size=sizes[title], classes=classes, **windows)["iou"]
            iou[title] = np.array([np.nan if scores[name] is None else scores[name] for name in classes])
        if source and "tsne" in parts:
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
        save_panel(
            args.output / "pictures.png",
            domain,
            models,
            same.pop(),
            classes,
            args.num_pictures,
            **args.cfg.evaluation.windows,
        )
    print(f"Figures and their CSV files in {args.output}")


def without_labels(args: Namespace, models: Models, sizes: Sizes, classes: tuple[str, ...], domain: Domain) -> None:
    both = {title: (model, sizes[title]) for title, model in models.items()}
    windows, sure = args.cfg.evaluation.windows, args.cfg.uda.pseudo_threshold
    proxies, shares, unreadable = measure(both, domain, len(classes), sure, args.limit, **windows)
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
        said = [
            predict_labels(model, x, image.shape[:2], **windows)[0].numpy()
            for x, image in zip(inputs, images, strict=True)
        ]
        columns.append(Column(title, said, "classes"))
    save_grid(args.output / "pictures.png", columns, classes)
    if unreadable:
        print(f"{len(unreadable)} images could not be read:\n" + "\n".join(unreadable), file=sys.stderr)
    print(f"Proxies, class shares and pictures in {args.output}. Without labels there is no score.")


def _correlated(
    similarity: Mapping[str, np.ndarray], iou: Mapping[str, np.ndarray]
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Titles with both correlations over the classes that have both numbers."""
    found = {}
    for title, values in similarity.items():
        known = np.isfinite(values) & np.isfinite(iou[title])
        text = f"{title}: too few classes to correlate"
        if known.sum() > 2:
            pair = values[known], iou[title][known]
            text = f"{title}: Pearson {pearsonr(*pair)[0]:.2f}, Spearman {spearmanr(*pair)[0]:.2f}"
        print(f"{text} (similarity to the source against IoU, over the classes)")
        found[text] = values, iou[title]
    return found


def _file_name(title: str) -> str:
    return re.sub(r"[^\w.-]+", "_", title).strip("_")
