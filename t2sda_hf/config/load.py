"""From YAML files, recipes and flags to a `RunConfig`, and back. Whatever is wrong is one sentence."""

import difflib
import json
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, fields, is_dataclass
from functools import cache
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import TypeAdapter, ValidationError

from ..listing import from_home
from .keys import LIMITS, flatten, in_words, shown
from .run import DomainConfig, DomainConfigs, RunConfig, keys, without_place

# The recipes of configs/: beside the package in a checkout, inside it in a wheel.
RECIPES = next(
    folder
    for folder in (Path(__file__).parents[1] / "recipes", Path(__file__).parents[2] / "configs")
    if folder.is_dir()
)
COMMAND_LINE = "the command line"  # in messages, where a value was given
_CODE = "translate.trained.architecture"  # the key that names code
_LARGEST_YAML, _DEEPEST_YAML = 100_000, 32  # values, with every alias written out, and levels
_DOMAINS = ("source", "target", "target_labelled", "test")
_NO_RUNS = ("ablations", "accelerate", "base", "small_data.yaml")  # of RECIPES, what says no whole run
# Keys of earlier releases with the one value that still means what the code does.
GONE: dict[str, float] = {f"{domain}.drawing_seed": 0 for domain in ("source", "target", "test")}
GONE |= {"translate.style.random_share": 0.5, "model.encoder_ln_eps_fix": True}
# Keys that nobody reads -> the switch, and its value, that makes it so. Values that are given still count, as they
# always did; a null does not, which stands for whatever is derived.
_UNREAD: dict[str, tuple[str, Any]] = {
    "feature_distance.": ("loss_weights.feature_distance", 0),
    "hrda.": ("hrda.enabled", False),
    "rcs.": ("rcs.enabled", False),
    "patch_mask.": ("loss_weights.masked_consistency", 0),
    "data.outer_crop_size": ("data.outer_crop", "false"),
}


def load_config(path: str | Path | None = None, overrides: Sequence[str] = (), *, record: bool = False) -> RunConfig:
    """Read a recipe or a YAML file of differences and apply command line overrides (`--optim.lr 1e-4`, `--seed=3`).

    Both use the same keys, nested or dotted, and values in YAML's form (`--data.crop_size "[64, 128]"`). A file may
    name another one to start from (`base: base/demo`), which must not have a base itself.

    Args:
        path: of a YAML file, or the name of a recipe (see `recipe_names`); None is a run of defaults.
        overrides: words of a command line. Later ones win.
        record: the file says how a finished run was made, and nothing of it will be built. Only then may it name code
            that is not this package's: a config that came with somebody's model must not choose what runs here.

    Raises:
        ValueError: for a missing file, an unknown key (naming the nearest known one), a wrong type or a value out
            of range. The message names the key, the rule and the value.
    """
    tree: dict[str, Any] = asdict(RunConfig())  # a section that is given in part keeps the rest of its default
    said_in: dict[str, str] = {}  # key -> where its value was given
    if path is not None:
        for file, content in _with_base(path):
            _merge(tree, content, "", str(file), said_in)
    arguments, given = list(overrides), list[dict[str, Any]]()
    while arguments:
        key, equals, value = arguments.pop(0).partition("=")
        if not key.startswith("--") or not (equals or arguments):
            raise ValueError(
                f"expected --key value on the command line, got {key!r}{'' if equals else ' and no value'}."
            )
        text = value if equals else arguments.pop(0)
        given.append({key[2:]: parse_yaml(text, key)})
    for content in sorted(given, key=_is_no_list):  # a key of a list is that of all its domains, wherever it stands
        _merge(tree, content, "", COMMAND_LINE, said_in)
    try:
        config = _adapter().validate_python(tree)
    except ValidationError as error:
        raise ValueError(_sentence(error.errors()[0], tree, said_in)) from None
    named, given_in = config.translate.trained.architecture, said_in.get(_CODE, COMMAND_LINE)
    if given_in != COMMAND_LINE and named != keys()[_CODE].default and not record:
        raise ValueError(
            f"{_CODE} in {given_in} names code to run, {named!r}, which no file may do. If you trust that class, give "
            f"it as a flag: --{_CODE} {named}"
        )
    return config


