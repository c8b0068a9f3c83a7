"""One thread a process for every test: the ranks of parallel tests share two cores, and are forked.

Where there is no GPU, Triton kernels run in its interpreter; it must be told so before a kernel is imported.
"""

import os
import signal
from glob import glob

if not glob("/dev/nvidia[0-9]*"):
    os.environ.setdefault("TRITON_INTERPRET", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")

# `make test` runs one half in the background of a shell, where SIGINT is ignored; tests send it.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

from collections.abc import Callable  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import Any  # noqa: E402

import pytest  # noqa: E402


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Real multilingual files beside the checkout (`../shared/data`), not part of the project."""
    default = Path(__file__).parents[2] / "shared" / "data"
    path = Path(os.environ.get("XMTF_SHARED_DATA", default))
    if not path.is_dir():
        pytest.skip(f"the shared data is not at {path}; set XMTF_SHARED_DATA")
    return path


@pytest.fixture(scope="session")
def tiny_hf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face directory with a tiny random BLOOM and its tokenizer."""
    from tests.tiny import write_tiny_bloom

    directory = tmp_path_factory.mktemp("hf")
    write_tiny_bloom(directory)
    return directory


@pytest.fixture(scope="session")
def tiny_checkpoint(tiny_hf: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model, imported."""
    from megatron_xmtf.conversion.huggingface import import_huggingface

    directory = tmp_path_factory.mktemp("imported") / "checkpoint"
    import_huggingface(tiny_hf, directory)
    return directory


@pytest.fixture(scope="session")
def tiny_mt5_hf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face directory with a tiny random mT5 (4 + 3 layers) and its tokenizer."""
    from tests.tiny import write_tiny_mt5

    directory = tmp_path_factory.mktemp("mt5_hf")
    write_tiny_mt5(directory)
    return directory


@pytest.fixture(scope="session")
def tiny_mt5_checkpoint(tiny_mt5_hf: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny mT5, imported."""
    from megatron_xmtf.conversion.huggingface import import_huggingface

    directory = tmp_path_factory.mktemp("mt5_imported") / "checkpoint"
    import_huggingface(tiny_mt5_hf, directory)
    return directory


@pytest.fixture(scope="session")
def tiny_pairs(tiny_hf: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prefix of 400 preprocessed examples in two languages."""
    from megatron_xmtf.data.preprocess import preprocess
    from megatron_xmtf.data.tokenizer import Tokenizer
    from tests.tiny import write_records

    directory = tmp_path_factory.mktemp("data")
    write_records(directory / "tiny.jsonl", 400)
    preprocess(
        [directory / "tiny.jsonl"], tokenizer=Tokenizer.load(tiny_hf), output_prefix=directory / "tiny", workers=1
    )
    return directory / "tiny"


def make_run_config(checkpoint: Path, pairs: Path, output: Path) -> Callable[..., Any]:
    """Return a function that makes a small RunConfig; keywords replace whole sections."""
    from megatron_xmtf.config import RunConfig, config_from_mapping

    def make(**sections: Any) -> RunConfig:
        values: dict[str, Any] = {
            "model": str(checkpoint),
            "output": str(output / "run"),
            "data": {"train": [{"prefix": str(pairs)}]},
            "batch": {"micro_batch_size": 2, "global_batch_size": 8, "sequence_length": 64},
            "schedule": {"train_steps": 20},
            "optimizer": {"lr": 1e-3},
            "precision": "fp32",
            "logging": {"log_interval": 1000},
        }
        values.update(sections)
        return config_from_mapping(values, RunConfig, source="test")

    return make


@pytest.fixture
def run_config(tiny_checkpoint: Path, tiny_pairs: Path, tmp_path: Path) -> Callable[..., Any]:
    """`make_run_config` for a run directory of this test's own."""
    return make_run_config(tiny_checkpoint, tiny_pairs, tmp_path)
