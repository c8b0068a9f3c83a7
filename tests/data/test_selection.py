import numpy as np
import pytest

from megatron_xmtf.config import DataConfig, DatasetConfig, MixtureConfig, load_mixture
from megatron_xmtf.config.load import config_from_mapping
from megatron_xmtf.config.mixture import parse_interval
from megatron_xmtf.data.packing import pack_dataset, pack_mixture
from megatron_xmtf.data.selection import choose_examples, in_interval, scramble, select_examples
from megatron_xmtf.errors import ConfigError, DatasetError, MissingError
from tests.data.memory_dataset import MemoryDataset


def parallel_dataset(name, documents, *, templates=("a", "b")):
    """Every document under every template."""
    count = len(documents) * len(templates)
    return MemoryDataset(
        name,
        [([1], [2])] * count,
        columns={"language": [name] * count, "template": [t for _ in documents for t in templates]},
        documents=np.repeat(documents, len(templates)),
    )


def splitmix64(state):
    """Oracle: one output of the published generator, in Python's own integers."""
    mask = 2**64 - 1
    z = state & mask
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
    return z ^ (z >> 31)


def test_scrambling_is_splitmix64():
    numbers = [0, 1, 7, 2**63, 2**64 - 1]
    for seed in (0, 5):
        expected = [splitmix64(number + 0x9E3779B97F4A7C15 * (seed + 1)) for number in numbers]
        assert scramble(np.array(numbers, np.uint64), seed=seed).tolist() == expected
    # The generator's first output for state 0, as its reference implementation prints it.
    assert scramble(np.zeros(1, np.uint64), seed=0)[0] == 0xE220A8397B1DCDAF


def random_bounds(random):
    """Two to five intervals that partition [0, 1], written the ways that people write them."""
    inner = sorted({round(float(bound), int(random.integers(1, 13))) for bound in random.random(random.integers(1, 5))})
    bounds = [0.0, *(bound for bound in inner if 0 < bound < 1), 1.0]
    words = [str(bound) if random.random() < 0.5 else f"{bound:.15g}" for bound in bounds]
    return [f"{begin}:{end}" for begin, end in zip(words[:-1], words[1:], strict=True)]


@pytest.mark.parametrize("block", range(10))
def test_train_and_validation_are_disjoint_for_random_splits(block):
    """1,000 specifications in all: every example in exactly one part, and no document in two, over all languages."""
    random = np.random.default_rng(block)
    for _ in range(100):
        documents = random.integers(0, 2**64, size=int(random.integers(1, 60)), dtype=np.uint64)
        datasets = [parallel_dataset(name, documents[random.random(len(documents)) < 0.8]) for name in ("en", "sw")]
        seed, intervals = int(random.integers(0, 1000)), random_bounds(random)
        owner = {}
        for dataset in datasets:
            parts = [in_interval(dataset.documents, interval, seed=seed) for interval in intervals]
            assert np.array_equal(np.sum(parts, axis=0), np.ones(len(dataset)))
            for number, part in enumerate(parts):
                for document in dataset.documents[part].tolist():
                    assert owner.setdefault(document, number) == number


def test_training_and_validation_rows_share_no_document():
    documents = np.random.default_rng(0).integers(0, 2**64, size=500, dtype=np.uint64)
    datasets = [parallel_dataset("en", documents), parallel_dataset("sw", documents)]
    entries = [{"prefix": "en"}, {"prefix": "sw"}]
    data = DataConfig(mixture={"split": "0:0.8", "validation": "0.8:1", "entries": entries})
    index = pack_mixture(datasets, mixture=data.training_mixture, sequence_length=31, seed=1)
    trained = {
        int(datasets[d].documents[e]) for d, e in zip(index.dataset_ids, index.example_ids.tolist(), strict=True)
    }
    held_out = set()
    for entry, dataset in zip(data.validation_datasets, datasets, strict=True):
        held_out |= set(dataset.documents[pack_dataset(dataset, entry=entry, sequence_length=31).example_ids].tolist())
    assert not trained & held_out and len(trained) + len(held_out) == 500
    assert 60 < len(held_out) < 140  # 100 expected, 9 the standard deviation


def test_without_documents_the_place_decides():
    dataset = MemoryDataset("a", [([1], [2])] * 1000)
    train, validation = (select_examples(dataset, [], split=split, split_seed=0) for split in ("0:0.95", "0.95:1"))
    assert np.array_equal(train, ~validation) and 25 < validation.sum() < 80


