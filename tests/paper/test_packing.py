"""Packed rows against separate rows: the mask token by token, log-probabilities and gradients to rounding."""
import runpy
from math import inf
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import make_model

from deep_grpo import Fork, Group, Trajectory
from packing import (
    Alone,
    Row,
    attention_length,
    batch_costs,
    batch_tensors,
    layer_masks,
    micro_batches,
    pack,
    pack_groups,
    pack_or_split,
    score_rows,
    tree_mask,
)

ROLLOUTS = [  # prompt, response, (pivot, suffix) of its branches: ragged, pivot at the root and inside, an empty branch
    ([3, 4, 5], [6, 7, 8, 9, 10], [(2, [11, 12, 13]), (2, [6]), (2, [])]),
    ([3], [5, 4], [(0, [7, 8, 9]), (0, [9, 9])]),
    ([9, 8, 7, 6], [5, 4, 3, 3, 5, 1], []),
    ([2, 2], [5, 6, 7], [(3, [8, 1])]),
    ([4], [6, 7, 8, 9], [(1, [5, 5]), (3, [7]), (0, [8, 9])]),                       # several pivots
]


def plain(rows):
    """Rows with lists in the place of arrays, which can be compared."""
    return [Row(*(part if isinstance(part, list) else part.tolist() for part in row)) for row in rows]


def separate_logps(model, prompt, response, branches):
    """The slow twin: every sequence alone through the whole model, log_softmax of all logits, no mask."""
    pieces = []
    for prefix, tail in [(prompt, response), *((prompt + response[:pivot], y) for pivot, y in branches)]:
        logits = model(input_ids=torch.tensor([prefix + tail])).logits[0, :-1]
        logp = logits.log_softmax(-1).gather(-1, torch.tensor([(prefix + tail)[1:]]).T)[:, 0]
        pieces.append(logp[len(prefix) - 1:])
    return torch.cat(pieces)


def test_row_by_hand():
    row = pack([1, 2], [3, 4, 5, 6], [(2, [7, 8]), (2, [9])])
    assert plain([row]) == [Row(ids=[1, 2, 3, 4, 5, 6, 7, 8, 9],
                                positions=[0, 1, 2, 3, 4, 5, 4, 5, 4],
                                segments=[0, 0, 1, 1, 1, 1, 2, 2, 3],
                                prefixes=[2, 2, 2, 2, 2, 2, 4, 4, 4],
                                targets=[3, 4, 5, 6, 7, 8, 9], predictors=[1, 2, 3, 4, 3, 6, 3],
                                lengths=[4, 2, 1])]
    assert all(part.dtype == np.int64 for part in row[:-1])


def test_rows_with_empty_sequences_by_hand():
    """A branch without tokens lies between two others, and a response may have none."""
    row, nothing = pack([1], [2], [(1, []), (0, [3, 4]), (1, []), (1, [5])]), pack([1, 2], [])
    assert plain([row, nothing]) == [
        Row([1, 2, 3, 4, 5], [0, 1, 1, 2, 2], [0, 1, 3, 3, 5], [1, 1, 1, 1, 2], [2, 3, 4, 5], [0, 0, 2, 1],
            [1, 0, 2, 0, 1]),
        Row([1, 2], [0, 1], [0, 0], [2, 2], [], [], [0])]


def test_the_tensors_of_a_batch_by_hand():
    short, long = pack([1], [2]), pack([3, 4], [5, 6], [(1, [7])])
    ids, positions, segments, prefixes, predictors, targets = batch_tensors([short, long], "cpu")
    assert ids.tolist() == [[1, 2, 0, 0, 0], [3, 4, 5, 6, 7]]
    assert positions.tolist() == [[0, 1, 0, 0, 0], [0, 1, 2, 3, 3]]
    assert segments.tolist() == [[0, 1, -1, -1, -1], [0, 0, 1, 1, 2]]
    assert prefixes.tolist() == [[1, 1, 0, 0, 0], [2, 2, 2, 2, 3]]
    assert predictors.tolist() == [0, 5 + 1, 5 + 2, 5 + 2] and targets.tolist() == [2, 5, 6, 7]


