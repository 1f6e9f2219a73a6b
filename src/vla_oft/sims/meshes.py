"""Coarser copies of detailed meshes, for pictures that only a policy looks at.

On a CPU a small picture costs what its triangles cost: 64-px frames of the tabletop took 2.3 ms, of which the two finest meshes of the
gripper (16,600 of 30,300 triangles) took more than 1 ms.
"""

from pathlib import Path

import numpy as np

_HEADER_BYTES = 80
_TRIANGLE = np.dtype([("normal", "<f4", 3), ("corners", "<f4", (3, 3)), ("attributes", "<u2")])


def read_stl(path: Path) -> np.ndarray:
    """Corners of the triangles of a binary STL file, float32 (N, 3, 3), in the file's units."""
    data = path.read_bytes()
    count = int.from_bytes(data[_HEADER_BYTES : _HEADER_BYTES + 4], "little")
    if len(data) != _HEADER_BYTES + 4 + count * _TRIANGLE.itemsize:
        raise ValueError(f"{path} is not a binary STL file of {count} triangles: it has {len(data)} bytes")
    return np.frombuffer(data, _TRIANGLE, count, _HEADER_BYTES + 4)["corners"].copy()


def decimate(corners: np.ndarray, cell: float) -> tuple[np.ndarray, np.ndarray]:
    """Vertex clustering (Rossignac and Borrel 1993): corners in one cell of a grid become one vertex, collapsed triangles vanish.

    corners (N, 3, 3); cell: edge of the grid's cubes, same units. Returns vertices float32 (V, 3) and faces int32 (F, 3).
    """
    points = corners.reshape(-1, 3)
    _, cluster = np.unique(np.floor(points / cell).astype(np.int64), axis=0, return_inverse=True)
    cluster = cluster.reshape(-1)
    sums = np.stack([np.bincount(cluster, points[:, axis]) for axis in range(3)], axis=1)
    vertices = (sums / np.bincount(cluster)[:, None]).astype(np.float32)
    faces = cluster.reshape(-1, 3)
    distinct = (faces[:, 0] != faces[:, 1]) & (faces[:, 1] != faces[:, 2]) & (faces[:, 0] != faces[:, 2])
    faces = faces[distinct]
    _, first = np.unique(np.sort(faces, axis=1), axis=0, return_index=True)
    return vertices, faces[np.sort(first)].astype(np.int32)
