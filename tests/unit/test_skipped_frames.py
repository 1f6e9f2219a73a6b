"""Pictures that are damaged in the midst of sound files: without skip_bad one clear line, with it training goes on, and lists them."""

import dataclasses
import itertools
import json
import multiprocessing
import os
import pickle
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from spoiling import spoil
from test_loader import keep, same, taken
from test_ranks import options

from tests.tiny import tiny_policy
from vla_oft import preprocess
from vla_oft.bench import demonstrations
from vla_oft.bench.data_rates import robot_of, unchanged
from vla_oft.data.base import ReadOptions, Source, open_source
from vla_oft.data.cache import prepared
from vla_oft.data.chunks import ChunkDataset, Samples
from vla_oft.data.damage import Damaged, too_many
from vla_oft.data.lerobot_writer import LeRobotWriter
from vla_oft.data.loader import BatchLoader
from vla_oft.data.mixture import MixtureOrder
from vla_oft.data.prepare import open_checked
from vla_oft.data.recording import Episode, Schema, encode
from vla_oft.data.select import Filters, select
from vla_oft.data.skipped import Draw, SkippedFrames
from vla_oft.heads import diffusion, discrete, l1, pooled
from vla_oft.policy import Batch
from vla_oft.preprocess import Config, Preparation
from vla_oft.robots.tabletop import SPEC

SHAPE = demonstrations.Shape(episodes=3, length=11, size=48)
EPISODE, STEP, ROW = 1, 3, 14
"""The frame that is damaged; nothing looks at it before it is drawn."""


def dataset(source: Source, *others: Source, size: int = 48, skip_bad: bool | Sequence[bool] = True, **more) -> ChunkDataset:
    return ChunkDataset(
        [source, *others],
        robot_of(source),
        prepare=Preparation(Config(image_size=size, resize="lanczos", crop_area=1.0), fast=True),
        action_normalizer=unchanged(source.action_dim),
        state_normalizer=unchanged(source.state_dim),
        skip_bad=skip_bad,
        **more,
    )


@pytest.fixture(scope="module")
def intact(tmp_path_factory) -> Path:
    return demonstrations.write(tmp_path_factory.mktemp("intact"), "rlds", SHAPE)


def spoilt(intact: Path, folder: Path, *places: tuple[int, int, str]) -> Source:
    """A copy in which frames (episode, step, camera) are damaged; nothing of that is seen before they are decoded."""
    shutil.copytree(intact, folder / "set")
    read = ReadOptions(cache_dir=folder / "cache")
    for place in places:
        spoil(open_source(folder / "set", read), *place)
    source = open_checked(folder / "set", dataclasses.replace(read, skip_bad=True))
    assert len(source) == SHAPE.episodes and not source.skipped
    return source


def assert_goes_on(whole: Source, damaged: Source, episode: int, step: int, camera: str) -> None:
    """All samples but those of damaged steps are as they were, and those are samples of other steps; what is damaged is named."""
    before, after = dataset(whole).batch(range(int(whole.lengths.sum()))), dataset(damaged).batch(range(int(whole.lengths.sum())))
    row = int(whole.lengths[:episode].sum()) + step
    replaced = np.flatnonzero(after.indices != before.indices).tolist()
    assert replaced == [row] and row not in after.indices
    for name in ("images", "state", "actions", "valid"):
        np.testing.assert_array_equal(getattr(after, name), getattr(before, name)[after.indices])
    (frame,) = after.damaged
    assert (frame.row, frame.camera) == (row, camera) and "\n" not in frame.reason
    for part in (str(damaged.path), f"episode {episode}", f"step {step}", camera):
        assert part in frame.reason, part
    with pytest.raises(ValueError, match=rf"episode {episode}\b.*step {step}\b.*again; or go on .*--skip-bad") as error:
        dataset(damaged, skip_bad=False).batch([0, row, row + 1])
    assert "\n" not in str(error.value) and str(damaged.path) in str(error.value)


