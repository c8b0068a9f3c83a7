"""Read the YAML of template files into plain mappings, lists, strings, numbers and nothing else.

    plain scalar                value
    true, false, null, ~        as in YAML 1.2
    12, -3, 0.5                 numbers
    no, yes, on, 2020-01-01     strings (YAML 1.1 makes a boolean, or a date, of an answer choice)
    !Template, !TemplateMetadata {...}    a mapping; any other tag is an error

Refused: aliases within what another alias stands for (they multiply) or to more than 64 nodes, keys given twice (but
for the uuids of templates), nesting deeper than 32.
"""

from __future__ import annotations

import re
from typing import Any

import yaml

from megatron_xmtf.errors import TemplateError

__all__ = ["parse_template_yaml"]

MAX_DEPTH = 32
MAX_ANCHORED_SIZE = 64
"""Nodes that an alias may stand for; promptsource's files repeat lists of a few language names that way."""
PROMPTSOURCE_TAGS = ("!Template", "!TemplateMetadata")

# Both loaders give the same values; libyaml's is about ten times as fast.
_BaseLoader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


class _Loader(_BaseLoader):
    """Safe loader with the scalars of the table above."""

    yaml_implicit_resolvers: dict[str, Any] = {}

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        if not isinstance(node, yaml.MappingNode):
            raise yaml.constructor.ConstructorError(None, None, f"{node.tag} is not a mapping", node.start_mark)
        seen: set[Any] = set()
        for number, (key_node, value_node) in enumerate(node.value):
            if not isinstance(key_node, yaml.ScalarNode):
                raise yaml.constructor.ConstructorError(None, None, "a key is not a scalar", key_node.start_mark)
            key = self.construct_object(key_node, deep=True)
            if key in seen and value_node.tag == "!Template":
                # One of promptsource's own files gives two templates the same uuid; they go by their names.
                key = f"{key}, entry {number}"
                node.value[number] = (yaml.ScalarNode(key_node.tag, key), value_node)
            if key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key {key!r} appears twice", key_node.start_mark)
            seen.add(key)
        mapping: dict[Any, Any] = super().construct_mapping(node, deep=deep)
        return mapping


for _tag, _pattern, _first in (
    ("null", r"^(?:~|null|)$", ["~", "n", ""]),
    ("bool", r"^(?:true|false)$", list("tf")),
    ("int", r"^[-+]?(?:0|[1-9][0-9]*)$", list("-+0123456789")),
    ("float", r"^[-+]?[0-9]+\.[0-9]+$", list("-+0123456789")),
):
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(_pattern), _first)
for _tag in PROMPTSOURCE_TAGS:
    _Loader.add_constructor(_tag, lambda loader, node: loader.construct_mapping(node, deep=True))


def parse_template_yaml(text: str, *, source: str) -> Any:
    """Parse YAML.

    Args:    source: the file's name, for error messages.
    Raises:  TemplateError: not YAML, or something refused (see the module); names line and column.
    """
    try:
        _refuse_depth_and_aliases(text)
        return yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{source}:{mark.line + 1}:{mark.column + 1}" if mark else source
        raise TemplateError(f"{where} cannot be read as YAML: {getattr(error, 'problem', None) or error}.") from error


def _refuse_depth_and_aliases(text: str) -> None:
    """Look at the events before anything is composed: composing is recursive, and nested aliases multiply."""
    depth = 0
    anchored_depth = anchored_size = 0  # of the anchored collection that we are in; 0 outside
    for event in yaml.parse(text, Loader=_BaseLoader):
        anchored_size += anchored_depth > 0
        if anchored_depth and (isinstance(event, yaml.AliasEvent) or anchored_size > MAX_ANCHORED_SIZE):
            raise _refusal(f"an anchor (&name) over an alias, or over more than {MAX_ANCHORED_SIZE} nodes", event)
        if isinstance(event, yaml.CollectionStartEvent):
            depth += 1
            if depth > MAX_DEPTH:
                raise _refusal(f"nested over {MAX_DEPTH} deep", event)
            if event.anchor and not anchored_depth:
                anchored_depth, anchored_size = depth, 0
        elif isinstance(event, yaml.CollectionEndEvent):
            if depth == anchored_depth:
                anchored_depth = 0
            depth -= 1


def _refusal(reason: str, event: Any) -> yaml.YAMLError:
    return yaml.composer.ComposerError(None, None, reason, event.start_mark)
