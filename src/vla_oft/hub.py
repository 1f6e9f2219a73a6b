"""Repositories of the Hugging Face hub, downloaded into its cache. Of checkpoints, only data files are ever downloaded: never code."""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

DATA_FILES = ("*.json", "*.safetensors", "*.pt", "*.model", "README.md")
_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*(@[\w./-]+)?")


def is_id(text: str) -> bool:
    """Whether `text` looks like `owner/name` or `owner/name@revision`."""
    return _HUB_ID.fullmatch(text) is not None


def resolve(path_or_id: str | Path) -> Path:
    """A local folder: `path_or_id` itself, or the downloaded snapshot of hub repository `owner/name` or `owner/name@revision`.

    Raises ValueError when there is neither, or when the download fails.
    """
    path, text = Path(path_or_id), str(path_or_id)
    if path.exists():
        return path
    if not is_id(text):
        raise ValueError(f"{text}: no such folder, and not a hub id (owner/name)")
    repository, _, revision = text.partition("@")
    with _explained(f"{text}: no such folder here, and the hub repository cannot be had"):
        from huggingface_hub import snapshot_download

        return Path(snapshot_download(repository, revision=revision or None, allow_patterns=list(DATA_FILES)))


def dataset_snapshot(repository: str, revision: str | None, patterns: Sequence[str] | None) -> Path:
    """The cached snapshot of a dataset repository, of which all files that match `patterns` (None for all) are there.

    Its folder's name is the commit. Without a network, what was downloaded before is used. Raises ValueError when that is not enough.
    """
    with _explained(f"{repository}: no such folder here, and the hub's dataset cannot be had"):
        from huggingface_hub import snapshot_download

        allowed = None if patterns is None else list(patterns)
        return Path(snapshot_download(repository, repo_type="dataset", revision=revision, allow_patterns=allowed))


def dataset_file(repository: str, commit: str, relative: str) -> Path:
    """One file of a dataset repository, downloaded unless it is there. Safe in many processes: the cache is locked while one downloads.

    Raises ValueError when the file does not exist there, or cannot be downloaded.
    """
    with _explained(f"{relative} of the hub's dataset {repository}@{commit[:8]} cannot be had"):
        from huggingface_hub import hf_hub_download

        return Path(hf_hub_download(repository, relative, repo_type="dataset", revision=commit))


@contextmanager
def _explained(what: str) -> Iterator[None]:
    """The hub's errors, which fill pages, in one line."""
    from huggingface_hub import errors

    try:
        yield
    except errors.GatedRepoError:
        raise ValueError(f"{what}: its owner lets in only whom they know; ask for access on its page, then run `hf auth login`") from None
    except errors.RepositoryNotFoundError:
        raise ValueError(f"{what}: the hub has no such repository, or it is private (then run `hf auth login`)") from None
    except errors.RevisionNotFoundError:
        raise ValueError(f"{what}: the repository has no such revision") from None
    except errors.LocalEntryNotFoundError as error:
        raise ValueError(f"{what}: the hub cannot be reached, and it was not downloaded before ({_first_line(error)})") from None
    except errors.EntryNotFoundError:
        raise ValueError(f"{what}: the repository has no such file; the dataset is incomplete") from None
    except (errors.HTTPError, errors.HFValidationError, OSError) as error:  # HTTPError: whichever HTTP library the hub's client uses
        raise ValueError(f"{what}: {_first_line(error)}") from None


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0][:300] if str(error).strip() else type(error).__name__
