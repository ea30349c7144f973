r"""The update on a GPU, compiled: the numbers of packing.score_rows, to rounding.

    layers      are compiled by torch, once for all shapes of rows
    attention   of packed rows is FlexAttention. It is told which blocks of 128 x 128 tokens a row needs (block_masks),
                and never makes the mask of L x L tokens that other kernels read in every layer
    head        log-sum-exp, the chosen logit and the entropy in compiled kernels (fused_scores)

A prototype of this took half of the time on one H200, and two thirds of the memory. The backward pass of FlexAttention
is there on GPUs only, so on a CPU --compile compiles layers and head.
"""
import time
from contextlib import contextmanager
from functools import cache, partial
from types import MethodType

import torch
from torch._dynamo.callback import callback_handler
from torch.nn.attention.flex_attention import BlockMask, create_block_mask
from torch.nn.utils import get_total_norm
from transformers.integrations.flex_attention import flex_attention_forward
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from packing import layer_masks, needed_masks, pack, score_rows, tree_masks
from trainer.model import Ranks, device_of, layers_of
from trainer.ranks import first_fault, first_line

BLOCK = 128                              # tokens; the sides of a block of FlexAttention


@cache
def compiled(function):
    """The function, compiled once for all shapes."""
    return torch.compile(function, dynamic=True)


def dense_masks(rows, *batch):
    """packing.tree_masks, also of plain rows: they would be another kind of rows to compile for."""
    return tree_masks(*batch)


def block_masks(rows, config, segments, prefixes, positions):
    """packing.tree_masks for FlexAttention, also of plain rows. [B, L], where L is a multiple of BLOCK."""
    def block_mask(window):
        def seen(b, head, q, k):
            mask = ((segments[b, q] == segments[b, k]) | (k < prefixes[b, q])) & (k <= q)
            return mask if window is None else mask & (positions[b, q] - positions[b, k] < window)

        B, L = segments.shape
        return create_block_mask(seen, B, None, L, L, device=segments.device, BLOCK_SIZE=BLOCK)

    return layer_masks(config, block_mask)


def additive_masks(rows, config, segments, prefixes, positions):
    """packing.needed_masks under autocast: 0 or -inf in its type, which every layer would otherwise make for itself."""
    masks, kind = needed_masks(rows, config, segments, prefixes, positions), segments.device.type
    if masks is None or not torch.is_autocast_enabled(kind):             # (the type of the layers is not known here)
        return masks

    def additive(mask):
        zeros = torch.zeros(mask.shape, dtype=torch.get_autocast_dtype(kind), device=mask.device)
        return zeros.masked_fill_(~mask, float("-inf"))

    return {name: additive(mask) for name, mask in masks.items()} if isinstance(masks, dict) else additive(masks)


def fused_scores(head, hidden, targets, temperature: float, entropies: bool):
    """packing.score_tokens in a form that torch makes few kernels of: the logits are kept, their softmax is not."""
    logits = head(hidden)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if temperature != 1:                             # a division by 1 would stay in the compiled code
        logits = logits / temperature
    logz = logits.logsumexp(-1)
    chosen = logits.gather(-1, targets[:, None])[:, 0] - logz
    if not entropies:
        return chosen, None
    with torch.no_grad():
        p = (logits - logz[:, None]).exp()
        return chosen, logz - (p * logits).sum(-1)


def attend(module, query, key, value, attention_mask, **kwargs):
    """FlexAttention where the mask is one of block_masks, else what "sdpa" of transformers does."""
    if not isinstance(attention_mask, BlockMask):
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    query, key = query.to(value.dtype), key.to(value.dtype)      # under autocast, rotary positions make them fp32
    return flex_attention_forward(module, query, key, value, attention_mask, **kwargs)


@contextmanager
def attention(function):
    """Models that attend by "sdpa" of transformers' registry attend by this function until the end of the block."""
    before = ALL_ATTENTION_FUNCTIONS["sdpa"]
    ALL_ATTENTION_FUNCTIONS["sdpa"] = function
    try:
        yield
    finally:
        ALL_ATTENTION_FUNCTIONS["sdpa"] = before


@contextmanager
def compiled_layers(*models, attend=attend):
    """The layers of these models run compiled until the end of the block, with this function for attention.

    In an update, the backward pass is a part of the block.
    """
    layers = [layer for model in models for layer in layers_of(model)]
    for layer in layers:                             # below the hooks of FSDP
        layer.forward = MethodType(compiled(type(layer).forward), layer)
    try:
        # There are some kinds of passes, each of which is compiled once: with and without gradients, of one row and of
        # several, of the policy and the reference, of the update and of sampling.
        with attention(attend), torch._dynamo.config.patch(recompile_limit=128):
            yield
    finally:
        for layer in layers:
            del layer.forward


def compiled_rows(model, rows, temperature=1.0, entropies=True):
    """packing.score_rows, within compiled_layers()."""
    masks = dense_masks
    if model.device.type == "cuda":
        rows, masks = of_several_blocks(rows), block_masks
    return score_rows(model, rows, temperature, entropies=entropies, masks=masks, score_tokens=compiled(fused_scores),
                      multiple=padded_to(compiled_rows, model.device))


