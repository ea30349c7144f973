r"""One row per rollout with all of its branches: the prefix is computed once, not K + 1 times.

    row       [ prompt | response            | branch 1 | ... | branch K ]
    position    0 ..     p ..                  continue from the pivot, every branch anew
    attention   token q sees token k  iff  k <= q and k lies in the prompt, in the response before q's pivot,
                                           or in q's own segment (the response, or its branch)

The first token of a branch is predicted by the last token before its pivot. Log-probabilities and gradients are those
of K + 1 separate rows, to float rounding. In a GSM8K step of the paper's sizes, 290k tokens are computed instead of
776k, if prompts have 110 tokens and responses 220, and 45 % of these fail, with pivots after 154 tokens. Attention in
such a row costs the square of its whole length, which grows with K. Where that is more than the shared prefix saves,
`pack_or_split` makes separate rows.

The mask of a row with branches must never be left out. Otherwise position ids that start again are read as packed
documents, and the prefix is cut off without a warning. Nor may the prefix be shared through `past_key_values` instead,
because gradient checkpointing drops the cache.

    python packing.py        # draws the tree mask of a small row
"""
from bisect import bisect_left
from functools import partial
from itertools import chain, compress, groupby, repeat
from typing import NamedTuple

import numpy as np
import torch
from torch.utils.checkpoint import checkpoint

PROMPT, RESPONSE = 0, 1                  # segment numbers; branch k is segment 1 + k, padding is -1


class Row(NamedTuple):
    """A packed rollout in int64 arrays. The first four run over the row's tokens, the next two over its loss tokens."""
    ids: np.ndarray
    positions: np.ndarray
    segments: np.ndarray
    prefixes: np.ndarray                 # how much of the row each token sees besides its own segment
    targets: np.ndarray                  # the tokens that are scored: response, branch 1, ..., branch K
    predictors: np.ndarray               # the index in the row of the token that predicts each of them
    lengths: list[int]                   # number of loss tokens of the response, of branch 1, ..., of branch K


def pack(prompt: list[int], response: list[int], branches: list[tuple[int, list[int]]] = ()) -> Row:
    """Return one Row from token ids.

    branches: (pivot, suffix) pairs, where pivot is the number of response tokens that are kept. Raises ValueError when
    the prompt is empty or a pivot lies outside of the response.
    """
    if not prompt:
        raise ValueError("prompt must have at least one token, it predicts the first one of the response")
    for pivot, _ in branches:
        if not 0 <= pivot <= len(response):
            raise ValueError(f"pivot must be 0 to the {len(response)} tokens of the response, got {pivot}")
    n, suffixes = len(prompt), [y for _, y in branches]
    counts = np.array([n, len(response), *map(len, suffixes)])                       # tokens of every segment
    starts = counts.cumsum() - counts                                                # where it begins in the row
    # A segment sees the first `prefix` tokens of the row, and its positions go on from there.
    prefix = np.array([n, n, *(n + pivot for pivot, _ in branches)])
    begins = np.array([0, *prefix[1:]])
    ids = np.array([*prompt, *response, *chain(*suffixes)], dtype=np.int64)
    segments = np.arange(len(counts)).repeat(counts)
    index = np.arange(len(ids))
    # A token is predicted by the one before it. The first of a segment is predicted by the last token of its prefix.
    predictors = index[n:] - 1
    full = np.flatnonzero(counts[1:]) + 1                                            # the segments that have tokens
    predictors[starts[full] - n] = prefix[full] - 1
    return Row(ids, index + (begins - starts)[segments], segments, prefix[segments], ids[n:], predictors,
               counts[1:].tolist())


IDLE = pack([0], [])                     # a token without a loss, for a process without rows


def pack_groups(groups, a: float, limit: float = float("inf"), needed: list[list[bool]] | None = None) -> list[Row]:
    """Return the Rows of all rollouts and branches, in order: one per rollout, or more where that is cheaper.

    a, limit: those of pack_or_split. The G responses of a question without any branch are packed as branches of the
    question itself, so the prompt is computed once. needed: for every rollout, are its response and each of its
    branches scored? None: all are. Of a response that is not, only the prefix of its branches stays.
    """
    needed = repeat(None) if needed is None else iter(needed)
    trees = []                                       # (prompt, response, [(pivot, suffix), ...])
    for g in groups:
        scored = []                                  # (response, is it scored?, those of its branches that are)
        for tau in g.trajectories:
            itself, *of_branches = next(needed) or [True] * len(tau.sequences)
            scored.append((tau.response, itself, list(compress(tau.branches, of_branches))))
        if any(branches for *_, branches in scored):
            for response, itself, branches in scored:
                if itself:
                    trees.append((g.prompt, response, branches))
                else:                                # its branches, as those of the question and the prefix
                    for pivot, siblings in groupby(branches, key=lambda branch: branch[0]):
                        trees.append((g.prompt + response[:pivot], *first_and_others(y for _, y in siblings)))
        elif responses := [response for response, itself, _ in scored if itself]:
            trees.append((g.prompt, *first_and_others(responses)))
    return [row for tree in trees for row in pack_or_split(*tree, a, limit)]


