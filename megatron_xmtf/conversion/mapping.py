"""Which tensor of a checkpoint is which of a Hugging Face model: one row a parameter, read in both directions.

    checkpoint                        Hugging Face mT5                          assembled
    embedding.word_embeddings.weight  shared.weight                             copied; ours has padded rows behind
    ...linear_fc1.weight              DenseReluDense.wi_0, wi_1                 stacked: all rows of one, then the next
    ...self_attention.linear_qkv      SelfAttention.q, k, v                     by head: rows of each head in turn

A row says how by one number, the `groups` that its rows fall into: our rows are [groups, sources, rows of a group],
the rows of each source [groups, rows of a group]. Two heads of two rows, and a feed-forward of three columns:

    q0 q1 | q2 q3                             wi_0: a0 a1 a2     wi_1: b0 b1 b2
    k0 k1 | k2 k3
    v0 v1 | v2 v3
    groups = heads                            groups = 1
    linear_qkv  q0 q1 k0 k1 v0 v1             linear_fc1  a0 a1 a2 b0 b1 b2
                q2 q3 k2 k3 v2 v3

A conversion is complete, every tensor of both sides matched exactly once, or an error that names the rest.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

import torch

from megatron_xmtf.checkpoint.row_ranges import row_ranges
from megatron_xmtf.errors import CheckpointError

__all__ = ["FamilyMapping", "MatchedParameter", "ParameterRow", "Section", "Split", "check_shapes", "match_names"]

Split = Literal["replicated", "column rows", "row columns", "vocabulary rows"]
"""How tensor-parallel ranks share it: all hold it whole; rows of a column-parallel weight or bias; columns of a
row-parallel weight; rows of the embedding. Checkpoints hold whole tensors; this names what a rank reads of them."""

LISTED_LAYERS = 10_000
"""More layers than any model has: a damaged number of layers is not written out to name what is missing."""


@dataclass(frozen=True)
class ParameterRow:
    """One parameter. `{i}` stands for the layer index."""

    ours: str
    """Name in a checkpoint."""
    hf: tuple[str, ...]
    """Names in the Hugging Face model, without the prefix of its base model, in the order that ours holds them."""
    shape: tuple[str, ...]
    """Names of our sizes: hidden, ffn, qkv, vocabulary."""
    split: Split
    groups: str | None = None
    """Name of the number of groups that the rows fall into; None: one."""


@dataclass(frozen=True)
class Section:
    """Rows that follow each other, once or for every layer of a stack."""

    rows: tuple[ParameterRow, ...]
    layers: str | None = None
    """Name of the number of layers; None: once."""


@dataclass(frozen=True)
class FamilyMapping:
    """All parameters of a model, in the order of its forward pass."""

    sections: tuple[Section, ...]
    sizes: Mapping[str, int]
    """Every name that rows and sections use -> its value in this model."""
    embedding: str
    """Our name of the embedding: the one tensor with padded rows that others may repeat."""
    copies: tuple[str, ...]
    """Names under which a model may store the embedding again; accepted only if bit-identical to it, never written."""
    architecture_class: str
    """What an exported config.json gives as `architectures`."""
    description: str
    """The model in a message: a bloom with 24 layers."""
    prefix: str = ""
    """What `save_pretrained` puts before the base model's names; published BLOOM checkpoints come without."""
    alternatives: tuple[str, ...] = ()
    """Those of `copies` under which alone a model may hold the embedding."""
    ignored: tuple[str, ...] = ()
    """Names of weights that files may hold and no model uses; `transformers` drops or does not read them either."""
    zeros: tuple[str, ...] = ()
    """Names of weights that have no counterpart here; accepted only if all of it is zero, never written."""
    repeated: Mapping[str, str] = field(default_factory=dict)
    """A name of the Hugging Face model -> one of `ignored` under which it is written again."""


