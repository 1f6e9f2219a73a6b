"""Several processes that train on one shared folder: one cache, no sample twice, none left out; and every format through the loader."""

import json
import multiprocessing
import subprocess
import sys

import numpy as np
import pytest

from vla_oft.bench import demonstrations
from vla_oft.bench.data_rates import raw_decoder, robot_of, unchanged
from vla_oft.data.base import ReadOptions, open_source
from vla_oft.data.chunks import ChunkDataset
from vla_oft.data.loader import BatchLoader
from vla_oft.data.mixture import MixtureOrder
from vla_oft.preprocess import Config, Preparation

SHAPE = demonstrations.Shape(episodes=3, length=11, size=48)
RANK = """
import itertools, json, sys
sys.path.insert(0, sys.argv[1])
from test_ranks import batches
if __name__ == "__main__":
    print(json.dumps(batches(sys.argv[2], int(sys.argv[3]), 2)))
"""


def options(kind: str, cache_dir=None) -> ReadOptions:
    if kind == "aloha_hdf5":
        return ReadOptions(colour_order="rgb", instruction="do it", cache_dir=cache_dir)
    return ReadOptions(cache_dir=cache_dir)


def dataset(path, kind: str = "rlds", size: int = 48, **more) -> ChunkDataset:
    source = open_source(path, options(kind))
    return ChunkDataset(
        [source],
        robot_of(source),
        prepare=Preparation(Config(image_size=size, resize="lanczos", crop_area=1.0), fast=True),
        action_normalizer=unchanged(source.action_dim),
        state_normalizer=unchanged(source.state_dim),
        **more,
    )


def keep(samples):
    return samples


def batches(path: str, rank: int, world_size: int) -> list[list[int]]:
    data = dataset(path, cache="disk")
    loader = BatchLoader(data, MixtureOrder(data.sizes, seed=5), 3, keep, rank=rank, world_size=world_size)
    return [batch.indices.tolist() for _, batch in zip(range(5), loader, strict=False)]


def test_ranks_share_a_folder_its_caches_and_one_order(tmp_path, request):
    path = demonstrations.write(tmp_path, "rlds", SHAPE)
    (tmp_path / "rank.py").write_text(RANK)
    command = [sys.executable, str(tmp_path / "rank.py"), str(request.path.parent), str(path)]
    ranks = [subprocess.Popen([*command, str(rank)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for rank in range(2)]
    drawn = []
    for process in ranks:
        out, err = process.communicate(timeout=100)
        assert process.returncode == 0, err
        drawn.append(json.loads(out))
    caches = sorted(p.name.split("-")[0] for p in (tmp_path / ".cache").iterdir() if p.is_dir())
    assert caches == ["frames", "rlds1"], "each made once"
    together = np.array(drawn).transpose(1, 2, 0).reshape(-1)  # draw r, r + 2, r + 4, ... of rank r
    np.testing.assert_array_equal(together, MixtureOrder([33], seed=5).draw(0, 30))
    assert len(set(together.tolist())) == 30


@pytest.mark.parametrize("kind", list(demonstrations.WRITERS))
def test_every_format_gives_its_frames_through_the_loader(tmp_path, kind):
    path = demonstrations.write(tmp_path, kind, SHAPE)
    data, source = dataset(path, kind), open_source(path, options(kind))
    order = MixtureOrder(data.sizes, seed=1)
    inline, parallel = (next(iter(BatchLoader(data, order, 8, keep, num_workers=n))) for n in (0, 2))
    np.testing.assert_array_equal(inline.images, parallel.images)
    original = list(demonstrations.demonstrations(SHAPE))
    for image, index, actions in zip(inline.images, inline.indices.tolist(), inline.actions, strict=True):
        episode, step = divmod(index, SHAPE.length)
        for view, camera in enumerate(source.cameras):
            np.testing.assert_array_equal(image[view], source.frames(episode, [step], camera)[0])
        np.testing.assert_array_equal(actions[0], original[episode].actions[step])
        name = "front" if view_is_front(source.cameras[0]) else "wrist"
        assert np.abs(image[0].astype(int) - original[episode].frames[name][step]).mean() < 12  # lossy; another picture is 30 away
    assert next(iter(raw_decoder(kind, path, SHAPE)())) == 1


def view_is_front(camera: str) -> bool:
    return camera in ("front", "image", "agentview_rgb")


def test_another_number_of_ranks_continues_the_same_order(tmp_path):
    data = dataset(demonstrations.write(tmp_path, "rlds", SHAPE))
    order = MixtureOrder(data.sizes, seed=2)
    two = [BatchLoader(data, order, 4, keep, rank=rank, world_size=2) for rank in range(2)]
    for loader in two:
        next(iter(loader))
    alone = BatchLoader(data, order, 4, keep)
    alone.load_state_dict(two[0].state_dict())
    np.testing.assert_array_equal(next(iter(alone)).indices, order.draw(8, 4))


def test_spawned_workers_give_the_same(tmp_path, monkeypatch):
    data = dataset(demonstrations.write(tmp_path, "rlds", SHAPE))
    order = MixtureOrder(data.sizes, seed=3)
    here = next(iter(BatchLoader(data, order, 4, keep)))
    spawn = multiprocessing.get_context("spawn")
    monkeypatch.setattr(multiprocessing, "get_context", lambda method=None: spawn)
    there = next(iter(BatchLoader(data, order, 4, keep, num_workers=1)))
    np.testing.assert_array_equal(here.images, there.images)
