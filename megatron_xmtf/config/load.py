"""Read a run configuration: YAML (safe loader), then dotted overrides, then the schema.

train.yaml               + optimizer.lr=1e-4      -> RunConfig(optimizer=OptimizerConfig(lr=1e-4, ...), ...)
optimizer: {lr: 2e-5}
"""

from __future__ import annotations

import re
import types
import typing
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from megatron_xmtf.config.recipe import config_path, merge_overlay, overlay_path
from megatron_xmtf.config.schema import RunConfig
from megatron_xmtf.config.weight_file import parse_weight_file
from megatron_xmtf.errors import ConfigError, MissingError, nearest_names
from megatron_xmtf.files import atomic_write, require_file

__all__ = [
    "apply_override",
    "config_from_mapping",
    "load_config",
    "load_mixture",
    "load_values",
    "load_yaml",
    "write_config",
]

SHIPPED_MIXTURES = Path(__file__).parent / "mixtures"

MAX_YAML_BYTES = 4 << 20
"""Larger configuration files are refused: none is legitimate, and YAML aliases multiply."""

Model = TypeVar("Model", bound=BaseModel)


class _Loader(yaml.SafeLoader):
    """Safe loader that reads 2e-5 as a number (YAML 1.1 wants 2.0e-5) and refuses duplicate keys and aliases.

    20:00:00 is text, as in YAML 1.2; YAML 1.1 makes 72000 of it, to the base 60.
    """

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            event = self.peek_event()
            raise yaml.composer.ComposerError(None, None, "aliases (*name) are not allowed", event.start_mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str | int | float | bool | None):
                raise yaml.constructor.ConstructorError(None, None, "a key is no plain word", key_node.start_mark)
            if key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key {key!r} appears twice", key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep=deep)

    def construct_number(self, node: Any) -> int | float | str:
        if ":" in node.value:
            return str(node.value)
        is_whole = node.tag == "tag:yaml.org,2002:int"
        return self.construct_yaml_int(node) if is_whole else self.construct_yaml_float(node)


for _tag in ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float"):
    _Loader.add_constructor(_tag, _Loader.construct_number)
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)[eE][-+]?[0-9]+$"),
    list("-+0123456789."),
)


def load_yaml(path: Path | str) -> Any:
    """Read a YAML file with a loader that can only make plain values.

    Raises:  MissingError: no such file. ConfigError: not YAML, a tag, an alias, a duplicate key, over 4 MiB.
    """
    path = require_file(path)
    size = path.stat().st_size
    if size > MAX_YAML_BYTES:
        raise ConfigError(f"{path} has {size} bytes; a configuration may have at most {MAX_YAML_BYTES}.")
    try:
        return yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not UTF-8: byte {error.start} cannot be decoded.") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{path}:{mark.line + 1}:{mark.column + 1}" if mark else str(path)
        raise ConfigError(f"{where} cannot be read as YAML: {getattr(error, 'problem', error)}.") from error
    except RecursionError as error:
        raise ConfigError(f"{path} is nested too deeply to be read.") from error


def load_config(path: Path | str, overrides: Iterable[str] = (), *, overlays: Iterable[Path | str] = ()) -> RunConfig:
    """Read a run configuration, lay overlays over it, and apply `a.b=value` overrides (values are parsed as YAML).

    Args:    path: a YAML file, or the name of a shipped recipe (bloomz-560m). overlays: files, or names of shipped,
             each laid over what is there before it.
    Raises:  MissingError: no such file. ConfigError: unknown key (names the nearest), wrong type, rule broken.
    """
    values = load_values(path, overrides, overlays=overlays)
    data = values.get("data")
    if isinstance(data, dict):
        values["data"] = _expand_mixture(data)
    return config_from_mapping(values, RunConfig, source=str(path))


def load_values(
    path: Path | str, overrides: Iterable[str] = (), *, overlays: Iterable[Path | str] = ()
) -> dict[str, Any]:
    """Read the keys of a configuration as `load_config` does, unchecked: the file may hold some sections alone."""
    values = _load_mapping(config_path(path))
    for overlay in overlays:
        values = merge_overlay(values, _load_mapping(overlay_path(overlay)))
    for override in overrides:
        apply_override(values, override)
    return values


def _load_mapping(path: Path) -> dict[str, Any]:
    values = load_yaml(path)
    if not isinstance(values, dict):
        found = "is empty" if values is None else f"holds a {type(values).__name__}"
        raise ConfigError(f"{path} {found}; a configuration is a mapping of keys.")
    return values


def load_mixture(name: str, *, keep_directories: bool = True) -> dict[str, Any]:
    """Read the keys of a mixture: a YAML file, the name of a shipped one, or a weight file of the reference (.txt).

    Args:    keep_directories: of a weight file's paths; False keeps the last part only.
    Raises:  MissingError: neither a file nor a shipped mixture. ConfigError: not a mixture.
    """
    path = Path(name)
    if not path.is_file():
        shipped = {file.stem: file for file in sorted(SHIPPED_MIXTURES.glob("*.yaml"))}
        if name not in shipped:
            raise MissingError(
                f"data.mixture={name!r} is neither a file nor a shipped mixture ({', '.join(shipped)}); "
                f"{nearest_names(name, shipped)}."
            )
        path = shipped[name]
    if path.suffix == ".txt":
        return {"name": path.stem, "entries": _read_weights(path, keep_directories=keep_directories)}
    values = load_yaml(path)
    if not isinstance(values, dict):
        raise ConfigError(f"{path} holds no mixture; a mixture is a mapping of keys, with `entries` among them.")
    return values


