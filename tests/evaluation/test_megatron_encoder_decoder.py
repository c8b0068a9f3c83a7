"""Encoder-decoders on the parallel engine against transformers: scores and answers, inputs encoded once."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import MT5ForConditionalGeneration

from megatron_xmtf.config import ParallelConfig
from megatron_xmtf.evaluation import evaluate as evaluation
from megatron_xmtf.parallel.launch import run_ranks
from tests.evaluation.test_huggingface import random_pairs
from tests.evaluation.test_huggingface_encoder_decoder import (
    EOS,
    greedy_by_hand,
    pairs_of_few_inputs,
    scores_one_by_one,
)

TP, PP, SP = "tensor_model_parallel_size", "pipeline_model_parallel_size", "sequence_parallel"
VPP = "virtual_pipeline_model_parallel_size"
NEW_TOKENS = 18
"""More than a multiple of the decoder's rows, which then grow."""


@pytest.fixture(scope="module")
def questions(tiny_mt5_hf: Path):
    """Pairs and their scores, prompts and their answers, by transformers alone; inputs have one to four targets."""
    model = MT5ForConditionalGeneration.from_pretrained(tiny_mt5_hf).eval()
    pairs = [
        *pairs_of_few_inputs(30),
        ([7, 8, 9], [20]),
        ([7, 8, 9], [21, 22, 23]),
        ([7, 8, 9], [24]),
        ([7, 8, 9], [9]),
    ]
    prompts = [inputs for inputs, _ in random_pairs(5, 300, seed=5)]
    scores = scores_one_by_one(model, pairs)
    answers = [greedy_by_hand(model, prompt, NEW_TOKENS) for prompt in prompts]
    assert max(scores) - min(scores) > 5 and len({tuple(answer) for answer in answers}) == 5
    return pairs, scores, prompts, answers


def ask(pairs, prompts, settings, *, backend, tokenizer, show_progress):
    """Runs in every rank; counts the passes through the encoder's first layer here."""
    from megatron.core.utils import unwrap_model

    encoded: list[int] = []
    layers = [layer for chunk in backend.chunks for layer in unwrap_model(chunk).encoder.layers]
    if layers:
        layers[0].register_forward_hook(lambda *_: encoded.append(1))
    backend.logits_per_batch = settings.get("logits_per_batch", backend.logits_per_batch)
    told: list[int] = []
    scores = backend.score(pairs, advance=told.append)
    scored = len(encoded)
    answers = backend.generate(prompts, max_new_tokens=NEW_TOKENS, eos_id=EOS, advance=told.append)
    return scores, answers, sum(told), scored, len(encoded) - scored


def in_ranks(checkpoint: Path, world_size: int, sizes: dict, pairs, prompts, **settings) -> list:
    arguments = (checkpoint, ParallelConfig(**sizes), "fp32", ask, (pairs, prompts, settings))
    return run_ranks(evaluation._on_checkpoint, world_size=world_size, arguments=arguments)


@pytest.mark.parametrize(
    ("world_size", "sizes"),
    [
        (2, {}),
        (2, {PP: 2, VPP: 2}),
        (4, {TP: 2, PP: 2, SP: True, "pipeline_layers": [5, 2]}),
    ],
    ids=["DP2", "PP2-VPP2", "TP2-SP-PP2-inside-decoder"],
)
def test_scores_and_answers_equal_transformers(
    tiny_mt5_checkpoint: Path, questions, world_size: int, sizes: dict
) -> None:
    pairs, expected, prompts, answers = questions
    for scores, generated, told, _, _ in in_ranks(tiny_mt5_checkpoint, world_size, sizes, pairs, prompts):
        assert scores == pytest.approx(expected, abs=1e-4)
        assert generated == answers
        assert told == len(pairs) + len(prompts)


def test_inputs_are_encoded_once(tiny_mt5_checkpoint: Path, questions) -> None:
    """One row a micro-batch: a pass through the encoder for each, whatever is asked behind it."""
    pairs, expected, prompts, answers = questions
    [found] = in_ranks(tiny_mt5_checkpoint, 1, {}, pairs, prompts, logits_per_batch=1)
    scores, generated, _, scored, answered = found
    assert scores == pytest.approx(expected, abs=1e-4) and generated == answers
    assert scored == 1, "all inputs fit one row"
    assert answered == len(prompts)


def test_scores_do_not_depend_on_packing(tiny_mt5_checkpoint: Path, questions) -> None:
    pairs, expected, _, _ = questions
    alone = in_ranks(tiny_mt5_checkpoint, 1, {}, pairs[-2:-1], [])[0][0]
    assert alone == pytest.approx(expected[-2:-1], abs=1e-4)
