"""Frames decoded straight to where they are needed, and pictures read from where they lie: the same pixels as on any other way."""

import io
import os
from pathlib import Path

import h5py
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from vla_oft.bench import demonstrations
from vla_oft.data import hdf5_places, pictures
from vla_oft.data.base import ReadOptions, Source, open_source
from vla_oft.data.parquet import read_pictures

SHAPE = demonstrations.Shape(episodes=3, length=7, size=64)


def opened(folder: Path, kind: str, **options) -> Source:
    said = {"colour_order": "rgb", "instruction": "fold"} if kind == "aloha_hdf5" else {}
    return open_source(demonstrations.write(folder, kind, SHAPE), ReadOptions(cache_dir=folder / "cache", **{**said, **options}))


def frame_into(source: Source, episode: int, step: int, camera: str, out: np.ndarray) -> bool:
    return source.frame_into(episode, step, camera, out)  # type: ignore[attr-defined]


@pytest.mark.parametrize("kind", demonstrations.WRITERS)
def test_a_frame_decoded_in_place_is_the_same_frame(tmp_path, kind):
    source = opened(tmp_path, kind)
    whole = {(e, c): source.frames(e, range(7), c) for e in range(3) for c in source.cameras}
    for e, step, c in [(e, s, c) for s in (6, 0, 3, 4, 5) for e in (2, 0, 1) for c in source.cameras]:
        out = np.zeros((64, 64, 3), np.uint8)
        assert frame_into(source, e, step, c, out)
        np.testing.assert_array_equal(out, whole[e, c][step])
    for shape in ((32, 32, 3), (64, 66, 3)):
        out = np.full(shape, 7, np.uint8)
        assert not frame_into(source, 0, 0, source.cameras[0], out) and (out == 7).all()


def test_exchanged_colours_are_exchanged_back_in_place(tmp_path):
    source = opened(tmp_path, "aloha_hdf5", colour_order="bgr")
    out = np.zeros((64, 64, 3), np.uint8)
    assert frame_into(source, 1, 2, "front", out)
    np.testing.assert_array_equal(out, source.frames(1, [2], "front")[0])
    np.testing.assert_array_equal(out[..., ::-1], opened(tmp_path, "aloha_hdf5").frames(1, [2], "front")[0])


@pytest.mark.parametrize(
    ("storage", "has_places"),
    [
        ({}, True),
        ({"chunks": (1, 8, 9, 3)}, True),
        ({"chunks": (4, 8, 9, 3)}, True),
        ({"chunks": (4, 8, 3, 3)}, False),
        ({"chunks": (1, 8, 9, 3), "compression": "gzip"}, False),
    ],
)
def test_rows_are_read_from_their_place_where_they_have_one(tmp_path, storage, has_places):
    path, data = tmp_path / "a.hdf5", np.random.default_rng(0).integers(0, 255, (10, 8, 9, 3), np.uint8)
    with h5py.File(path, "w") as file:
        file["other"] = np.arange(1000)
        file.create_dataset("images", data=data, **storage)
    for row in (9, 0, 5, 4):
        out = np.zeros((8, 9, 3), np.uint8)
        assert hdf5_places.read_row_into(path, "images", row, 10, out, "a.hdf5") == has_places
        np.testing.assert_array_equal(out, data[row] if has_places else 0)
        assert hdf5_places.read_row(path, "images", row, 10, "a.hdf5") == (data[row].tobytes() if has_places else None)
    assert hdf5_places.read_row(path, "images", 0, 11, "a.hdf5") is None, "another number of rows than when it was indexed"


def test_blocks_that_were_never_written_have_no_place(tmp_path):
    with h5py.File(tmp_path / "a.hdf5", "w") as file:
        file.create_dataset("images", (10, 8), np.uint8, chunks=(1, 8))[:5] = 1
    assert hdf5_places.read_row(tmp_path / "a.hdf5", "images", 2, 10, "a") is None


