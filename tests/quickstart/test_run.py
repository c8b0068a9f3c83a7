"""The whole path of each family with a few steps of a very small model: stages, files, keys; not the accuracy."""

import html
import json
import re

import pytest

from megatron_xmtf.cli import main
from megatron_xmtf.config import load_config
from megatron_xmtf.errors import ConfigError
from megatron_xmtf.quickstart.families import BLOOM, FAMILIES, MT5
from megatron_xmtf.quickstart.outcome import task_stories
from megatron_xmtf.quickstart.plan import Paths, Sizes, choose_layout
from megatron_xmtf.quickstart.questions import TASKS
from megatron_xmtf.quickstart.run import run_quickstart

TINY = Sizes(
    languages=4,
    text_rounds=6,
    english_countries=4,
    questions_per_language=2,
    vocab_size=512,
    hidden_size=32,
    num_layers=2,
    sequence_length=128,
    encoder_length=128,
    decoder_length=64,
    pretrain_steps=3,
    finetune_steps=2,
)


@pytest.fixture(scope="module", params=[BLOOM, MT5], ids=lambda family: family.name)
def family(request):
    return request.param


@pytest.fixture(scope="module")
def finished(tmp_path_factory, family):
    root = tmp_path_factory.mktemp("quickstart") / "out"
    summary, words = run_quickstart(root, family=family, nproc=4, sizes=TINY)
    return Paths(root), summary, words


def test_summary_has_every_stage_task_and_language(finished, family) -> None:
    paths, summary, _ = finished
    assert summary["family"] == family.name
    assert summary == json.loads((paths.root / "summary.json").read_text(encoding="utf-8"))
    assert list(summary["seconds"]["stages"]) == [name for name in family.stage_budgets if name != "load"]
    assert summary["seconds"]["total"] >= sum(summary["seconds"]["stages"].values()) - 0.1
    assert summary["max_abs_logit_difference"] <= 1e-4
    assert summary["languages"] == 4
    assert (summary["finetune"]["tensor_model_parallel_size"], summary["finetune"]["pipeline_model_parallel_size"]) == (
        2,
        2,
    )
    for run, steps in (("pretrain", 3), ("finetune", 2)):
        assert summary[run]["steps"] == steps
        for loss in (summary[run]["first_loss"], summary[run]["last_loss"]):
            assert 5 < loss < 7  # a uniform guess costs ln 512 = 6.2
    measured = {(entry["task"], entry["language"], entry["dataset"]) for entry in summary["accuracy"]}
    assert measured == {
        (task, language, dataset)
        for task in TASKS
        for language, dataset in [
            ("en", "trained_items"),
            ("en", "held_out_items"),
            ("ar", "zero_shot"),
            ("as", "zero_shot"),
            ("bn", "zero_shot"),
        ]
    }
    for entry in summary["accuracy"]:
        assert 0 <= entry["before"] <= 1 and 0 <= entry["after"] <= 1 and entry["n"] > 0
        assert entry["chance"] == 0.25
    assert list(summary["tasks"]) == list(TASKS)


def test_files_are_kept_and_can_be_used_again(finished) -> None:
    paths, _, words = finished
    for name in ("pretrain", "finetune"):
        config = load_config(paths.config(name))
        assert (paths.run(name) / "metrics.jsonl").read_text(encoding="utf-8").count("\n") == config.train_steps
    for name in ("initial_hf", "pretrained_hf", "hf"):
        assert {"config.json", "model.safetensors", "tokenizer.json"} <= {
            file.name for file in (paths.root / name).iterdir()
        }
    assert (paths.checkpoints / "initial" / "manifest.json").is_file()
    assert str(paths.hf) in words and all(task in words for task in TASKS)


def test_page_is_offline_and_shows_every_language(finished, family) -> None:
    paths, _, words = finished
    page = (paths.root / "report.html").read_text(encoding="utf-8")
    assert not re.search(r"(src|href)\s*=\s*[\"']?(https?:)?//", page)
    assert all(language in page for language in ("Arabic (ar)", "Assamese (as)", "Bangla (bn)"))
    assert page.count("<svg") == 4  # languages x tasks, tasks, two losses
    assert family.title in page and family.words_on_before in html.unescape(page)
    others = {other.title.split()[1] for other in FAMILIES.values()} - {family.title.split()[1]}
    assert not any(other in page + words for other in others)