def columns_dataset():
    return MemoryDataset(
        "a",
        [([1], [2])] * 4,
        columns={"language": ["en", "sw", "sw", "th"], "template": ["qa", "qa", "qa+cot", "qa+3shot"]},
    )


@pytest.mark.parametrize(
    "selections, expected",
    [
        ([{"where": {"language": "sw"}}], [1, 2]),
        ([{"where": {"language": ["sw", "th"], "template": "*+*"}}], [2, 3]),
        ([{"where": {"language": ["sw", "th"]}}, {"exclude": {"template": ["*+cot"]}}], [1, 3]),
        ([{"where": {"template": "qa"}}], [0, 1]),
    ],
)
def test_names_are_chosen_by_pattern(selections, expected):
    entries = [DatasetConfig(prefix="a", **values) for values in selections]
    assert np.flatnonzero(select_examples(columns_dataset(), entries, split=None, split_seed=0)).tolist() == expected


def test_selections_that_match_nothing_are_errors():
    def select(**values):
        select_examples(columns_dataset(), [DatasetConfig(prefix="a", **values)], split=None, split_seed=0)

    with pytest.raises(ConfigError, match="language: swa.* matches no language of dataset 'a'.*sw"):
        select(where={"language": "swa"})
    with pytest.raises(ConfigError, match="none of its 4 examples.*where language: en; where template: .cot"):
        select(where={"language": "en", "template": "*cot"})
    with pytest.raises(DatasetError, match="has no column 'task'.*language, template"):
        select(where={"task": "nli"})


def test_choosing_is_stable_and_exact():
    for count, wanted in ((1, 1), (100, 7), (100, 100)):
        assert choose_examples(count, wanted, seed=3).sum() == wanted
    few, more = (set(np.flatnonzero(choose_examples(1000, wanted, seed=3))) for wanted in (50, 60))
    assert few < more


@pytest.mark.parametrize("text", ["", "0.5", "0.5:0.5", "0.9:0.1", "-0.1:1", "0:1.1", "a:b", "0:nan", "0:1/0"])
def test_intervals_that_are_none(text):
    with pytest.raises(ValueError, match="not an interval"):
        parse_interval(text)


@pytest.mark.parametrize(
    "values, message",
    [
        ({"entries": []}, "at least 1 item"),
        ({"entries": [{"name": "x"}]}, "either `prefix`"),
        ({"entries": [{"prefix": "a", "entries": [{"prefix": "b"}]}]}, "either `prefix`"),
        ({"entries": [{"prefix": "a", "weight": 1}, {"prefix": "b"}]}, "1 of 2 entries have a weight.*missing: b"),
        ({"entries": [{"prefix": "a", "weights": {"en": 1}}]}, "needs one column in `by`"),
        ({"entries": [{"prefix": "a", "temperature": 2}]}, "`temperature` is for a group"),
        ({"entries": [{"prefix": "a", "by": "lang"}]}, "by"),
        ({"entries": [{"prefix": "a", "by": "language", "max_epochs": 1}]}, "each: {max_epochs"),
        ({"validation": "0.9:1", "entries": [{"prefix": "a"}]}, "overlaps .*'0:1'"),
        ({"validation": "0.9:1", "entries": [{"prefix": "a", "split": "0:0.95"}]}, "overlaps .*'0:0.95'"),
        ({"pinch": {"prefixes": ["b"]}, "entries": [{"prefix": "a"}]}, "exactly one of `examples`"),
        ({"entries": [{"prefix": "a", "wieght": 1}]}, "unknown key 'entries.0.wieght'.*weight"),
    ],
)
def test_mixtures_that_make_no_sense(values, message):
    with pytest.raises(ConfigError, match=message):
        config_from_mapping(values, MixtureConfig, source="test")


def test_a_plain_list_or_a_mixture_but_not_both():
    with pytest.raises(ConfigError, match="exactly one of `train`"):
        config_from_mapping({}, DataConfig, source="test")
    with pytest.raises(ConfigError, match="exactly one of `train`"):
        values = {"train": [{"prefix": "a"}], "mixture": {"entries": [{"prefix": "a"}]}}
        config_from_mapping(values, DataConfig, source="test")


def test_an_unknown_mixture_names_the_nearest():
    with pytest.raises(MissingError, match="neither a file nor a shipped mixture.*flan2022"):
        load_mixture("flan2202")
