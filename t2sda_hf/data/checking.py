"""What is wrong with a domain, all of it and not only the first fault, in numbers and words; pictures in the script.

A fault stops a run or spoils it without a word; a note is for the user to judge.
"""

import hashlib
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from multiprocessing import get_context
from typing import Any

import numpy as np
from datasets import disable_progress_bars
from tqdm import tqdm

from ..config import role_of
from ..files import read_header, read_image, read_labels
from ..labels import IGNORE_INDEX
from ..listing import spelled
from .domains import NOT_NAMED, Domain, may_hide_a_class
from .rare_class_sampling import class_probabilities

_MANY_CLASSES = 40  # a photograph in grey values below this would be black to the eye
_NAMED = 5  # files of one kind of fault
_CHUNK = 16  # images per message between processes


@dataclass(frozen=True)
class Finding:
    """One kind of fault in one domain.

    Attributes:
        kind: a few words, the same for every domain.
        severity: "fault" or "note".
        count: images, or classes, it was found in.
        example: the first of them, in full words.
    """

    domain: str
    kind: str
    severity: str
    count: int
    example: str


@dataclass(frozen=True)
class DomainFacts:
    """What `inspect_domain` read.

    Attributes:
        counts: (images, K) int64 pixels per class; zeros for unreadable rows and without labels.
        ignored: share of pixels without a class; NaN without labels.
        shapes: (height, width) of every image, upright; None where it cannot be read.
        hashes: sha256 of the decoded pixels of every image, "" where it cannot be read.
        readable: indices of rows without a fault, for pictures.
    """

    name: str
    num_images: int
    labelled: bool
    counts: np.ndarray
    ignored: float
    shapes: list[tuple[int, int] | None]
    hashes: list[str]
    readable: list[int]
    findings: list[Finding] = field(default_factory=list)

    @property
    def sizes(self) -> dict[tuple[int, int], int]:
        """(height, width) -> how many images."""
        return Counter(shape for shape in self.shapes if shape is not None)


def inspect_domain(domain: Domain, classes: Sequence[str], num_processes: int = 1) -> DomainFacts:
    """Decode every file of a domain and collect what is wrong.

    Args:
        num_processes: more than one are started afresh, so the calling script needs `if __name__ == "__main__"`.
    """
    chunks = [range(first, min(first + _CHUNK, len(domain))) for first in range(0, len(domain), _CHUNK)]
    rows: list[dict[str, Any]] = []
    with tqdm(total=len(domain), unit="image", desc=domain.name) as bar:
        if num_processes == 1 or len(chunks) == 1:
            for chunk in chunks:
                rows += _inspect_rows(domain, chunk, len(classes))
                bar.update(len(chunk))
        else:
            context = get_context("forkserver")  # not forked from here: threads, torch's among them, would be missing
            context.set_forkserver_preload([__name__])  # what takes seconds to import is imported once
            with ProcessPoolExecutor(num_processes, context, _start_worker, (domain, len(classes))) as pool:
                for chunk, part in zip(chunks, pool.map(_inspect_in_worker, chunks), strict=True):
                    rows += part
                    bar.update(len(chunk))
    counts = np.array([row["counts"] for row in rows], dtype=np.int64).reshape(len(rows), len(classes))
    pixels = sum(row["pixels"] for row in rows)
    facts = DomainFacts(
        domain.name,
        len(domain),
        domain.rule is not None,
        counts,
        1 - counts.sum() / pixels if pixels and domain.rule is not None else float("nan"),
        [row["size"] for row in rows],
        [row["hash"] for row in rows],
        [index for index, row in enumerate(rows) if not any(severity == "fault" for _, severity, _ in row["faults"])],
    )
    facts.findings.extend(_grouped(domain.name, rows))
    facts.findings.extend(_as_a_whole(facts, classes, f". {NOT_NAMED}" if may_hide_a_class(domain) else ""))
    for reason, files in domain.ignored.items():
        text = f"{reason}: {', '.join(map(spelled, files[:5]))}{' ...' if len(files) > 5 else ''}"
        facts.findings.append(Finding(domain.name, "files not used", "note", len(files), text))
    return facts


