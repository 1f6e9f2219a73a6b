"""RLDS, as TensorFlow Datasets prepares it: TFRecord shards of whole episodes. Read without TensorFlow.

    libero_spatial_no_noops/1.0.0/dataset_info.json, features.json, libero_spatial-train.tfrecord-00000-of-00016, ...

Either folder can be given. The format has no index, so the first time everything is read once (`data.rlds_index`).
"""

import os
from pathlib import Path
from typing import TYPE_CHECKING

from vla_oft.data.files import Files
from vla_oft.data.rlds_layout import Layout, dataset_folder, find_version, is_dataset, read_layout

if TYPE_CHECKING:
    from vla_oft.data.base import ReadOptions
    from vla_oft.data.rlds_source import RldsSource


def detect(root: Path) -> bool:
    """Whether `root` looks like a TFDS dataset, or one version of one."""
    return is_dataset(root)


def open_source(files: Files, options: "ReadOptions") -> "RldsSource":
    """Open one split; see `data.base.open_source`."""
    from vla_oft.data.index_cache import cached_index, user_cache
    from vla_oft.data.rlds_index import VERSION, Index, build_index
    from vla_oft.data.rlds_source import RldsSource, action_feature, instruction_feature

    layout = read_layout(files.root, options.split)
    action_feature(layout, files.root)
    language = instruction_feature(layout)
    if language is None and not options.instruction:
        raise ValueError(f"dataset {files.root} has no instructions; give one for all its episodes: instruction='...'")
    version = find_version(files.root) or files.root
    shards, skipped = _present(files, layout, options.skip_bad)
    dataset = dataset_folder(version)
    name = dataset.name if files.identity is None else files.name
    folder = cached_index(
        f"rlds{VERSION}",
        dataset,
        [version / "dataset_info.json", version / "features.json", *(path for path, _ in shards)],
        lambda folder: build_index(folder, name, shards, layout.features, language),
        cache_dir=options.cache_dir or (user_cache() if files.identity else None),
        settings=layout.split,
    )
    index = Index(folder)
    if index.problems and not options.skip_bad:
        first, others = index.problems[0], len(index.problems) - 1
        more = f" (and {others} more problems)" if others else ""
        raise ValueError(f"{version}/{first}; copy the file again, or leave out what is damaged with skip_bad{more}")
    skipped += [f"{version}/{problem}" for problem in index.problems]
    return RldsSource(files.root, name, layout, index, [path for path, _ in shards], options, tuple(skipped))


def _present(files: Files, layout: Layout, skip_bad: bool) -> tuple[list[tuple[Path, int]], list[str]]:
    """Shards that can be read, with their numbers of records, and a line for each that cannot. Raises ValueError unless `skip_bad`."""
    found: list[tuple[Path, int]] = []
    skipped: list[str] = []
    for shard, count in layout.shards:
        try:
            path = files.path(f"{layout.version}/{shard}" if layout.version else shard)
            if not path.is_file():
                raise ValueError(f"{path}: the shard is missing (dataset_info.json lists {len(layout.shards)}); copy the dataset again")
            if not os.access(path, os.R_OK):
                raise ValueError(f"{path}: no permission to read it; change its owner or mode (chmod u+r)")
        except ValueError as error:
            if not skip_bad:
                raise
            skipped.append(str(error))
        else:
            found.append((path, count))
    return found, skipped
