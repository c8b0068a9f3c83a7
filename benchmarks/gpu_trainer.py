"""The whole trainer for benchmarks/gpu.py, by its command line: preprocess, train, resume, export, verify.

A small random BLOOM with heads of 64 learns the names of countries (examples/own_data) in bf16, one process, kernels
as `auto` chooses them: NCCL, staging of checkpoints from the device, RNG states, export are all on the way.

    train     20 steps, checkpoints at 10 and 20      the loss falls; on a GPU attention, head and sums are fused
    resume    the checkpoint of step 10, elsewhere    the losses of steps 11 to 20 again
    export    to the Hugging Face format
    verify    the checkpoint beside it: weights bit by bit, logits
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gpu_timing as timing

RECORDS = Path(__file__).parents[1] / "examples" / "own_data" / "train.jsonl"
STEPS, SAVED = 20, 10
TOLERANCE = 1e-3
"""Of a resumed run's losses, relative: torch adds some gradients up in another order each time on a GPU."""
CHOSEN = re.compile(r"(packed attention|head and loss|bias, dropout and residual): (\w+)")
"""What a run says of our own kernels when it starts."""


def trainer(name: str, *, smoke: bool) -> Iterator[dict[str, Any]]:
    """Run each command; a row says how long it took and whether what it gave holds."""
    yield {
        "note": "Each command starts Python, imports torch, and compiles what is not compiled yet: seconds of all that."
    }
    with tempfile.TemporaryDirectory() as directory:
        work = Path(directory)
        model = write_model(work / "model", hidden_size=64 if smoke else 512, layers=2 if smoke else 4)
        yield command("preprocess", "--input", RECORDS, "--tokenizer", model, "--output-prefix", work / "data")[0]
        (work / "train.yaml").write_text(json.dumps(run_config(work, model)), encoding="utf-8")
        row, said = command("train", work / "train.yaml", f"output={work / 'first'}", "--nproc", 1)
        losses = read_losses(work / "first") if not row["exit code"] else {}
        if losses:
            row |= {"first loss": losses[1], "last loss": losses[STEPS]}
            names = dict(CHOSEN.findall(said))
            row["kernels"] = ", ".join(f"{operation}: {kernel}" for operation, kernel in names.items())
            expected = 3 * ["fused"] if timing.DEVICE == "cuda" else ["segments", "chunked", "reference"]
            row["holds"] = losses[STEPS] < losses[1] and sorted(names.values()) == sorted(expected)
        yield row
        if not losses:
            return
        kept = Path("checkpoints") / f"step_{SAVED:07d}"
        shutil.copytree(work / "first" / kept, work / "second" / kept)
        row, _ = command(
            "train", work / "train.yaml", f"output={work / 'second'}", f"checkpoint.resume={SAVED}", "--nproc", 1
        )
        if not row["exit code"]:
            again = read_losses(work / "second")
            off = max(abs(again[step] / losses[step] - 1) for step in range(SAVED + 1, STEPS + 1))
            row |= {"command": "train, resumed", "difference": off, "holds": off < TOLERANCE}
        yield row
        yield command("export", "--checkpoint", work / "second", "--output", work / "exported")[0]
        yield command("verify", "--checkpoint", work / "second", "--hf", work / "exported")[0]


def command(verb: str, *arguments: object) -> tuple[dict[str, Any], str]:
    """Run a verb of `xmtf`; return its row and what it said."""
    began = time.perf_counter()
    line = [sys.executable, "-m", "megatron_xmtf", verb, *map(str, arguments)]
    done = subprocess.run(line, capture_output=True, text=True, check=False)
    said = done.stdout + done.stderr
    row = {"command": verb, "seconds": time.perf_counter() - began, "exit code": done.returncode}
    if done.returncode:
        row |= {"holds": False, "remark": (said.strip().splitlines() or ["nothing was said"])[-1][:300]}
        print(said, file=sys.stderr, flush=True)
    return row, said


def run_config(work: Path, model: Path) -> dict[str, Any]:
    """Word the run."""
    return {
        "model": str(model),
        "output": "given on the command line",
        "precision": "bf16",
        "data": {"train": [{"prefix": str(work / "data")}]},
        "batch": {"micro_batch_size": 2, "global_batch_size": 4, "sequence_length": 256},
        "schedule": {"train_steps": STEPS, "lr_decay_style": "constant", "lr_warmup_steps": 2},
        "optimizer": {"lr": 1e-3},
        "checkpoint": {"save_interval": SAVED},
        "seed": 1,
    }


def read_losses(output: Path) -> dict[int, float]:
    """Return step -> loss, of the last time that each was done."""
    lines = (output / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return {row["step"]: row["loss"] for row in map(json.loads, lines)}


def write_model(directory: Path, *, hidden_size: int, layers: int) -> Path:
    """Write a random BLOOM with a byte-level tokenizer of the records, in the Hugging Face format."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import BloomConfig, BloomForCausalLM

    rows = [json.loads(line) for line in RECORDS.read_text(encoding="utf-8").splitlines()]
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    learner = trainers.BpeTrainer(
        vocab_size=1000, special_tokens=list(special.values()), initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator((f"{row['inputs']} {row['targets']}" for row in rows), trainer=learner)
    torch.manual_seed(0)
    sizes = {"hidden_size": hidden_size, "n_layer": layers, "n_head": max(1, hidden_size // 64)}
    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 3}
    BloomForCausalLM(BloomConfig(vocab_size=tokenizer.get_vocab_size(), **sizes, **ids)).save_pretrained(directory)
    tokenizer.save(str(directory / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", **special}
    (directory / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    return directory


if __name__ == "__main__":
    timing.run({"trainer": trainer})
