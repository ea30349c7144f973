r"""The policy and the reference model: they are loaded, and put on one GPU or sharded over all ranks.

Sharding is torch's FSDP2 (`fully_shard`). Weights, gradients, moments and the reference are sharded: each rank holds an
N-th of every tensor, in fp32. A forward or backward pass gathers one layer at a time, in bf16. Gradients are summed
over the ranks in fp32.

For sampling, all layers are gathered once, and they are given back before the update (`gathered`). Otherwise every
token would gather all of them again, and all ranks would have to stop at the same length.
"""
import copy
from collections.abc import Callable
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
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
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedConfig

from packing import score_rows
from trainer.ranks import device, distributed, first, first_line, gather, rank, world_size

# On Hopper, torch prefers the attention of cuDNN. With a mask, its backward pass gives NaN at some widths (torch 2.11
# to 2.13; see pytorch issue 196678, and trl issue 7181 with Qwen2.5-0.5B). It also makes a new plan for each shape,
# which here means for each token. Without it, torch takes the flash kernel or the memory-efficient one.
torch.backends.cuda.enable_cudnn_sdp(False)


def load_model(name, dtype=torch.float32):
    """Return (model with sdpa attention, tokenizer) from a folder or the hub.

    Raises ValueError when there is none, and when a tensor of the model is missing there, unexpected, or of another
    shape: transformers would make random numbers of it. Dropout and router noise are set to 0, because a policy that
    is scored with noise is not the one that was sampled.
    """
    if Path(name).exists() and not (Path(name) / "config.json").exists():
        adapter = " (it holds an adapter: merge it into its base model first)" if has_adapter(name) else ""
        raise ValueError(f"{name} does not hold a model: there is no config.json in it{adapter}")
    if (Path(name) / "checkpoints").is_dir():
        raise ValueError(f"{name} is the directory of a run: name one of the models in {Path(name) / 'checkpoints'}")
    if has_adapter(name):
        raise ValueError(f"{name} holds an adapter beside a base model, and adapters are not applied here: merge it "
                         "into the base model, or remove adapter_config.json to use the base model alone")
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
        model, loaded = AutoModelForCausalLM.from_pretrained(
            name, config=without_noise(AutoConfig.from_pretrained(name)), dtype=dtype, attn_implementation="sdpa",
            output_loading_info=True)
    except Exception as error:                       # it may have many types, and the user needs one line
        raise ValueError(f"model {name!r} is neither a local folder with a model nor could it be loaded from the "
                         f"hub: {first_line(error)}") from error
    for what, keys in (("missing", "missing_keys"), ("unexpected", "unexpected_keys"),
                       ("of another shape", "mismatched_keys")):
        if tensors := sorted(str(key[0] if isinstance(key, tuple) else key) for key in loaded[keys]):
            raise ValueError(f"model {name!r} does not fit its config.json: {len(tensors)} tensors are {what}, the "
                             f"first is {tensors[0]}")
    model.generation_config = savable(model.generation_config, name)
    return model, tokenizer


def checksum(model) -> int:
    """The sum of all bytes of the weights, which tells two checkpoints apart."""
    return sum(part.view(torch.uint8).sum(dtype=torch.int64).item()          # in parts, because the sum copies to int64
               for p in model.parameters() for part in p.detach().reshape(-1).split(2**24))


def savable(config, name):
    """A GenerationConfig without the settings that transformers, up to 5.22, refuses to save. It says what it drops.

    These are settings without an effect, such as a temperature where do_sample is false.
    """
    def can_be_saved(config):
        with TemporaryDirectory() as folder:
            try:
                config.save_pretrained(folder)
            except ValueError:
                return False
        return True

    if config is None or can_be_saved(config):
        return config
    kept, dropped = GenerationConfig(), []
    settings = config.to_diff_dict()
    for key in sorted(settings, key=lambda key: key not in ("do_sample", "num_beams")):      # what others depend on
        trial = GenerationConfig.from_dict(kept.to_diff_dict() | {key: settings[key]})
        if can_be_saved(trial):
            kept = trial
        else:
            dropped.append(key)
    print(f"generation_config.json of {name} has settings that are not valid together; checkpoints leave out "
          f"{', '.join(dropped)}")
    return kept


def has_adapter(folder) -> bool:
    """Does a local folder hold the adapter of another model?"""
    return (Path(folder) / "adapter_config.json").exists()


def without_noise(config):
    """The config with every dropout probability and router jitter at 0, in its parts, too. It is changed in place."""
    for name, value in list(vars(config).items()):
        noisy = any(word in name for word in ("dropout", "pdrop", "layerdrop", "jitter"))
        if noisy and isinstance(value, float):
            setattr(config, name, 0.0)
        elif isinstance(value, PreTrainedConfig):
            without_noise(value)
    return config


def layers_of(model):
    """The decoder layers of a model. ValueError where they are not in base_model.layers, as with GPT-2."""
    layers = getattr(model.base_model, "layers", None)
    if layers is None:
        raise ValueError(f"a model of type {model.config.model_type} does not keep its layers in base_model.layers: it "
                         "can be neither sharded (torchrun) nor sized (--dry-run) here")
    return layers


