"""Ask a model in a Hugging Face directory, through transformers.

decoder-only       tokens          6    7    8    2          one sequence; scores are read at its end
                   scored               .    8    2
encoder-decoder    encoder         6    7                    read once for all targets behind the same inputs
                   decoder         0    8                    0 is the model's decoder_start_token_id
                   scored          8    2
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_xmtf.errors import CheckpointError, ConfigError
from megatron_xmtf.evaluation.backend import Pair, ignore_progress, logits_at_once, require_finite
from megatron_xmtf.files import require_directory, require_file

__all__ = ["EncoderDecoderBackend", "HuggingFaceBackend"]

PROMPTS_PER_BATCH = 32
"""Prompts continued at once."""


class HuggingFaceBackend:
    """A transformers model in evaluation mode, on the GPU where there is one; decoder-only, see the next class.

    Args:  model: AutoModelForCausalLM. logits_per_batch: bound of memory, default by device.
    """

    def __init__(self, model: Any, *, logits_per_batch: int | None = None) -> None:
        self.model = model.eval()
        self.vocab_size = int(model.get_output_embeddings().weight.shape[0])
        on_gpu = model.device.type == "cuda"
        self.logits_per_batch = logits_per_batch or logits_at_once(self.vocab_size, on_gpu=on_gpu)
        self.max_length: int | None = model.config.to_dict().get("max_position_embeddings")
        # Nothing in a directory says so; tokenizers of encoder-decoders end inputs with it.
        self.inputs_end_with_eos = bool(model.config.is_encoder_decoder)

    @staticmethod
    def load(directory: Path | str) -> HuggingFaceBackend:
        """Read a model from local files alone; no code out of the directory is run.

        Returns: an `EncoderDecoderBackend` where config.json says that it is one.
        Raises:  MissingError: no such directory, or no config.json. CheckpointError: transformers cannot read it, or
                 weights are missing. ConfigError: it is a prefix-LM.
        """
        from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, GenerationConfig
        from transformers.utils.logging import disable_progress_bar

        disable_progress_bar()
        directory = require_directory(directory)
        require_file(directory / "config.json")
        local: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
        try:
            config = AutoConfig.from_pretrained(directory, **local)
            auto_class = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
            model, report = auto_class.from_pretrained(directory, dtype="auto", output_loading_info=True, **local)
        except Exception as error:  # transformers and safetensors raise a dozen unrelated classes for bad files
            if "weights_only" in str(error):
                # torch's own words advise to load it without the restriction.
                words = "its weights are a pickle that holds more than tensors; ask for a safetensors version."
            else:
                words = str(error).strip() or type(error).__name__
            raise CheckpointError(f"{directory} cannot be read by transformers: {words}") from error
        if getattr(config, "prefix_lm", False):
            raise ConfigError(
                f"{directory} holds a model trained to read inputs in both directions (prefix_lm in config.json), and "
                "transformers reads them causally. Evaluate its checkpoint with --checkpoint; `xmtf import` makes one "
                "of the directory."
            )
        absent = sorted([*report["missing_keys"], *(str(entry) for entry in report["mismatched_keys"])])
        if absent:
            raise CheckpointError(
                f"{directory} lacks {len(absent)} weights of its {config.model_type} ({', '.join(absent[:3])} ...), "
                "and random ones are never used in their place; export or download the model again."
            )
        # The directory's own generation_config may sample, search beams or penalise repetition; ours is plain greedy.
        model.generation_config = GenerationConfig()
        model = model.to("cuda" if torch.cuda.is_available() else "cpu")
        return EncoderDecoderBackend(model) if config.is_encoder_decoder else HuggingFaceBackend(model)

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
        """Write answers greedily (see `Backend.generate`)."""
        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
        answers: list[list[int]] = [[] for _ in prompts]
        for start in range(0, len(order), PROMPTS_PER_BATCH):
            positions = order[start : start + PROMPTS_PER_BATCH]
            batch = [prompts[i] for i in positions]
            continued = self._generate_batch(batch, max_new_tokens=max_new_tokens, eos_id=eos_id)
            for position, row in zip(positions, continued, strict=True):
                answers[position] = row[: row.index(eos_id)] if eos_id in row else row
            advance(len(positions))
        return answers

    def _generate_batch(self, prompts: Sequence[Sequence[int]], *, max_new_tokens: int, eos_id: int) -> list[list[int]]:
        """Return what is written behind each prompt, with whatever follows the EOS.

        A decoder-only model goes on at the right end, so its prompts are padded on the left, and hands them back before
        what it writes; an encoder-decoder hands back its start token.
        """
        two_sided = bool(self.model.config.is_encoder_decoder)
        tokens, mask = _pad(prompts, left=not two_sided, device=self.model.device)
        with torch.inference_mode():
            output = self.model.generate(
                input_ids=tokens,
                attention_mask=mask,
                do_sample=False,
                max_new_tokens=max_new_tokens,
                eos_token_id=eos_id,
                pad_token_id=eos_id,
            )
        rows: list[list[int]] = output[:, 1 if two_sided else tokens.size(1) :].tolist()
        return rows

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


class EncoderDecoderBackend(HuggingFaceBackend):
    """An encoder-decoder: scores are log p(target | inputs) by the decoder; each inputs are read once in a batch.

    Args:    as `HuggingFaceBackend`, model: AutoModelForSeq2SeqLM.
    Raises:  CheckpointError: the model does not say what its decoder starts with.
    """

    def __init__(self, model: Any, *, logits_per_batch: int | None = None) -> None:
        super().__init__(model, logits_per_batch=logits_per_batch)
        start_id = model.config.to_dict().get("decoder_start_token_id")
        if not isinstance(start_id, int):
            raise CheckpointError(
                f"the config.json of this {model.config.model_type} has no decoder_start_token_id; add the token that "
                "its decoder starts with (T5: the padding, 0)."
            )
        self.decoder_start_id = start_id
        model.generation_config.decoder_start_token_id = start_id

    def _batches(self, pairs: Sequence[Pair]) -> Iterator[list[int]]:
        """Yield positions of pairs, those of the same inputs together, as many at once as the bound allows."""
        order = sorted(range(len(pairs)), key=lambda i: (-len(pairs[i][0]), tuple(pairs[i][0]), -len(pairs[i][1])))
        batch: list[int] = []
        for position in order:
            grown = [*batch, position]
            inputs = {tuple(pairs[i][0]) for i in grown}
            tokens = max(map(len, inputs)) * len(inputs) + max(len(pairs[i][1]) for i in grown) * len(grown)
            if batch and tokens * self.vocab_size > self.logits_per_batch:
                yield batch
                grown = [position]
            batch = grown
        if batch:
            yield batch

    def _score_batch(self, pairs: Sequence[Pair]) -> list[float]:
        """Score one batch: every inputs once through the encoder, every target behind its own."""
        numbers: dict[tuple[int, ...], int] = {}
        owners = [numbers.setdefault(tuple(inputs), len(numbers)) for inputs, _ in pairs]
        device = self.model.device
        tokens, mask = _pad(list(numbers), left=False, device=device)
        encoded = self.model.get_encoder()(input_ids=tokens, attention_mask=mask)
        which = torch.tensor(owners, device=device)
        targets = [list(target) for _, target in pairs]
        decoder_tokens, decoder_mask = _pad(
            [[self.decoder_start_id, *target[:-1]] for target in targets], left=False, device=device
        )
        logits = self.model(
            encoder_outputs=(encoded.last_hidden_state[which],),
            attention_mask=mask[which],
            decoder_input_ids=decoder_tokens,
            decoder_attention_mask=decoder_mask,
            use_cache=False,
        ).logits
        labels, _ = _pad(targets, left=False, device=device)
        scores = logits.float().log_softmax(-1).gather(-1, labels[:, :, None]).squeeze(-1)  # [pairs, target]
        return [float(score) for score in scores.where(decoder_mask > 0, torch.zeros_like(scores)).sum(dim=1)]


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
