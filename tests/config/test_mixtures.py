"""The shipped mixtures and the reference's weight files, against figures counted another way."""

import numpy as np
import pytest

from megatron_xmtf.config import DataConfig, MixtureConfig, load_config, load_mixture
from megatron_xmtf.config.load import SHIPPED_MIXTURES, config_from_mapping
from megatron_xmtf.config.weight_file import parse_weight_file
from megatron_xmtf.data.build_mixture import build_mixture
from megatron_xmtf.data.mixture import MixtureDraws
from megatron_xmtf.errors import ConfigError
from tests.data.memory_dataset import MemoryDataset


def shipped(name):
    return config_from_mapping(load_mixture(name), MixtureConfig, source=name)


def pass_counts(mixture, datasets):
    """Examples of each component in the first pass."""
    built = build_mixture(datasets, mixture, sequence_length=31)
    chosen = MixtureDraws(built, capacity=32, seed=1).next_pass()
    return {one.name: len(at) for one, at in zip(built.components, chosen, strict=True)}


def dataset(name, column, sizes):
    names = [label for label, size in sizes.items() for _ in range(size)]
    return MemoryDataset(name, [([1], [2])] * len(names), columns={column: names})


def test_every_shipped_mixture_is_valid_and_says_where_its_numbers_come_from():
    names = [path.stem for path in SHIPPED_MIXTURES.glob("*.yaml")]
    assert sorted(names) == ["alexatm", "flan2021", "flan2022", "pinch", "ul2_flan", "xp3", "xp3mt"]
    for name in names:
        assert "arXiv" in shipped(name).source


def test_xp3_has_the_published_weights(shared_data):
    path = shared_data / "xp3_mixture_lists" / "xp3capmixnewcodelong_train.txt"
    published = config_from_mapping(load_mixture(str(path), keep_directories=False), MixtureConfig, source="")
    assert [(e.prefix, e.weight) for e in shipped("xp3").entries] == [(e.prefix, e.weight) for e in published.entries]
    assert [entry.weight for entry in shipped("xp3mt").entries] == [entry.weight for entry in published.entries]
    assert len(published.entries) == 46 and sum(entry.weight for entry in published.entries) == pytest.approx(
        1.01368, abs=1e-5
    )


def test_xp3_parts_are_the_normalised_weights():
    mixture = shipped("xp3").model_copy(update={"split": None, "validation": None})
    datasets = [MemoryDataset(entry.prefix, [([1], [2])] * 2000) for entry in mixture.entries]
    found = pass_counts(mixture, datasets)
    weights = np.array([entry.weight for entry in mixture.entries])
    expected = sum(found.values()) * weights / weights.sum()
    assert np.all(np.abs(np.array(list(found.values())) - expected) < 1)
    # The pass is as long as English lasts; Spanish: 2,000 * 0.0797519865 / 0.3924620202 = 406.4.
    assert (found["xp3_en"], found["xp3_es"]) == (2000, 406)


def test_the_published_weight_files_are_read_as_they_are(shared_data):
    directory = shared_data / "xp3_mixture_lists"
    train, validation = (
        (directory / f"xp3capmixnewcodelong_{name}.txt").read_text() for name in ("train", "validation_pretr")
    )
    (group,) = parse_weight_file(train, source="", keep_directories=True).values()
    assert group[0] == {
        "prefix": "/gpfswork/rech/six/commun/bigscience-training/xp3cappedmixednewcodelong/xp3_en",
        "weight": 0.3924620202,
        "split": "0:0.950",
    }
    groups = parse_weight_file(validation, source="", keep_directories=False)
    assert {name: len(entries) for name, entries in groups.items()} == {"validation_pretraining": 28, "validation": 46}
    assert not any("_document" in entry["prefix"] for entry in groups["validation_pretraining"])


def write_config(directory, data):
    import yaml

    values = {"model": "m", "output": "o", "schedule": {"train_steps": 1}, "data": data}
    path = directory / "run.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def test_a_run_reads_weight_files_of_other_machines(shared_data, tmp_path):
    directory = shared_data / "xp3_mixture_lists"
    data = {
        "mixture": str(directory / "xp3capmixnewcodelong_train.txt"),
        "mixture_root": "/data/xp3",
        "validation": str(directory / "xp3capmixnewcodelong_validation.txt"),
    }
    config = load_config(write_config(tmp_path, data))
    assert config.data.training_datasets[1].prefix == "/data/xp3/xp3_es"
    assert config.data.validation_datasets[1].prefix == "/data/xp3/xp3_es"
    assert (config.data.training_mixture.entries[1].split, config.data.validation[1].split) == ("0:0.950", "0.950:1")
    # The resolved configuration holds the mixture itself, and reading it again gives the same.
    again = config_from_mapping(config.model_dump(mode="json"), type(config), source="")
    assert again == config


def test_a_run_names_a_shipped_mixture(tmp_path):
    config = load_config(write_config(tmp_path, {"mixture": "flan2021"}), ["data.mixture_root=/flan"])
    assert config.data.training_datasets[0].prefix == "/flan/flan2021"


@pytest.mark.parametrize(
    "text, message",
    [
        ("", "not a weight file"),
        ("0.5 0:1 /a", "not a weight file"),
        ("train: 0.5 /a", r"entry 1, '0.5 /a', is not WEIGHT FROM:TO PATH"),
        ("train: 0.5 0:1 /a, half 0:1 /b", "entry 2"),
        ('"train: 1 0:1 /a" "train: 1 0:1 /b"', "each with a name of its own"),
    ],
)
def test_weight_files_that_are_none(text, message):
    with pytest.raises(ConfigError, match=message):
        parse_weight_file(text, source="weights.txt", keep_directories=True)


