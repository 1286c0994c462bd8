"""What domains are called where people read of them: on pages, in tables and cards."""

import re
from collections.abc import Mapping
from pathlib import Path, PurePath
from typing import Any

ROLES = ("source", "target", "target_labelled", "test")
# Names of folders and files that say nothing: what is in them, or which part of a data set they are.
_SAY_NOTHING = re.compile(
    r"(images?|imgs?|rgb|labels?|masks?|annotations?|gt\w*|leftimg8bit|data|datasets?|pairs|list|"
    r"index|metadata|train(ing|_?set)?|val(idation)?|test(ing|_?set)?|unlabell?ed|all)(-\d+-of-\d+)?",
    re.IGNORECASE,
)


def said_of_target_labels(config: Mapping[str, Any]) -> str:
    """One sentence about the target images whose labels a run learns; "" if there are none. `config` as a tree."""
    asked, given = config.get("target_labels"), (config.get("target_labelled") or {}).get("path")
    learns = config.get("method") in ("t2sda", "source_only", "distil")
    if not learns or asked == 0 or (asked is None and not given):
        return ""
    number = "All labelled images" if asked is None else f"{asked} of the labelled images"
    return f"{number} of the target were learned with their labels, too."


def domain_names(config: Mapping[str, Any]) -> dict[str, str]:
    """Role -> name of its domain, or names of its domains, joined by " + ".

    That is the domain's `name`, or else the last folder of its path that says something: "data/game/images" is "game".
    Domains of different paths get different names. "" where there is no path, and no target_labelled without one.

    Args:
        config: of a run, as a tree of mappings.
    """
    listed = {role: domains_of(config, role) for role in ROLES}
    if not listed["target_labelled"][0].get("path"):
        del listed["target_labelled"]
    every = {(role, place): domain for role, domains in listed.items() for place, domain in enumerate(domains)}
    paths = {of: str(domain.get("path") or "") for of, domain in every.items()}
    given = {of: str(domain.get("name") or "") for of, domain in every.items()}
    names = {of: given[of] or _short(domain, 0) for of, domain in every.items()}
    for more in (1, 2):
        equal = {
            of
            for of, name in names.items()
            for other, path in paths.items()
            if name and not given[of] and names[other] == name and path != paths[of]
        }
        names |= {of: _short(every[of], more) for of in equal}
    return {role: " + ".join(names[role, place] for place in range(len(of_role))) for role, of_role in listed.items()}


def domains_of(config: Mapping[str, Any], role: str) -> list[Mapping[str, Any]]:
    """The domains of a role in a tree of mappings; [{}] where there is none."""
    given = config.get(role) or {}
    return list(given) if isinstance(given, list | tuple) else [given]


def role_of(title: str) -> str:
    """ "source" of "source", and of "source 2", as the second of a list is called."""
    return title.partition(" ")[0]


def hub_id(domain: Mapping[str, Any]) -> str:
    """The id of the domain's data set on the Hub; "" if it lies elsewhere.

    "data/camvid" may be either. Who knows it, from the record of a run, says so under "on_hub". Otherwise it is a
    folder if there is one of that name here.
    """
    path, known = str(domain.get("path") or ""), domain.get("on_hub")
    elsewhere = domain.get("layout") or domain.get("label_path") or PurePath(path).suffix
    elsewhere = elsewhere or (Path(path).exists() if known is None else not known)
    return path if re.fullmatch(r"[\w.-]+/[\w.-]+", path) and path[0] not in ".~" and not elsewhere else ""


def _short(domain: Mapping[str, Any], more: int) -> str:
    """The last part of its path that says something; 1: with the one before it, 2: with the one behind it."""
    path = str(domain.get("path") or "")
    if hub_id(domain):
        return path
    parts = [part for part in PurePath(path).parts if part not in ("/", ".", "..", "~")]
    if parts:
        parts[-1] = PurePath(parts[-1]).stem
    places = [place for place, part in enumerate(parts) if not _SAY_NOTHING.fullmatch(part)]
    last = places[-1] if places else len(parts) - 1
    return "/".join(parts[max(0, last - (more == 1)) : last + 1 + (more == 2)])