def test_mask_by_its_definition():
    rows = [pack(*rollout) for rollout in ROLLOUTS]
    _, _, segments, prefixes, *_ = batch_tensors([*rows, pack([1] * 18, [2, 2])], "cpu")     # so all have padding
    mask, width = tree_mask(segments, prefixes)[:-1], segments.shape[1]
    assert mask.shape == (len(rows), 1, width, width) and mask.dtype == torch.bool
    for b, (prompt, _, branches) in enumerate(ROLLOUTS):
        n, pivots = len(rows[b].ids), [0, 0, *(pivot for pivot, _ in branches)]          # of each segment
        for q in range(n):
            for k in range(width):
                own, other = rows[b].segments[q], rows[b].segments[k] if k < n else None
                in_prefix = other == 0 or (other == 1 and k < len(prompt) + pivots[own])
                assert mask[b, 0, q, k] == (k <= q and (in_prefix or other == own))
    assert mask.any(-1).all()                                # also padding: a fully masked row would be NaN


def check_against_separate_rows(model, twin, chunk) -> int:
    """Log-probabilities and gradients of packed rows; returns how often the first layer was computed."""
    calls, heads = [], []
    model.model.layers[0].mlp.register_forward_pre_hook(lambda *_: calls.append(1))
    model.lm_head.register_forward_pre_hook(lambda module, args: heads.append(len(args[0])))
    logps, entropies = score_rows(model, [pack(*rollout) for rollout in ROLLOUTS], chunk=chunk)
    expected = torch.cat([separate_logps(twin, *rollout) for rollout in ROLLOUTS])
    torch.testing.assert_close(logps, expected, rtol=0, atol=1e-10)
    torch.manual_seed(0)
    weights = torch.randn(len(logps), dtype=torch.float64)               # every token matters, in its own way
    (logps * weights).sum().backward()
    (expected * weights).sum().backward()
    for (name, p), q in zip(model.named_parameters(), twin.parameters()):
        assert q.grad.abs().max() > 1e-3, name                           # not a comparison of zeros
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-8, atol=1e-10)
    assert not entropies.requires_grad
    assert max(heads) <= chunk                                           # the head is computed in chunks, and again,
    assert sum(heads) == 2 * len(logps) - (len(logps) % chunk or chunk)  # but for its last one
    return len(calls)


@pytest.mark.parametrize("chunk", [3, 4096])
def test_log_probabilities_and_gradients_equal_those_of_separate_rows(chunk):
    assert check_against_separate_rows(make_model(), make_model(), chunk) == 1


@pytest.mark.parametrize("full_layers", [0, 1])
def test_layers_with_a_sliding_window_see_as_far_back_as_in_separate_rows(full_layers):
    """In a packed row a token stands far from its prefix, so the window has to be measured in positions."""
    settings = dict(use_sliding_window=True, sliding_window=3, max_window_layers=full_layers)
    check_against_separate_rows(make_model(**settings), make_model(**settings), 4096)


@pytest.mark.parametrize("tied", [True, False])
def test_without_rows_one_token_is_computed_and_nothing_is_learned(tied):
    """Under FSDP a process that has no rows still has to take part in the forward and the backward pass."""
    model, seen = make_model(tie_word_embeddings=tied), []
    model.model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["input_ids"].shape), with_kwargs=True)
    logps, entropies = score_rows(model, [])
    assert logps.shape == entropies.shape == (0,) and logps.dtype == torch.float64 and seen == [(1, 1)]
    logps.sum().backward()
    assert all(p.grad is not None and (p.grad == 0).all() for p in model.parameters())


