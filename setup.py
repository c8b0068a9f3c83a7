"""Package metadata; tool settings live in pyproject.toml, version pins in constraints.txt."""

from pathlib import Path
from shutil import copy2

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

HERE = Path(__file__).parent


class BuildWithTemplates(build_py):
    """Puts `slurm/*.sbatch` into the package; an editable install finds them in the checkout."""

    def run(self) -> None:
        """Build, then copy."""
        super().run()
        if self.editable_mode:
            return
        target = Path(self.build_lib) / "megatron_xmtf" / "slurm"
        target.mkdir(parents=True, exist_ok=True)
        for template in sorted((HERE / "slurm").glob("*.sbatch")):
            copy2(template, target)


setup(
    name="megatron_xmtf",
    version="0.1.0",
    description="Multilingual multitask finetuning of large language models on a Megatron-Core 3D-parallel engine",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    cmdclass={"build_py": BuildWithTemplates},
    python_requires=">=3.10",
    packages=find_packages(include=["megatron_xmtf", "megatron_xmtf.*"]),
    package_data={
        "megatron_xmtf": [
            "py.typed",
            "config/mixtures/*.yaml",
            "config/recipes/*.yaml",
            "config/recipes/overlays/*.yaml",
            "quickstart/*.yaml",
        ]
    },
    install_requires=[
        "torch>=2.10",  # 2.10: first release whose weights_only loader has no known hole (CVE-2026-24747)
        "megatron-core>=0.16.1,<0.17",
        "transformers>=4.56",
        "tokenizers>=0.20",
        "sentencepiece>=0.2",
        "protobuf>=4",  # transformers reads sentencepiece models through it
        "numpy>=1.26",
        "psutil>=5.9",  # Megatron-Core's checkpoint writers; without it a save waits forever
        "safetensors>=0.4.5",
        "pydantic>=2.9",
        "pyyaml>=6",
        "jinja2>=3.1.6",  # 3.1.6: first release without the known sandbox escapes
        "orjson>=3.10",  # reads records several times faster than the standard library, and as strictly
        "zstandard>=0.22",  # .zst sources and records
        "rich>=13",
        "babel>=2.15",
    ],
    extras_require={
        "tensorboard": ["tensorboard>=2.15"],
        "wandb": ["wandb>=0.18"],
        "datasets": ["pyarrow>=14.0.1", "datasets>=4"],  # parquet files and Hugging Face datasets as sources
        "dev": [
            *("pyarrow>=14.0.1", "datasets>=4", "tensorboard>=2.15", "wandb>=0.18"),
            *("pytest>=8", "hypothesis>=6", "ruff>=0.6", "mypy>=1.11", "types-PyYAML"),
            'triton>=3.6; platform_system == "Linux"',  # its interpreter and its compiler, without a GPU, for tests
        ],
    },
    entry_points={"console_scripts": ["xmtf=megatron_xmtf.cli:main"]},
    classifiers=[
        "Programming Language :: Python :: 3",
        "License :: OSI Approved :: Apache Software License",
    ],
)
