"""Find what is wrong with the data of a run before the run does: python scripts/check_domain.py --config FILE.yaml

python scripts/check_domain.py --config configs/camvid/t2sda.yaml --output outputs/check
python scripts/check_domain.py --source.path photos --source.label_path masks --source.label_space camvid

Reads every file of source, target and test, as far as they have a path; every key of a config can be given. Writes
index.html and a sheet of pictures per domain. Exit code 0: no fault; 1: faults; 2: there is nothing to check.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from t2sda_hf.config import load_config
from t2sda_hf.data.checking import DomainFacts, Finding, compare, inspect_domain
from t2sda_hf.data.domains import Domain, load_domain
from t2sda_hf.data.sheet import write_report
from t2sda_hf.masking import run_masked


def parse_arguments(arguments: Sequence[str] | None) -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--config", metavar="FILE.yaml")
    parser.add_argument("--output", type=Path, default=Path("outputs/check"), metavar="DIR")
    parser.add_argument("--only", nargs="+", choices=("source", "target", "test"), default=["source", "target", "test"])
    parser.add_argument("--pictures", type=int, default=8, help="images on a sheet")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    return parser.parse_known_args(arguments)


def check(args: argparse.Namespace, overrides: Sequence[str]) -> list[Finding]:
    cfg = load_config(args.config, overrides)
    configs = {role: config for role in args.only if (config := getattr(cfg, role)).path}
    if not configs:
        raise ValueError("there is nothing to check: give --config, or a path such as --source.path FOLDER.")
    domains: dict[str, tuple[Domain, DomainFacts]] = {}
    for role, config in configs.items():
        domain = load_domain(config, cfg.classes, labelled=role != "target")
        domains[role] = domain, inspect_domain(domain, cfg.classes, args.processes)
    facts = {role: fact for role, (_, fact) in domains.items()}
    findings = [finding for fact in facts.values() for finding in fact.findings] + compare(facts, cfg.classes)
    write_report(args.output, domains, findings, cfg.classes, cfg.rcs.temperature, args.pictures)
    return findings


def main(arguments: Sequence[str] | None = None) -> int:
    args, overrides = parse_arguments(arguments)
    try:
        findings = check(args, overrides)
    except ValueError as error:
        print(f"ValueError: {error}", file=sys.stderr)
        return 2
    for finding in sorted(findings, key=lambda found: found.severity):
        print(f"{finding.severity}: {finding.kind}, {finding.count}x in {finding.domain}. {finding.example}")
    faults = sum(finding.severity == "fault" for finding in findings)
    print(
        f"{faults} kinds of faults, {len(findings) - faults} notes. Pictures and shares: {args.output / 'index.html'}"
    )
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(run_masked(main))