def first_and_others(continuations):
    """Several continuations of one prompt as (response, branches at its beginning)."""
    first, *others = continuations
    return first, [(0, y) for y in others]


def attention_length(model) -> float:
    """A: the length of a row, in tokens, at which masked attention costs as much as all matrix products.

    Per token and layer, the matrix products are 2 P operations forward and 4 P backward, with P parameters in a layer.
    Attention in a row of n tokens is 4 n d forward and 10 n d backward (scores are computed again), with
    d = heads * head_dim. The two are equal at n = 3 P / 7 d. This is 7.1k tokens for Qwen2.5-0.5B, 28k for the 7B
    model, and 0.6k for the models of assets/. The layouts that follow from it were timed on a CPU, not on a GPU.
    """
    config, embeddings = model.config, model.get_input_embeddings()
    parameters = sum(p.numel() for p in model.base_model.parameters()) - embeddings.weight.numel()
    return 3 * parameters / (7 * config.num_hidden_layers * config.num_attention_heads * head_dim(config))


def head_dim(config) -> int:
    """The width of one attention head."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def pack_or_split(prompt, response, branches, a: float, limit: float = float("inf")) -> list[Row]:
    """Return one packed Row or, where they cost less, 1 + K rows of one sequence each, in the same order.

    A masked row of n tokens costs n + n^2 / A, in units of the matrix products of a token. A causal row costs
    n + n^2 / 2A, because half of its attention is never computed. a: A, the attention_length of the model. A packed row
    is also never longer than `limit` tokens, because what a micro-batch holds is what memory holds.
    """
    n = len(prompt) + len(response) + sum(len(y) for _, y in branches)
    separate = [len(prompt) + len(response), *(len(prompt) + pivot + len(y) for pivot, y in branches)]
    cheaper = n + n ** 2 / a <= sum(m + m ** 2 / (2 * a) for m in separate)
    if not branches or cheaper and n <= limit:
        return [pack(prompt, response, branches)]
    return [pack(prompt, response), *(pack(prompt + response[:pivot], y) for pivot, y in branches)]


def tree_mask(segments: torch.Tensor, prefixes: torch.Tensor) -> torch.Tensor:
    """[B, L] segment numbers, [B, L] prefixes -> [B, 1, L, L] bool: does token q (dim 2) see token k (dim 3)?

    Every token sees itself, and so does padding, because softmax is undefined on a fully masked row.
    """
    index = torch.arange(segments.shape[1], device=segments.device)
    seen = segments[:, :, None] == segments[:, None, :]                      # (B, L, L): q's own segment,
    seen |= index < prefixes[:, :, None]                                     # up to q's pivot,
    seen &= index[None, :] <= index[:, None]                                 # and not after q
    return seen[:, None]


def layer_masks(config, make):
    """The mask of every kind of layer that a model has: one for all, or {kind: mask} where its layers differ.

    In a layer with a sliding window of n tokens, token q sees only tokens whose position is less than n before its own.
    config: that of the backbone. make(n): the mask of such a layer; n = None is a layer without a window.
    """
    window, kinds = getattr(config, "sliding_window", None), set(getattr(config, "layer_types", None) or ())
    if not window or kinds == {"full_attention"}:
        return make(None)
    return {"full_attention": make(None), "sliding_attention": make(window)} if kinds else make(window)


def tree_masks(config, segments, prefixes, positions):
    """The layer_masks of a batch: tree_mask, and the windows. segments, prefixes, positions: [B, L]."""
    seen = tree_mask(segments, prefixes)

    def make(window):
        if window is None:
            return seen
        return seen & (positions[:, None, :, None] - positions[:, None, None, :] < window)     # (B, 1, L, L)

    return layer_masks(config, make)


def needed_masks(rows, *batch):
    """tree_masks(*batch), or None where no row has branches: plainly causal attention is faster, and no token sees the
    padding at the end."""
    return tree_masks(*batch) if any(len(row.lengths) > 1 for row in rows) else None


def padded(row: Row, multiple: int) -> int:
    """The length of a row that is padded to a multiple of so many tokens."""
    return -(-len(row.ids) // multiple) * multiple


def micro_batches(rows: list[Row], tokens: int | None, ranks: int = 1, multiple: int = 1) -> list[list[int]]:
    """Return the indices of rows, longest first, in batches of at most `tokens` padded tokens (None: one per rank).

    Without rows there are no batches. A row is never cut. One that is longer than `tokens` is a batch of its own. Each
    of several ranks takes every ranks-th batch. The number of batches is therefore a multiple of `ranks`, and they are
    as even as that allows. Where there are fewer rows than batches, the batches at the end are empty. multiple: that of
    batch_tensors().
    """
    if not rows:
        return []
    longest_first = sorted(range(len(rows)), key=lambda i: -len(rows[i].ids))

    def cut(limit):
        batches: list[list[int]] = []
        for i in longest_first:
            longest = padded(rows[batches[-1][0]], multiple) if batches else 0
            if batches and longest * (len(batches[-1]) + 1) <= limit:
                batches[-1].append(i)
            else:
                batches.append([i])
        return batches

    limit = sum(padded(row, multiple) for row in rows) * len(rows) if tokens is None else tokens     # more than all
    batches = cut(limit)
    if ranks > 1:
        wanted = -(-len(batches) // ranks) * ranks
        # The least limit that needs no more batches than these: it spreads the rows evenly over them.
        batches = cut(bisect_left(range(limit), True, key=lambda limit: len(cut(limit)) <= wanted))
        batches += [[] for _ in range(wanted - len(batches))]
    return batches


def batch_tensors(rows: list[Row], device, multiple: int = 1) -> tuple[torch.Tensor, ...]:
    """A batch on the device: ids, positions, segments and prefixes, [B, L], and of its N loss tokens predictors (their
    index in B * L) and targets. L is a multiple of `multiple`."""
    width = max(padded(row, multiple) for row in rows)
    rectangles = np.zeros((4, len(rows), width), dtype=np.int64)
    rectangles[2] = -1                                               # the segment of padding
    for b, row in enumerate(rows):
        rectangles[:, b, :len(row.ids)] = row[:4]
    predictors = np.concatenate([b * width + row.predictors for b, row in enumerate(rows)])
    targets = np.concatenate([row.targets for row in rows])
    both = (torch.from_numpy(array) for array in (rectangles, np.stack([predictors, targets])))
    if torch.device(device).type == "cuda":          # from pinned memory, so that the host does not wait for the GPU
        both = (array.pin_memory() for array in both)
    return tuple(part for array in both for part in array.to(device, non_blocking=True))


def score_tokens(head, hidden, targets, temperature: float, entropies: bool):
    """(log-probabilities, entropies or None), each [n], of the tokens `targets` [n] that follow the states [n, d]."""
    logits = head(hidden)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))                       # (n, V)
    logp = (logits if temperature == 1 else logits / temperature).log_softmax(-1)
    del logits                                       # frees 4 V bytes per token at the peak of memory
    chosen = logp.gather(-1, targets[:, None])[:, 0]
    if not entropies:
        return chosen, None
    with torch.no_grad():                            # last, so that the backward pass does not compute it again
        entropy = -(logp.exp() * logp).sum(-1)       # (under autocast, vecdot would compute in bf16)
    return chosen, entropy


def score_rows(model, rows: list[Row], temperature: float = 1.0, chunk: int = 4096, entropies: bool = True,
               masks=needed_masks, score_tokens=score_tokens, multiple: int = 1):
    """Return (log-probabilities, entropies), each [loss tokens of all rows, in order], in nats, in fp32 at least.

    They are those of the policy softmax(logits / temperature), from which sample() draws. Entropies carry no gradient;
    with entropies=False there is None in their place. The backbone runs once. The head then sees loss tokens only,
    `chunk` at a time, and computes all chunks but the last again in the backward pass. The reason is memory: the logits
    of all tokens would cost 2.4 MB per token with a vocabulary of 151,936. Without rows, one idle token is computed and
    the results are empty, because under FSDP every process has to take part in every forward and backward pass.

    masks, score_tokens, multiple: trainer/compiling.py replaces these two functions by faster ones for GPUs, which need
    rows that are padded to a multiple of some tokens. Raises ValueError when the attention of the model is not sdpa, or
    when the model changes its logits after the head.
    """
    rows = rows or [IDLE]
    if model.config._attn_implementation != "sdpa":
        raise ValueError("packed rows need a model loaded with attn_implementation='sdpa', "
                         f"got {model.config._attn_implementation!r}")
    for name in ("final_logit_softcapping", "logits_scaling", "logit_scale"):        # Gemma, Granite, Cohere
        if getattr(model.config, name, None) not in (None, 1):
            raise ValueError(f"this model changes its logits after the head ({name}), which is not done here: it "
                             "would be scored as another policy than the one that is sampled")
    ids, positions, segments, prefixes, predictors, targets = batch_tensors(rows, model.device, multiple)
    mask = masks(rows, model.base_model.config, segments, prefixes, positions)
    hidden = model.base_model(input_ids=ids, position_ids=None if mask is None else positions, attention_mask=mask,
                              use_cache=False).last_hidden_state                               # (B, L, d)
    hidden = hidden.flatten(0, 1)                                                              # (B * L, d)

    # The last chunk is the first one of the backward pass, so keeping it takes no more memory than computing it again.
    score = partial(score_tokens, model.get_output_embeddings(), temperature=temperature, entropies=entropies)
    # (A part of a tensor would be another case to torch.compile than the whole, so each chunk is a tensor of its own.)
    chunks = [(hidden[i], y.clone()) for i, y in zip(predictors.split(chunk), targets.split(chunk))]
    again = [torch.is_grad_enabled() and i < len(chunks) - 1 for i in range(len(chunks))]
    pairs = [checkpoint(score, *c, use_reentrant=False) if r else score(*c) for c, r in zip(chunks, again)]
    logps, found = zip(*pairs)
    return torch.cat(logps), torch.cat(found) if entropies else None


def batch_costs(rows: list[Row], batches: list[list[int]], ranks: int = 1, multiple: int = 1) -> dict:
    """Return what the micro-batches cost: forwarded_tokens, padding (its share of what is computed), and imbalance.

    In every round each rank takes one micro-batch and waits for the largest. imbalance is the sum of these largest
    over the mean load of a rank. It is 1 when all ranks have the same load. multiple: that of batch_tensors().
    """
    if not rows:
        return {"forwarded_tokens": 0, "padding": 0.0, "imbalance": 1.0}
    forwarded = sum(len(row.ids) for row in rows)
    loads = [len(batch) * padded(rows[batch[0]], multiple) if batch else 0 for batch in batches]     # longest row first
    rounds = [loads[i:i + ranks] for i in range(0, len(loads), ranks)]                       # one batch per rank
    return {"forwarded_tokens": forwarded, "padding": 1 - forwarded / sum(loads),
            "imbalance": sum(map(max, rounds)) * ranks / sum(loads)}


class Alone:
    """How micro-batches are divided when there is one process: it has all of them, and its sums are the sums of all.

    trainer.model.Ranks does the same for several processes.
    """
    size = 1
    multiple = 1                                     # rows are padded to a multiple of so many tokens

    def mine(self, batches):
        """The micro-batches that this process computes."""
        return batches

    def total(self, value):
        """The sum of a tensor over all processes."""
        return value

    def score(self, model, rows, temperature, entropies=True):
        """score_rows() with these arguments."""
        return score_rows(model, rows, temperature, entropies=entropies)


if __name__ == "__main__":
    row = pack(prompt=[1, 2], response=[3, 4, 5, 6], branches=[(2, [7, 8]), (2, [9])])
    names = "P" * 2 + "R" * 4 + "1" * 2 + "2"
    print("P is the prompt, R the response (with a pivot after 2 tokens), 1 and 2 are its branches.\n"
          "Each line is a token, and # marks the tokens that it attends to.\n")
    print("   position  ", " ".join(names))
    _, positions, segments, prefixes, *_ = batch_tensors([row], "cpu")
    seen = tree_mask(segments, prefixes)[0, 0]
    for name, position, line in zip(names, positions[0].tolist(), seen.tolist()):
        print(f" {name} {position:8d}   ", " ".join("#" if x else "." for x in line))
    print("\nThe tokens            ", row.targets.tolist(), "\nare predicted at index", row.predictors.tolist())
