"""No token leaves the process in a text: known forms, values beside telling keys, and what the environment holds."""

import logging
import os
import re
import sys
from collections.abc import Callable
from typing import Any

MASK = "<masked>"  # a plain word in YAML and JSON
_TELLING = r"(?:token|secret|password|passwd|api_?key|credential)"
_FORMS = [
    re.compile(r"\b(?:hf_|api_org_|gh[opsur]_|github_pat_|glpat-|sk-|xox[abp]-|AKIA)[A-Za-z0-9_-]{12,}"),
    re.compile(r"(?<=://)[^/\s:@]+:[^/\s@]+(?=@)"),  # user:password in a URL
    re.compile(r"(?<=Bearer )\S{8,}", re.IGNORECASE),
]
_BESIDE_KEY = re.compile(
    rf"(?i)(--[\w.-]*{_TELLING}[\w.-]*\s+|\b[\w.-]*{_TELLING}[\w.-]*['\"]?\s*[=:]\s*['\"]?)(?!null|none|true|false)([^\s'\",&}}]{{5,}})"
)


def mask(text: str) -> str:
    """`text` with everything that looks like a secret, or is one in the environment, replaced."""
    for name, value in os.environ.items():
        if re.search(_TELLING, name, re.IGNORECASE) and len(value) >= 8:
            text = text.replace(value, MASK)
    for form in _FORMS:
        text = form.sub(MASK, text)
    return _BESIDE_KEY.sub(rf"\1{MASK}", text)


class MaskFilter(logging.Filter):
    """For a log handler."""

    def filter(self, record: logging.LogRecord) -> bool:
        record.msg, record.args = mask(record.getMessage()), ()
        return True


class _MaskedStream:
    """A text stream that masks what is written to it."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        self._stream.write(mask(text))
        return len(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def run_masked(main: Callable[[], int]) -> int:
    """`main()`, with a mask over all that the process prints, tracebacks too. The last line of every script."""
    make_record = logging.getLogRecordFactory()

    def masked_record(*args: Any, **kwargs: Any) -> logging.LogRecord:  # some handlers have kept the bare stream
        record = make_record(*args, **kwargs)
        record.msg, record.args = mask(record.getMessage()), ()
        return record

    logging.setLogRecordFactory(masked_record)
    out: Any = _MaskedStream(sys.stdout)
    err: Any = _MaskedStream(sys.stderr)
    sys.stdout, sys.stderr = out, err
    return main()
