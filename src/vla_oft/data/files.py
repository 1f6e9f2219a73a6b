"""Where a dataset's files lie: in a folder, or in a hub repository of which only what is needed is downloaded."""

from pathlib import Path
from typing import Protocol

from vla_oft import hub


class Files(Protocol):
    """The files of one dataset.

    root: the local folder, which may hold only part of a hub repository.
    name: what the dataset is called: the folder's name, or that of the repository.
    identity: names exactly these contents ("owner/name@commit"), or None when only the files themselves can tell.
    """

    root: Path
    name: str
    identity: str | None

    def path(self, relative: str) -> Path:
        """The local path of one file, downloaded first if need be. Raises ValueError naming the file when it cannot be had."""
        ...

    def fetch(self, pattern: str) -> None:
        """Make all files that match a glob pattern present locally; nothing to do for a folder."""
        ...


class Folder:
    """Files of a local folder. Picklable."""

    def __init__(self, root: Path) -> None:
        self.root, self.name = root, root.resolve().name
        self.identity: str | None = None

    def path(self, relative: str) -> Path:
        """See `Files.path`; whether the file exists is found out by whoever opens it."""
        return self.root / relative

    def fetch(self, pattern: str) -> None:
        """See `Files.fetch`."""


class HubFiles:
    """Files of the hub's dataset `owner/name`, or `owner/name@revision`, in the hub's own cache. Picklable.

    Of a LeRobot dataset, `meta/` is downloaded at once and everything else when it is first read; of other formats, whose readers look at
    all files anyhow, everything at once. The revision becomes a commit here and stays that commit, also in other processes. What was read
    once can be read again without a network.
    """

    LAZY = ("meta/*", "meta_data/*", "README.md")
    """What is downloaded first; it tells a LeRobot dataset from others."""

    def __init__(self, text: str) -> None:
        self.repository, _, revision = text.partition("@")
        self.root = hub.dataset_snapshot(self.repository, revision or None, self.LAZY)
        self.commit = self.root.name
        self.name = self.repository.partition("/")[2]
        self.identity: str | None = f"{self.repository}@{self.commit}"
        self._fetched: set[str] = set(self.LAZY)
        if not (self.root / "meta" / "info.json").exists():
            self.fetch("*")

    def path(self, relative: str) -> Path:
        """See `Files.path`."""
        local = self.root / relative
        return local if local.exists() else hub.dataset_file(self.repository, self.commit, relative)

    def fetch(self, pattern: str) -> None:
        """See `Files.fetch`; `*` matches across folders."""
        if not self._fetched & {pattern, "*"}:
            hub.dataset_snapshot(self.repository, self.commit, None if pattern == "*" else (pattern,))
            self._fetched.add(pattern)