def dump_config(config: RunConfig) -> str:
    """The whole resolved run as YAML that `load_config` reads back to an equal RunConfig."""
    return yaml.safe_dump(_plain(asdict(config)))


def differences(one: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Dotted key -> its value in one and in the other config, for all keys whose values are not equal.

    What a difference means for a run is said by `changes(key)`.

    Args:
        one, other: nested or dotted keys, as files hold them or `asdict` makes them. A key that is not there, because
            the file is older, or holds differences only, has its default; one of `GONE` the value it always had.
    """
    defaults, first, second = GONE | _entries(asdict(RunConfig())), _entries(one), _entries(other)
    pairs = {
        key: (first.get(key, usual := defaults.get(without_place(key))), second.get(key, usual))
        for key in sorted(first.keys() | second.keys())
    }
    for prefix, (switch, off) in _UNREAD.items():
        if off in (first.get(switch, defaults[switch]), second.get(switch, defaults[switch])):
            # Where one of the two does not read them, all that can differ is said by the switch.
            pairs = {
                key: pair
                for key, pair in pairs.items()
                if key == switch or not key.startswith(prefix) or (None not in pair and "distance" not in prefix)
            }
    return {key: pair for key, pair in pairs.items() if pair[0] != pair[1]}


def recipe_names() -> list[str]:
    """The names that `load_config` knows: files of configs/ without their ending."""
    found = (path.relative_to(RECIPES) for path in sorted(RECIPES.rglob("*.yaml")))
    return [path.with_suffix("").as_posix() for path in found if path.parts[0] not in _NO_RUNS]


def find_recipe(name: str | Path, folder: str = "", known: Sequence[str] | None = None) -> Path:
    """The file that is meant by a path, or by a name in `folder` of the recipes. A file that exists wins.

    Raises:
        ValueError: if it is neither, naming the nearest of `known` (default: the recipes).
    """
    of_run = False
    for path in (Path(name), RECIPES / folder / f"{name}.yaml"):
        with suppress(OSError):  # a name that is no name of a file
            if path.is_file():
                return path
            of_run = of_run or any(path.glob("*/resolved_config.yaml"))
    known = recipe_names() if known is None else known
    near = difflib.get_close_matches(str(name).removeprefix("configs/").removesuffix(".yaml"), known, 1, 0.5)
    beside: list[str] = []
    with suppress(OSError, ValueError):
        beside = [str(path) for path in (Path(name).with_suffix(end) for end in (".yaml", ".yml")) if path.is_file()]
    hint = f" Did you mean {(beside or near)[0]!r}?" if beside or near else ""
    if of_run:
        raise ValueError(
            f"{str(name)!r} is the folder of a run, and no config. Give METHOD/resolved_config.yaml in it to repeat "
            "the run, or --continue_on to go on with a further target."
        )
    raise ValueError(
        f"config file {str(name)!r} does not exist. Give the path of a YAML file, or a name: {', '.join(known)}.{hint}"
    )


def plain_name(config: str) -> str:
    """What a folder for runs of a config is called: like the file, or like the recipe with _ for /."""
    return Path(config).stem if Path(config).suffix else config.replace("/", "_")


@cache
def _adapter() -> TypeAdapter[RunConfig]:
    return TypeAdapter(RunConfig)


def json_schema() -> dict[str, Any]:
    """What an editor needs to complete and check a YAML file of a run. Keys may be nested, or dotted at the top."""
    schema = _adapter().json_schema()
    schema = json.loads(json.dumps(schema))  # tuples as lists
    for section in (schema, *schema["$defs"].values()):
        for found in section["properties"].values():
            _limit_items(found)
    schema["properties"] = {"base": {"type": "string", "description": "recipe or file to start from"}} | schema[
        "properties"
    ]
    schema["patternProperties"] = {rf"^{section}\.": {} for section in schema["properties"]}
    return schema


def _limit_items(found: dict[str, Any]) -> None:
    """Put the range of a list where JSON schema looks for it: at its items."""
    lists = [kind for kind in (found, *found.get("anyOf", ())) if kind.get("type") == "array"]
    limits = {name: found[name] for name in LIMITS if lists and name in found}
    for one in lists:
        for items in (*one.get("prefixItems", ()), *([one["items"]] if "items" in one else [])):
            items |= limits
    for name in limits:
        del found[name]


def _plain(value: Any) -> Any:
    """What YAML writes without tags: tuples as lists."""
    if isinstance(value, Mapping):
        return {name: _plain(part) for name, part in value.items()}
    return [_plain(part) for part in value] if isinstance(value, list | tuple) else value


def _entries(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Dotted keys of a config. A mapping (label_map) is there by its entries alone, so an empty one is not."""
    entries = {key: value for key, value in flatten(_plain(tree)).items() if value != {}}
    unsaid = {key: "cityscapes" for key, value in entries.items() if key.endswith(".label_space") and not value}
    return entries | unsaid  # which it means where it is not refused


def _with_base(path: str | Path) -> list[tuple[Path, dict[str, Any]]]:
    """The content of a file, after that of its base if it names one."""
    file = find_recipe(path)
    content = read_yaml(file)
    base = content.pop("base", None)
    if base is None:
        return [(file, content)]
    if not isinstance(base, str):
        raise ValueError(f"base in {file} must be text, the name of a recipe or a path, got {shown(base)}.")
    beside = file.parent / from_home(base)
    try:
        below = find_recipe(beside if beside.is_file() else base)
    except ValueError as error:
        raise ValueError(f"base in {file}: {error}") from None
    inherited = read_yaml(below)
    if "base" in inherited:
        raise ValueError(
            f"base in {file} is {base!r}, which has a base itself. Name {inherited['base']!r}, or copy it."
        )
    return [(below, inherited), (file, content)]


def read_yaml(path: Path) -> dict[str, Any]:
    """The keys and values of a YAML file; {} of an empty one.

    Raises:
        ValueError: naming the file, if it cannot be read, or is something else.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not a text in UTF-8: {error}.") from error
    content = parse_yaml(text, str(path))
    if content is not None and not isinstance(content, dict):
        raise ValueError(f"{path} must map keys to values, got a {type(content).__name__}.")
    return content or {}


class _Refused(yaml.MarkedYAMLError):
    """YAML allows it, and nobody means it."""

    def __init__(self, problem: str, mark: Any) -> None:
        super().__init__(problem=problem, problem_mark=mark)


class _Loader(yaml.SafeLoader):
    """Safe YAML without what is read otherwise than it looks, and of a size that cannot grow by aliases."""

    anchors: dict[str, yaml.Node]

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._count = self._depth = 0
        self._sizes: dict[int, int] = {}  # of each node, with its aliases written out

    def compose_node(self, parent: Any, index: Any) -> Any:
        event, before = self.peek_event(), self._count
        if isinstance(event, yaml.AliasEvent):
            meant = self.anchors.get(event.anchor)
            if isinstance(meant, yaml.CollectionNode) and meant.end_mark is None:  # it is still being read
                raise _Refused(f"*{event.anchor} stands inside of what &{event.anchor} names", event.start_mark)
            self._count += self._sizes.get(id(meant), 0)
        self._count, self._depth = self._count + 1, self._depth + 1
        if self._count > _LARGEST_YAML or self._depth > _DEEPEST_YAML:
            raise _Refused(
                f"more than {_LARGEST_YAML} values, or than {_DEEPEST_YAML} levels, is no config", event.start_mark
            )
        node = super().compose_node(parent, index)
        self._depth -= 1
        self._sizes[id(node)] = self._count - before
        return node

    def compose_mapping_node(self, anchor: Any) -> Any:
        node = super().compose_mapping_node(anchor)
        known: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in known:
                    raise _Refused(f"{key.value!r} is given twice. Keep one", key.start_mark)
                known.add(key.value)
        return node


def _number_as_it_looks(loader: _Loader, node: yaml.ScalarNode) -> Any:
    """A number; ValueError where YAML 1.1 reads another one than people do: 010 is octal, 1:30 counts by sixty."""
    make = loader.construct_yaml_int if node.tag.endswith(":int") else loader.construct_yaml_float
    digits = node.value.lstrip("+-").replace("_", "")
    if len(digits) > 40:
        raise _Refused(f"{digits[:10]}... is too long for a number", node.start_mark)
    value: Any = make(node)
    if ":" in digits or (re.match("0[0-9]", digits) and node.tag.endswith(":int")):
        advice = f'Write the number that you mean plainly, or "{node.value}" for a text'
        raise _Refused(f"{node.value} is {value} to YAML. {advice}", node.start_mark)
    return value


for _tag in ("int", "float"):
    _Loader.add_constructor(f"tag:yaml.org,2002:{_tag}", _number_as_it_looks)


def _no_set(loader: _Loader, node: yaml.Node) -> Any:
    raise _Refused("a !!set has no order, and the order of a list counts here. Write a list", node.start_mark)


_Loader.add_constructor("tag:yaml.org,2002:set", _no_set)
# Dates stay texts: no key takes one, but a class or a folder may be called like one.
_Loader.yaml_implicit_resolvers = {
    first: [pair for pair in pairs if pair[0] != "tag:yaml.org,2002:timestamp"]
    for first, pairs in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


def parse_yaml(text: str, where: str) -> Any:
    """A text as YAML. Raises ValueError naming `where` it stands."""
    try:
        return yaml.load(text, _Loader)
    except yaml.MarkedYAMLError as error:
        line = f", line {error.problem_mark.line + 1}" if error.problem_mark and not where.startswith("--") else ""
        what = "" if isinstance(error, _Refused) else " is not valid YAML"
        raise ValueError(f"{where}{line}{what}: {error.problem}.") from error
    except (yaml.YAMLError, ValueError) as error:  # a byte that no text has; `!!int abc`
        raise ValueError(f"{where} is not valid YAML: {error}") from error


def _merge(tree: dict[str, Any], values: Mapping[str, Any], prefix: str, where: str, said_in: dict[str, str]) -> None:
    """Put `values` (nested or dotted keys) into the nested `tree`, refusing what RunConfig does not have."""
    for name, value in values.items():
        key = f"{prefix}{name}"
        if key in GONE:
            if value != GONE[key]:
                raise ValueError(
                    f"{key} in {where} is no key any more: it is always {GONE[key]!r}, got {shown(value)}."
                )
            continue
        kind: Any = RunConfig
        node = tree
        *sections, leaf = key.split(".")
        for position, part in enumerate([*sections, leaf]):
            types = {item.name: item.type for item in fields(kind)} if is_dataclass(kind) else {}
            if part not in types:
                while isinstance(value, dict) and value and key.count(".") < 4:  # "traget: {path: x}": traget.path
                    inner, value = next(iter(value.items()))
                    key += f".{inner}"
                raise ValueError(unknown_key(key, where))
            kind = DomainConfig if types[part] == DomainConfigs else types[part]
            if position < len(sections):
                node = node[part]
        if kind is DomainConfig and types[part] == DomainConfigs and isinstance(value, list):
            node[leaf], said_in[leaf] = _listed(leaf, value, where), where
        elif is_dataclass(kind):
            if not isinstance(value, dict):
                inside = ", ".join(known for known in keys() if known.startswith(f"{key}."))
                raise ValueError(
                    f"{key} in {where} is a section, got the value {shown(value)}. Set one of its keys: {inside}."
                )
            _merge(tree, value, f"{key}.", where, said_in)
        else:
            if isinstance(node, list) and leaf == "path":
                raise ValueError(
                    f"{sections[0]} is a list of {len(node)} domains, and {key} in {where} does not say of which it is "
                    f"the path. Give all of them: --{sections[0]} '[{{path: ...}}, {{path: ...}}]'; a list of one is a "
                    "single domain."
                )
            if said_in.get(key) == where != COMMAND_LINE:  # once nested and once dotted
                raise ValueError(f"{key} is given twice in {where}. Keep one.")
            if isinstance(value, bool) and str(value).lower() in get_args(kind):
                value = str(value).lower()  # a choice between the words "true" and "false" and others
            said_in[key] = where
            for one in node if isinstance(node, list) else [node]:  # a key of a list is that of all its domains
                one[leaf] = from_home(value) if isinstance(value, str) else value


def _is_no_list(given: Mapping[str, Any]) -> bool:
    """False for a list of domains."""
    return not any(key in _DOMAINS and isinstance(value, list) for key, value in given.items())


def _listed(role: str, entries: Sequence[Any], where: str) -> Any:
    """The domains of a list, each with the defaults of its role; of a list of one that one, of none the default."""
    usual = asdict(RunConfig())[role]
    read = []
    for place, entry in enumerate(entries, 1):
        named = f"{role} {place} of {len(entries)}"
        if not isinstance(entry, dict):
            raise ValueError(f"{named} in {where} must be a mapping of the keys of a domain, got {shown(entry)}.")
        tree = {role: dict(usual)}
        _merge(tree, entry, f"{role}.", f"{where}, {named}", {})
        read.append(tree[role])
    return read if len(read) > 1 else read[0] if read else usual


def _sentence(error: Mapping[str, Any], tree: Mapping[str, Any], said_in: Mapping[str, str]) -> str:
    """One sentence for what pydantic found first."""
    role, *rest = error["loc"] or ("",)
    value: Any = tree
    which = ""  # of a list of domains
    kind = rest.pop(0) if role in _DOMAINS and rest and rest[0] in ("one", "several") else ""  # of `DomainConfigs`
    if kind == "several":
        number = int(rest.pop(0))
        which = f"{role} {number + 1} of {len(tree[role])} ({tree[role][number]['path']})"
        value = {role: tree[role][number]}
    place = ".".join(map(str, (role, *rest)))
    if error["type"] == "value_error":  # of a `check`, whose text is ours; a domain does not know which one it is
        named = str(error["ctx"]["error"])
        return f"{which}: {named}" if which else f"{place}.{named}" if place in _DOMAINS else named
    key = max((known for known in keys() if f"{place}.".startswith(f"{known}.")), key=len)
    for part in key.split("."):
        value = value[part]
    given_in = said_in.get(key, said_in.get(role, "the defaults"))
    rule = f"{key} in {given_in} must be {in_words(keys()[key].type)}, got {shown(value)}."
    return f"{which}: {rule}" if which else rule


def unknown_key(key: str, where: str) -> str:
    """The sentence for a key that no run has, with the nearest one that it has."""
    known = list(keys())
    leaf = key.rsplit(".", 1)[-1]
    # The right name under the wrong section is nearer than another name that merely looks alike.
    same = [k for k in known if k.rsplit(".", 1)[-1] == leaf]
    near = difflib.get_close_matches(key, same, 1, 0.0) or difflib.get_close_matches(key, known, 1, 0.75)
    if not near:
        near = [k for k in known if difflib.get_close_matches(leaf, [k.rsplit(".", 1)[-1]], 1, 0.7)]
    inside = [k for k in known if k.startswith(f"{key.split('.')[0]}.")]
    if near:
        hint = f"Did you mean {near[0]!r}?"
    elif inside:
        hint = f"Keys there are {', '.join(inside)}."
    else:
        hint = f"Keys and sections are {', '.join(sorted({k.split('.')[0] for k in known}))}."
    return f"unknown key {key!r} in {where}. {hint}"
