"""What a checkpoint costs a training: the copy beside a whole save, saving every 20 steps beside none, in one run.

    python benchmarks/checkpoint.py --output benchmarks/results/checkpoint.json

Two ranks train a BLOOM of 35 million parameters on random records (fp32, distributed optimizer: 0.42 GB a checkpoint;
Megatron-Core's has the main parameters besides, which are the weights, 0.57 GB).
    blocking   an asynchronous save's part that training waits for, a synchronous save of ours, and
               Megatron-Core's own `dist_checkpointing.save`, in turn, `--repeats` times; medians
    steps      `--steps` steps with a save at their end and `--steps` without, in turn; a window with a save ends with
               the steps, the checkpoint being written beside those that follow, and the last one is waited for
    rates      GB/s of a synchronous save, of hashing, of loading with and without hashes
Takes about 10 minutes, 2 GB of disk and 5 GiB of memory.
"""

from __future__ import annotations

import argparse
import functools
import importlib.metadata
import json
import os
import platform
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

RANKS = 2
MODEL = {"vocab_size": 32_000, "hidden_size": 512, "n_layer": 6, "n_head": 8}
ROWS = {"micro_batch_size": 1, "global_batch_size": 4, "sequence_length": 512}


def write_model(directory: Path) -> None:
    """Write a random BLOOM and a tokenizer of characters."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import BloomConfig, BloomForCausalLM

    torch.manual_seed(0)
    BloomForCausalLM(BloomConfig(**MODEL, bos_token_id=1, eos_token_id=2, pad_token_id=3)).save_pretrained(directory)
    words = ["<unk>", "<s>", "</s>", "<pad>", *(chr(97 + number) for number in range(26))]
    tokenizer = Tokenizer(models.BPE(vocab={word: i for i, word in enumerate(words)}, merges=[], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.add_special_tokens(words[:4])
    tokenizer.save(str(directory / "tokenizer.json"))
    special = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    config = {"tokenizer_class": "PreTrainedTokenizerFast", **special}
    (directory / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")


def prepare(directory: Path, steps: int) -> Any:
    """Make model, data and a run that saves nothing by itself."""
    import numpy as np

    from megatron_xmtf.config import RunConfig, config_from_mapping
    from megatron_xmtf.data.preprocess import preprocess
    from megatron_xmtf.data.tokenizer import Tokenizer
    from megatron_xmtf.training.prepare import prepare_run

    write_model(directory / "hf")
    generator = np.random.default_rng(0)
    with open(directory / "records.jsonl", "w", encoding="utf-8") as stream:
        for _ in range(2000):
            text = "".join(chr(97 + int(i)) for i in generator.integers(0, 26, 200))
            stream.write(json.dumps({"inputs": text[:150], "targets": text[150:]}) + "\n")
    tokenizer = Tokenizer.load(directory / "hf")
    preprocess([directory / "records.jsonl"], tokenizer=tokenizer, output_prefix=directory / "data", workers=1)
    values = {
        "model": str(directory / "hf"),
        "output": str(directory / "run"),
        "data": {"train": [{"prefix": str(directory / "data")}]},
        "batch": ROWS,
        "schedule": {"train_steps": steps},
        "parallel": {"use_distributed_optimizer": True},
        "precision": "fp32",
    }
    return prepare_run(config_from_mapping(values, RunConfig, source="benchmark"), world_size=RANKS)


def median(values: list[float]) -> float:
    """Return the median to the millisecond."""
    return round(statistics.median(values), 3)


def timed(function: Callable[[], Any]) -> float:
    """Return the seconds until the slower rank is done."""
    import torch.distributed

    torch.distributed.barrier()
    started = time.monotonic()
    function()
    torch.distributed.barrier()
    return time.monotonic() - started


class Side:
    """One rank's trainer and the ways to save it."""

    def __init__(self, prepared: Any) -> None:
        from megatron_xmtf.checkpoint.saver import CheckpointSaver
        from megatron_xmtf.parallel.topology import initialize_parallel
        from megatron_xmtf.training.trainer import Trainer

        self.topology = initialize_parallel(prepared.config.parallel, seed=1)
        self.trainer = Trainer(prepared, self.topology)
        self.saver = CheckpointSaver(self.trainer.chunks, self.trainer.optimizer)
        self.checkpoints = Path(prepared.config.output) / "checkpoints"
        self.number = 0

    def start(self) -> None:
        """Begin a save, and forget the checkpoints before the last two."""
        from megatron_xmtf.checkpoint.directory import step_directory
        from megatron_xmtf.checkpoint.saver import SaveRequest

        self.number += 1
        config, path = self.trainer.config, step_directory(self.checkpoints, self.number)
        request = SaveRequest(path, self.number, config, 0, self.trainer.prepared.hf_files, {})
        self.saver.start(request)

    def prune(self) -> None:
        """Remove all checkpoints but the last, outside of what is timed."""
        if self.topology.rank == 0:
            for path in sorted(self.checkpoints.iterdir())[:-1]:
                shutil.rmtree(path)

    def save(self) -> None:
        """Save and wait."""
        self.start()
        self.saver.finish()

    def save_with_megatron_core(self) -> None:
        """Save the same state with Megatron-Core alone: no hashes, no manifest."""
        import torch.distributed
        from megatron.core import dist_checkpointing

        from megatron_xmtf.checkpoint.state import SHARDING, model_state

        self.number += 1
        path = self.checkpoints / f"megatron_core_{self.number}"
        if self.topology.rank == 0:
            path.mkdir(parents=True)
        torch.distributed.barrier()
        state = model_state(self.trainer.chunks)
        moments = self.trainer.optimizer.sharded_state_dict(dict(state), metadata=dict(SHARDING))
        dist_checkpointing.save({**state, "optimizer": moments}, str(path), content_metadata=dict(SHARDING))

    def steps(self, count: int, *, saving: bool) -> None:
        """Train, poll after each step as a run does, begin a save after the last."""
        for _ in range(count):
            self.trainer.train_step()
            self.saver.poll()
        if saving:
            self.start()


