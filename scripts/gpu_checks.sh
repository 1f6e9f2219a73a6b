#!/usr/bin/env bash
# Everything that waits for a GPU, as named steps; each can run alone and is stopped after 8 minutes.
#
#   scripts/gpu_checks.sh                       all steps, in order
#   scripts/gpu_checks.sh environment engine    these
#
# Runs from a bare checkout: python3 with torch, triton, numpy and peft; tyro, rich and simplejpeg are not needed. Wheels of what is missing
# can be put on PYTHONPATH; the steps kernels, engine and train-tests need pytest, the last one h5py too. Results lie in benchmarks/gpu, or in
# $OUT when that is set: then packed into results.tar.gz beside summary.txt, after every step, because such a folder may carry few files and
# the machine may be taken away at any time. What the tuner measured lies among them, in cache/; what lies in benchmarks/gpu/cache from
# earlier runs is used.
#
#   PRECISIONS="bf16 fp8" scripts/gpu_checks.sh latency-b        other precisions than the default four
set -u
SELF=$(realpath "$0")
cd "$(dirname "$SELF")/.."
export PYTHONPATH="src:packages/vla-oft-client/src${PYTHONPATH:+:$PYTHONPATH}"
export PYTHONUNBUFFERED=1
PYTHON=${PYTHON:-python3}
LIMIT_S=${LIMIT_S:-480}
PRECISIONS=${PRECISIONS:-bf16 fp8 int8 int4}
STEPS=(environment kernels engine specialized tune-a tune-b tune-c latency-a latency-b latency-c table2 table3 table2-fp8 table3-fp8 ablation profile
    train-tests train-lora train-compiled train-qlora train-full train-others memory)
KERNEL_TESTS=(tests/engine/test_kernels.py tests/engine/test_kernels_compile.py tests/engine/test_pixels.py tests/engine/test_tuner.py)
ENGINE_TESTS=(tests/engine/test_gpu.py tests/engine/test_engine.py)

# --- steps -----------------------------------------------------------------------------------------------------------------------------

step_environment() {
    nvidia-smi
    "$PYTHON" - <<'PY'
import importlib, json, os, pathlib
for name in "numpy torch triton tokenizers safetensors huggingface_hub PIL pytest tyro rich simplejpeg peft transformers mujoco".split():
    try:
        module = importlib.import_module(name)
        print(f"{name:16} {getattr(module, '__version__', 'present')}")
    except Exception as error:
        print(f"{name:16} MISSING ({type(error).__name__}: {error})")
import torch
from dataclasses import asdict
from vla_oft.bench import ceilings, environment
device = torch.device("cuda")
found = {"environment": environment.environment(device), "ceilings": asdict(ceilings.measure_ceilings(device, (0, 0, 0)))}
text = json.dumps(found, indent=1)
print(text)
pathlib.Path(os.environ["DIR"], "environment.json").write_text(text + "\n")
PY
}

step_kernels() { "$PYTHON" -m pytest -q --maxfail=20 -p no:cacheprovider -k "not specialized" "${KERNEL_TESTS[@]}"; }

# A deadlock of warps that wait for each other would show here as rc 124; kernels/candidates.SPECIALIZED turns them on for the tuner.
step_specialized() { "$PYTHON" -m pytest -q -p no:cacheprovider tests/engine/test_kernels.py -k specialized; }

step_engine() { "$PYTHON" -m pytest -q --maxfail=20 -p no:cacheprovider "${ENGINE_TESTS[@]}"; }

# compiling tunes; the tuner keeps what it found in a file that later steps read
step_tune-a() { profile A bf16 1 && profile A fp8 1; }
step_tune-b() { profile B bf16 1 && profile B fp8 1; }
step_tune-c() { profile C bf16 1 && profile C fp8 1; }

step_latency-a() { latency A; }
step_latency-b() { latency B; }
step_latency-c() { latency C; }

step_table2() { table table2 bf16 "$DIR"; }
step_table3() { table table3 bf16 "$DIR"; }
step_table2-fp8() { table table2 fp8 "$DIR/fp8"; }
step_table3-fp8() { table table3 fp8 "$DIR/fp8"; }

step_ablation() {
    "$PYTHON" - <<'PY'
import os, pathlib, sys
from vla_oft.bench import ablation
out = pathlib.Path(os.environ["DIR"])
document = ablation.run(ablation.AblationRequest(workload="B", device="cuda", out=out), quiet=True)
print((out / "ablation-B-cuda.md").read_text())
sys.exit(bool(document["failures"]))
PY
}

step_profile() {
    failed=0
    for workload in A B C; do
        for precision in bf16 fp8; do profile "$workload" "$precision" 5 || failed=1; done
    done
    profile B eager 2 || failed=1
    return $failed
}

