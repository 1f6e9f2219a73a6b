"""A dataset in the language of a robot: its cameras, its state, its actions in its units.

What fits is found in this order: our own recording of that robot, as it is; the layouts that `robots/NAME.py` lists, the first that has all
that it needs; a dataset whose cameras and sizes are the robot's already, as it is. Anything else is refused with what was looked for.
"""

from collections.abc import Sequence

from vla_oft import robots
from vla_oft.data.base import Source
from vla_oft.data.select import Filters, select_episodes, select_steps
from vla_oft.data.view import View
from vla_oft.features import Features
from vla_oft_client import RobotSpec

AS_IS = "as-is"
"""Name of the choice to convert nothing."""


def for_robot(source: Source, spec: RobotSpec, *, layout: str | None = None, features: Sequence[Features] | None = None) -> Source:
    """`source` as robot `spec` sees it; with the robot's cameras only, in its order.

    layout: name of the layout, or "as-is", instead of finding it. features: layouts; by default those of the robot's file.
    Raises ValueError when nothing fits.
    """
    known = robots.features(spec.name) if features is None else features
    if layout is not None and layout != AS_IS and layout not in [f.name for f in known]:
        raise ValueError(f"layout '{layout}' is unknown for robot '{spec.name}'; known: {', '.join([AS_IS, *(f.name for f in known)])}")
    chosen = _chosen(source, spec, layout, known)
    if chosen is None:
        _need_cameras(source, spec)
        names = {name: name for name in spec.cameras}
        state = ("state",) if spec.state_dim and source.state_dim else ()
        return View(source, key=f"robot:{AS_IS}", cameras=names, state=state) if _differs(source, spec) else source
    lacking = _lacking(source, spec, chosen)
    if lacking:
        raise ValueError(f"dataset {source.path} has no {', '.join(lacking)}, which layout '{chosen.name}' needs ({_needs(spec, chosen)})")
    if chosen.drop_unlabelled:
        source = select_episodes(source, Filters(drop_unlabelled=True))
    renamed = dict(chosen.cameras)
    view: Source = View(
        source,
        key=f"robot:{spec.name}/{chosen.name}/{chosen.version}",
        cameras={name: renamed[name] for name in spec.cameras},
        image=chosen.image,
        state=chosen.state,
        action=chosen.action,
        convert=chosen.convert,
        cuts=chosen.cuts,
    )
    view.fps = chosen.fps or view.fps
    if chosen.drop_noops:
        view = select_steps(view, Filters(drop_noops=True))
    return view if spec.state_dim else View(view, key="stateless", state=())


def _chosen(source: Source, spec: RobotSpec, layout: str | None, known: Sequence[Features]) -> Features | None:
    """The layout to read through; None to convert nothing."""
    if layout is not None:
        return next((f for f in known if f.name == layout), None)
    if (source.recording.get("robot") or {}).get("name") == spec.name:
        return None
    fitting = [f for f in known if source.format in f.formats and not _lacking(source, spec, f)]
    if fitting:
        return fitting[0]
    if set(spec.cameras) <= set(source.cameras):
        return None
    wanted = "; ".join(f"'{f.name}' ({', '.join(f.formats)}) needs {_needs(spec, f)}" for f in known) or "none"
    raise ValueError(
        f"dataset {source.path} ({source.format}) does not look like a recording of robot '{spec.name}': it has cameras "
        f"{', '.join(source.cameras) or 'none'}, but the robot has {', '.join(spec.cameras)}; rename them with cameras "
        f"(robot's name=dataset's name), or add its layout to robots/{spec.name}.py; layouts there: {wanted}"
    )


def _lacking(source: Source, spec: RobotSpec, features: Features) -> list[str]:
    have = {*source.cameras}
    arrays = {*source.extras, "action", *(("state",) if source.state_dim else ())}
    cameras = [camera for name, camera in features.cameras if name in spec.cameras and camera not in have]
    unnamed = [name for name in spec.cameras if name not in dict(features.cameras)]
    return [*unnamed, *cameras, *(name for name in (*features.state, features.action) if name not in arrays)]


def _needs(spec: RobotSpec, features: Features) -> str:
    cameras = [camera for name, camera in features.cameras if name in spec.cameras]
    return f"cameras {', '.join(cameras)}, arrays {', '.join((*features.state, features.action))}"


def _differs(source: Source, spec: RobotSpec) -> bool:
    return source.cameras != spec.cameras or (not spec.state_dim and source.state_dim > 0)


def _need_cameras(source: Source, spec: RobotSpec) -> None:
    missing = [camera for camera in spec.cameras if camera not in source.cameras]
    if missing:
        raise ValueError(
            f"dataset {source.path} has no camera {', '.join(missing)} that robot '{spec.name}' needs; it has "
            f"{', '.join(source.cameras) or 'none'}; rename them with cameras (robot's name=dataset's name)"
        )