def test_rows_without_branches_need_no_mask():
    # Faster attention; and the padding behind a short row must neither be seen nor restart its positions.
    model, seen = make_model(), []
    model.model.layers[0].register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["attention_mask"]), with_kwargs=True)
    plain = [(prompt, response, []) for prompt, response, _ in ROLLOUTS]
    logps, _ = score_rows(model, [pack(*rollout) for rollout in plain])
    torch.testing.assert_close(logps, torch.cat([separate_logps(make_model(), *r) for r in plain]), rtol=0, atol=1e-10)
    score_rows(model, [pack(*rollout) for rollout in ROLLOUTS])
    assert seen[0] is None and seen[1].shape[:2] == (len(ROLLOUTS), 1)


def test_attention_length_by_hand():
    # Per layer: q 32 x 32 + 32, k and v 32 x 16 + 16 each, o 32 x 32, MLP 3 x 32 x 48, two norms; and the last norm.
    layer = 32 * 32 + 32 + 2 * (32 * 16 + 16) + 32 * 32 + 3 * 32 * 48 + 2 * 32
    assert attention_length(make_model()) == pytest.approx(3 * (2 * layer + 32) / (7 * 2 * 4 * 8))
    wide = make_model(head_dim=16, tie_word_embeddings=False)                # heads * head_dim is not hidden_size
    layer = 32 * 64 + 64 + 2 * (32 * 32 + 32) + 64 * 32 + 3 * 32 * 48 + 2 * 32
    assert attention_length(wide) == pytest.approx(3 * (2 * layer + 32) / (7 * 2 * 4 * 16))


def test_the_rule_for_separate_rows_at_its_boundary():
    # Prefix 3 + 2, suffixes of 5: one row of 20 tokens, or three of 10. 20 + 400 / A = 30 + 300 / 2A at A = 25.
    rollout = ([1, 2, 3], [4, 5, 6, 7, 8, 9, 10], [(2, [11] * 5), (2, [12] * 5)])
    assert plain(pack_or_split(*rollout, a=25.0)) == plain([pack(*rollout)])
    assert plain(pack_or_split(*rollout, a=24.99)) == plain([
        pack([1, 2, 3], [4, 5, 6, 7, 8, 9, 10]), pack([1, 2, 3, 4, 5], [11] * 5), pack([1, 2, 3, 4, 5], [12] * 5)])
    assert plain(pack_or_split(*rollout, a=25.0, limit=20)) == plain([pack(*rollout)])
    assert len(pack_or_split(*rollout, a=25.0, limit=19)) == 3
    assert plain(pack_or_split([1], [2, 3], [], a=1e-9, limit=2)) == plain([pack([1], [2, 3])])


def test_separate_rows_of_several_pivots_have_their_own_prefixes():
    rollout = ([1], [4, 5, 6], [(2, [7]), (0, [8]), (1, [9, 9])])
    assert plain(pack_or_split(*rollout, a=1e-9)) == plain([
        pack([1], [4, 5, 6]), pack([1, 4, 5], [7]), pack([1], [8]), pack([1, 4], [9, 9])])


def test_rows_of_groups_by_hand():
    """A row per rollout. Where a question has no branch at all, its rollouts are branches of the question."""
    forked = Trajectory([5, 6, 7], 0.0, [Fork(2, 0.6, [[8], [9]], [1.0, 0.0]), Fork(1, 0.3, [[3, 3]], [0.0])])
    groups = [Group([1, 2], [Trajectory([4], 1.0), forked]),
              Group([3], [Trajectory([5], 0.0), Trajectory([6, 7], 1.0)])]
    row = pack([1, 2], [5, 6, 7], [(2, [8]), (2, [9]), (1, [3, 3])])
    assert plain(pack_groups(groups, a=inf)) == plain([pack([1, 2], [4]), row, pack([3], [5], [(0, [6, 7])])])
    split = [pack([1, 2], [5, 6, 7]), pack([1, 2, 5, 6], [8]), pack([1, 2, 5, 6], [9]), pack([1, 2, 5], [3, 3])]
    rows = [pack([1, 2], [4]), *split, pack([3], [5], [(0, [6, 7])])]
    assert plain(pack_groups(groups, a=inf, limit=8)) == plain(rows)
    assert plain(pack_groups(groups, a=1e-9)) == plain([pack([1, 2], [4]), *split, pack([3], [5]), pack([3], [6, 7])])


