r"""One row per rollout with all of its branches: the prefix is computed once, not K + 1 times.

    row       [ prompt | response            | branch 1 | ... | branch K ]
    position    0 ..     p ..                  continue from the pivot, every branch anew
    attention   token q sees token k  iff  k <= q and k lies in the prompt, in the response before the pivot,
                                           or in q's own segment (the response, or its branch)

The first token of a branch is predicted by the last token before the pivot. Log-probabilities and gradients
are those of K + 1 separate rows to float rounding; in a GSM8K step of the paper's sizes 290k tokens are
computed instead of 776k.

Never leave the mask out (position ids that start again are otherwise read as packed documents, and the prefix
is cut off without a warning), and never share the prefix through `past_key_values` instead (gradient
checkpointing drops the cache).

    python packing.py        # draws the tree mask of a small row
"""
from typing import NamedTuple

import torch
from torch.utils.checkpoint import checkpoint

PROMPT, RESPONSE = 0, 1                  # segment numbers; branch k is segment 1 + k, padding is -1


class Row(NamedTuple):
    """A packed rollout. Lists over tokens, then over loss tokens (response, branch 1, ..., branch K)."""
    ids: list[int]
    positions: list[int]
    segments: list[int]
    prefix_length: int                   # prompt and response up to the pivot: what branches see
    targets: list[int]                   # the tokens that are scored ...
    predictors: list[int]                # ... and the index in the row of the token that predicts each


def pack(prompt, response, pivot=None, branches=()) -> Row:
    """One Row from token ids; pivot: number of response tokens that the branches (if there are any) keep."""
    if not prompt:
        raise ValueError("prompt must have at least one token, it predicts the first one of the response")
    if branches and not (pivot is not None and 0 <= pivot <= len(response)):
        raise ValueError(f"pivot must be 0 to the {len(response)} tokens of the response when there are "
                         f"branches, got {pivot}")
    prefix = len(prompt) + (pivot or 0)
    ids, positions = [*prompt], [*range(len(prompt))]
    segments, targets, predictors = [PROMPT] * len(prompt), [], []
    for segment, tokens in enumerate([response, *branches], start=RESPONSE):
        parent = len(prompt) if segment == RESPONSE else prefix              # tokens that this one continues
        predictors += [parent - 1, *range(len(ids), len(ids) + len(tokens) - 1)][:len(tokens)]
        positions += range(parent, parent + len(tokens))
        segments += [segment] * len(tokens)
        targets += tokens
        ids += tokens
    return Row(ids, positions, segments, prefix, targets, predictors)


def tree_mask(segments: torch.Tensor, prefix_length: torch.Tensor) -> torch.Tensor:
    """[B, L] segment numbers, [B] prefix lengths -> [B, 1, L, L] bool: does token q (dim 2) see k (dim 3)?

    Every token sees itself, padding too: a fully masked row would be undefined in softmax.
    """
    index = torch.arange(segments.shape[1], device=segments.device)
    causal = index[None, :] <= index[:, None]                                # (L, L)
    own = segments[:, :, None] == segments[:, None, :]                       # (B, L, L)
    shared = (index < prefix_length[:, None])[:, None, :]                    # (B, 1, L): up to the pivot
    return (causal & (own | shared))[:, None]


def micro_batches(rows: list[Row], tokens: int | None) -> list[list[int]]:
    """Indices of rows, longest first, in batches of at most `tokens` padded tokens (None: one batch).

    A row is never cut: one that is longer than `tokens` is a batch of its own.
    """
    batches: list[list[int]] = []
    for i in sorted(range(len(rows)), key=lambda i: -len(rows[i].ids)):
        longest = len(rows[batches[-1][0]].ids) if batches else 0
        if batches and (tokens is None or longest * (len(batches[-1]) + 1) <= tokens):
            batches[-1].append(i)
        else:
            batches.append([i])
    return batches


def score_rows(model, rows: list[Row], temperature: float = 1.0, chunk: int = 4096):
    """(log-probabilities, entropies), each [loss tokens of all rows, in order], in nats, in fp32 at least.

    Of the policy softmax(logits / temperature), the one that sample() draws from; entropies carry no
    gradient. One forward of the backbone; the head then sees loss tokens only, `chunk` at a time, and
    recomputes them in the backward pass: logits of all tokens would cost 2.4 MB per token with a vocabulary
    of 151,936.
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

    ids, positions = padded([r.ids for r in rows], 0), padded([r.positions for r in rows], 0)
    segments = padded([r.segments for r in rows], -1)
    mask = tree_mask(segments, torch.tensor([r.prefix_length for r in rows], device=model.device))
    hidden = model.base_model(input_ids=ids, position_ids=positions, attention_mask=mask,
                              use_cache=False).last_hidden_state                               # (B, L, d)
    predictors = [b * width + i for b, row in enumerate(rows) for i in row.predictors]
    hidden = hidden.flatten(0, 1)[torch.tensor(predictors, device=model.device)]               # (N, d)
    targets = torch.tensor([t for row in rows for t in row.targets], device=model.device)      # (N,)
    head = model.get_output_embeddings()

    def score(x, target):
        logits = head(x)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32)) / temperature     # (n, V)
        logp = logits.log_softmax(-1)
        entropy = torch.special.entr(logp.detach().exp()).sum(-1)                              # -sum p log p
        return logp.gather(-1, target[:, None])[:, 0], entropy

    pairs = [checkpoint(score, x, t, use_reentrant=False) if torch.is_grad_enabled() else score(x, t)
             for x, t in zip(hidden.split(chunk), targets.split(chunk))]
    return torch.cat([logp for logp, _ in pairs]), torch.cat([entropy for _, entropy in pairs])


if __name__ == "__main__":
    row = pack(prompt=[1, 2], response=[3, 4, 5, 6], pivot=2, branches=[[7, 8], [9]])
    names = "P" * 2 + "R" * 4 + "1" * 2 + "2"
    print("P prompt, R response (pivot after 2 tokens), 1 and 2 its branches; "
          "a line is a token, # what it attends to\n")
    print("   position  ", " ".join(names))
    seen = tree_mask(torch.tensor([row.segments]), torch.tensor([row.prefix_length]))[0, 0]
    for name, position, line in zip(names, row.positions, seen.tolist()):
        print(f" {name} {position:8d}   ", " ".join("#" if x else "." for x in line))
    print("\ntoken", row.targets, "\nis predicted at index", row.predictors)
