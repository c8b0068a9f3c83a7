"""`xmtf train` as a user starts it: real ranks, real files, and every way it can end."""

import contextlib
import io
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron_xmtf.cli import main
from megatron_xmtf.config import load_config
from megatron_xmtf.training.trainer import Trainer

STEP_KEYS = """step loss grad_norm learning_rate rows examples tokens target_tokens fill_fraction step_time_ms
tokens_per_second target_tokens_per_second model_tflops_per_gpu mfu_percent useful_tflops_per_gpu peak_memory_gib
loss_scale skipped train_loss/tiny train_loss/tiny/en train_loss/tiny/fr train_loss_by_language/en
train_loss_by_language/fr""".split()
STEPS = 8


def write_run(directory: Path, checkpoint: Path, pairs: Path) -> Path:
    """Write the configuration of a run of 8 steps in `directory`/run."""
    values: dict[str, Any] = {
        "model": str(checkpoint),
        "output": str(directory / "run"),
        "data": {"train": [{"prefix": str(pairs)}], "validation": [{"prefix": str(pairs), "name": "held"}]},
        "batch": {"micro_batch_size": 2, "global_batch_size": 8, "sequence_length": 64},
        "schedule": {"train_steps": STEPS},
        "optimizer": {"lr": 1e-3},
        "precision": "fp32",
        "checkpoint": {"save_interval": 4},
        "evaluation": {"interval": 4, "rows": 4},
    }
    path = directory / "train.yaml"
    path.write_text(yaml.safe_dump(values), encoding="utf-8")
    return path


def xmtf(*words: Any) -> tuple[int, str, str]:
    """Call the command in this process; return exit code, standard output and standard error."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main([str(word) for word in words])
    return code, out.getvalue(), err.getvalue()


def metrics(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def steps_kept(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints").iterdir())


def status(run: Path) -> dict[str, Any]:
    value: dict[str, Any] = json.loads((run / "status.json").read_text(encoding="utf-8"))
    return value


@pytest.fixture(scope="module")
def finished(tiny_checkpoint: Path, tiny_pairs: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A run of 8 steps at TP2 over two ranks: its configuration file, run directory and JSON result."""
    directory = tmp_path_factory.mktemp("finished")
    config = write_run(directory, tiny_checkpoint, tiny_pairs)
    code, out, err = xmtf("train", config, "--nproc", 2, "parallel.tensor_model_parallel_size=2", "--json")
    assert code == 0, err
    return config, directory / "run", json.loads(out)


@pytest.fixture
def copied(finished: Any, tmp_path: Path) -> Any:
    """The finished run, copied: its configuration file and run directory."""
    config, run, _ = finished
    shutil.copytree(run, tmp_path / "run")
    return config, tmp_path / "run"


def test_metrics_have_exactly_the_keys_of_the_contract(finished: Any) -> None:
    lines = metrics(finished[1])
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    for line in lines:
        validation = {"loss/held", "loss/held/en", "loss/held/fr"} if line["step"] % 4 == 0 else set()
        assert set(line) - {"loss/held"} == (set(STEP_KEYS) | validation) - {"loss/held"}
        assert line["rows"] == 8
        assert 0 < line["target_tokens"] < line["tokens"] <= 8 * 65


def test_losses_fall_and_the_result_names_them(finished: Any) -> None:
    _, run, result = finished
    losses = [line["loss"] for line in metrics(run)]
    assert losses[-1] < losses[0] - 0.5
    assert result["first_step"] == 1
    assert result["last_step"] == STEPS
    assert (result["first_loss"], result["last_loss"]) == (losses[0], losses[-1])
    assert Path(result["checkpoint"]) == run / "checkpoints" / "step_0000008"


def test_the_run_directory_holds_what_the_contract_says(finished: Any) -> None:
    config, run, _ = finished
    overrides = ["parallel.tensor_model_parallel_size=2"]
    assert load_config(run / "config.yaml") == load_config(config, overrides)
    assert steps_kept(run) == ["step_0000004", "step_0000008"]
    steps = {"step": 8, "train_steps": 8}
    assert status(run) == {"exit_code": 0, "name": "DONE", "message": "step 8 of 8 done", **steps}


