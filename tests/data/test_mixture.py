import numpy as np
import pytest

from megatron_xmtf.config import DataConfig, MixtureConfig
from megatron_xmtf.config.load import config_from_mapping
from megatron_xmtf.data.build_mixture import build_mixture
from megatron_xmtf.data.mixture import MixtureDraws
from megatron_xmtf.data.packing import pack_mixture
from megatron_xmtf.errors import ConfigError, DatasetError
from tests.data.memory_dataset import MemoryDataset, random_dataset


def dataset(name, languages, *, target=2, documents=None, tasks=None):
    """One example of 1 + target tokens for each language named."""
    columns = {"language": list(languages)} | ({"task": list(tasks)} if tasks else {})
    return MemoryDataset(name, [([1], [2] * target)] * len(languages), columns=columns, documents=documents)


def mixture(**values):
    return config_from_mapping(values, MixtureConfig, source="test")


def build(datasets, **values):
    return build_mixture(datasets, mixture(**values), sequence_length=31)


def drawn(datasets, passes=1, seed=3, **values):
    """Return {component name: (dataset number, ids drawn in each pass)}."""
    built = build(datasets, **values)
    draws = MixtureDraws(built, capacity=10**6, seed=seed)  # rows so long that a pass is the whole
    found = {component.name: (component.dataset, []) for component in built.components}
    for _ in range(passes):
        chosen = draws.next_pass()
        for component, positions in zip(built.components, chosen, strict=True):
            found[component.name][1].append(component.examples.ids[positions])
    return found


def counts(datasets, **values):
    return {name: len(ids[0]) for name, (_, ids) in drawn(datasets, **values).items()}


def test_without_weights_every_example_once_a_pass():
    datasets = [random_dataset(name, size, seed=1) for name, size in (("a", 3), ("b", 0), ("c", 5))]
    found = drawn(datasets, passes=2, entries=[{"prefix": name} for name in "abc"])
    assert [ids.tolist() for ids in found["a"][1]] == [[0, 1, 2]] * 2
    assert [ids.tolist() for ids in found["b"][1]] == [[]] * 2
    assert [ids.tolist() for ids in found["c"][1]] == [[0, 1, 2, 3, 4]] * 2


def test_a_pass_has_as_many_examples_as_the_datasets_hold():
    datasets = [random_dataset("a", 6, seed=1), random_dataset("b", 4, seed=2)]
    found = drawn(datasets, entries=[{"prefix": "a", "weight": 1}, {"prefix": "b", "weight": 3}])
    (a,), (b,) = found["a"][1], found["b"][1]
    assert (len(a), len(b)) == (3, 7)
    assert len(set(a.tolist())) == 3
    assert sorted(np.bincount(b, minlength=4).tolist()) == [1, 2, 2, 2]


@pytest.mark.parametrize("weights", [[1, 1], [5, 1], [1, 40]])
def test_over_a_run_no_example_is_drawn_twice_more_often_than_another(weights):
    datasets = [random_dataset("a", 11, seed=1), random_dataset("b", 30, seed=2)]
    entries = [{"prefix": name, "weight": weight} for name, weight in zip("ab", weights, strict=True)]
    for name, (_, passes) in drawn(datasets, passes=9, entries=entries).items():
        times = np.zeros({"a": 11, "b": 30}[name], int)
        for ids in passes:
            times += np.bincount(ids, minlength=len(times))
            assert times.max() - times.min() <= 1


def test_the_choice_follows_seed_and_pass():
    datasets = [random_dataset("a", 1000, seed=1), random_dataset("b", 10, seed=2)]

    def choice(seed, number):
        entries = [{"prefix": "a", "weight": 1}, {"prefix": "b", "weight": 1}]
        return drawn(datasets, passes=2, seed=seed, entries=entries)["a"][1][number].tolist()

    assert choice(1, 0) == choice(1, 0)
    assert choice(1, 0) != choice(2, 0) and choice(1, 0) != choice(1, 1)


def test_groups_have_their_weight_whatever_they_hold():
    datasets = [random_dataset("a", 90, seed=1), random_dataset("b", 10, seed=2), random_dataset("c", 300, seed=3)]
    entries = [
        {"name": "qa", "weight": 3, "each": {"cap": 30}, "entries": [{"prefix": "a"}, {"prefix": "b"}]},
        {"prefix": "c", "weight": 1},
    ]
    # Sizes count as 30 and 10 in the group and 300 beside it: a pass of 340, three quarters of it for the group.
    assert counts(datasets, entries=entries) == {"qa/a": 191, "qa/b": 64, "c": 85}


def test_tokens_are_what_a_weight_of_tokens_divides():
    datasets = [dataset("short", ["en"] * 450, target=1), dataset("long", ["en"] * 450, target=9)]
    entries = [{"prefix": "short", "weight": 1}, {"prefix": "long", "weight": 1}]
    found = counts(datasets, unit="tokens", entries=entries)
    assert found["short"] * 2 == found["long"] * 10  # 2 and 10 tokens an example
    found = counts(datasets, unit="target_tokens", entries=entries)
    assert found["short"] == found["long"] * 9


