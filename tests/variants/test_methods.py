"""The table of methods: its settings and flags, what all rows have in common, and whole steps of every method."""
import copy
import functools
import inspect
import json
import re
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import EOS, make_model
from small_policy import make_policy, pivots

import deep_grpo
import tasks.lock
import train_gsm8k
from deep_grpo import Config, Group, Trajectory
from grading import grade_gsm8k
from loss import sequence_weights
from recoverability import Recoverability
from resample import Continuation, sample
from tasks.lock import Lock
from trainer.session import sample_lines
from trainer.settings import parse_args
from variants import METHODS, attnrl, dr_grpo, fr3e, rrpo, spo, treerl, vcpo
from variants.spo import masked
from variants.stapo import silence_spurious

ABLATIONS = ["no_std", "two_pivots", "uniform_pivot", "branch_all", "train_prefix", "one_stream", "light_branches"]
NOT_ALL = ("grpo", "dr_grpo", "vcpo", "spo_chain")           # methods that branch less here than they may


# ---- the table ----

def test_settings_are_those_of_the_papers():
    """G and K of every method, beta where there is no KL term, and where there is no clip."""
    found = {name: (config.group_size, config.branches) for name, config in
             ((name, Config(**method.settings)) for name, method in METHODS.items())}
    assert found == {"deep_grpo": (8, 8), "grpo": (8, 0), "dr_grpo": (8, 0), "treerl": (6, 2), "attnrl": (6, 2),
                     "fr3e": (16, 16), "rrpo": (5, 4), "srpo": (5, 4), "spo_chain": (8, 4), "spo_tree": (6, 5),
                     "vcpo": (8, 0),
                     **dict.fromkeys(ABLATIONS, (8, 8))}
    others = {name: {k: v for k, v in method.settings.items() if k not in ("group_size", "branches")}
              for name, method in METHODS.items()}
    no_clip = {"clip_low": 1.0, "clip_high": 1e6}
    assert others == dict.fromkeys(METHODS, {}) | {"dr_grpo": {"beta": 0.0}, "vcpo": {"beta": 0.0, **no_clip},
                                               "rrpo": no_clip, "srpo": no_clip,
                                               "spo_tree": {"segment_tokens": 30}}
    assert {name: method.prob_mask for name, method in METHODS.items() if method.prob_mask is not None} == {
        "spo_chain": 0.9, "spo_tree": 0.9}


def test_lambda_weighs_two_streams_where_it_has_a_part():
    """Only there has each stream a normaliser of its own, which the probability mask has to keep."""
    assert {name for name, method in METHODS.items() if method.two_streams} == {
        "deep_grpo", *ABLATIONS} - {"one_stream"}


def test_the_fit_belongs_to_deep_grpo_and_its_ablations():
    assert {name for name, method in METHODS.items() if method.fits_p} == {"deep_grpo", *ABLATIONS}


def test_rows_name_the_functions_of_their_files():
    found = {name: (METHODS[name].choose_pivots, METHODS[name].weights)
             for name in METHODS if name not in ABLATIONS}
    own = deep_grpo.choose_pivots, sequence_weights
    assert found == {"deep_grpo": own, "grpo": own, "dr_grpo": (own[0], dr_grpo.weights),
                     "treerl": (treerl.choose_pivots, treerl.weights),
                     "attnrl": (attnrl.choose_pivots, treerl.weights),
                     "fr3e": (fr3e.choose_pivots, fr3e.weights), "rrpo": (rrpo.choose_pivots, rrpo.weights),
                     "srpo": (rrpo.choose_named, rrpo.weights),
                     "spo_chain": (spo.choose_chain_pivots, spo.chain_weights),
                     "spo_tree": (spo.grow_tree, spo.tree_weights), "vcpo": (own[0], vcpo.weights)}
    assert {name for name in found if METHODS[name].update is not deep_grpo.update} == {"vcpo"}
    assert METHODS["vcpo"].update is vcpo.update


