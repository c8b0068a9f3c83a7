"""Megatron-Core's bias and tanh-GELU against torch's, forward and backward, and who is chosen."""

from __future__ import annotations

import pytest
import torch
from megatron.core.fusions.fused_bias_geglu import bias_geglu_impl
from megatron.core.fusions.fused_bias_gelu import bias_gelu_impl
from torch import Tensor

from megatron_xmtf.config import DropoutConfig, KernelsConfig, ParallelConfig
from megatron_xmtf.errors import ConfigError
from megatron_xmtf.kernels.activation import choose_activation
from megatron_xmtf.kernels.segment_attention import available
from megatron_xmtf.models.architecture import BloomArchitecture
from megatron_xmtf.models.engine_settings import transformer_config


@pytest.mark.parametrize("gated", [False, True])
def test_megatron_core_computes_the_same_as_torch(gated: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(7, 2, 24, generator=generator, dtype=torch.float64) * 3
    bias = None if gated else torch.randn(24, generator=generator, dtype=torch.float64)

    def plain(x: Tensor, bias: Tensor | None) -> Tensor:
        if bias is not None:
            return torch.nn.functional.gelu(x + bias, approximate="tanh")
        gate, up = x.chunk(2, dim=-1)
        return torch.nn.functional.gelu(gate, approximate="tanh") * up

    def run(function: object) -> list[Tensor]:
        leaves = [tensor.clone().requires_grad_() for tensor in (x, bias) if tensor is not None]
        output = function(leaves[0], leaves[1] if bias is not None else None)  # type: ignore[operator]
        weight = torch.linspace(-1, 1, output.numel(), dtype=output.dtype).view_as(output)
        return [output.detach(), *torch.autograd.grad((output * weight).sum(), leaves)]

    # The functions as they are written: compiling them for a CPU would take a minute.
    with torch.compiler.set_stance("force_eager"):
        found = run(bias_geglu_impl if gated else bias_gelu_impl)
    for ours, wanted in zip(found, run(plain), strict=True):
        # Megatron-Core writes the constants with eight digits.
        assert float((ours - wanted).abs().max() / wanted.abs().max()) < 1e-7


def test_who_is_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    monkeypatch.setenv("CC", "cc")
    assert choose_activation("auto", is_tanh_gelu=True, device="cuda") == "megatron_core"
    assert choose_activation("auto", is_tanh_gelu=False, device="cuda") == "torch"
    assert choose_activation("auto", is_tanh_gelu=True, device="cpu") == "torch"
    assert choose_activation("torch", is_tanh_gelu=True, device="cuda") == "torch"
    assert choose_activation("reference", is_tanh_gelu=True, device="cuda") == "torch"
    with pytest.raises(ConfigError, match="this run computes on a CPU"):
        choose_activation("megatron_core", is_tanh_gelu=True, device="cpu")
    with pytest.raises(ConfigError, match="another activation"):
        choose_activation("megatron_core", is_tanh_gelu=False, device="cuda")
    monkeypatch.setattr(available, "find_spec", lambda name: None)
    assert choose_activation("auto", is_tanh_gelu=True, device="cuda") == "torch"


def test_the_engine_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    architecture = BloomArchitecture(hidden_size=16, num_layers=1, num_attention_heads=2, vocab_size=128)
    settings = {"parallel": ParallelConfig(), "precision": "fp32", "dropout": DropoutConfig()}
    plain = transformer_config(architecture, kernels=KernelsConfig(), **settings)  # type: ignore[arg-type]
    assert not plain.bias_activation_fusion
    monkeypatch.setattr("megatron_xmtf.models.engine_settings.choose_activation", lambda *_, **__: "megatron_core")
    fused = transformer_config(architecture, kernels=KernelsConfig(), **settings)  # type: ignore[arg-type]
    assert fused.bias_activation_fusion and fused.activation_func is torch.nn.functional.gelu
