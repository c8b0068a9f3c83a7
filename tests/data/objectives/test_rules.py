"""What each objective makes of a text: worked by hand, T5's published example, and invariants on thousands of texts."""

from collections import Counter

import numpy as np
import pytest

from megatron_xmtf.config.load import config_from_mapping
from megatron_xmtf.config.objective import ObjectiveConfig
from megatron_xmtf.config.row_lengths import EncoderDecoderLengths
from megatron_xmtf.data.objectives.alexatm_denoising import AlexaTMDenoising
from megatron_xmtf.data.objectives.chunks import Chunks
from megatron_xmtf.data.objectives.counter_random import chunk_keys, key_of, occurrence_key, occurrence_keys
from megatron_xmtf.data.objectives.document_split import DocumentSplit, cut_range
from megatron_xmtf.data.objectives.resolve import build_rule, choose_chunk_length
from megatron_xmtf.data.objectives.span_corruption import SpanCorruption, with_sentinels
from megatron_xmtf.data.tokenizer import Tokenizer
from megatron_xmtf.errors import ConfigError, TokenizerError
from tests.tiny import write_tiny_tokenizer

EOS, CLM = 1, 3
SENTINELS = tuple(range(999, 899, -1))
RULES = {
    "alexatm_denoising": AlexaTMDenoising(0.15, 3.0, (), EOS),
    "span_corruption": SpanCorruption(0.15, 3.0, SENTINELS, (), EOS),
    "span_corruption, half": SpanCorruption(0.5, 3.0, tuple(range(9999, 8999, -1)), (50, 51), EOS),
    "causal": DocumentSplit(0.2, 0.8, (CLM,), EOS),
    "prefix_lm": DocumentSplit(0.0, 1.0, (), EOS),
    "causal, moving": DocumentSplit(0.2, 0.8, (CLM,), EOS, cut_moves=True),
}


def special_tokenizer(directory, *, sentinels=8, clm=True, start=""):
    names = [f"{start}<extra_id_{number}>" for number in reversed(range(sentinels))]
    write_tiny_tokenizer(directory, special=("<pad>", "</s>", "<unk>", *(["[CLM]"] if clm else []), *names))
    return Tokenizer.load(directory)


def test_published_example_of_t5():
    words = "Thank you for inviting me to your party last week".split()
    dropped = np.array([word in ("for", "inviting", "last") for word in words])
    tokens, sentinels = np.arange(10, 20, dtype=np.int32), np.array([99, 98, 97], np.int32)
    name = {**dict(zip(range(10, 20), words, strict=True)), 99: "<X>", 98: "<Y>", 97: "<Z>"}
    inputs = [name[i] for i in with_sentinels(tokens, dropped, sentinels).tolist()]
    targets = [name[i] for i in with_sentinels(tokens, ~dropped, sentinels).tolist()]
    assert inputs == "Thank you <X> me to your party <Y> week".split()
    # Figure 2 prints the targets from the first sentinel on; the run of kept tokens before it is that sentinel.
    assert targets == "<X> for inviting <Y> last <Z>".split()


def example(rule, tokens, *, is_end=True, number=0, occurrence=0):
    chunk_key = int(chunk_keys(np.array([number], np.uint64), key=key_of("test"))[0])
    noise_key = occurrence_key(chunk_key, occurrence)
    return rule.example(np.asarray(tokens, np.int32), is_end=is_end, chunk_key=chunk_key, noise_key=noise_key)


@pytest.mark.parametrize("name", RULES)
def test_lengths_are_those_of_the_examples(name):
    rule, generator = RULES[name], np.random.default_rng(1)
    tokens = np.concatenate([np.arange(2, 60), generator.integers(2, 600, 1000)])
    is_end = generator.random(len(tokens)) < 0.5
    keys = chunk_keys(np.arange(len(tokens), dtype=np.uint64), key=key_of("test"))
    most_inputs, most_targets, most = rule.most(tokens)
    cuts, sums = [], []
    for occurrence in (0, 10**9):
        own = occurrence_keys(keys, np.full(len(keys), occurrence, np.uint64)) if rule.cut_moves else keys
        inputs, targets = rule.lengths(tokens, is_end=is_end, keys=own)
        for number, length in enumerate(tokens.tolist()):
            made = example(rule, np.arange(length), is_end=is_end[number], number=number, occurrence=occurrence)
            assert (len(made[0]), len(made[1])) == (inputs[number], targets[number]), length
            assert made[0].dtype == made[1].dtype == np.int32
        assert (inputs <= most_inputs).all() and (targets <= most_targets).all() and (inputs + targets <= most).all()
        cuts.append(inputs.tolist())
        sums.append((inputs + targets).tolist())
    assert sums[0] == sums[1] and (cuts[0] != cuts[1]) == rule.cut_moves
    short = rule.lengths(np.array([0, 1]), is_end=np.ones(2, np.bool_), keys=keys[:2])
    assert [part.tolist() for part in short] == [[0, 0], [0, 0]]