@pytest.mark.parametrize("method", METHODS)
def test_functions_have_the_signatures_that_the_package_tells(method):
    def names(function):
        return [*inspect.signature(function).parameters]

    assert names(METHODS[method].choose_pivots) == "policy questions groups config recoverability rng".split()
    assert names(METHODS[method].weights)[:2] == ["groups", "config"]
    assert names(METHODS[method].update)[:3] == ["model", "optimizer", "groups"]
    assert METHODS[method].choose_pivots.__doc__ and METHODS[method].weights.__doc__


# ---- what all methods have in common ----

def two_questions(group_size=6):
    """Rollouts of several sentences, one or two words each; right and wrong ones in both questions.

    Every second token was drawn with a probability below .9: SPO asks for that.
    """
    rng = np.random.default_rng(0)

    def response(sentences):
        words = [x for _ in range(sentences) for x in (*rng.integers(5, 23, rng.integers(1, 3)).tolist(), 2)]
        return Continuation([*words, 7, EOS], np.log([0.95, 0.5] * len(words))[:len(words) + 2])

    return [Group([3, prompt], [Trajectory(response(7 + i), float(i in right)) for i in range(group_size)])
            for prompt, right in ((5, (1, 3)), (6, (0,)))]


QUESTIONS = [SimpleNamespace(text=text) for text in ("Why?", "How?")]


@functools.cache
def shared_model():
    """Lines 2 and 3 do not change the model, so one is enough."""
    return make_model()


def small(method, **settings):
    """A policy with the settings of a method, but for nodes of spo_tree that are as short as the rollouts here."""
    shorter = {"segment_tokens": 6, "max_new_tokens": 24} if method == "spo_tree" else {}
    policy = make_policy(shared_model(), **METHODS[method].settings | shorter | settings)
    policy.encode = lambda text: [3, 5]
    policy.rewards = lambda pairs: [float(sum(y) % 3 == 0) for _, y in pairs]          # of what spo_tree draws
    return policy


def explored(method, seed=0, **settings):
    """Lines 2 and 3 of a method: (config, groups with K branches of made-up tokens on every Fork)."""
    policy = small(method, **settings)
    torch.manual_seed(seed)                                                # of SRPO's answers, and of spo_tree
    rng, groups = np.random.default_rng(seed), two_questions()
    groups = METHODS[method].choose_pivots(policy, QUESTIONS, groups, policy.config, Recoverability(), rng)
    for number, fork in enumerate(fork for g in groups for t in g.trajectories for fork in t.forks):
        fork.branches = [[8] * (1 + (number + k) % 4) for k in range(policy.config.branches)]
        fork.rewards = [float((number + k) % 3 == 0) for k in range(policy.config.branches)]
    return policy.config, groups


@pytest.mark.parametrize("method", METHODS)
def test_line_2_adds_forks_and_nothing_else(method):
    policy, groups = small(method), two_questions()
    chosen = METHODS[method].choose_pivots(policy, QUESTIONS, groups, policy.config, Recoverability(),
                                           np.random.default_rng(0))
    assert groups == two_questions()                                       # the argument is left alone
    forks = [fork for g in chosen for t in g.trajectories for fork in t.forks]
    assert all(fork.branches == fork.rewards == [] and 0 <= fork.ratio <= 1 for fork in forks)
    assert all(0 <= fork.pivot < len(t.response) for g in chosen for t in g.trajectories for fork in t.forks)
    assert all(len({fork.pivot for fork in t.forks}) == len(t.forks) for g in chosen for t in g.trajectories)
    bare = [Group(g.prompt, [replace(t, forks=[]) for t in g.trajectories]) for g in chosen]
    if method == "spo_tree":                                               # it adds trajectories after each of these
        bare = [Group(g.prompt, [node[0] for node in spo.level_1(g.trajectories, policy.config)]) for g in bare]
    assert bare == groups and bool(forks) == (policy.config.branches > 0)