@pytest.mark.parametrize("kind", list(demonstrations.WRITERS))
def test_training_passes_over_a_damaged_picture_in_every_format(tmp_path, kind):
    path = demonstrations.write(tmp_path, kind, SHAPE)
    whole, read = open_source(path, options(kind, tmp_path / "cache")), options(kind, tmp_path / "cache")
    shutil.copytree(path, tmp_path / "set")
    raw = open_source(tmp_path / "set", read)
    camera = raw.cameras[-1]
    spoil(raw, EPISODE, STEP, camera)
    damaged = open_checked(tmp_path / "set", dataclasses.replace(read, skip_bad=True))
    assert len(damaged) == 3 and not damaged.skipped
    assert_goes_on(whole, damaged, EPISODE, STEP, camera)


@pytest.mark.shared
@pytest.mark.parametrize(
    ("name", "more"),
    [
        ("lerobot_v3_sample", {}),
        ("lerobot_v21_sample", {}),
        ("lerobot_v3_images_sample", {}),
        ("lerobot_v21_openpi_sample", {}),
        ("rlds_sample/libero_spatial_no_noops", {}),
        ("libero_hdf5_sample", {}),
        ("aloha_hdf5_sample", {"instruction": "fold"}),
        ("aloha_hdf5_sample/compressed", {"instruction": "fold", "colour_order": "bgr"}),
    ],
)
def test_training_passes_over_a_damaged_picture_in_the_samples_of_every_format(shared, tmp_path, name, more):
    read = ReadOptions(cache_dir=tmp_path / "cache", **more)
    shutil.copytree(shared / "formats" / name, tmp_path / "set")
    raw = open_source(tmp_path / "set", read)
    episode, camera = len(raw) - 1, raw.cameras[-1]
    spoil(raw, episode, 3, camera)
    damaged = open_checked(tmp_path / "set", dataclasses.replace(read, skip_bad=True))
    assert len(damaged) == len(raw)
    assert_goes_on(open_source(shared / "formats" / name, read), damaged, episode, 3, camera)


def test_damage_to_a_keyframe_reaches_to_the_next_and_no_further(tmp_path):
    with LeRobotWriter(tmp_path / "set", Schema(cameras=("front",), state_dim=8, action_dim=7), fps=20) as writer:
        for demo in demonstrations.demonstrations(dataclasses.replace(SHAPE, length=30)):
            images = {"front": demo.frames["front"]}
            recorded = Episode(images=images, states=demo.states, actions=demo.actions, instructions="do it")
            writer.append(encode([recorded], 20, keyint=10))
    shutil.copytree(tmp_path / "set", tmp_path / "whole")
    spoil(open_source(tmp_path / "set"), 1, 13, "front")
    data = dataset(open_checked(tmp_path / "set", ReadOptions(skip_bad=True)))
    in_order = data.batch(range(90))
    alone = [data.batch([n]) for n in range(90)]
    assert np.flatnonzero(in_order.indices != np.arange(90)).tolist() == list(range(43, 50)), "steps 13 to 19 of episode 1"
    assert all(np.array_equal(in_order.images[n], sample.images[0]) for n, sample in enumerate(alone)), "whatever was decoded before"
    before = dataset(open_source(tmp_path / "whole")).batch(in_order.indices)
    np.testing.assert_array_equal(in_order.images, before.images)


def with_b_frames(folder: Path) -> Path:
    """A dataset of one episode whose only video is H.264 in groups of 12 frames, most of which are predicted from later ones."""
    demo = next(demonstrations.demonstrations(demonstrations.Shape(episodes=1, length=60, size=96)))
    with LeRobotWriter(folder, Schema(cameras=("front",), state_dim=8, action_dim=7), fps=10) as writer:
        images = {"front": demo.frames["front"]}
        writer.append_episode(Episode(images=images, states=demo.states, actions=demo.actions, instructions="do it"))
    (path,) = folder.rglob("*.mp4")
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=10)
        stream.width, stream.height, stream.pix_fmt, stream.gop_size, stream.max_b_frames = 96, 96, "yuv420p", 12, 3
        for image in demo.frames["front"]:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode())
    return path


