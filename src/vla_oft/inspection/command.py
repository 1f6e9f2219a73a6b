"""`vla-oft data inspect`: measure, print, write the page."""

from pathlib import Path

from vla_oft.data.base import Source
from vla_oft.inspection.facts import Inspection
from vla_oft.inspection.measure import Options, inspect_source, work
from vla_oft.inspection.page import write_page
from vla_oft.inspection.text import print_inspection
from vla_oft.progress import progress
from vla_oft_client import RobotSpec


def run(
    source: Source, out: Path | None = None, spec: RobotSpec | None = None, quiet: bool = False, options: Options | None = None
) -> Inspection:
    """Inspect `source`; print the result unless `quiet`, and write the page to file `out` if one is given.

    spec: the robot that `source` has been adapted to, if any. Raises ValueError when `out` cannot be written, before anything is read.
    """
    options = options or Options()
    if out is not None:
        _prepare(out)
    if quiet:
        found = inspect_source(source, spec, options)
    else:
        with progress("inspecting", work(source, options), "episodes") as advance:
            found = inspect_source(source, spec, options, advance)
        print_inspection(found)
    if out is not None:
        write_page(out, found, source)
    return found


def _prepare(out: Path) -> None:
    if out.suffix.lower() not in (".html", ".htm"):
        raise ValueError(f"page {out} must be an .html file")
    if out.is_dir():
        raise ValueError(f"page {out} is a folder; name a file in it")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        (out.parent / f".{out.name}.probe").touch()
        (out.parent / f".{out.name}.probe").unlink()
    except OSError as error:
        raise ValueError(f"page {out} cannot be written: {error.strerror}; choose another place") from None
