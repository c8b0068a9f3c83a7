"""Encoder-decoders in Hugging Face directories: scores and answers against transformers asked one at a time."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import torch
from transformers import MT5ForConditionalGeneration, T5ForConditionalGeneration

from megatron_xmtf.errors import CheckpointError
from megatron_xmtf.evaluation.evaluate import evaluate_huggingface
from megatron_xmtf.evaluation.huggingface import EncoderDecoderBackend, HuggingFaceBackend
from megatron_xmtf.evaluation.tasks import load_tasks
from tests.evaluation.test_huggingface import random_pairs
from tests.tiny import write_tiny_t5

EOS = 1


def scores_one_by_one(model, pairs) -> list[float]:
    """Independent of the package: one forward pass a pair, one token after the other."""
    scores = []
    for inputs, target in pairs:
        total = 0.0
        for length, token in enumerate(target):
            with torch.no_grad():
                decoder = torch.tensor([[0, *target[:length]]])
                logits = model(input_ids=torch.tensor([inputs]), decoder_input_ids=decoder).logits[0, -1].double()
            total += torch.log_softmax(logits, -1)[token].item()
        scores.append(total)
    return scores


def greedy_by_hand(model, prompt: list[int], count: int) -> list[int]:
    answer: list[int] = []
    for _ in range(count):
        with torch.no_grad():
            decoder = torch.tensor([[0, *answer]])
            token = int(model(input_ids=torch.tensor([prompt]), decoder_input_ids=decoder).logits[0, -1].argmax())
        if token == EOS:
            break
        answer.append(token)
    return answer


@pytest.fixture(scope="module")
def backend(tiny_mt5_hf: Path) -> HuggingFaceBackend:
    return HuggingFaceBackend.load(tiny_mt5_hf)


@pytest.fixture(scope="module")
def reference(tiny_mt5_hf: Path):
    return MT5ForConditionalGeneration.from_pretrained(tiny_mt5_hf).eval()


def pairs_of_few_inputs(count: int) -> list[tuple[list[int], list[int]]]:
    """Pairs that share inputs by threes, in random order."""
    pairs = random_pairs(count, 300, seed=4)
    shared = [(pairs[number - number % 3][0], target) for number, (_, target) in enumerate(pairs)]
    return random.Random(5).sample(shared, len(shared))


def test_scores_equal_transformers_one_by_one(backend: HuggingFaceBackend, reference) -> None:
    assert isinstance(backend, EncoderDecoderBackend)
    pairs = pairs_of_few_inputs(45)
    expected = scores_one_by_one(reference, pairs)
    assert max(expected) - min(expected) > 5, "the model is too flat to tell right from wrong"
    assert backend.score(pairs) == pytest.approx(expected, abs=1e-4)
    alone = EncoderDecoderBackend(backend.model, logits_per_batch=1)
    assert alone.score(pairs) == pytest.approx(expected, abs=1e-4)


def test_scores_hang_on_the_inputs(backend: HuggingFaceBackend) -> None:
    pairs = pairs_of_few_inputs(9)
    turned = [(list(reversed(inputs)), target) for inputs, target in pairs if len(inputs) > 1]
    straight = [pair for pair in pairs if len(pair[0]) > 1]
    assert backend.score(turned) != pytest.approx(backend.score(straight), abs=0.1)


def test_inputs_are_read_once_for_all_their_targets(
    backend: HuggingFaceBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[int] = []
    encoder = backend.model.get_encoder()
    forward = encoder.forward
    monkeypatch.setattr(
        encoder, "forward", lambda input_ids, **rest: read.append(len(input_ids)) or forward(input_ids, **rest)
    )
    pairs = [([40, 41, 42], [50, number]) for number in range(20)] + [([9, 9], [60 + number]) for number in range(7)]
    backend.score(pairs)
    assert read == [2]


@pytest.mark.parametrize("version", ["1.0", "1.1"])
def test_answers_equal_transformers_by_hand(version: str, tmp_path: Path) -> None:
    write_tiny_t5(tmp_path, version=version)
    reference = T5ForConditionalGeneration.from_pretrained(tmp_path).eval()
    backend = HuggingFaceBackend.load(tmp_path)
    prompts = [inputs for inputs, _ in random_pairs(10, 300, seed=3)]
    expected = [greedy_by_hand(reference, prompt, 8) for prompt in prompts]
    assert len({tuple(answer) for answer in expected}) > 5, "the answers do not hang on the prompts"
    assert backend.generate(prompts, max_new_tokens=8, eos_id=EOS) == expected


def test_generation_stops_at_eos(backend: HuggingFaceBackend) -> None:
    free = backend.generate([[40, 41, 42]], max_new_tokens=6, eos_id=EOS)[0]
    cut = backend.generate([[40, 41, 42]], max_new_tokens=6, eos_id=free[2])
    assert cut == [free[: free.index(free[2])]]


def test_a_task_is_ranked_as_by_hand(backend: HuggingFaceBackend, reference, tiny_mt5_hf: Path, tmp_path: Path) -> None:
    from megatron_xmtf.data.tokenizer import Tokenizer

    words = ["red", "green", "blue", "white"]
    rng = random.Random(0)
    questions = [f"{rng.choice(words)} {rng.randrange(99)}?" for _ in range(12)]
    records = [{"inputs": question, "targets": rng.choice(words), "choices": words} for question in questions]
    (tmp_path / "task.jsonl").write_text("".join(json.dumps({**r, "language": "en"}) + "\n" for r in records))
    (tmp_path / "tasks.yaml").write_text("- {name: colours, records: task.jsonl, target_prefix: ''}\n")
    encode = Tokenizer.load(tiny_mt5_hf).encode_batch
    right = 0
    for record in records:
        pairs = [([*encode([record["inputs"]])[0], EOS], ids) for ids in encode(words)]
        scores = scores_one_by_one(reference, pairs)
        right += words[scores.index(max(scores))] == record["targets"]
    [result] = evaluate_huggingface(tiny_mt5_hf, load_tasks([tmp_path / "tasks.yaml"]), own_process=False)
    assert result.value == pytest.approx(right / 12)


def test_a_decoder_without_a_start_is_refused(tiny_mt5_hf: Path, tmp_path: Path) -> None:
    write_tiny_t5(tmp_path, version="1.1")
    config = json.loads((tmp_path / "config.json").read_text())
    del config["decoder_start_token_id"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="no decoder_start_token_id"):
        HuggingFaceBackend.load(tmp_path)