def test_rows_of_groups_of_which_not_all_sequences_are_needed_by_hand():
    forked = Trajectory([5, 6, 7], 0.0, [Fork(2, 0.6, [[8], [9]], [1.0, 0.0]), Fork(1, 0.3, [[3, 3], [2]], [0.0, 1.0])])
    groups = [Group([1, 2], [Trajectory([4], 1.0), forked]),
              Group([3], [Trajectory([5], 0.0), Trajectory([6, 7], 1.0), Trajectory([8], 1.0)])]
    sequences = [[4], [5, 6, 7], [8], [9], [3, 3], [2], [5], [6, 7], [8]]
    both, alone = pack([1, 2, 5, 6], [8], [(0, [9])]), pack([1, 2], [4])
    for needed, rows in [
            ("111111 111", [alone, pack([1, 2], [5, 6, 7], forked.branches), pack([3], [5], [(0, [6, 7]), (0, [8])])]),
            ("101101 011", [alone, both, pack([1, 2, 5], [2]), pack([3], [6, 7], [(0, [8])])]),
            ("010100 100", [pack([1, 2], [5, 6, 7], [(2, [9])]), pack([3], [5])]),
            ("110000 000", [pack([1, 2], [4], [(0, [5, 6, 7])])]),        # branches all dead
            ("001000 010", [pack([1, 2, 5, 6], [8]), pack([3], [6, 7])]), ("000000 000", [])]:
        flags = [c == "1" for c in needed if c != " "]
        given = iter(flags)
        nested = [[next(given) for _ in tau.sequences] for g in groups for tau in g.trajectories]
        assert plain(pack_groups(groups, inf, needed=nested)) == plain(rows)
        assert [t for row in rows for t in row.targets] == [t for y, n in zip(sequences, flags) if n for t in y]


def test_temperature_and_entropy():
    model, rollout = make_model(), ROLLOUTS[2]
    logps, entropies = score_rows(model, [pack(*rollout)], temperature=0.7)
    logits = model(input_ids=torch.tensor([rollout[0] + rollout[1]])).logits[0, 3:-1] / 0.7
    p = logits.softmax(-1)
    chosen = p.gather(-1, torch.tensor([rollout[1]]).T)[:, 0]
    torch.testing.assert_close(logps, chosen.log(), rtol=0, atol=1e-10)
    torch.testing.assert_close(entropies, -(p * p.log()).sum(-1), rtol=0, atol=1e-10)


def test_float32_agrees_within_its_rounding():
    model = make_model(dtype=torch.float32)
    logps, _ = score_rows(model, [pack(*rollout) for rollout in ROLLOUTS])
    expected = torch.cat([separate_logps(model, *rollout) for rollout in ROLLOUTS])
    torch.testing.assert_close(logps, expected, rtol=0, atol=2e-5)


def test_bfloat16_logits_are_scored_in_float32():
    # A log-probability in bfloat16 has two or three digits, too few for ratios within [0.8, 1.2].
    for dtype, autocast in ((torch.bfloat16, False), (torch.float32, True)):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            scores = score_rows(make_model(dtype=dtype), [pack(*ROLLOUTS[2])])
        for score in scores:
            assert score.dtype == torch.float32 and (score.bfloat16() != score).any()