def measure_rank(prepared: Any, repeats: int, steps: int, windows: int) -> dict[str, Any]:
    """Measure in one of the ranks; all do the same."""
    from megatron_xmtf.checkpoint.manifest import open_manifest
    from megatron_xmtf.checkpoint.sharded import load_training_state, verify_together

    side = Side(prepared)
    side.steps(2, saving=False)
    side.save()  # what is worked out once, is
    blocking: dict[str, list[float]] = {"asynchronous": [], "synchronous": [], "megatron_core_synchronous": []}
    for _ in range(repeats):
        blocking["asynchronous"].append(timed(side.start))
        side.saver.finish()
        blocking["synchronous"].append(timed(side.save))
        blocking["megatron_core_synchronous"].append(timed(side.save_with_megatron_core))
        side.prune()
    side.save()
    newest = side.checkpoints / f"step_{side.number:07d}"
    manifest = open_manifest(newest)
    load = functools.partial(load_training_state, side.trainer.chunks, side.trainer.optimizer, newest)
    rates = {
        "save": statistics.median(blocking["synchronous"]),
        "hash": median([timed(lambda: verify_together(newest, manifest)) for _ in range(repeats)]),
        "load_with_hashes": median([timed(load) for _ in range(repeats)]),
        "load_without_hashes": median([timed(functools.partial(load, verify=False)) for _ in range(repeats)]),
    }
    off, on = [], []
    for _ in range(windows):
        off.append(timed(functools.partial(side.steps, steps, saving=False)))
        # The save begun at the end of this window is written beside the next one, whose turn it is to pay for it: so
        # each window with saving is two, and both are paid by it.
        on.append(timed(functools.partial(side.steps, steps, saving=True)))
        on[-1] += timed(functools.partial(side.steps, steps, saving=False))
        off[-1] += timed(functools.partial(side.steps, steps, saving=False))
        side.saver.finish()
        side.prune()
    gigabytes = manifest.total_bytes / 1e9
    return {
        "checkpoint_gb": round(gigabytes, 3),
        "blocking_seconds": {name: median(values) for name, values in blocking.items()},
        "asynchronous_over_synchronous": round(
            statistics.median(blocking["asynchronous"]) / statistics.median(blocking["synchronous"]), 3
        ),
        "gb_per_second": {name: round(gigabytes / seconds, 2) for name, seconds in rates.items()},
        "steps": {
            "steps_a_window": 2 * steps,
            "saves_a_window": 1,
            "step_seconds_without_saving": round(statistics.median(off) / (2 * steps), 3),
            "windows_without_saving_seconds": [round(value, 2) for value in off],
            "windows_with_saving_seconds": [round(value, 2) for value in on],
            "saving_adds_percent_at_one_save_in_these_steps": round(100 * (sum(on) / sum(off) - 1), 2),
        },
    }


def main() -> None:
    """Measure, print, and write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="JSON file for the result")
    parser.add_argument(
        "--directory", type=Path, help="where checkpoints are written; default: the system's temporary one"
    )
    parser.add_argument("--repeats", type=int, default=5, help="saves of each kind")
    parser.add_argument("--steps", type=int, default=10, help="half of the steps of a window, which has one save")
    parser.add_argument("--windows", type=int, default=5, help="windows with and without saving")
    arguments = parser.parse_args()
    from megatron_xmtf.parallel.launch import prepare_to_fork, run_ranks

    prepare_to_fork()
    with tempfile.TemporaryDirectory(dir=arguments.directory) as name:
        prepared = prepare(Path(name), 10_000)
        work = (prepared, arguments.repeats, arguments.steps, arguments.windows)
        found = run_ranks(measure_rank, world_size=RANKS, arguments=work)[0]
    versions = {name: importlib.metadata.version(name) for name in ("torch", "megatron-core")}
    machine = {"processor": platform.processor() or platform.machine(), "cores": os.cpu_count(), "ranks": RANKS}
    result = {"date": date.today().isoformat(), "machine": machine, "versions": versions, **found}
    print(json.dumps(result, indent=2))
    if arguments.output:
        arguments.output.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
