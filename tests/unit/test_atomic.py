"""Folders and files that appear whole or not at all, also after a kill."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from vla_oft.atomic import atomic_directory, replace_file

KILLED = """
import os, signal, sys
from pathlib import Path
from vla_oft.atomic import atomic_directory
with atomic_directory(Path(sys.argv[1])) as folder:
    (folder / "part").write_text("x")
    os.kill(os.getpid(), signal.SIGKILL)
"""


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def test_what_a_killed_process_left_is_removed_by_the_next_write_of_that_name(tmp_path):
    for name in ("out", "other"):
        done = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path / name)], check=False)
        assert done.returncode == -signal.SIGKILL
    assert len(names(tmp_path)) == 2 and not (tmp_path / "out").exists()
    with atomic_directory(tmp_path / "out") as folder:
        (folder / "whole").write_text("x")
        assert len(names(tmp_path)) == 2, "the new part of out, the old part of other"
    assert names(tmp_path / "out") == ["whole"] and len(names(tmp_path)) == 2


def test_what_a_living_process_writes_is_left_alone(tmp_path):
    with atomic_directory(tmp_path / "out") as folder:
        living = folder.with_name(folder.name.replace(str(os.getpid()), str(os.getppid())))
        elsewhere = folder.with_name(folder.name.replace(str(os.getpid()), "elsewhere.999999999"))
    living.mkdir()
    elsewhere.mkdir()
    (tmp_path / "out").rmdir()
    with atomic_directory(tmp_path / "out"):
        pass
    assert living.is_dir() and elsewhere.is_dir()


def test_an_error_leaves_nothing(tmp_path):
    with pytest.raises(RuntimeError), atomic_directory(tmp_path / "out") as folder:
        (folder / "part").write_text("x")
        raise RuntimeError
    assert names(tmp_path) == []


def test_a_file_is_replaced_in_one_step(tmp_path):
    replace_file(tmp_path / "file", "old")
    replace_file(tmp_path / "file", "new")
    assert (tmp_path / "file").read_text() == "new" and names(tmp_path) == ["file"]