def test_a_dry_run_checks_and_packs_but_does_not_train(tiny_checkpoint: Path, tiny_pairs: Path, tmp_path: Path) -> None:
    config = write_run(tmp_path, tiny_checkpoint, tiny_pairs)
    assert xmtf("train", config, "--dry-run")[0] == 0
    assert {path.name for path in (tmp_path / "run").iterdir()} == {"config.yaml", "packing"}


def test_a_finished_run_has_nothing_left_to_do(copied: Any) -> None:
    config, run = copied
    before = (run / "metrics.jsonl").read_bytes()
    code, out, _ = xmtf("train", config, f"output={run}")
    assert code == 0
    assert "nothing to do: step 8 is done already" in out
    assert (run / "metrics.jsonl").read_bytes() == before


def test_a_changed_run_is_resumed_only_when_allowed(copied: Any) -> None:
    config, run = copied
    longer = ["schedule.train_steps=9", "optimizer.lr=5e-4", f"output={run}"]
    code, _, err = xmtf("train", config, *longer)
    assert code == 4
    assert "optimizer.lr: 0.001 -> 0.0005" in err
    assert "--allow-change optimizer.lr" in err
    assert status(run)["exit_code"] == 4
    assert steps_kept(run) == ["step_0000004", "step_0000008"]
    # Another layout and another micro-batch size need no permission.
    code, out, err = xmtf("train", config, *longer, "batch.micro_batch_size=1", "--allow-change", "optimizer.lr")
    assert code == 0, err
    assert "trained steps 9 to 9" in out
    assert [line["learning_rate"] for line in metrics(run)][-2:] == [1e-3, 5e-4]
    assert steps_kept(run) == ["step_0000008", "step_0000009"]


@pytest.mark.parametrize("precision", ["bf16", pytest.param("fp16", marks=pytest.mark.slow)])
def test_half_precision_trains_near_fp32(finished: Any, tmp_path: Path, precision: str) -> None:
    config, run, _ = finished
    output = tmp_path / "run"
    off = ["checkpoint.save_interval=null", "evaluation.interval=null"]
    code, _, err = xmtf("train", config, f"precision={precision}", f"output={output}", *off)
    assert code == 0, err
    losses = [line["loss"] for line in metrics(output)]
    assert losses[-1] < losses[0] - 0.5
    # No step is lost, to an overflow of the loss scale in fp16 either: the curves lie on each other.
    assert losses == pytest.approx([line["loss"] for line in metrics(run)], rel=0.03)


def test_a_killed_rank_ends_the_run_and_is_named(
    finished: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = Trainer.train_step

    def die_at_step_two(self: Trainer) -> dict[str, Any]:
        if self.step == 1 and self.topology.rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return plain(self)

    monkeypatch.setattr(Trainer, "train_step", die_at_step_two)
    output = tmp_path / "run"
    code, _, err = xmtf("train", finished[0], "--nproc", 2, f"output={output}")
    assert code == 1
    assert "rank 1" in err
    assert "SIGKILL" in err
    assert status(output)["exit_code"] == 1
    assert not (output / "checkpoints").exists()


def test_a_run_that_explodes_writes_no_checkpoint_any_more(finished: Any, tmp_path: Path) -> None:
    output = tmp_path / "run"
    wild = ["optimizer.lr=1e30", "checkpoint.save_interval=1", f"output={output}"]
    code, _, err = xmtf("train", finished[0], *wild)
    assert code == 7
    assert "NonFiniteError: step 2: loss" in err
    assert "Traceback" not in err
    assert status(output)["name"] == "NON_FINITE"
    assert steps_kept(output) == ["step_0000001"]
    assert [line["step"] for line in metrics(output)] == [1]


def test_ranks_of_torchrun_join(finished: Any, tmp_path: Path) -> None:
    config, run, _ = finished
    output = tmp_path / "run"
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    words = ["parallel.tensor_model_parallel_size=2", "schedule.train_steps=4", "--json"]
    command = [*launcher, "-m", "megatron_xmtf", "train", str(config), f"output={output}", *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["last_step"] == 4
    ours, theirs = ([line["loss"] for line in metrics(path)[:4]] for path in (run, output))
    assert theirs == pytest.approx(ours, rel=1e-5)
    assert status(output)["exit_code"] == 0
