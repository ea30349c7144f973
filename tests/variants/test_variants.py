"""The compared methods: advantages by hand, gradients against leaf paths one at a time, states, what they cost."""
import copy
import gc
import json
import math
import re
import weakref
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import EOS, make_model

import deep_grpo
import train_gsm8k
from deep_grpo import Config, Group, Trajectory, objective, score_groups
from grading import grade_gsm8k
from variants import (
    METHODS,
    SRPO_QUESTION,
    attnrl_states,
    dr_grpo_weights,
    forward_context_influence,
    fr3e_states,
    fr3e_weights,
    reset_weights,
    rrpo_states,
    srpo_states,
    tree_weights,
    treerl_states,
)

BETA = 0.3


def word(ids):
    return "".join({2: ".\n", 4: "\n\n", EOS: ""}.get(i, f" w{i}") for i in ids)    # 2 ends a sentence, 4 a paragraph


def advantages(weights):
    """Of the rows of one question, without the rest."""
    return [[w.advantage for w in row] for row in weights]


def policy_of(model, config, **more):
    """What `states` reads of a Run."""
    return SimpleNamespace(model=model, config=config, text=word, args=SimpleNamespace(micro_batch_tokens=None),
                           pivot_rng=np.random.default_rng(0), **more)


# ---- Dr. GRPO ----

def test_dr_grpo_by_hand():
    groups = [Group([3], [Trajectory([5] * n, r) for n, r in ((2, 1.0), (4, 0.0), (6, 0.0), (8, 0.0))]),
              Group([3], [Trajectory([5], 1.0), Trajectory([6], 1.0)])]
    first, second = dr_grpo_weights(groups, Config(max_new_tokens=10, beta=0.5))
    assert advantages(first) == [[0.75], [-0.25], [-0.25], [-0.25]] and advantages(second) == [[0.0], [0.0]]
    assert {w.policy for (w,) in first} == {1 / (2 * 4 * 10)} and {w.policy for (w,) in second} == {1 / (2 * 2 * 10)}
    assert {w.kl for (w,) in first} == {0.5 / (2 * 4 * 10)} and [w.tokens for (w,) in first] == [2, 4, 6, 8]
    assert METHODS["dr_grpo"].settings == {"branches": 0, "beta": 0.0}


# ---- TreeRL ----

def test_tree_advantages_of_the_papers_example():
    # Tree A: a prefix with the leaves 0 and 1; tree B: one leaf, 1.
    groups = [Group([3], [Trajectory([5, 6, 7, EOS], 0.0, [2], [[8, EOS]], [1.0]), Trajectory([9, EOS], 1.0)])]
    (a, b), = tree_weights(groups, Config())
    prefix, leaf_0, leaf_1 = a
    assert prefix.advantage == pytest.approx(2 * (1 / 2 - 2 / 3) / math.sqrt(2)) == pytest.approx(-0.2357, abs=5e-5)
    assert [leaf_0.advantage, leaf_1.advantage, b[0].advantage] == pytest.approx([-7 / 6, 5 / 6, 2 / 3], rel=1e-12)
    assert [w.tokens for w in (*a, *b)] == [2, 2, 2, 2]
    paths = 4 + 4 + 2                                      # the tokens of three paths; the prefix is in two of them
    assert [w.policy for w in (*a, *b)] == pytest.approx([2 / paths, 1 / paths, 1 / paths, 1 / paths], rel=1e-12)


def test_branches_of_the_question_itself_have_it_as_parent():
    # Four draws from one question, two of them right: V_root = 1/2 is also the value of their parent.
    groups = [Group([3], [Trajectory([5, EOS], 0.0, [0], [[8, EOS], [7, EOS]], [1.0, 0.0]), Trajectory([9, EOS], 1.0)])]
    (a, b), = tree_weights(groups, Config())
    assert [(w.tokens, w.advantage) for w in a[1:]] == [(2, -1.0), (2, 1.0), (2, -1.0)] and a[0].tokens == 0
    assert [(w.tokens, w.advantage) for w in b] == [(2, 1.0)]