def test_span_corruption_has_t5s_lengths_and_both_sides_rebuild_the_text():
    rule = RULES["span_corruption"]
    for number, length in enumerate(range(2, 500, 7)):
        tokens = np.arange(10000, 10000 + length)
        inputs, targets = (part.tolist() for part in example(rule, tokens, number=number))
        noise = min(max(round(0.15 * length), 1), length - 1)
        spans = max(round(noise / 3), 1)
        assert (len(inputs), len(targets)) == (length - noise + spans + 1, noise + spans + 1)
        assert inputs[-1] == targets[-1] == EOS
        marks = [i for i in inputs if i in SENTINELS]
        assert marks == list(SENTINELS[:spans]) == [i for i in targets if i in SENTINELS], "descending, each once"
        # What stands between two sentinels of the targets goes to the place of the first in the inputs.
        spans_of, current = {}, None
        for token in targets[:-1]:
            if token in SENTINELS:
                current = spans_of.setdefault(token, [])
            else:
                current.append(token)
        rebuilt = [t for i in inputs[:-1] for t in spans_of.get(i, [i])]
        assert rebuilt == tokens.tolist()


def test_denoising_leaves_no_trace_and_targets_are_the_text():
    rule, dropped_share = RULES["alexatm_denoising"], []
    for number in range(300):
        tokens = np.arange(10000, 10200)
        inputs, targets = (part.tolist() for part in example(rule, tokens, number=number))
        assert targets == [*tokens.tolist(), EOS] and inputs[-1] == EOS
        assert inputs[:-1] == sorted(set(inputs[:-1])) and set(inputs[:-1]) <= set(tokens.tolist()), (
            "in order, no marks"
        )
        dropped_share.append(1 - (len(inputs) - 1) / 200)
    assert dropped_share == pytest.approx([0.15] * 300)


@pytest.mark.parametrize("over", ["documents", "occurrences of one document"])
@pytest.mark.parametrize(("name", "low", "high"), [("causal", 0.2, 0.8), ("prefix_lm", 0.0, 1.0)])
def test_cuts_are_uniform(name, low, high, over):
    rule, length, draws = RULES[name], 50, 40000
    numbers = np.arange(draws, dtype=np.uint64)
    keys = chunk_keys(numbers, key=key_of("cuts"))
    if over != "documents":
        keys = occurrence_keys(np.full(draws, keys[7]), numbers)
    cuts = Counter(rule.cuts(np.full(draws, length), keys).tolist())
    places = range(max(1, round(low * length)), min(length - 1, round(high * length)) + 1)
    assert set(cuts) == set(places)
    expected = draws / len(places)
    square = sum((cuts[place] - expected) ** 2 / expected for place in places)
    degrees = len(places) - 1
    assert square < degrees + 3.3 * (2 * degrees) ** 0.5 + 6, "about 99.9 % of chi-square"


def test_causal_example_by_hand():
    inputs, targets = example(RULES["causal"], [21, 22, 23], number=3)
    assert (inputs.tolist(), targets.tolist()) in [([CLM, 21], [22, 23, EOS]), ([CLM, 21, 22], [23, EOS])]
    inputs, targets = example(RULES["causal"], [21, 22], is_end=False)
    assert (inputs.tolist(), targets.tolist()) == ([CLM, 21], [22]), "the document goes on: no EOS"
    inputs, targets = example(RULES["prefix_lm"], [21, 22])
    assert (inputs.tolist(), targets.tolist()) == ([21], [22, EOS])
    least, most = cut_range(np.array([2, 3, 5, 15, 20]), minimum=0.2, maximum=0.8)
    assert (least.tolist(), most.tolist()) == ([1, 1, 1, 3, 4], [1, 2, 4, 12, 16])


