"""What a key of the configuration is: its type, its default, its range, what it means, who says so, what it changes."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import Field, dataclass, field, fields, is_dataclass
from types import UnionType
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, TypeVar, Union, get_args, get_origin

from pydantic import BeforeValidator, ConfigDict, Strict

Changes = Literal["learning", "placement", "scoring", "nothing"]
# learning: the weights that come out. placement: where the input lies; its content is compared, not its path. scoring:
# what is measured or kept of the same weights. nothing: how the work is done, logged and stored.


def _number(value: Any) -> Any:
    """6e-5 is a text to YAML 1.1, and a number to everybody else."""
    if isinstance(value, str) and re.fullmatch(r"[-+]?(\d+\.?\d*|\.\d+)(e[-+]?\d+)?", value.lower()):
        return float(value)
    return value


Whole = Annotated[int, Strict()]
Flag = Annotated[bool, Strict()]
Number = Annotated[float, Strict(), BeforeValidator(_number)]
LIMITS = ("minimum", "exclusiveMinimum", "maximum", "exclusiveMaximum")  # the words of JSON schema
_UNIONS = (Union, UnionType)  # Annotated[int] | None is the first, str | None the second
Size = tuple[Whole, Whole]  # (height, width) in pixels
Stages = tuple[Whole, Whole, Whole, Whole]  # of an encoder, finest first

# A key that may be null in a file, and never is where it is read: `training.derive` puts a value in its place.
if TYPE_CHECKING:
    T = TypeVar("T")
    Derived = Annotated[T, "null until it is derived"]
else:

    class Derived:
        def __class_getitem__(cls, kind: Any) -> Any:
            return kind | None


def key(
    default: Any,
    meaning: str,
    source: str = "",
    *,
    changes: Changes = "learning",
    at_least: float | None = None,
    above: float | None = None,
    at_most: float | None = None,
    below: float | None = None,
) -> Any:
    """A field of a section. All that anybody says of the key stands in this call.

    Args:
        default: its value where no file and no flag gives one.
        meaning: plain English, with the unit.
        source: "P" the paper states the value, "D" the public DAFormer code that it builds on, "O A3" a choice that
            the paper leaves open, with its entry in the register of open points; "" is ours.
        changes: what another value changes, see `Changes`.
        at_least, above, at_most, below: the range, of a list that of each item; None is no limit.
    """
    limits = dict(zip(LIMITS, (at_least, above, at_most, below), strict=True))
    extra: dict[str, Any] = {name: limit for name, limit in limits.items() if limit is not None}
    extra |= {"source": source, "changes": changes}
    metadata = {"description": meaning, "json_schema_extra": extra}  # pydantic makes its schema of these
    if isinstance(default, dict):
        return field(default_factory=lambda: dict(default), metadata=metadata)
    return field(default=default, metadata=metadata)


def require(condition: bool, name: str, rule: str, value: object) -> None:
    """Raise the ValueError that every wrong value gets: key, rule, value."""
    if not condition:
        raise ValueError(f"{name} must be {rule}, got {shown(value)}.")


def shown(value: object) -> str:
    """A value as messages show it; of a long one the beginning."""
    text = repr(value)
    return text if len(text) <= 300 else f"{text[:300]}..."


class Section:
    """Base of the dataclasses of a run: each value is held to the range that its `key` gives."""

    section: ClassVar[str] = ""  # prefix of its keys in messages; "" where several sections are of one class
    __pydantic_config__ = ConfigDict(extra="forbid", allow_inf_nan=False)

    def __post_init__(self) -> None:
        prefix = f"{self.section}." if self.section else ""
        for item in fields(self):  # type: ignore[arg-type]
            value, rule = getattr(self, item.name), _range(item)
            if rule and value is not None:
                inside = all(_inside(one, item) for one in (value if isinstance(value, tuple) else [value]))
                require(inside, prefix + item.name, rule, value)
        self.check()

    def check(self) -> None:
        """Raise ValueError for values that are wrong together, or in a way that no range can say."""


def _limits(item: Field) -> dict[str, Any]:
    extra: dict[str, Any] = item.metadata.get("json_schema_extra", {})
    return extra


def _inside(value: float, item: Field) -> bool:
    limits = _limits(item)
    return (
        value >= limits.get("minimum", value)
        and value <= limits.get("maximum", value)
        and ("exclusiveMinimum" not in limits or value > limits["exclusiveMinimum"])
        and ("exclusiveMaximum" not in limits or value < limits["exclusiveMaximum"])
    )


def _range(item: Field) -> str:
    """The range in words; "" without one."""
    words = _in_words(_limits(item))
    kinds = (item.type, *get_args(item.type))
    return f"{words} in every place" if words and any(get_origin(kind) is tuple for kind in kinds) else words


def _in_words(limits: Mapping[str, Any]) -> str:
    low, above = limits.get("minimum"), limits.get("exclusiveMinimum")
    high, below = limits.get("maximum"), limits.get("exclusiveMaximum")
    bottom, top = (low if above is None else above), (high if below is None else below)
    if bottom is not None and top is not None:
        return f"in {'[' if above is None else '('}{bottom}, {top}{']' if below is None else ')'}"
    if above is not None:
        return "positive" if above == 0 else f"above {above}"
    if low is not None:
        return f"at least {low}"
    return "" if top is None else f"at most {top}" if below is None else f"below {below}"


@dataclass(frozen=True)
class Key:
    """One dotted key of a run.

    Attributes:
        name: "pull.temperature".
        type: as annotated in its dataclass.
        default: its value in `RunConfig()`.
        range: in words; "" without one.
        meaning, source, changes: see `key`.
    """

    name: str
    type: Any
    default: Any
    range: str
    meaning: str
    source: str
    changes: Changes

    @property
    def choices(self) -> tuple[str, ...]:
        """The words that it takes; () if it is no choice."""
        return get_args(self.type) if get_origin(self.type) is Literal else ()

    @property
    def list_of(self) -> tuple[Any, int | None] | None:
        """Of a list the type of an item and how many there are, None for any number; None for what may be no list."""
        kinds = get_args(self.type) if get_origin(self.type) in _UNIONS else (self.type,)
        if any(get_origin(kind) is not tuple and kind is not type(None) for kind in kinds):
            return None
        for items in (get_args(kind) for kind in kinds if get_origin(kind) is tuple):
            return items[0], None if items[-1] is Ellipsis else len(items)
        return None


def walk(section: Any, prefix: str = "") -> Iterator[Key]:
    """The keys of a dataclass of sections and of its sections, in the order in which they are written."""
    for item in fields(section):
        name, default = prefix + item.name, getattr(section, item.name)
        if is_dataclass(default):
            yield from walk(default, f"{name}.")
        else:
            extra = _limits(item)
            meaning = item.metadata["description"]
            yield Key(name, item.type, default, _range(item), meaning, extra["source"], extra["changes"])


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as dotted keys. Values that are mappings (label_map) go down to their entries, too, and so do
    lists of mappings, whose places count from 1: source.2.path."""
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        if isinstance(value, list | tuple) and value and all(isinstance(part, Mapping) for part in value):
            value = dict(enumerate(value, 1))
        flat |= (
            flatten(value, f"{prefix}{name}.") if isinstance(value, Mapping) and value else {f"{prefix}{name}": value}
        )
    return flat


def in_words(kind: Any) -> str:
    """A type as a user would say it: "a whole number or null"."""
    origin, inner = get_origin(kind), get_args(kind)
    if origin is Annotated:
        return in_words(inner[0])
    if origin in _UNIONS:
        return " or ".join(in_words(one) for one in inner)
    if origin is Literal:
        return f"one of {', '.join(inner)}"
    if origin is tuple:
        items = "texts" if inner[0] is str else "whole numbers" if inner[0] is Whole else "numbers"
        return f"a list like [a, b] of {items if inner[-1] is Ellipsis else f'{len(inner)} {items}'}"
    if origin is dict:
        return f"a mapping like {{a: b}} of {'texts' if inner[0] is str else 'whole numbers to texts'}"
    words = {str: "text (a number in quotes)", int: "a whole number", float: "a number", bool: "true or false"}
    return words.get(kind, "null")
