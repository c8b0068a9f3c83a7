"""Megatron-Core's optimizer wrappers around Adafactor: which rank holds what, and checkpoints of any layout.

Megatron-Core shards optimizer state that has the shape of its parameter. A row or column mean is a vector; it is cut
where the axis it keeps is cut, and a copy on every rank where the other axis is:

    parameter [rows, columns]    exp_avg_sq_row [rows]    exp_avg_sq_col [columns]
    cut along rows               cut                      copies
    cut along columns            copies                   cut
    whole (copies)               copies                   copies

Stored under `optimizer.state.<statistic>.<parameter>` as global vectors, they are read at any TP x PP x DP.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from itertools import chain
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.dist_checkpointing.optimizer import get_param_id_to_sharded_param_map
from megatron.core.optimizer import OptimizerConfig as McoreOptimizerConfig
from megatron.core.optimizer import _get_param_groups
from megatron.core.optimizer.grad_scaler import DynamicGradScaler
from megatron.core.optimizer.optimizer import (
    ChainedOptimizer,
    Float16OptimizerWithFloat16Params,
    FP32Optimizer,
    MegatronOptimizer,
)
from megatron.core.transformer.mlp import apply_swiglu_sharded_factory
from megatron.core.utils import unwrap_model
from torch import Tensor

from megatron_xmtf.training.adafactor import Adafactor, ParameterShard

__all__ = ["parameter_shards", "wrap_adafactor"]

DROPPED_AXIS = {"exp_avg_sq_row": 1, "exp_avg_sq_col": 0, "exp_avg_sq": None}
"""The axis of a parameter that each statistic is a mean over."""


def wrap_adafactor(chunks: Sequence[torch.nn.Module], config: McoreOptimizerConfig) -> MegatronOptimizer:
    """Build Adafactor over DDP-wrapped chunks whose weights are loaded.

    Args:  config: precision, clipping and loss scale are read from it; the rest is set by `optimizer.apply_settings`.
    """
    inner = Adafactor(_get_param_groups(list(chunks), config, None))
    wrapper: _Float32Adafactor | _Float16Adafactor
    if config.fp16 or config.bf16:
        wrapper = _Float16Adafactor(inner, config, _loss_scaler(config) if config.fp16 else None, _initialize)
    else:
        wrapper = _Float32Adafactor(inner, config, _initialize)
    wrapper.grad_stats_parallel_group = parallel_state.get_model_parallel_group()
    wrapper.tp_group = parallel_state.get_tensor_model_parallel_group()
    inner.distribute(parameter_shards(chunks), ranks=wrapper.tp_group)
    return ChainedOptimizer([wrapper])


def parameter_shards(chunks: Sequence[torch.nn.Module]) -> dict[Tensor, ParameterShard]:
    """Return the part of each parameter that this rank holds; the fp32 copy stands for a half-precision one."""
    shards = {}
    for chunk in chunks:
        model = unwrap_model(chunk)
        vocab_size = model.architecture.vocab_size
        for value in model.sharded_state_dict(metadata={"non_homogeneous_layers": True}).values():
            if not isinstance(value.data, torch.nn.Parameter):
                continue
            if isinstance(value, ShardedTensorFactory):
                shards[getattr(value.data, "main_param", value.data)] = _gated_shard(value)
                continue
            if not isinstance(value, ShardedTensor):
                continue
            assert value.prepend_axis_num == 0 and value.axis_fragmentations is not None, value
            cut = [axis for axis, parts in enumerate(value.axis_fragmentations) if parts > 1]
            assert len(cut) <= 1, f"{value.key} is cut along axes {cut}"
            # Only the tensors whose rows are words may be stored with another number of rows.
            rows = vocab_size if value.allow_shape_mismatch else value.global_shape[0]
            own_rows = min(max(rows - value.global_offset[0], 0), value.local_shape[0])
            shards[getattr(value.data, "main_param", value.data)] = ParameterShard(
                split_axis=cut[0] if cut else None,
                shape=(rows, *value.global_shape[1:]),
                own_rows=own_rows,
            )
    return shards


def _gated_shard(factory: ShardedTensorFactory) -> ParameterShard:
    """Return the part of a gated layer's weight: rows of both halves, [gate; value], each cut over ranks by itself."""
    gate, _ = factory.build()
    ranks = gate.axis_fragmentations[0] // 2
    return ParameterShard(
        split_axis=0 if ranks > 1 else None, shape=tuple(gate.global_shape), own_rows=factory.data.size(0)
    )


