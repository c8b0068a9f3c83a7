"""A file imports only from floors above its own, and Megatron-Core stays behind its wall (DESIGN 2 and 3)."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "megatron_xmtf"
FLOORS = [
    "errors files progress allocator streamed_io read_ahead worker_pool",
    "config prompts data parallel kernels models checkpoint conversion",
    "evaluation training planning report cluster quickstart cli",
]
ORDER = [name for line in FLOORS for name in line.split()]
MEGATRON_CORE_ALLOWED = {"parallel", "kernels", "models", "checkpoint", "conversion", "evaluation", "training"}
MODULES = sorted(PACKAGE.rglob("*.py"))


def floor_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported_names(path: Path) -> list[str]:
    names = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative imports hide the floor"
            names += [f"{node.module}.{alias.name}" for alias in node.names]
    return names


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_only_from_floors_above(path: Path) -> None:
    floor = floor_of(path)
    if floor in ("__init__", "__main__"):
        return
    for name in imported_names(path):
        parts = name.split(".")
        if parts[0] == "megatron_xmtf" and len(parts) > 1 and parts[1] in ORDER:
            assert ORDER.index(parts[1]) <= ORDER.index(floor), f"{path} ({floor}) imports {name}"
        if name.startswith("megatron.core"):
            assert floor in MEGATRON_CORE_ALLOWED, f"{path} ({floor}) imports {name}"


def test_every_package_is_on_a_floor() -> None:
    assert {floor_of(path) for path in MODULES} - {"__init__", "__main__"} <= set(ORDER)