def test_the_mask_is_what_keeps_branches_apart():
    # A later branch must not see an earlier one: change the first branch and look at the second.
    model = make_model()
    a, b = (score_rows(model, [pack([3, 4, 5], [6, 7, 8], [(1, changed), (1, [9, 10])])])[0]
            for changed in ([4, 4, 4], [11, 12, 13]))
    torch.testing.assert_close(a[-2:], b[-2:], rtol=0, atol=1e-12)


def test_micro_batches_fill_up_to_the_tokens_longest_first():
    rows = [pack([1], [2] * (n - 1)) for n in (3, 10, 5, 4, 10, 2)]
    assert micro_batches(rows, 20) == [[1, 4], [2, 3, 0, 5]]
    assert micro_batches(rows, 10) == [[1], [4], [2, 3], [0, 5]]
    assert micro_batches(rows, 1) == [[1], [4], [2], [3], [0], [5]]      # a row is never cut
    assert sorted(micro_batches(rows, None)[0]) == [0, 1, 2, 3, 4, 5]
    rows = [pack([1], [2] * 5), pack([1] * 8, [2])]                      # prompts count, too
    assert micro_batches(rows, 18) == [[1, 0]] and micro_batches(rows, 17) == [[1], [0]]


def test_micro_batches_of_several_ranks_are_even():
    rows = [pack([1], [2] * (n - 1)) for n in (3, 10, 5, 4, 10, 2)]
    assert micro_batches(rows, 20, ranks=2) == [[1, 4], [2, 3, 0, 5]]
    assert micro_batches(rows, 20, ranks=3) == [[1, 4], [2, 3, 0, 5], []]           # no three are all below 20
    assert micro_batches(rows, None, ranks=2) == [[1, 4], [2, 3, 0, 5]]             # 20 each, where one batch has 60
    assert micro_batches(rows, 10, ranks=3) == [[1], [4], [2], [3], [0], [5]]       # 10 + 4 instead of 10 + 6
    assert micro_batches(rows, 15, ranks=2) == [[1], [4], [2, 3], [0, 5]]           # 10 + 10 instead of 10 + 15
    assert micro_batches(rows[:1], 10, ranks=3) == [[0], [], []]
    assert micro_batches(rows, 1, ranks=4) == [[1], [4], [2], [3], [0], [5], [], []]


def test_micro_batches_count_the_padding_to_a_multiple():
    """Rows of 3, 10, 5, 4, 10 and 2 tokens are 4, 12, 8, 4, 12 and 4 tokens long, and it is those that have to fit."""
    rows = [pack([1], [2] * (n - 1)) for n in (3, 10, 5, 4, 10, 2)]
    assert micro_batches(rows, 24, multiple=4) == [[1, 4], [2, 3, 0], [5]]
    assert micro_batches(rows, 23, multiple=4) == [[1], [4], [2, 3], [0, 5]]
    assert len(micro_batches(rows, None, multiple=4)) == 1
    for tokens in (8, 24, 30):
        for batch in micro_batches(rows, tokens, multiple=4):
            ids, *_ = batch_tensors([rows[i] for i in batch], "cpu", 4)
            assert ids.numel() <= tokens or len(batch) == 1
    assert batch_costs(rows, [[1, 4], [2, 3, 0], [5]], multiple=4)["padding"] == 1 - 34 / (24 + 24 + 4)


