"""Segments give the ids of whole texts, for every kind of tokenizer and any text; a wrong rule would be seen."""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers

from megatron_xmtf.data.segment_encoder import SegmentEncoder
from megatron_xmtf.data.segment_rule import BLOOM_SPLIT, SPLITS, NoSegments, SegmentRule, find_segment_rule

SPELLINGS = """
the The it's IT'S don't I'll we’ve café naïve cafe\u0301 Straße İstanbul ΣΑΣ привет мир ёж سلام عَرَبِيّ १२३ हिन्दी की
क्षत्रिय ภาษาไทย น้ำ กำ 你好 世界。你好，世界！ 日本語です。テスト ﾃｽﾄﾞ 한국어 \u1112\u1161\u11ab tiếng Việt Yorùbá
12 345 1,234.56 3.5% ½ ² x² № ﬁn Ⅳ a_b C++ f(x) (entailment, neutral) [x] {y} "q" “q” „q“ «q» - -- — … ... ? ?! . , ;
: :) /usr/bin http://a.b/c?d=e&f #1 @me $5 €5 5€ & * ~ ^ | \\ 👍 👍🏽 👩‍👩‍👧 🇮🇩🇺 ❤️ \u0300 \u0301a \u200d \u200b \u2060
\ufeff \u00ad \u180e \u061c \u0600 \u06dd \U000110bd \u0d4e \u0e33 \u0eb3 \U00011f02 \uff9e \u00b4 \u00a8 \u02d8 x\u3000
\u00a0 \u2009x \u202f x\u0085 \u2028y \x00 \x07 \x1b \x1c x\x1f \x7f \ufffd \U0001f3fb \U0010ffff \ue000 ▁ ▁▁ x▁y ▁a
</s> <s> <unk> <pad> ＜unk＞ <|endoftext|> <|en|> <extra_id_0> <extra_id_0 <mask> <0x0A> 's 're' 'S s' '
"""
WORDS = [word for line in SPELLINGS.strip("\n").split("\n") for word in line.split(" ")]
GAPS = [
    " ",
    " ",
    " ",
    " ",
    "  ",
    "   ",
    "\n",
    "\n\n",
    " \n",
    "\n ",
    "\r\n",
    "\r",
    "\t",
    "\t ",
    "",
    "\u00a0",
    " \u00a0",
    "\u3000",
]
ENDS = [
    ",",
    ".",
    "?!",
    ").",
    ':"',
    "'s.",
    ".'",
    "...",
    "\n",
    "\n\nWhy",
    ".\n\nWhy:",
    ".\n",
    "\n\u0301",
    "\r\nx",
    "\n.\nx,",
    "\u0301.",
]
PIECE = st.one_of(st.sampled_from(WORDS), st.sampled_from(GAPS), st.characters(codec="utf-8"))
TEXT = st.lists(st.one_of(PIECE, st.just(" ")), max_size=14).map("".join)
SENTENCES = [
    "What is the capital of Kenya? The capital is Nairobi, I think (it's not Mombasa).",
    "Mji mkuu wa Kenya ni upi? Nairobi ni mji mkuu wa Kenya.",
    "केन्या की राजधानी क्या है? नैरोबी केन्या की राजधानी है।",
    "肯尼亚的首都是哪里？内罗毕是肯尼亚的首都。",
    "Какая столица Кении? Столица Кении - Найроби. 12 345",
    "One  two   three.\n\n Four,   five. (Six).  \n (Seven)",
]


def byte_level(**options: bool) -> pre_tokenizers.ByteLevel:
    return pre_tokenizers.ByteLevel(**{"add_prefix_space": False, **options})


def split(pattern: str) -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(pattern), "isolated"), byte_level(use_regex=False)])


def train_byte_level(pre_tokenizer: pre_tokenizers.PreTokenizer) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizer
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=1000, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(SENTENCES * 9, trainer)
    tokenizer.add_special_tokens(["<|endoftext|>", "</s>", "<pad>"])
    tokenizer.add_tokens(["<mask>"])
    return tokenizer


def train_unigram(pre_tokenizer: pre_tokenizers.PreTokenizer, normalizer: normalizers.Normalizer) -> Tokenizer:
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer, tokenizer.normalizer = pre_tokenizer, normalizer
    trainer = trainers.UnigramTrainer(
        vocab_size=300, special_tokens=["<pad>", "</s>", "<unk>"], unk_token="<unk>", show_progress=False
    )
    tokenizer.train_from_iterator(SENTENCES * 9, trainer)
    tokenizer.add_tokens(["<extra_id_0>"])
    return tokenizer


