"""Scores and greedy continuations against transformers asked one example at a time, without padding."""

import random
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, GenerationConfig

from megatron_xmtf.data.tokenizer import Tokenizer
from megatron_xmtf.errors import CheckpointError, MissingError, NonFiniteError
from megatron_xmtf.evaluation.huggingface import HuggingFaceBackend


def random_pairs(count: int, vocab_size: int, *, seed: int = 0) -> list[tuple[list[int], list[int]]]:
    rng = random.Random(seed)

    def ids(most: int) -> list[int]:
        return [rng.randrange(4, vocab_size) for _ in range(rng.randint(1, most))]

    return [(ids(30), ids(6)) for _ in range(count)]


def scores_one_by_one(directory: Path, pairs) -> list[float]:
    """Independent of the package: one forward pass a pair, one token after the other."""
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    scores = []
    for inputs, target in pairs:
        with torch.no_grad():
            logits = model(torch.tensor([[*inputs, *target]])).logits[0].double()
        total = 0.0
        for offset, token in enumerate(target):
            total += torch.log_softmax(logits[len(inputs) + offset - 1], -1)[token].item()
        scores.append(total)
    return scores


@pytest.fixture(scope="module")
def backend(tiny_hf: Path) -> HuggingFaceBackend:
    return HuggingFaceBackend.load(tiny_hf)


def test_scores_equal_transformers_without_padding(tiny_hf: Path, backend: HuggingFaceBackend) -> None:
    pairs = random_pairs(60, backend.vocab_size)
    expected = scores_one_by_one(tiny_hf, pairs)
    assert max(expected) - min(expected) > 5, "the model is too flat to tell right from wrong"
    assert backend.score(pairs) == pytest.approx(expected, abs=1e-4)


def test_scores_do_not_depend_on_batch_size_order_or_padding(tiny_hf: Path, backend: HuggingFaceBackend) -> None:
    pairs = random_pairs(40, backend.vocab_size, seed=1)
    expected = backend.score(pairs)
    alone = HuggingFaceBackend(backend.model, logits_per_batch=1)
    assert alone.score(pairs) == pytest.approx(expected, abs=1e-4)
    order = random.Random(2).sample(range(len(pairs)), len(pairs))
    shuffled = backend.score([pairs[i] for i in order])
    assert shuffled == pytest.approx([expected[i] for i in order], abs=1e-4)


def test_progress_counts_every_pair(backend: HuggingFaceBackend) -> None:
    seen: list[int] = []
    HuggingFaceBackend(backend.model, logits_per_batch=20_000).score(random_pairs(9, 300), advance=seen.append)
    assert sum(seen) == 9 and len(seen) > 1


def test_generation_equals_transformers_one_by_one(tiny_hf: Path, backend: HuggingFaceBackend) -> None:
    prompts = [inputs for inputs, _ in random_pairs(12, backend.vocab_size, seed=3)]
    model = AutoModelForCausalLM.from_pretrained(tiny_hf).eval()
    eos_id = Tokenizer.load(tiny_hf).eos_id
    greedy = GenerationConfig(do_sample=False, max_new_tokens=9, eos_token_id=eos_id, pad_token_id=eos_id)
    expected = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        output = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=greedy)
        new = output[0, len(prompt) :].tolist()
        expected.append(new[: new.index(eos_id)] if eos_id in new else new)
    assert backend.generate(prompts, max_new_tokens=9, eos_id=eos_id) == expected


def test_generation_stops_at_eos(backend: HuggingFaceBackend) -> None:
    prompt = [40, 41, 42]
    free = backend.generate([prompt], max_new_tokens=6, eos_id=2)[0]
    fake_eos = free[3]
    assert backend.generate([prompt], max_new_tokens=6, eos_id=fake_eos) == [free[: free.index(fake_eos)]]


def test_sampling_settings_of_the_directory_are_ignored(tiny_hf: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_hf)
    model.generation_config = GenerationConfig(do_sample=True, temperature=5.0, repetition_penalty=9.0)
    model.save_pretrained(tmp_path)
    plain = HuggingFaceBackend.load(tiny_hf).generate([[40, 41]], max_new_tokens=8, eos_id=2)
    assert HuggingFaceBackend.load(tmp_path).generate([[40, 41]], max_new_tokens=8, eos_id=2) == plain


def test_missing_weights_are_an_error_not_random(tiny_hf: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    (tmp_path / "config.json").write_bytes((tiny_hf / "config.json").read_bytes())
    with pytest.raises(CheckpointError, match="cannot be read"):
        HuggingFaceBackend.load(tmp_path)
    weights = load_file(tiny_hf / "model.safetensors")
    weights.pop("transformer.h.1.mlp.dense_4h_to_h.weight")
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="lacks 1 weights.*dense_4h_to_h"):
        HuggingFaceBackend.load(tmp_path)
    (tmp_path / "model.safetensors").write_bytes((tiny_hf / "model.safetensors").read_bytes()[:1000])
    with pytest.raises(CheckpointError, match="cannot be read"):
        HuggingFaceBackend.load(tmp_path)
    with pytest.raises(MissingError):
        HuggingFaceBackend.load(tmp_path / "nowhere")


def test_nan_is_reported(tiny_hf: Path) -> None:
    backend = HuggingFaceBackend.load(tiny_hf)
    with torch.no_grad():
        backend.model.transformer.ln_f.bias[0] = float("nan")
    with pytest.raises(NonFiniteError, match="1 of 1"):
        backend.score([([40], [41])])
