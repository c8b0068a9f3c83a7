"""Whose Adam runs: what can be imported decides; the `apex` of PyPI is told apart; a wish is met or refused."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest

from megatron_xmtf.errors import ConfigError
from megatron_xmtf.kernels.adam import choose_adam, import_fused_adam

PLACES = {"transformer_engine": "transformer_engine/pytorch/optimizers", "apex": "apex/optimizers"}


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Return a function that makes a package importable, whole or without its optimizers."""
    monkeypatch.syspath_prepend(tmp_path)

    def write(name: str, *, whole: bool = True) -> None:
        place = tmp_path / (PLACES[name] if whole else name)
        place.mkdir(parents=True)
        for directory in [place, *place.parents]:
            if directory == tmp_path:
                break
            (directory / "__init__.py").write_text("")
        if whole:
            (place / "__init__.py").write_text("class FusedAdam:\n    pass\n")
        importlib.invalidate_caches()

    yield write
    for name in [name for name in sys.modules if name.split(".")[0] in PLACES]:
        del sys.modules[name]


def test_torch_where_nothing_else_is() -> None:
    assert choose_adam("auto", has_cuda=True) == "torch"


@pytest.mark.parametrize("name", PLACES)
def test_auto_takes_what_can_be_imported_and_only_on_a_gpu(name: str, install) -> None:
    install(name)
    assert choose_adam("auto", has_cuda=True) == name
    assert choose_adam("auto", has_cuda=False) == "torch"
    assert choose_adam("torch", has_cuda=True) == "torch"
    assert choose_adam("reference", has_cuda=True) == "reference"
    assert import_fused_adam(name).__module__ == PLACES[name].replace("/", ".")


def test_transformer_engine_comes_before_apex_as_in_megatron_core(install) -> None:
    install("apex")
    install("transformer_engine")
    assert choose_adam("auto", has_cuda=True) == "transformer_engine"
    assert choose_adam("apex", has_cuda=True) == "apex"


def test_the_apex_of_pypi_is_not_nvidias(install) -> None:
    install("apex", whole=False)
    assert choose_adam("auto", has_cuda=True) == "torch"
    with pytest.raises(ConfigError, match=r"apex\.optimizers.*build NVIDIA's apex from source.*PyPI is another"):
        choose_adam("apex", has_cuda=True)


def test_a_wish_without_its_library_or_a_gpu_is_refused(install) -> None:
    with pytest.raises(ConfigError, match=r"kernels\.adam=transformer_engine needs .*No module named"):
        choose_adam("transformer_engine", has_cuda=True)
    install("transformer_engine")
    with pytest.raises(ConfigError, match="runs on a GPU"):
        choose_adam("transformer_engine", has_cuda=False)