@pytest.mark.parametrize("tokens", [4096, 8192, 16384])
def test_padding_is_under_a_tenth_with_lengths_as_on_gsm8k(tokens):
    # 64 questions x 8: prompts of 60 to 160 tokens, responses around 220, 45 % of them with 8 branches at 70 % depth.
    rng, rows = np.random.default_rng(0), []
    for prompt in rng.integers(60, 160, 64):
        for n in rng.lognormal(np.log(220) - 0.08, 0.4, 8).clip(16, 512).astype(int):
            pivot = int(0.7 * n)
            lengths = rng.normal(n - pivot, 20, 8 * (rng.random() < 0.45))
            branches = [(pivot, [2] * max(1, int(m))) for m in lengths]
            rows += pack_or_split([2] * int(prompt), [2] * int(n), branches, 7100.0, tokens)
    batches = [[len(rows[i].ids) for i in batch] for batch in micro_batches(rows, tokens)]
    padded = sum(len(batch) * max(batch) for batch in batches)
    assert max(len(batch) * max(batch) for batch in batches) <= tokens
    assert 0 < 1 - sum(map(sum, batches)) / padded < 0.1


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match="prompt"):
        pack([], [1, 2])
    for pivot in (-1, 3):
        with pytest.raises(ValueError, match=f"pivot must be 0 to the 2 tokens of the response, got {pivot}"):
            pack([1], [2, 3], [(1, [5]), (pivot, [4])])
    model = make_model()
    model.set_attn_implementation("eager")
    with pytest.raises(ValueError, match="sdpa"):
        score_rows(model, [pack([1], [2])])
    for name in ("final_logit_softcapping", "logits_scaling", "logit_scale"):
        model = make_model()
        for value in (None, 1, 30.0):
            setattr(model.config, name, value)
            if value != 30.0:
                score_rows(model, [pack([1], [2])])
        with pytest.raises(ValueError, match=name):
            score_rows(model, [pack([1], [2])])


def test_what_micro_batches_cost_by_hand():
    rows = [pack([1], [2] * (n - 1)) for n in (3, 10, 5, 4, 10, 2)]                 # 34 tokens
    assert batch_costs(rows, [[1, 4], [2, 3, 0, 5]]) == {
        "forwarded_tokens": 34, "padding": 1 - 34 / 40, "imbalance": 1.0}           # 2 x 10, 4 x 5
    # The first rank computes 10 + 5 + 3 tokens, the second 10 + 4 + 2; round by round one of them waits.
    two = batch_costs(rows, [[1], [4], [2], [3], [0], [5]], ranks=2)
    assert two == {"forwarded_tokens": 34, "padding": 0.0, "imbalance": (10 + 5 + 3) / (34 / 2)}
    three = batch_costs(rows, [[1, 4], [2, 3, 0, 5], []], ranks=3)                  # the third has nothing to do
    assert three == {"forwarded_tokens": 34, "padding": 1 - 34 / 40, "imbalance": 20 / (40 / 3)}


def test_one_process_alone_has_all_micro_batches():
    model, rows = make_model(), [pack(*ROLLOUTS[0])]
    assert Alone().size == 1 and Alone().mine([[1], [0, 2]]) == [[1], [0, 2]] and Alone().total(rows) is rows
    for got, expected in zip(Alone().score(model, rows, 0.7), score_rows(model, rows, 0.7)):
        assert torch.equal(got, expected)


def test_the_drawing_is_the_mask(capsys):
    runpy.run_path(str(Path(__file__).parents[2] / "packing.py"), run_name="__main__")
    drawn = [line.split()[2:] for line in capsys.readouterr().out.splitlines() if line[:2] in (" P", " R", " 1", " 2")]
    assert ["".join(line) for line in drawn] == [
        "#........", "##.......", "###......", "####.....", "#####....", "######...",
        "####..#..", "####..##.", "####....#"]


def test_layers_that_are_all_full_have_one_mask_whatever_the_window():
    config = make_model(use_sliding_window=True, sliding_window=4, max_window_layers=2).config
    assert set(config.layer_types) == {"full_attention"}
    config.sliding_window = 4
    assert layer_masks(config, lambda window: ("mask", window)) == ("mask", None)


def test_a_plain_row_may_come_before_one_with_branches():
    model, rows = make_model(), [pack([3], [4] * 9 + [5]), pack([3, 4], [5, 6, 7], [(1, [8, 9]), (2, [9])])]
    apart = torch.cat([score_rows(model, [row])[0] for row in rows])
    torch.testing.assert_close(score_rows(model, rows)[0], apart, rtol=0, atol=1e-10)
