"""Settings of the other family: exit code 2, what is wrong and the way out, before anything is made."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_xmtf.cli import main
from megatron_xmtf.data.preprocess import preprocess
from megatron_xmtf.data.tokenizer import Tokenizer
from tests.tiny import write_records

TWO_SIDES = {"micro_batch_size": 1, "global_batch_size": 4, "encoder_length": 48, "decoder_length": 24}
ONE_LINE = {"micro_batch_size": 1, "global_batch_size": 4, "sequence_length": 64}


@pytest.fixture(scope="module")
def models(tiny_hf: Path, tiny_mt5_hf: Path) -> dict[str, Path]:
    return {"bloom": tiny_hf, "mt5": tiny_mt5_hf}


@pytest.fixture(scope="module")
def data(models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Pairs and texts under each model's tokenizer: prefixes by model and kind."""
    directory = tmp_path_factory.mktemp("data")
    write_records(directory / "pairs.jsonl", 40)
    texts = [{"text": f"it was a dark and stormy night, number {number}"} for number in range(40)]
    (directory / "text.jsonl").write_text("".join(json.dumps(text) + "\n" for text in texts))
    prefixes = {}
    for model, path in models.items():
        for kind in ("pairs", "text"):
            prefix = directory / f"{model}_{kind}"
            preprocess(
                [directory / f"{kind}.jsonl"],
                tokenizer=Tokenizer.load(path),
                output_prefix=prefix,
                workers=1,
                **({"kind": "text"} if kind == "text" else {}),
            )
            prefixes[f"{model}_{kind}"] = prefix
    return prefixes


CASES: dict[str, tuple[str, str, dict[str, Any], str, str]] = {
    # model, data, sections, what is wrong, the way out
    "bloom-with-two-sides": (
        "bloom",
        "pairs",
        {"batch": TWO_SIDES},
        "batch.encoder_length=48 is of an encoder-decoder, and",
        "give batch.sequence_length instead of batch.encoder_length and batch.decoder_length",
    ),
    "mt5-with-one-line": (
        "mt5",
        "pairs",
        {"batch": ONE_LINE},
        "is an encoder-decoder, whose rows have two sides",
        "give batch.encoder_length and batch.decoder_length",
    ),
    "mt5-as-prefix-lm": (
        "mt5",
        "pairs",
        {"batch": {**ONE_LINE, "prefix_lm": True}},
        "is an encoder-decoder, whose rows have two sides",
        "give batch.encoder_length and batch.decoder_length",
    ),
    "two-sides-as-prefix-lm": (
        "mt5",
        "pairs",
        {"batch": {**TWO_SIDES, "prefix_lm": True}},
        "batch.prefix_lm=true is for decoder-only models",
        "leave prefix_lm out",
    ),
    "bloom-with-stages-of-an-encoder-decoder": (
        "bloom",
        "pairs",
        {"batch": ONE_LINE, "parallel": {"pipeline_model_parallel_size": 2, "pipeline_layers": [2, 2]}},
        "parallel.pipeline_layers is for encoder-decoders",
        "num_layers_in_first_pipeline_stage",
    ),
    "mt5-with-stages-of-a-decoder": (
        "mt5",
        "pairs",
        {
            "batch": TWO_SIDES,
            "parallel": {"pipeline_model_parallel_size": 2, "num_layers_in_first_pipeline_stage": 2},
        },
        "num_layers_in_first_pipeline_stage",
        "pipeline_layers",
    ),
    "bloom-under-t5s-objective": (
        "bloom",
        "text",
        {"batch": ONE_LINE, "objective": "span_corruption"},
        "has no sentinel '<extra_id_0>'",
        "take a model that has some (T5, mT5), or the objective alexatm_denoising",
    ),
    "mt5-with-texts-and-no-objective": (
        "mt5",
        "text",
        {"batch": TWO_SIDES},
        "holds texts, which give an encoder nothing to read",
        "say with `objective` what is made of them",
    ),
    "pairs-under-an-objective": (
        "mt5",
        "pairs",
        {"batch": TWO_SIDES, "objective": "span_corruption"},
        "holds inputs and targets, and objective span_corruption takes documents",
        "leave the objective out",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_the_wrong_family_is_named_with_the_way_out(
    case: str,
    models: dict[str, Path],
    data: dict[str, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    model, kind, sections, wrong, remedy = CASES[case]
    sections = dict(sections)
    entry: dict[str, Any] = {"prefix": str(data[f"{model}_{kind}"])}
    if "objective" in sections:
        entry["objective"] = sections.pop("objective")
    config = {
        "model": str(models[model]),
        "output": str(tmp_path / "run"),
        "data": {"train": [entry]},
        "schedule": {"train_steps": 2},
        "precision": "fp32",
        **sections,
    }
    (tmp_path / "train.json").write_text(json.dumps(config))  # JSON is YAML
    ranks = ["--nproc", "2"] if "parallel" in sections else []
    assert main(["train", str(tmp_path / "train.json"), *ranks]) == 2
    message = capsys.readouterr().err
    assert wrong in message and remedy in message, message
    assert "Traceback" not in message
    assert not (tmp_path / "run" / "checkpoints").exists()