def sentencepiece_bpe(*, crossing: bool = False) -> Tokenizer:
    """Llama 2's form: every space a mark, the text one word, unknown characters as bytes."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(split=not crossing)
    trainer = trainers.BpeTrainer(vocab_size=400, show_progress=False)
    tokenizer.train_from_iterator(SENTENCES * 9, trainer)
    model = json.loads(tokenizer.to_str())["model"]
    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2, **{f"<0x{byte:02X}>": 3 + byte for byte in range(256)}}
    for piece in model["vocab"]:
        vocabulary.setdefault(piece, len(vocabulary))
    merges = [tuple(merge) for merge in model["merges"]]
    llama = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    llama.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    llama.add_special_tokens(["<unk>", "<s>", "</s>"])
    return llama


TRAINED: dict[str, Callable[[], Tokenizer]] = {
    "GPT-2": lambda: train_byte_level(byte_level()),
    "GPT-2, prefix space": lambda: train_byte_level(byte_level(add_prefix_space=True)),
    "BLOOM": lambda: train_byte_level(split(BLOOM_SPLIT)),
    **{name: (lambda pattern=pattern: train_byte_level(split(pattern))) for pattern, name in SPLITS.items()},
    "mT5": lambda: train_unigram(
        pre_tokenizers.Metaspace(),
        normalizers.Sequence([normalizers.NFKC(), normalizers.Replace(Regex(" {2,}"), " "), normalizers.Strip()]),
    ),
    "Unigram of words": lambda: train_unigram(
        pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace()]),
        normalizers.Sequence([normalizers.Nmt(), normalizers.NFKC(), normalizers.Lowercase()]),
    ),
    "sentencepiece BPE": sentencepiece_bpe,
}


@cache
def trained(name: str) -> Tokenizer:
    return TRAINED[name]()


def rule_of(backend: Tokenizer) -> SegmentRule | NoSegments:
    return find_segment_rule(json.loads(backend.to_str()))


def assert_equal(encoder: SegmentEncoder, backend: Tokenizer, texts: Sequence[str], prefix: str) -> None:
    whole = backend.encode_batch([prefix + text for text in texts], add_special_tokens=False)
    for text, encoding, ids in zip(texts, whole, encoder.encode(texts, prefix=prefix), strict=True):
        assert np.frombuffer(ids, np.int32).tolist() == encoding.ids, (prefix, text)


def check(backend: Tokenizer, rule: SegmentRule | NoSegments, *, examples: int = 150) -> None:
    """Compare on drawn texts; the encoder is kept over all of them, with so little memory that it forgets."""
    encoder = SegmentEncoder(backend, rule, dtype=np.dtype("int32"), memory_bytes=1 << 16)

    @settings(
        max_examples=examples, deadline=None, database=None, derandomize=True, suppress_health_check=list(HealthCheck)
    )
    @given(st.lists(TEXT, max_size=4), st.sampled_from(["", " ", "\n", "x"]))
    def compare(texts: list[str], prefix: str) -> None:
        assert_equal(encoder, backend, [*texts, *texts[:1]], prefix)

    compare()


@pytest.mark.parametrize("name", list(TRAINED))
def test_ids_equal_those_of_whole_texts(name: str) -> None:
    rule = rule_of(trained(name))
    assert isinstance(rule, SegmentRule)
    check(trained(name), rule)
    check_pairs(trained(name), rule)


def check_pairs(backend: Tokenizer, rule: SegmentRule | NoSegments) -> None:
    """Every word of the list on either side of a cut, and every gap between two words."""
    encoder = SegmentEncoder(backend, rule, dtype=np.dtype("int32"))
    assert_equal(encoder, backend, [f"{a} {b} c" for a in WORDS for b in WORDS[::5]], "")
    assert_equal(encoder, backend, [f"x {a}" for a in WORDS], "")  # known now, so that what follows is made of them
    assert_equal(encoder, backend, [f"x {a}{end} {a}" for a in WORDS for end in ENDS], "")
    assert_equal(encoder, backend, [f"{a}{gap}{b}" for a in WORDS[::4] for gap in GAPS for b in WORDS[::9]], " ")


REAL = ["t5-small", "whisper-large-v3", "gpt2", "gpt2 split as BLOOM"]


@pytest.mark.parametrize("name", REAL)
def test_real_tokenizers(shared_data: Path, name: str) -> None:
    backend = real_tokenizer(shared_data, name)
    rule = rule_of(backend)
    assert isinstance(rule, SegmentRule)
    check(backend, rule, examples=40)
    encoder = SegmentEncoder(backend, rule, dtype=np.dtype("int32"))
    for texts in real_texts(shared_data, limit=20):
        assert_equal(encoder, backend, texts, " ")


@pytest.mark.slow
@pytest.mark.parametrize("name", REAL)
def test_real_tokenizers_on_all_real_data(shared_data: Path, name: str) -> None:
    backend = real_tokenizer(shared_data, name)
    encoder = SegmentEncoder(backend, rule_of(backend), dtype=np.dtype("int32"))
    for texts in real_texts(shared_data, limit=1 << 30):
        assert_equal(encoder, backend, texts, " ")


def real_tokenizer(shared_data: Path, name: str) -> Tokenizer:
    folder = shared_data / "tokenizers"
    if not name.startswith("gpt2"):
        return Tokenizer.from_file(str(folder / name / "tokenizer.json"))
    files = [str(folder / "gpt2" / file) for file in ("gpt2.vocab", "gpt2.merges.txt")]
    backend = Tokenizer(models.BPE.from_file(*files))
    backend.pre_tokenizer = byte_level() if name == "gpt2" else split(BLOOM_SPLIT)
    return backend


def real_texts(shared_data: Path, *, limit: int) -> Iterator[list[str]]:
    """Yield the first lines of every text file, four at a time as they are: prompts, JSON, tables, in all languages."""
    for path in sorted(shared_data.rglob("*")):
        if path.suffix in (".txt", ".tsv", ".jsonl", ".csv", ".yaml") and path.is_file():
            lines = path.read_text(encoding="utf-8").split("\n")
            yield ["\n".join(lines[place : place + 4]) for place in range(0, min(len(lines), limit), 4)]


def cut_everywhere(rule: SegmentRule) -> SegmentRule:
    class Wrong(SegmentRule):
        def plain_end(self, text: str) -> bool:
            return True

        def plain_start(self, text: str) -> bool:
            return True

    return Wrong(**{**rule.__dict__, "normalized": False})


# WhitespaceSplit takes every space away, so that a cut before any is right once the normaliser leaves it alone.
@pytest.mark.parametrize("name", [name for name in TRAINED if name != "Unigram of words"])
def test_wrong_rules_are_seen(name: str) -> None:
    rule = rule_of(trained(name))
    assert isinstance(rule, SegmentRule)
    with pytest.raises(AssertionError):
        check(trained(name), cut_everywhere(rule))
        check_pairs(trained(name), cut_everywhere(rule))


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("BLOOM", {"excluded": ""}),
        ("sentencepiece BPE", {"start_differs": False}),
    ],
)
def test_almost_right_rules_are_seen(name: str, change: dict[str, object]) -> None:
    rule = rule_of(trained(name))
    assert isinstance(rule, SegmentRule)
    with pytest.raises(AssertionError):
        check(trained(name), replace(rule, **change))
        check_pairs(trained(name), replace(rule, **change))


def test_pieces_that_go_on_behind_a_space_are_refused_and_would_be_seen() -> None:
    backend = sentencepiece_bpe(crossing=True)
    rule = rule_of(backend)
    assert isinstance(rule, NoSegments) and "goes on behind a space" in rule.reason
    check(backend, rule, examples=40)
    wrong = rule_of(trained("sentencepiece BPE"))
    encoder = SegmentEncoder(backend, wrong, dtype=np.dtype("int32"))
    with pytest.raises(AssertionError):
        assert_equal(encoder, backend, SENTENCES, "")


def refused() -> Iterator[tuple[str, Callable[[Tokenizer], None]]]:
    def pre_tokenizer(value: pre_tokenizers.PreTokenizer) -> Callable[[Tokenizer], None]:
        return lambda tokenizer: setattr(tokenizer, "pre_tokenizer", value)

    def normalizer(value: normalizers.Normalizer) -> Callable[[Tokenizer], None]:
        return lambda tokenizer: setattr(tokenizer, "normalizer", value)

    yield (
        "pre-tokeniser (Punctuation, ByteLevel)",
        pre_tokenizer(pre_tokenizers.Sequence([pre_tokenizers.Punctuation(), byte_level()])),
    )
    yield "pattern", pre_tokenizer(split(r"\w+ \w+|\s+"))
    yield "splits nowhere", pre_tokenizer(byte_level(use_regex=False))
    yield "replaces 'a b'", normalizer(normalizers.Replace("a b", "c"))
    yield "BertNormalizer", normalizer(normalizers.BertNormalizer())
    yield "holds a space", lambda tokenizer: tokenizer.add_tokens(["new york"])


@pytest.mark.parametrize(
    ("reason", "change"), list(refused()), ids=lambda value: value if isinstance(value, str) else ""
)
def test_what_is_not_known_is_encoded_whole(reason: str, change: Callable[[Tokenizer], None]) -> None:
    backend = train_byte_level(byte_level())
    change(backend)
    rule = rule_of(backend)
    assert isinstance(rule, NoSegments) and reason in rule.reason
    check(backend, rule, examples=30)


def test_memory_is_bounded() -> None:
    backend, limit = trained("GPT-2"), 1 << 18
    rule = rule_of(backend)
    encoder = SegmentEncoder(backend, rule, dtype=np.dtype("int32"), memory_bytes=limit)
    seen = 0
    for start in range(0, 6_000, 500):
        assert_equal(encoder, backend, [f"word{start + n} and {n}" for n in range(500)], "")
        seen = max(seen, encoder.remembered_bytes)
    assert limit // 4 < seen <= limit + 500 * 300, "one call's new segments may come on top"