def test_a_dataset_is_divided_by_its_languages():
    data = dataset("a", ["en"] * 64 + ["sw"] * 16 + ["th"] * 1)
    assert counts([data], entries=[{"prefix": "a", "by": "language"}]) == {"a[en]": 64, "a[sw]": 16, "a[th]": 1}
    # Square roots 8, 4, 1 of 81 examples.
    assert counts([data], entries=[{"prefix": "a", "by": "language", "temperature": 2}]) == {
        "a[en]": 50,
        "a[sw]": 25,
        "a[th]": 6,
    }
    weights = {"en": 1, "sw": 1, "th": 1}
    assert counts([data], entries=[{"prefix": "a", "by": ["language"], "weights": weights}]) == {
        "a[en]": 27,
        "a[sw]": 27,
        "a[th]": 27,
    }
    with pytest.raises(ConfigError, match="weights of 'a' name en, sw, but its languages are en, sw, th"):
        build([data], entries=[{"prefix": "a", "by": "language", "weights": {"en": 1, "sw": 1}}])


def test_floors_hold_for_every_language_over_all_datasets():
    datasets = [dataset("a", ["en"] * 900 + ["sw"] * 10), dataset("b", ["en"] * 80 + ["sw"] * 10)]
    found = counts(datasets, floors={"language": 0.1}, entries=[{"prefix": "a"}, {"prefix": "b"}])
    assert found == {"a[en]": 827, "a[sw]": 50, "b[en]": 73, "b[sw]": 50}


def test_a_floor_of_an_entry():
    datasets = [dataset("a", ["en"] * 990), dataset("b", ["en"] * 10)]
    assert counts(datasets, entries=[{"prefix": "a"}, {"prefix": "b", "floor": 0.05}]) == {"a": 950, "b": 50}


def test_max_examples_uses_the_same_examples_whatever_else_there_is():
    a, b = random_dataset("a", 500, seed=1), random_dataset("b", 50, seed=2)
    entry = {"prefix": "a", "max_examples": 40}
    alone, beside = (drawn([*rest, a], entries=[*more, entry]) for rest, more in (([], []), ([b], [{"prefix": "b"}])))
    assert alone["a"][1][0].tolist() == beside["a"][1][0].tolist()
    assert len(alone["a"][1][0]) == 40
    fewer = drawn([a], entries=[{"prefix": "a", "max_examples": 30}])["a"][1][0]
    assert set(fewer.tolist()) < set(alone["a"][1][0].tolist())


def test_max_epochs_over_the_whole_run():
    datasets = [random_dataset("a", 20, seed=1), random_dataset("b", 400, seed=2)]
    entries = [{"prefix": "a", "weight": 1, "max_epochs": 2.5}, {"prefix": "b", "weight": 1}]
    found = drawn(datasets, passes=6, entries=entries)
    times = np.bincount(np.concatenate(found["a"][1]), minlength=20)
    assert times.sum() == 50 and times.max() == 3
    # As long as there is some of it, it has its part.
    assert len(found["a"][1][0]) == 50 == len(found["b"][1][0])


def test_a_mixture_that_runs_out_says_when():
    datasets = [random_dataset("a", 20, seed=1)]
    limited = mixture(entries=[{"prefix": "a", "max_epochs": 2}])
    index = pack_mixture(datasets, mixture=limited, sequence_length=31, seed=1)
    assert index.statistics["examples"] == 20
    with pytest.raises(DatasetError, match=r"used up after \d+ rows \(40 examples\).* max_epochs \(2\)"):
        pack_mixture(datasets, mixture=limited, sequence_length=31, rows_needed=1000, seed=1)


def test_statistics_say_what_held_a_component_back():
    datasets = [dataset("a", ["en"] * 30), dataset("b", ["en"] * 900), dataset("c", ["en"] * 20)]
    entries = [{"prefix": "a", "max_epochs": 1}, {"prefix": "b"}, {"prefix": "c", "floor": 0.1}]
    index = pack_mixture(datasets, mixture=mixture(entries=entries), sequence_length=31, rows_needed=120, seed=1)
    parts = {part["name"]: part for part in index.statistics["components"]}
    assert [parts[name]["limited_by"] for name in "abc"] == ["max_epochs", None, "floor"]
    assert parts["c"]["wanted_share"] == pytest.approx(0.1)
    assert sum(part["share"] for part in parts.values()) == pytest.approx(1)
    assert sum(part["examples"] for part in parts.values()) == index.statistics["examples"]


def parallel(language, count=464, first=0):
    return dataset(language, [language] * count, documents=range(first, first + count))


