"""Processes and groups: the CPU adapter of Megatron-Core, the parallel topology, local ranks."""

__all__: list[str] = []
