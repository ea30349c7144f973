r"""N processes, one run: what is divided among the ranks, and how the results come together.

    torchrun --nproc-per-node 8 train_gsm8k.py --preset math-7b

Every rank holds all questions, rollouts, branches and rewards of a step. These are lists of token ids, which are small
beside a model. Every rank therefore computes the same advantages, denominators of Eq. (J), buffer, fit and pivots as a
single process, and none of them needs an all-reduce. Only what costs time and memory is divided:

    what                  the part of a rank                                               where
    sampling, grading     a contiguous part of the rows; all results are then gathered     share
    the update            every N-th micro-batch; FSDP sums the gradients                  model.Ranks
    the model             an N-th of every tensor                                          model.shard

Without torchrun there is one rank, and every function of this file is the plain call. The class Ranks, which divides
the micro-batches of an update, is in trainer/model.py, because it also runs the model.
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
    """Join the processes that torchrun started, if it started any. From here on only rank 0 prints to stdout.

    The tracebacks of all ranks are still shown, because they go to stderr.
    """
    gpu = torch.cuda.is_available()
    if "WORLD_SIZE" in os.environ and not distributed():
        if gpu and (n := int(os.environ["LOCAL_WORLD_SIZE"])) > torch.cuda.device_count():
            if os.environ["LOCAL_RANK"] == "0":
                print(f"error: torchrun --nproc-per-node asks for {n} GPUs, and this machine has "
                      f"{torch.cuda.device_count()}", file=sys.stderr)
            sys.exit(2)
        if gpu:
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        # The timeout is two hours, because rank 0 may load and write for long. It is not needed for a rank that dies:
        # torchrun then ends the others at once.
        dist.init_process_group("cpu:gloo,cuda:nccl" if gpu else "gloo", timeout=timedelta(hours=2))
        if rank() > 0:
            sys.stdout = open(os.devnull, "w")


def end() -> None:
    """Leave the other processes when all is done."""
    if distributed():
        dist.destroy_process_group()


def distributed() -> bool:
    """Did torchrun start this process, even if only this one? Then the model is sharded."""
    return dist.is_initialized()


def device() -> torch.device:
    """The device of this process: its GPU, or the CPU."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def rank() -> int:
    """The number of this process, from 0. Rank 0 prints and writes."""
    return dist.get_rank() if distributed() else 0


def world_size() -> int:
    """The number of processes, N. It is 1 without torchrun."""
    return dist.get_world_size() if distributed() else 1


def seed_rank(seed, step=0):
    """Seed torch's generators, from which sampling draws, so that no two ranks draw the same.

    Rank 0 gets the seed itself at step 0. Any other rank or step gets a seed derived from all three numbers.
    """
    own = seed if rank() == 0 and step == 0 else random.Random(f"{seed} {rank()} {step}").getrandbits(32)
    torch.manual_seed(own)


def gather(function: Callable) -> list:
    """Return [function() of rank 0, of rank 1, ...] on every rank. Results are pickled, so they must not be models.

    Bad input, a failed write, non-finite numbers or full memory on one rank raise an error on all ranks, so that all
    end alike. Any other error ends this process with its traceback, and torchrun then ends the others.
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
    """Call function() on rank 0 only, and return its result on every rank. Its errors are treated as in gather()."""
    return gather(lambda: function() if rank() == 0 else None)[0]


def first_fault(checks) -> str | None:
    """What the first of these functions that returns something returns, on any rank; None when none of them does.

    All ranks call the same ones: a rank that went on alone would wait for the others in its next forward pass.
    """
    for check in checks:
        if faults := [fault for fault in gather(check) if fault is not None]:
            return faults[0]
    return None


def first_line(error) -> str:
    """What an error says, on one line; where it says nothing, its name."""
    return (str(error).strip() or repr(error)).splitlines()[0]


def fail(message, code) -> int:
    """End with an error that all ranks know. Returns the exit code.

    Rank 0 prints one line on stderr, and no rank leaves before that line is printed.
    """
    first(lambda: print(f"error: {' '.join(str(message).split())}", file=sys.stderr))
    end()
    return code


def agree(value):
    """Return rank 0's value on every rank. Otherwise a different last digit could lead to a different step on each."""
    return first(lambda: value)


def deal(costs: list[float], parts: int) -> list[slice]:
    """Cut a list of items with these costs into contiguous parts of about equal cost. Returns a slice for each part.

    A part may be empty. No part costs more than an equal share and the most expensive item together.
    """
    middles = [end - cost / 2 for cost, end in zip(costs, accumulate(costs))]
    cuts = [bisect_left(middles, sum(costs) * part / parts) for part in range(parts)]
    return [slice(*cut) for cut in zip(cuts, [*cuts[1:], len(costs)])]


def share(items: list, work: Callable, costs: list[float] | None = None) -> list:
    """Return work(items), of which each rank does a part. Every rank gets all results, in the order of the items.

    work: gives one result per item. costs: those of deal(); None means that all items cost the same.
    """
    part = deal(costs or [1] * len(items), world_size())[rank()]
    return [result for results in gather(lambda: work(items[part])) for result in results]


def imbalance(loads: list[float], costs: list[float] | None = None) -> float:
    """The load of the most loaded rank over the mean, when deal() divides items with these loads by these costs.

    It is 1 when all ranks have the same load. costs: None means that all items cost the same.
    """
    sums = [sum(loads[part]) for part in deal(costs or [1] * len(loads), world_size())]
    return max(sums) * len(sums) / sum(sums) if sum(sums) else 1.0
