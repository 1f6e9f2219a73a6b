"""`vla-oft bench data`: what it measures and writes. No test asserts a rate."""

import json

import pytest

from vla_oft.bench import data, data_rates, demonstrations


def test_every_rate_of_a_row_stands_beside_the_decoders(tmp_path):
    request = data.DataRequest(
        kinds=("lerobot-v2.1-av1", "rlds"), workers=(0,), size=64, camera_size=64, episodes=2, seconds=0.05, cached=False, out=tmp_path
    )
    document = data.run(request, quiet=True)
    assert json.loads((tmp_path / "data.json").read_text()) == document and "| rlds, 0 |" in (tmp_path / "data.md").read_text()
    video, jpeg = document["rows"]
    for row in (video, jpeg):
        assert row["ratio"] == row["loader"] / row["raw"] and row["random_ratio"] == row["loader"] / row["random"]
        slow = row["random"] < data.FAR_BELOW * row["raw"]
        assert (row["runs"] is not None) == slow and (not slow or row["runs_ratio"] == row["runs"] / row["raw"])


@pytest.mark.parametrize("kind", demonstrations.WRITERS)
def test_the_decoder_alone_goes_through_frames(tmp_path, kind):
    shape = demonstrations.Shape(episodes=1, length=6, size=64)
    folder = demonstrations.write(tmp_path, kind, shape)
    assert sum(data_rates.raw_decoder(kind, folder, shape)()) >= 6
    at_random = data_rates.random_decoder(kind, folder)
    assert (at_random is not None) == (kind in ("lerobot", "lerobot-v2.1-av1"))
    assert at_random is None or sum(at_random()) == data_rates.IN_MEMORY
