"""Find faults in the data of a run before you start the run.

    t2sda check --config camvid/t2sda --output outputs/check
    t2sda check --source.path photos --source.label_path masks --source.label_space camvid

The command reads every file of the source, target and test domains that have a path. It prints what it found, and
writes index.html with a sheet of pictures for each domain.

Exit codes:
    0   there is no fault
    1   there are faults
    2   the input is wrong, or there is nothing to check
"""

import os
from argparse import Namespace
from pathlib import Path

import numpy as np

from ..config import RunConfig, role_of, several, shares_of
from ..data.checking import DomainFacts, Finding, compare, inspect_domain
from ..data.domains import Domain, load_domains
from ..data.rare_class_sampling import joint_shares_of_pixels
from ..data.sheet import write_report
from ..storage import outputs, refuse_foreign
from ..training.derive import Facts, derive


def run(args: Namespace) -> int:
    findings, said = check(args.cfg, args.only, args.output, args.pictures, args.processes)
    for line in said:
        print(f"a run: {line}")
    for finding in sorted(findings, key=lambda found: found.severity):
        print(f"{finding.severity}: {finding.kind}, {finding.count}x in {finding.domain}. {finding.example}")
    faults = sum(finding.severity == "fault" for finding in findings)
    print(
        f"{faults} kinds of faults, {len(findings) - faults} notes. Pictures and shares: {args.output / 'index.html'}"
    )
    return 1 if faults else 0


def check(
    cfg: RunConfig, only: list[str], output: Path, pictures: int, processes: int
) -> tuple[list[Finding], list[str]]:
    """What is wrong with the domains `only` of a run, and what a run makes of them; also as a page in `output`."""
    labelled = ("target_labelled", "test", "" if cfg.method == "source_free" else cfg.labels_from)
    read = [role for role in only if role != "source" or cfg.labels_from == "source"]
    listed = {role: given for role in read if several(given := getattr(cfg, role))[0].path}
    if not listed:
        raise ValueError(
            "there is nothing to check: give --config with a file or a recipe, or a path such as --source.path FOLDER."
        )
    paths = [path for given in listed.values() for one in several(given) for path in (one.path, one.label_path)]
    refuse_foreign("check", [output], paths)
    domains: dict[str, tuple[Domain, DomainFacts]] = {}
    for role, given in listed.items():
        learned = role == cfg.labels_from
        parts = load_domains(role, cfg.labelled if learned else given, cfg.classes, role in labelled).parts
        for place, domain in enumerate(parts, 1):
            title = role if len(parts) == 1 else f"{role} {place}"
            domains[title] = domain, inspect_domain(domain, cfg.classes, processes)
    facts = {title: fact for title, (_, fact) in domains.items()}
    findings = [finding for fact in facts.values() for finding in fact.findings] + compare(facts, cfg.classes)
    said: list[str] = []
    # A run cannot start with faults in its data: what it makes of the images is said of those without one.
    sizes = {title: np.array([fact.shapes[row] for row in fact.readable]) for title, fact in facts.items()}
    counts = {title: fact.counts[fact.readable] for title, fact in facts.items()}

    def of(role: str, found: dict[str, np.ndarray]) -> list[np.ndarray]:
        return [rows for title, rows in found.items() if role_of(title) == role]

    together = None
    if of(cfg.labels_from, sizes) and all(len(sizes[title]) for title in sizes if role_of(title) != "test"):
        learned_from, seen = of(cfg.labels_from, counts), of("target", sizes)
        lengths = [tuple(map(len, parts)) if len(parts) > 1 else () for parts in (learned_from, seen)]
        of_target = np.concatenate(seen) if seen else None
        read_sizes = np.concatenate(of(cfg.labels_from, sizes))
        together = joint_shares_of_pixels(learned_from, shares_of(cfg.labelled)) if lengths[0] else None
        try:
            known = Facts(np.concatenate(learned_from), read_sizes, of_target, None, *lengths)
            derived = derive(cfg, known, cores=len(os.sched_getaffinity(0)))
        except ValueError as error:
            findings.append(Finding("the config", "values that do not fit", "fault", 1, str(error)))
        else:
            cfg, said = derived.cfg, derived.said
            findings += [Finding("the config", "values that spoil it", "note", 1, text) for text in derived.warnings]
    with outputs("check", output):
        write_report(output, domains, findings, cfg.classes, cfg.rcs.temperature or 0.01, pictures, said, together)
    return findings, said