@pytest.mark.parametrize("languages", [1, 3, 11])
def test_a_pinch_is_exact_and_repeats_no_document(languages):
    """P = 1 % of Shaham et al. at a tenth of the size: 40 of 464 examples, the rest English."""
    names = ["ar", "cs", "et", "fi", "he", "hi", "it", "ru", "es", "sw", "zh"][:languages]
    datasets = [parallel("en"), *(parallel(name) for name in names)]
    found = drawn(
        datasets,
        passes=2,
        entries=[{"prefix": "en"}],
        pinch={"prefixes": names, "examples": 40, "languages": names},
    )
    sizes = {name: len(ids[0]) for name, (_, ids) in found.items()}
    assert sizes["en"] == 424 and sum(sizes.values()) == 464
    shares = [sizes[f"pinch[{name}]"] for name in names]
    assert sum(shares) == 40 and max(shares) - min(shares) <= 1 and shares == sorted(shares, reverse=True)
    documents = [datasets[number].documents[ids[0]] for number, ids in found.values()]
    everything = np.concatenate(documents)
    assert len(np.unique(everything)) == 464
    assert all(np.array_equal(*ids) for _, ids in found.values())  # the same in every pass


def test_a_pinch_takes_one_example_of_a_document():
    several = dataset("sw", ["sw"] * 30, documents=np.repeat(np.arange(10), 3))
    found = drawn(
        [parallel("en", 20, first=5), several],
        entries=[{"prefix": "en"}],
        pinch={"prefixes": ["sw"], "examples_per_language": 6},
    )
    ids = found["pinch[sw]"][1][0]
    assert len(np.unique(several.documents[ids])) == 6
    with pytest.raises(ConfigError, match="11 documents of language 'sw' are wanted, 10 are there"):
        build(
            [parallel("en", 20), several],
            entries=[{"prefix": "en"}],
            pinch={"prefixes": ["sw"], "examples_per_language": 11},
        )


def test_a_pinch_needs_documents():
    with pytest.raises(DatasetError, match="which document an example is of"):
        build(
            [parallel("en", 20), dataset("sw", ["sw"] * 9)],
            entries=[{"prefix": "en"}],
            pinch={"prefixes": ["sw"], "examples": 3},
        )


def test_data_config_reads_a_mixture_and_what_it_holds_out():
    values = {
        "split": "0:0.9",
        "validation": "0.9:1",
        "root": "/data",
        "entries": [{"prefix": "x/a"}, {"prefix": "y/a"}],
    }
    data = config_from_mapping({"mixture": values}, DataConfig, source="test")
    assert [(entry.prefix, entry.name) for entry in data.training_datasets] == [
        ("/data/x/a", "x_a"),
        ("/data/y/a", "y_a"),
    ]
    assert [(entry.prefix, entry.split) for entry in data.validation_datasets] == [
        ("/data/x/a", "0.9:1"),
        ("/data/y/a", "0.9:1"),
    ]


def test_what_is_held_out_is_of_the_kind_that_is_trained_on():
    entries = [
        {"name": "g", "where": {"language": "sw"}, "entries": [{"prefix": "a", "exclude": {"template": "*+cot"}}]},
        {"prefix": "b", "where": {"language": "th"}},
        {"prefix": "b", "where": {"language": "hi"}},
    ]
    values = {"split": "0:0.9", "validation": "0.9:1", "exclude": {"template": "draft*"}, "entries": entries}
    data = config_from_mapping({"mixture": values}, DataConfig, source="test")
    found = [(entry.name, entry.where, entry.exclude) for entry in data.validation_datasets]
    assert found == [
        ("a", {"language": ["sw"]}, {"template": ["draft*", "*+cot"]}),
        ("b#1", {"language": ["th"]}, {"template": ["draft*"]}),
        ("b#2", {"language": ["hi"]}, {"template": ["draft*"]}),
    ]
    entries[0]["entries"][0]["where"] = {"language": "en"}
    with pytest.raises(ConfigError, match="`where` names language on the dataset and on a group around it"):
        config_from_mapping({"mixture": values}, DataConfig, source="test")


def test_a_dataset_divided_by_the_column_of_a_floor_names_it_once():
    data = dataset("a", ["en"] * 64 + ["sw"] * 16)
    entries = [{"prefix": "a", "by": "language"}]
    assert list(counts([data], floors={"language": 0.1}, entries=entries)) == ["a[en]", "a[sw]"]


def test_repeats_come_late_and_never_meet_in_a_row():
    """A tenth of the data with half of the mixture: an example of it comes back only after all others of it."""
    datasets = [random_dataset("small", 2_000, seed=1), random_dataset("large", 20_000, seed=2)]
    half = mixture(entries=[{"prefix": "small", "weight": 1}, {"prefix": "large", "weight": 1}])
    index = pack_mixture(datasets, mixture=half, sequence_length=31, rows_needed=6_000, seed=1)
    keys = index.dataset_ids.astype(np.int64) * 10**6 + index.example_ids
    rows = np.repeat(np.arange(len(index)), np.diff(index.row_offsets))
    assert len(np.unique(np.stack([rows, keys]), axis=1).T) == len(keys)
    small = index.example_ids[index.dataset_ids == 0]
    assert len(small) > 4_000 and len(np.unique(small[:2_000])) == 2_000
    assert index.statistics["datasets"][1]["repeats"] == 0
    assert index.statistics["fill_fraction"] > 0.99
