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

from argparse import Namespace
from pathlib import Path

import numpy as np

from ..config import RunConfig
from ..data.checking import DomainFacts, Finding, compare, inspect_domain
from ..data.domains import Domain, load_domain
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
    configs = {role: config for role in read if (config := getattr(cfg, role)).path}
    if not configs:
        raise ValueError(
            "there is nothing to check: give --config with a file or a recipe, or a path such as --source.path FOLDER."
        )
    refuse_foreign("check", [output], [path for one in configs.values() for path in (one.path, one.label_path)])
    domains: dict[str, tuple[Domain, DomainFacts]] = {}
    for role, config in configs.items():
        learned = role == cfg.labels_from
        domain = load_domain(cfg.labelled if learned else config, cfg.classes, labelled=role in labelled)
        domains[role] = domain, inspect_domain(domain, cfg.classes, processes)
    facts = {role: fact for role, (_, fact) in domains.items()}
    findings = [finding for fact in facts.values() for finding in fact.findings] + compare(facts, cfg.classes)
    said: list[str] = []
    # A run cannot start with faults in its data: what it makes of the images is said of those without one.
    sizes = {role: np.array([fact.shapes[row] for row in fact.readable]) for role, fact in facts.items()}
    if cfg.labels_from in facts and all(len(sizes[role]) for role in sizes if role != "test"):
        learned_from = facts[cfg.labels_from]
        counts = learned_from.counts[learned_from.readable]
        try:
            derived = derive(cfg, Facts(counts, sizes[cfg.labels_from], sizes.get("target")))
        except ValueError as error:
            findings.append(Finding("the config", "values that do not fit", "fault", 1, str(error)))
        else:
            cfg, said = derived.cfg, derived.said
            findings += [Finding("the config", "values that spoil it", "note", 1, text) for text in derived.warnings]
    with outputs("check", output):
        write_report(output, domains, findings, cfg.classes, cfg.rcs.temperature or 0.01, pictures, said)
    return findings, said
