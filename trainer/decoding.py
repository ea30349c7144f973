r"""Sampling on a GPU: a decoding loop that takes the place of resample.generate_rows.

A token step of a small model is a thousand kernels, each shorter than its launch. Here

    the cache       has a fixed size, and a token writes one column of it in place; a growing cache is copied for every
                    token
    attention       makes the query heads that share keys and values the rows of one matrix product, so that no key or
                    value is repeated (attend)
    the draw        is the argmax of logits / T - log E with E ~ Exp(1), in compiled kernels (draw)
    the token step  is captured in a CUDA graph, once per BLOCK of tokens, over the rows that have not ended, and
                    replayed. The host looks at the tokens once per block

The model's own layers run, so no architecture needs code of its own. A model that this loop does not sample as its own
forward pass says is sampled by resample.py instead (trainer/check.py).
On a CPU, and for a sharded model, the same loop runs without graphs and without compilation.
"""
import sys
import warnings
from collections import defaultdict
from contextlib import contextmanager
from functools import partial
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from transformers import GenerationConfig
from transformers.cache_utils import Cache, CacheLayerMixin

import resample
from packing import layer_masks, pack
from resample import Continuation, append_block, as_read, cut, left_padded, next_block, prefill
from trainer.compiling import attention, compiled, compiled_layers
from trainer.memory import USABLE, of_row
from trainer.model import Ranks, device_of, gathered, layers_of, precision
from trainer.ranks import first_fault, first_line

HEALTHY_GAP = 0.03                       # nats, of a step's tokens; trainer/README.md (sampler_gap) has measurements
BLOCK = 64                               # tokens between two looks at which rows have ended
ALIGNED = 8                              # columns; matrix products in bf16 are fast where rows begin at 16 bytes
PREFILL_TOKENS = 16384                   # padded tokens of prefixes in one forward pass


def sample(model, prefixes: list[list[int]], k: int | list[int], *, max_new_tokens: int | list[int],
           eos_token_id: int | list[int], pad_token_id: int, temperature: float = 1.0,
           compile_layers: bool = False) -> list[list[Continuation]]:
    """resample.sample, with the loop of this file: the same arguments, and draws from the same distribution.

    compile_layers: compile the layers for it (trainer/compiling.py).
    """
    return resample.sample(model, prefixes, k, max_new_tokens=max_new_tokens, eos_token_id=eos_token_id,
                           pad_token_id=pad_token_id, temperature=temperature,
                           draw_rows=partial(decode_rows, compile_layers=compile_layers))


@torch.no_grad()
def decode_rows(model, prefixes, rows, caps, settings, compile_layers=False) -> list[Continuation]:
    """Continue as many of the first rows as memory should hold. Arguments and errors are those of
    resample.generate_rows."""
    def size():
        return max(len(prefixes[n]) for n in rows), max(caps[n] for n in rows)

    rows = rows[:rows_that_fit(model, columns_for(*size()), compile_layers)]
    width, new = size()
    fixed = FixedCache(len(rows), columns_for(width, new), model.device)
    continued_by = defaultdict(list)                 # prefix -> the rows that continue it
    for row, n in enumerate(rows):
        continued_by[n].append(row)
    try:
        for part in prefill_batches(prefixes, continued_by):
            grown = prefill(model, [prefixes[n] for n in part], settings["pad_token_id"])[2]
            if grown is not None:
                fixed.fill(grown, [continued_by[n] for n in part], width - 1)
        del grown
        ids, mask = left_padded([prefixes[n] for n in rows], settings["pad_token_id"], model.device)
        loop = partial(decode, caps=[caps[n] for n in rows], compile_layers=compile_layers)
        return model.generate(ids, attention_mask=mask, past_key_values=fixed, synced_gpus=False, custom_generate=loop,
                              generation_config=GenerationConfig(max_new_tokens=new, **settings))
    except torch.OutOfMemoryError as error:
        error.rows = len(rows)
        raise
    finally:                                         # cache and layers refer to each other: else their tensors, which
        fixed.layers.clear()                         # are gigabytes, would stay until Python looks for such cycles