def compare(domains: dict[str, DomainFacts], classes: Sequence[str]) -> list[Finding]:
    """What only shows between domains: the same picture in two of them, classes that one side lacks.

    Args:
        domains: some of "source", "target" and "test", or of several of a role "source 1" and so on.
    """
    findings = []
    roles = list(domains)
    for position, first in enumerate(roles):
        for second in roles[position + 1 :]:
            where = {key: index for index, key in enumerate(domains[first].hashes) if key}
            pairs = [(where[key], index) for index, key in enumerate(domains[second].hashes) if key in where]
            if pairs:
                # Without labels nothing leaks, but scores on images that were adapted to are not those on new ones.
                one, other = pairs[0]
                findings.append(
                    Finding(
                        f"{first} and {second}",
                        "same picture in two domains",
                        "note" if role_of(first) == role_of(second) else "fault",
                        len(pairs),
                        f"image {one} of {domains[first].name} is image {other} of {domains[second].name}",
                    )
                )
    shown: dict[str, np.ndarray] = {}  # classes that any of a role's domains shows
    for title, facts in domains.items():
        if facts.labelled:
            shown[role_of(title)] = shown.get(role_of(title), False) | (facts.counts.sum(axis=0) > 0)
    if len(shown) == 2 and list(shown)[1] == "test":
        learned, (learnt, test) = next(iter(shown)), shown.values()
        for missing, present, side in ((learnt, test, learned), (test, learnt, "test")):
            names = [name for name, here, there in zip(classes, missing, present, strict=True) if there and not here]
            if names:
                findings.append(
                    Finding(
                        f"{learned} and test",
                        f"class missing in {side}",
                        "fault" if side == learned else "note",
                        len(names),
                        f"{', '.join(names)}: {'cannot be learned' if side == learned else 'will not be measured'}",
                    )
                )
    return findings