def test_whether_a_frame_is_damaged_does_not_depend_on_what_was_decoded_before(tmp_path):
    path = with_b_frames(tmp_path / "set")
    source, good = open_source(tmp_path / "set"), path.read_bytes()
    with av.open(str(path)) as container:
        entries = [(entry.pos, entry.size) for entry in container.streams.video[0].index_entries]
    stumbled = 0
    for at, size in entries[24:36]:
        path.write_bytes(good[: at + size // 3] + bytes(size - size // 3) + good[at + size :])
        alone = [readable(source, [step]) for step in range(60)]
        for pair in itertools.combinations([step for step in range(20, 40) if alone[step]], 2):
            readable(source, [0])  # elsewhere
            if pair[1] - pair[0] < 4 and not readable(source, pair):
                stumbled += 1
                assert dataset(source, size=96).batch(pair).damaged == ()
    assert stumbled, "on the way from one intact frame to the next, a decoder meets damaged ones"


def readable(source: Source, steps: Sequence[int]) -> bool:
    try:
        source.frames(0, steps, "front")
    except ValueError:
        return False
    return True


@pytest.mark.parametrize("cache", ["none", "ram", "disk"])
@pytest.mark.parametrize("workers", [0, 1, 2])
def test_batches_and_lists_depend_neither_on_workers_nor_on_caches(intact, tmp_path, capfd, cache, workers):
    source = spoilt(intact, tmp_path, (0, 2, "image"), (EPISODE, STEP, "wrist_image"), (EPISODE, STEP, "image"))
    data = dataset(source, cache=cache, cache_dir=tmp_path / "cache")
    order = MixtureOrder(data.sizes, seed=3)
    skipped = SkippedFrames(data, tmp_path / "skipped.txt")
    loader = BatchLoader(data, order, 7, keep, num_workers=workers, skipped=skipped)
    found = taken(loader, 15)
    plain = dataset(open_source(intact, ReadOptions(cache_dir=tmp_path / "cache")))
    drawn = [order.draw(7 * n, 7) for n in range(15)]
    for batch, asked in zip(found, drawn, strict=True):
        assert same(plain.batch(batch.indices, batch.seeds), batch)
        assert [int(n) for n in asked[batch.indices != asked]] == [int(n) for n in asked if n in (2, ROW)]
        assert same(dataset(source).batch(asked, batch.seeds), batch)
    count = sum(int(np.isin(asked, (2, ROW)).sum()) for asked in drawn)
    assert count > 3 and skipped.summary() == (
        f"skipped: 3 frames that cannot be decoded, listed in {tmp_path / 'skipped.txt'}; in {count} of 105 samples others took their place"
    )
    lines = (tmp_path / "skipped.txt").read_text().splitlines()
    assert len(lines) == 3 and sum("episode 0, camera 'image', step 2:" in line for line in lines) == 1
    said = [line for line in capfd.readouterr().err.splitlines() if line.startswith("skipped ")]
    assert sorted(said) == sorted(f"skipped {line}" for line in lines)
    assert loader.state_dict()["position"] == 105


def test_a_resumed_run_adds_to_the_list_only_what_is_new(intact, tmp_path, capfd):
    data = dataset(spoilt(intact, tmp_path, (0, 2, "image"), (2, 4, "image")))
    order = MixtureOrder(data.sizes, seed=3)
    whole = taken(BatchLoader(data, order, 3, keep), 22)
    at = [n for n, batch in enumerate(whole) if batch.damaged]
    first = BatchLoader(data, order, 3, keep, skipped=SkippedFrames(data, tmp_path / "skipped.txt"))
    taken(first, at[0] + 1)
    with (tmp_path / "skipped.txt").open("a") as file:
        file.write("a line that a kill cut o")
    capfd.readouterr()
    resumed = BatchLoader(data, order, 3, keep, num_workers=2, skipped=SkippedFrames(data, tmp_path / "skipped.txt"))
    resumed.load_state_dict(first.state_dict())
    rest = taken(resumed, 22 - at[0] - 1)
    assert all(same(a, b) for a, b in zip(whole[at[0] + 1 :], rest, strict=True))
    lines = (tmp_path / "skipped.txt").read_text().splitlines()
    assert len(lines) == 3 and lines[1] == "a line that a kill cut o" and lines[0] != lines[2]
    assert [line for line in capfd.readouterr().err.splitlines() if line.startswith("skipped")] == [f"skipped {lines[2]}"]


def test_episodes_that_were_left_out_beforehand_are_in_the_list_too(intact, tmp_path, capfd):
    source = spoilt(intact, tmp_path)
    spoil(open_source(tmp_path / "set", ReadOptions(cache_dir=tmp_path / "cache")), 1, SHAPE.length - 1, "image")
    source = open_checked(tmp_path / "set", ReadOptions(cache_dir=tmp_path / "cache", skip_bad=True))
    assert len(source) == 2 and len(source.skipped) == 1
    skipped = SkippedFrames(dataset(source), tmp_path / "skipped.txt")
    assert (tmp_path / "skipped.txt").read_text() == f"{source.skipped[0]}\n" and skipped.summary() == ""
    assert "skipped " not in capfd.readouterr().err, "said when it was opened"


def test_a_batch_of_nothing_but_damaged_samples_is_made_of_others(intact, tmp_path):
    source = spoilt(intact, tmp_path, (0, 2, "image"), (1, 3, "image"), (2, 4, "wrist_image"))
    batch = dataset(source).batch([2, 14, 26, 2])
    assert not {2, 14, 26} & set(batch.indices.tolist()) and batch.indices[0] == batch.indices[3]
    assert {frame.row for frame in batch.damaged} == {2, 14, 26} and batch.valid[:, 0].all()


def test_what_is_met_on_the_way_to_a_readable_sample_is_listed_too(intact, tmp_path):
    places = [(episode, step, "image") for episode in range(3) for step in range(1, 9) if step != 5]
    data = dataset(spoilt(intact, tmp_path, *places))
    rows = [11 * episode + step for episode, step, _ in places]
    met = [{frame.row for frame in data.batch([row]).damaged} for row in rows]
    assert all(row in found and found <= set(rows) for row, found in zip(rows, met, strict=True)) and max(map(len, met)) > 1


def test_each_dataset_of_a_mixture_has_its_own_substitutes(intact, tmp_path):
    source = spoilt(intact, tmp_path, (1, 3, "image"))
    both = dataset(open_source(intact, ReadOptions(cache_dir=tmp_path / "cache")), source, skip_bad=[False, True])
    alone = dataset(source)
    batch = both.batch([ROW, 33 + ROW, 40, 0])
    assert batch.indices.tolist() == [ROW, 33 + int(alone.batch([ROW]).indices[0]), 40, 0]
    assert [(frame.source, frame.row) for frame in batch.damaged] == [(1, ROW)]
    assert both.count(np.array([ROW, 33 + ROW, 40])) == (1, 2)
    np.testing.assert_array_equal(batch.images[1], alone.batch([ROW]).images[0])


def test_through_filters_the_step_that_was_recorded_is_named(intact, tmp_path):
    source = select(spoilt(intact, tmp_path, (2, 6, "wrist_image")), Filters(episodes="1:", every=2))
    frames = dataset(source).batch(range(int(source.lengths.sum()))).damaged
    assert [frame.row for frame in frames] == [6 + 3] and "episode 2, camera 'wrist_image', step 6:" in frames[0].reason


def cached(source: Source, folder: Path, where: str = "disk", skip_bad: bool = True) -> ChunkDataset:
    return dataset(source, cache=where, cache_dir=folder, skip_bad=skip_bad)


def test_a_cache_on_the_disk_remembers_what_is_damaged(intact, tmp_path, capfd):
    source = spoilt(intact, tmp_path, (EPISODE, STEP, "image"))
    first = cached(source, tmp_path / "cache")
    capfd.readouterr()
    again = cached(source, tmp_path / "cache")
    assert "decoding" not in capfd.readouterr().err and first.damaged == again.damaged == dataset(source).batch([ROW]).damaged
    capfd.readouterr()
    SkippedFrames(again)
    assert capfd.readouterr().err == f"skipped {again.damaged[0].reason}\n", "listed although it was not drawn"
    assert same(pickle.loads(pickle.dumps(again)).batch([ROW, 3]), first.batch([ROW, 3]))
    with pytest.raises(
        ValueError, match=r"episode 1, camera 'image', step 3.*; or go on without such frames, with skip_bad \(--skip-bad\)"
    ):
        cached(source, tmp_path / "cache", skip_bad=False)


@pytest.mark.parametrize("where", ["ram", "disk"])
def test_damaged_frames_are_black_in_a_cache_and_the_others_as_they_are(intact, tmp_path, where):
    source = spoilt(intact, tmp_path, (EPISODE, STEP, "wrist_image"))
    prepare = Preparation(Config(image_size=48, resize="lanczos", crop_area=1.0), fast=True)
    rows, damaged = prepared(source, source.cameras, prepare, where, tmp_path / "cache", skip_bad=True)
    whole, _ = prepared(open_source(intact, ReadOptions(cache_dir=tmp_path / "cache")), source.cameras, prepare, "ram")
    found, expected = rows.read(np.arange(33)), whole.read(np.arange(33))
    expected[ROW, source.cameras.index("wrist_image")] = 0
    np.testing.assert_array_equal(found, expected)
    assert [(frame.row, frame.camera) for frame in damaged] == [(ROW, "wrist_image")]


@pytest.mark.parametrize("where", ["ram", "disk"])
def test_without_skip_bad_caching_stops_at_the_damaged_frame(intact, tmp_path, where):
    source = spoilt(intact, tmp_path, (EPISODE, STEP, "image"))
    with pytest.raises(ValueError, match=r"episode 1, camera 'image', step 3.*--skip-bad"):
        cached(source, tmp_path / "cache", where, skip_bad=False)
    assert not list((tmp_path / "cache").glob("frames-*"))


def test_a_cache_that_was_made_before_a_file_was_mended_is_not_used(intact, tmp_path):
    path = demonstrations.write(tmp_path, "lerobot", SHAPE)
    video = next((path / "videos").rglob("*front*/**/*.mp4"))
    good = video.read_bytes()
    spoil(open_source(path), EPISODE, STEP, "front")
    read = ReadOptions(skip_bad=True)
    cached(open_checked(path, read), tmp_path / "cache")
    video.write_bytes(good)  # of the same size: the dataset's fingerprint does not tell
    for skip_bad in (True, False):
        with pytest.raises(ValueError, match=r"cache .*frames-.* was made while a frame was damaged that is not any more .*: delete"):
            cached(open_checked(path, read), tmp_path / "cache", skip_bad=skip_bad)
    shutil.rmtree(next((tmp_path / "cache").glob("frames-*")))
    assert cached(open_checked(path, read), tmp_path / "cache").damaged == ()


def test_a_damaged_list_of_a_cache_is_an_error_with_a_way_out(intact, tmp_path):
    source = spoilt(intact, tmp_path, (EPISODE, STEP, "image"))
    cached(source, tmp_path / "cache")
    path = next((tmp_path / "cache").glob("frames-*/damaged.json"))
    for text in ("[{", json.dumps([{"row": 1}]), "[3]"):
        path.write_text(text)
        with pytest.raises(ValueError, match=r"damaged.json: unreadable .*; delete .*, it is made anew"):
            cached(source, tmp_path / "cache")


def test_a_broken_dataset_is_refused(intact, tmp_path):
    source = spoilt(intact, tmp_path, *((1, step, "image") for step in range(1, 6)))
    for where in ("ram", "disk"):
        with pytest.raises(ValueError, match=r"5 or more of 33 steps cannot be decoded, too many to leave out; copy .*--episodes.*step \d"):
            cached(source, tmp_path / "cache", where)
    data = dataset(source)
    positions = set()
    for workers in (0, 2):
        skipped = SkippedFrames(data, tmp_path / f"skipped-{workers}.txt")
        loader = BatchLoader(data, MixtureOrder(data.sizes, seed=0), 4, keep, num_workers=workers, skipped=skipped)
        with pytest.raises(
            ValueError, match=r"4 of its 33 steps cannot be decoded, and only \d+ were drawn: .*skipped-\d.txt lists"
        ) as error:
            taken(loader, 9)
        positions.add(loader.position)
        assert "\n" not in str(error.value)
        assert len((tmp_path / f"skipped-{workers}.txt").read_text().splitlines()) >= 4
    assert len(positions) == 1


def test_where_nothing_can_be_decoded_nothing_takes_its_place(intact, tmp_path):
    source = spoilt(intact, tmp_path)
    os.truncate(tmp_path / "set" / "demos-train.tfrecord-00000-of-00001", 100)
    with pytest.raises(ValueError, match="nothing to put in the place of damaged frames, 64 others are damaged, too"):
        dataset(source).batch([3])


@pytest.mark.parametrize(
    ("damaged", "seen", "size", "refused"),
    [
        (1, 1, 100_000, False), (32, 32, 100_000, False), (33, 33, 100_000, True),  # a few are nothing, however early they come
        (33, 3300, 100_000, False), (34, 3300, 100_000, True),  # then one in a hundred
        (1001, 10**6, 100_000, True), (1000, 10**6, 100_000, False),  # and epochs do not make it more
        (3, 10**6, 33, False), (4, 10**6, 33, True),  # of small datasets a tenth
    ],
)  # fmt: skip
def test_how_many_are_too_many(damaged, seen, size, refused):
    assert too_many(damaged, seen, size) is refused


def test_a_frame_that_comes_again_every_epoch_counts_once(intact, tmp_path):
    data = dataset(spoilt(intact, tmp_path, (0, 2, "image")))
    loader = BatchLoader(data, MixtureOrder(data.sizes, seed=0), 11, keep)
    taken(loader, 3 * 20)
    assert loader.skipped.summary() == "skipped: 1 frames that cannot be decoded; in 20 of 660 samples others took their place"


class Large:
    """What a list needs of a dataset, which is large enough for twenty damaged steps."""

    def __init__(self, data: ChunkDataset) -> None:
        self.sources, self.sizes, self.damaged = data.sources, [1000], ()


def list_as_a_rank(data: ChunkDataset, path: Path, rank: int) -> None:
    skipped = SkippedFrames(Large(data), path)  # type: ignore[arg-type]
    for row in range(20):
        if row % 3 != rank:
            frame = Damaged(row=row, camera="image", reason=f"row {row} is damaged")
            skipped.add(Draw(drawn=(1,), replaced=1, damaged=(frame,)))


def test_ranks_share_one_list(intact, tmp_path):
    data = dataset(open_source(intact, ReadOptions(cache_dir=tmp_path / "cache")))
    path = tmp_path / "skipped.txt"
    ranks = [multiprocessing.get_context("fork").Process(target=list_as_a_rank, args=(data, path, rank)) for rank in range(2)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(60)
        assert process.exitcode == 0
    assert sorted(path.read_text().splitlines()) == sorted(f"row {row} is damaged" for row in range(20))


HEADS = {
    "l1": l1.Config(), "huber": l1.Config(loss="huber"), "pooled": pooled.Config(), "diffusion": diffusion.Config(),
    "discrete": discrete.Config(), "autoregressive": discrete.Config(decoding="autoregressive"),
}  # fmt: skip


@pytest.fixture(scope="module")
def grounded(tmp_path_factory) -> tuple[ChunkDataset, ChunkDataset]:
    """Demonstrations with grounding, whole and with one step of three episodes damaged: samples 31, 40 and 49."""
    folder, rng = tmp_path_factory.mktemp("grounded"), np.random.default_rng(0)
    with LeRobotWriter(folder / "whole", SPEC, images=True) as writer:
        for number in range(30):
            extras = {
                "grounding": rng.integers(0, 2, (9, 2, 2, 2, 2)).astype(np.uint8),
                "landmarks": rng.normal(size=(9, 2, 3)).astype(np.float32),
            }
            images = {camera: rng.integers(0, 256, (9, 16, 16, 3), dtype=np.uint8) for camera in SPEC.cameras}
            states, actions = (rng.normal(size=(9, dim)).astype(np.float32) for dim in (SPEC.state_dim, SPEC.action_dim))
            writer.append_episode(Episode(images=images, states=states, actions=actions, instructions=f"touch {number}", extras=extras))
    shutil.copytree(folder / "whole", folder / "spoilt")
    for episode in (3, 4, 5):
        spoil(open_source(folder / "spoilt"), episode, 4, SPEC.cameras[0])
    make = {
        "prepare": Preparation(Config(image_size=16, resize="box", crop_area=1.0)),
        "action_normalizer": unchanged(SPEC.action_dim),
        "state_normalizer": unchanged(SPEC.state_dim),
        "grounding": "grounding",
        "landmarks": "landmarks",
    }
    whole = ChunkDataset([open_source(folder / "whole")], SPEC, **make)
    return whole, ChunkDataset([open_checked(folder / "spoilt", ReadOptions(skip_bad=True))], SPEC, **make, skip_bad=True)


def loss(policy, samples: Samples) -> torch.Tensor:
    ids, mask = policy.encode_prompts(["touch the red block"] * len(samples))
    tensors: dict[str, Any] = {n: torch.from_numpy(getattr(samples, n)) for n in ("state", "actions", "valid", "grounding", "landmarks")}
    pixels = preprocess.to_pixels(policy.config.preprocess, torch.from_numpy(np.ascontiguousarray(samples.images)))
    torch.manual_seed(0)
    return policy(Batch(pixels=pixels, prompt_ids=torch.from_numpy(ids), prompt_mask=torch.from_numpy(mask), **tensors))[0]


@pytest.mark.parametrize("head", list(HEADS))
def test_every_heads_loss_is_that_of_the_samples_that_were_taken_instead(grounded, head):
    whole, damaged = grounded
    policy = tiny_policy(head=HEADS[head]).train()
    for drawn in ([31, 40, 49], [0, 31, 2]):  # nothing but damaged samples; one of three
        samples = damaged.batch(drawn)
        assert samples.damaged
        found = loss(policy, samples)
        assert torch.isfinite(found) and found > 0
        torch.testing.assert_close(found, loss(policy, whole.batch(samples.indices)), rtol=0, atol=0)


def test_the_loader_lists_even_where_nobody_gave_it_a_list(intact, tmp_path, capfd):
    data = dataset(spoilt(intact, tmp_path, (0, 2, "image")))
    for _ in itertools.islice(BatchLoader(data, MixtureOrder(data.sizes, seed=0), 11, keep, num_workers=1), 6):
        pass
    assert capfd.readouterr().err.count("skipped ") == 1
    assert os.listdir(tmp_path) and not (tmp_path / "skipped.txt").exists()
