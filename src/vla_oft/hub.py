"""Checkpoints by folder or by Hugging Face hub id; only data files are ever downloaded."""

import re
from pathlib import Path

DATA_FILES = ("*.json", "*.safetensors", "*.pt", "*.model", "README.md")
_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*(@[\w./-]+)?")


def resolve(path_or_id: str | Path) -> Path:
    """A local folder: `path_or_id` itself, or the downloaded snapshot of hub repository `owner/name` or `owner/name@revision`.

    Raises ValueError when there is neither, or when the download fails.
    """
    path, text = Path(path_or_id), str(path_or_id)
    if path.exists():
        return path
    if not _HUB_ID.fullmatch(text):
        raise ValueError(f"{text}: no such folder, and not a hub id (owner/name)")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    repository, _, revision = text.partition("@")
    try:
        return Path(snapshot_download(repository, revision=revision or None, allow_patterns=list(DATA_FILES)))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(f"{text}: no such folder here, and the hub repository cannot be had: {reason}") from None
