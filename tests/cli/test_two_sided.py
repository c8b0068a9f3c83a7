"""Rows of two sides through `xmtf pack`, `plan` and `inspect --show`, against the tensors that training reads."""

import json

import pytest
import yaml

from megatron_xmtf.cli import main
from megatron_xmtf.config import load_config
from megatron_xmtf.data.encoder_decoder_rows import EncoderDecoderRows
from megatron_xmtf.data.loader import read_micro_batch
from megatron_xmtf.data.mixture import open_datasets
from megatron_xmtf.data.packing import index_directory, open_packing_index
from tests.planning.tiny_mixture import run_config, write_mixture


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return tmp_path_factory.mktemp("two_sided")


@pytest.fixture(scope="module")
def prefixes(directory):
    return write_mixture(directory)


@pytest.fixture
def config(tmp_path, prefixes):
    values = run_config(tmp_path, prefixes, data={"train": [{"prefix": prefix} for prefix in prefixes]}).model_dump(
        mode="json", exclude_unset=True
    )
    batch = {"micro_batch_size": 1, "global_batch_size": 4, "encoder_length": 48, "decoder_length": 24}
    values |= {"batch": batch}
    (tmp_path / "train.yaml").write_text(yaml.safe_dump(values), encoding="utf-8")
    return str(tmp_path / "train.yaml")


def report(capsys, *words, code=0):
    assert main([str(word) for word in words]) == code
    captured = capsys.readouterr()
    return json.loads(captured.out) if code == 0 else captured.err


def test_pack_plan_and_inspect_tell_the_same_of_both_sides(config, directory, capsys):
    packed = report(capsys, "pack", config, "--json")
    run = load_config(config)
    datasets = open_datasets(run.data.training_datasets)
    index = open_packing_index(
        datasets,
        data=run.data,
        sequence_length=run.batch.row_lengths,
        rows_needed=run.train_rows,
        seed=run.seed,
        directory=index_directory(run),
    )
    rows = EncoderDecoderRows(datasets, index, pad_id=3, eos_id=2, decoder_start_id=3)
    batches = [read_micro_batch(rows, [number], normalization="target_sequence") for number in range(len(rows))]
    inputs = sum(int((batch.encoder_segment_ids > 0).sum()) for batch in batches)
    targets = sum(int((batch.decoder_segment_ids > 0).sum()) for batch in batches)
    assert (packed["encoder_length"], packed["decoder_length"], packed["encoder_eos"]) == (48, 24, True)
    assert packed["tokens"] == inputs + targets and packed["target_tokens"] == targets
    assert packed["encoder_fill_fraction"] == pytest.approx(inputs / (48 * len(rows)))
    assert packed["decoder_fill_fraction"] == pytest.approx(targets / (24 * len(rows)))

    plan = report(capsys, "plan", config, "--json")["data"]
    assert plan["sides"] == {
        key: packed[key]
        for key in ("encoder_length", "decoder_length", "encoder_fill_fraction", "decoder_fill_fraction", "fewest_rows")
    }
    assert sum(row["tokens"] for row in plan["entries"]) == inputs + targets
    assert sum(row["target_tokens"] for row in plan["entries"]) == targets
    assert sum(row["dropped"] for row in plan["entries"]) == packed["dropped"]

    shown = report(capsys, "inspect", config, "--show", 1, "--tokenizer", directory / "tokenizer", "--json")["rows"][0]
    (weights,) = batches[0].loss_weights.tolist()
    assert shown["encoder_tokens"] == int((batches[0].encoder_segment_ids > 0).sum())
    for segment in shown["segments"]:
        own = batches[0].decoder_segment_ids[0] == segment["segment"]
        read = batches[0].encoder_tokens[0][batches[0].encoder_segment_ids[0] == segment["segment"]].tolist()
        assert segment["ids"] == read + batches[0].labels[0][own].tolist()
        assert read[-1] == 2 and segment["num_inputs"] == len(read)
        assert all((weight > 0) == (place >= len(read)) for place, weight in enumerate(segment["loss_weights"]))
    assert weights and main(["inspect", config, "--show", "1", "--tokenizer", str(directory / "tokenizer")]) == 0
    text = capsys.readouterr().out
    assert f"encoder {shown['encoder_tokens']} of 48 tokens" in text and "decoder" in text


def test_pack_of_prefixes(prefixes, capsys):
    packed = report(capsys, "pack", "--data", *prefixes, "--encoder-length", 48, "--decoder-length", 24, "--json")
    assert packed["fewest_rows"] <= packed["rows"] and packed["capacity"] == 72
    assert main(["pack", "--data", *prefixes, "--encoder-length", "48", "--decoder-length", "24"]) == 0
    assert "decoder_fill_fraction" in capsys.readouterr().out
    error = report(capsys, "pack", "--data", *prefixes, "--encoder-length", 48, code=2)
    assert "--decoder-length" in error
    error = report(
        capsys,
        "pack",
        "--data",
        *prefixes,
        "--encoder-length",
        48,
        "--decoder-length",
        24,
        "--sequence-length",
        9,
        code=2,
    )
    assert "--sequence-length" in error


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["batch.sequence_length=2048"], "has no meaning beside batch.encoder_length=48"),
        (["batch.decoder_length=null"], "needs both"),
        (["parallel.tensor_model_parallel_size=5", "parallel.sequence_parallel=true"], "batch.encoder_length=48"),
    ],
)
def test_lengths_that_contradict_each_other(config, overrides, words, capsys):
    assert words in report(capsys, "pack", config, *overrides, code=2)
