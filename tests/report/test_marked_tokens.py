"""Tokens shown one by one: their text joined is the text, and exactly those with loss are marked."""

import io
from pathlib import Path

import pytest

from megatron_xmtf.data.tokenizer import Tokenizer
from megatron_xmtf.report.marked_tokens import Piece, mark_pieces, split_pieces, uses_colour
from tests.tiny import write_tiny_tokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    directory = tmp_path_factory.mktemp("tokenizer")
    write_tiny_tokenizer(directory)
    return Tokenizer.load(directory)


def ids_of(tokenizer: Tokenizer, text: str) -> list[int]:
    return tokenizer.encode_batch([text])[0]


@pytest.mark.parametrize("text", ["a b", "é日本語\nไทย 😀!", " two  spaces ", "\t"])
def test_pieces_are_the_text_and_the_ids(tokenizer: Tokenizer, text: str) -> None:
    ids = ids_of(tokenizer, text)
    pieces = split_pieces(ids, [False] * len(ids), decode=tokenizer.decode)
    assert "".join(piece.text for piece in pieces) == text
    assert [token for piece in pieces for token in piece.ids] == ids
    assert len(pieces) == len(text), "a byte is a token here, and a piece is a character"


def test_a_piece_never_crosses_from_inputs_to_targets(tokenizer: Tokenizer) -> None:
    inputs, targets = ids_of(tokenizer, "é")[:1], ids_of(tokenizer, "é")[1:]
    for breaks, has_loss in (([1], [False, False]), ([], [False, True])):
        pieces = split_pieces([*inputs, *targets], has_loss, decode=tokenizer.decode, breaks=breaks)
        assert [piece.ids for piece in pieces] == [tuple(inputs), tuple(targets)]


def test_marks_without_and_with_colour() -> None:
    pieces = [Piece("a ", (1,), False), Piece("b\n", (2,), False), Piece("c", (3,), True), Piece("</s>", (4,), True)]
    assert mark_pieces(pieces, colour=False) == "a·│b↵\n│[[c│</s>]]"
    coloured = mark_pieces(pieces, colour=True)
    assert "[[" not in coloured and coloured.count("\x1b[1;4;32m") == 2
    assert mark_pieces([], colour=False) == ""


def test_text_cannot_drive_the_terminal() -> None:
    shown = mark_pieces([Piece("\x1b[2J\x07\u202eevil\x00", (1,), False)], colour=False)
    assert shown == "\\x1b[2J\\x07\\u202eevil\\x00"
    assert mark_pieces([Piece("می\u200cخواهم", (1,), False)], colour=False) == "می\u200cخواهم"


def test_colour_on_a_terminal_only_and_not_against_no_color(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.delenv("NO_COLOR", raising=False)
    assert uses_colour(Terminal()) and not uses_colour(io.StringIO())
    monkeypatch.setenv("NO_COLOR", "1")
    assert not uses_colour(Terminal())


def test_a_real_tokenizer_s_pieces(shared_data: Path) -> None:
    text = "Wakati huo huo, รัฐบาล 日本国 — ok\n"
    for name in ("whisper-large-v3", "t5-small"):
        real = Tokenizer.load(shared_data / "tokenizers" / name)
        ids = real.encode_batch([text])[0]
        pieces = split_pieces(ids, [False] * len(ids), decode=real.decode)
        assert [token for piece in pieces for token in piece.ids] == ids
        assert "".join(piece.text for piece in pieces) == real.decode(ids)
