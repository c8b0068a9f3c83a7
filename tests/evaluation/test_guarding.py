import json

import numpy as np
import pytest

from megatron_xmtf.data.mixture import open_datasets
from megatron_xmtf.data.packing import build_packing_index, index_directory
from megatron_xmtf.data.preprocess import preprocess
from megatron_xmtf.errors import DatasetError
from megatron_xmtf.evaluation.guarding import drop_flagged, evaluation_texts, report_guards

QUESTION = "Which of the seven rivers of the eastern province is the longest one that reaches the sea?"


@pytest.fixture
def config(run_config, tiny_hf, tmp_path):
    """A run on 40 examples: number 1 repeats number 0 in other case, number 30 holds an evaluation question."""
    subjects = ["granite", "maize", "harbour", "violin", "glacier", "parliament", "monsoon", "saffron"]
    rows = [
        {"inputs": f"Say in a few words what {subjects[i % 8]} of kind {i} is.", "targets": f"It is thing {i}."}
        for i in range(40)
    ]
    rows[1] = {"inputs": rows[0]["inputs"].upper(), "targets": rows[0]["targets"].replace(" ", "  ")}
    rows[30]["inputs"] = f"{QUESTION} Say in a few words."
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    preprocess([tmp_path / "rows.jsonl"], tokenizer=tiny_hf, output_prefix=tmp_path / "pairs", show_progress=False)
    record = {"inputs": QUESTION, "targets": "the Tana", "choices": ["the Tana", "the Mara"], "language": "en"}
    (tmp_path / "questions.jsonl").write_text(json.dumps(record))
    (tmp_path / "tasks.yaml").write_text("tasks:\n  - {name: rivers, records: questions.jsonl}\n")

    def make(**guards):
        return run_config(
            model=str(tiny_hf),
            output=str(tmp_path / "run"),
            data={"train": [{"prefix": str(tmp_path / "pairs")}], "guards": guards},
            evaluation={"tasks": [str(tmp_path / "tasks.yaml")]},
        )

    return make


def flagged(flags, drop):
    return np.flatnonzero(flags.excluded(0, drop=drop)).tolist()


def test_finds_duplicates_and_the_tasks_of_the_same_configuration(config):
    made = config()
    datasets = open_datasets(made.data.training_datasets)
    flags = report_guards(made, datasets)
    assert flagged(flags, ["duplicates"]) == [1]
    assert flagged(flags, ["contamination"]) == [30]
    assert [text.task for text in evaluation_texts(made.evaluation.tasks)] == ["rivers"]


def test_nothing_is_read_where_nothing_is_dropped(config, tmp_path):
    for made in (config(), config(duplicates="off", contamination="off")):
        assert drop_flagged(made, open_datasets(made.data.training_datasets)) is None
    made = config(duplicates="off", contamination="off")
    assert report_guards(made, open_datasets(made.data.training_datasets)) is None
    assert not (tmp_path / "run" / "guards").exists()


def test_what_is_dropped_is_in_no_row(config):
    keys = set()
    for guards, absent in (
        ({}, []),
        ({"duplicates": "drop"}, [1]),
        ({"duplicates": "drop", "contamination": "drop"}, [1, 30]),
    ):
        made = config(**guards)
        datasets = open_datasets(made.data.training_datasets)
        index = build_packing_index(
            datasets,
            data=made.data,
            sequence_length=255,
            rows_needed=300,
            seed=1,
            directory=index_directory(made),
            guards=drop_flagged(made, datasets),
        )
        assert sorted(set(range(40)) - set(index.example_ids.tolist())) == absent
        keys.add(index.key)
    assert len(keys) == 3


def test_a_plan_that_reports_opens_the_index_of_the_run(config):
    made = config()
    datasets = open_datasets(made.data.training_datasets)
    arguments = dict(data=made.data, sequence_length=255, rows_needed=30, seed=1, directory=index_directory(made))
    assert (
        build_packing_index(datasets, guards=report_guards(made, datasets), **arguments).key
        == build_packing_index(datasets, guards=drop_flagged(made, datasets), **arguments).key
    )


def test_a_run_that_may_not_build_refuses_to_scan(config):
    made = config(duplicates="drop")
    datasets = open_datasets(made.data.training_datasets)
    with pytest.raises(DatasetError, match="no guard flags.*xmtf pack CONFIG"):
        drop_flagged(made, datasets, build=False)
    flags = drop_flagged(made, datasets)
    assert drop_flagged(made, datasets, build=False).key == flags.key
