"""Answer by writing: greedy continuation of a prompt, cut at the end-of-sequence token or a stop string."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from megatron_xmtf.data.tokenizer import Tokenizer
from megatron_xmtf.errors import ConfigError
from megatron_xmtf.evaluation.backend import Backend, ignore_progress

__all__ = ["cut_at_stop", "generate_texts"]


def generate_texts(
    prompts: Sequence[str],
    *,
    backend: Backend,
    tokenizer: Tokenizer,
    max_new_tokens: int,
    stop: Sequence[str] = (),
    inputs_eos: bool | None = None,
    advance: Callable[[int], None] = ignore_progress,
) -> tuple[list[str], set[int]]:
    """Continue each prompt with the most probable token until EOS, `max_new_tokens` or a stop string.

    Args:    inputs_eos: end prompts with EOS; None: as the model was trained.
    Returns: the texts behind the prompts, and the positions of the prompts that lost tokens on the left because they
             left no room for `max_new_tokens` in the model.

    Raises:  ConfigError: a prompt without a token, or `max_new_tokens` not below what the model takes.
    """
    room = None if backend.max_length is None else backend.max_length - max_new_tokens
    if room is not None and room < 1:
        raise ConfigError(
            f"max_new_tokens={max_new_tokens} leaves no room for a prompt in the {backend.max_length} tokens that the "
            "model takes; ask for fewer."
        )
    encoded = tokenizer.encode_batch(prompts)
    for prompt, ids in zip(prompts, encoded, strict=True):
        if not ids:
            raise ConfigError(f"prompt {prompt!r} becomes no token with this tokenizer; write something in it.")
    ends = backend.inputs_end_with_eos if inputs_eos is None else inputs_eos
    encoded = [[*ids, tokenizer.eos_id] if ends else ids for ids in encoded]
    truncated = {position for position, ids in enumerate(encoded) if room is not None and len(ids) > room}
    fitting = [ids[-room:] if room is not None else ids for ids in encoded]
    answers = backend.generate(fitting, max_new_tokens=max_new_tokens, eos_id=tokenizer.eos_id, advance=advance)
    texts = [cut_at_stop(tokenizer.decode(answer, skip_special_tokens=True), stop) for answer in answers]
    return texts, truncated


def cut_at_stop(text: str, stop: Sequence[str]) -> str:
    """Return `text` before the first of the stop strings that occurs in it.

    >>> cut_at_stop("five. Next:", ["Next", "."])
    'five'
    """
    return text[: min([text.index(mark) for mark in stop if mark in text], default=len(text))]
