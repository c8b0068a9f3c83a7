"""Operations with a readable reference and faster implementations beside it, chosen once at start."""

__all__: list[str] = []
