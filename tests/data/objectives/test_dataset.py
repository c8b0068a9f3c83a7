"""Documents under objectives, through everything that reads datasets: mixtures, packing, guards, plans, inspect."""

import json

import numpy as np
import pytest

from megatron_xmtf.cli import main
from megatron_xmtf.config import MixtureConfig, RunConfig
from megatron_xmtf.config.load import config_from_mapping, load_mixture
from megatron_xmtf.config.row_lengths import EncoderDecoderLengths
from megatron_xmtf.data.batch import build_batch
from megatron_xmtf.data.encoder_decoder_rows import EncoderDecoderRows
from megatron_xmtf.data.example_dataset import ExampleDataset
from megatron_xmtf.data.mixture import open_datasets
from megatron_xmtf.data.objectives import ObjectiveDataset, StoredDatasets
from megatron_xmtf.data.packing import pack_mixture
from megatron_xmtf.data.preprocess import preprocess
from megatron_xmtf.data.rows import PackedRows
from megatron_xmtf.data.target_counts import count_target_tokens
from megatron_xmtf.data.tokenizer import Tokenizer
from megatron_xmtf.errors import DatasetError
from megatron_xmtf.evaluation.guarding import report_guards
from megatron_xmtf.planning.data_plan import build_data_plan
from tests.tiny import tiny_bloom, write_tiny_tokenizer

