"""The training loop and its parts: loss, optimizer, schedule, metrics, validation, trainer."""

__all__: list[str] = []
