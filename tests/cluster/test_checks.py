"""What is known before a queue is waited for: each fault is found, with its remedy, and all of them at once."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron_xmtf.checkpoint.reader import CheckpointReader
from megatron_xmtf.cli import main
from megatron_xmtf.cluster.checks import checkpoint_bytes
from megatron_xmtf.config import RunConfig
from megatron_xmtf.models.architecture import BloomArchitecture
from megatron_xmtf.training.launch import train

Submit = Callable[..., dict[str, Any]]


@pytest.fixture
def submit(
    run_config: Callable[..., RunConfig],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> Submit:
    """Dry-run a small run; return findings by topic, the worst of each."""
    monkeypatch.setenv("PATH", "/nowhere")  # no Slurm
    values = run_config(slurm={"nodes": 2, "ranks_per_node": 2}).model_dump(mode="json")
    (tmp_path / "train.yaml").write_text(yaml.safe_dump(values))

    def put(*words: str, code: int = 0, before: tuple[str, ...] = ()) -> dict[str, Any]:
        for verb in before:
            assert main([verb, str(tmp_path / "train.yaml")]) == 0
        capsys.readouterr()
        assert main(["submit", str(tmp_path / "train.yaml"), "--dry-run", "--json", *words]) == code
        order = {"ok": 0, "note": 1, "warning": 2, "error": 3}
        found: dict[str, Any] = json.loads(capsys.readouterr().out)
        return {one["topic"]: one for one in sorted(found["findings"], key=lambda one: order[one["level"]])}

    return put


def test_a_run_that_is_in_order(submit: Submit, tmp_path: Path) -> None:
    found = submit(before=("pack",))
    assert found["sizes"]["text"] == "2 nodes x 2 ranks = 4 = TP1 x PP1 x DP4"
    assert found["inputs"]["level"] == "ok"
    assert found["disk"]["level"] == "ok"
    assert found["slurm"]["text"].startswith("not asked")
    assert not (tmp_path / "run" / "config.yaml").exists(), "a check leaves nothing of a run behind"


@pytest.mark.parametrize(
    ("words", "topic", "text"),
    [
        (["--nodes", "3"], "sizes", "use"),
        (["parallel.tensor_model_parallel_size=8"], "sizes", "must be a multiple of 8"),
        ([], "inputs", "xmtf pack CONFIG builds it"),
        (["data.train.0.prefix=nowhere"], "inputs", "nowhere"),
        (["model=nowhere"], "inputs", "nowhere"),
        (["slurm.hardware=h100", "parallel.tensor_model_parallel_size=3"], "time", "3"),
    ],
)
def test_each_fault_is_an_error_with_a_remedy(words: list[str], topic: str, text: str, submit: Submit) -> None:
    found = submit(*words, code=2)
    assert found[topic]["level"] == "error"
    assert text in found[topic]["text"]


def test_a_job_that_waits_for_others_may_lack_inputs(submit: Submit) -> None:
    assert submit("--after", "12", "model=nowhere")["inputs"]["level"] == "note"


def test_a_stop_file_and_short_times_are_told(submit: Submit, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "stop").touch()
    found = submit("slurm.time=1", "slurm.signal_seconds=45", "stop.slurm_margin_minutes=0", code=2)
    assert "asks the run not to go on" in found["inputs"]["text"]
    assert "in which nothing is trained" in found["limit"]["text"]
    found = submit("slurm.time=5", "slurm.signal_seconds=45", code=2)
    assert "stop.slurm_margin_minutes=10: newer Slurms" in found["limit"]["text"]


def test_checkpoints_are_as_large_as_estimated(run_config: Callable[..., RunConfig], tmp_path: Path) -> None:
    """Beside a checkpoint that is really written; the vocabulary's padding, 300 to 384, is on the disk too."""
    config = run_config(schedule={"train_steps": 1}, precision="bf16")
    train(config, nproc=1)
    with CheckpointReader(tmp_path / "run" / "checkpoints" / "step_0000001") as reader:
        # Without what torch writes around each tensor, which is no more for a large one.
        written = sum(tensor.bytes for name, tensor in reader.tensors.items() if not name.startswith("rng."))
    architecture = BloomArchitecture(hidden_size=64, num_layers=4, num_attention_heads=4, vocab_size=384)
    assert checkpoint_bytes(config, architecture) == written


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["--", "train", "x"], "a run is submitted without"),
        (["--nodes", "2", "--", "export", "--checkpoint", "a", "--output", "b"], "export runs on one node"),
        (["--nodes", "2", "--", "evaluate", "--hf", "x", "--tasks", "t", "--output", "o"], "read by one process"),
        (["--chain", "2", "--", "pack", "x"], "for training"),
        (["--each-checkpoint", "--", "evaluate", "--checkpoint", "x"], "{checkpoint} and"),
        (["--chain", "0"], "at least 1"),
        (["--after", "x12"], "number of a job"),
    ],
)
def test_what_cannot_be_asked_for(
    words: list[str], text: str, submit: Submit, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["submit", str(tmp_path / "train.yaml"), "--dry-run", *words]) == 2
    assert text in capsys.readouterr().err


def test_a_wrong_option_of_the_verb_is_found_before_it_waits(submit: Submit, tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["submit", str(tmp_path / "train.yaml"), "--dry-run", "--", "export", "--chekpoint", "a", "--output", "b"])
    assert ended.value.code == 2