EOS, CLM, SENTINELS = 1, 3, tuple(range(23, 3, -1))
LENGTHS = [1, 2, 5, 40, 200, 90, 33, 64, 12, 131, 25, 25]
"""Tokens of the documents, one a letter; the rows below hold 65, so some are cut."""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A model with sentinels and [CLM], twelve documents in two languages, and a few prompted examples."""
    place = tmp_path_factory.mktemp("objectives")
    special = ("<pad>", "</s>", "<unk>", "[CLM]", *(f"<extra_id_{number}>" for number in reversed(range(20))))
    tiny_bloom(vocab_size=300, layers=2).save_pretrained(place / "model")
    write_tiny_tokenizer(place / "model", special=special)
    generator = np.random.default_rng(3)
    texts = ["".join(chr(97 + int(i)) for i in generator.integers(0, 26, length)) for length in LENGTHS]
    texts[-1] = texts[-2]  # a duplicate
    rows = [
        {"text": text, "language": ["sw", "th"][number % 2], "id": str(number)} for number, text in enumerate(texts)
    ]
    pairs = [{"inputs": "what is it?", "targets": text[:20], "language": "sw"} for text in texts]
    for name, records in (("wiki", rows), ("qa", pairs)):
        path = place / f"{name}.jsonl"
        path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
        kind = "text" if name == "wiki" else "pairs"
        preprocess([path], tokenizer=place / "model", output_prefix=place / name, kind=kind)
    return place


def run_config(place, **values):
    mixture = {
        "root": str(place),
        "entries": [
            {
                "name": "documents",
                "weight": 3,
                "entries": [
                    {"prefix": "wiki", "weight": 4, "objective": "alexatm_denoising"},
                    {"prefix": "wiki", "weight": 1, "objective": "causal"},
                    {"prefix": "wiki", "weight": 1, "objective": "span_corruption"},
                ],
            },
            {"prefix": "qa", "weight": 1},
        ],
    }
    return config_from_mapping(
        {
            "model": str(place / "model"),
            "output": str(place / "run"),
            "data": {"mixture": mixture, **values.pop("data", {})},
            "batch": values.pop("batch", {"micro_batch_size": 1, "global_batch_size": 4, "sequence_length": 64}),
            "schedule": {"train_steps": 10},
            "precision": "fp32",
            **values,
        },
        RunConfig,
        source="test",
    )


def opened(place, config=None):
    config = config or run_config(place)
    tokenizer = Tokenizer.load(place / "model")
    return open_datasets(config.data.training_datasets, batch=config.batch, tokenizer=tokenizer)


def packed(place, *, rows=40, seed=1):
    datasets, config = opened(place), run_config(place)
    index = pack_mixture(datasets, mixture=config.data.mixture, sequence_length=64, rows_needed=rows, seed=seed)
    return PackedRows(datasets, index, pad_id=0)


def documents_of(place):
    dataset = ExampleDataset.open(place / "wiki")
    return [dataset[number][1][:-1].tolist() for number in range(len(dataset))]


def test_the_same_documents_are_a_dataset_for_each_objective(place):
    datasets = opened(place)
    assert [dataset.name for dataset in datasets] == [
        "wiki:alexatm_denoising",
        "wiki:causal",
        "wiki:span_corruption",
        "qa",
    ]
    for dataset in datasets[:3]:
        assert isinstance(dataset, ObjectiveDataset)
        made = [dataset[number] for number in range(len(dataset))]
        assert [len(part) for part, _ in made] == dataset.input_lengths.tolist()
        assert [len(part) for _, part in made] == dataset.target_lengths.tolist()
        both = dataset.input_lengths + dataset.target_lengths
        assert both.max() <= 65, "no chunk is too long for a row"
        assert np.count_nonzero(dataset.target_lengths == 0) == 1, "the document of one token"
        counts = dataset.counts()
        assert (counts["documents"], counts["document_tokens"]) == (12, sum(LENGTHS))
        assert (counts["too_short"], counts["too_short_tokens"]) == (1, 1)
        assert counts["cut_documents"] == sum(length > counts["chunk_length"] for length in LENGTHS)
        assert counts["chunks"] == sum(max(1, -(-length // counts["chunk_length"])) for length in LENGTHS)
        languages = [dataset.names("language")[code] for code in dataset.column("language")]
        assert languages == [["sw", "th"][number % 2] for number in dataset.chunks.documents]
        source = ExampleDataset.open(place / "wiki").documents
        assert (dataset.documents == source[dataset.chunks.documents]).all()


def test_every_token_of_every_document_is_in_the_targets_of_denoising(place):
    denoising, causal, _, _ = opened(place)
    texts = documents_of(place)
    rebuilt = [[] for _ in texts]
    for number in range(len(denoising)):
        inputs, targets = denoising[number]
        rebuilt[denoising.chunks.documents[number]] += targets[:-1].tolist()
    assert [text for text in rebuilt if text] == [text for text in texts if len(text) > 1]
    whole = [[] for _ in texts]
    for number in range(len(causal)):
        inputs, targets = causal[number]
        is_end = len(targets) > 0 and targets[-1] == EOS
        whole[causal.chunks.documents[number]] += [*inputs[1:].tolist(), *targets[: -1 if is_end else None].tolist()]
        last = number + 1 == len(causal) or causal.chunks.documents[number + 1] != causal.chunks.documents[number]
        assert is_end == (last and len(targets) > 0), "EOS stands where the document ends, and only there"
        assert not len(inputs) or inputs[0] == CLM
    assert [text for text in whole if text] == [text for text in texts if len(text) > 1]


def test_rows_are_the_same_bytes_for_whoever_reads_them_and_noise_differs_by_epoch(place):
    rows, again = packed(place), packed(place)
    longer = packed(place, rows=500)
    order = np.random.default_rng(0).permutation(40)
    for number in order.tolist():
        assert rows[number].tokens.tobytes() == again[number].tokens.tobytes() == longer[number].tokens.tobytes()
    seen = {}
    for number in range(500):
        row = longer[number]
        for segment, (dataset, example) in enumerate(
            zip(row.dataset_ids.tolist(), row.example_ids.tolist(), strict=True), 1
        ):
            inputs = row.tokens[(row.segment_ids == segment) & ~row.is_target]
            seen.setdefault((dataset, example), []).append(tuple(inputs.tolist()))
    repeated = {key: values for key, values in seen.items() if len(values) > 2}
    assert {dataset for dataset, _ in repeated} == {0, 1, 2, 3}
    long_enough = [values for (dataset, _), values in repeated.items() if dataset == 0 and len(values[0]) > 15]
    assert long_enough and all(len(set(values)) > len(values) / 2 for values in long_enough), "other noise each time"
    cuts = [values for (dataset, _), values in repeated.items() if dataset == 1 and max(map(len, values)) > 15]
    assert cuts and all(len(set(values)) > len(values) / 2 for values in cuts), "cut elsewhere each time"
    assert all(len(set(values)) == 1 for (dataset, _), values in repeated.items() if dataset == 3)


@pytest.mark.parametrize("encoder_eos", [True, False])
def test_two_sided_rows_hold_every_chunk_with_eos_where_it_belongs(place, encoder_eos):
    lengths = EncoderDecoderLengths(48, 40, encoder_eos)
    batch = {"micro_batch_size": 1, "global_batch_size": 4, "encoder_length": 48, "decoder_length": 40}
    config = run_config(place, batch={**batch, "encoder_eos": encoder_eos})
    datasets = opened(place, config)
    index = pack_mixture(datasets, mixture=config.data.mixture, sequence_length=lengths, rows_needed=60, seed=1)
    assert [entry["dropped"] for entry in index.statistics["datasets"][:3]] == [0, 0, 0], "chunks always fit"
    rows = EncoderDecoderRows(datasets, index, pad_id=0, eos_id=EOS, decoder_start_id=0)
    texts, seen = documents_of(place), set()
    for number in range(60):
        row = rows[number]
        for segment, (dataset, example) in enumerate(
            zip(row.dataset_ids.tolist(), row.example_ids.tolist(), strict=True), 1
        ):
            inputs = row.encoder_tokens[row.encoder_segment_ids == segment].tolist()
            targets = row.targets[row.decoder_segment_ids == segment].tolist()
            ends = encoder_eos or dataset in (0, 2)  # noise always ends its inputs, a cut and a prompt as the rows do
            assert inputs.count(EOS) == int(ends) and (inputs[-1] == EOS) == ends
            if dataset == 1:  # both sides' lengths were packed, so that the cut is that of any other place
                again = datasets[1].example(example, occurrence=10**9)
                assert [part.tolist() for part in again] == [inputs[: -1 if ends else None], targets]
            if dataset == 0:
                document, first, length, _ = datasets[0].chunks.locate(example)
                assert targets == [*texts[document][first : first + length], EOS]
            seen.add(dataset)
    assert seen == {0, 1, 2, 3}


def test_negative_control_the_run_seed_changes_noise_and_rows(place):
    one, other = packed(place), packed(place, seed=2)
    assert any(one[number].tokens.tobytes() != other[number].tokens.tobytes() for number in range(40))


def test_shares_are_the_weights_and_counts_are_those_of_the_batches(place):
    rows = packed(place, rows=120)
    shares = [part["share"] for part in rows.index.statistics["components"]]
    assert shares == pytest.approx([0.5, 0.125, 0.125, 0.25], abs=0.02)
    assert count_target_tokens(rows, 64, count=8).tolist() == target_tokens_read(rows, range(64, 72))
    everything = [entry["target_tokens"] for entry in rows.index.statistics["datasets"]]
    assert everything == target_tokens_read(rows, range(120))


def target_tokens_read(rows, numbers):
    found = np.zeros(4, np.int64)
    for number in numbers:
        row = rows[number]
        batch = build_batch([row], normalization="target_token")
        of_segment = np.concatenate([[0], row.dataset_ids]).astype(int)
        predicted = batch.loss_weights[0].numpy() > 0
        found += np.bincount(of_segment[batch.segment_ids[0].numpy()[predicted]], minlength=4)
    return found.tolist()


def test_index_key_follows_objectives_and_nothing_else(place):
    def key(**objective):
        mixture = MixtureConfig(entries=[{"prefix": "wiki", "objective": objective}], root=str(place))
        config = run_config(place)
        datasets = open_datasets(
            [config.data.training_datasets[0].model_copy(update={"objective": mixture.entries[0].objective})],
            batch=config.batch,
            tokenizer=Tokenizer.load(place / "model"),
        )
        return pack_mixture(datasets, mixture=mixture, sequence_length=64, seed=1).key

    plain = key(name="alexatm_denoising")
    assert key(name="alexatm_denoising", noise_density=0.15) == plain
    others = {
        key(name="alexatm_denoising", noise_density=0.2),
        key(name="alexatm_denoising", chunk_length=20),
        key(name="alexatm_denoising", prefix_text="x"),
        key(name="span_corruption"),
        key(name="causal"),
        key(name="causal", seed=1),
    }
    assert len(others | {plain}) == 7


def test_splits_keep_the_chunks_of_a_document_together(place):
    mixture = {
        "root": str(place),
        "split": "0:0.6",
        "validation": "0.6:1",
        "entries": [{"prefix": "wiki", "objective": {"name": "causal", "chunk_length": 10}}],
    }
    config = run_config(place, data={"mixture": mixture, "split_seed": 2})
    tokenizer = Tokenizer.load(place / "model")
    (entry,) = config.data.validation_datasets
    assert entry.objective is not None and entry.objective.name == "causal"
    (held_out,) = open_datasets([entry], batch=config.batch, tokenizer=tokenizer)
    plan = build_data_plan(config)
    assert plan["validation"][0]["trained_on"] == 0
    assert 0 < plan["validation"][0]["selected"] < len(held_out)
    assert plan["entries"][0]["selected"] + plan["validation"][0]["selected"] == len(held_out)


def test_guards_look_at_documents_once_and_speak_of_chunks(place):
    config = run_config(place, output=str(place / "guarded"))
    datasets = opened(place, config)
    behind = StoredDatasets(datasets)
    assert [dataset.kind for dataset in behind.stored] == ["text", "pairs"] and behind.owners == [0, 0, 0, 1]
    flags = report_guards(config, datasets)
    for dataset, found in zip(datasets[:3], flags.flags, strict=False):
        assert set(dataset.chunks.documents[found > 0].tolist()) == {11}, "the second of two equal documents"


def test_plan_and_inspect_show_what_the_model_will_read(place, capsys):
    config = run_config(place, output=str(place / "shown"), data={"guards": {"duplicates": "drop"}})
    path = place / "run.yaml"
    path.write_text(json.dumps(config.model_dump(mode="json")), encoding="utf-8")
    page = place / "plan.html"
    assert main(["plan", str(path), "--html", str(page)]) == 0
    shown = capsys.readouterr().out
    assert "documents under their objectives" in shown and "wiki:span_corruption" in shown
    assert "Documents under their objectives" in page.read_text(encoding="utf-8")
    assert main(["plan", str(path), "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)["data"]
    assert [part["objective"] for part in plan["objectives"]] == ["alexatm_denoising", "causal", "span_corruption"]
    assert all(row["empty"] == 1 for row in plan["entries"][:3]), "what makes no example is counted"
    duplicated = [row["duplicates"] for row in plan["entries"]]
    assert duplicated[:3] == [1, 1, 1]
    assert main(["pack", str(path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["key"] == plan["key"], "plan and pack see the same rows"
    assert main(["inspect", plan["index"], "--show", "1", "--data", *[str(place / "wiki")] * 3, str(place / "qa")]) == 2
    assert "show its rows with the run's configuration" in capsys.readouterr().err
    assert main(["inspect", str(path), "--show", "40", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    segments = [segment for row in rows for segment in row["segments"]]
    by_entry = {segment["entry"]: segment for segment in segments}
    assert by_entry["wiki:causal"]["ids"][0] == CLM and by_entry["wiki:causal"]["text"][0] == "[CLM]"
    assert set(by_entry["wiki:span_corruption"]["ids"]) & set(SENTINELS)


def test_pairs_have_no_objective_and_mixed_ends_are_refused(place, monkeypatch):
    config = run_config(place)
    entry = config.data.training_datasets[1].model_copy(update={"prefix": str(place / "qa")})
    with pytest.raises(DatasetError, match="holds inputs and targets, and objective causal takes documents"):
        open_datasets([entry], batch=config.batch, tokenizer=Tokenizer.load(place / "model"))


@pytest.mark.parametrize(("kept", "message"), [(0, None), (3, "3 of 12 documents end with")])
def test_published_documents_with_and_without_eos(place, tmp_path, kept, message):
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    builder = IndexedDatasetBuilder(str(tmp_path / "old_text_document.bin"), dtype=np.int32)
    import torch

    for number, text in enumerate(documents_of(place)):
        builder.add_document(torch.tensor(text + [EOS] * (number < kept)), [len(text) + (number < kept)])
    builder.finalize(str(tmp_path / "old_text_document.idx"))
    config = run_config(place)
    entry = config.data.training_datasets[0].model_copy(update={"prefix": str(tmp_path / "old")})
    tokenizer = Tokenizer.load(place / "model")
    if message:
        with pytest.raises(DatasetError, match=message):
            open_datasets([entry], batch=config.batch, tokenizer=tokenizer)
        return
    (dataset,) = open_datasets([entry], batch=config.batch, tokenizer=tokenizer)
    (ours, *_) = opened(place)
    assert dataset.target_lengths.tolist() == ours.target_lengths.tolist()
    assert dataset[4][1].tolist() == ours[4][1].tolist()


@pytest.mark.parametrize("name", ["alexatm", "ul2_flan"])
def test_shipped_mixtures_read(name):
    mixture = config_from_mapping(load_mixture(name), MixtureConfig, source=name)
    parts = [source.objective.name if source.objective else None for source in mixture.sources()]
    if name == "alexatm":
        weights = {entry.name: entry.weight for entry in mixture.entries}
        assert weights == {"denoising": 80, "clm": 20}
        assert parts == ["alexatm_denoising"] * 24 + ["causal"] * 24
        first, second = mixture.sources()[0].objective, mixture.sources()[24].objective
        assert (first.noise_density, first.mean_span_length) == (0.15, 3.0)
        assert (second.minimum_inputs, second.maximum_inputs, second.prefix_token) == (0.2, 0.8, "[CLM]")
    else:
        assert parts == ["span_corruption"] * 2 + ["prefix_lm"] + ["span_corruption"] * 4 + [None] * 4
        settings = [(one.objective.mean_span_length, one.objective.noise_density) for one in mixture.sources()[:7]]
        assert settings == [(3, 0.15), (8, 0.15), (None, None), (3, 0.5), (8, 0.5), (64, 0.15), (64, 0.5)]
        assert len(set(mixture.dataset_names().values())) == 11
