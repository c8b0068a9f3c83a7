"""What a run will do, before any GPU hour: the data it reads."""

from megatron_xmtf.planning.data_plan import DataPlan, build_data_plan

__all__ = ["DataPlan", "build_data_plan"]