def _expand_mixture(data: dict[str, Any]) -> dict[str, Any]:
    """Replace the names of files in `data.mixture` and `data.validation` by what the files hold."""
    data, root = dict(data), data.get("mixture_root")
    if isinstance(data.get("mixture"), str):
        data["mixture"] = load_mixture(data["mixture"], keep_directories=root is None)
    if isinstance(data.get("mixture"), dict) and root is not None:
        data["mixture"] = {**data["mixture"], "root": root}
    if isinstance(data.get("validation"), str):
        groups = _read_groups(require_file(data["validation"]), keep_directories=root is None)
        data["validation"] = [
            {"prefix": entry["prefix"] if root is None else str(Path(root) / entry["prefix"]), "split": entry["split"]}
            for entries in groups.values()
            for entry in entries
        ]
    return data


def _read_weights(path: Path, *, keep_directories: bool) -> list[dict[str, Any]]:
    """Read the entries of a weight file's only group."""
    groups = _read_groups(path, keep_directories=keep_directories)
    if len(groups) > 1:
        raise ConfigError(f"{path} holds the groups {', '.join(groups)}; a mixture is one: give it a file of its own.")
    return next(iter(groups.values()))


def _read_groups(path: Path, *, keep_directories: bool) -> dict[str, list[dict[str, Any]]]:
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not UTF-8: byte {error.start} cannot be decoded.") from error
    return parse_weight_file(text, source=str(path), keep_directories=keep_directories)


def config_from_mapping(values: Mapping[str, Any], schema: type[Model], *, source: str) -> Model:
    """Validate `values` against `schema`.

    Raises:  ConfigError: every fault of the input in one message, each with key, value and rule.
    """
    try:
        return schema.model_validate(values)
    except ValidationError as error:
        faults = [_word_fault(fault, schema) for fault in _without_alternatives(error.errors(include_url=False))]
        raise ConfigError(f"{source}: " + "; ".join(faults) + ".") from error


def write_config(config: BaseModel, path: Path | str) -> None:
    """Write the resolved configuration, defaults included, as YAML."""
    with atomic_write(path) as stream:
        yaml.safe_dump(config.model_dump(mode="json"), stream, sort_keys=False, allow_unicode=True)


def apply_override(values: dict[str, Any], override: str) -> None:
    """Set `a.b.0.c=value` in a nested mapping; list elements are addressed by number."""
    key, separator, text = override.partition("=")
    if not separator or not key:
        raise ConfigError(f"override {override!r} is not of the form key=value, as in optimizer.lr=1e-4.")
    try:
        value = yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        raise ConfigError(f"override {override!r}: the value cannot be read as YAML.") from error
    target: Any = values
    *parents, last = key.split(".")
    for part in parents:
        if isinstance(target, list):
            target = target[_list_index(target, part, override)]
        else:
            if target.get(part) is None:
                target[part] = {}
            target = target[part]
        if not isinstance(target, dict | list):
            raise ConfigError(f"override {override!r}: {part!r} is a value, not a section.")
    if isinstance(target, list):
        target[_list_index(target, last, override)] = value
    else:
        target[last] = value


def _list_index(values: list[Any], part: str, override: str) -> int:
    if not part.isdigit() or int(part) >= len(values):
        raise ConfigError(f"override {override!r}: {part!r} is not an index of a list of {len(values)}.")
    return int(part)


def _without_alternatives(faults: list[Any]) -> list[Any]:
    """Join the faults of a key that may be one of several types; pydantic reports one for each type, by its name.

    ("checkpoint", "resume", "literal[...]") and ("checkpoint", "resume", "constrained-int") -> ("checkpoint", "resume")
    """
    joined: dict[Any, Any] = {}
    for number, fault in enumerate(faults):
        location = fault["loc"]
        names_a_type = bool(location) and re.search(r"[-\[]", str(location[-1])) and fault["type"] != "extra_forbidden"
        if not names_a_type:
            joined[number] = fault
        elif location[:-1] in joined:
            joined[location[:-1]]["msg"] += " or " + fault["msg"].removeprefix("Input should be ")
        else:
            joined[location[:-1]] = {**fault, "loc": location[:-1]}
    return list(joined.values())


def _word_fault(fault: Any, schema: type[BaseModel]) -> str:
    """Word one pydantic fault: key, value, rule; for an unknown key its nearest known spellings."""
    location = [part for part in fault["loc"]]
    key = ".".join(str(part) for part in location)
    if fault["type"] == "extra_forbidden":
        section = _section_at(schema, location[:-1])
        known = section.model_fields if section is not None else schema.model_fields
        return f"unknown key {key!r}, {nearest_names(str(location[-1]), known)}"
    if fault["type"] == "missing":
        return f"key {key!r} is required and missing"
    if fault["type"] == "model_type":
        return f"{key}={fault['input']!r}: a section of keys is needed"
    message = str(fault["msg"]).removeprefix("Value error, ")
    if fault["type"] == "value_error":
        return f"{key}: {message}" if key else message
    return f"{key}={fault['input']!r}: {message[0].lower()}{message[1:]}"


def _section_at(schema: type[BaseModel], location: list[Any]) -> type[BaseModel] | None:
    """Find the nested model that `location` points into."""
    section: type[BaseModel] | None = schema
    for part in location:
        if isinstance(part, int):
            continue
        if section is None or part not in section.model_fields:
            return None
        section = _model_in(section.model_fields[part].annotation)
    return section


def _model_in(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and not isinstance(annotation, types.GenericAlias):
        return annotation if issubclass(annotation, BaseModel) else None
    for argument in typing.get_args(annotation):
        found = _model_in(argument)
        if found is not None:
            return found
    return None
