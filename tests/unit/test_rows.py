"""Tables in files: the same rows as in memory, from any thread and process, without mapping the file."""

import multiprocessing
import os
import pickle
import shutil
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from vla_oft.data.rows import FileRows, RamRows, RowsFile, need_space


@pytest.fixture
def array():
    return np.random.default_rng(0).normal(size=(50, 3, 2)).astype(np.float32)


@pytest.fixture
def file(array, tmp_path):
    out = RowsFile(tmp_path / "rows.npy", array.shape, array.dtype)
    out.write(20, array[20:])  # in any order
    out.write(0, array[:20])
    out.close()
    return tmp_path / "rows.npy"


@pytest.mark.parametrize("rows", [[3], [0, 1, 2, 3], [7, 7, 8, 2, 49], [[1, 2, 3], [48, 49, 49]], []])
def test_a_file_gives_the_same_rows_as_memory(array, file, rows):
    wanted = np.array(rows, np.int64)
    found = FileRows(file).read(wanted)
    np.testing.assert_array_equal(found, RamRows(array).read(wanted))
    assert found.dtype == array.dtype and found.shape == (*wanted.shape, 3, 2)


def test_the_file_is_an_ordinary_npy_file(array, file):
    np.testing.assert_array_equal(np.load(file), array)


def test_threads_share_a_file(array, file):
    table = FileRows(file)
    with ThreadPoolExecutor(8) as pool:
        for row, found in zip(range(50), pool.map(lambda r: table.read(np.array([r])), range(50)), strict=True):
            np.testing.assert_array_equal(found[0], array[row])


def _sum(table: FileRows) -> float:
    return float(table.read(np.arange(50)).astype(np.float64).sum())


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_processes_share_a_file(array, file, method):
    table = FileRows(file)
    table.read(np.array([0]))  # opened before the fork
    assert len(pickle.dumps(table)) < 1000
    with multiprocessing.get_context(method).Pool(2) as pool:
        assert pool.map(_sum, [table] * 4) == [float(array.astype(np.float64).sum())] * 4


def test_rows_that_do_not_exist_are_refused(file):
    for row in (-1, 50):
        with pytest.raises(IndexError, match=r"has rows 0\.\.49"):
            FileRows(file).read(np.array([row]))


def test_a_truncated_file_is_refused_when_opened_and_noticed_when_read(file):
    table = FileRows(file)
    os.truncate(file, file.stat().st_size - 30)
    with pytest.raises(ValueError, match="header says 50 rows; delete it"):
        FileRows(file)
    with pytest.raises(ValueError, match="became shorter"):
        table.read(np.array([49]))


def test_a_full_disk_is_said_before_anything_is_written(tmp_path):
    free = shutil.disk_usage(tmp_path).free
    with pytest.raises(ValueError, match=r"GB free, .* GB are needed; free some space"):
        RowsFile(tmp_path / "rows.npy", (2 * free, 1), np.uint8)
    assert not list(tmp_path.iterdir())
    need_space(tmp_path, 1000)
