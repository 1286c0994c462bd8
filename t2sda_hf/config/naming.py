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


def domain_names(config: Mapping[str, Any]) -> dict[str, str]:
    """Role -> name of its domain.

    That is the domain's `name`, or else the last folder of its path that says something: "data/game/images" is "game".
    Domains of different paths get different names. "" where there is no path, and no target_labelled without one.

    Args:
        config: of a run, as a tree of mappings.
    """
    paths, given = {}, {}
    for role in (role for role in ROLES if role != "target_labelled" or (config.get(role) or {}).get("path")):
        domain = config.get(role) or {}
        paths[role], given[role] = str(domain.get("path") or ""), str(domain.get("name") or "")
    names = {role: given[role] or _short(path, 0) for role, path in paths.items()}
    for more in (1, 2):
        equal = {
            role
            for role, name in names.items()
            for other, path in paths.items()
            if name and not given[role] and names[other] == name and path != paths[role]
        }
        names |= {role: _short(paths[role], more) for role in equal}
    return names


def hub_id(domain: Mapping[str, Any]) -> str:
    """The id of the domain's data set on the Hub; "" if it lies elsewhere."""
    path = str(domain.get("path") or "")
    elsewhere = domain.get("layout") or domain.get("label_path") or PurePath(path).suffix or Path(path).exists()
    return path if re.fullmatch(r"[\w.-]+/[\w.-]+", path) and path[0] not in ".~" and not elsewhere else ""


def _short(path: str, more: int) -> str:
    """The last part that says something; 1: with the one before it, 2: with the one behind it."""
    if hub_id({"path": path}):
        return path
    parts = [part for part in PurePath(path).parts if part not in ("/", ".", "..", "~")]
    if parts:
        parts[-1] = PurePath(parts[-1]).stem
    places = [place for place, part in enumerate(parts) if not _SAY_NOTHING.fullmatch(part)]
    last = places[-1] if places else len(parts) - 1
    return "/".join(parts[max(0, last - (more == 1)) : last + 1 + (more == 2)])
