r"""One row per rollout with all of its branches: the prefix is computed once, not K + 1 times.

    row       [ prompt | response            | branch 1 | ... | branch K ]
    position    0 ..     p ..                  continue from the pivot, every branch anew
    attention   token q sees token k  iff  k <= q and k lies in the prompt, in the response before q's pivot,
                                           or in q's own segment (the response, or its branch)

The first token of a branch is predicted by the last token before its pivot. Log-probabilities and gradients
are those of K + 1 separate rows to float rounding; in a GSM8K step of the paper's sizes 290k tokens are
computed instead of 776k. Attention in such a row costs the square of its whole length, which grows with K:
where that is more than the shared prefix saves, `pack_or_split` makes separate rows.

Never leave out the mask of a row with branches (position ids that start again are otherwise read as packed
documents, and the prefix is cut off without a warning), and never share the prefix through `past_key_values`
instead (gradient checkpointing drops the cache).

    python packing.py        # draws the tree mask of a small row
"""
from bisect import bisect_left
from typing import NamedTuple

import torch
from torch.utils.checkpoint import checkpoint

PROMPT, RESPONSE = 0, 1                  # segment numbers; branch k is segment 1 + k, padding is -1


class Row(NamedTuple):
    """A packed rollout. Lists over tokens, then over loss tokens (response, branch 1, ..., branch K)."""
    ids: list[int]
    positions: list[int]
    segments: list[int]
    prefixes: list[int]                  # what each sees besides its segment: prompt, response up to its pivot
    targets: list[int]                   # the tokens that are scored ...
    predictors: list[int]                # ... and the index in the row of the token that predicts each
    lengths: list[int]                   # loss tokens of each sequence: the response, branch 1, ..., branch K


def pack(prompt, response, pivot=None, branches=()) -> Row:
    """One Row from token ids; pivot: number of response tokens that the branches (if there are any) keep.

    With a list of pivots the first of them has the first branches, and all have equally many.
    """
    if not prompt:
        raise ValueError("prompt must have at least one token, it predicts the first one of the response")
    forks = fork_points(pivot, branches)
    if len(forks) != len(branches):
        raise ValueError(f"branches must be equally many for each pivot, got {len(branches)} for pivot {pivot}")
    if not all(fork is not None and 0 <= fork <= len(response) for fork in forks):
        raise ValueError(f"pivot must be 0 to the {len(response)} tokens of the response when there are "
                         f"branches, got {pivot}")
    ids, positions = [*prompt], [*range(len(prompt))]
    segments, targets, predictors = [PROMPT] * len(prompt), [], []
    prefixes = [len(prompt)] * len(prompt)
    for segment, (fork, tokens) in enumerate([(0, response), *zip(forks, branches)], start=RESPONSE):
        parent = len(prompt) + fork                  # tokens that this one continues
        predictors += [parent - 1, *range(len(ids), len(ids) + len(tokens) - 1)][:len(tokens)]
        positions += range(parent, parent + len(tokens))
        segments += [segment] * len(tokens)
        prefixes += [parent] * len(tokens)
        targets += tokens
        ids += tokens
    return Row(ids, positions, segments, prefixes, targets, predictors, [len(y) for y in (response, *branches)])


