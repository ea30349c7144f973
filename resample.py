r"""Sampling: one function draws G rollouts from a question and K branches from a pivot.

All of training and evaluation samples through this one function, `sample`.

Dense resampling (arXiv 2602.14169, section on pivot-driven resampling) draws all K continuations from one state, so
that state is computed once. Every prefix is prefilled once, and its key/value cache is repeated k times. All N * k rows
of a step then decode together, because on a GPU a decoding step costs about the same for 8 rows as for 512.

By itself, `generate` goes on with padding for every row that has ended, until the longest row ends. It is therefore
called for 16 tokens at a time. In between, the rows that have ended leave the batch and the cache. On a CPU, with
lengths as on GSM8K, this gives 1.2 times the tokens per second (`python -m experiments.speed generation`). With longer
tails it gives more. On a GPU, trainer/decoding.py puts a faster loop in the place of `generate_rows`.

The sampled distribution is exactly softmax(logits / T), the policy that loss.py scores. Checkpoints carry a
generation_config (Qwen2.5-Instruct: repetition_penalty 1.1, top_k 20, ...), and `generate` takes over its values for
whatever the caller leaves unset. It is therefore replaced by an empty one here, and everything that changes the
distribution is set.
"""
import warnings

import numpy as np
import torch
from transformers import DynamicCache, GenerationConfig, LogitsProcessor, LogitsProcessorList

BLOCK = 16                               # tokens between two looks at which rows have ended


class Continuation(list):
    """The token ids of a continuation, with their log-probabilities and entropies when they were drawn.

    logps: log softmax(logits / T) of the tokens. entropies: those of the distributions that they were drawn from. Both
    are in nats, float32 [tokens]. They are None after greedy decoding.
    """

    def __init__(self, ids, logps=None, entropies=None):
        super().__init__(ids)
        self.logps = None if logps is None else np.asarray(logps, dtype=np.float32)
        self.entropies = None if entropies is None else np.asarray(entropies, dtype=np.float32)