def rarity(
    facts: DomainFacts, temperature: float, frequencies: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Share of every class among labelled pixels, and how often rare class sampling will draw for it: (K,), (K,).

    `frequencies`: (K,) of all domains that are drawn from, where there are several.
    """
    own = facts.counts.sum(axis=0) / max(facts.counts.sum(), 1)
    if not own.any():
        return own, own
    return own, class_probabilities(own if frequencies is None else np.where(own > 0, frequencies, 0), temperature)


def _grouped(name: str, rows: Sequence[dict[str, Any]]) -> list[Finding]:
    kinds: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        for kind, severity, text in row["faults"]:
            kinds.setdefault((kind, severity), []).append(text)
    found = [
        Finding(name, kind, severity, len(texts), "; ".join(texts[:_NAMED]) + (" ..." if len(texts) > _NAMED else ""))
        for (kind, severity), texts in kinds.items()
    ]
    return sorted(found, key=lambda finding: (finding.severity, -finding.count))


def _as_a_whole(facts: DomainFacts, classes: Sequence[str], advice: str) -> list[Finding]:
    """What no single image shows; `advice` is for pixels without a class where a class is missing."""
    findings = []
    first: dict[str, int] = {}
    again = [
        (first[key], index) for index, key in enumerate(facts.hashes) if key and first.setdefault(key, index) != index
    ]
    if again:
        text = f"image {again[0][1]} is image {again[0][0]} again"
        findings.append(Finding(facts.name, "same picture twice", "note", len(again), text))
    if not facts.labelled or not facts.readable:
        return findings
    totals = facts.counts.sum(axis=0)
    absent = [name for name, total in zip(classes, totals, strict=True) if not total]
    advice = advice if facts.ignored else ""
    if len(absent) >= len(classes) - 1:
        text = (
            f"only {', '.join(set(classes) - set(absent)) or 'ignored pixels'}; check label_space and label_map{advice}"
        )
        findings.append(Finding(facts.name, "fewer than two classes", "fault", len(absent), text))
    elif absent:
        findings.append(Finding(facts.name, "class never shown", "note", len(absent), f"{', '.join(absent)}{advice}"))
    if facts.ignored > 0.5 and len(absent) < len(classes) - 1:
        text = f"{facts.ignored:.0%} of all pixels have no class; check label_space, label_map and the ignore id"
        findings.append(Finding(facts.name, "mostly ignored", "note", facts.num_images, text))
    return findings


_worker: tuple[Domain, int]


def _start_worker(domain: Domain, num_classes: int) -> None:
    global _worker
    disable_progress_bars()
    _worker = (domain, num_classes)


def _inspect_in_worker(chunk: range) -> list[dict[str, Any]]:
    return _inspect_rows(_worker[0], chunk, _worker[1])


def _inspect_rows(domain: Domain, chunk: range, num_classes: int) -> list[dict[str, Any]]:
    return [_inspect(domain, index, num_classes) for index in chunk]


def _inspect(domain: Domain, index: int, num_classes: int) -> dict[str, Any]:
    row = domain.table[index]
    where = domain.where(row, index)
    result: dict[str, Any] = {"counts": [0] * num_classes, "pixels": 0, "size": None, "hash": "", "faults": []}
    faults: list[tuple[str, str, str]] = result["faults"]
    limit = domain.config.max_pixels
    image = labels = None
    orientation = 1
    try:
        orientation = read_header(row["image"], where, limit)[1]
        image = read_image(row["image"], where, limit)
    except ValueError as error:
        faults.append((_kind(str(error), "image"), "fault", str(error)))
    if image is not None:
        result["size"] = image.shape[:2]
        result["hash"] = hashlib.sha256(repr(image.shape).encode() + image.tobytes()).hexdigest()
        grey = (image == image[..., :1]).all()
        if int(image.max()) - int(image.min()) <= 2:
            faults.append(("blank image", "note", f"{where} has one colour everywhere"))
        elif grey and ((image < _MANY_CLASSES) | (image == IGNORE_INDEX)).all():
            text = f"{where} is grey with values below {_MANY_CLASSES}; are the folders swapped?"
            faults.append(("image looks like a label map", "fault", text))
        elif grey:
            faults.append(("grey image", "note", f"{where} has no colours"))
        if min(image.shape[:2]) < 32:
            faults.append(("tiny image", "note", f"{where} has {image.shape[1]}x{image.shape[0]} pixels"))
    if domain.rule is None:
        return result
    try:
        raw = read_labels(row["label"], where, domain.rule, limit)
        if image is not None:
            if orientation != 1:
                text = f"{where}: the photo is turned by EXIF orientation {orientation}, its label map is not"
                faults.append(("EXIF rotation against the label map", "fault", text))
            elif raw.shape != image.shape[:2]:
                text = (
                    f"{where}: image {image.shape[1]}x{image.shape[0]}, label map {raw.shape[1]}x{raw.shape[0]}; "
                    "re-export one of them"
                )
                turned = raw.shape == image.shape[1::-1]
                faults.append(("label map turned" if turned else "size mismatch", "fault", text))
        labels = domain.kept(raw)
    except ValueError as error:
        faults.append((_kind(str(error), "label map"), "fault", str(error)))
    if labels is None:
        return result
    if not any(severity == "fault" for _, severity, _ in faults):
        result["counts"] = np.bincount(labels.ravel(), minlength=IGNORE_INDEX + 1)[:num_classes].tolist()
        result["pixels"] = labels.size
        if (labels == IGNORE_INDEX).all():
            faults.append(("all pixels ignored", "fault", f"{where} shows no class of the run; check label_map"))
        elif labels.size > 1024 and _is_noise(labels):
            faults.append(("label map looks like noise", "fault", f"{where} changes class nearly everywhere; a photo?"))
        elif len(np.unique(labels[labels != IGNORE_INDEX])) == 1 and labels.size > 1024:
            faults.append(("one class only", "note", f"{where} shows a single class"))
    return result


def _kind(message: str, what: str) -> str:
    """The kind of fault that a message of `files` tells; an unknown one keeps a general name."""
    table = {
        "is empty: it has no file": f"{what} missing",
        "empty file of 0 bytes": f"{what} empty",
        "Git LFS pointer": f"{what} is a Git LFS pointer",
        "cannot be read:": f"{what} missing",
        "cannot be read as an image": f"{what} unreadable",
        "cut or damaged": f"{what} cut or damaged",
        "more than 8 bits": "more than 8 bits per channel",
        "half-transparent": "half-transparent label map",
        "far too large": f"{what} too large",
        "more than max_pixels": f"{what} too large",
        "frames": f"animated {what}",
        "Its compression": "lossy compression of a label map",
        "contains the ids": "ids outside the label space",
        "colours without a class": "colours without a class",
        "16-bit colour picture": "16-bit colours as label map",
        "not a map of ids": "coloured label map",
        "crop_box": "crop box outside the image",
    }
    return next((kind for text, kind in table.items() if text in message), f"{what} at fault")


def _is_noise(labels: np.ndarray) -> bool:
    return bool((labels[:, 1:] != labels[:, :-1]).mean() > 0.6)
