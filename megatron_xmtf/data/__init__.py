"""Examples on disk and in memory: tokenizer, indexed files, packing, rows, batches. Import from the modules."""

__all__: list[str] = []