def forest():
    """Two questions: rollouts with two forks, with one at the question itself, with none; and all wrong but one."""
    return [Group([3, 5], [Trajectory([6, 7, 8, 9, 6, EOS], 0.0, [1, 4], [[5, EOS], [7, 7, EOS], [9, EOS], [8, EOS]],
                                      [1.0, 0.0, 1.0, 1.0]),
                           Trajectory([9, 2, EOS], 1.0, [0], [[5, 5, EOS], [4, EOS]], [0.0, 0.0]),
                           Trajectory([7, EOS], 1.0)]),
            Group([7], [Trajectory([4, 5, 6, 7], 0.0, [2], [[EOS], [6, 8, EOS]], [0.0, 1.0]),
                        Trajectory([4, EOS], 0.0)])]


def leaf_paths(trajectory):
    """[(tokens, reward, {depth at which it leaves the rollout, or None})] of the paths of one tree."""
    k = len(trajectory.branches) // max(1, len(trajectory.pivots))
    return [(trajectory.response, trajectory.reward, None),
            *((trajectory.response[:trajectory.pivots[j // k]] + y, r, trajectory.pivots[j // k])
              for j, (y, r) in enumerate(zip(trajectory.branches, trajectory.branch_rewards)))]


def tree_j(model, ref_model, groups):
    """J of TreeRL from its definition, every leaf path alone, token by token; a node is the set of leaves below."""
    total, tokens = 0.0, 0
    for g in groups:
        rewards = [r for t in g.trajectories for _, r, _ in leaf_paths(t)]
        v_root = sum(rewards) / len(rewards)
        for t in g.trajectories:
            paths = leaf_paths(t)

            def value(leaves, paths=paths):
                return sum(paths[i][1] for i in leaves) / len(leaves)

            for i, (path, _, left_at) in enumerate(paths):
                logits = model(input_ids=torch.tensor([g.prompt + path])).logits[0, len(g.prompt) - 1:-1]
                ref = ref_model(input_ids=torch.tensor([g.prompt + path])).logits[0, len(g.prompt) - 1:-1]
                # The branches below the token at depth d leave the rollout deeper; so does the rollout's own end.
                below = [[i] if left_at is not None and d >= left_at else
                         [j for j, (*_, other) in enumerate(paths) if other is None or other > d]
                         for d in range(len(path))]
                seen = []                            # nodes from the question on, whose own value is V_root
                for d, token in enumerate(path):
                    if not seen or seen[-1] != below[d]:
                        seen.append(below[d])
                    parent = value(seen[-2]) if len(seen) > 1 else v_root
                    advantage = (value(below[d]) - v_root + value(below[d]) - parent) / math.sqrt(len(below[d]))
                    logp, ref_logp = (x[d].log_softmax(-1)[token] for x in (logits, ref))
                    k3 = torch.exp(ref_logp - logp) - (ref_logp - logp) - 1
                    total = total + torch.exp(logp - logp.detach()) * advantage - BETA * k3
                    tokens += 1
    return total / tokens


@pytest.mark.parametrize("a", [1e9, 1e-9])
def test_tree_gradient_is_that_of_all_leaf_paths(a, monkeypatch):
    monkeypatch.setattr(deep_grpo, "attention_length", lambda model: a)
    model, ref_model = make_model(), make_model(seed=1).requires_grad_(False)
    (-tree_j(model, ref_model, forest())).backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    loss, metrics = objective(model, forest(), Config(beta=BETA), ref_model, None, 30, backward=True,
                              weights=tree_weights)
    assert loss.item() == pytest.approx(-tree_j(model, ref_model, forest()).item(), rel=1e-10)
    for name, p in model.named_parameters():
        assert expected[name].abs().max() > 1e-3
        torch.testing.assert_close(p.grad, expected[name], rtol=1e-8, atol=1e-11)
    # Every token has A != 0 but for those of nodes worth what their parent and the question are.
    spans = [w for group in tree_weights(forest(), Config()) for row in group for w in row]
    assert metrics["trained_tokens"] == sum(w.tokens for w in spans if w.advantage != 0) > 20


def test_treerl_forks_at_the_least_likely_tokens():
    model, rng = make_model(), np.random.default_rng(0)
    responses = [rng.integers(2, 23, n).tolist() + [EOS] for n in (39, 25, 11, 9)]
    groups = [Group([3, 5], [Trajectory(y, 0.0) for y in responses])]
    chosen, forwarded = treerl_states(policy_of(model, Config()), groups, None)
    for before, t in zip(responses, chosen[0].trajectories):
        logits = model(input_ids=torch.tensor([[3, 5] + before])).logits[0, 1:-1].log_softmax(-1)
        surprise = -logits.gather(-1, torch.tensor([before]).T)[:, 0]
        eligible = [i for i in range(len(before)) if i >= 0.05 * len(before) and i < len(before) - 10]
        best = sorted(sorted(eligible, key=lambda i: surprise[i].item(), reverse=True)[:2])
        assert t.pivots == best and (t.ratio or []) == [p / len(before) for p in best]
    assert [len(t.pivots) for t in chosen[0].trajectories] == [2, 2, 1, 0]           # 12 tokens leave one place
    assert forwarded == sum(len(row.ids) for row in deep_grpo.pack_groups(model, groups))


# ---- AttnRL ----

def slow_influence(model, prompt, response, ends, gap):
    """FCI from the definition, with all attention weights at once."""
    eager = copy.deepcopy(model)
    eager.set_attn_implementation("eager")
    attentions = eager(input_ids=torch.tensor([prompt + response]), output_attentions=True).attentions
    steps = [range(len(prompt) + a, len(prompt) + b) for a, b in zip([0, *ends], ends)]
    best = [0.0] * len(steps)
    for layer in attentions:
        for head in layer[0]:
            for k in range(len(steps)):
                total = 0.0
                for j in range(k + gap, len(steps)):
                    total += sum(head[q, t].item() for q in steps[j] for t in steps[k]) / len(steps[j]) / len(steps[k])
                best[k] = max(best[k], total)
    return best


@pytest.mark.parametrize("gap", [4, 2])
def test_influence_by_its_definition_and_the_model_is_left_as_it_was(gap):
    model, response = make_model().train(), np.random.default_rng(0).integers(2, 23, 30).tolist()
    ends = [3, 4, 9, 14, 17, 22, 28, 30]
    got = forward_context_influence(model, [3, 5, 8], response, ends, gap)
    assert got == pytest.approx(slow_influence(model.eval(), [3, 5, 8], response, ends, gap), rel=1e-5, abs=1e-9)
    assert min(got[:len(ends) - gap]) > 0 and got[len(ends) - gap:] == [0.0] * gap
    model.train()
    forward_context_influence(model, [3, 5, 8], response, ends, gap)
    assert model.training and model.config._attn_implementation == "sdpa"
    assert not model.model.layers[0].self_attn._forward_hooks


def test_influence_keeps_the_attention_of_one_layer_only():
    model, alive, seen = make_model(num_hidden_layers=5), [], []

    def watch(module, args, output):
        gc.collect()
        alive.append(sum(ref() is not None for ref in seen))               # weights of earlier layers that still live
        seen.append(weakref.ref(output[1]))

    for layer in model.model.layers:
        layer.self_attn.register_forward_hook(watch)
    forward_context_influence(model, [3], [5] * 20, [4, 8, 12, 16, 20])
    assert len(seen) == 5 and max(alive) <= 1


def test_attnrl_branches_where_the_earliest_influential_steps_begin(monkeypatch):
    model, rng = make_model(), np.random.default_rng(0)
    responses = [[x for _ in range(12) for x in (*rng.integers(5, 23, 2).tolist(), 2)] + [EOS] for _ in range(6)]
    responses[1] = [x for _ in range(15) for x in (*rng.integers(5, 23, 3).tolist(), 2, 4)] + [EOS]   # paragraphs
    responses[2] = [5, 2, 6, 2, 7, EOS]                                                  # too short to influence
    for rewards, trees in (([0.0] * 6, 6), ([1.0, 0.0, 0.0, 0.0, 0.0, 0.0], 5), ([1.0] * 6, 2)):   # 6 exp(-accuracy)
        groups = [Group([3, 5], [Trajectory(y, r) for y, r in zip(responses, rewards)])]
        chosen, forwarded = attnrl_states(policy_of(model, Config()), groups, None)
        assert forwarded == sum(2 + len(y) for y in responses[:trees])
        assert all(t.pivot is None for t in chosen[0].trajectories[trees:])
        for i, (y, t) in enumerate(zip(responses[:trees], chosen[0].trajectories)):
            width = {1: 5}.get(i, 3)
            ends = [*range(width, len(y) - 1, width), len(y)]
            if i == 2:
                assert t.pivot is None
                continue
            fci = slow_influence(model, [3, 5], y, ends, 4)
            top = sorted(range(len(ends)), key=lambda k: fci[k], reverse=True)[:math.ceil(len(ends) / 5)]
            assert t.pivots == [[0, *ends][k] for k in sorted(top)[:2]] and len(t.pivots) == 2


# ---- FR3E ----

def test_fr3e_advantages_by_hand():
    base = Trajectory([5] * 6, 0.0, [2, 4], [[6]] * 8, [1.0, 1.0, 1.0, 0.0, 0.0, 0.0, 1.0, 0.0])
    groups = [Group([3], [base, Trajectory([5, 5], 1.0)]), Group([3], [Trajectory([5], 1.0)] * 2)]
    first, second = fr3e_weights(groups, Config(beta=0.5))
    assert first[0][0].advantage == -0.5 and first[1][0].advantage == 0.5        # V_0 = 1/2
    up, down = math.exp(-(0.75 - 0.5)), math.exp(-(0.25 - 0.75))               # V_1 = 3/4, V_2 = 1/4
    assert [w.advantage for w in first[0][1:5]] == pytest.approx([0.25 * up] * 3 + [-0.75 * up], rel=1e-12)
    assert [w.advantage for w in first[0][5:]] == pytest.approx([-0.25 * down, -0.25 * down, 0.75 * down,
                                                                 -0.25 * down], rel=1e-12)
    assert advantages(second) == [[0.0], [0.0]]
    tokens = 6 + 8 + 2 + 1 + 1
    everything = [w for row in first + second for w in row]
    assert all((w.policy, w.kl) == pytest.approx((1 / tokens, 0.5 / tokens)) for w in everything)
    assert sum(w.tokens for w in everything) == tokens


def test_fr3e_branches_the_first_right_and_the_first_wrong_rollout_at_the_highest_entropies():
    model, rng = make_model(), np.random.default_rng(0)
    responses = [rng.integers(2, 23, n).tolist() + [EOS] for n in (20, 12, 9, 3)]
    groups = [Group([3, 5], [Trajectory(y, r) for y, r in zip(responses, (0.0, 0.0, 1.0, 1.0))]),
              Group([3, 5], [Trajectory(y, 0.0) for y in responses]),
              Group([3, 5], [Trajectory(responses[3], 1.0), Trajectory(responses[0], 0.0)])]
    chosen, forwarded = fr3e_states(policy_of(model, Config()), groups, None)
    assert [[len(t.pivots) for t in g.trajectories] for g in chosen] == [[4, 0, 4, 0], [0] * 4, [3, 4]]
    for t in (chosen[0].trajectories[0], chosen[0].trajectories[2]):
        p = model(input_ids=torch.tensor([[3, 5] + t.response])).logits[0, 1:-1].softmax(-1)
        entropy = (-(p * p.log()).sum(-1)).tolist()
        best = sorted(range(1, len(t.response)), key=lambda i: entropy[i], reverse=True)[:4]     # 0 is the question
        assert t.pivots == sorted(best)
    assert forwarded == sum(len(row.ids) for row in deep_grpo.pack_groups(model, groups))


# ---- RRPO, SRPO ----

def test_reset_weights_by_hand():
    probe = Trajectory([5] * 7, 0.0, [3], [[6] * 2, [6] * 4, [6], [6]], [1.0, 0.0, 0.0, 0.0])
    rest = [Trajectory([5] * n, r) for n, r in ((3, 1.0), (5, 0.0), (2, 1.0), (4, 0.0))]
    groups = [Group([3], [rest[0], probe, *rest[1:]]), Group([3], [Trajectory([5], 1.0)] * 5)]
    first, second = reset_weights(groups, Config(beta=0.5))
    assert first[1][0] == (7, 0.0, 0.0, 0.0)                                   # the probe itself is not trained
    half = 0.5 / (math.sqrt(1 / 3) + 1e-6)
    assert [first[i][0].advantage for i in (0, 2, 3, 4)] == pytest.approx([half, -half, half, -half], rel=1e-12)
    high, low = 0.75 / (0.5 + 1e-6), -0.25 / (0.5 + 1e-6)
    assert [w.advantage for w in first[1][1:]] == pytest.approx([high, low, low, low], rel=1e-12)
    for w in (first[0][0], *first[1][1:], first[2][0]):
        assert (w.policy, w.kl) == pytest.approx((1 / (2 * 8 * w.tokens), 0.5 / (2 * 8 * w.tokens)), rel=1e-12)
    assert advantages(second) == [[0.0]] * 5 and second[0][0].policy == 1 / (2 * 5)
    lone = [Group([3], [Trajectory([5], 0.0, [0], [[6], [7]], [1.0, 0.0])])]       # nothing but the probe
    assert len(reset_weights(lone, Config())[0][0]) == 3


def test_reset_methods_have_no_clip(monkeypatch):
    model, old_model = make_model(), make_model(seed=3)
    groups = [Group([3], [Trajectory([5, 6, EOS], 1.0), Trajectory([7, EOS], 0.0), Trajectory([8, EOS], 0.0)])]
    settings = {k: v for k, v in METHODS["rrpo"].settings.items() if k.startswith("clip")}
    old, *_ = score_groups(old_model, groups, Config())
    now, *_ = score_groups(model, groups, Config())
    loss, metrics = objective(model, groups, Config(beta=0.0, **settings), None, old, weights=reset_weights)
    high, low = 2 / 3 / (math.sqrt(1 / 3) + 1e-6), -1 / 3 / (math.sqrt(1 / 3) + 1e-6)
    by_hand = sum(torch.exp(a - b).mean() * w / 3 for a, b, w in zip(now, old, (high, low, low)))
    assert loss.item() == pytest.approx(-by_hand.item(), rel=1e-10) and metrics["clip_fraction"] == 0


def three_rollouts():
    return [Group([3], [Trajectory([8, EOS], 1.0), Trajectory([5, 2, 6, 2, 7, EOS], 0.0), Trajectory([5, EOS], 0.0)]),
            Group([4], [Trajectory([5, EOS], 1.0)]),
            Group([4], [Trajectory([8, 9, 2, 8, 2, EOS], 0.0)])]


def test_rrpo_resets_the_first_failure_to_the_begin_of_any_step():
    policy, seen = policy_of(None, Config()), []
    for _ in range(300):
        chosen, forwarded = rrpo_states(policy, three_rollouts(), None)
        assert [[t.pivot is None for t in g.trajectories] for g in chosen] == [[True, False, True], [True], [False]]
        seen.append((chosen[0].trajectories[1].pivot[0], chosen[2].trajectories[0].pivot[0]))
    assert forwarded == 0
    for state in (0, 2, 4):
        assert 70 < sum(first == state for first, _ in seen) < 130             # 100, 8 standard deviation
    assert {second for _, second in seen} == {0, 3}


def test_srpo_resets_to_the_step_that_the_model_names():
    asked = []

    def draw(prompts, k, *, max_new_tokens):
        asked.append((prompts, k, max_new_tokens))
        return [[[answers.pop(0)]] for _ in prompts]

    texts = {100: "Step 2 is wrong", 101: "1", 102: "no idea", 103: "12"}
    policy = policy_of(None, Config(), draw=draw, encode=lambda text: [text])
    policy.text = lambda ids: texts[ids[0]] if ids[0] in texts else word(ids)
    questions = [SimpleNamespace(text=name) for name in ("Why?", "How?", "Who?")]
    answers = [100, 101]
    chosen, _ = srpo_states(policy, three_rollouts(), questions)
    assert chosen[0].trajectories[1].pivot == [2] and chosen[2].trajectories[0].pivot == [0]
    assert asked == [([[SRPO_QUESTION.format(question="Why?", steps="1. w5.\n2. w6.\n3. w7")],
                       [SRPO_QUESTION.format(question="Who?", steps="1. w8 w9.\n2. w8.")]], 1, 8)]
    seen = set()
    for _ in range(100):                                                    # no number, or that of no step: any step
        answers = [102, 103]
        chosen, _ = srpo_states(policy, three_rollouts(), questions)
        seen.add((chosen[0].trajectories[1].pivot[0], chosen[2].trajectories[0].pivot[0]))
    assert {first for first, _ in seen} == {0, 2, 4} and {second for _, second in seen} == {0, 3}
    asked.clear()
    right = [Group([3], [Trajectory([5, EOS], 1.0)])]
    assert srpo_states(policy, right, questions)[0] == right and not asked


# ---- the whole step: what every method generates, forwards and trains ----

@pytest.mark.parametrize("method", METHODS)
def test_a_step_of_every_method_counts_its_tokens(method, tmp_path, monkeypatch):
    flags = ["--preset", "tiny", "--method", method, "--questions", "2", "--eval-every", "0", "--seed", "1"]
    run = train_gsm8k.prepare(train_gsm8k.parse_args([*flags, "--out", str(tmp_path / "run")]))
    drawn, forwarded, sample = [], [], train_gsm8k.sample
    monkeypatch.setattr(train_gsm8k, "sample", lambda *args, **more: drawn.append(sample(*args, **more)) or drawn[-1])

    def count(module, args, kwargs):
        if not kwargs["use_cache"]:                        # not of sampling
            forwarded.append(kwargs["input_ids"])

    run.model.base_model.register_forward_pre_hook(count, with_kwargs=True)
    for _ in range(2):                                     # the second step has right rollouts to branch, too
        drawn.clear(), forwarded.clear()
        metrics, _, questions, groups = train_gsm8k.train_step(run)
    tokens = [len(y) for tails in drawn for branches in tails for y in branches]
    assert metrics["generated_tokens"] == sum(tokens)
    named = tokens[len(questions) * run.config.group_size:][:sum(t.reward == 0 for g in groups for t in g.trajectories)]
    held = sum(len(y) for g in groups for t in g.trajectories for y in (t.response, *t.branches))
    if method == "srpo":                                   # besides, what the model answers when it is asked
        assert held < sum(tokens) <= held + 8 * len(named)
    else:
        assert held == sum(tokens) and metrics["sequences"] == len(tokens)
    assert metrics["forwarded_tokens"] == sum((ids != 0).sum().item() for ids in forwarded)      # 0 is padding
    spans = [w for group in METHODS[method].weights(groups, run.config) for row in group for w in row]
    assert metrics["trained_tokens"] == sum(w.tokens for w in spans if w.advantage and w.policy)
    assert sum(w.tokens for w in spans) == held and metrics["optimizer_steps"] == 1
    branched = [t for g in groups for t in g.trajectories if t.branches]
    shown = [line for line in train_gsm8k.sample_lines(run, questions, groups) if line["branches"]]
    for line in shown:
        assert line["response"].startswith(line["prefix"]) and len(line["branches"]) == run.config.branches
        for branch in line["branches"]:                    # a branch goes on from its own pivot
            right = grade_gsm8k(line["prefix"] + branch["text"], line["gold"])
            assert branch["reward"] <= right
    assert bool(shown) == bool(branched)
    assert bool(branched) == (METHODS[method].states is not None)
    assert all(len(t.branches) == run.config.branches * len(t.pivots) for t in branched)
    assert (len(run.recoverability.outcomes) > 0) == (method == "deep_grpo")


def test_step_tokens_are_equal_for_all_methods_and_budgets_survive_a_restart(tmp_path):
    flags = ["--preset", "tiny", "--questions", "1", "--eval-every", "0", "--step-tokens", "2500",
             "--budget-tokens", "5000"]
    rows = {}
    for method in ("grpo", "deep_grpo"):
        out = tmp_path / method
        assert train_gsm8k.main([*flags, "--method", method, "--out", str(out)]) == 0
        rows[method] = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        assert len(rows[method]) == 2                      # updates
        for step, row in enumerate(rows[method], start=1):
            # Whole questions: the last one begins below the mark.
            assert 0 <= row["generated_total"] - 2500 * step < 1.5 * row["generated_tokens"] / row["questions"]
    assert rows["deep_grpo"][0]["questions"] > 1
    out = tmp_path / "halves"
    assert train_gsm8k.main([*flags, "--method", "deep_grpo", "--steps", "1", "--out", str(out)]) == 0
    assert train_gsm8k.main(["--resume", str(out), "--steps", "40"]) == 0
    assert (out / "metrics.jsonl").read_text() == (tmp_path / "deep_grpo" / "metrics.jsonl").read_text()


# ---- the command line ----

@pytest.mark.parametrize("flags, message", [
    (["--method", "treerl", "--gamma", "1"], "--gamma: has no part in --method treerl, only in deep_grpo"),
    (["--method", "grpo", "--train-prefix"], "--train-prefix: has no part in --method grpo"),
    (["--method", "fr3e", "--no-std"], "--no-std: has no part in --method fr3e, only in deep_grpo, grpo, rrpo, srpo"),
    (["--method", "dr_grpo", "--branches", "8"], "--branches: --method dr_grpo is K = 0, got 8"),
    (["--method", "treerl", "--branches", "0"], "--branches: K = 0 is GRPO"),
    (["--step-tokens", "0"], "--step-tokens: must be at least 1"),
    (["--pivots", "0"], "pivots must be an integer of at least 1"),
    (["--one-stream", "--objective", "authors"], "one_stream is an ablation of objective 'paper'")])
def test_flags_without_a_part_in_the_method_are_named(flags, message, tmp_path, capsys):
    with pytest.raises((SystemExit, ValueError)) as caught:
        train_gsm8k.prepare(train_gsm8k.parse_args([*flags, "--preset", "tiny", "--out", str(tmp_path / "run")]))
    assert re.search(re.escape(message), capsys.readouterr().err + str(caught.value))


def test_settings_of_a_method_give_way_to_flags():
    args = train_gsm8k.parse_args(["--preset", "gsm8k", "--method", "rrpo"])
    assert (args.group_size, args.branches, args.clip_high, args.questions) == (5, 4, 1e6, 64)
    args = train_gsm8k.parse_args(["--preset", "gsm8k", "--method", "fr3e", "--branches", "4", "--stapo", "--maspo"])
    assert (args.group_size, args.branches, args.stapo, args.maspo, args.std) == (16, 4, True, True, True)
    args = train_gsm8k.parse_args(["--preset", "tiny", "--no-std", "--pivots", "2", "--uniform-pivot", "--branch-all"])
    assert (args.std, args.pivots, args.uniform_pivot, args.branch_all, args.one_stream) == (
        False, 2, True, True, False)
