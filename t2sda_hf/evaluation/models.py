"""How models are named on a command line."""

from pathlib import Path


def titled(given: str) -> tuple[str, str]:
    """Title and folder or id of "TITLE=MODEL"; without a title a model is called by its path, which may contain "="."""
    title, equals, name = given.partition("=")
    if not equals or Path(given).exists():
        return given, given
    return title, name
