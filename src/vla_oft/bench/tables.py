"""`vla-oft bench table2` and `table3`: the paper's tables of inference efficiency, with the published figures beside ours.

On a GPU at the true size of 7.5 B parameters, on a CPU at a reduced one. All rows of a table share one set of random weights; only heads,
and FiLM where a row has none, differ. Published: Kim, Finn, Liang (arXiv 2502.19645), Tables II and III, mean of 100 queries on an A100.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from vla_oft.bench import bars, latency, random_policy, report, rows, timing, workloads
from vla_oft.bench.environment import environment
from vla_oft.heads import diffusion, discrete, l1, pooled
from vla_oft.policy import HeadConfig, Policy, PolicyConfig
from vla_oft.robots import aloha, libero
from vla_oft.vlm import prismatic

PAPER_CAMERA_SIZE = (224, 224)
TOKENS = discrete.Config(any_token=True)
ONE_BY_ONE = discrete.Config(decoding="autoregressive", any_token=True)
SOURCES = {
    "table2": "Table II: one 224-px image (two and the state in the last row), 7-D actions, chunk of 8",
    "table3": "Table III: three 224-px images, 14-D state and actions, chunk of 25, FiLM",
}


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One row. published: actions per second and seconds per query in the paper, None where it has no such row."""

    name: str
    head: HeadConfig
    chunk_len: int
    cameras: int
    use_state: bool = False
    film: bool = False
    published: tuple[float, float] | None = None


def _denoising(steps: int, published: tuple[float, float]) -> Entry:
    head = diffusion.Config(inference_steps=steps)
    return Entry(name=f"+ PD & AC, diffusion, {steps} step{'s' * (steps > 1)}", head=head, chunk_len=8, cameras=1, published=published)


TABLE2 = (
    Entry(name="OpenVLA (autoregressive)", head=ONE_BY_ONE, chunk_len=1, cameras=1, published=(4.2, 0.2396)),
    Entry(name="+ parallel decoding (PD)", head=TOKENS, chunk_len=1, cameras=1, published=(15.9, 0.0629)),
    Entry(name="+ PD & action chunks (AC)", head=TOKENS, chunk_len=8, cameras=1, published=(108.8, 0.0735)),
    Entry(name="+ PD & AC, L1", head=l1.Config(), chunk_len=8, cameras=1, published=(109.7, 0.0729)),
    _denoising(50, (4.2, 1.9070)),
    _denoising(10, (19.3, 0.4145)),
    _denoising(5, (35.1, 0.2279)),
    _denoising(2, (80.3, 0.0996)),
    _denoising(1, (109.4, 0.0731)),
    Entry(name="+ PD & AC, L1, wrist image, state", head=l1.Config(), chunk_len=8, cameras=2, use_state=True, published=(71.4, 0.1120)),
)
_ALOHA: dict[str, Any] = {"cameras": 3, "use_state": True, "chunk_len": 25}
TABLE3 = (
    Entry(name="OpenVLA (autoregressive)", head=ONE_BY_ONE, chunk_len=1, cameras=3, published=(1.8, 0.543)),
    Entry(name="OpenVLA-OFT+ (L1, FiLM)", head=l1.Config(), film=True, published=(77.9, 0.321), **_ALOHA),
    Entry(name="without FiLM", head=l1.Config(), **_ALOHA),
    Entry(name="OFT+, one pooled slot", head=pooled.Config(), film=True, **_ALOHA),
    Entry(name="OFT+, tokens in parallel", head=TOKENS, film=True, **_ALOHA),
    Entry(name="OFT+, diffusion, 10 steps", head=diffusion.Config(inference_steps=10), film=True, **_ALOHA),
)
TABLES = {"table2": TABLE2, "table3": TABLE3}


@dataclass(frozen=True, kw_only=True)
class TableRequest:
    """What the command line asks for. workload: whose model size; precision: the engine's; budget_s: time for one subject in one row."""

    table: str
    workload: str | None = None
    precision: tuple[str, ...] | None = None
    eager: bool = True
    calls: int = 200
    warmup: int = 20
    budget_s: float = 6.0
    device: str | None = None
    seed: int = 0
    out: Path | None = None


def run(request: TableRequest, *, quiet: bool = False, entries: Sequence[Entry] | None = None) -> dict[str, Any]:
    """Measure all rows; files are written anew after each, so that an interrupted table keeps what it has.

    entries: of the table, all by default. Raises ValueError before any work.
    """
    plan = timing.Plan(calls=request.calls, warmup=request.warmup, budget_s=request.budget_s)
    device = rows.choose_device(request.device)
    chosen = (("bf16",) if device.type == "cuda" else ("fp32", "bf16")) if request.precision is None else request.precision
    precisions = latency.check_precisions(chosen, device)
    base = workloads.load(request.workload or ("A" if device.type == "cuda" else "cpu"))
    robot = libero.SPEC if request.table == "table2" else aloha.SPEC
    latency.require_memory(dataclasses.replace(base, config=_config(base, robot, _fullest(request.table))), device)
    document: dict[str, Any] = {"benchmark": request.table, "workload": base.name, "device": str(device), "rows": [], "failures": []}
    document |= {"versions": environment(device), "published": SOURCES[request.table]}
    measured: list[rows.Measured] = []
    donor, ceilings = None, None
    for entry in TABLES[request.table] if entries is None else entries:
        workload = dataclasses.replace(base, config=_config(base, robot, entry), camera_size=PAPER_CAMERA_SIZE)
        policy = random_policy.build(workload, device=device, dtype=_dtype(device), seed=request.seed, donor=donor)
        setting = latency.setting_for(
            policy,
            workload.instruction,
            PAPER_CAMERA_SIZE,
            name=entry.name,
            batch=1,
            plan=plan,
            device=device,
            ceilings=ceilings,
            compare_with="eager",
        )
        donor, ceilings = _richer(policy, donor), setting.ceilings
        measured += [rows.eager_row(setting)] if request.eager else []
        measured += [rows.engine_row(setting, precision) for precision in precisions]
        _fill(document, measured, setting)
        table, chart = to_table(document), to_chart(document)
        if request.out is not None:
            report.write(request.out, f"{request.table}-{device.type}", document, measured, table, chart)
        del policy, setting
        rows.free(device)
    if not quiet:
        report.print_table(to_table(document))
    return document


