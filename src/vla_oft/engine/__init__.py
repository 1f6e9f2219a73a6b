"""Fast inference: a trained policy, specialised for one device. `compile_policy(policy).act(observations)`."""

from vla_oft.engine.compile import compile_policy, default_precision, load_compiled
from vla_oft.engine.compiled import CompiledPolicy
from vla_oft.engine.options import PRECISIONS, Options, Precision

__all__ = ["PRECISIONS", "CompiledPolicy", "Options", "Precision", "compile_policy", "default_precision", "load_compiled"]
