"""The run configuration: a frozen schema, read from YAML with dotted overrides."""

from megatron_xmtf.config.load import config_from_mapping, load_config, load_mixture, load_yaml, write_config
from megatron_xmtf.config.mixture import MixtureConfig, MixtureEntry, PinchConfig, SelectionConfig
from megatron_xmtf.config.schema import (
    BatchConfig,
    CheckpointConfig,
    DataConfig,
    DatasetConfig,
    DropoutConfig,
    EvaluationConfig,
    GuardsConfig,
    KernelsConfig,
    LoggingConfig,
    LossConfig,
    OptimizerConfig,
    ParallelConfig,
    RecomputeConfig,
    RunConfig,
    ScheduleConfig,
)

__all__ = [
    "BatchConfig",
    "CheckpointConfig",
    "DataConfig",
    "DatasetConfig",
    "DropoutConfig",
    "EvaluationConfig",
    "GuardsConfig",
    "KernelsConfig",
    "LoggingConfig",
    "LossConfig",
    "MixtureConfig",
    "MixtureEntry",
    "OptimizerConfig",
    "ParallelConfig",
    "PinchConfig",
    "RecomputeConfig",
    "RunConfig",
    "ScheduleConfig",
    "SelectionConfig",
    "config_from_mapping",
    "load_config",
    "load_mixture",
    "load_yaml",
    "write_config",
]
