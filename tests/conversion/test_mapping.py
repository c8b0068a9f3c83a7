"""Every parameter is matched exactly once, in both directions, or the rest is named."""

import re

import pytest

from megatron_xmtf.conversion.bloom_mapping import bloom_mapping
from megatron_xmtf.conversion.mapping import check_shapes, expand_rows, match_names
from megatron_xmtf.errors import CheckpointError
from megatron_xmtf.models.architecture import BloomArchitecture
from tests.tiny import tiny_bloom

ARCHITECTURE = BloomArchitecture(hidden_size=16, num_layers=2, num_attention_heads=2, vocab_size=300)
BLOOM = bloom_mapping(ARCHITECTURE)


def hf_shapes() -> dict[str, tuple[int, ...]]:
    state = tiny_bloom(hidden_size=16, layers=2, heads=2).state_dict()
    return {name: tuple(tensor.shape) for name, tensor in state.items() if name != "lm_head.weight"}


def test_rows_are_the_parameters_of_transformers() -> None:
    expanded = expand_rows(BLOOM, prefix=BLOOM.prefix)
    assert {parameter.hf[0]: parameter.shape for parameter in expanded} == hf_shapes()
    assert len({parameter.ours for parameter in expanded}) == len(expanded) == 2 * 12 + 5


def test_only_the_vocabulary_is_padded() -> None:
    padded = [p for p in expand_rows(BLOOM) if p.shape != p.padded_shape]
    assert [(p.ours, p.padded_shape) for p in padded] == [("embedding.word_embeddings.weight", (384, 16))]


def test_both_spellings_and_a_tied_head_match() -> None:
    names = list(hf_shapes())
    bare = [name.removeprefix("transformer.") for name in names]
    for spelling in (names, [*names, "lm_head.weight"], bare):
        matched = match_names(BLOOM, names=spelling, what="model", side="hf")
        assert {parameter.hf[0] for parameter in matched} == set(spelling) - {"lm_head.weight"}


@pytest.mark.parametrize("side", ["hf", "ours"])
def test_missing_and_unexpected_names_are_listed(side: str) -> None:
    expanded = expand_rows(BLOOM, prefix=BLOOM.prefix)
    names = [parameter.hf[0] if side == "hf" else parameter.ours for parameter in expanded]
    with pytest.raises(CheckpointError, match=rf"missing \(1\): {re.escape(names[5])}; unexpected \(1\): score.weight"):
        changed = [*names[:5], *names[6:], "score.weight"]
        match_names(BLOOM, names=changed, what="model", side=side)  # type: ignore[arg-type]


def test_names_in_both_spellings_at_once_are_unexpected() -> None:
    names = [*hf_shapes(), "ln_f.weight"]
    with pytest.raises(CheckpointError, match=r"unexpected \(1\): ln_f.weight"):
        match_names(BLOOM, names=names, what="model", side="hf")


def test_wrong_shapes_are_listed_with_both() -> None:
    matched = match_names(BLOOM, names=hf_shapes(), what="model", side="hf")
    shapes = {**hf_shapes(), "transformer.ln_f.bias": (17,)}
    with pytest.raises(CheckpointError, match=r"ln_f.bias is \[17\] instead of \[16\]"):
        check_shapes(matched, shapes, what="model", side="hf")
