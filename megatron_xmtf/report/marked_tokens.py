"""Show token by token what a model reads, with the tokens that bear loss marked.

plain        What·is│·1+1?↵│[[·2│</s>]]       │ between tokens, [[ ]] around those with loss, · is a space
on a terminal the same with colours: separators dim, tokens with loss bold green and underlined, without brackets
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TextIO

__all__ = ["Piece", "mark_pieces", "split_pieces", "uses_colour"]

SEPARATOR = "│"
DIM, LOSS, RESET = "\x1b[2m", "\x1b[1;4;32m", "\x1b[0m"
VISIBLE = str.maketrans({" ": "·", "\n": "↵\n", "\t": "⇥", "\r": "␍"})
REPLACEMENT = "\ufffd"
"""What decoders put where bytes are no character (yet)."""


@dataclass(frozen=True)
class Piece:
    """Tokens that are text only together: mostly one, several where a character takes several tokens."""

    text: str
    ids: tuple[int, ...]
    has_loss: bool


def split_pieces(
    ids: Sequence[int], has_loss: Sequence[bool], *, decode: Callable[[list[int]], str], breaks: Collection[int] = ()
) -> list[Piece]:
    """Decode token by token, each after the piece before it, so that spaces are those of the whole text.

    Args:    ids, has_loss: [tokens]. decode: of the tokenizer, special tokens shown. breaks: places where a piece ends
             in any case: where inputs end and targets begin.
    Returns: pieces whose ids, one after the other, are `ids`; a piece never joins tokens with and without loss.
    """
    pieces: list[Piece] = []
    before, begin = 0, 0  # pieces begin at `begin`; the one before it, decoded along, at `before`
    for end in range(1, len(ids) + 1):
        text = decode(list(ids[before:end]))
        must_end = end == len(ids) or end in breaks or has_loss[end] != has_loss[end - 1]
        if text.endswith(REPLACEMENT) and not must_end:
            continue
        known = decode(list(ids[before:begin]))
        pieces.append(Piece(text[len(known) :], tuple(ids[begin:end]), bool(has_loss[end - 1])))
        before, begin = begin, end
    return pieces


def mark_pieces(pieces: Sequence[Piece], *, colour: bool) -> str:
    """Join pieces to one text; line ends show as `↵` and are kept.

    >>> mark_pieces([Piece("1 + 1", (5,), False), Piece("2", (6,), True), Piece("</s>", (2,), True)], colour=False)
    '1·+·1│[[2│</s>]]'
    """
    parts = []
    for has_loss, group in groupby(pieces, key=lambda piece: piece.has_loss):
        texts = [_visible(piece.text) for piece in group]
        if not colour:
            joined = SEPARATOR.join(texts)
            parts.append(f"[[{joined}]]" if has_loss else joined)
            continue
        start = LOSS if has_loss else ""
        parts.append(f"{DIM}{SEPARATOR}{RESET}".join(f"{start}{text}{RESET if start else ''}" for text in texts))
    return (f"{DIM}{SEPARATOR}{RESET}" if colour else SEPARATOR).join(parts)


def _visible(text: str) -> str:
    """Show white space, and escape what would move the cursor or change the terminal.

    A tokenizer decides what its tokens are, so text out of data could hold any control character.
    """
    shown = text.translate(VISIBLE)
    return "".join(
        character if character == "\n" or character.isprintable() else _escape(character) for character in shown
    )


def _escape(character: str) -> str:
    """Escape a control character; joiners and marks that shape a script stay as they are.

    >>> [_escape("\\x1b"), _escape("\\u200c") == "\\u200c"]
    ['\\\\x1b', True]
    """
    if character in "\u200c\u200d":
        return character
    return character.encode("unicode_escape").decode("ascii")


def uses_colour(stream: TextIO | None = None) -> bool:
    """Tell whether colours are wanted: a terminal, and no NO_COLOR. Source: https://no-color.org."""
    return (stream or sys.stdout).isatty() and not os.environ.get("NO_COLOR")