def columns_for(width, new) -> int:
    """The columns of the cache for prefixes of `width` tokens and `new` more, of which the last is never written.

    Some columns are never read: otherwise attention would at times read the whole tensor, a case of its own to torch.
    """
    return aligned(width - 1 + new) + ALIGNED


def aligned(columns) -> int:
    """The next multiple of ALIGNED."""
    return -(-columns // ALIGNED) * ALIGNED


def rows_that_fit(model, columns, compile_layers=False) -> int:
    """How many rows of so many columns the free memory of a GPU holds; at least 1.

    Under autocast, copies of the weights take a part of it: those of the prefill, and those of compiled layers.
    """
    autocast = torch.is_autocast_enabled("cuda")
    compute = torch.get_autocast_dtype("cuda") if autocast else model.dtype
    copies = autocast * (1 + compile_layers) * compute.itemsize * sum(p.numel() for p in model.parameters())
    free = USABLE * free_memory(model.device) - copies
    return max(1, int(free // sum(of_row(model, columns, compute).values())))


def free_memory(device) -> int:
    """Bytes of a GPU that nobody uses, with those that torch holds in reserve, and at most what this process may have.

    Those of the host are not counted.
    """
    if device.type != "cuda":
        return sys.maxsize
    free, total = torch.cuda.mem_get_info(device)
    mine, fraction = torch.cuda.memory_allocated(device), torch.cuda.get_per_process_memory_fraction(device)
    return min(free + torch.cuda.memory_reserved(device) - mine, int(fraction * total) - mine)


def prefill_batches(prefixes, wanted) -> list[list[int]]:
    """The wanted indices of prefixes in batches of at most PREFILL_TOKENS, by length: less padding."""
    batches = [[]]
    for n in sorted(wanted, key=lambda n: len(prefixes[n])):
        if batches[-1] and len(prefixes[n]) * (len(batches[-1]) + 1) > PREFILL_TOKENS:
            batches.append([])
        batches[-1].append(n)
    return batches


# ---- the cache ----


class FixedCache(Cache):
    """Keys and values of all rows, in tensors of a fixed size.

    rows: how many are alive, the first ones of the tensors. column: where the next token writes, an int64 tensor [1],
    because a graph reads it anew at every replay. length: how many columns attention reads.
    """

    def __init__(self, rows, columns, device):
        super().__init__(layer_class_to_replicate=lambda: FixedLayer(self))
        self.rows, self.shape, self.device = rows, (rows, columns), device
        self.begin_block(0, columns)

    def begin_block(self, column, tokens):
        """The next token goes to this column, and so many will come before the rows are looked at."""
        self.length = aligned(column + tokens)
        self.column = torch.tensor([column], device=self.device)

    @torch.compiler.disable
    def update(self, key_states, value_states, layer_idx, *args, **kwargs):
        """Write one token of a layer, and return what attention reads.

        A layer is compiled in two parts, before and after this: otherwise each would be compiled for its own number.
        """
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)

    def fill(self, grown, rows, end):
        """Copy the cache of some prefixes to the columns before `end`. rows: those that continue each prefix."""
        source = torch.tensor([i for i, continued in enumerate(rows) for _ in continued], device=self.device)
        target = torch.tensor([row for continued in rows for row in continued], device=self.device)
        for i, layer in enumerate(grown.layers):
            while len(self.layers) <= i:
                self.layers.append(FixedLayer(self))
            self.layers[i].fill(layer.keys, layer.values, source, target, end)

    def keep(self, rows, columns):
        """Only these rows are left, as the first ones. columns: how many of them are in use."""
        for layer in self.layers:
            for states in (layer.keys, layer.values):
                states[:len(rows), :, :columns] = states[rows, :, :columns]
        self.rows = len(rows)


class FixedLayer(CacheLayerMixin):
    """The keys and values of one layer: [rows, heads, columns, head_dim], zeros where nothing was written."""
    is_sliding = False                   # a window is a matter of the mask, as in packing.layer_masks

    def __init__(self, cache):
        super().__init__()
        self.cache = cache

    def lazy_initialization(self, key_states, value_states):
        """Make the tensors. Zeros, because the probability 0 of a masked column times nan would be nan."""
        rows, columns = self.cache.shape
        self.keys, self.values = (as_read(states[:1, :, :1]).new_zeros(rows, states.shape[1], columns, states.shape[3])
                                  for states in (key_states, value_states))
        self.is_initialized = True

    def fill(self, keys, values, source, target, end):
        """Copy the prefixes `source` to the columns before `end` of the rows `target`, both int64 [n]."""
        if not self.is_initialized:
            self.lazy_initialization(keys, values)
        for mine, theirs in ((self.keys, keys), (self.values, values)):
            mine[target, :, end - theirs.shape[2]:end] = theirs[source]

    def update(self, key_states, value_states, *args, **kwargs):
        """Write one token of the rows that are alive, and return what attention reads."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        for mine, states in ((self.keys, key_states), (self.values, value_states)):
            mine[:self.cache.rows].index_copy_(2, self.cache.column, states.to(mine.dtype))
        return tuple(mine[:self.cache.rows, :, :self.cache.length] for mine in (self.keys, self.values))

    def get_seq_length(self):
        """The base class asks for it. No mask is made from it here."""
        return 0

    def get_mask_sizes(self, query_length):
        """The base class asks for it. No mask is made from it here."""
        return self.cache.length, 0

    def get_max_length(self):
        """The number of columns."""
        return self.cache.shape[1]


# ---- the token step ----


def on(device, function):
    """The function as it runs fastest on this device."""
    if device.type != "cuda" or torch.compiler.is_compiling():           # within compiled layers it is compiled anyway
        return function
    return compiled(function)


def attend(module, query, key, value, attention_mask, dropout=0.0, scaling=None, **kwargs):
    """Attention of one token per row, in the form of the functions of transformers' registry.

    query: [n, heads, 1, d]. key, value: [n, groups, length, d]. attention_mask: bool, [n, 1, 1, length]. Returns
    [n, 1, heads, d]. The heads of a group, which share keys and values, are the rows of one matrix product. Raises
    ValueError for what some models ask besides.
    """
    if unknown := [name for name in ("softcap", "s_aux", "position_bias") if kwargs.get(name) is not None]:
        raise ValueError(f"attention with {unknown[0]} is not done here")
    n, heads, _, d = query.shape
    query = query.reshape(n, key.shape[1], -1, d).to(key.dtype)              # (n, groups, heads of a group, d)
    scores = query @ key.transpose(-1, -2)                                   # (n, groups, heads of a group, length)
    p = on(key.device, masked_softmax)(scores, attention_mask, d ** -0.5 if scaling is None else scaling)
    return (p.to(value.dtype) @ value).reshape(n, 1, heads, d), None


def masked_softmax(scores, mask, scaling):
    """softmax(scores * scaling) over the columns that are seen, computed in fp32 at least."""
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32)) * scaling
    return scores.masked_fill(~mask, float("-inf")).softmax(-1)


def draw(logits, temperature):
    """Tokens from softmax(logits / temperature), with their log-probabilities and the entropies: each [n], from [n, V].

    The v with the largest logits_v / T - log E_v, where E ~ Exp(1) is noise, is a draw from the softmax.
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if temperature != 1:                             # a division by 1 would stay in the compiled code
        logits = logits / temperature
    E = exponential(torch.rand_like(logits, dtype=torch.float32))
    token, logp = (logits - E.log()).argmax(-1), logits.log_softmax(-1)
    return token, logp.gather(-1, token[:, None])[:, 0], -(logp.exp() * logp).sum(-1)


def exponential(u):
    """Exp(1) from uniform numbers of torch.rand in fp32, from 0 on. On a CPU they are multiples of 2^-24, and in code
    that is compiled for a GPU, near 0, of 2^-31 or less. Other code of a GPU gives 0 as often as a CPU does.

    Half a step more keeps E away from 0, which would win against every other token. Small E, with which unlikely tokens
    win, come from small u, where log1p rounds least.
    """
    fine = u.device.type == "cuda" and torch.compiler.is_compiling()
    return -torch.log1p(-(u + (2**-32 if fine else 2**-25)))


def decode(model, input_ids, logits_processor, stopping_criteria, generation_config, caps, compile_layers, **inputs):
    """The loop that `generate` calls in the place of its own (`custom_generate`). Returns a Continuation for each row.

    input_ids: [n, width]. caps: the most tokens of each row. inputs: the other inputs of the model, as generate()
    prepared them; the FixedCache is among them.
    """
    fixed, mask, (n, width) = inputs["past_key_values"], inputs["attention_mask"], input_ids.shape
    pick = partial(on(input_ids.device, draw), temperature=generation_config.temperature)
    if not generation_config.do_sample:
        pick = greedy
    seen = torch.zeros(fixed.shape, dtype=torch.bool, device=input_ids.device)
    seen[:, :width] = True if mask is None else mask.bool()
    # (A copy of one row would keep the strides, and they would be a case of their own to torch.)
    token, position = (x[:, -1:].clone(memory_format=torch.contiguous_format)
                       for x in (input_ids, inputs["position_ids"]))
    stop, drawn = set(generation_config.eos_token_id), [([], [], []) for _ in range(n)]
    lengths = [width] * n if mask is None else mask.sum(1).tolist()
    alive, end = list(range(n)), width
    with compiled_for_one_token(model) if compile_layers else attention(attend):
        while alive:
            block = next_block(BLOCK, model, [(lengths[i], len(drawn[i][0]), caps[i]) for i in alive])
            fixed.begin_block(end - 1, block)
            made = draw_block(model, fixed, seen[:len(alive)], token, position, pick, block)
            made = made if generation_config.do_sample else made[:1]
            end += block
            index = append_block(drawn, alive, made, stop, caps)
            if 0 < len(index) < len(alive):
                kept = torch.tensor(index, device=token.device)
                fixed.keep(kept, end - 1)
                seen[:len(index)] = seen[kept]
                token, position = token[kept], position[kept]
            alive = [alive[j] for j in index]
    return [cut(*lists, stop, cap) for lists, cap in zip(drawn, caps)]


def draw_block(model, fixed, seen, token, position, pick, block) -> list[list]:
    """Draw `block` tokens of every row. Returns what `pick` gives of them, [n][block] each.

    seen: [n, columns] bool, what each row attends to. token, position: [n, 1], the last token of each row. All three
    change in place, as everything must that a replayed graph reads. pick: logits [n, V] -> tokens and more, each [n].
    """
    index, columns = torch.zeros_like(fixed.column), torch.arange(seen.shape[1], device=token.device)
    made = [torch.zeros(len(token), block, dtype=dtype, device=token.device)
            for dtype in (torch.int64, torch.float32, torch.float32)]

    def step():
        seen.index_fill_(1, fixed.column, True)
        masks = layer_masks(model.base_model.config, lambda window: (
            seen if window is None else seen & (columns > fixed.column - window))[:, None, None, :fixed.length])
        logits = model(input_ids=token, attention_mask=masks, position_ids=position, past_key_values=fixed,
                       use_cache=True).logits[:, -1]
        found = pick(logits)
        for into, values in zip(made, found):
            into.index_copy_(1, index, values[:, None].to(into.dtype))
        token.copy_(found[0][:, None])
        for count in (position, fixed.column, index):
            count.add_(1)
        return len(found)

    kinds, replay, left = step(), step, block - 1    # the first token is drawn without a graph, to warm up
    if left and makes_graphs(model):
        if model not in ASKS_THE_HOST:
            ASKS_THE_HOST[model] = asks_the_host(step)
            left -= 1
        if left and not ASKS_THE_HOST[model]:
            try:
                replay = captured(step)
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as error:            # nothing of the step has run
                if isinstance(error.__context__, torch.OutOfMemoryError):    # which the end of a capture may hide
                    raise error.__context__ from error
                ASKS_THE_HOST[model] = True
                no_graph(error)
    for _ in range(left):
        replay()
    if not all(torch.isfinite(values).all() for values in made[1:]):
        raise FloatingPointError("the policy's logits are not finite; a smaller learning rate may help")
    return [values.tolist() for values in made[:kinds]]


@contextmanager
def compiled_for_one_token(model):
    """The layers run compiled until the end of the block, for one token of each row.

    One compilation serves all layers, although they differ in a number (layer_idx), and all sizes: two sizes that
    happen to be equal stay two to the compiler. Under autocast, compiled code would cast the weights anew for every
    token. So those of the linear layers are in its type until the end of the block.
    """
    kind, kept = model.device.type, []
    if torch.is_autocast_enabled(kind) and not isinstance(model, FSDPModule):
        linear = [module for layer in layers_of(model) for module in layer.modules() if isinstance(module, nn.Linear)]
        kept = [(p, p.data) for module in linear for p in module.parameters(recurse=False)]
    try:
        for p, _ in kept:
            p.data = p.data.to(torch.get_autocast_dtype(kind))
        with (compiled_layers(model, attend=attend), torch.fx.experimental._config.patch(use_duck_shape=False),
              torch._dynamo.config.patch(allow_unspec_int_on_nn_module=True)):
            yield
    finally:
        for p, data in kept:
            p.data = data


def makes_graphs(model) -> bool:
    """Is the token step captured? Only on a GPU, and not of a sharded model: a graph would not run its hooks."""
    return model.device.type == "cuda" and not isinstance(model, FSDPModule)


ASKS_THE_HOST = WeakKeyDictionary()                      # model -> no graph can be made of it


def asks_the_host(step) -> bool:
    """Run step(). Does it wait for numbers of the GPU, as some experts do? No CUDA graph can be made of it then.

    A capture that fails would leave its stream and its memory in a state that torch does not recover from. So this is
    found out before. step() may break off within the model, and begins again: what it has written until then, it writes
    once more.
    """
    mode = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
        return False
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        no_graph(error)
    finally:
        torch.cuda.set_sync_debug_mode(mode)
    step()
    return True


def no_graph(why) -> None:
    """Say that sampling goes on without CUDA graphs."""
    warnings.warn(f"no CUDA graph can be made of this model, so sampling is slower: {first_line(why)}", stacklevel=2)


def captured(step):
    """A function that replays the kernels of step()."""
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
    try:
        with torch.cuda.graph(graph):
            step()
    finally:
        torch.cuda.set_stream(stream)                # a capture that fails would leave another one
    return graph.replay


def greedy(logits):
    """The likeliest token of each row, and its logit, which tells whether logits are finite."""
    return logits.max(-1)[::-1]


# ---- before the first step ----

def warm_up(model, compile_layers: bool) -> str | None:
    """Try the loop on the device, and compile what it needs. Returns why it cannot be used so, or None, on all ranks.

    What is drawn from several rows, and from one, is scored by packing.score_rows: both must be one policy. On a GPU
    the types are those of autocast, so the bound is wider than on a CPU. Of random tokens, as the prompts are here,
    real models had gaps of .016 to .07 nats in bf16. A prefix that is one token short made gaps of .27 nats or more.
    """
    gpu = device_of(model).type == "cuda"
    many = 256 if gpu else 1                         # torch chooses kernels by the sizes that it sees first
    vocabulary = model.get_input_embeddings().weight.shape[0]
    ids = torch.randint(vocabulary, (2, 40), generator=torch.Generator().manual_seed(0)).tolist()

    def cannot_draw(prefixes, k, drawn):
        try:
            with precision(model), gathered(model):
                drawn += sample(model, prefixes, k, max_new_tokens=BLOCK + 2, eos_token_id=vocabulary, pad_token_id=0,
                                compile_layers=compile_layers)
        except Exception as error:                   # any type: what a compiler does is not ours to say
            return f"{type(error).__name__}: {first_line(error)}"
        return None

    def differs(prefixes, drawn):
        with torch.no_grad(), gathered(model):
            rows = [pack(prefix, y) for prefix, (y, *_) in zip(prefixes, drawn)]
            logps, _ = Ranks().score(model, rows, 1.0, entropies=False)
        gap = (logps.cpu() - torch.from_numpy(np.concatenate([y.logps for (y, *_) in drawn]))).abs().mean().item()
        if not gap <= (0.25 if gpu else 1e-3):
            return f"the log-probabilities of what it draws differ by {gap:.2g} nats from those of the update"
        return None

    def checks():                                    # apart, as scoring waits for all ranks, and one may have failed
        for prefixes, k in (([ids[0], ids[1][:7]], many), (ids[:1], 1)):
            drawn = []
            yield partial(cannot_draw, prefixes, k, drawn)
            yield partial(differs, prefixes, drawn)

    return first_fault(checks())
