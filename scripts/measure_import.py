"""Time and peak memory of importing, loading and exporting a checkpoint of OpenVLA-OFT's true size, with random bfloat16 weights.

    python scripts/measure_import.py TOKENIZER_FOLDER WORK_FOLDER      (needs 3 x 15 GB of disk, cleans up)

TOKENIZER_FOLDER holds a Llama-2 tokenizer.json. Each step runs in its own process; its peak is the resident set, mapped files included.
"""

import json
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch

from vla_oft import preprocess
from vla_oft.heads import l1
from vla_oft.policy import Policy, PolicyConfig
from vla_oft.reference import ImportRequest, export_checkpoint, import_checkpoint
from vla_oft.reference.exporter import model_document, pixel_document
from vla_oft.robots.libero import SPEC
from vla_oft.statistics import compute_statistics, save_statistics
from vla_oft.vlm import sizes, tokens
from vla_oft.weights import LazyTensor, open_weights, write_shards


def create(tokenizer_folder: Path, out: Path) -> None:
    """A published L1 checkpoint, weights in four files as on the hub."""
    config = PolicyConfig(
        robot=SPEC,
        vlm=sizes.openvla_7b(film=False),
        head=l1.Config(),
        preprocess=preprocess.reference_config(),
        dataset="libero_random",
        chunk_len=SPEC.chunk_len,
        use_state=True,
        prompt_style="openvla",
        grounding=None,
        parity=True,
    )
    rng = np.random.default_rng(0)
    statistics = compute_statistics([rng.normal(size=(50, 7))], [rng.normal(size=(50, 8))], SPEC.normalize_mask)
    with torch.device("meta"):
        policy = Policy(config, statistics, tokens.load_tokenizer(tokenizer_folder))
    shapes = {name: tensor.shape for name, tensor in policy.state_dict().items()}
    block = torch.randn(1 << 24).mul_(0.02).bfloat16()

    def random(shape: torch.Size) -> torch.Tensor:
        out = torch.empty(shape.numel(), dtype=torch.bfloat16)
        for part in out.split(len(block)):
            part.copy_(block[: len(part)])
        return out.view(shape)

    out.mkdir(parents=True)
    backbone = {n.removeprefix("vlm."): s for n, s in shapes.items() if n.startswith("vlm.")}
    write_shards({n: LazyTensor(tuple(s), torch.bfloat16, lambda s=s: random(s)) for n, s in backbone.items()}, out)
    for stem, prefix, dtype in (("action_head", "action_head.", torch.bfloat16), ("proprio_projector", "state_projector.", torch.float32)):
        part = {f"module.{n.removeprefix(prefix)}": random(s).to(dtype) for n, s in shapes.items() if n.startswith(prefix)}
        torch.save(part, out / f"{stem}--1_checkpoint.pt")
    (out / "config.json").write_text(json.dumps(model_document(config)))
    (out / "preprocessor_config.json").write_text(json.dumps(pixel_document(config)))
    save_statistics(out / "dataset_statistics.json", {"libero_random": statistics})
    shutil.copy(tokenizer_folder / "tokenizer.json", out)


def step(name: str, work: Path) -> None:
    """One measured step in this process; prints one line."""
    start = time.monotonic()
    if name == "import":
        import_checkpoint(ImportRequest(source=str(work / "published")), work / "ours")
    elif name == "load bfloat16":
        policy = Policy.load(work / "ours", dtype=torch.bfloat16)
        print(f"{sum(p.numel() for p in policy.parameters()) / 1e9:.2f} B parameters")
    elif name == "export":
        export_checkpoint(work / "ours", work / "exported")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    print(f"{name}: {time.monotonic() - start:.0f} s, peak {peak:.1f} GB", flush=True)


def main() -> None:
    if sys.argv[1] == "--step":
        step(sys.argv[2], Path(sys.argv[3]))
        return
    tokenizer_folder, work = Path(sys.argv[1]), Path(sys.argv[2])
    try:
        create(tokenizer_folder, work / "published")
        for name in ("import", "load bfloat16", "export"):
            subprocess.run([sys.executable, __file__, "--step", name, str(work)], check=True)
        before, after = open_weights(work / "published"), open_weights(work / "exported")
        same = before.keys() == after.keys() and all(torch.equal(tensor.read(), after[name].read()) for name, tensor in before.items())
        print(f"{len(before)} tensors, {'every bit returned' if same else 'some changed'}")
    finally:
        shutil.rmtree(work, ignore_errors=True)


if __name__ == "__main__":
    main()
