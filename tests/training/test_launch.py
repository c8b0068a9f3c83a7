"""What a run leaves in `OUT/status.json`, whatever ends it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_xmtf.config import RunConfig
from megatron_xmtf.errors import DatasetError
from megatron_xmtf.training import launch


@pytest.mark.parametrize(
    ("error", "code", "name"), [(DatasetError("half"), 2, "USER"), (ZeroDivisionError("by hand"), 1, "FAILED")]
)
def test_the_outcome_of_an_earlier_run_does_not_stay(
    error: Exception, code: int, name: str, run_config: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = run_config()
    status = Path(config.output) / "status.json"
    status.parent.mkdir(parents=True)
    status.write_text('{"exit_code": 0, "name": "DONE"}')

    def fail(*arguments: Any, **keywords: Any) -> None:
        raise error

    monkeypatch.setattr(launch, "prepare_run", fail)
    with pytest.raises(type(error)):
        launch.train(config)
    found = json.loads(status.read_text())
    assert (found["exit_code"], found["name"]) == (code, name)
    assert str(error) in found["message"]
