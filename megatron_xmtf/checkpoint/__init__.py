"""Checkpoints that are independent of the parallel layout: manifest, safe reading, sharded save and load."""

__all__: list[str] = []
