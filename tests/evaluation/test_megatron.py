"""The parallel engine against transformers: scores and greedy answers at every layout, packed against unpacked."""

import json
import shutil
from pathlib import Path

import pytest

from megatron_xmtf.cli import main
from megatron_xmtf.config import ParallelConfig
from megatron_xmtf.data.tokenizer import Tokenizer
from megatron_xmtf.errors import NonFiniteError, RankFailedError
from megatron_xmtf.evaluation import evaluate as evaluation
from megatron_xmtf.evaluation.evaluate import evaluate_checkpoint, evaluate_huggingface, generate_checkpoint
from megatron_xmtf.evaluation.huggingface import HuggingFaceBackend
from megatron_xmtf.evaluation.tasks import load_tasks
from megatron_xmtf.parallel.launch import run_ranks
from tests.evaluation.test_huggingface import random_pairs, scores_one_by_one

TP, PP, SP = "tensor_model_parallel_size", "pipeline_model_parallel_size", "sequence_parallel"
VPP = "virtual_pipeline_model_parallel_size"


@pytest.fixture(scope="module")
def model(tiny_hf: Path, tiny_checkpoint: Path) -> tuple[Path, Path]:
    """The same four-layer model as a Hugging Face directory and as a checkpoint."""
    return tiny_hf, tiny_checkpoint


def ask(pairs, prompts, settings, *, backend, tokenizer, show_progress):
    """Runs in every rank."""
    backend.logits_per_batch = settings.get("logits_per_batch", backend.logits_per_batch)
    told: list[int] = []
    scores = backend.score(pairs, advance=told.append)
    answers = backend.generate(prompts, max_new_tokens=6, eos_id=tokenizer.eos_id, advance=told.append)
    return scores, answers, sum(told)


def in_ranks(checkpoint: Path, world_size: int, sizes: dict, pairs, prompts, **settings) -> list:
    arguments = (checkpoint, ParallelConfig(**sizes), "fp32", ask, (pairs, prompts, settings))
    return run_ranks(evaluation._on_checkpoint, world_size=world_size, arguments=arguments)


@pytest.mark.parametrize(
    ("world_size", "sizes"),
    [(1, {}), (2, {}), (2, {TP: 2, SP: True}), (2, {PP: 2, VPP: 2}), (4, {TP: 2, PP: 2})],
    ids=["TP1", "DP2", "TP2-SP", "PP2-VPP2", "TP2-PP2"],
)
def test_scores_and_answers_equal_transformers(model: tuple[Path, Path], world_size: int, sizes: dict) -> None:
    hf, checkpoint = model
    backend = HuggingFaceBackend.load(hf)
    pairs = random_pairs(50, backend.vocab_size, seed=4)
    prompts = [inputs for inputs, _ in random_pairs(5, backend.vocab_size, seed=5)]
    expected = scores_one_by_one(hf, pairs)
    answers = backend.generate(prompts, max_new_tokens=6, eos_id=Tokenizer.load(hf).eos_id)
    assert max(expected) - min(expected) > 5, "the model is too flat to tell right from wrong"
    results = in_ranks(checkpoint, world_size, sizes, pairs, prompts)
    for scores, generated, told in results:
        assert scores == pytest.approx(expected, abs=1e-4)
        assert generated == answers
        assert told == len(pairs) + len(prompts)


def test_scores_do_not_depend_on_packing(model: tuple[Path, Path]) -> None:
    """One row a batch, and one pair alone, against many rows a batch: neighbours in a row leak nothing."""
    _, checkpoint = model
    pairs = random_pairs(40, 300, seed=6)
    together = in_ranks(checkpoint, 1, {}, pairs, [])[0][0]
    assert in_ranks(checkpoint, 1, {}, pairs, [], logits_per_batch=1)[0][0] == pytest.approx(together, abs=1e-4)
    assert in_ranks(checkpoint, 1, {}, pairs[7:8], [])[0][0] == pytest.approx(together[7:8], abs=1e-4)


