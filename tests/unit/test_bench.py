"""`vla-oft bench`: what it writes and says. No test asserts a time: how fast something is, is a benchmark's result."""

import dataclasses
import json
import os
import re
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.tiny import tiny_policy
from vla_oft import cli, cli_bench, engine
from vla_oft.bench import ablation, bars, latency, profiling, report, tables, workloads

CPU = torch.device("cpu")
QUICK: dict[str, Any] = {"calls": 2, "warmup": 0, "budget_s": 0.0, "device": "cpu"}
FLAT_KEYS = ("eager_p50_ms", "engine_p50_ms", "p95", "p99", "floor_ms", "versions", "rows")


def bench(monkeypatch, *arguments: str) -> int:
    """The command in this process; its exit code."""
    monkeypatch.setattr(sys, "argv", ["vla-oft", "bench", *arguments])
    try:
        cli.main()
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


def test_help_needs_no_torch(tmp_path):
    (tmp_path / "torch.py").write_text("raise ImportError('torch was imported')")
    for arguments in ([], ["latency"], ["table3"], ["ablation"], ["profile"]):
        command = [sys.executable, "-m", "vla_oft", "bench", *arguments, "--help"]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0 and "usage: vla-oft bench" in done.stdout, done.stderr


def test_latency_writes_rows_calls_table_and_chart(tmp_path):
    request = latency.LatencyRequest(workload="nano", precision=("fp32", "bf16"), calls=4, warmup=1, out=tmp_path / "out", device="cpu")
    document = latency.run(request, quiet=True)
    stem = tmp_path / "out" / "latency-nano-cpu"
    assert json.loads(stem.with_suffix(".json").read_text()) == document
    eager, fp32, bf16 = document["rows"]
    assert (eager["subject"], fp32["subject"]) == ("eager", "engine") and eager["error"] == 0
    assert fp32["error"] < 1e-4 < bf16["error"] < 0.1
    assert all(row["p50_ms"] > 0 and row["ratio"] == row["model_p50_ms"] / row["floor_ms"] for row in document["rows"])
    assert document["eager_p50_ms"] == eager["p50_ms"] and document["engine_p50_ms"] == fp32["p50_ms"] and document["p95"] == fp32["p95_ms"]
    calls = Path(f"{stem}-calls.csv").read_text().splitlines()
    assert calls[0] == "row,subject,precision,kind,index,ms" and len(calls) == 1 + 3 * 2 * 4
    assert "| engine bf16 |" in stem.with_suffix(".md").read_text()
    assert ElementTree.fromstring(stem.with_suffix(".svg").read_text()).tag.endswith("svg")


def test_latency_prints_one_flat_json_object(tmp_path):
    tiny_policy().save(tmp_path / "checkpoint")
    flags = ["--calls", "3", "--warmup", "1", "--precision", "fp32", "--json", "--camera-size", "32", "40"]
    command = [sys.executable, "-m", "vla_oft", "bench", "latency", "checkpoint", *flags]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert set(FLAT_KEYS) <= document.keys() and document["workload"] == "checkpoint" and document["camera_size"] == [32, 40]
    assert {"python", "torch", "cpu", "threads"} <= document["versions"].keys()


def test_a_table_is_printed_without_the_engine(monkeypatch, capsys):
    assert bench(monkeypatch, "latency", "--workload", "nano", "--calls", "2", "--warmup", "0", "--precision", "--device", "cpu") == 0
    printed = capsys.readouterr().out
    assert "eager fp32" in printed and "engine" not in printed


def test_a_precision_that_fails_costs_no_other_row(monkeypatch):
    compile_policy = engine.compile_policy

    def broken(policy, precision, **settings):
        if precision == "bf16":
            raise RuntimeError("the kernel\n does not compile")
        return compile_policy(policy, precision=precision, **settings)

    monkeypatch.setattr(engine, "compile_policy", broken)
    request = latency.LatencyRequest(workload="nano", precision=("bf16", "fp32"), calls=2, warmup=0, device="cpu")
    document = latency.run(request, quiet=True)
    with pytest.raises(SystemExit, match="1"):
        cli_bench._finish(document, as_json=False)
    assert document["failures"] == ["engine bf16: RuntimeError: the kernel does not compile"]
    assert document["rows"][1]["p50_ms"] is None and document["engine_p50_ms"] == document["rows"][2]["p50_ms"] > 0
    assert "failed" in report.markdown(latency.to_table(document))


@pytest.mark.parametrize("name", ["table2", "table3"])
def test_tables_have_the_papers_rows_and_figures(name, tmp_path):
    entries = tables.TABLES[name]
    quick = (entries[0], entries[-1]) if name == "table2" else (entries[1],)
    request = tables.TableRequest(table=name, workload="nano", precision=("fp32",), **QUICK, out=tmp_path)
    document = tables.run(request, quiet=True, entries=quick)
    assert [row["name"] for row in document["rows"]] == [entry.name for entry in quick for _ in ("eager", "engine")]
    assert not document["failures"] and all(row["error"] < 1e-4 for row in document["rows"] if row["name"] != entries[0].name)
    for row in document["rows"]:
        entry = next(e for e in entries if e.name == row["name"])
        assert row["actions_per_s"] == pytest.approx(1000 * entry.chunk_len / row["p50_ms"])
    text = (tmp_path / f"{name}-cpu.md").read_text()
    assert "2502.19645" in text and ("| 239.6 | 4.2 |" if name == "table2" else "| 321 | 77.9 |") in text
    assert "paper (A100, 7.5 B)" in (tmp_path / f"{name}-cpu.svg").read_text()