def test_noise_differs_between_occurrences_and_the_cut_where_it_moves():
    tokens = np.arange(100, 200)
    for name in ("alexatm_denoising", "span_corruption"):
        made = {tuple(example(RULES[name], tokens, occurrence=place)[0].tolist()) for place in range(20)}
        assert len(made) == 20
        again = example(RULES[name], tokens, occurrence=7)[0].tolist()
        assert tuple(again) in made and again == example(RULES[name], tokens, occurrence=7)[0].tolist()
    for name in ("causal", "prefix_lm"):
        assert len({tuple(example(RULES[name], tokens, occurrence=place)[0].tolist()) for place in range(20)}) == 1
        assert len({len(example(RULES[name], tokens, number=number)[0]) for number in range(20)}) > 8
    moving = [example(RULES["causal, moving"], tokens, occurrence=place) for place in range(20)]
    assert len({len(inputs) for inputs, _ in moving}) > 8
    assert {tuple([*inputs[1:], *targets]) for inputs, targets in moving} == {(*tokens.tolist(), EOS)}
    keys = [1, 2**63, 2**64 - 1]
    together = occurrence_keys(np.array(keys, np.uint64), np.array([0, 5, 10**12], np.uint64))
    assert together.tolist() == [occurrence_key(*pair) for pair in zip(keys, (0, 5, 10**12), strict=True)]


def test_chunks_worked_by_hand():
    chunks = Chunks(np.array([5, 13, 0, 10], np.int32), chunk_length=6)
    assert len(chunks) == 7
    lengths, is_end = chunks.lengths(0, 7)
    assert lengths.tolist() == [5, 6, 5, 2, 0, 6, 4]
    assert is_end.tolist() == [True, False, False, True, True, False, True]
    assert chunks.documents.tolist() == [0, 1, 1, 1, 2, 3, 3]
    assert [chunks.locate(chunk) for chunk in range(7)] == [
        (0, 0, 5, True),
        (1, 0, 6, False),
        (1, 6, 5, False),
        (1, 11, 2, True),
        (2, 0, 0, True),
        (3, 0, 6, False),
        (3, 6, 4, True),
    ]


@pytest.mark.parametrize("chunk_length", [3, 4, 10, 64, 1000])
def test_chunks_lose_nothing_and_leave_no_single_token(chunk_length):
    documents = np.arange(0, 400, dtype=np.int32)
    chunks = Chunks(documents, chunk_length=chunk_length)
    lengths, _ = chunks.lengths(0, len(chunks))
    assert lengths.max() <= chunk_length and (lengths < 2).sum() == 2, "the documents of 0 and of 1 token alone"
    parts = [[] for _ in documents]
    for chunk in range(len(chunks)):
        document, first, length, is_end = chunks.locate(chunk)
        assert (length, document) == (lengths[chunk], chunks.documents[chunk])
        assert is_end == (first + length == documents[document])
        parts[document] += range(first, first + length)
    assert parts == [list(range(length)) for length in documents]
    split = [chunks.lengths(begin, min(begin + 17, len(chunks)))[0] for begin in range(0, len(chunks), 17)]
    assert np.concatenate(split).tolist() == lengths.tolist(), "any block alone gives the same"


