r"""N processes, one run: work is dealt out to the ranks, weights are sharded with torch's FSDP2 (`fully_shard`).

    torchrun --nproc-per-node 8 train_gsm8k.py --preset math-7b

Every rank holds all questions, rollouts, branches and rewards of a step: lists of token ids, small beside a model.
Advantages, denominators of Eq. (J), buffer, fit and pivots are therefore those of one process, and nothing of them
has to be reduced. Dealt out is what costs time and memory:

    sampling and grading    a contiguous part of the rows for each rank; results are gathered   share
    the update              every N-th micro-batch; FSDP sums the gradients                     deep_grpo.objective
    weights, gradients, moments, reference    a N-th of every tensor                            shard

For sampling the weights are gathered once and given back before the update (gathered): with FSDP's own ways each
token would gather all of them again, and all ranks would have to stop at the same length.
Without torchrun there is one rank, and everything here is the plain call.
"""
import os
import sys
from bisect import bisect_left
from collections.abc import Callable
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from itertools import accumulate
from types import MethodType

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
    register_fsdp_forward_method,
)

SHARED_ERRORS = (SystemExit, FloatingPointError, ValueError, OSError)


# ---- ranks ----

def start() -> None:
    """Join the processes that torchrun started, if it did. From here on only rank 0 prints to stdout.

    (Tracebacks of all ranks are seen: they go to stderr.)
    """
    gpu = torch.cuda.is_available()
    if "WORLD_SIZE" in os.environ and not distributed():
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


def gather(function: Callable) -> list:
    """[function() of rank 0, of rank 1, ...] on every rank. Results travel pickled: no models.

    Bad input, a failed write, non-finite numbers of one rank are raised on all of them, so that all end alike;
    any other error ends this process with its traceback, and torchrun then the others.
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


# ---- sharded models ----

def shard(model, compute_dtype: torch.dtype | None = None, offload=False):
    """Shard a model over all ranks, in place: each decoder layer, then what is left (embeddings, norm, head).

    Embeddings and head stay in one group, as they may be tied. compute_dtype: of gathered weights and activations
    (bf16); weights, gradients and their sum over ranks stay as they are (fp32). Gradients are summed, not averaged:
    the weights of loss.py have all denominators. offload: sharded weights, gradients and the optimizer's moments
    live in host memory, where the optimizer step is then computed.
    """
    precision = MixedPrecisionPolicy(param_dtype=compute_dtype, cast_forward_inputs=False,
                                     reduce_dtype=None if compute_dtype is None else torch.float32)
    settings = dict(mesh=init_device_mesh(device().type, (world_size(),)), mp_policy=precision,
                    offload_policy=CPUOffloadPolicy() if offload else OffloadPolicy())
    frozen = not any(p.requires_grad for p in model.parameters())
    for layer in model.base_model.layers:
        fully_shard(layer, **settings)
    # The root stays gathered from forward to backward; without a backward nothing would free it.
    fully_shard(model, **settings, reshard_after_forward=frozen)
    for module in fsdp_modules(model):
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)
    return model


def fsdp_modules(model) -> list[FSDPModule]:
    """The sharded groups of a model, the root first; none without FSDP."""
    return [module for module in model.modules() if isinstance(module, FSDPModule)]


def fill(model, weights, offload=False):
    """Put the weights of rank 0's whole model (None on the others) into a sharded one, made on the meta device.

    One tensor at a time: no GPU, and only one process, ever holds the whole model.
    """
    model.to_empty(device="cpu" if offload else device())
    whole = weights.state_dict() if rank() == 0 else {}
    set_model_state_dict(model, whole, options=StateDictOptions(full_state_dict=True, broadcast_from_rank0=True))
    # Buffers that are no part of a state dict (the frequencies of rotary positions) are undefined after to_empty.
    for name, value in first(lambda: dict(weights.named_buffers())).items():
        owner, _, leaf = name.rpartition(".")
        model.get_submodule(owner).register_buffer(leaf, value.to(device()), persistent=False)
    return model


@contextmanager
def gathered(model):
    """All weights whole, on every rank, until the end of the block: forwards in it need no other rank."""
    modules = fsdp_modules(model)
    for module in modules:
        module.set_reshard_after_forward(False, recurse=False)
        module.unshard()
    try:
        yield
    finally:
        for i, module in enumerate(modules):
            module.set_reshard_after_forward(i > 0, recurse=False)
            module.reshard()


def as_forward(model, function: Callable) -> Callable:
    """function with its first argument, the model, filled in; on a sharded model it counts as a forward.

    FSDP gathers weights around `model.forward` only, unless it is told of other methods.
    """
    if not isinstance(model, FSDPModule):
        return partial(function, model)
    if not hasattr(model, function.__name__):
        setattr(model, function.__name__, MethodType(function, model))
        register_fsdp_forward_method(model, function.__name__)
    return getattr(model, function.__name__)