@pytest.mark.parametrize("method", METHODS)
def test_weights_are_those_of_all_loss_tokens_in_order(method):
    config, groups = explored(method, beta=0.25)
    before = copy.deepcopy(groups)
    spans = METHODS[method].weights(groups, config)
    assert groups == before
    ends = np.cumsum([span.tokens for span in spans]).tolist()
    lengths = [len(y) for g in groups for t in g.trajectories for y in (t.response, *(y for _, y in t.branches))]
    assert set(np.cumsum(lengths).tolist()) <= set(ends) and ends[-1] == sum(lengths)      # no span crosses a border
    if method in ("spo_chain", "spo_tree"):                # a token mean, but k3 is summed over each sequence
        n = (sum(len(g.trajectories) for g in groups) if method == "spo_chain" else
             sum(span.w > 0 for span in spans))
        total = sum(span.tokens for span in spans if span.w)
        assert {(span.w, span.w_kl) for span in spans} == {(0, 0), (1 / total, 0.25 / n)}
    else:
        assert all(span.w_kl == pytest.approx(0.25 * span.w, rel=1e-12) and span.w >= 0 for span in spans)
    assert any(span.A > 0 for span in spans) and any(span.A < 0 for span in spans)


@pytest.mark.parametrize("method", METHODS)
def test_nothing_is_learned_where_all_rewards_are_equal(method):
    config, groups = explored(method)
    for reward in (0.0, 1.0):
        for t in (t for g in groups for t in g.trajectories):
            t.reward = reward
            for fork in t.forks:
                fork.rewards = [reward] * len(fork.branches)
        assert all(span.A == 0 for span in METHODS[method].weights(groups, config))


@pytest.mark.parametrize("method", METHODS)
def test_a_batch_without_questions_is_no_update(method):
    """With --lag the first steps have no batch to train."""
    model = shared_model()
    before = [p.detach().clone() for p in model.parameters()]
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    metrics = METHODS[method].update(model, optimizer, [], Config(**METHODS[method].settings), stale=True,
                                     weights=METHODS[method].weights, reweigh=silence_spurious)
    assert metrics["optimizer_steps"] == metrics["forwarded_tokens"] == metrics["loss"] == 0
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before))


# ---- flags ----

@pytest.mark.parametrize("method", METHODS)
def test_a_method_has_the_flags_that_change_it_and_no_others(method):
    """Every flag that only some methods have is tried with every method: does it change a pivot or a weight?"""
    changes = {"gamma": -3.0, "lam": 0.25, "segment_tokens": 4, "objective": "authors"}
    assert {*changes, "branch_share"} == {flag for row in METHODS.values() for flag in row.flags}      # test_thin.py

    def outcome(**settings):
        results = [explored(method, seed, **settings) for seed in range(4)]
        return [(pivots(groups), METHODS[method].weights(groups, config)) for config, groups in results]

    plain = outcome()
    for flag, value in changes.items():
        assert (outcome(**{flag: value}) != plain) == (flag in METHODS[method].flags), flag


@pytest.mark.parametrize("method", METHODS)
def test_flags_without_a_part_in_the_method_are_refused(method, capsys):
    for flag, value in {"gamma": 1.5, "lam": 0.5, "segment_tokens": 4, "objective": "authors",
                        "branch_share": 0.5}.items():
        argv = ["--preset", "tiny", "--method", method, f"--{flag.replace('_', '-')}", str(value)]
        if flag in METHODS[method].flags:
            assert getattr(parse_args(argv), flag) == value
            continue
        capsys.readouterr()
        with pytest.raises(SystemExit, match="2"):
            parse_args(argv)
        error, = capsys.readouterr().err.splitlines()
        known = ", ".join(name for name, row in METHODS.items() if flag in row.flags)
        assert f"has no part in --method {method}, only in {known} (" in error


@pytest.mark.parametrize("flags, message", [
    (["--method", "treerl", "--gamma", "1"], "--gamma: has no part in --method treerl, only in deep_grpo, no_std"),
    (["--maspo", "--clip-high", ".3"], "--maspo: has no clip, leave out --clip-low and --clip-high"),
    (["--method", "no_std", "--objective", "authors"], "--objective: has no part in --method no_std, only in"),
    (["--method", "one_stream", "--objective", "authors"], "--objective: has no part in --method one_stream"),
    (["--method", "dr_grpo", "--branches", "8"], "--branches: --method dr_grpo is K = 0, got 8"),
    (["--method", "treerl", "--branches", "0"], "--branches: K = 0 is GRPO"),
    (["--method", "ppo"], "--method: invalid choice: 'ppo'"),
    (["--method", "spo_tree", "--segment-tokens", "0"], "--segment-tokens: --method spo_tree has nodes of at least"),
    (["--step-tokens", "0"], "--step-tokens: must be at least 1"),
    (["--group-size", "0"], "group_size must be an integer of at least 1")])
