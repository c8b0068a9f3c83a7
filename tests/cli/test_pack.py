import json

import numpy as np
import pytest

from megatron_xmtf.cli import main
from megatron_xmtf.config import load_config
from megatron_xmtf.data.indexed_writer import IndexedDatasetWriter
from megatron_xmtf.data.mixture import open_datasets
from megatron_xmtf.data.packing import index_directory, open_packing_index
from megatron_xmtf.data.rows import PackedRows
from megatron_xmtf.errors import ConfigError


def write_pairs(prefix, examples):
    """Write a dataset as published Megatron data are: two halves, no manifest."""
    for half, name in enumerate(("inputs", "targets")):
        sequences = [np.array(example[half], np.int32) for example in examples]
        with IndexedDatasetWriter(f"{prefix}_{name}_document", dtype=np.dtype(np.int32)) as writer:
            writer.add(np.concatenate(sequences), np.array([len(sequence) for sequence in sequences]))
    return str(prefix)


@pytest.fixture
def prefixes(tmp_path):
    random = np.random.default_rng(0)

    def examples(count):
        sizes = random.integers(1, 12, size=(count, 2)).tolist()
        return [(random.integers(3, 90, i), random.integers(3, 90, t)) for i, t in sizes]

    return [write_pairs(tmp_path / "sw", examples(60)), write_pairs(tmp_path / "yo", examples(20))]


@pytest.fixture
def config(tmp_path, prefixes):
    path = tmp_path / "train.yaml"
    path.write_text(
        f"model: unused\noutput: {tmp_path}/run\nprecision: fp32\n"
        f"data: {{train: [{{prefix: {prefixes[0]}}}], validation: [{{prefix: {prefixes[1]}}}]}}\n"
        "batch: {sequence_length: 31, global_batch_size: 4}\nschedule: {train_steps: 10}\n"
    )
    return str(path)


def run(capsys, *arguments):
    code = main(["pack", *arguments])
    output = capsys.readouterr()
    return code, output.out, output.err


def test_prefixes_without_a_configuration(capsys, prefixes):
    code, out, _ = run(capsys, "--data", *prefixes, "--sequence-length", "31", "--json")
    report = json.loads(out)
    assert code == 0
    assert report["examples"] == 80 and report["dropped"] == 0 and report["epochs"] == 1
    assert report["fill_fraction"] == report["tokens"] / (report["rows"] * 32)
    assert [(entry["name"], entry["examples"]) for entry in report["datasets"]] == [("sw", 60), ("yo", 20)]


def test_a_run_s_index_is_what_training_opens(capsys, config):
    code, out, _ = run(capsys, config, "seed=7", "--json")
    report = json.loads(out)
    assert code == 0 and report["rows"] >= 40 and report["epochs"] > 1
    assert report["validation"][0]["examples"] == 20
    loaded = load_config(config, ["seed=7"])
    datasets = open_datasets(loaded.data.train)
    index = open_packing_index(
        datasets,
        data=loaded.data,
        sequence_length=31,
        rows_needed=40,
        seed=7,
        directory=index_directory(loaded),
    )
    assert index.key == report["key"] and report["index"].endswith(index.key[:16])
    rows = PackedRows(datasets, index, pad_id=3)
    inputs, targets = datasets[0][int(rows[0].example_ids[0])]
    first = rows[0].tokens[rows[0].segment_ids == 1]
    assert first.tolist() == [*inputs.tolist(), *targets.tolist()]


def test_a_person_reads_totals_and_a_table(capsys, config, prefixes):
    _, out, _ = run(capsys, config)
    for word in ("rows", "fill_fraction", "dropped", "target_tokens", "validation: ", "sw ", "yo "):
        assert word in out
    _, out, _ = run(capsys, "--data", prefixes[0], "--sequence-length", "8")
    assert "dropped" in out and "index" not in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "run configuration"),
        (["--data", "PREFIX"], "--sequence-length"),
        (["--data", "PREFIX", "--sequence-length", "0"], "at least 1"),
        (["--data", "PREFIX", "--sequence-length", "31", "--seed", "-1"], "negative"),
        (["CONFIG", "--sequence-length", "31"], "batch.sequence_length=N"),
        (["CONFIG", "--data", "PREFIX"], "not both"),
        (["--data", "PREFIX", "--sequence-length", "2", "--long-examples", "error"], "tokens, a row holds 3"),
        (["--data", "PREFIX", "PREFIX", "--sequence-length", "31"], "2 datasets are named 'sw'"),
    ],
)
def test_mistakes_end_with_one_message(capsys, config, prefixes, arguments, message):
    named = [{"CONFIG": config, "PREFIX": prefixes[0]}.get(argument, argument) for argument in arguments]
    code, out, err = run(capsys, *named)
    assert (code, out) == (2, "") and message in err and "Traceback" not in err


def test_datasets_need_names_of_their_own(prefixes):
    from megatron_xmtf.config import DatasetConfig

    entries = [DatasetConfig(prefix=prefixes[0], name="x"), DatasetConfig(prefix=prefixes[1], name="x")]
    with pytest.raises(ConfigError, match="named 'x'"):
        open_datasets(entries)
