r"""Sampling: one function draws G rollouts from a question and K branches from a pivot.

This function, `sample`, is the only one in training and evaluation that calls `generate` of transformers.

Dense resampling (arXiv 2602.14169, section on pivot-driven resampling) draws all K continuations from one state, so
that state is computed once. Every prefix is prefilled once, and its key/value cache is repeated k times. All N * k rows
of a step then decode together, because on a GPU a decoding step costs about the same for 8 rows as for 512.

By itself, `generate` goes on with padding for every row that has ended, until the longest row ends. It is therefore
called for 16 tokens at a time. In between, the rows that have ended leave the batch and the cache. On a CPU, with
lengths as on GSM8K, this gives 1.2 times the tokens per second (`python -m experiments.speed generation`). With longer
tails it gives more.

The sampled distribution is exactly softmax(logits / T), the policy that loss.py scores. Checkpoints carry a
generation_config (Qwen2.5-Instruct: repetition_penalty 1.1, top_k 20, ...), and `generate` takes over its values for
whatever the caller leaves unset. It is therefore replaced by an empty one here, and everything that changes the
distribution is set.
"""
import warnings

import torch
from transformers import DynamicCache, GenerationConfig

BLOCK = 16                               # tokens between two looks at which rows have ended


class Cache(DynamicCache):
    """Keys and values, kept in the type in which attention reads them.

    Under autocast they come in fp32, because rotary positions are in fp32. A plain cache would keep all of them so, and
    cast all of them again for every token.
    """

    def update(self, key_states, value_states, *args, **kwargs):
        """Append the keys and values of a layer, as those of transformers do."""
        kind = key_states.device.type
        if torch.is_autocast_enabled(kind):
            dtype = torch.get_autocast_dtype(kind)
            key_states, value_states = key_states.to(dtype), value_states.to(dtype)
        return super().update(key_states, value_states, *args, **kwargs)


def sample(model, prefixes: list[list[int]], k: int | list[int], *, max_new_tokens: int | list[int],
           eos_token_id: int | list[int], pad_token_id: int, temperature: float = 1.0) -> list[list[list[int]]]:
    """Draw k continuations of each prefix from softmax(logits / temperature). Temperature 0 is greedy.

    prefixes: N lists of token ids, of any lengths. k, max_new_tokens: one number, or one for each prefix. Returns
    [N][k] lists of new token ids. When a stop id was reached, it is kept, and nothing follows it. Otherwise the list is
    as long as its cap. The randomness is that of torch's global generator. When a GPU runs out of memory, the rows are
    split in halves, with a warning. The model comes back in the mode it was in. Raises ValueError for impossible
    arguments, and FloatingPointError when logits are not finite.
    """
    stop = {eos_token_id} if isinstance(eos_token_id, int) else set(eos_token_id)
    counts = [k] * len(prefixes) if isinstance(k, int) else list(k)
    caps = [max_new_tokens] * len(prefixes) if isinstance(max_new_tokens, int) else list(max_new_tokens)
    if not stop:
        raise ValueError("eos_token_id must name at least one stop id, got an empty list")
    if any(len(prefix) == 0 for prefix in prefixes):
        empty = [len(prefix) for prefix in prefixes].index(0)
        raise ValueError(f"prefixes must not be empty, got one at index {empty}")
    if len(counts) != len(prefixes) or any(count < 1 for count in counts):
        raise ValueError("k must be at least 1 continuation, and one number or one for each of the "
                         f"{len(prefixes)} prefixes, got {k}")
    if len(caps) != len(prefixes) or any(cap < 1 for cap in caps):
        raise ValueError("max_new_tokens must be at least 1, and one number or one for each of the "
                         f"{len(prefixes)} prefixes, got {max_new_tokens}")
    if not 0 <= temperature < float("inf"):
        raise ValueError(f"temperature must be 0 (greedy) or positive, got {temperature}")
    settings = dict(eos_token_id=sorted(stop), pad_token_id=pad_token_id, do_sample=temperature > 0, top_k=0,
                    top_p=1.0, repetition_penalty=1.0, use_cache=True, return_dict_in_generate=True)
    if temperature > 0:
        settings["temperature"] = float(temperature)

    was_training, own_config = model.training, model.generation_config
    model.eval()                                     # without dropout; checkpointing would switch the cache off
    model.generation_config = GenerationConfig()     # `generate` must not inherit its values
    try:
        rows = [n for n, count in enumerate(counts) for _ in range(count)]
        tails = iter(_continue_rows(model, prefixes, rows, caps, settings))
    finally:
        model.generation_config = own_config
        model.train(was_training)
    return [[next(tails) for _ in range(count)] for count in counts]


