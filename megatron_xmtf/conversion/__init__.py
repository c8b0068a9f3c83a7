"""Weights into and out of checkpoints: declarative mappings, streamed, complete or an error."""

__all__: list[str] = []
