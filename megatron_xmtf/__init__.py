"""Multilingual multitask finetuning of large language models on one 3D-parallel engine."""

__all__ = ["__version__"]

__version__ = "0.1.0"