def test_checkpoint_and_directory_give_the_same_results(model: tuple[Path, Path], tmp_path: Path) -> None:
    hf, checkpoint = model
    days = ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"]
    with open(tmp_path / "days.jsonl", "w", encoding="utf-8") as stream:
        for i in range(21):
            choices = [days[(i + step) % 7] for step in range(1, 3 + i % 3)]
            record = {"inputs": f"After {days[i % 7]}?", "targets": choices[i % 2], "choices": choices}
            stream.write(json.dumps({**record, "language": "en"}) + "\n")
    (tmp_path / "tasks.yaml").write_text(
        "- {name: days, records: days.jsonl}\n"
        "- {name: say, records: days.jsonl, metric: exact_match, generation: {max_new_tokens: 3}, limit: 4}\n"
    )
    tasks = load_tasks([tmp_path / "tasks.yaml"])
    parallel = ParallelConfig(**{TP: 2, PP: 2})
    assert evaluate_checkpoint(checkpoint, tasks, parallel=parallel, world_size=4) == evaluate_huggingface(hf, tasks)
    arguments = ["--tasks", str(tmp_path / "tasks.yaml"), "--output", str(tmp_path / "out"), "--nproc", "2"]
    assert main(["evaluate", "--checkpoint", str(checkpoint), *arguments, "--tensor-model-parallel-size", "2"]) == 0
    written = json.loads((tmp_path / "out" / "results.json").read_text(encoding="utf-8"))
    assert written["step"] == 0 and written["config_hash"] is None and len(written["results"]) == 2


def test_a_run_is_asked_the_tasks_of_its_configuration(
    model: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(model[1], tmp_path / "run" / "checkpoints" / "step_0000020")
    (tmp_path / "days.jsonl").write_text('{"inputs": "Monday", "targets": "a", "choices": ["a", "b"]}\n')
    (tmp_path / "tasks.yaml").write_text("- {name: days, language: en, records: days.jsonl}\n")
    config = {
        "model": str(model[1]),
        "output": str(tmp_path / "run"),
        "data": {"train": [{"prefix": "unused"}]},
        "schedule": {"train_steps": 1},
        "parallel": {PP: 2},
    }
    (tmp_path / "train.json").write_text(json.dumps(config))  # JSON is YAML
    arguments = ["evaluate", str(tmp_path / "train.json")]
    assert main(arguments) == 2
    assert "evaluation.tasks names no task file" in capsys.readouterr().err
    assert main([*arguments, f"evaluation.tasks=[{tmp_path / 'tasks.yaml'}]"]) == 0
    written = json.loads((tmp_path / "run" / "evaluation" / "results.json").read_text(encoding="utf-8"))
    assert written["model"].endswith("step_0000020") and written["results"][0]["n"] == 1


def test_impossible_sizes_and_verbs_on_a_checkpoint(
    model: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, checkpoint = model
    sizes = ["--tensor-model-parallel-size", "3"]
    assert main(["generate", "--checkpoint", str(checkpoint), "--prompt", "Monday", *sizes]) == 2
    assert "tensor_model_parallel_size=3" in capsys.readouterr().err
    assert main(["generate", "--checkpoint", str(checkpoint), "--prompt", "Monday", "--nproc", "0"]) == 2
    text = generate_checkpoint(checkpoint, ["Monday"], parallel=ParallelConfig(), world_size=1, max_new_tokens=4)
    capsys.readouterr()
    arguments = ["--checkpoint", str(checkpoint), "--prompt", "Monday", "--max-new-tokens", "4"]
    assert main(["generate", *arguments]) == 0
    assert (
        capsys.readouterr().out == "prompt  Monday\ntext    " + "\n        ".join(text[0].strip().splitlines()) + "\n"
    )


def ask_broken(*, backend, tokenizer, show_progress):
    import torch

    with torch.no_grad():
        next(iter(backend.chunks[-1].decoder.final_layernorm.parameters())).fill_(float("nan"))
    return backend.score([([40, 41], [42])])


def test_nan_is_an_error_on_every_rank(model: tuple[Path, Path]) -> None:
    arguments = (model[1], ParallelConfig(**{PP: 1}), "fp32", ask_broken, ())
    with pytest.raises((NonFiniteError, RankFailedError), match="NaN"):
        run_ranks(evaluation._on_checkpoint, world_size=2, arguments=arguments)
