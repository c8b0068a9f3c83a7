"""A run with `batch.prefix_lm`: what it trains on, how its checkpoint is asked, and what transformers must not be."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, BloomForCausalLM

from megatron_xmtf.checkpoint.directory import find_checkpoint
from megatron_xmtf.checkpoint.manifest import open_manifest
from megatron_xmtf.cli import main
from megatron_xmtf.config import ParallelConfig, RunConfig, config_from_mapping
from megatron_xmtf.conversion.huggingface import import_huggingface
from megatron_xmtf.conversion.huggingface_export import export_huggingface
from megatron_xmtf.data.batch import build_batch
from megatron_xmtf.data.rows import Row, pack_examples
from megatron_xmtf.errors import ConfigError, ConfigMismatchError
from megatron_xmtf.evaluation import evaluate as evaluation
from megatron_xmtf.evaluation.huggingface import HuggingFaceBackend
from megatron_xmtf.parallel.launch import run_ranks
from megatron_xmtf.training.metrics import StepCounts
from megatron_xmtf.training.prepare import open_training_rows, prepare_run
from megatron_xmtf.training.resume import check_same_run
from megatron_xmtf.training.trainer import train_rank
from tests.layouts import PP, TP
from tests.prefix_lm import greedy_answer, prefix_logits, score
from tests.tiny import random_examples

BATCH = {"micro_batch_size": 2, "global_batch_size": 8, "sequence_length": 64, "prefix_lm": True}
PAIRS = random_examples(24, seed=9, longest=24)
PROMPTS = [inputs for inputs, _ in random_examples(40, seed=9, longest=24)]
STEPS = 3


def examples_of(rows: list[Row]) -> list[tuple[list[int], list[int]]]:
    """Take rows apart by hand."""
    found = []
    for row in rows:
        for segment in range(1, len(row.example_ids) + 1):
            own = row.segment_ids == segment
            found.append((row.tokens[own & ~row.is_target].tolist(), row.tokens[own & row.is_target].tolist()))
    return found


def mean_loss(model: BloomForCausalLM, examples: list[tuple[list[int], list[int]]], *, causal: bool = False) -> float:
    """Return the mean over targets of their mean token loss."""
    return -sum(score(model, *example, causal=causal) / len(example[1]) for example in examples) / len(examples)


@dataclass(frozen=True)
class Trained:
    config: RunConfig
    checkpoint: Path
    metrics: list[dict[str, Any]]
    hf: Path
    """Its weights in the Hugging Face form, written on request."""
    model: BloomForCausalLM


@pytest.fixture(scope="module")
def trained(tiny_checkpoint: Path, tiny_pairs: Path, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """A run of three steps at TP2, measured on its own data."""
    from tests.conftest import make_run_config

    directory = tmp_path_factory.mktemp("prefix_lm")
    config = make_run_config(tiny_checkpoint, tiny_pairs, directory)(
        batch=BATCH,
        parallel={TP: 2, "sequence_parallel": True},
        schedule={"train_steps": STEPS},
        data={"train": [{"prefix": str(tiny_pairs)}], "validation": [{"prefix": str(tiny_pairs), "name": "seen"}]},
        evaluation={"interval": STEPS, "rows": 4},
        loss={"normalization": "target_sequence"},
    )
    run_ranks(train_rank, world_size=2, arguments=(prepare_run(config, world_size=2),))
    lines = (Path(config.output) / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    export_huggingface(config.output, directory / "hf", allow_causal=True)
    model = BloomForCausalLM.from_pretrained(directory / "hf", dtype=torch.float32).eval()
    return Trained(
        config, find_checkpoint(config.output), [json.loads(line) for line in lines], directory / "hf", model
    )


def test_a_step_trains_on_inputs_read_in_both_directions(trained: Trained, tiny_hf: Path) -> None:
    rows = open_training_rows(prepare_run(trained.config, world_size=2))
    examples = examples_of([rows[number] for number in range(8)])
    before = BloomForCausalLM.from_pretrained(tiny_hf, dtype=torch.float32).eval()
    expected = mean_loss(before, examples)
    assert trained.metrics[0]["loss"] == pytest.approx(expected, rel=1e-5)
    causal = mean_loss(before, examples, causal=True)
    assert abs(causal - expected) > 1e-3 * expected, "the comparison must mean something"


def test_validation_reads_inputs_in_both_directions(trained: Trained) -> None:
    from megatron_xmtf.training.prepare import open_validation_rows

    _, rows = open_validation_rows(prepare_run(trained.config, world_size=2))["seen"]
    expected = mean_loss(trained.model, examples_of([rows[number] for number in range(4)]))
    assert trained.metrics[-1]["loss/seen"] == pytest.approx(expected, rel=1e-5)


NEW_TOKENS = 3


def ask(pairs: Any, prompts: Any, *, backend: Any, tokenizer: Any, show_progress: bool) -> Any:
    """Runs in every rank."""
    return backend.score(pairs), backend.generate(prompts, max_new_tokens=NEW_TOKENS, eos_id=tokenizer.eos_id)


@pytest.fixture(scope="module")
def answers(trained: Trained) -> list[list[int]]:
    """What `transformers` answers with a mask, which neither a causal model would, nor one that takes its own words
    for inputs."""
    model, eos_id = trained.model, AutoTokenizer.from_pretrained(trained.hf).eos_token_id
    expected = [greedy_answer(model, prompt, max_new_tokens=NEW_TOKENS, eos_id=eos_id) for prompt in PROMPTS]
    causal = HuggingFaceBackend(model).generate(PROMPTS, max_new_tokens=NEW_TOKENS, eos_id=eos_id)
    assert causal != expected
    assert [_answer_as_inputs(model, prompt) for prompt in PROMPTS] != expected
    return expected


def _answer_as_inputs(model: BloomForCausalLM, prompt: list[int]) -> list[int]:
    text = list(prompt)
    with torch.no_grad():
        for _ in range(NEW_TOKENS):
            text.append(int(prefix_logits(model, text, [])[-1].argmax()))
    return text[len(prompt) :]


@pytest.mark.parametrize(
    ("world_size", "sizes"), [(1, {}), (2, {TP: 2, "sequence_parallel": True}), (4, {TP: 2, PP: 2})]
)
def test_scores_and_greedy_answers_equal_transformers_with_a_mask(
    trained: Trained, answers: list[list[int]], world_size: int, sizes: dict[str, Any]
) -> None:
    scores = [score(trained.model, *pair) for pair in PAIRS]
    arguments = (trained.checkpoint, ParallelConfig(**sizes), "fp32", ask, (PAIRS, PROMPTS))
    for found, generated in run_ranks(evaluation._on_checkpoint, world_size=world_size, arguments=arguments):
        assert found == pytest.approx(scores, abs=1e-4)
        assert generated == answers


def test_an_export_must_be_allowed_and_says_so(
    trained: Trained, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["export", "--checkpoint", str(trained.config.output), "--output", str(tmp_path / "hf")]
    assert main(arguments) == 2
    assert "read inputs in both directions" in capsys.readouterr().err and not (tmp_path / "hf").exists()
    assert main([*arguments, "--allow-causal"]) == 0
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["prefix_lm"] is True
    assert "**Prefix-LM.**" in (tmp_path / "hf" / "README.md").read_text()
    with pytest.raises(ConfigError, match="transformers reads them causally"):
        HuggingFaceBackend.load(tmp_path / "hf")
    verify = ["verify", "--checkpoint", str(trained.config.output), "--hf", str(tmp_path / "hf")]
    capsys.readouterr()
    assert main(verify) == 2
    assert "differ by design" in capsys.readouterr().err
    assert main([*verify, "--weights-only"]) == 0


def test_an_import_of_such_an_export_is_asked_as_it_was_trained(trained: Trained, tmp_path: Path) -> None:
    import_huggingface(trained.hf, tmp_path / "again")
    assert open_manifest(tmp_path / "again").config is None
    arguments = (tmp_path / "again", ParallelConfig(), "fp32", ask, (PAIRS, []))
    [(found, _)] = run_ranks(evaluation._on_checkpoint, world_size=1, arguments=arguments)
    assert found == pytest.approx([score(trained.model, *pair) for pair in PAIRS], abs=1e-4)
    with pytest.raises(ConfigError, match="read inputs in both directions"):
        export_huggingface(tmp_path / "again", tmp_path / "hf")


def test_a_causal_run_takes_the_mark_off(
    trained: Trained, tmp_path: Path, run_config: Callable[..., RunConfig]
) -> None:
    config = run_config(model=str(trained.hf), schedule={"train_steps": 1})
    run_ranks(train_rank, world_size=1, arguments=(prepare_run(config, world_size=1),))
    export_huggingface(config.output, tmp_path / "hf")
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["prefix_lm"] is False
    assert "Prefix-LM" not in (tmp_path / "hf" / "README.md").read_text()


def test_the_same_run_without_it_is_refused(trained: Trained) -> None:
    saved = open_manifest(trained.checkpoint).config
    assert saved is not None
    changed = config_from_mapping(
        {**saved, "batch": {**saved["batch"], "prefix_lm": False}}, RunConfig, source="a changed run"
    )
    with pytest.raises(ConfigMismatchError, match=r"batch\.prefix_lm: True -> False"):
        check_same_run(changed, saved, allowed_changes=[])


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        (
            {"batch": {"encoder_length": 32, "decoder_length": 16, "prefix_lm": True}},
            "prefix_lm=true is for decoder-only models, and batch.encoder_length=32",
        ),
        ({"batch": BATCH, "checkpoint": {"export_huggingface": "last"}}, "transformers would read inputs causally"),
    ],
)
def test_settings_that_contradict_it(
    sections: dict[str, Any], words: str, run_config: Callable[..., RunConfig]
) -> None:
    with pytest.raises(ConfigError, match=words):
        run_config(**sections)


def test_pairs_of_attention_are_counted_as_they_are_seen() -> None:
    rows = pack_examples([([5, 6, 7], [8, 9]), ([5], [6]), ([], [7, 8, 9])], sequence_length=12, pad_id=0)
    for prefix_lm in (False, True):
        batch = build_batch(rows, normalization="target_token", prefix_lm=prefix_lm)
        seen = 0
        for segments, is_target in zip(batch.segment_ids.tolist(), [row.is_target for row in rows], strict=True):
            seen += sum(
                1
                for q, own in enumerate(segments)
                for k, other in enumerate(segments)
                if own and own == other and (k <= q or (prefix_lm and not is_target[k]))
            )
        assert StepCounts.of([batch]).attention_pairs == seen
