"""No secret leaves the process, in a text or in a file: known forms, values beside telling keys, the environment's own.

Only the standard library is imported here, so that a command can mask what it prints
before any heavy library is loaded.
"""

import errno
import logging
import os
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

MASK = "<masked>"  # a plain word in YAML and JSON
# What keys of services begin with: Hugging Face, GitHub, AWS; GitHub, GitLab, OpenAI, Slack. By what may follow.
_KEYS = {
    "[A-Za-z0-9]": ("hf_", "api_org_", "gh[opsur]_", "AKIA"),
    "[A-Za-z0-9_-]": ("github_pat_", "glpat-", "sk-", "xox[abeprs]-"),
}
# Forms of nothing but secrets, so that they also stop a push: neither names of functions (hf_hub_download) nor the
# random bytes of weights have them. Each begins with plain letters, which makes the search in gigabytes fast.
_FORMS = (
    *(f"{start}(?<![A-Za-z0-9]{start}){letter}{{16,}}" for letter, starts in _KEYS.items() for start in starts),
    r"(?<=://)[\w!-.;-?A-~]+:[\w!-.:-~]+(?=@)",  # user:password in a URL; no blank or / is in them
    r"(?i)(?P<kept>\bBearer\s+)[\w.~+/=-]{8,}",
)
_IN_TEXT = [re.compile(form) for form in _FORMS]
_IN_BYTES = [re.compile(form.encode()) for form in _FORMS]
_TELLING = r"(?:token|secret|password|passwd|api[_-]?key|credential)"
_BESIDE_KEY = re.compile(
    rf"(?i)(--[\w.-]*{_TELLING}[\w.-]*\s+|\b[\w.-]*{_TELLING}[\w.-]*['\"]?\s*[=:]\s*[\[({{]?\s*['\"]?)(?!null|none|true|false)"
    r"((?<=')[^'\n]{5,}(?=')|(?<=\")[^\"\n]{5,}(?=\")|[^\s'\",&}\]]{5,})"
)


def mask(text: str) -> str:
    """`text` with everything that looks like a secret, or is one in the environment, replaced."""
    return _BESIDE_KEY.sub(rf"\1{MASK}", mask_known(text))


def mask_known(text: str) -> str:
    """The same without values beside telling keys: for configs, where `password_sign` may be the name of a class."""
    for value in _of_environment():
        text = text.replace(value, MASK)
    for form in _IN_TEXT:
        text = form.sub(lambda found: (found.groupdict().get("kept") or "") + MASK, text)
    return text


def holds_secret(content: bytes) -> bool:
    """Whether a file must not be published: something in it has the form of a secret, or is one of the environment.

    Values beside telling keys are none here: files of models are full of `"pad_token": "<|endoftext|>"`.
    """
    return any(form.search(content) for form in _IN_BYTES) or any(own.encode() in content for own in _of_environment())


def _of_environment() -> Iterator[str]:
    for name, value in os.environ.items():
        if re.search(_TELLING, name, re.IGNORECASE) and len(value) >= 8:
            yield value


class MaskFilter(logging.Filter):
    """For a log handler."""

    def filter(self, record: logging.LogRecord) -> bool:
        record.msg, record.args = mask(record.getMessage()), ()
        return True


class _MaskedStream:
    """A text stream that masks what is written to it, and never ends a command.

    Where nobody reads any more (`| head`, a closed terminal), and where the disk is full, the rest goes nowhere.

    Attributes:
        lost: why it was not written; None also if there is only no reader.
    """

    def __init__(self, stream: Any) -> None:
        self._stream = stream
        self.lost: OSError | None = None
        if hasattr(stream, "reconfigure"):  # no name of a class is worth a run
            stream.reconfigure(errors="backslashreplace")

    def write(self, text: str) -> int:
        try:
            self._stream.write(mask(text))
        except OSError as error:
            self._leave(error)
        return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError as error:
            self._leave(error)

    def _leave(self, error: OSError) -> None:
        if error.errno not in (errno.EPIPE, errno.EIO, errno.EBADF):
            self.lost = error
        with suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), self._stream.fileno())

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def run_masked(main: Callable[[], int]) -> int:
    """`main()`, with a mask over all that the process prints, tracebacks too. Every door goes through it."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by whoever started the process
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115 (as long as the process)
    make_record = logging.getLogRecordFactory()

    def masked_record(*args: Any, **kwargs: Any) -> logging.LogRecord:  # some handlers have kept the bare stream
        record = make_record(*args, **kwargs)
        record.msg, record.args = mask(record.getMessage()), ()
        return record

    logging.setLogRecordFactory(masked_record)
    out: Any = _MaskedStream(sys.stdout)
    err: Any = _MaskedStream(sys.stderr)
    sys.stdout, sys.stderr = out, err
    code = main()
    out.flush()
    if out.lost is not None:
        print(f"OSError: what the command prints could not be written: {out.lost}", file=sys.stderr)
    return code or int(out.lost is not None)
