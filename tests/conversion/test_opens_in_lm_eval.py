"""An exported model in `lm_eval --model hf`, as it comes: the log-likelihoods are those of the model imported.

Where lm_eval is not installed (it brings some forty packages) the tests skip.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from megatron_xmtf.conversion.huggingface_export import export_huggingface

pytest.importorskip("lm_eval")

ASKED = [
    {"inputs": "Mji mkuu wa Kenya?", "choices": ["Nairobi", "Kampala", "Dar es Salaam"], "answer": 0},
    {"inputs": "भारत की राजधानी?", "choices": ["नई दिल्ली", "मुंबई", "कोलकाता"], "answer": 0},
]
TASK = """
task: capitals
dataset_path: json
dataset_kwargs: {{data_files: {{validation: {file}}}}}
output_type: multiple_choice
validation_split: validation
doc_to_text: "{{{{inputs}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
metric_list: [{{metric: acc}}]
"""


def in_lm_eval(model: Path, directory: Path) -> list[tuple[float, str, str]]:
    """Return (log-likelihood, inputs, choice) of each choice."""
    directory.mkdir()
    (directory / "asked.jsonl").write_text("".join(json.dumps(one) + "\n" for one in ASKED), encoding="utf-8")
    (directory / "capitals.yaml").write_text(TASK.format(file=directory / "asked.jsonl"), encoding="utf-8")
    command = [sys.executable, "-m", "lm_eval", "--model", "hf", "--device", "cpu", "--batch_size", "1"]
    command += ["--model_args", f"pretrained={model},dtype=float32", "--tasks", "capitals"]
    command += ["--include_path", str(directory), "--log_samples", "--output_path", str(directory / "out")]
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_DATASETS_CACHE": str(directory / "cache")}
    done = subprocess.run(command, env={**os.environ, **offline}, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    (samples,) = (directory / "out").rglob("samples_capitals_*.jsonl")
    found = [json.loads(line) for line in samples.read_text(encoding="utf-8").splitlines()]
    assert len(found) == len(ASKED)
    return [
        (float(answer[0]), sample["doc"]["inputs"], choice)
        for sample in found
        for choice, answer in zip(sample["doc"]["choices"], sample["filtered_resps"], strict=True)
    ]


def likelihood(directory: Path, inputs: str, choice: str) -> float:
    """Return the log-likelihood of ` choice` after the inputs, in `transformers` alone."""
    tokenizer = AutoTokenizer.from_pretrained(directory)
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    context, target = (
        tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids for text in (inputs, f" {choice}")
    )
    with torch.no_grad():
        logits = model(torch.cat([context, target], 1)).logits[0, context.shape[1] - 1 : -1]
    return float(torch.log_softmax(logits, -1).gather(1, target.T).sum())


@pytest.mark.parametrize("family", ["tiny", "tiny_mt5"])
def test_an_export_as_it_comes(family: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    original, checkpoint = (request.getfixturevalue(f"{family}_{kind}") for kind in ("hf", "checkpoint"))
    exported = tmp_path / "exported"
    export_huggingface(checkpoint, exported)
    found = in_lm_eval(exported, tmp_path / "ours")
    assert found == in_lm_eval(original, tmp_path / "theirs")
    if family == "tiny":
        for value, inputs, choice in found:
            assert value == pytest.approx(likelihood(exported, inputs, choice), abs=1e-4)
