"""Shipped recipes and overlays: a name instead of a file.

xmtf train bloomz-560m --overlay toy optimizer.lr=1e-4
           config/recipes/bloomz-560m.yaml  <-  config/recipes/overlays/toy.yaml  <-  key=value
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_xmtf.errors import MissingError, nearest_names

__all__ = ["SHIPPED_OVERLAYS", "SHIPPED_RECIPES", "config_path", "merge_overlay", "overlay_path"]

SHIPPED_RECIPES = Path(__file__).parent / "recipes"
SHIPPED_OVERLAYS = SHIPPED_RECIPES / "overlays"


def config_path(name: Path | str) -> Path:
    """Return the file of a run configuration: a path, or the name of a shipped recipe.

    Raises:  MissingError: neither; lists the recipes whose names are near.
    """
    return _file_or_shipped(name, SHIPPED_RECIPES, "a shipped recipe")


def overlay_path(name: Path | str) -> Path:
    """Return the file of an overlay: a path, or the name of a shipped one.

    Raises:  MissingError: neither.
    """
    return _file_or_shipped(name, SHIPPED_OVERLAYS, "a shipped overlay")


def merge_overlay(values: Mapping[str, Any], overlay: Mapping[str, Any]) -> dict[str, Any]:
    """Lay one mapping over another: sections key by key, everything else as a whole.

    {batch: {rows: 8, length: 64}, seed: 1}  <-  {batch: {rows: 2}}   =   {batch: {rows: 2, length: 64}, seed: 1}
    """
    merged = dict(values)
    for key, value in overlay.items():
        below = merged.get(key)
        merged[key] = merge_overlay(below, value) if isinstance(below, dict) and isinstance(value, dict) else value
    return merged


def _file_or_shipped(name: Path | str, directory: Path, what: str) -> Path:
    path = Path(name)
    # Anything that looks like a path is one: its own message says what is wrong with it.
    if path.exists() or path.suffix or len(path.parts) != 1:
        return path
    shipped = {file.stem: file for file in sorted(directory.glob("*.yaml"))}
    if path.name not in shipped:
        raise MissingError(f"{str(name)!r} is neither a file nor {what}; {nearest_names(path.name, shipped)}.")
    return shipped[path.name]
