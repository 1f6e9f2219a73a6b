"""`vla-oft bench latency`: how long one answer takes, next to the shortest time that the hardware allows."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, cast

import torch

from vla_oft import engine
from vla_oft.bench import bars, cost, random_policy, report, rows, timing, workloads
from vla_oft.bench.ceilings import Ceilings, measure_ceilings
from vla_oft.bench.environment import environment
from vla_oft.policy import Policy, PolicyConfig

NUM_BATCHES = 8
DEFAULT_PRECISIONS: dict[str, tuple[str, ...]] = {"cuda": ("bf16", "fp8"), "cpu": ("fp32", "bf16", "int8-dynamic")}
DEFAULT_INSTRUCTION = "pick up the red bowl and place it on the plate"


@dataclass(frozen=True, kw_only=True)
class LatencyRequest:
    """What the command line asks for; see `vla-oft bench latency --help`. Of checkpoint and workload, at most one is given."""

    checkpoint: str | None = None
    workload: str | None = None
    precision: tuple[str, ...] | None = None
    eager: bool = True
    calls: int = 200
    warmup: int = 20
    batch: int = 1
    device: str | None = None
    camera_size: tuple[int, int] | None = None
    instruction: str | None = None
    seed: int = 0
    out: Path | None = None


def run(request: LatencyRequest, *, quiet: bool = False) -> dict[str, Any]:
    """Measure, write files if asked, print a table unless `quiet`; returns the JSON document. Raises ValueError before any work."""
    plan = timing.Plan(calls=request.calls, warmup=request.warmup)
    device = rows.choose_device(request.device)
    precisions = check_precisions(request.precision, device)
    setting = prepare(request, plan, device)
    measured = [rows.eager_row(setting)] if request.eager else []
    if precisions and device.type == "cuda":
        setting.policy.to("cpu")  # so that the peak is the engine's own
        rows.free(device)
    document = save(setting, measured, request.out)
    for precision in precisions:
        measured.append(rows.engine_row(setting, precision))
        document = save(setting, measured, request.out)
    if not quiet:
        report.print_table(to_table(document))
    return document


def save(setting: rows.Setting, measured: Sequence[rows.Measured], out: Path | None) -> dict[str, Any]:
    """The document; written out after every row, so that a benchmark that is stopped keeps what it has."""
    document = to_document(setting, measured)
    if out is not None:
        where = setting.device.type
        stem = f"latency-{setting.name}" if setting.name == where else f"latency-{setting.name}-{where}"
        report.write(out, stem, document, measured, to_table(document), to_chart(document))
    return document


def check_precisions(chosen: Sequence[str] | None, device: torch.device) -> list[engine.Precision]:
    """The engine's rows. Raises ValueError for an unknown name."""
    names = DEFAULT_PRECISIONS[device.type] if chosen is None else chosen
    unknown = [name for name in names if name not in engine.PRECISIONS]
    if unknown:
        raise ValueError(f"precision={unknown[0]!r} is unknown; choose from {', '.join(engine.PRECISIONS)}")
    return [cast(engine.Precision, name) for name in names]


def prepare(request: LatencyRequest, plan: timing.Plan, device: torch.device) -> rows.Setting:
    """Build or load the policy, its observations, and the float32 answers to them."""
    if request.checkpoint and request.workload:
        raise ValueError(f"give a checkpoint or --workload, not both: got {request.checkpoint} and {request.workload}")
    if request.batch < 1:
        raise ValueError(f"batch={request.batch} must be at least 1")
    if request.checkpoint:
        policy = Policy.load(request.checkpoint, device=device)
        words, camera_size, name = request.instruction or DEFAULT_INSTRUCTION, request.camera_size or (256, 256), "checkpoint"
    else:
        workload = workloads.load(request.workload or ("B" if device.type == "cuda" else "cpu"))
        require_memory(workload, device)
        rows.note(f"building {workload.name} with random weights on {device}")
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        policy = random_policy.build(workload, device=device, dtype=dtype, seed=request.seed)
        words, camera_size, name = request.instruction or workload.instruction, request.camera_size or workload.camera_size, workload.name
    return setting_for(policy, words, camera_size, name=name, batch=request.batch, plan=plan, device=device, seed=request.seed)


def setting_for(
    policy: Policy,
    words: str,
    camera_size: tuple[int, int],
    *,
    name: str,
    batch: int,
    plan: timing.Plan,
    device: torch.device,
    seed: int = 0,
    ceilings: Ceilings | None = None,
    compare_with: Literal["float32", "eager"] = "float32",
) -> rows.Setting:
    """Rotating observations, the device's ceilings, and the answers that all rows are compared with.

    compare_with: float32, or the policy as it is, on one batch only: where that is slow, or too large.
    """
    robot = policy.config.robot
    found = workloads.observations(robot, words, camera_size, NUM_BATCHES * batch, seed)
    batches = [found[i * batch : (i + 1) * batch] for i in range(NUM_BATCHES)]
    prompt_len = 1 + len(policy.encode_prompts.ids(words))
    noise = rows.start_noise(policy)
    if compare_with == "float32":
        true = rows.float32_answers(policy, batches, noise)
    else:
        true = timing.answers(timing.Eager(policy), batches[:1], noise)
    return rows.Setting(
        name=name,
        policy=policy,
        batches=batches,
        prompt_len=prompt_len,
        device=device,
        ceilings=ceilings or measure_ceilings(device, largest_product(policy.config, prompt_len)),
        plan=plan,
        noise=noise,
        true=true,
    )