def test_a_recording_that_was_made_again_is_read_anew(tmp_path):
    path = tmp_path / "a.hdf5"
    for value, before in ((3, 0), (4, 5000)):
        path.unlink(missing_ok=True)
        with h5py.File(path, "w") as file:
            file["before"] = np.zeros(before)
            file["images"] = np.full((2, 4), value, np.uint8)
        assert hdf5_places.read_row(path, "images", 1, 2, "a") == bytes([value] * 4)


def test_a_recording_that_became_shorter_is_named(tmp_path):
    source = opened(tmp_path, "aloha_hdf5")
    out = np.zeros((64, 64, 3), np.uint8)
    assert frame_into(source, 0, 6, "wrist", out)
    path = next(tmp_path.rglob("episode_0.hdf5"))
    os.truncate(path, path.stat().st_size // 2)
    with pytest.raises(ValueError, match=r"episode_0\.hdf5.*copy"):
        frame_into(source, 0, 6, "wrist", out)


def encoded(image: Image.Image, **how) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG", **how)
    return buffer.getvalue()


NOISE = np.random.default_rng(0).integers(0, 255, (20, 31, 3), np.uint8)


@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "LA", "P", "1"])
@pytest.mark.parametrize("how", [{}, {"compress_level": 1}, {"optimize": True}])
def test_png_of_every_kind_is_what_pillow_makes_of_it(mode, how):
    data = encoded(Image.fromarray(NOISE).convert(mode), **how)
    expected = np.array(Image.open(io.BytesIO(data)).convert("RGB"))
    for _ in range(3):  # the same one after itself: a decoder may take it for a difference
        np.testing.assert_array_equal(pictures.decode(data, "here"), expected)
        out = np.zeros_like(expected)
        assert pictures.decode_into(data, out, "here") == (mode == "RGB")
        np.testing.assert_array_equal(out, expected if mode == "RGB" else 0)


def test_transparent_colours_are_left_to_pillow():
    data = encoded(Image.fromarray(NOISE), transparency=(3, 4, 5))
    np.testing.assert_array_equal(pictures.decode(data, "here"), NOISE)


def test_a_damaged_png_is_refused_wherever_pillow_refuses_it():
    data, rng = encoded(Image.fromarray(NOISE)), np.random.default_rng(0)
    for _ in range(300):
        bad = bytearray(data)
        bad[rng.integers(len(bad))] ^= 1 << rng.integers(8)
        try:
            found = pictures.decode(bytes(bad), "here")
        except ValueError as error:
            assert str(error).startswith("here: unreadable picture")
            continue
        np.testing.assert_array_equal(found, np.array(Image.open(io.BytesIO(bytes(bad))).convert("RGB")))


@pytest.mark.parametrize("compression", ["none", "snappy", "zstd"])
@pytest.mark.parametrize("dictionary", [True, False])
def test_stored_pictures_are_the_same_however_they_are_stored(tmp_path, compression, dictionary):
    images = [encoded(Image.fromarray(np.roll(NOISE, number, 0))) for number in range(9)]
    images[5] = images[4]
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    table = pa.table({"x": np.arange(9), "front": pa.array([{"bytes": data, "path": None} for data in images], kind)})
    path = tmp_path / "a.parquet"
    pq.write_table(table, path, row_group_size=4, compression=compression, use_dictionary=dictionary)
    for _ in range(2):
        assert read_pictures(path, "front", [8, 0, 5, 4, 4]) == [(images[row], None) for row in (8, 0, 5, 4, 4)]
    assert [data for data, _ in read_pictures(path, "front", range(9))] == images


def test_pictures_that_lie_elsewhere_are_named(tmp_path):
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    rows = [{"bytes": b"abc", "path": None}, {"bytes": None, "path": "images/1.png"}]
    pq.write_table(pa.table({"front": pa.array(rows, kind)}), tmp_path / "a.parquet", compression="none")
    assert read_pictures(tmp_path / "a.parquet", "front", [1, 0]) == [(None, "images/1.png"), (b"abc", None)]
