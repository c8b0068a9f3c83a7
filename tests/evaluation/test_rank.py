"""Rank classification: unequal numbers of choices, order of choices, ties, normalisation, truncation."""

import math
import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from megatron_xmtf.data.tokenizer import Tokenizer
from megatron_xmtf.errors import RecordError
from megatron_xmtf.evaluation.huggingface import HuggingFaceBackend
from megatron_xmtf.evaluation.rank import RankedPairs, best_choices, build_pairs
from megatron_xmtf.evaluation.records import EvaluationExample
from megatron_xmtf.evaluation.task_file import TaskSettings

SETTINGS = TaskSettings(name="days", language="en", records="days.jsonl")


def example(inputs: str, choices: tuple[str, ...], target: str | None = None) -> EvaluationExample:
    return EvaluationExample(inputs, target or choices[0], choices, "days", "en", "", "en", "days.jsonl:1")


EXAMPLES = [
    example("What comes after Monday?", ("Tuesday", "Friday", "Sunday", "Monday")),
    example("lundi mardi", ("mercredi", "dimanche")),
    example("星期一", ("星期二", "星期三", "الاثنين")),
    example("A", ("B", "Wednesday Thursday Friday Saturday Sunday")),
]


def predictions_with_transformers(directory: Path, examples: list[EvaluationExample], *, eos: bool) -> list[str]:
    """The definition, spelt out: one unpadded forward pass a choice."""
    tokenizer, model = AutoTokenizer.from_pretrained(directory), AutoModelForCausalLM.from_pretrained(directory).eval()
    answers = []
    for one in examples:
        scores = []
        for choice in one.choices:
            context = tokenizer(one.inputs, add_special_tokens=False)["input_ids"]
            target = tokenizer(" " + choice, add_special_tokens=False)["input_ids"]
            target += [tokenizer.eos_token_id] * eos
            with torch.no_grad():
                logprobs = model(torch.tensor([context + target])).logits[0].double().log_softmax(-1)
            scores.append(sum(logprobs[len(context) + i - 1, token].item() for i, token in enumerate(target)))
        answers.append(one.choices[scores.index(max(scores))])
    return answers


def predictions(directory: Path, examples: list[EvaluationExample], settings: TaskSettings) -> list[str]:
    ranked = build_pairs(examples, settings=settings, tokenizer=Tokenizer.load(directory), max_length=None)
    scores = HuggingFaceBackend.load(directory).score(ranked.pairs)
    best = best_choices(ranked, scores, normalization=settings.normalization)
    return [one.choices[choice] for one, choice in zip(examples, best, strict=True)]


@pytest.mark.parametrize("eos", [False, True])
def test_answers_equal_transformers_with_unequal_numbers_of_choices(tiny_hf: Path, eos: bool) -> None:
    settings = SETTINGS.model_copy(update={"score_eos": eos})
    assert predictions(tiny_hf, EXAMPLES, settings) == predictions_with_transformers(tiny_hf, EXAMPLES, eos=eos)


def test_order_of_choices_and_examples_changes_no_answer(tiny_hf: Path) -> None:
    rng = random.Random(0)
    shuffled = [replace(one, choices=tuple(rng.sample(one.choices, len(one.choices)))) for one in EXAMPLES[::-1]]
    assert predictions(tiny_hf, shuffled, SETTINGS)[::-1] == predictions(tiny_hf, EXAMPLES, SETTINGS)


def test_ties_go_to_the_first_and_normalization_divides() -> None:
    pairs = [([1], [2, 3]), ([1], [4]), ([1], [5, 6, 7, 8])]
    ranked = RankedPairs(pairs, owners=[0, 0, 0], characters=[1, 10, 2], truncated=set())
    assert best_choices(ranked, [-2.0, -2.0, -2.0], normalization="none") == [0]
    # by tokens: -1, -2, -0.5; by characters: -2, -0.2, -1
    assert best_choices(ranked, [-2.0, -2.0, -2.0], normalization="tokens") == [2]
    assert best_choices(ranked, [-2.0, -2.0, -2.0], normalization="characters") == [1]


def test_prefix_is_a_setting_and_whitespace_stands_as_it_is(tiny_hf: Path) -> None:
    tokenizer = Tokenizer.load(tiny_hf)
    for prefix in ("", " "):
        settings = SETTINGS.model_copy(update={"target_prefix": prefix})
        ranked = build_pairs(EXAMPLES[:1], settings=settings, tokenizer=tokenizer, max_length=None)
        assert [tokenizer.decode(target) for _, target in ranked.pairs] == [prefix + c for c in EXAMPLES[0].choices]


def test_long_inputs_lose_the_same_tokens_on_the_left_for_every_choice(tiny_hf: Path) -> None:
    tokenizer = Tokenizer.load(tiny_hf)
    long = example("Monday Tuesday " * 20, ("Friday", "Wednesday Thursday Friday"))
    ranked = build_pairs([EXAMPLES[0], long], settings=SETTINGS, tokenizer=tokenizer, max_length=60)
    assert ranked.truncated == {1}
    (first, _), (second, longest) = ranked.pairs[-2:]
    assert first == second == tokenizer.encode_batch([long.inputs])[0][-(60 - len(longest)) :]
    assert max(len(inputs) + len(target) for inputs, target in ranked.pairs) == 60
    with pytest.raises(RecordError, match=r"days.jsonl:1.*shorten the choice"):
        build_pairs([long], settings=SETTINGS, tokenizer=tokenizer, max_length=2)


def test_scores_are_log_probabilities_over_all_single_tokens(tiny_hf: Path) -> None:
    backend = HuggingFaceBackend.load(tiny_hf)
    scores = backend.score([([40, 41], [token]) for token in range(backend.vocab_size)])
    assert math.fsum(map(math.exp, scores)) == pytest.approx(1.0, abs=1e-5)
