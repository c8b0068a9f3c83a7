"""The oracle of prefix-LM: transformers' own BLOOM, one example at a time, given a mask that it never makes itself."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import BloomForCausalLM
from transformers.models.bloom.modeling_bloom import build_alibi_tensor

__all__ = ["greedy_answer", "prefix_logits", "score"]


def prefix_logits(model: BloomForCausalLM, inputs: list[int], targets: list[int]) -> Tensor:
    """Return logits [tokens, vocab] of one example whose inputs are read in both directions.

    Query i sees key j if j <= i or j < len(inputs). `transformers` adds a mask of four dimensions to the scores as it
    is; its ALiBi, slope * position of the key, is that of a text without padding.
    """
    length = len(inputs) + len(targets)
    key = torch.arange(length)
    seen = (key[None, :] <= key[:, None]) | (key[None, :] < len(inputs))
    mask = torch.zeros(length, length).masked_fill(~seen, torch.finfo(torch.float32).min)[None, None]
    # It would read its ALiBi off the mask, and can do so from one of two dimensions alone.
    model.transformer.build_alibi_tensor = lambda mask, heads, dtype: build_alibi_tensor(
        torch.ones(1, length), heads, dtype
    )
    try:
        logits: Tensor = model(torch.tensor([[*inputs, *targets]]), attention_mask=mask, use_cache=False).logits[0]
    finally:
        del model.transformer.build_alibi_tensor
    return logits


def score(model: BloomForCausalLM, inputs: list[int], targets: list[int], *, causal: bool = False) -> float:
    """Return the sum of log p(target token | what stands before it); causal: as `transformers` alone would."""
    with torch.no_grad():
        logits = prefix_logits(model, [] if causal else inputs, [*inputs, *targets] if causal else targets)
    logits = logits[len(inputs) - 1 : -1].double()
    return float(logits.log_softmax(-1).gather(-1, torch.tensor(targets)[:, None]).sum())


def greedy_answer(model: BloomForCausalLM, prompt: list[int], *, max_new_tokens: int, eos_id: int) -> list[int]:
    """Return the most probable tokens one after the other: the prompt is the inputs, what was written the targets."""
    answer: list[int] = []
    with torch.no_grad():
        for _ in range(max_new_tokens):
            token = int(prefix_logits(model, prompt, answer)[-1].argmax())
            if token == eos_id:
                break
            answer.append(token)
    return answer
