"""What a run will do, before any GPU hour: the data it reads (`data_plan`), and the machine that it needs.

Nothing is imported here: the hardware plan is arithmetic and answers without torch, which the data plan needs.
"""

__all__: list[str] = []
