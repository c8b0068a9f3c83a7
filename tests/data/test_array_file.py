"""Arrays on the disk are `np.save`'s, byte for byte, and a full disk says that it is full."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import numpy as np
import pytest

from megatron_xmtf.data.array_file import map_new_array, save_array


@pytest.mark.parametrize(
    "array", [np.arange(5), np.zeros(0, np.uint32), np.arange(6, dtype=np.uint16).reshape(2, 3)[:, ::2]]
)
def test_the_bytes_are_those_of_numpy(array: np.ndarray, tmp_path: Path) -> None:
    save_array(tmp_path / "ours.npy", array)
    np.save(tmp_path / "theirs.npy", np.ascontiguousarray(array))
    assert (tmp_path / "ours.npy").read_bytes() == (tmp_path / "theirs.npy").read_bytes()


def test_a_full_disk_is_said_to_be_one() -> None:
    with pytest.raises(OSError) as caught:
        save_array(Path("/dev/full"), np.zeros(1 << 16))
    assert caught.value.errno == errno.ENOSPC


def test_the_space_of_a_mapped_array_is_taken_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mapped = map_new_array(tmp_path / "map.npy", np.uint32, (3, 4096))
    assert mapped.shape == (3, 4096) and not mapped.any()
    taken = (tmp_path / "map.npy").stat()
    assert taken.st_blocks * 512 >= taken.st_size, "a file with holes dies of SIGBUS when the disk is full"

    def full(descriptor: int, start: int, length: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(OSError, match="No space left"):
        map_new_array(tmp_path / "other.npy", np.uint32, (3, 4))
