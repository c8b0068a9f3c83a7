"""Who accumulates weight gradients: what can be imported decides; a wish is met or refused; Megatron-Core is told."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest

from megatron_xmtf.config.schema import KernelsConfig, ParallelConfig
from megatron_xmtf.errors import ConfigError
from megatron_xmtf.kernels.weight_gradient import choose_weight_gradient
from megatron_xmtf.models import engine_settings
from megatron_xmtf.models.architecture import BloomArchitecture

MODULE = "fused_weight_gradient_mlp_cuda"


@pytest.fixture
def apex_built(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Make apex's extension importable."""
    (tmp_path / f"{MODULE}.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    importlib.invalidate_caches()
    yield
    sys.modules.pop(MODULE, None)


def test_torch_where_nothing_else_is() -> None:
    assert choose_weight_gradient("auto", has_cuda=True) == "torch"
    assert choose_weight_gradient("auto", has_cuda=False) == "torch"


@pytest.mark.usefixtures("apex_built")
def test_auto_takes_apex_on_a_gpu_alone() -> None:
    assert choose_weight_gradient("auto", has_cuda=True) == "apex"
    assert choose_weight_gradient("torch", has_cuda=True) == "torch"
    assert choose_weight_gradient("reference", has_cuda=True) == "torch"
    assert choose_weight_gradient("auto", has_cuda=False) == "torch"


def test_a_wish_that_cannot_be_met_is_refused() -> None:
    with pytest.raises(ConfigError, match="there is none here"):
        choose_weight_gradient("apex", has_cuda=False)
    with pytest.raises(ConfigError, match="cannot be imported.*from source"):
        choose_weight_gradient("apex", has_cuda=True)


@pytest.mark.parametrize("chosen", ["apex", "torch"])
def test_megatron_core_is_told(chosen: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_settings, "choose_weight_gradient", lambda wish, has_cuda: chosen)
    architecture = BloomArchitecture(hidden_size=64, num_layers=2, num_attention_heads=4, vocab_size=128)
    config = engine_settings.transformer_config(
        architecture, parallel=ParallelConfig(), precision="bf16", kernels=KernelsConfig()
    )
    assert config.gradient_accumulation_fusion is (chosen == "apex")