def test_what_a_method_cannot_do_is_named(flags, message, tmp_path, capsys):
    with pytest.raises((SystemExit, ValueError)) as caught:
        train_gsm8k.prepare(parse_args([*flags, "--preset", "tiny", "--out", str(tmp_path / "run")]))
    assert re.search(re.escape(message), capsys.readouterr().err + str(caught.value))


def test_settings_of_a_method_give_way_to_flags():
    args = parse_args(["--preset", "gsm8k", "--method", "rrpo"])
    assert (args.group_size, args.branches, args.clip_high, args.questions) == (5, 4, 1e6, 64)
    args = parse_args(["--preset", "gsm8k", "--method", "fr3e", "--branches", "4", "--stapo", "--maspo"])
    assert (args.group_size, args.branches, args.stapo, args.maspo) == (16, 4, True, True)
    args = parse_args(["--preset", "tiny", "--method", "dr_grpo", "--beta", "0.5", "--branches", "0"])
    assert (args.beta, args.branches, args.stapo, args.maspo) == (0.5, 0, False, False)


# ---- whole steps ----

def shorten_the_task(monkeypatch, turns=3):
    """Ask 64 short questions without a hard turn. An epoch of long ones takes as long to encode as a step."""
    make_rows = tasks.lock.make_rows
    monkeypatch.setattr(tasks.lock, "make_rows",
                        lambda lock, n, seed: make_rows(Lock((turns, turns), 0, (1, 1)), min(n, 64), seed))


# One ablation stays here; each of the others replaces one function, too, and its step is among the slow tests.
@pytest.mark.parametrize("method", [
    pytest.param(name, marks=pytest.mark.slow if name in ABLATIONS and name != "train_prefix" else ())
    for name in METHODS])