class _FactoredState:
    """What both wrappers share: statistics as sharded tensors."""

    optimizer: Adafactor

    def sharded_state_dict(
        self, model_sharded_state_dict: Any, is_loading: bool = False, metadata: dict[str, Any] | None = None
    ) -> Any:
        """Return all state as sharded tensors; Megatron-Core's part first, then the statistics."""
        if is_loading:
            self.optimizer.initialize_state()
        if isinstance(self, Float16OptimizerWithFloat16Params):
            tracked: Iterable[Tensor] = chain.from_iterable(self.float16_groups)
        else:
            tracked = self._numbers()
        parameters = get_param_id_to_sharded_param_map(model_sharded_state_dict, tracked)
        state, number_of = self.optimizer.state, self._numbers()
        self.optimizer.state = defaultdict(dict)  # Megatron-Core would take each tensor for one of parameter shape
        try:
            sharded = super().sharded_state_dict(  # type: ignore[misc]
                model_sharded_state_dict, is_loading=False, metadata=metadata
            )
        finally:
            self.optimizer.state = state
        sharded.get("optimizer", sharded)["state"] = {
            number_of[parameter]: {
                name: _sharded_statistic(parameters[number_of[parameter]], name, tensor)
                for name, tensor in statistics.items()
            }
            for parameter, statistics in state.items()
        }
        return sharded

    def _numbers(self) -> dict[Tensor, int]:
        """Return parameter -> its number in the state dictionary."""
        parameters = chain.from_iterable(group["params"] for group in self.optimizer.param_groups)
        return {parameter: number for number, parameter in enumerate(parameters)}


class _Float32Adafactor(_FactoredState, FP32Optimizer):
    """fp32 parameters, updated themselves."""


class _Float16Adafactor(_FactoredState, Float16OptimizerWithFloat16Params):
    """Half-precision parameters beside fp32 copies that are updated."""


def _sharded_statistic(
    parameter: ShardedTensor | ShardedTensorFactory, name: str, statistic: Tensor
) -> ShardedTensor | ShardedTensorFactory:
    """Say where a statistic belongs in the whole one; that of a gated layer's rows has two halves, as the layer has."""
    if isinstance(parameter, ShardedTensor):
        return _plain_statistic(parameter, name, statistic)
    gate, _ = parameter.build()
    ranks = gate.axis_fragmentations[0] // 2
    rows, *columns = gate.global_shape
    joined = ShardedTensor(
        key=parameter.key,
        data=parameter.data,
        dtype=parameter.data.dtype,
        local_shape=tuple(parameter.data.shape),
        global_shape=(rows, *columns),
        global_offset=(gate.global_offset[0] * 2, *gate.global_offset[1:]),
        axis_fragmentations=(ranks, *gate.axis_fragmentations[1:]),
        replica_id=gate.replica_id,
    )
    whole = _plain_statistic(joined, name, statistic)
    return whole if DROPPED_AXIS[name] == 0 else apply_swiglu_sharded_factory(whole, ())


def _plain_statistic(parameter: ShardedTensor, name: str, statistic: Tensor) -> ShardedTensor:
    """Say where a statistic belongs in the whole one.

    weight        [3h, h], offset [3h/2, 0], cut in [2, 1], replica (0, 0, dp)
    exp_avg_sq_row  [3h], offset [3h/2],     cut in [2],    replica (0, 0, dp)
    exp_avg_sq_col   [h], offset [0],        cut in [1],    replica (0, 1, dp)     the second part is a copy
    """
    dropped = DROPPED_AXIS[name]
    kept = [axis for axis in range(len(parameter.global_shape)) if axis != dropped]
    first, second, last = parameter.replica_id
    if dropped is not None:
        second += parameter.local_chunk_offset_in_global()[dropped]
    return ShardedTensor(
        key=f"optimizer.state.{name}.{parameter.key}",
        data=statistic,
        dtype=statistic.dtype,
        local_shape=tuple(statistic.shape),
        global_shape=tuple(parameter.global_shape[axis] for axis in kept),
        global_offset=tuple(parameter.global_offset[axis] for axis in kept),
        axis_fragmentations=tuple(parameter.axis_fragmentations[axis] for axis in kept),
        replica_id=(first, second, last),
        allow_shape_mismatch=parameter.allow_shape_mismatch and 0 in kept,
    )


def _loss_scaler(config: McoreOptimizerConfig) -> DynamicGradScaler:
    return DynamicGradScaler(
        initial_scale=config.initial_loss_scale,
        min_scale=config.min_loss_scale,
        growth_factor=2.0,
        backoff_factor=0.5,
        growth_interval=config.loss_scale_window,
        hysteresis=config.hysteresis,
    )


def _initialize(optimizer: Adafactor, config: McoreOptimizerConfig) -> None:
    optimizer.initialize_state()
