"""How far a compiled policy's actions are from float32, on scenes of the embedded simulator, for benchmarks/precision.md.

python scripts/measure_precision.py [CHECKPOINT]
"""

import sys

import torch

from vla_oft import engine
from vla_oft.engine.accuracy import LIMITS, action_error, relative_error
from vla_oft.evaluate.suite import resolve
from vla_oft.policy import Policy
from vla_oft.recipes.nano_finetune import BASE
from vla_oft_client import Observation

SUITE, FIRST_SEED, SCENES, CHUNKS = "tabletop/touch,tabletop/push,tabletop/lift,tabletop/stack", 5000, 4, 4


def look_around(policy: Policy) -> list[Observation]:
    """What the policy sees in its first chunks of a few scenes."""
    found = []
    for task in resolve(SUITE):
        env = task.make(128)
        for seed in range(FIRST_SEED, FIRST_SEED + SCENES):
            env.reset(seed)
            for _ in range(CHUNKS):
                found.append(env.observe())
                for action in policy.act([found[-1]])[0].actions:
                    env.step(action)
        env.close()
    return found


def main() -> None:
    checkpoint = sys.argv[1] if len(sys.argv) > 1 else str(BASE)
    exact, plain = Policy.load(checkpoint), Policy.load(checkpoint, dtype=torch.bfloat16)
    observations = look_around(exact)
    with torch.inference_mode():
        wanted, rounded = (torch.cat([p.predict(p.prepare([o])).float() for o in observations]) for p in (exact, plain))
    print(f"precision     error    limit    big layers, MB\neager bf16    {relative_error(rounded, wanted):.1e}")
    for precision in engine.PRECISIONS:
        fast = engine.load_compiled(checkpoint, precision=precision)
        error = action_error(fast, exact, observations)
        print(f"{precision:13} {error:.1e}  {LIMITS[precision]:.1e}  {fast.num_bytes / 1e6:.2f}", flush=True)


if __name__ == "__main__":
    main()
