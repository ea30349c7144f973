"""AttnRL: influence against its definition with all attention weights at once, and the steps that are branched."""
import copy
import gc
import math
import weakref

import numpy as np
import pytest
import torch
from conftest import EOS, make_model
from small_policy import choose, make_policy, pivots

from deep_grpo import Fork, Group, Trajectory
from trainer.policy import Policy
from variants import METHODS, attnrl, treerl
from variants.attnrl import earliest_influential, forward_context_influence

# ---- influence ----

def slow_influence(model, prompt, response, ends, gap):
    """FCI from the definition, with all attention weights at once; the first step has none."""
    eager = copy.deepcopy(model)
    eager.set_attn_implementation("eager")
    attentions = eager(input_ids=torch.tensor([prompt + response]), output_attentions=True).attentions
    steps = [range(len(prompt) + a, len(prompt) + b) for a, b in zip([0, *ends], ends)]
    best = [0.0] * len(steps)
    for layer in attentions:
        for head in layer[0]:
            for k in range(1, len(steps)):
                total = 0.0
                for j in range(k + gap, len(steps)):
                    total += sum(head[q, t].item() for q in steps[j] for t in steps[k]) / len(steps[j]) / len(steps[k])
                best[k] = max(best[k], total)
    return best


@pytest.mark.parametrize("gap", [4, 2])
def test_influence_by_its_definition_and_the_model_is_left_as_it_was(gap):
    model = make_model(attention_dropout=0.5).train()                      # which must not act here
    response = np.random.default_rng(0).integers(2, 23, 30).tolist()
    ends = [3, 4, 9, 14, 17, 22, 28, 30]
    got = forward_context_influence(model, [3, 5, 8], response, ends, gap)
    assert got == pytest.approx(slow_influence(model.eval(), [3, 5, 8], response, ends, gap), rel=1e-5, abs=1e-9)
    assert min(got[1:len(ends) - gap]) > 0 and got[0] == 0 and got[len(ends) - gap:] == [0.0] * gap
    assert gap != 4 or got == forward_context_influence(model, [3, 5, 8], response, ends)      # that of the paper
    model.train()
    forward_context_influence(model, [3, 5, 8], response, ends, gap)
    assert model.training and model.config._attn_implementation == "sdpa"
    assert not model.model.layers[0].self_attn._forward_hooks


def test_influence_keeps_the_attention_of_one_layer_only():
    """All layers at once took more memory than the update."""
    model, alive, seen = make_model(num_hidden_layers=5), [], []

    def watch(module, args, output):
        gc.collect()
        alive.append(sum(ref() is not None for ref in seen))               # weights of earlier layers that still live
        seen.append(weakref.ref(output[1]))

    for layer in model.model.layers:
        layer.self_attn.register_forward_hook(watch)
    forward_context_influence(model, [3], [5] * 20, [4, 8, 12, 16, 20])
    assert len(seen) == 5 and max(alive) <= 1


# ---- the steps that are branched ----

def test_the_earliest_two_of_the_top_fifth_by_hand():
    ends = [2, 5, 9, 12, 15, 18, 20, 24, 26, 30, 33]                       # 11 steps: the top fifth are 3
    influence = [0.1, 0.2, 0.9, 0.3, 0.8, 0.5, 0.7, 0.0, 0.0, 0.0, 0.0]
    assert earliest_influential(ends, influence) == [5, 12]                # steps 2, 4 and 6; the first begins at 5
    assert earliest_influential(ends[:5], [0.0, 0.1, 0.6, 0.0, 0.0]) == [5]         # of 5 steps one
    assert earliest_influential(ends[:6], [0.0, 0.1, 0.6, 0.0, 0.0, 0.0]) == [2, 5]     # of 6 steps two
    assert earliest_influential(ends[:6], [0.0, 0.5] + [0.0] * 4) == [2]   # without any influence a step is none
    assert earliest_influential(ends[:3], [0.0] * 3) == []


def test_it_branches_where_the_earliest_influential_steps_begin():
    policy, rng = make_policy(make_model()), np.random.default_rng(0)
    responses = [[x for _ in range(12) for x in (*rng.integers(5, 23, 2).tolist(), 2)] + [EOS] for _ in range(6)]
    responses[1] = [x for _ in range(15) for x in (*rng.integers(5, 23, 3).tolist(), 2, 4)] + [EOS]   # paragraphs
    responses[2] = [5, 2, 6, 2, 7, EOS]                                                  # too short to influence
    for rewards, trees in (([0.0] * 6, 6), ([1.0, 0.0, 0.0, 0.0, 0.0, 0.0], 5), ([1.0] * 6, 2)):   # 6 exp(-accuracy)
        groups = [Group([3, 5], [Trajectory(y, r) for y, r in zip(responses, rewards)])]
        policy.forwarded = 0
        chosen = choose(attnrl.choose_pivots, policy, groups)
        assert policy.forwarded == sum(2 + len(y) for y in responses[:trees])    # here the minority is first anyway
        assert all(t.forks == [] for t in chosen[0].trajectories[trees:])
        for i, (y, t) in enumerate(zip(responses[:trees], chosen[0].trajectories)):
            width = {1: 5}.get(i, 3)
            ends = [*range(width, len(y) - 1, width), len(y)]
            if i == 2:
                assert t.forks == []
                continue
            fci = slow_influence(policy.model, [3, 5], y, ends, 4)
            top = sorted(range(len(ends)), key=lambda k: fci[k], reverse=True)[:math.ceil(len(ends) / 5)]
            begins = [[0, *ends][k] for k in sorted(top)[:2]]
            assert t.forks == [Fork(p, p / len(y)) for p in begins] and len(begins) == 2