def test_a_step_of_every_method_counts_its_tokens(method, tmp_path, monkeypatch):
    shorten_the_task(monkeypatch, turns=5 if method in ("attnrl", "train_prefix") else 3)      # they need more steps
    flags = ["--preset", "tiny", "--method", method, "--questions", "2", "--eval-every", "0", "--seed", "3",
             "--temperature", "1.8", "--max-new-tokens", "64"]                 # so hot that many rollouts are wrong
    if METHODS[method].settings.get("branches", 8) >= 8:                       # fewer are enough here
        flags += ["--group-size", "6", "--branches", "4"]
    if method == "spo_tree":
        flags += ["--group-size", "4", "--branches", "2", "--segment-tokens", "8"]
    run = train_gsm8k.prepare(parse_args([*flags, "--out", str(tmp_path / "run")]))
    config, drawn, forwarded, learned = run.policy.config, [], [], []
    run.policy.sampler = lambda *args, **more: drawn.append(sample(*args, **more)) or drawn[-1]

    def count(module, args, kwargs):
        if not kwargs["use_cache"]:                        # not of sampling
            forwarded.append(kwargs["input_ids"])

    run.policy.model.base_model.register_forward_pre_hook(count, with_kwargs=True)
    for _ in range(2):                                     # the second step has right rollouts to branch, too
        drawn.clear(), forwarded.clear()
        metrics, _, questions, groups = train_gsm8k.train_step(run)
        learned.append(metrics["trained_tokens"])
    rollouts = [t for g in groups for t in g.trajectories]
    tokens = [len(y) for tails in drawn for branches in tails for y in branches]
    assert metrics["generated_tokens"] == sum(tokens)
    loss_tokens = held = sum(len(y) for t in rollouts for y in (t.response, *(y for _, y in t.branches)))
    if method == "spo_tree":                               # each response of a node holds the tokens that they share
        held -= 8 * sum(len(node) - 1 for g in groups for node in spo.level_1(g.trajectories, config))
        assert held < loss_tokens
    if method == "srpo":                                   # besides, what the model answers when it is asked
        assert held < sum(tokens) <= held + 8 * sum(t.reward == 0 for t in rollouts)
    else:
        assert held == sum(tokens) and metrics["sequences"] == len(tokens)
    # Zeros at the end of a row are padding.
    assert metrics["forwarded_tokens"] == sum((ids.flip(1).cumsum(1) > 0).sum().item() for ids in forwarded)

    spans = METHODS[method].weights(groups, config)
    if METHODS[method].prob_mask is not None:
        spans, unmasked = masked(METHODS[method].weights, METHODS[method].prob_mask)(groups, config), spans
        assert sum(s.tokens for s in spans if s.w) < sum(s.tokens for s in unmasked if s.w)
    assert sum(span.tokens for span in spans) == loss_tokens and metrics["optimizer_steps"] == 1
    trained = sum(span.tokens for span in spans if span.A and span.w)
    if method == "train_prefix":                           # and the prefix with every branch that has an advantage
        prefixes = sum(fork.pivot * len(fork.branches) for t in rollouts for fork in t.forks
                       if len(set(fork.rewards)) > 1)
        trained += prefixes
        assert prefixes > 0
    assert metrics["trained_tokens"] == trained and sum(learned) > 0

    branched = [t for t in rollouts if t.branches]
    shown = [line for line in sample_lines(run, questions, groups) if line["branches"]]
    for line in shown:
        assert line["response"].startswith(line["prefix"]) and len(line["branches"]) == config.branches
        for branch in line["branches"]:                    # a branch goes on from its own pivot
            assert branch["reward"] <= grade_gsm8k(line["prefix"] + branch["text"], line["gold"])
    assert bool(shown) == bool(branched) == (config.branches > 0)
    assert all(len(fork.branches) == len(fork.rewards) == config.branches for t in rollouts for fork in t.forks)
    forks = sum(len(t.forks) for t in rollouts)
    assert metrics["pivots"] == forks
    assert len(run.recoverability.outcomes) == 0 if not METHODS[method].fits_p else (
        len(run.recoverability.outcomes) >= forks > 0)


@pytest.mark.parametrize("method, forks", [
    ("deep_grpo", 4), ("grpo", 0), ("dr_grpo", 0), ("vcpo", 0), ("treerl", 6 * 2), ("attnrl", 4 * 2), ("fr3e", 2 * 4),
    ("rrpo", 1), ("srpo", 1), ("spo_chain", 18), ("two_pivots", 4 * 2), ("uniform_pivot", 4), ("branch_all", 6)])
def test_a_question_has_as_many_forks_as_the_rule_says(method, forks):
    """Six rollouts, two of them right. AttnRL branches round(6 exp(-1/3)) = 4 of them.

    SPO has a state before every fifth of the cut points, of which there are 10, 11, 12, 13, 15 and 16 here. How many
    forks a tree of SPO has, depends on what it draws (test_spo.py).
    """
    config, (first, _) = explored(method)
    assert sum(len(t.forks) for t in first.trajectories) == forks
    most = max(len(t.forks) for t in first.trajectories)
    assert most <= METHODS[method].forks(config) and (most == METHODS[method].forks(config) or method in NOT_ALL)


def test_the_training_script_passes_the_functions_of_the_row(tmp_path, monkeypatch):
    """A row whose weights are not handed on would train as DEEP-GRPO does, and no metric would say so."""
    shorten_the_task(monkeypatch)
    called = []

    def noted(name):
        function = getattr(METHODS["treerl"], name)
        return lambda *args, **options: called.append(name) or function(*args, **options)

    row = METHODS["treerl"]
    changed = type(row)(row.settings, noted("choose_pivots"), noted("weights"), noted("update"), flags=row.flags)
    monkeypatch.setitem(METHODS, "treerl", changed)
    run = train_gsm8k.prepare(parse_args(["--preset", "tiny", "--method", "treerl", "--questions", "1", "--eval-every",
                                          "0", "--out", str(tmp_path / "run")]))
    train_gsm8k.train_step(run)
    assert called == ["choose_pivots", "update", "weights"]


@pytest.mark.slow
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