def test_chunk_length_of_t5(tmp_path):
    # 568 and 114 are T5's own: random_spans_helper for inputs of 512.
    rule = build_rule(ObjectiveConfig(name="span_corruption"), special_tokenizer(tmp_path, sentinels=100))
    assert rule.sentinels[0] == rule.sentinels[99] + 99, "descending: <extra_id_0> is the last of them"
    assert choose_chunk_length(ObjectiveConfig(name="span_corruption"), rule, EncoderDecoderLengths(512, 114)) == 568
    assert choose_chunk_length(ObjectiveConfig(name="span_corruption"), rule, EncoderDecoderLengths(512, 113)) < 568
    few = SpanCorruption(0.15, 3.0, SENTINELS[:5], (), EOS)
    longest = choose_chunk_length(ObjectiveConfig(name="span_corruption"), few, EncoderDecoderLengths(512, 114))
    assert few.spans(np.array([longest, longest + 1])).tolist() == [5, 6], "as far as five sentinels reach"


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize(
    ("lengths", "encoder", "decoder", "whole"),
    [
        (EncoderDecoderLengths(64, 64, encoder_eos=False), 64, 64, 128),
        (EncoderDecoderLengths(64, 16, encoder_eos=False), 64, 16, 80),
        (EncoderDecoderLengths(16, 64, encoder_eos=True), 16, 64, 80),
        (64, 65, 65, 65),
    ],
)
def test_chosen_chunks_fit_and_one_more_token_does_not(name, lengths, encoder, decoder, whole):
    rule, objective = RULES[name], ObjectiveConfig(name=name.split(",")[0])
    longest = choose_chunk_length(objective, rule, lengths)
    inputs, targets, together = rule.most(np.arange(2, longest + 2))
    # Rows that end every input with EOS do so for inputs that have none of their own: those of a cut.
    if encoder == 16 and not rule.ends_inputs:
        inputs = inputs + 1
    fits = (inputs <= encoder) & (targets <= decoder) & (together <= whole)
    assert fits[:-1].all() and not fits[-1]
    with pytest.raises(ConfigError, match=f"enough for {longest}"):
        choose_chunk_length(objective.model_copy(update={"chunk_length": longest + 1}), rule, lengths)
    assert choose_chunk_length(objective.model_copy(update={"chunk_length": 3}), rule, lengths) == 3


def test_special_tokens_are_found_by_name_or_refused(tmp_path):
    tokenizer = special_tokenizer(tmp_path / "a", sentinels=3)
    assert build_rule(ObjectiveConfig(name="causal"), tokenizer).prefix == (CLM,)
    assert build_rule(ObjectiveConfig(name="span_corruption"), tokenizer).sentinels == (6, 5, 4)
    marked = special_tokenizer(tmp_path / "b", sentinels=2, clm=False, start="▁")
    assert build_rule(ObjectiveConfig(name="span_corruption"), marked).sentinels == (4, 3), "as mT5 spells them"
    with pytest.raises(TokenizerError, match=r"'\[CLM\]' is no word of the vocabulary"):
        build_rule(ObjectiveConfig(name="causal"), marked)
    bare = special_tokenizer(tmp_path / "c", sentinels=0)
    with pytest.raises(TokenizerError, match="no sentinel '<extra_id_0>'"):
        build_rule(ObjectiveConfig(name="span_corruption"), bare)
    text = build_rule(ObjectiveConfig(name="prefix_lm", prefix_text="[S2S] "), bare)
    assert text.prefix == tuple(tokenizer_ids(bare, "[S2S] ")) and len(text.prefix) == 6
    assert build_rule(ObjectiveConfig(name="causal", prefix_token=""), bare).prefix == ()


def tokenizer_ids(tokenizer, text):
    return tokenizer.backend.encode(text, add_special_tokens=False).ids


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"name": "causal", "noise_density": 0.1},
            "causal has no noise_density; that is a setting of alexatm_denoising",
        ),
        ({"name": "alexatm_denoising", "sentinel": "<{}>"}, "has no sentinel"),
        ({"name": "span_corruption", "noise_density": 0.7}, "noise_density"),
        ({"name": "span_corruption", "sentinel": "<mask>"}, "must have one {}"),
        ({"name": "causal", "minimum_inputs": 0.9}, "minimum_inputs=0.9 is more than maximum_inputs=0.8"),
        ({"name": "causal", "prefix_token": "[CLM]", "prefix_text": "x"}, "one of prefix_token and prefix_text"),
        ({"name": "denoising"}, "name"),
        ({"name": "causal", "chunk_lenght": 5}, "nearest|did you mean|chunk_length"),
    ],
)
def test_settings_that_make_no_sense_are_refused(values, message):
    with pytest.raises(ConfigError, match=message):
        config_from_mapping(values, ObjectiveConfig, source="test")


def test_a_text_takes_the_place_of_the_token():
    assert ObjectiveConfig(name="causal").prefix_token == "[CLM]"
    own = ObjectiveConfig(name="causal", prefix_text="Continue: ")
    assert (own.prefix_token, own.prefix_text) == (None, "Continue: ")
    resolved = ObjectiveConfig(name="span_corruption")
    assert ObjectiveConfig(**resolved.model_dump()) == resolved, "a resolved configuration reads as itself"
    assert ObjectiveConfig(**own.model_dump()) == own