def fork_points(pivot, branches) -> list[int]:
    """The pivot of each branch, from one for all or a list of them."""
    pivots = pivot if isinstance(pivot, list) else [pivot]
    return [p for p in pivots for _ in range(len(branches) // len(pivots))]


def attention_length(model) -> float:
    """A: the length of a row, in tokens, at which masked attention costs as much as all matrix products.

    Per token and layer those are 2 P operations forward and 4 P backward, P parameters; attention in a row of
    n tokens is 4 n d forward and 10 n d backward (scores are computed again), d = heads * head_dim. Equal at
    n = 3 P / 7 d: 7.1k for Qwen2.5-0.5B, 28k for 7B, .6k for the models of assets/.
    """
    config, embeddings = model.config, model.get_input_embeddings()
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    parameters = sum(p.numel() for p in model.base_model.parameters()) - embeddings.weight.numel()
    return 3 * parameters / (7 * config.num_hidden_layers * config.num_attention_heads * head_dim)


def pack_or_split(prompt, response, pivot, branches, a: float, limit: float = float("inf")) -> list[Row]:
    """One packed Row or, where those cost less, 1 + K rows of one sequence each, in the same order.

    The rule: a masked row of n tokens costs n + n^2 / A, a causal one, half of which is never computed,
    n + n^2 / 2A, in units of the matrix products of a token. a: A, the attention_length of the model. A packed
    row is also never longer than `limit` tokens: what a micro-batch holds is what memory holds.
    """
    row = pack(prompt, response, pivot, branches)
    n = len(row.ids)
    forks = fork_points(pivot, branches)
    separate = [len(prompt) + len(response), *(len(prompt) + p + len(y) for p, y in zip(forks, branches))]
    cheaper = n + n ** 2 / a <= sum(m + m ** 2 / (2 * a) for m in separate)
    if not branches or cheaper and n <= limit:
        return [row]
    return [pack(prompt, response), *(pack(prompt + response[:p], y) for p, y in zip(forks, branches))]


def tree_mask(segments: torch.Tensor, prefixes: torch.Tensor) -> torch.Tensor:
    """[B, L] segment numbers, [B, L] prefixes -> [B, 1, L, L] bool: does token q (dim 2) see k (dim 3)?

    Every token sees itself, padding too: a fully masked row would be undefined in softmax.
    """
    index = torch.arange(segments.shape[1], device=segments.device)
    seen = segments[:, :, None] == segments[:, None, :]                      # (B, L, L): q's own segment,
    seen |= index < prefixes[:, :, None]                                     # up to q's pivot,
    seen &= index[None, :] <= index[:, None]                                 # and not after q
    return seen[:, None]


def micro_batches(rows: list[Row], tokens: int | None, ranks: int = 1) -> list[list[int]]:
    """Indices of rows, longest first, in batches of at most `tokens` padded tokens (None: one batch per rank).

    A row is never cut: one that is longer than `tokens` is a batch of its own. With several ranks, of which each
    takes every ranks-th batch, their number is a multiple of `ranks`, and the batches are as even as that allows;
    those at the end are empty where there are fewer rows than batches.
    """
    longest_first = sorted(range(len(rows)), key=lambda i: -len(rows[i].ids))

    def cut(limit):
        batches: list[list[int]] = []
        for i in longest_first:
            longest = len(rows[batches[-1][0]].ids) if batches else 0
            if batches and longest * (len(batches[-1]) + 1) <= limit:
                batches[-1].append(i)
            else:
                batches.append([i])
        return batches

    limit = sum(len(row.ids) for row in rows) * len(rows) if tokens is None else tokens      # more than all of them
    batches = cut(limit)
    if ranks > 1:
        wanted = -(-len(batches) // ranks) * ranks
        # The least limit that needs no more batches than these: it spreads the rows evenly over them.
        batches = cut(bisect_left(range(limit), True, key=lambda limit: len(cut(limit)) <= wanted))
        batches += [[] for _ in range(wanted - len(batches))]
    return batches


def score_rows(model, rows: list[Row], temperature: float = 1.0, chunk: int = 4096):
    """(log-probabilities, entropies), each [loss tokens of all rows, in order], in nats, in fp32 at least.

    Of the policy softmax(logits / temperature), the one that sample() draws from; entropies carry no
    gradient. One forward of the backbone; the head then sees loss tokens only, `chunk` at a time, and
    computes them again in the backward pass (but for the last chunk): logits of all tokens would cost 2.4 MB
    per token with a vocabulary of 151,936.
    """
    if model.config._attn_implementation != "sdpa":
        raise ValueError("packed rows need a model loaded with attn_implementation='sdpa', "
                         f"got {model.config._attn_implementation!r}")
    for name in ("final_logit_softcapping", "logits_scaling", "logit_scale"):        # Gemma, Granite, Cohere
        if getattr(model.config, name, None) not in (None, 1):
            raise ValueError(f"this model changes its logits after the head ({name}), which is not done here: it "
                             "would be scored as another policy than the one that is sampled")
    width = max(len(row.ids) for row in rows)

    def padded(lists, value):
        rectangle = [[*x, *[value] * (width - len(x))] for x in lists]                         # (B, L)
        return torch.tensor(rectangle, device=model.device)

    positions = mask = None
    if any(len(row.lengths) > 1 for row in rows):
        positions, segments = padded([r.positions for r in rows], 0), padded([r.segments for r in rows], -1)
        mask = tree_mask(segments, padded([r.prefixes for r in rows], 0))
    # Without branches attention is plainly causal, and faster so; the padding at the end is seen by no token.
    hidden = model.base_model(input_ids=padded([r.ids for r in rows], 0), position_ids=positions,
                              attention_mask=mask, use_cache=False).last_hidden_state          # (B, L, d)
    predictors = [b * width + i for b, row in enumerate(rows) for i in row.predictors]
    hidden = hidden.flatten(0, 1)[torch.tensor(predictors, dtype=torch.long, device=model.device)]           # (N, d)
    targets = torch.tensor([t for row in rows for t in row.targets], dtype=torch.long, device=model.device)    # (N,)
    head = model.get_output_embeddings()

    def score(x, target):
        logits = head(x)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))                   # (n, V)
        logp = (logits if temperature == 1 else logits / temperature).log_softmax(-1)
        del logits                                   # 4 V bytes per token, at the peak of memory
        chosen = logp.gather(-1, target[:, None])[:, 0]
        with torch.no_grad():                        # after all that backward needs: it is not computed again
            entropy = -(logp.exp() * logp).sum(-1)   # (vecdot is a bf16 operation under autocast)
        return chosen, entropy

    # The last chunk is the first of the backward pass: to keep it takes no more memory than to compute it again.
    chunks = list(zip(hidden.split(chunk), targets.split(chunk)))
    again = [torch.is_grad_enabled() and i < len(chunks) - 1 for i in range(len(chunks))]
    pairs = [checkpoint(score, *c, use_reentrant=False) if r else score(*c) for c, r in zip(chunks, again)]
    return torch.cat([logp for logp, _ in pairs]), torch.cat([entropy for _, entropy in pairs])


if __name__ == "__main__":
    row = pack(prompt=[1, 2], response=[3, 4, 5, 6], pivot=2, branches=[[7, 8], [9]])
    names = "P" * 2 + "R" * 4 + "1" * 2 + "2"
    print("P prompt, R response (pivot after 2 tokens), 1 and 2 its branches; "
          "a line is a token, # what it attends to\n")
    print("   position  ", " ".join(names))
    seen = tree_mask(torch.tensor([row.segments]), torch.tensor([row.prefixes]))[0, 0]
    for name, position, line in zip(names, row.positions, seen.tolist()):
        print(f" {name} {position:8d}   ", " ".join("#" if x else "." for x in line))
    print("\ntoken", row.targets, "\nis predicted at index", row.predictors)