def sample(model, prefixes: list[list[int]], k: int | list[int], *, max_new_tokens: int | list[int],
           eos_token_id: int | list[int], pad_token_id: int, temperature: float = 1.0,
           draw_rows=None) -> list[list[Continuation]]:
    """Draw k continuations of each prefix from softmax(logits / temperature). Temperature 0 is greedy.

    prefixes: N lists of token ids, of any lengths. k, max_new_tokens: one number, or one for each prefix. Returns
    [N][k] lists of new token ids. When a stop id was reached, it is kept, and nothing follows it. Otherwise the list is
    as long as its cap. The randomness is that of torch's global generator. When a GPU runs out of memory, the rows are
    split in halves, with a warning. The model comes back in the mode it was in. draw_rows: another function in the
    place of generate_rows. Raises ValueError for impossible arguments, and FloatingPointError when logits are not
    finite.
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
    settings = dict(eos_token_id=sorted(stop), pad_token_id=pad_token_id, do_sample=temperature > 0,
                    repetition_penalty=1.0, use_cache=True, return_dict_in_generate=True)
    if temperature > 0:
        settings |= dict(temperature=float(temperature), top_k=0, top_p=1.0)

    was_training, own_config = model.training, model.generation_config
    model.eval()                                     # without dropout; checkpointing would switch the cache off
    model.generation_config = GenerationConfig()     # `generate` must not inherit its values
    try:
        rows = [n for n, count in enumerate(counts) for _ in range(count)]
        drawn = iter(_continue_rows(draw_rows or generate_rows, model, prefixes, rows, caps, settings))
    finally:
        model.generation_config = own_config
        model.train(was_training)
    return [[next(drawn) for _ in range(count)] for count in counts]


def _continue_rows(draw_rows, model, prefixes, rows, caps, settings):
    """Return one continuation for each entry of `rows`, which are indices into prefixes and caps."""
    drawn, size = [], len(rows)
    while len(drawn) < len(rows):
        part = rows[len(drawn):len(drawn) + size]
        try:
            drawn += draw_rows(model, prefixes, part, caps, settings)
            continue
        except torch.OutOfMemoryError as error:
            tried = getattr(error, "rows", len(part))
            if tried == 1:
                raise
        # This is outside of the except block, where the traceback would keep the failed attempt's tensors alive.
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        size = tried // 2                            # for the rest of this call
        warnings.warn(f"out of memory while generating {tried} sequences at once; going on with {size}", stacklevel=3)
    return drawn


@torch.no_grad()
def generate_rows(model, prefixes, rows, caps, settings) -> list[Continuation]:
    """Continue all rows together: each distinct prefix is prefilled once, then `generate` works block by block.

    rows: indices into prefixes and caps. settings: those of a GenerationConfig. Another function in the place of this
    one may continue only the first of the rows, and is then called again for the others. The attribute `rows` of its
    OutOfMemoryError is the number of rows that it tried.
    """
    used, stop = sorted(set(rows)), set(settings["eos_token_id"])
    ids, mask, cache = prefill(model, [prefixes[n] for n in used], settings["pad_token_id"])
    drawn = [([], [], []) for _ in rows]             # tokens, log-probabilities, entropies
    alive = list(range(len(rows)))                   # the rows that have not ended ...
    index = [used.index(n) for n in rows]            # ... and where in the batch each of them stands
    while alive:
        index = torch.tensor(index, device=model.device)
        ids, mask = ids[index], mask[index]
        if cache is not None:
            cache.batch_select_indices(index)        # at first (len(used), ...) -> (len(rows), ...)
        block = next_block(BLOCK, model, [(len(prefixes[rows[i]]), len(drawn[i][0]), caps[rows[i]]) for i in alive])
        witness = Witness(settings.get("temperature"))
        out = model.generate(ids, attention_mask=mask, past_key_values=cache, synced_gpus=False,
                             generation_config=GenerationConfig(max_new_tokens=block, **settings),
                             logits_processor=LogitsProcessorList([witness]))
        new, cache = out.sequences[:, ids.shape[1]:], out.past_key_values
        ids, mask = out.sequences, torch.cat([mask, torch.ones_like(new)], 1)
        index = append_block(drawn, alive, [new.tolist(), *witness.report(new)], stop, [caps[n] for n in rows])
        alive = [alive[j] for j in index]
    return [cut(*lists, stop, caps[n]) for lists, n in zip(drawn, rows)]


def next_block(block, model, rows) -> int:
    """How many tokens are drawn before the next look, at most `block`. rows: (prefix, drawn, cap) in tokens.

    A row that reaches its cap goes on until the next look. What it draws then is cut off, but it must not go beyond
    the last position of the model, because learned positions end there.
    """
    context = getattr(model.config, "max_position_embeddings", None) or float("inf")
    most = max(cap - drawn for _, drawn, cap in rows)
    return min(block, most, max(1, context - max(prefix + drawn for prefix, drawn, _ in rows)))


def prefill(model, prefixes, pad_token_id):
    """(ids, mask, cache) of N prefixes: those of left_padded(), and the keys and values of all tokens but the last.

    The last token is left to the decoding, because `generate` would otherwise silently process the prompt twice. Where
    all prefixes have one token, the cache is None.
    """
    ids, mask = left_padded(prefixes, pad_token_id, model.device)
    if ids.shape[1] == 1:
        return ids, mask, None
    cache, positions = Cache(config=model.config), (mask.cumsum(-1) - 1).clamp(min=0)
    out = model(input_ids=ids[:, :-1], attention_mask=mask[:, :-1], position_ids=positions[:, :-1],
                past_key_values=cache, use_cache=True, logits_to_keep=1)
    if not torch.isfinite(out.logits).all():         # multinomial would raise an obscure error
        raise FloatingPointError("the policy's logits are not finite; a smaller learning rate may help")
    return ids, mask, cache


def left_padded(prefixes, pad_token_id, device):
    """(ids, mask) of N prefixes, [N, longest]. Padding on the left puts all next tokens in one column."""
    width = max(map(len, prefixes))
    ids = torch.tensor([[pad_token_id] * (width - len(prefix)) + prefix for prefix in prefixes], device=device)
    padding = torch.tensor([[width - len(prefix)] for prefix in prefixes], device=device)
    return ids, (torch.arange(width, device=device) >= padding).long()   # by length: a prefix may have the pad id


class Cache(DynamicCache):
    """Keys and values, kept in the type in which attention reads them."""

    def update(self, key_states, value_states, *args, **kwargs):
        """Append the keys and values of a layer, as those of transformers do."""
        return super().update(as_read(key_states), as_read(value_states), *args, **kwargs)


def as_read(states):
    """Keys or values in the type in which attention reads them.

    Under autocast they come in fp32, because rotary positions are in fp32. A plain cache would keep all of them so, and
    cast all of them again for every token.
    """
    kind = states.device.type
    return states.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else states


class Witness(LogitsProcessor):
    """Watches `generate` draw n rows at temperature T, and changes nothing. With T = None (greedy) it sees nothing."""

    def __init__(self, temperature):
        self.temperature, self.logps, self.entropies, self.last = temperature, [], [], None

    def __call__(self, input_ids, scores):
        """scores: the logits [n, V] of the next tokens, before the temperature. The last of input_ids is drawn."""
        if self.temperature is not None:
            self.note(input_ids[:, -1])
            self.last = (scores if self.temperature == 1 else scores / self.temperature).log_softmax(-1)
            self.entropies.append(-self.last.exp().mul_(self.last).sum(-1))
        return scores

    def note(self, tokens):
        """These tokens [n] were drawn from the last distributions."""
        if self.last is not None:
            self.logps.append(self.last.gather(-1, tokens[:, None])[:, 0])

    def report(self, tokens):
        """[logps, entropies] of the tokens [n, block], which are all that were drawn; [] after greedy decoding."""
        self.note(tokens[:, -1])
        return [torch.stack(column, 1).tolist() for column in (self.logps, self.entropies) if column]


def append_block(drawn, alive, columns, stop, caps) -> list[int]:
    """Append a block to the rows that are alive. Returns where in the batch those stand that go on.

    drawn: three lists for each row. alive: indices into drawn and caps. columns: tokens, log-probabilities and
    entropies of the block (greedy: only tokens), each [alive][block].
    """
    for j, i in enumerate(alive):
        for values, column in zip(drawn[i], columns):
            values += column[j]
    return [j for j, i in enumerate(alive) if not stop & set(columns[0][j]) and len(drawn[i][0]) < caps[i]]


def cut(tokens, logps, entropies, stop, cap) -> Continuation:
    """The tokens up to the first stop id, and at most `cap` of them."""
    n = next((t + 1 for t, token in enumerate(tokens[:cap]) if token in stop), cap)
    return Continuation(tokens[:n], logps[:n] or None, entropies[:n] or None)