def _dtype(device: torch.device) -> torch.dtype:
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def _richer(policy: Policy, donor: Policy | None) -> Policy:
    """The later rows take their weights from here: a policy with FiLM has all that one without has."""
    return policy if donor is None or policy.config.vlm.film else donor


def _fullest(table: str) -> Entry:
    """The entry with most parameters."""
    return TABLES[table][1] if table == "table3" else TABLES[table][-1]


def _config(base: workloads.Workload, robot: Any, entry: Entry) -> PolicyConfig:
    vlm: prismatic.Config = dataclasses.replace(base.config.vlm, film=entry.film)
    seen = workloads.cameras(robot, entry.cameras)
    config = workloads.policy_config(vlm, seen, use_state=entry.use_state, head=entry.head)
    return dataclasses.replace(config, chunk_len=entry.chunk_len)


def _fill(document: dict[str, Any], measured: Sequence[rows.Measured], setting: rows.Setting) -> None:
    document["rows"] = [asdict(m.row) for m in measured]
    document["failures"] = [f"{m.row.name}, {m.row.subject} {m.row.precision}: {m.row.failure}" for m in measured if m.row.failure]
    document["ceilings"] = asdict(setting.ceilings)


COLUMNS = (
    "",
    "calls",
    "ms per chunk",
    "P95",
    "actions/s",
    "model ms",
    "floor",
    "model / floor",
    "error",
    "paper ms",
    "paper actions/s",
    "faster than it",
    "others' CPU",
)


def to_table(document: dict[str, Any]) -> report.Table:
    """Two lines or more for each of the paper's rows: eager, and the engine at each precision."""
    published = {entry.name: entry.published for entry in TABLES[document["benchmark"]]}
    lines: list[tuple[str, ...]] = []
    for row in document["rows"]:
        label = f"{row['name']}: {row['subject']} {row['precision']}"
        hz, seconds = published.get(row["name"]) or (None, None)
        paper = (report.show(None if seconds is None else 1000 * seconds, 4), report.show(hz, 4))
        if row["failure"] is not None:
            lines.append((label, "failed", *[""] * 7, *paper, "", ""))
            continue
        fields = ("p50_ms", "p95_ms", "actions_per_s", "model_p50_ms", "floor_ms", "ratio", "error")
        gain = "-" if seconds is None else f"{1000 * seconds / row['p50_ms']:.2f}x"
        lines.append((label, str(row["calls"]), *(report.show(row[name]) for name in fields), *paper, gain, report.percent(row["others"])))
    return report.Table(title=_title(document), columns=COLUMNS, rows=lines, notes=_notes(document))


def _title(document: dict[str, Any]) -> str:
    size = "at the true size, random weights" if document["workload"] in "ABC" else f"at the reduced size '{document['workload']}'"
    device = document["versions"].get("gpu") or document["versions"]["cpu"]
    return f"The paper's Table {'II' if document['benchmark'] == 'table2' else 'III'} {size}, {device}"


def _notes(document: dict[str, Any]) -> list[str]:
    ceilings = document["ceilings"]
    rates = ", ".join(f"{name} {value / 1e12:.3g} TFLOP/s" for name, value in ceilings["flops"].items())
    notes = [
        "ms per chunk: P50, uint8 images in, robot actions out; actions/s: chunk length over it; model ms: P50 on the device alone",
        "error: of normalised actions against the eager policy, relative (2-norm); of tokens, close scores may change places",
        "others' CPU: share of the machine's processors that other processes used during the row",
        f"paper: arXiv 2502.19645, {document['published']}; mean of 100 queries of the 7.5 B model on an NVIDIA A100",
        f"floor from {ceilings['source']}: {rates}, {ceilings['bytes_per_s'] / 1e12:.3g} TB/s",
        ", ".join(f"{name} {value}" for name, value in document["versions"].items()),
    ]
    if document["workload"] not in "ABC":
        notes.insert(4, "another model size on another machine: the paper's figures stand beside ours for the ratios between rows only")
    return [*notes, *[f"failed: {line}" for line in document["failures"]]]


def to_chart(document: dict[str, Any]) -> str | None:
    """Milliseconds per chunk of every row; None when all failed."""
    done = [row for row in document["rows"] if row["failure"] is None]
    published = {entry.name: entry.published for entry in TABLES[document["benchmark"]]}
    subjects = list(dict.fromkeys((row["subject"], row["precision"]) for row in done))
    times = {(row["name"], row["subject"], row["precision"]): row["p50_ms"] for row in done}
    groups = []
    for name in dict.fromkeys(row["name"] for row in done):
        paper = published.get(name)
        values = [times.get((name, *subject)) for subject in subjects]
        groups.append(bars.Group(label=name, values=(paper and 1000 * paper[1], *values)))
    legend = ("paper (A100, 7.5 B)", *(" ".join(subject) for subject in subjects))
    return bars.bars(groups, legend, title=_title(document), unit="ms per chunk, P50 (paper: mean)") if groups else None
