"""Read the task files of Natural Instructions: one instance a row, with what its task says of it.

    file   {"Definition": ["Name the capital."], "Categories": [...], "Positive Examples": [...], ...,
            "Instances": [{"id": "task1146-7f", "input": "Peru", "output": ["Lima"]}, ...]}
    row    {"id": "task1146-7f", "input": "Peru", "output": ["Lima"], "task": "task1146_country_capital",
            "definition": "Name the capital.", "definitions": [...], "categories": [...], "reasoning": [...],
            "domains": [...], "source": [...], "input_language": [...], "output_language": [...],
            "instruction_language": [...], "license": [...], "positive_examples": [...], "negative_examples": [...]}

`task` is the file's name; `definition` is the first where the file has several; a text where newer files have a list
(older releases) becomes a list of one; what a file does not say is an empty list.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megatron_xmtf.errors import RecordError
from megatron_xmtf.prompts.readers.bad_rows import BadRowError, LocatedRows, Reject, Row
from megatron_xmtf.prompts.readers.json_rows import read_json_document
from megatron_xmtf.prompts.readers.streams import Lines

__all__ = ["read_natural_instructions"]

LISTS = {
    "categories": "Categories",
    "reasoning": "Reasoning",
    "domains": "Domains",
    "source": "Source",
    "input_language": "Input_language",
    "output_language": "Output_language",
    "instruction_language": "Instruction_language",
    "license": "Instance License",
}
"""Field of a row -> key of the file, a list of texts."""


def read_natural_instructions(path: Path, lines: Lines, reject: Reject) -> LocatedRows:
    """Read the instances of one task file, in its order.

    Raises:  RecordError: no Definition or no list of Instances.
    """
    value = read_json_document(path, lines)
    if not isinstance(value, dict) or not isinstance(value.get("Instances"), list):
        raise RecordError(f"{path} is no task file: an object with a list under `Instances` is needed.")
    task = _task_fields(path, value)
    for number, instance in enumerate(value["Instances"]):
        where = f"{path}: Instances[{number}]"
        try:
            row = _instance(instance, where)
        except BadRowError as error:
            reject(error)
            continue
        yield where, {**row, **task}


def _task_fields(path: Path, value: Row) -> Row:
    definitions = _texts(path, value, "Definition")
    if not definitions:
        raise RecordError(f"{path} has no Definition, the instruction that its instances are answers to.")
    row: Row = {"task": path.name.split(".json")[0], "definition": definitions[0], "definitions": definitions}
    row.update({name: _texts(path, value, key) for name, key in LISTS.items()})
    for name, key in (("positive_examples", "Positive Examples"), ("negative_examples", "Negative Examples")):
        examples = value.get(key, [])
        if not isinstance(examples, list) or not all(isinstance(example, dict) for example in examples):
            raise RecordError(f"{path}: {key!r} is not a list of objects.")
        row[name] = examples
    return row


def _texts(path: Path, value: Row, key: str) -> list[str]:
    found = value.get(key, [])
    if isinstance(found, str):
        return [found]
    if not isinstance(found, list) or not all(isinstance(text, str) for text in found):
        raise RecordError(f"{path}: {key!r} is neither a text nor a list of texts.")
    return found


def _instance(instance: Any, where: str) -> Row:
    if not isinstance(instance, dict):
        raise BadRowError("not an object", f"{where} is a {type(instance).__name__}; an instance is an object.")
    output = instance.get("output")
    if isinstance(output, str):
        output = [output]
    if not isinstance(output, list) or not output or not all(isinstance(text, str) for text in output):
        raise BadRowError("no output", f"{where}: output={str(output)[:40]!r} is not a list of texts with one or more.")
    if not isinstance(instance.get("input"), str):
        raise BadRowError("no input", f"{where}: input={str(instance.get('input'))[:40]!r} is not a text.")
    row: Row = {"input": instance["input"], "output": output}
    return {"id": instance["id"], **row} if isinstance(instance.get("id"), str) else row