@dataclass(frozen=True)
class MatchedParameter:
    """One tensor of a given model, with its sizes."""

    ours: str
    hf: tuple[str, ...]
    """Names as the model's files spell them, with or without the prefix."""
    shape: tuple[int, ...]
    """Ours without the padded rows of the vocabulary: the rows of all of `hf` together."""
    padded_shape: tuple[int, ...]
    """As a checkpoint has it: differs in the rows of the vocabulary alone."""
    split: Split
    groups: int = 1

    @property
    def source_shape(self) -> tuple[int, ...]:
        """Shape of each of the Hugging Face tensors."""
        return (self.shape[0] // len(self.hf), *self.shape[1:])

    def row_ranges(self, row_bytes: int, *, chunk_bytes: int) -> Iterator[tuple[int, int]]:
        """Cut our rows into ranges of at most `chunk_bytes` that `source_views` has whole groups in, where one fits.

        2 groups of 3 sources x 2 rows    room for 13 rows: (0, 12)    for 6: (0, 6) (6, 12)    for 5: (0, 2) (2, 4) ...
        """
        group_rows = self.shape[0] // self.groups
        if group_rows * row_bytes <= chunk_bytes:
            for first, last in row_ranges(self.groups, group_rows * row_bytes, chunk_bytes=chunk_bytes):
                yield first * group_rows, last * group_rows
            return
        source_rows = group_rows // len(self.hf)
        for begin in range(0, self.shape[0], source_rows):
            for first, last in row_ranges(source_rows, row_bytes, chunk_bytes=chunk_bytes):
                yield begin + first, begin + last

    def source_views(self, part: torch.Tensor, *, start: int) -> Iterator[tuple[str, tuple[int, int], torch.Tensor]]:
        """View some of our rows as rows of the Hugging Face tensors they are made of.

            heads of 2 rows, part = our rows 4 to 12        v0 v1 q2 q3 k2 k3 v2 v3
            views  (v, (0, 2), v0 v1)  (q, (2, 4), q2 q3)  (k, (2, 4), k2 k3)  (v, (2, 4), v2 v3)

        Args:    part: our rows [start, start + len(part)) without padding.
        Returns: name, its rows [first, last), and the view of `part` that holds them as [groups, rows, ...]. Rows of
                 one name come in increasing order; all views together are `part`.
        """
        if len(self.hf) == 1:
            yield self.hf[0], (start, start + len(part)), part.unsqueeze(0)
            return
        source_rows = self.source_shape[0] // self.groups
        group_rows = source_rows * len(self.hf)
        row, end = start, start + len(part)
        while row < end:
            group, inside = divmod(row, group_rows)
            whole_groups = 0 if inside else (end - row) // group_rows
            if whole_groups:
                last = row + whole_groups * group_rows
                block = part[row - start : last - start]
                block = block.view(whole_groups, len(self.hf), source_rows, *part.shape[1:])
                for number, name in enumerate(self.hf):
                    yield name, (group * source_rows, (group + whole_groups) * source_rows), block[:, number]
            else:
                number, offset = divmod(inside, source_rows)
                last = min(end, row + source_rows - offset)
                first = group * source_rows + offset
                yield self.hf[number], (first, first + last - row), part[row - start : last - start].unsqueeze(0)
            row = last


def expand_rows(mapping: FamilyMapping, *, prefix: str = "") -> list[MatchedParameter]:
    """Write the rows out for every layer of a model, in the order of the forward pass.

    Args:  prefix: put before the Hugging Face names.
    """
    sizes = mapping.sizes
    padded = {**sizes, "vocabulary": sizes["padded vocabulary"]}

    def expand(row: ParameterRow, layer: int) -> MatchedParameter:
        return MatchedParameter(
            ours=row.ours.replace("{i}", str(layer)),
            hf=tuple(prefix + name.replace("{i}", str(layer)) for name in row.hf),
            shape=tuple(sizes[name] for name in row.shape),
            padded_shape=tuple(padded[name] for name in row.shape),
            split=row.split,
            groups=1 if row.groups is None else sizes[row.groups],
        )

    return [
        expand(row, layer)
        for section in mapping.sections
        for layer in range(1 if section.layers is None else sizes[section.layers])
        for row in section.rows
    ]


def match_names(
    mapping: FamilyMapping, *, names: Iterable[str], what: str, side: Literal["hf", "ours"]
) -> list[MatchedParameter]:
    """Match every tensor of a model exactly once.

    Args:    names: what the model holds; on the Hugging Face side with or without the prefix, all alike, and copies
             of the embedding may be there, one of `alternatives` even in its place. what: the model, for the message.
             side: whose names they are.
    Raises:  CheckpointError: names the tensors that are missing and those that belong nowhere.
    """
    found = set(names)
    layers = sum(mapping.sizes[section.layers] for section in mapping.sections if section.layers is not None)
    if layers > max(len(found), LISTED_LAYERS):
        raise CheckpointError(
            f"{what} holds {len(found)} tensors, too few for {mapping.description}, which its config.json says it is. "
            "A conversion is complete or not done; check that weights and config.json belong together."
        )
    prefix = mapping.prefix if side == "ours" or any(name.startswith(mapping.prefix) for name in found) else ""
    parameters = expand_rows(mapping, prefix=prefix)
    if side == "hf":
        parameters = _with_alternative(mapping, parameters, found)
        found -= {*mapping.copies, *mapping.ignored, *mapping.zeros} - {parameter.hf[0] for parameter in parameters}
    wanted = {name for parameter in parameters for name in (parameter.hf if side == "hf" else (parameter.ours,))}
    missing, unexpected = sorted(wanted - found), sorted(found - wanted)
    if missing or unexpected:
        raise CheckpointError(
            f"{what} does not hold the tensors of {mapping.description}: "
            f"{_listed('missing', missing)}; {_listed('unexpected', unexpected)}. "
            "A conversion is complete or not done; check that weights and config.json belong together."
        )
    return parameters


def _with_alternative(
    mapping: FamilyMapping, parameters: list[MatchedParameter], found: set[str]
) -> list[MatchedParameter]:
    """Read the embedding under another of its names where the model has it under that alone.

    safetensors stores tensors that share memory once, and some converters kept the first name by the alphabet.
    """
    alternative = next((name for name in mapping.alternatives if name in found), None)
    return [
        replace(parameter, hf=(alternative,))
        if alternative is not None and parameter.ours == mapping.embedding and parameter.hf[0] not in found
        else parameter
        for parameter in parameters
    ]


def check_shapes(
    parameters: Iterable[MatchedParameter],
    shapes: Mapping[str, tuple[int, ...]],
    *,
    what: str,
    side: Literal["hf", "ours"],
    files: Mapping[str, str] | None = None,
) -> None:
    """Check that every tensor has the shape that the architecture gives it.

    Args:    files: tensor -> file that holds it, for the message.
    Raises:  CheckpointError: names the tensors with both shapes.
    """
    wrong = []
    for parameter in parameters:
        wanted = parameter.source_shape if side == "hf" else parameter.padded_shape
        for name in parameter.hf if side == "hf" else (parameter.ours,):
            if tuple(shapes[name]) != wanted:
                place = f" in {files[name]}" if files is not None else ""
                wrong.append(f"{name} is {list(shapes[name])} instead of {list(wanted)}{place}")
    if wrong:
        raise CheckpointError(f"{what}: shapes do not agree with its config.json: {_listed('wrong', wrong)}.")


def _listed(what: str, names: list[str]) -> str:
    more = f" and {len(names) - 8} more" if len(names) > 8 else ""
    return f"{what} ({len(names)}): {', '.join(names[:8]) or 'none'}{more}"