def _continue_rows(model, prefixes, rows, caps, settings):
    """Return one continuation for each entry of `rows`, which are indices into prefixes and caps."""
    tails, size = [], len(rows)
    while len(tails) < len(rows):
        part = rows[len(tails):len(tails) + size]
        try:
            tails += _generate(model, prefixes, part, caps, settings)
            continue
        except torch.OutOfMemoryError:
            if len(part) == 1:
                raise
        # This is outside of the except block, where the traceback would keep the failed attempt's tensors alive.
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        size = len(part) // 2                        # for the rest of this call
        warnings.warn(f"out of memory while generating {len(part)} sequences at once; going on with {size}",
                      stacklevel=3)
    return tails


@torch.no_grad()
def _generate(model, prefixes, rows, caps, settings):
    """Continue all rows together: each distinct prefix is prefilled once, then `generate` works block by block."""
    used = sorted(set(rows))
    width = max(len(prefixes[n]) for n in used)
    ids = torch.full((len(used), width), settings["pad_token_id"], device=model.device)
    mask = torch.zeros_like(ids)
    for i, n in enumerate(used):                     # left padding puts all next tokens in one column
        ids[i, width - len(prefixes[n]):] = torch.tensor(prefixes[n], device=model.device)
        mask[i, width - len(prefixes[n]):] = 1       # by length, because a prefix may contain the pad id

    cache = None
    if width > 1:
        # The last token is left to `generate`, which would otherwise silently process the prompt twice.
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        cache = Cache(config=model.config)
        out = model(input_ids=ids[:, :-1], attention_mask=mask[:, :-1], position_ids=positions[:, :-1],
                    past_key_values=cache, use_cache=True, logits_to_keep=1)
        if not torch.isfinite(out.logits).all():     # multinomial would raise an obscure error
            raise FloatingPointError("the policy's logits are not finite; a smaller learning rate may help")

    tails = [[] for _ in rows]
    alive = list(range(len(rows)))                   # the rows that have not ended ...
    index = [used.index(n) for n in rows]            # ... and where in the batch each of them stands
    while alive:
        index = torch.tensor(index, device=model.device)
        ids, mask = ids[index], mask[index]
        if cache is not None:
            cache.batch_select_indices(index)        # at first (len(used), ...) -> (len(rows), ...)
        block = min(BLOCK, max(caps[rows[i]] - len(tails[i]) for i in alive))
        out = model.generate(ids, attention_mask=mask, past_key_values=cache, synced_gpus=False,
                             generation_config=GenerationConfig(max_new_tokens=block, **settings))
        new, cache = out.sequences[:, ids.shape[1]:], out.past_key_values
        ids, mask = out.sequences, torch.cat([mask, torch.ones_like(new)], 1)
        for i, tokens in zip(alive, new.tolist()):
            tails[i] += _cut_after_stop(tokens, settings["eos_token_id"])[:caps[rows[i]] - len(tails[i])]
        index = [j for j, i in enumerate(alive)
                 if tails[i][-1] not in settings["eos_token_id"] and len(tails[i]) < caps[rows[i]]]
        alive = [alive[j] for j in index]
    return tails


def _cut_after_stop(tail, stop):
    """The tokens up to and including the first stop id."""
    for t, token in enumerate(tail):
        if token in stop:
            return tail[:t + 1]
    return tail