def test_a_mixture_is_one_group(tmp_path):
    path = tmp_path / "two.txt"
    path.write_text('"a: 1 0:1 /a" "b: 1 0:1 /b"')
    with pytest.raises(ConfigError, match="holds the groups a, b; a mixture is one"):
        load_mixture(str(path))


def test_flan_2022_groups_have_the_final_proportions_and_tasks_their_capped_sizes():
    mixture = shipped("flan2022")
    mixture = config_from_mapping(
        {
            **mixture.model_dump(mode="json"),
            # A hundredth of the published caps, so that a test can hold the tasks.
            "entries": [
                {**entry.model_dump(mode="json"), "each": {"cap": entry.each.cap / 100}} for entry in mixture.entries
            ],
        },
        MixtureConfig,
        source="",
    )
    assert [entry.each.cap for entry in mixture.entries] == [300, 200, 1000, 50]
    sizes = {
        "muffin": {"nq": 4000, "rte": 100},
        "t0_sf": {"ropes": 3000, "wiqa": 500},
        "cot": {"gsm8k": 800},
        "niv2": {f"task{number:03}": 1000 for number in range(40)},
    }
    datasets = [dataset(name, "task", tasks) for name, tasks in sizes.items()]
    counts = pass_counts(mixture, datasets)
    whole = sum(counts.values())
    parts = {name: sum(count for key, count in counts.items() if key.startswith(f"{name}[")) / whole for name in sizes}
    assert parts == pytest.approx({"muffin": 0.4605, "t0_sf": 0.2793, "cot": 0.0180, "niv2": 0.2422}, abs=0.005)
    assert counts["muffin[nq]"] / counts["muffin[rte]"] == pytest.approx(3, rel=0.02)
    assert counts["t0_sf[ropes]"] / counts["t0_sf[wiqa]"] == pytest.approx(1, rel=0.01)
    # No task more than twice, over as many passes as it takes until nothing is left.
    built = build_mixture(datasets, mixture, sequence_length=31)
    draws = MixtureDraws(built, capacity=32, seed=1)
    while draws.next_pass() is not None:
        pass
    assert draws.drawn == [2 * len(component.examples) for component in built.components]


def test_flan_2021_uses_30_000_examples_and_counts_3_000():
    data = dataset("flan2021", "dataset", {"squad": 40_000, "rte": 2_490, "anli": 3_500})
    mixture = shipped("flan2021")
    built = build_mixture([data], mixture, sequence_length=31)
    assert {one.name: len(one.examples) for one in built.components} == {
        "flan2021[anli]": 3_500,
        "flan2021[rte]": 2_490,
        "flan2021[squad]": 30_000,
    }
    draws = MixtureDraws(built, capacity=32, seed=1)
    squad = [component.name for component in built.components].index("flan2021[squad]")
    passes = [draws.next_pass() for _ in range(10)]
    assert [len(at) for at in passes[0]] == [3_000, 2_490, 3_000]
    # Ten passes of 3,000 read all 30,000 once.
    assert np.array_equal(np.sort(np.concatenate([one[squad] for one in passes])), np.arange(30_000))


def test_the_pinch_is_40_of_4640():
    mixture = shipped("pinch")
    names = mixture.prefixes()
    datasets = [
        MemoryDataset(name, [([1], [2])] * 4640, columns={"language": [name] * 4640}, documents=range(4640))
        for name in names
    ]
    assert names[0] == "en" and len(names) == 12
    counts = pass_counts(mixture, datasets)
    assert counts["en"] == 4600 and sum(counts.values()) == 4640
    assert sorted(count for name, count in counts.items() if name != "en") == [3] * 4 + [4] * 7


def test_alexatm_is_80_to_20_and_languages_go_by_the_square_root():
    mixture = shipped("alexatm")
    sources = mixture.sources()
    # 10,000 chunks of English, 2,500 of Marathi, of the others 100, the same under both objectives.
    sizes = [{"en": 10_000, "mr": 2_500}.get(source.prefix[-2:], 100) for source in sources]
    names = mixture.dataset_names().values()
    datasets = [MemoryDataset(name, [([1], [2])] * size) for name, size in zip(names, sizes, strict=True)]
    built = build_mixture(datasets, mixture, sequence_length=31)
    share = dict(zip([one.name for one in built.components], built.wanted_shares(), strict=True))
    assert sum(part for name, part in share.items() if name.startswith("denoising/")) == pytest.approx(0.8)
    assert sum(part for name, part in share.items() if "/wikipedia/" in name) == pytest.approx(0.09)
    root = 100 + 50 + 10 * 10  # square roots of 10,000, 2,500 and ten times 100
    assert share["clm/mc4/mc4_en"] == pytest.approx(0.2 * 0.91 * 100 / root)
    assert share["clm/mc4/mc4_mr"] == pytest.approx(0.2 * 0.91 * 50 / root)
    assert share["denoising/wikipedia/wikipedia_te"] == pytest.approx(0.8 * 0.09 * 10 / root)


def test_validation_defaults_to_what_the_mixture_holds_out():
    data = DataConfig(mixture=shipped("xp3"), mixture_root=None)
    assert len(data.validation_datasets) == 46 and data.validation_datasets[0].split == "0.95:1"