class Watched(Policy):
    """A policy by which every step but the first has an influence, and which keeps what it was asked about."""
    def each(self, function, items):
        assert function is forward_context_influence
        self.asked = items
        return [[0.0] + [1.0] * (len(ends) - 1) for _, _, ends in items]


@pytest.mark.parametrize("response, segment_tokens, ends", [
    ([5, 2, 6, 4, 7, 4, EOS], 0, [4, 7]),                                  # blank lines, whatever else there is
    ([5, 2, 6, 4, 7, 4, EOS], 2, [4, 7]),
    ([5, 2, 6, 2, 7, EOS], 0, [2, 4, 6]),                                  # none: sentences,
    ([5, 2, 6, 2, 7, EOS], 5, [5, 6])])                                    # or what --segment-tokens asks for
def test_steps_are_split_at_blank_lines_or_else_as_those_of_deep_grpo(response, segment_tokens, ends):
    policy = make_policy(kind=Watched, segment_tokens=segment_tokens)
    choose(attnrl.choose_pivots, policy, [Group([3, 9], [Trajectory(response, 0.0)])])
    assert policy.asked == [([3, 9], response, ends)]


def test_a_blank_line_may_hold_spaces():
    assert [bool(attnrl.BLANK_LINE.search(text)) for text in ("a\n\nb", "a\n \t\nb", "a\nb", "a\n b")] == [
        True, True, False, False]


def test_the_number_of_trees_follows_the_accuracy_of_each_question():
    """round(6 exp(-accuracy)) of its rollouts."""
    policy, y = make_policy(kind=Watched), [5, 2, 6, EOS]                  # two steps; the second begins at 2
    for right, trees in ((0, 6), (1, 5), (2, 4), (3, 4), (4, 3), (5, 3), (6, 2)):
        rollouts = [Trajectory(y, float(i < right)) for i in range(6)]
        first, second = pivots(choose(attnrl.choose_pivots, policy, [Group([3], rollouts),
                                                                     Group([4], [Trajectory(y, 0.0)])]))
        assert sorted(first) == [[]] * (6 - trees) + [[2]] * trees and second == [[2]]


@pytest.mark.parametrize("rewards, branched", [
    ([0, 0, 1, 0, 0, 1], [0, 1, 2, 5]),                                    # accuracy 1/3: 4 trees, both right ones
    ([1, 1, 0, 1, 0, 1], [0, 2, 4]),                                       # accuracy 2/3: 3 trees, both wrong ones
    ([1, 1, 1, 0, 0, 0], [0, 3, 4, 5]),                                    # at one half wrong ones are the minority
    ([1, 1, 1, 1, 1, 0], [0, 1, 5]), ([0, 0, 0, 0, 0, 1], [0, 1, 2, 3, 5]),
    ([1] * 6, [0, 1]), ([0] * 6, [0, 1, 2, 3, 4, 5]),
    ([0, 0, .5, 0, 0, .2], [0, 1, 2, 5]), ([0, 0, 2, 2, 2, 2], [0, 1, 2])])       # above 0 is right
def test_trees_of_the_minority_class_come_first(rewards, branched):
    group = Group([3], [Trajectory([5, 2, 6, EOS], float(r)) for r in rewards])
    (forks,) = pivots(choose(attnrl.choose_pivots, make_policy(kind=Watched), [group]))
    assert [i for i, f in enumerate(forks) if f] == branched


def test_the_question_itself_is_never_branched():
    policy, rng = make_policy(make_model()), np.random.default_rng(2)
    responses = [[x for _ in range(10) for x in (*rng.integers(5, 23, 2).tolist(), 2)] + [EOS] for _ in range(40)]
    chosen = choose(attnrl.choose_pivots, policy, [Group([3, 5], [Trajectory(y, 0.0) for y in responses])])
    assert all(len(forks) == 2 and min(forks) > 0 for forks in pivots(chosen)[0])


def test_the_states_of_two_questions_do_not_mix():
    """Both at once give what each gives alone."""
    policy, rng = make_policy(make_model()), np.random.default_rng(1)

    def question(prompt, rewards):
        responses = [[x for _ in range(9) for x in (*rng.integers(5, 23, 2).tolist(), 2)] + [EOS] for _ in rewards]
        return Group(prompt, [Trajectory(y, r) for y, r in zip(responses, rewards)])

    groups = [question([3, 5], [1.0, 0.0, 1.0]), question([4], [0.0, 0.0, 0.0])]
    alone = [choose(attnrl.choose_pivots, policy, [g])[0] for g in groups]
    assert choose(attnrl.choose_pivots, policy, groups) == alone
    first, second = pivots(alone)
    assert first != second and [len(forks) for forks in first] == [2, 2, 0]


def test_its_weights_are_those_of_treerl():
    assert METHODS["attnrl"].weights is treerl.weights
