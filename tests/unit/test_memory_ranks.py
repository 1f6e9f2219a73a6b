"""Predicted memory of one of two processes against what torch's allocator reports there: DDP and FSDP2, on the CPU."""

import gc
import os
import socket
from typing import Literal

import pytest
import torch
from torch.multiprocessing import get_context
from torch.profiler import ProfilerActivity, profile

from tests.unit.test_memory import policy, run, worst
from vla_oft.policy import PolicyConfig
from vla_oft.train import assemble, memory, parallel, step
from vla_oft.train.config import TrainConfig
from vla_oft.train.parallel import Parallel

MICRO, STEPS = 2, 2


def work(rank: int, port: int, config: TrainConfig, what: PolicyConfig, answers) -> None:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    with parallel.start("cpu") as ranks:
        blueprint = assemble.prepare(memory._blueprint(what), config)
        gc.collect()
        gc.disable()
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as watched:
            trainee = assemble.assemble(blueprint, config, ranks)
            trained = [p for p in trainee.policy.parameters() if p.requires_grad]
            optimizer = config.optimizer.build(trainee.policy, config.lr)
            for _ in range(STEPS):
                step.backward(trainee.module, memory.sample_batch(what, MICRO, memory.PROMPT_LEN), bf16=trainee.autocast)
                torch.nn.utils.clip_grad_norm_(trained, 1.0)
                optimizer.step(config.lr)
        if rank == 0:
            answers.put(worst(watched))


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_two_processes_need_what_is_predicted(strategy: Literal["ddp", "fsdp"], precision: str) -> None:
    config = run(batch_size=2 * MICRO, parallel=Parallel(strategy=strategy), precision=precision)
    what = policy(width=384, depth=6, mlp_dim=1024)
    predicted = memory.simulate(config, what, device="cpu").predict(MICRO, world_size=2).peak
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = get_context("spawn")
    answers = context.Queue()
    processes = [context.Process(target=work, args=(rank, port, config, what, answers)) for rank in range(2)]
    for process in processes:
        process.start()
    measured = answers.get(timeout=300)
    for process in processes:
        process.join(60)
    assert predicted == pytest.approx(measured, rel=0.03 if strategy == "ddp" else 0.15)