def of_several_blocks(rows):
    """The rows, and one more without a loss where none is longer than BLOCK: rows of one block would be a case of their
    own to the compiler, and compiled anew whenever the first of them comes."""
    longest = max((len(row.ids) for row in rows), default=0)
    return rows if longest > BLOCK else [*rows, pack([0] * (BLOCK + 1), [])]


def plain_rows(model, rows, temperature=1.0, entropies=True):
    """packing.score_rows, with masks and lengths that suit a GPU."""
    if model.device.type == "cpu":
        return score_rows(model, rows, temperature, entropies=entropies)
    return score_rows(model, rows, temperature, entropies=entropies, masks=additive_masks,
                      multiple=padded_to(plain_rows, model.device))


def padded_to(score, device) -> int:
    """The length of rows in a micro-batch is a multiple of so many tokens. score: one of the two functions above."""
    if device.type == "cpu":
        return 1
    return BLOCK if score is compiled_rows else 8


def warm_up(model, ref_model, temperature, scores=False, tokens=8192) -> str | None:
    """Compile all that an update needs, before the first step. Returns why a run has to go on without, or None, on all
    ranks alike.

    scores: an update also needs deep_grpo.score_groups(), for old log-probabilities or for entropies. tokens: those of
    a micro-batch. On a GPU torch makes other kernels for the backward pass of large micro-batches than for that of
    small ones (where a sum over all tokens and the norm of a layer share a kernel), so a large one comes first.
    Log-probabilities and gradients of many rows, of several and of one are compared with those of plain_rows(). On a
    GPU it is the mean difference of log-probabilities, because bf16 rounds single tokens by more. Measured on a CPU
    with a real model of 135 M parameters, two correct kernels of attention differ by .05 nats and 2 % of the gradient
    under autocast, and by .07 nats and 3 % with bf16 weights. With a wrong mask they differ by .45 nats and 24 to 35 %.
    """
    vocabulary = model.get_input_embeddings().weight.shape[0]
    exact = device_of(model).type == "cpu"

    def rows_of(count, n):
        """So many rows of n tokens, with two branches each."""
        ids = torch.randint(vocabulary, (count, n), generator=torch.Generator().manual_seed(0)).tolist()
        ends = [n * (12, 9, 6)[i % 3] // 20 for i in range(count)]                   # of the response
        return [pack(y[:20], y[20:end], [(30, y[end:3 * n // 4]), (9, y[3 * n // 4:])]) for y, end in zip(ids, ends)]

    def learn(score, *batches):
        logps = []
        for batch in batches:
            logp, _ = Ranks(score).score(model, batch, temperature, entropies=False)
            logp.sum().backward()
            logps.append(logp.detach())
        grads = [p.grad for p in model.parameters() if p.grad is not None]
        model.zero_grad()
        return torch.cat(logps), grads

    def fault(part):
        right, right_grads = learn(plain_rows, *(part[i:i + 3] for i in range(0, len(part), 3)))     # in less memory
        try:
            with compiled_layers(model, *([] if ref_model is None else [ref_model])):
                logp, grads = learn(compiled_rows, part)
                learn(compiled_rows, one_token)      # too little to be compared
                with torch.no_grad():
                    for rows in (part, one_token):
                        if ref_model is not None:
                            Ranks(compiled_rows).score(ref_model, rows, temperature, entropies=False)
                        if scores:
                            Ranks(compiled_rows).score(model, rows, temperature)
        except torch.OutOfMemoryError:               # of one rank, perhaps, and the others would wait for it
            raise
        except Exception as error:                   # any type: what a compiler does is not ours to say
            return f"{type(error).__name__}: {first_line(error)}"
        gaps = (logp - right).abs()
        gap = (gaps.max() if exact else gaps.mean()).item()
        difference = get_total_norm([a - b for a, b in zip(grads, right_grads)]) / get_total_norm(right_grads)
        if not (gap <= (1e-3 if exact else 0.25) and difference <= (1e-3 if exact else 0.2)):
            return f"log-probabilities differ by {gap:.2g} nats, gradients by {100 * difference:.1f} %"
        return None

    several, count = rows_of(3, 200), max(1, min(tokens, 8192) // 512)
    one_token = [pack([0] * 20, [0])]                # the head compiles anew for one, and its last chunk may have one
    # Two sizes that are equal at first stay one to the compiler. 4 rows would be as many as the blocks of one.
    many = [] if exact else [rows_of(3 if count == 4 else count, 512)]
    return first_fault(partial(fault, part) for part in (*many, several, several[:1]))


# ---- how long it takes ----

class Stopwatch:
    """The seconds that torch has compiled since the start of the process."""

    def __init__(self):
        self.seconds, self.began = 0.0, 0.0
        callback_handler.register_start_callback(self.start)
        callback_handler.register_end_callback(self.stop)

    def start(self, _):
        """Compilation begins."""
        self.began = time.perf_counter()

    def stop(self, _):
        """Compilation ends."""
        self.seconds += time.perf_counter() - self.began


stopwatch = Stopwatch()
