"""Ask a model in a Hugging Face directory, through transformers."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_xmtf.errors import CheckpointError
from megatron_xmtf.evaluation.backend import Pair, ignore_progress, logits_at_once, require_finite
from megatron_xmtf.files import require_directory, require_file

__all__ = ["HuggingFaceBackend"]

PROMPTS_PER_BATCH = 32
"""Prompts continued at once."""


class HuggingFaceBackend:
    """A decoder-only transformers model in evaluation mode, on the GPU where there is one.

    Args:  model: AutoModelForCausalLM. logits_per_batch: bound of memory, default by device.
    """

    def __init__(self, model: Any, *, logits_per_batch: int | None = None) -> None:
        self.model = model.eval()
        self.vocab_size = int(model.get_output_embeddings().weight.shape[0])
        on_gpu = model.device.type == "cuda"
        self.logits_per_batch = logits_per_batch or logits_at_once(self.vocab_size, on_gpu=on_gpu)
        self.max_length: int | None = model.config.to_dict().get("max_position_embeddings")

    @staticmethod
    def load(directory: Path | str) -> HuggingFaceBackend:
        """Read a model from local files alone; no code out of the directory is run.

        Raises:  MissingError: no such directory, or no config.json. CheckpointError: transformers cannot read it,
                 weights are missing, or it is an encoder-decoder model.
        """
        from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig
        from transformers.utils.logging import disable_progress_bar

        disable_progress_bar()
        directory = require_directory(directory)
        require_file(directory / "config.json")
        local: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
        try:
            config = AutoConfig.from_pretrained(directory, **local)
            if config.is_encoder_decoder:
                raise CheckpointError(
                    f"{directory} is an encoder-decoder model ({config.model_type}); decoder-only models are evaluated."
                )
            model, report = AutoModelForCausalLM.from_pretrained(
                directory, dtype="auto", output_loading_info=True, **local
            )
        except CheckpointError:
            raise
        except Exception as error:  # transformers and safetensors raise a dozen unrelated classes for bad files
            if "weights_only" in str(error):
                # torch's own words advise to load it without the restriction.
                words = "its weights are a pickle that holds more than tensors; ask for a safetensors version."
            else:
                words = str(error).strip() or type(error).__name__
            raise CheckpointError(f"{directory} cannot be read by transformers: {words}") from error
        absent = sorted([*report["missing_keys"], *(str(entry) for entry in report["mismatched_keys"])])
        if absent:
            raise CheckpointError(
                f"{directory} lacks {len(absent)} weights of its {config.model_type} ({', '.join(absent[:3])} ...), "
                "and random ones are never used in their place; export or download the model again."
            )
        # The directory's own generation_config may sample, search beams or penalise repetition; ours is plain greedy.
        model.generation_config = GenerationConfig()
        return HuggingFaceBackend(model.to("cuda" if torch.cuda.is_available() else "cpu"))

    def score(self, pairs: Sequence[Pair], *, advance: Callable[[int], None] = ignore_progress) -> list[float]:
        """Score pairs in batches of similar length, padded on the right (see `Backend.score`)."""
        scores = [math.nan] * len(pairs)
        with torch.inference_mode():
            for positions in self._batches(pairs):
                for position, score in zip(positions, self._score_batch([pairs[i] for i in positions]), strict=True):
                    scores[position] = score
                advance(len(positions))
        return require_finite(scores)

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        max_new_tokens: int,
        eos_id: int,
        advance: Callable[[int], None] = ignore_progress,
    ) -> list[list[int]]:
        """Continue prompts greedily, padded on the left (see `Backend.generate`)."""
        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
        answers: list[list[int]] = [[] for _ in prompts]
        for start in range(0, len(order), PROMPTS_PER_BATCH):
            positions = order[start : start + PROMPTS_PER_BATCH]
            tokens, mask = _pad([list(prompts[i]) for i in positions], left=True, device=self.model.device)
            with torch.inference_mode():
                output = self.model.generate(
                    input_ids=tokens,
                    attention_mask=mask,
                    do_sample=False,
                    max_new_tokens=max_new_tokens,
                    eos_token_id=eos_id,
                    pad_token_id=eos_id,
                )
            for position, row in zip(positions, output[:, tokens.size(1) :].tolist(), strict=True):
                answers[position] = row[: row.index(eos_id)] if eos_id in row else row
            advance(len(positions))
        return answers

    def _batches(self, pairs: Sequence[Pair]) -> Iterator[list[int]]:
        """Yield positions of pairs, longest first, as many at once as the bound of logits allows."""
        lengths = [len(inputs) + len(target) - 1 for inputs, target in pairs]
        batch: list[int] = []
        for position in sorted(range(len(pairs)), key=lambda i: -lengths[i]):
            longest = lengths[batch[0]] if batch else lengths[position]
            if batch and longest * (len(batch) + 1) * self.vocab_size > self.logits_per_batch:
                yield batch
                batch = []
            batch.append(position)
        if batch:
            yield batch

    def _score_batch(self, pairs: Sequence[Pair]) -> list[float]:
        """Score one batch; the last token of a pair predicts nothing that is scored, so it is not fed."""
        tokens, mask = _pad([[*inputs, *target][:-1] for inputs, target in pairs], left=False, device=self.model.device)
        logits = self.model(input_ids=tokens, attention_mask=mask, use_cache=False).logits
        scores = []
        for row, (inputs, target) in enumerate(pairs):
            first = len(inputs) - 1  # the logits at the last token of the inputs predict the first of the target
            relevant = logits[row, first : first + len(target)].float()
            labels = torch.tensor(list(target), device=logits.device)
            scores.append(float(relevant.log_softmax(-1).gather(-1, labels[:, None]).sum()))
        return scores


def _pad(rows: Sequence[Sequence[int]], *, left: bool, device: torch.device) -> tuple[Tensor, Tensor]:
    """Stack rows of token ids to int64 [rows, longest] with the attention mask; padded with id 0, which is masked."""
    longest = max(map(len, rows))
    tokens = torch.zeros(len(rows), longest, dtype=torch.int64)
    mask = torch.zeros_like(tokens)
    for number, row in enumerate(rows):
        place = slice(longest - len(row), longest) if left else slice(0, len(row))
        tokens[number, place] = torch.tensor(list(row))
        mask[number, place] = 1
    return tokens.to(device), mask.to(device)
