r"""The policy and the reference: load, put on one GPU or shard over all ranks (torch's FSDP2, `fully_shard`).

Sharded are weights, gradients, moments and reference: each rank holds an N-th of every tensor, in fp32. A forward or
backward pass gathers a layer at a time, in bf16, and gradients are summed over ranks in fp32. For sampling all layers
are gathered once, and given back before the update (gathered): else each token would gather all of them again, and all
ranks would have to stop at the same length.
"""
import copy
from collections.abc import Callable
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import MethodType

import torch
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
from transformers import AutoModelForCausalLM, AutoTokenizer

from trainer.ranks import device, distributed, first, rank, world_size

# On Hopper torch takes cuDNN's attention first. With a mask its backward pass gives NaN at some widths (torch 2.11 to
# 2.13: pytorch issue 196678, trl issue 7181 with Qwen2.5-0.5B), and it makes a plan anew for each shape: here for each
# token. Next in line are the flash and the memory-efficient kernel.
torch.backends.cuda.enable_cudnn_sdp(False)


def load_model(name, dtype=torch.float32):
    """(model with sdpa attention, tokenizer) from a folder or the hub; ValueError when there is none."""
    if Path(name).exists() and not (Path(name) / "config.json").exists():
        raise ValueError(f"{name} does not hold a model: there is no config.json in it")
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
        model = AutoModelForCausalLM.from_pretrained(name, dtype=dtype, attn_implementation="sdpa")
    except Exception as error:                       # many types; the person needs one line
        reason = str(error).strip().split("\n")[0]
        raise ValueError(f"model {name!r} is neither a local folder with a model nor could it be loaded from the "
                         f"hub: {reason}") from error
    for module in model.modules():                   # dropout would score another policy than the one sampled
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.0
    return model, tokenizer


def precision(model):
    """fp32 on a CPU; on a GPU bf16 compute with fp32 master weights: by autocast, or as FSDP was told (shard)."""
    kind = model.device.type
    return torch.autocast(kind, dtype=torch.bfloat16, enabled=kind == "cuda" and not isinstance(model, FSDPModule))


def place(weights, config, offload=False, frozen=False):
    """A model with the weights of rank 0's ([model] there, [] elsewhere) on this process's device.

    Under torchrun sharded over all ranks. frozen: the reference, a copy without gradients.
    """
    if not distributed():
        model = copy.deepcopy(weights[0]) if frozen else weights[0]
        return model.to(device()).eval().requires_grad_(not frozen)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="sdpa")
    shard(model.requires_grad_(not frozen), torch.bfloat16 if device().type == "cuda" else None, offload)
    return fill(model, weights[0] if weights else None, offload).eval()


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
                    offload_policy=CPUOffloadPolicy(pin_memory=device().type == "cuda") if offload else OffloadPolicy())
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
    buffers, model.generation_config = first(lambda: (dict(weights.named_buffers()), weights.generation_config))
    for name, value in buffers.items():
        owner, _, leaf = name.rpartition(".")
        model.get_submodule(owner).register_buffer(leaf, value.to(device()), persistent=False)
    return model


def checkpoint_activations(model):
    """From now on activations are computed twice instead of kept: in training mode only (dropout is 0: load_model)."""
    # Its name from transformers 5.23 on, and before.
    (getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable)()
    model.train()


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
    if not hasattr(model, "run_as_forward"):
        model.run_as_forward = MethodType(lambda self, call: call(), model)
        register_fsdp_forward_method(model, "run_as_forward")
    # Closed in: FSDP looks for tensors in arguments, through every number of a list, which takes as long as a layer.
    return lambda *args: model.run_as_forward(lambda: function(model, *args))
