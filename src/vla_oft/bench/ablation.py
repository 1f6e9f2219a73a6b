"""`vla-oft bench ablation`: the engine with one optimisation left out at a time, so that each one's gain is measured."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vla_oft import engine
from vla_oft.bench import bars, latency, report, rows, timing

COLUMNS = ("", "P50", "P95", "end to end P50", "slower by ms", "slower by", "error", "set-up s")


@dataclass(frozen=True, kw_only=True)
class AblationRequest:
    """What the command line asks for; see `vla-oft bench ablation --help`."""

    workload: str | None = None
    precision: str = "bf16"
    calls: int = 100
    warmup: int = 20
    budget_s: float = 8.0
    device: str | None = None
    seed: int = 0
    out: Path | None = None


def variants(device_type: str) -> dict[str, engine.Options]:
    """Name -> options: everything on, each option that does anything on such a device off, all of them off."""
    switches = engine.Options.names(device_type)
    single = {f"without {name}": dataclasses.replace(engine.Options(), **{name: False}) for name in switches}
    return {"everything": engine.Options(), **single, "nothing": engine.Options(**dict.fromkeys(switches, False))}


def run(request: AblationRequest, *, quiet: bool = False) -> dict[str, Any]:
    """Time all variants and the eager policy; returns the JSON document. Raises ValueError before any work."""
    plan = timing.Plan(calls=request.calls, warmup=request.warmup, budget_s=request.budget_s)
    device = rows.choose_device(request.device)
    (precision,) = latency.check_precisions((request.precision,), device)
    setting = latency.prepare(latency.LatencyRequest(workload=request.workload, seed=request.seed), plan, device)
    measured = [rows.eager_row(setting)]
    for name, options in variants(device.type).items():
        measured.append(rows.engine_row(setting, precision, options, name))
        document = {**latency.to_document(setting, measured), "benchmark": "ablation"}
        table = to_table(document)
        if request.out is not None:
            report.write(request.out, f"ablation-{setting.name}-{device.type}", document, measured, table, to_chart(document))
    if not quiet:
        report.print_table(to_table(document))
    return document


def to_table(document: dict[str, Any]) -> report.Table:
    """Rows, and by how much each is slower than the engine with everything on."""
    full = next((row for row in document["rows"] if row["subject"] == "everything" and row["failure"] is None), None)
    lines: list[tuple[str, ...]] = []
    for row in document["rows"]:
        label = f"{row['subject']} {row['precision']}"
        if row["failure"] is not None:
            lines.append((label, "failed", *[""] * (len(COLUMNS) - 2)))
            continue
        more = None if full is None else row["model_p50_ms"] - full["model_p50_ms"]
        share = "-" if full is None or more is None else f"{100 * more / full['model_p50_ms']:.1f} %"
        times = [report.show(row[name], 4) for name in ("model_p50_ms", "model_p95_ms", "p50_ms")]
        lines.append((label, *times, "-" if more is None else f"{more:.3f}", share, report.show(row["error"]), report.show(row["setup_s"])))
    notes = latency.to_table(document).notes
    title = f"What each optimisation gains: workload {document['workload']}, {document['versions'].get('gpu', document['versions']['cpu'])}"
    return report.Table(title=title, columns=COLUMNS, rows=lines, notes=notes)


def to_chart(document: dict[str, Any]) -> str | None:
    """P50 on the device of every variant; None when all failed."""
    done = [row for row in document["rows"] if row["failure"] is None]
    groups = [bars.Group(label=row["subject"], values=(row["model_p50_ms"],)) for row in done]
    return bars.bars(groups, ("model, P50",), title=to_table(document).title, unit="ms") if groups else None