def precision(model):
    """The context of a forward pass: fp32 on a CPU, and bf16 compute with fp32 master weights on a GPU.

    On a GPU it is autocast. A sharded model needs no autocast, because FSDP was told the type (shard).
    """
    kind = model.device.type
    return torch.autocast(kind, dtype=torch.bfloat16, enabled=kind == "cuda" and not isinstance(model, FSDPModule))


def place(weights, config, offload=False, frozen=False):
    """Return a model with rank 0's weights on this process's device. Under torchrun it is sharded over all ranks.

    weights: [model] on rank 0, [] on the other ranks. offload: that of shard(). frozen: return the reference, a copy
    without gradients.
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

    Embeddings and head stay in one group, because they may be tied. compute_dtype: the type of gathered weights and of
    activations (bf16). Sharded weights, gradients and the sum of gradients over ranks stay in their own type (fp32).
    offload: keep sharded weights, gradients and the optimizer's moments in host memory, where the optimizer step is
    then computed. Gradients are summed over ranks, not averaged, because the weights of loss.py contain all
    denominators. Returns the model.
    """
    precision = MixedPrecisionPolicy(param_dtype=compute_dtype, cast_forward_inputs=False,
                                     reduce_dtype=None if compute_dtype is None else torch.float32)
    settings = dict(mesh=init_device_mesh(device().type, (world_size(),)), mp_policy=precision,
                    offload_policy=CPUOffloadPolicy(pin_memory=device().type == "cuda") if offload else OffloadPolicy())
    frozen = not any(p.requires_grad for p in model.parameters())
    for layer in layers_of(model):
        fully_shard(layer, **settings)
    # The root stays gathered from the forward to the backward pass. A frozen model has no backward pass to free it.
    fully_shard(model, **settings, reshard_after_forward=frozen)
    for module in fsdp_modules(model):
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)
    return model


def fsdp_modules(model) -> list[FSDPModule]:
    """The sharded groups of a model, the root first. Without FSDP there are none."""
    return [module for module in model.modules() if isinstance(module, FSDPModule)]


def fill(model, weights, offload=False):
    """Put the weights of rank 0's whole model into a sharded model, which was made on the meta device. Returns it.

    weights: the whole model on rank 0, None on the other ranks. One tensor is sent at a time, so no GPU ever holds the
    whole model, and only one process does.
    """
    model.to_empty(device="cpu" if offload else device())
    whole = weights.state_dict() if rank() == 0 else {}
    set_model_state_dict(model, whole, options=StateDictOptions(full_state_dict=True, broadcast_from_rank0=True))
    # Buffers that are not in a state dict (the frequencies of rotary positions) are undefined after to_empty.
    buffers, model.generation_config = first(lambda: (dict(weights.named_buffers()), weights.generation_config))
    for name, value in buffers.items():
        owner, _, leaf = name.rpartition(".")
        model.get_submodule(owner).register_buffer(leaf, value.to(device()), persistent=False)
    return model


def checkpoint_activations(model):
    """Compute activations twice instead of keeping them, from now on.

    This works in training mode only. The mode changes nothing else, because load_model() has set dropout to 0.
    """
    # The first name is that of transformers 5.23 and later, the second that of earlier versions.
    (getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable)()
    model.train()


@contextmanager
def gathered(model):
    """Keep all weights whole on every rank until the end of the block. A forward pass in it needs no other rank."""
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
    """Return `function` with its first argument, the model, filled in. On a sharded model it counts as a forward pass.

    FSDP gathers weights around `model.forward` only, unless it is told of other methods.
    """
    if not isinstance(model, FSDPModule):
        return partial(function, model)
    if not hasattr(model, "run_as_forward"):
        model.run_as_forward = MethodType(lambda self, call: call(), model)
        register_fsdp_forward_method(model, "run_as_forward")
    # The arguments are hidden in a closure. FSDP would search them for tensors, through every number of a list, which
    # takes as long as a layer.
    return lambda *args: model.run_as_forward(lambda: function(model, *args))


def device_of(model) -> torch.device:
    """Where a model computes. Offloaded weights are in host memory outside of a forward pass."""
    return device() if isinstance(model, FSDPModule) else model.device


class Ranks:
    """How the micro-batches of an update are divided: packing.Alone for any number of processes.

    Scores are computed in bf16 on a GPU. A sharded model gathers its weights for them.
    """

    def __init__(self, score_rows=None, multiple=1):
        self.score_rows = score_rows                 # None: packing.score_rows
        self.multiple = multiple                     # rows are padded to a multiple of so many tokens

    @property
    def size(self) -> int:
        """The number of processes."""
        return world_size()

    def mine(self, batches: list) -> list:
        """Every N-th micro-batch. packing.micro_batches has made equally many for each rank."""
        return batches[rank()::world_size()]

    def total(self, value: torch.Tensor) -> torch.Tensor:
        """The sum over all ranks. It is detached when there are several."""
        if world_size() == 1:
            return value
        return sum(gather(lambda: value.detach().cpu()))

    def score(self, model, rows, temperature, entropies=True):
        """packing.score_rows, or what takes its place, as a forward pass of the model."""
        with precision(model):
            return as_forward(model, partial(self.score_rows or score_rows, entropies=entropies))(rows, temperature)
