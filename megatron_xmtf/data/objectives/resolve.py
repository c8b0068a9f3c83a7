"""An objective of a configuration, a tokenizer and the rows of a run -> a rule with ids, and the length of chunks.

    span_corruption, t5-small, encoder_length 512, decoder_length 512
    sentinels      <extra_id_0> 32099, <extra_id_1> 32098, ...   by name; 100 of them
    chunk_length   568: inputs 568 - 85 + 28 + 1 = 512, targets 85 + 28 + 1 = 114; 569 would give inputs of 513

Source:  the numbers of the example are T5's own (t5.data.preprocessors `random_spans_helper`).
"""

from __future__ import annotations

import numpy as np

from megatron_xmtf.config.objective import ObjectiveConfig
from megatron_xmtf.config.row_lengths import EncoderDecoderLengths, RowLengths, row_capacity, word_lengths
from megatron_xmtf.data.objectives.alexatm_denoising import AlexaTMDenoising
from megatron_xmtf.data.objectives.document_split import DocumentSplit
from megatron_xmtf.data.objectives.rule import ObjectiveRule
from megatron_xmtf.data.objectives.span_corruption import SpanCorruption
from megatron_xmtf.data.tokenizer import Tokenizer
from megatron_xmtf.errors import ConfigError, TokenizerError, nearest_names

__all__ = ["build_rule", "choose_chunk_length"]

WORD_START = "▁"
"""Sentencepiece's mark of a word's beginning, which some vocabularies have before a sentinel."""


SHORTEST_CHUNK = 3
"""Below, a chunk could not give a rest of one token another."""


def build_rule(objective: ObjectiveConfig, tokenizer: Tokenizer, *, cut_moves: bool = False) -> ObjectiveRule:
    """Find an objective's special tokens in a vocabulary.

    Args:    cut_moves: whether causal and prefix-LM may cut each occurrence elsewhere: in rows of one line.
    Raises:  TokenizerError: the vocabulary has no such token, or no sentinels.
    """
    prefix, eos_id = _prefix(objective, tokenizer), tokenizer.eos_id
    if objective.name in ("causal", "prefix_lm"):
        assert objective.minimum_inputs is not None and objective.maximum_inputs is not None, "filled in by the schema"
        return DocumentSplit(objective.minimum_inputs, objective.maximum_inputs, prefix, eos_id, cut_moves)
    assert objective.noise_density is not None and objective.mean_span_length is not None, "filled in by the schema"
    if objective.name == "alexatm_denoising":
        return AlexaTMDenoising(objective.noise_density, objective.mean_span_length, prefix, eos_id)
    sentinels = _sentinels(objective, tokenizer)
    return SpanCorruption(objective.noise_density, objective.mean_span_length, sentinels, prefix, eos_id)


def _prefix(objective: ObjectiveConfig, tokenizer: Tokenizer) -> tuple[int, ...]:
    if objective.prefix_text:
        (ids,) = tokenizer.encode_batch([objective.prefix_text])
        if not ids:
            raise TokenizerError(
                f"objective {objective.name}: prefix_text={objective.prefix_text!r} has no token in "
                f"{tokenizer.directory}; give another text."
            )
        return tuple(ids)
    if not objective.prefix_token:
        return ()
    number = tokenizer.backend.token_to_id(objective.prefix_token)
    if number is None:
        raise TokenizerError(
            f"objective {objective.name}: {objective.prefix_token!r} is no word of the vocabulary of "
            f"{tokenizer.directory} ({nearest_names(objective.prefix_token, tokenizer.backend.get_vocab())}). Name one "
            'of its own with prefix_token, use several with prefix_text ("[CLM] "), or none with prefix_token: "".'
        )
    return (number,)


def _sentinels(objective: ObjectiveConfig, tokenizer: Tokenizer) -> tuple[int, ...]:
    """Return the ids of sentinel 0, 1, 2 ... by their names, until a number is missing."""
    assert objective.sentinel is not None, "filled in by the schema"
    for spelling in (objective.sentinel, WORD_START + objective.sentinel):
        found: list[int] = []
        while (number := tokenizer.backend.token_to_id(spelling.format(len(found)))) is not None:
            found.append(number)
        if found:
            return tuple(found)
    first = objective.sentinel.format(0)
    raise TokenizerError(
        f"objective span_corruption: the vocabulary of {tokenizer.directory} has no sentinel {first!r} "
        f'({nearest_names(first, tokenizer.backend.get_vocab())}). Say how it spells them (sentinel: "<mask_{{}}>"), '
        "take a model that has some (T5, mT5), or the objective alexatm_denoising, which needs none."
    )


def choose_chunk_length(objective: ObjectiveConfig, rule: ObjectiveRule, lengths: RowLengths) -> int:
    """Return how long chunks may be: what the objective says if it fits, or else as long as always fits.

    Args:    lengths: of the run's rows.
    Raises:  ConfigError: chunks of the length asked for do not always fit, or not even three tokens do.
    """
    capacity = row_capacity(lengths)
    chunks = np.arange(2, 2 * capacity + 3)
    inputs, targets, together = rule.most(chunks)
    fits = together <= capacity
    if isinstance(lengths, EncoderDecoderLengths):
        inputs = inputs + (lengths.encoder_eos and not rule.ends_inputs)
        fits &= (inputs <= lengths.encoder_length) & (targets <= lengths.decoder_length)
    enough = word_lengths(lengths)
    if isinstance(rule, SpanCorruption):
        fits &= rule.spans(chunks) <= len(rule.sentinels)
        enough += f", the vocabulary {len(rule.sentinels)} sentinels"
    # Short documents and rests are shorter chunks, so all shorter ones must fit as well.
    longest = int(chunks[np.argmin(fits)]) - 1
    if longest < SHORTEST_CHUNK:
        raise ConfigError(
            f"objective {objective.name}: rows hold {enough}, too little for a document of {SHORTEST_CHUNK} tokens. "
            "Make them longer."
        )
    if objective.chunk_length is not None and objective.chunk_length > longest:
        raise ConfigError(
            f"objective {objective.name}: chunks of chunk_length={objective.chunk_length} tokens do not fit: rows hold "
            f"{enough}, which is enough for {longest}. Leave chunk_length out, or make rows longer."
        )
    return objective.chunk_length or longest
