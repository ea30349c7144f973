r"""N processes, one run: what is dealt out to the ranks, and how the results come together.

    torchrun --nproc-per-node 8 train_gsm8k.py --preset math-7b

Every rank holds all questions, rollouts, branches and rewards of a step: lists of token ids, small beside a model.
Advantages, denominators of Eq. (J), buffer, fit and pivots are therefore those of one process, and nothing of them
has to be reduced. Dealt out is what costs time and memory:

    sampling, grading     a contiguous part of the rows for each rank, results gathered    share
    the update            every N-th micro-batch; FSDP sums the gradients                  deep_grpo.objective
    the model             an N-th of every tensor                                          model.shard

Without torchrun there is one rank, and everything here is the plain call.
"""
import os
import random
import sys
from bisect import bisect_left
from collections.abc import Callable
from datetime import timedelta
from itertools import accumulate

import torch
import torch.distributed as dist

SHARED_ERRORS = (SystemExit, FloatingPointError, ValueError, OSError, torch.OutOfMemoryError)


def start() -> None:
    """Join the processes that torchrun started, if it did. From here on only rank 0 prints to stdout.

    (Tracebacks of all ranks are seen: they go to stderr.)
    """
    gpu = torch.cuda.is_available()
    if "WORLD_SIZE" in os.environ and not distributed():
        if gpu and (n := int(os.environ["LOCAL_WORLD_SIZE"])) > torch.cuda.device_count():
            if os.environ["LOCAL_RANK"] == "0":
                print(f"error: torchrun --nproc-per-node {n}, and {torch.cuda.device_count()} GPUs", file=sys.stderr)
            sys.exit(2)
        if gpu:
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        # Two hours: rank 0 may load and write for long. (A rank that dies is torchrun's business, at once.)
        dist.init_process_group("cpu:gloo,cuda:nccl" if gpu else "gloo", timeout=timedelta(hours=2))
        if rank() > 0:
            sys.stdout = open(os.devnull, "w")


def end() -> None:
    """Leave the other processes, when all is done."""
    if distributed():
        dist.destroy_process_group()


def distributed() -> bool:
    """Did torchrun start this process (and be it alone)? Then the model is sharded."""
    return dist.is_initialized()


def device() -> torch.device:
    """Of this process: its GPU, or the CPU."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def rank() -> int:
    """The number of this process; 0 prints and writes."""
    return dist.get_rank() if distributed() else 0


def world_size() -> int:
    """The number of processes, N; 1 without torchrun."""
    return dist.get_world_size() if distributed() else 1


def seed_rank(seed, step=0):
    """torch's generators, which sampling draws from: the seed itself on rank 0, and no two ranks draw the same."""
    own = seed if rank() == 0 and step == 0 else random.Random(f"{seed} {rank()} {step}").getrandbits(32)
    torch.manual_seed(own)


def gather(function: Callable) -> list:
    """[function() of rank 0, of rank 1, ...] on every rank. Results travel pickled: no models.

    Bad input, a failed write, non-finite numbers, full memory of one rank are raised on all of them, so that all end
    alike; any other error ends this process with its traceback, and torchrun then the others.
    """
    if world_size() == 1:
        return [function()]
    mine, failed = None, None
    try:
        mine = function()
    except SHARED_ERRORS as error:
        failed = next(kind for kind in SHARED_ERRORS if isinstance(error, kind)), getattr(error, "code", str(error))
    results = [None] * world_size()
    dist.all_gather_object(results, (mine, failed))
    for _, failed in results:
        if failed is not None:
            raise failed[0](failed[1])
    return [mine for mine, _ in results]


def first(function: Callable):
    """function() of rank 0, called there only, on every rank; its errors as in gather."""
    return gather(lambda: function() if rank() == 0 else None)[0]


def fail(message, code) -> int:
    """The end with an error that all ranks know: one line on stderr, from rank 0; no rank goes before it is there.
    Returns the exit code."""
    first(lambda: print(f"error: {' '.join(str(message).split())}", file=sys.stderr))
    end()
    return code


def deal(costs: list[float], parts: int) -> list[slice]:
    """Cut a list of items with these costs into contiguous parts of about equal cost; a part may be empty.

    No part costs more than an equal share and the dearest item together.
    """
    middles = [end - cost / 2 for cost, end in zip(costs, accumulate(costs))]
    cuts = [bisect_left(middles, sum(costs) * part / parts) for part in range(parts)]
    return [slice(*cut) for cut in zip(cuts, [*cuts[1:], len(costs)])]


def share(items: list, work: Callable, costs: list[float] | None = None) -> list:
    """work(items), each rank doing a part; work gives one result per item. All results, in order, on every rank."""
    part = deal(costs or [1] * len(items), world_size())[rank()]
    return [result for results in gather(lambda: work(items[part])) for result in results]


def imbalance(loads: list[float], costs: list[float] | None = None) -> float:
    """Most loaded rank over the mean, when items with these loads were dealt out by these costs: 1 is even."""
    sums = [sum(loads[part]) for part in deal(costs or [1] * len(loads), world_size())]
    return max(sums) * len(sums) / sum(sums) if sum(sums) else 1.0