def test_published_latency_and_throughput_agree_with_the_chunk_length():
    for entry in (*tables.TABLE2, *tables.TABLE3):
        if entry.published is not None:
            hz, seconds = entry.published
            assert hz == pytest.approx(entry.chunk_len / seconds, rel=0.03), entry.name


def test_table_rows_are_the_configurations_they_name():
    base = workloads.load("A")
    config = tables._config(base, tables.aloha.SPEC, tables.TABLE3[1])
    assert config == dataclasses.replace(workloads.load("C").config, vlm=config.vlm) and config.vlm.film
    last = tables._config(base, tables.libero.SPEC, tables.TABLE2[-1])
    assert last == workloads.load("B").config
    assert tables._config(base, tables.libero.SPEC, tables.TABLE2[3]) == base.config


def test_the_ablation_turns_off_every_option_once(tmp_path):
    document = ablation.run(ablation.AblationRequest(workload="nano", precision="fp32", **QUICK, out=tmp_path), quiet=True)
    names = [row["subject"] for row in document["rows"]]
    assert names == ["eager", "everything", *[f"without {name}" for name in engine.Options.names("cpu")], "nothing"]
    assert not document["failures"] and all(row["error"] < 1e-4 for row in document["rows"])
    lines = (tmp_path / "ablation-nano-cpu.md").read_text().splitlines()
    assert next(line for line in lines if line.startswith("| everything")).split("|")[5:7] == [" 0.000 ", " 0.0 % "]


def test_a_profile_lists_where_the_time_goes(tmp_path):
    request = profiling.ProfileRequest(workload="nano", precision="eager", calls=1, top=3, device="cpu", out=tmp_path)
    text = profiling.run(request, quiet=True)
    shares = [float(match) for match in re.findall(r"([\d.]+)%", text)]
    assert len(shares) == 3 and shares == sorted(shares, reverse=True) and 0 < sum(shares) <= 100.2
    assert (tmp_path / "profile-nano-eager-cpu.txt").read_text() == text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["latency", "--workload", "D"], "unknown workload 'D'; known: A, B, C, cpu, nano"),
        (["latency", "--device", "cuda"], "device='cuda': no usable GPU here"),
        (["latency", "--device", "tpu"], "device='tpu' is not supported"),
        (["latency", "nowhere", "--workload", "nano"], "give a checkpoint or --workload, not both"),
        (["latency", "nowhere"], "nowhere: no such folder, and not a hub id"),
        (["latency", "--workload", "nano", "--precision", "fp4"], "precision='fp4' is unknown; choose from fp32, bf16"),
        (["latency", "--workload", "nano", "--calls", "0"], "calls=0 must be at least 1"),
        (["latency", "--workload", "nano", "--batch", "0"], "batch=0 must be at least 1"),
        (["table2", "--workload", "D"], "unknown workload 'D'"),
        (["ablation", "--precision", "fp4"], "precision='fp4' is unknown"),
        (["profile", "--precision", "fp4"], "precision='fp4' is unknown"),
    ],
)
@pytest.mark.skipif(torch.cuda.is_available(), reason="says what a machine without a GPU says")
def test_a_mistake_gets_one_line_and_exit_code_2(monkeypatch, capsys, arguments, message):
    assert bench(monkeypatch, *arguments) == 2
    printed = capsys.readouterr()
    assert message in printed.err and len(printed.err.strip().splitlines()) == 1 and not printed.out


def test_bars_are_as_long_as_their_values_on_a_logarithmic_axis():
    groups = [bars.Group(label=label, values=(value,)) for label, value in (("a <b>", 1.0), ("c", 10.0), ("d", 100.0))]
    svg = bars.bars(groups, ("x",), title="t & u", unit="ms")
    widths = [float(r.get("width", "")) for r in ElementTree.fromstring(svg).iter("{http://www.w3.org/2000/svg}rect")][2:]
    assert len(widths) == 3 and widths[1] - widths[0] == pytest.approx(widths[2] - widths[1], abs=0.2)
    assert "a &lt;b&gt;" in svg and "t &amp; u" in svg
    with pytest.raises(ValueError, match="all must be positive"):
        bars.bars([bars.Group(label="a", values=(0.0,))], ("x",), title="t", unit="ms")


def test_numbers_in_tables_are_short():
    assert [report.show(v) for v in (None, 0, 0.00001234, 0.01234, 1.234, 123.4, 1234.0)] == [
        *("-", "0", "1.2e-05", "0.0123", "1.23", "123", "1230")
    ]


SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "gpu_checks.sh"


def test_gpu_checks_name_their_steps_when_one_is_unknown(tmp_path):
    done = subprocess.run(["bash", str(SCRIPT), "enginee"], capture_output=True, text=True, env={**os.environ, "OUT": str(tmp_path)})
    assert done.returncode == 2 and "unknown step 'enginee'; steps: environment kernels engine specialized tune-a" in done.stderr


def test_a_failing_gpu_check_stops_no_other_and_everything_is_packed(tmp_path):
    environment = {**os.environ, "OUT": str(tmp_path / "out"), "PYTHON": "false"}
    done = subprocess.run(["bash", str(SCRIPT), "table2", "profile"], capture_output=True, text=True, env=environment)
    assert done.returncode == 1
    summary = (tmp_path / "out" / "summary.txt").read_text().splitlines()
    assert [line.split()[:2] for line in summary] == [["step", "rc"], ["table2", "1"], ["profile", "1"]]
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"summary.txt", "results.tar.gz"}