# The tests of training that have parts for a GPU: nothing in a step waits for it, nccl, 4-bit weights.
step_train-tests() {
    "$PYTHON" -m pytest -q --maxfail=20 -p no:cacheprovider tests/unit/test_guard.py tests/unit/test_qlora.py tests/unit/test_recompute.py \
        tests/unit/test_optimizer.py tests/distributed/test_gpu_training.py
}
step_train-lora() { train lora --workload B --batch 1 8 --recompute none full --steps 16; }
step_train-compiled() { train compiled --workload B --batch 8 16 --recompute none selective --compile --steps 24; }
step_train-qlora() { train qlora --workload B --tuning qlora --batch 1 8 --recompute full --steps 12; }
step_train-full() { train full --workload B --tuning full --recompute selective --compile --steps 12; }
step_train-others() { train others --workload A C --recompute selective --compile --steps 12 && train plain --workload B --plain --steps 8; }

# predicted against measured peak memory of configuration B
step_memory() { "$PYTHON" scripts/measure_memory.py --out "$DIR"; }

train() {
    "$PYTHON" - "$@" <<'PY'
import argparse, os, pathlib, sys
from vla_oft.bench import train
parser = argparse.ArgumentParser()
parser.add_argument("name")
parser.add_argument("--workload", nargs="+")
parser.add_argument("--tuning", nargs="+", default=["lora"])
parser.add_argument("--batch", nargs="+", type=int, default=[8])
parser.add_argument("--recompute", nargs="+", default=["none"])
parser.add_argument("--compile", action="store_true")
parser.add_argument("--plain", action="store_true")
parser.add_argument("--steps", type=int, default=16)
given = parser.parse_args()
out = pathlib.Path(os.environ["DIR"])
rows = train.settings(given.workload, given.tuning, given.batch, given.recompute, compile=given.compile, plain=given.plain)
request = train.TrainRequest(settings=rows, steps=given.steps, device="cuda", out=out, name=f"train-{given.name}")
document = train.run(request, quiet=True)
print((out / f"train-{given.name}-cuda.md").read_text())
sys.exit(bool(document["failures"]))
PY
}

latency() {
    # shellcheck disable=SC2086
    "$PYTHON" - "$1" $PRECISIONS <<'PY'
import os, pathlib, sys
from vla_oft.bench import latency
out = pathlib.Path(os.environ["DIR"])
request = latency.LatencyRequest(workload=sys.argv[1], device="cuda", precision=tuple(sys.argv[2:]), out=out)
document = latency.run(request, quiet=True)
print((out / f"latency-{sys.argv[1]}-cuda.md").read_text())
sys.exit(bool(document["failures"]))
PY
}

table() {
    "$PYTHON" - "$@" <<'PY'
import pathlib, sys
from vla_oft.bench import tables
name, precision, out = sys.argv[1], sys.argv[2], pathlib.Path(sys.argv[3])
request = tables.TableRequest(table=name, device="cuda", precision=(precision,), eager=precision == "bf16", out=out)
document = tables.run(request, quiet=True)
print((out / f"{name}-cuda.md").read_text())
sys.exit(bool(document["failures"]))
PY
}

profile() {
    "$PYTHON" - "$1" "$2" "$3" <<'PY'
import os, pathlib, sys
from vla_oft.bench import profiling
workload, precision, calls = sys.argv[1:]
request = profiling.ProfileRequest(workload=workload, precision=precision, calls=int(calls), device="cuda", out=pathlib.Path(os.environ["DIR"]))
profiling.run(request)
PY
}

# --- running them ----------------------------------------------------------------------------------------------------------------------

pack() {
    [ -n "${OUT:-}" ] || return 0
    cp "$SUMMARY" "$OUT/summary.txt"
    tar czf "$OUT/results.tar.gz.writing" -C "$DIR" . && mv "$OUT/results.tar.gz.writing" "$OUT/results.tar.gz"
}

if [ "${1:-}" = --run-step ]; then # one step in a process of its own, so that `timeout` can stop it; $DIR is set
    "step_$2"
    exit
fi

chosen=("$@")
[ $# -gt 0 ] || chosen=("${STEPS[@]}")
for step in "${chosen[@]}"; do
    if [[ " ${STEPS[*]} " != *" $step "* ]]; then
        echo "unknown step '$step'; steps: ${STEPS[*]}" >&2
        exit 2
    fi
done

DIR=$PWD/benchmarks/gpu
[ -z "${OUT:-}" ] || { DIR=$(mktemp -d) && OUT=$(realpath -m "$OUT"); }
mkdir -p "$DIR" ${OUT:+"$OUT"}
export DIR XDG_CACHE_HOME=$DIR/cache
[ -z "${OUT:-}" ] || [ ! -d benchmarks/gpu/cache ] || cp -r benchmarks/gpu/cache "$DIR/"
SUMMARY=$DIR/summary.txt
printf '%-14s %4s %8s\n' step rc seconds >"$SUMMARY"
failed=0
for step in "${chosen[@]}"; do
    echo "=== $step"
    start=$SECONDS
    timeout --kill-after=10 "$LIMIT_S" bash "$SELF" --run-step "$step" 2>&1 | tee "$DIR/$step.log"
    rc=${PIPESTATUS[0]}
    [ "$rc" -eq 0 ] || failed=1
    printf '%-14s %4d %8d\n' "$step" "$rc" $((SECONDS - start)) >>"$SUMMARY"
    pack
done
echo "=== summary (rc 124: stopped after $LIMIT_S s)"
cat "$SUMMARY"
exit $failed