def test_exported_model_is_the_pretrained_one_finetuned(finished) -> None:
    from safetensors.numpy import load_file

    paths, _, _ = finished
    before, after = (load_file(directory / "model.safetensors") for directory in (paths.pretrained_hf, paths.hf))
    assert before.keys() == after.keys()
    assert all((before[name] != after[name]).any() for name in before)


def test_stories_pair_both_evaluations(finished) -> None:
    from megatron_xmtf.evaluation.results import TaskResult

    def results(english: float, swahili: float, urdu: float) -> list[TaskResult]:
        rows = [("trained_items", "en", english), ("held_out_items", "en", english)]
        rows += [("zero_shot", "sw", swahili), ("zero_shot", "ur", urdu)]
        return [
            TaskResult(task, dataset, language, "t", "en", "accuracy", value, 0.05, 200, 0.25, 0.3)
            for task in TASKS
            for dataset, language, value in rows
        ]

    story = task_stories(results(0.3, 0.2, 0.3), results(0.9, 0.5, 0.7))[0]
    assert story.trained_items == (0.3, 0.9) and story.zero_shot == pytest.approx((0.25, 0.6))
    assert story.languages == (("ur", 0.3, 0.7), ("sw", 0.2, 0.5)) and story.num_questions == 400
    assert story.stderr == pytest.approx((0.6 * 0.4 / 400) ** 0.5)
    assert story.transfers
    assert not task_stories(results(0.3, 0.2, 0.3), results(0.9, 0.2, 0.35))[0].transfers


def test_exported_model_is_of_the_family(finished, family) -> None:
    from safetensors.numpy import load_file
    from transformers import AutoConfig, AutoTokenizer

    paths, _, _ = finished
    config = AutoConfig.from_pretrained(paths.hf, local_files_only=True)
    assert config.model_type == family.name and config.vocab_size == TINY.vocab_size
    ids = AutoTokenizer.from_pretrained(paths.hf, local_files_only=True)("What?")["input_ids"]
    assert (ids[-1] == config.eos_token_id) is config.is_encoder_decoder
    tensors = load_file(paths.hf / "model.safetensors")
    entries = load_config(paths.config("pretrain")).data.train
    assert [entry.objective is None for entry in entries] == [family is BLOOM]
    assert load_config(paths.config("finetune")).data.train[0].objective is None
    if family is BLOOM:
        assert "lm_head.weight" not in tensors  # tied
    else:
        assert (config.num_layers, config.num_decoder_layers, config.feed_forward_proj) == (2, 2, "gated-gelu")
        assert tensors["lm_head.weight"].shape == tensors["shared.weight"].shape
        assert (tensors["lm_head.weight"] != tensors["shared.weight"]).any()


def test_sentinels_are_the_last_words_downwards(finished, family) -> None:
    from transformers import AutoTokenizer

    paths, _, _ = finished
    tokenizer = AutoTokenizer.from_pretrained(paths.tokenizer, local_files_only=True)
    assert len(tokenizer) == TINY.vocab_size
    sentinels = [word for word in tokenizer.get_vocab() if word.startswith("<extra_id_")]
    assert len(sentinels) == family.num_sentinels
    for number in range(family.num_sentinels):
        assert tokenizer.convert_tokens_to_ids(f"<extra_id_{number}>") == TINY.vocab_size - 1 - number


def test_unknown_family_is_refused(tmp_path, capsys) -> None:
    assert main(["quickstart", "--output", str(tmp_path / "out"), "--family", "mt0"]) == 2
    assert "--family mt0" in (error := capsys.readouterr().err) and "bloom" in error and "mt5" in error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("nproc", "finetuning"), [(1, (1, 1)), (2, (1, 2)), (4, (2, 2))])
def test_layouts(nproc: int, finetuning: tuple[int, int]) -> None:
    pretraining, chosen = choose_layout(nproc)
    assert (chosen.tensor_model_parallel_size, chosen.pipeline_model_parallel_size) == finetuning
    assert chosen.world_size == nproc and pretraining.world_size <= nproc


def test_other_nproc_is_refused(tmp_path) -> None:
    with pytest.raises(ConfigError, match=r"--nproc 3: .* 1 .*, 2 .* or 4"):
        run_quickstart(tmp_path / "out", nproc=3)
    assert not (tmp_path / "out").exists()


def test_output_that_is_not_empty_is_refused(tmp_path, capsys) -> None:
    (tmp_path / "mine.txt").write_text("keep me")
    assert main(["quickstart", "--output", str(tmp_path)]) == 2
    assert "not an empty directory" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]
