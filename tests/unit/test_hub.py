"""Datasets of the hub: only what is needed is downloaded, once, and what was read before is read again without a network.

Each reader is a process of its own, because the hub's client settles its addresses when it is imported.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from demonstrations import write
from hub_server import COMMIT, REPOSITORY, serve

from vla_oft import hub
from vla_oft.data.files import HubFiles

READ = """
import json, pickle, sys
from vla_oft.data.base import open_source
try:
    source = open_source(sys.argv[1])
    source = pickle.loads(pickle.dumps(source))
    answer = {"lengths": source.lengths.tolist(), "name": source.name, "identity": source.files.identity}
    if "read" in sys.argv:
        answer["action"] = source.actions(1)[2].tolist()
        answer["frames"] = source.frames(1, [0, 2], "front").shape
    answer["fingerprint"] = source.fingerprint()
except ValueError as error:
    answer = {"error": str(error)}
print(json.dumps(answer))
"""


def start(cache: Path, endpoint: str, *arguments: str, offline: bool = False) -> "subprocess.Popen[str]":
    environment = {**os.environ, "HF_ENDPOINT": endpoint, "HF_HOME": str(cache), "HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_TOKEN": ""}
    environment |= {"HF_HUB_OFFLINE": "1"} if offline else {}
    command = [sys.executable, "-c", READ, *arguments]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def answer(process: "subprocess.Popen[str]") -> dict:
    out, err = process.communicate(timeout=100)
    assert process.returncode == 0, err
    return json.loads(out)


def read(*arguments, **options) -> dict:
    return answer(start(*arguments, **options))


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hub") / "demos"
    write(folder)
    (folder / "README.md").write_text("demonstrations")
    return folder


DATA, FRONT = "data/chunk-000/file-000.parquet", "videos/observation.images.front/chunk-000/file-000.mp4"


def test_files_come_when_they_are_read_and_stay(dataset, tmp_path):
    with serve(dataset) as server:
        opened = read(tmp_path, server.endpoint, REPOSITORY)
        assert opened["lengths"] == [11, 5, 14] and opened["identity"] == f"{REPOSITORY}@{COMMIT}" and opened["name"] == "demos"
        assert server.downloads and all(name.startswith("meta/") or name == "README.md" for name in server.downloads)
        both = [start(tmp_path, server.endpoint, REPOSITORY, "read") for _ in range(2)]
        answers = [answer(process) for process in both]
        assert answers[0] == answers[1] and answers[0]["action"] == [102, 1] and answers[0]["frames"] == [2, 32, 32, 3]
        assert server.downloads[DATA] == server.downloads[FRONT] == 1 and max(server.downloads.values()) == 1
        assert "videos/observation.images.wrist/chunk-000/file-000.mp4" not in server.downloads
        assert answers[0]["fingerprint"] == opened["fingerprint"]
        before = server.downloads.copy()
    gone = server.endpoint
    again = [start(tmp_path, gone, REPOSITORY, "read", offline=offline) for offline in (False, True)]
    assert [answer(process) for process in again] == [answers[0]] * 2
    assert server.downloads == before


def test_what_cannot_be_had_is_said_in_one_line(dataset, tmp_path):
    with serve(dataset) as server:
        pass
    nowhere = server.endpoint
    with serve(dataset) as server:
        cases = [
            ("lab/none", server.endpoint, "no such repository"),
            ("lab/gated", server.endpoint, "ask for access"),
            (f"{REPOSITORY}@v9", server.endpoint, "no such revision"),
            (REPOSITORY, nowhere, "cannot be reached, and it was not downloaded before"),
        ]
        running = [start(tmp_path / str(n), endpoint, name) for n, (name, endpoint, _) in enumerate(cases)]
        errors = [answer(process)["error"] for process in running]
    for (name, _, message), error in zip(cases, errors, strict=True):
        assert name.partition("@")[0] in error and message in error and "\n" not in error


def test_a_file_that_the_repository_lacks_is_named(dataset, tmp_path):
    folder = tmp_path / "demos"
    for file in dataset.rglob("*"):
        if file.is_file() and file.suffix != ".mp4":
            (folder / file.relative_to(dataset)).parent.mkdir(parents=True, exist_ok=True)
            (folder / file.relative_to(dataset)).write_bytes(file.read_bytes())
    with serve(folder) as server:
        error = read(tmp_path / "cache", server.endpoint, REPOSITORY, "read")["error"]
    assert FRONT in error and "no such file" in error and "\n" not in error


def test_other_formats_come_whole(tmp_path):
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "unknown.bin").write_bytes(b"1234")
    with serve(tmp_path / "set") as server:
        error = read(tmp_path / "cache", server.endpoint, REPOSITORY)["error"]
        assert server.downloads == {"unknown.bin": 1}
    assert "not a dataset in a known format" in error and "unknown.bin" in error


def test_a_folder_is_never_looked_for_on_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(hub, "dataset_snapshot", lambda *arguments: pytest.fail("asked the hub"))
    (tmp_path / "my" / "folder").mkdir(parents=True)
    from vla_oft.data.base import open_source

    with pytest.raises(ValueError, match="not a dataset in a known format"):
        open_source("my/folder")
    with pytest.raises(ValueError, match="does not exist"):
        open_source(tmp_path / "none")
    assert not hub.is_id("a/b/c") and not hub.is_id("../x") and hub.is_id("owner/name@v1.0") and HubFiles.LAZY[0] == "meta/*"
