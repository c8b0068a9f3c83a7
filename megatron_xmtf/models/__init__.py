"""Model families on Megatron-Core blocks, and the registry that finds them by Hugging Face `model_type`."""

__all__: list[str] = []