def require_memory(workload: workloads.Workload, device: torch.device) -> None:
    """Raise ValueError unless the policy fits: on a GPU once in float32, to compare with; on a CPU a second time, for the engine."""
    parameters = random_policy.num_parameters(workload)
    needed = 4 * parameters * (1 if device.type == "cuda" else 2)
    random_policy.require_memory(needed, device, f"workload {workload.name} ({parameters / 1e9:.1f} B parameters)")


def largest_product(config: PolicyConfig, prompt_len: int) -> tuple[int, int, int]:
    """Rows, inputs and outputs of the decoder's gate projection."""
    return cost.sequence_length(config, prompt_len), config.vlm.llm.width, config.vlm.llm.mlp_dim


def to_document(setting: rows.Setting, measured: Sequence[rows.Measured]) -> dict[str, Any]:
    """Flat JSON: the first engine row's times on top, all rows below."""
    config, found = setting.policy.config, [m.row for m in measured]
    eager = next((row for row in found if row.subject == "eager"), None)
    compiled = next((row for row in found if row.subject != "eager" and row.failure is None), None)
    first = compiled or eager
    return {
        "benchmark": "latency",
        "workload": setting.name,
        "device": str(setting.device),
        "batch": setting.batch,
        "sequence_length": cost.sequence_length(config, setting.prompt_len),
        "prompt_len": setting.prompt_len,
        "camera_size": list(setting.batches[0][0].images[config.robot.cameras[0]].shape[:2]),
        "reference_tflop": cost.reference_flops(config, setting.prompt_len, setting.batch) / 1e12,
        "minimum_tflop": cost.minimum_flops(config, setting.prompt_len, setting.batch) / 1e12,
        "weights_gb_bf16": cost.weight_bytes(config, setting.prompt_len, "bf16") / 1e9,
        "eager_p50_ms": eager and eager.p50_ms,
        "engine_p50_ms": compiled and compiled.p50_ms,
        "eager_model_p50_ms": eager and eager.model_p50_ms,
        "engine_model_p50_ms": compiled and compiled.model_p50_ms,
        "p95": first and first.p95_ms,
        "p99": first and first.p99_ms,
        "floor_ms": first and first.floor_ms,
        "ratio": first and first.ratio,
        "failures": [f"{row.subject} {row.precision}: {row.failure}" for row in found if row.failure],
        "ceilings": asdict(setting.ceilings),
        "versions": environment(setting.device),
        "rows": [asdict(row) for row in found],
    }


FIELDS = (
    "model_p50_ms",
    "model_p95_ms",
    "model_p99_ms",
    "p50_ms",
    "p95_ms",
    "p99_ms",
    "floor_ms",
    "ratio",
    "error",
    "peak_gb",
    "setup_s",
)
COLUMNS = ("", "P50", "P95", "P99", "end to end P50", "P95", "P99", "floor", "P50 / floor", "error", "peak GB", "set-up s", "others' CPU")


def to_table(document: dict[str, Any]) -> report.Table:
    """The rows as text, milliseconds."""
    lines = []
    for row in document["rows"]:
        cells = [report.show(row[name]) for name in FIELDS] if row["failure"] is None else ["failed", *[""] * (len(FIELDS) - 1)]
        cells.append(report.percent(row["others"]))
        lines.append((f"{row['subject']} {row['precision']}", *cells))
    return report.Table(title=_title(document), columns=COLUMNS, rows=lines, notes=_notes(document))


def _title(document: dict[str, Any]) -> str:
    device = document["versions"].get("gpu") or document["versions"]["cpu"]
    return f"Latency of workload {document['workload']}, batch {document['batch']}, {device}: milliseconds per chunk"


def _notes(document: dict[str, Any]) -> list[str]:
    rates = ", ".join(f"{name} {value / 1e12:.3g} TFLOP/s" for name, value in document["ceilings"]["flops"].items())
    versions = ", ".join(f"{name} {value}" for name, value in document["versions"].items())
    return [
        "P50, P95, P99: on the device alone, inputs already there; end to end: uint8 images in, robot actions out. "
        f"{document['rows'][0]['calls'] if document['rows'] else 0} calls over {NUM_BATCHES} rotating inputs",
        f"work: {document['sequence_length']} tokens, {document['minimum_tflop']:.3g} TFLOP at least "
        f"({document['reference_tflop']:.3g} as published), {document['weights_gb_bf16']:.3g} GB of weights in bf16",
        f"floor from {document['ceilings']['source']}: {rates}, {document['ceilings']['bytes_per_s'] / 1e12:.3g} TB/s",
        "error: of normalised actions against float32 with the same weights, relative (2-norm)",
        "others' CPU: share of the machine's processors that other processes used during the row",
        versions,
        *[f"failed: {line}" for line in document["failures"]],
    ]


def to_chart(document: dict[str, Any]) -> str | None:
    """Model and end-to-end P50 beside the floor; None when every row failed."""
    done = [row for row in document["rows"] if row["failure"] is None]
    names = ("p50_ms", "model_p50_ms", "floor_ms")
    groups = [bars.Group(label=f"{row['subject']} {row['precision']}", values=tuple(row[name] for name in names)) for row in done]
    return bars.bars(groups, ("end to end, P50", "model, P50", "floor"), title=_title(document), unit="ms") if groups else None
