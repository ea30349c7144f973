"""Several processes against one: gloo on the CPU, real collectives, real sharding; and what happens when one dies.

A test names a function of this file; `on_ranks(n, name, ...)` calls it in n processes at once and returns what
each returned; n = 0 is a process without torchrun. They are forks of a process that has imported everything: a second
each, not ten.
"""
import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import traceback
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import EOS, make_model
from test_deep_grpo import example
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

import eval_math
import resample
import tasks.lock
import train_gsm8k
import trainer.model
import trainer.policy
from deep_grpo import ALONE, Config, Fork, Group, Trajectory, objective, score_groups, update
from packing import batch_costs, pack
from resample import Continuation
from trainer import decoding, ranks
from trainer.compiling import compiled_rows
from trainer.model import Ranks, checkpoint_activations, fsdp_modules, shard
from trainer.ranks import deal, distributed, rank, world_size
from trainer.session import owned
from variants import vcpo
from variants.rrpo import reset_failed

ROOT = Path(__file__).parents[2]


# ---- n processes ----

def serve():
    """Read requests, fork n processes for each, answer with their exit codes."""
    make_rows = tasks.lock.make_rows
    tasks.lock.make_rows = lambda task, n, seed: make_rows(task, min(n, 64), seed)              # to start fast
    train_gsm8k.plot_run = lambda out: None
    for line in sys.stdin:
        n, folder, name, args = json.loads(line)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        pids = []
        for i in range(max(n, 1)):
            pids.append(os.fork())
            if pids[-1] == 0:
                if n:
                    os.environ.update(RANK=str(i), LOCAL_RANK=str(i), WORLD_SIZE=str(n), MASTER_ADDR="127.0.0.1",
                                      MASTER_PORT=str(port))
                for stream, suffix in ((1, "out"), (2, "err")):
                    os.dup2(os.open(f"{folder}/{i}.{suffix}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), stream)
                code = 1
                try:
                    result = globals()[name](*args)
                    torch.save(result, f"{folder}/{i}.pt")
                    code = result if isinstance(result, int) else 0
                    ranks.end()
                except SystemExit as stop:
                    code = stop.code
                except BaseException:
                    traceback.print_exc()
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)
        print(json.dumps([os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]), flush=True)


def many(name, everything):
    return [globals()[name](*args) for args in everything]


class Processes:
    """The client of serve()."""

    def __init__(self, folder):
        self.folder, self.kept = folder, {}
        self.server = subprocess.Popen(
            [sys.executable, "-c", "import test_ranks; test_ranks.serve()"], text=True, cwd=ROOT,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            env=os.environ | {"PYTHONPATH": ":".join(sys.path), "OMP_NUM_THREADS": "1"})

    def run(self, n, name, *args):
        """(exit codes, stdouts, stderrs) of name(*args) in n processes."""
        print(json.dumps([n, str(self.folder), name, args]), file=self.server.stdin, flush=True)
        codes = json.loads(self.server.stdout.readline())
        streams = [[(self.folder / f"{i}.{suffix}").read_text() for i in range(len(codes))]
                   for suffix in ("out", "err")]
        return codes, *streams

    def once(self, n, name, everything, args):
        """What name(*args) returns in n processes, one of the calls with the list `everything` of arguments.

        All of them are made in the same processes, and only when the first result is asked for: most of the time of
        one is that of its first steps.
        """
        key = json.dumps([n, name, everything])
        if key not in self.kept:
            self.kept[key] = self(n, "many", name, everything)
        return [results[everything.index(args)] for results in self.kept[key]]

    def __call__(self, n, name, *args):
        codes, _, errors = self.run(n, name, *args)
        assert codes == [0] * len(codes), "\n".join(errors)
        return [torch.load(self.folder / f"{i}.pt", weights_only=False) for i in range(len(codes))]


@pytest.fixture(scope="module")
def on_ranks(tmp_path_factory):
    processes = Processes(tmp_path_factory.mktemp("ranks"))
    yield processes
    processes.server.stdin.close()
    processes.server.wait()


def whole(x):
    return x.full_tensor() if isinstance(x, DTensor) else x


class Collectives(TorchDispatchMode):
    """The collectives that are called in the block: (name, type of what is sent)."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "c10d":
            sent = [x for x in torch.utils._pytree.tree_leaves(args) if isinstance(x, torch.Tensor)]
            self.calls.append((str(function), sent[-1].dtype if sent else None))
        return function(*args, **(kwargs or {}))


# ---- dealing work out ----

@pytest.mark.parametrize("seed", range(20))
def test_deal_cuts_into_contiguous_parts_of_equal_cost(seed):
    rng = random.Random(seed)
    costs = [rng.choice([1, rng.random() + 0.01, 30 * rng.random() + 0.01]) for _ in range(rng.randint(1, 40))]
    for n in (1, 2, 3, 8):
        parts = deal(costs, n)
        assert len(parts) == n
        assert [c for part in parts for c in costs[part]] == costs                 # all, once, in order
        assert max(sum(costs[part]) for part in parts) <= sum(costs) / n + max(costs)
    assert deal([], 2) == [slice(0, 0), slice(0, 0)]


def test_deal_by_hand():
    costs = [4, 1, 1, 1, 1, 4, 4]                                                 # 16 in all
    assert [costs[part] for part in deal(costs, 2)] == [[4, 1, 1, 1, 1], [4, 4]]
    assert [costs[part] for part in deal(costs, 4)] == [[4], [1, 1, 1, 1], [4], [4]]
    assert [costs[part] for part in deal([1, 1], 3)].count([]) == 1


def test_imbalance_by_hand(monkeypatch):
    monkeypatch.setattr(ranks, "world_size", lambda: 2)
    assert ranks.imbalance([3, 3, 1, 1]) == 6 * 2 / 8                              # [3 3] [1 1]
    assert ranks.imbalance([3, 3, 1, 1], [1, 3, 1, 1]) == 6 * 2 / 8
    assert ranks.imbalance([3, 3, 1, 1], [5, 2, 2, 1]) == 5 * 2 / 8                # [3] [3 1 1]
    assert ranks.imbalance([]) == 1.0


def collectives():
    """What gather, first and share give on this rank, with parts that are empty and errors of one rank."""
    ranks.start()
    got = {"gather": ranks.gather(rank), "first": ranks.first(lambda: f"of {rank()}"),
           "share": ranks.share(list(range(10)), lambda part: [(x * x, rank()) for x in part]),
           "few": ranks.share([5], lambda part: [x + 1 for x in part])}

    def fails(error):
        if rank() == world_size() - 1:
            raise error

    for error in (ValueError("bad"), FileNotFoundError("gone"), FloatingPointError("nan"), SystemExit(2)):
        try:
            ranks.gather(lambda error=error: fails(error))
        except (ValueError, OSError, FloatingPointError, SystemExit) as raised:
            got[type(error).__name__] = (type(raised).__name__, str(raised))
    return got


@pytest.mark.parametrize("n", [2, 3])
def test_collectives_give_all_ranks_the_same(on_ranks, n):
    for got in on_ranks(n, "collectives"):
        owners = [owner for _, owner in got["share"]]
        assert got["gather"] == list(range(n)) and got["first"] == "of 0" and got["few"] == [6]
        assert [x for x, _ in got["share"]] == [i * i for i in range(10)]
        assert owners == sorted(owners) and set(owners) == set(range(n))
        assert got["ValueError"] == ("ValueError", "bad") and got["FloatingPointError"][1] == "nan"
        assert got["FileNotFoundError"] == ("OSError", "gone") and got["SystemExit"] == ("SystemExit", "2")


def test_a_fault_of_one_rank_ends_the_checks_of_all(on_ranks):
    """A rank that went on alone would wait for the others in the forward pass of its next check."""
    assert on_ranks(2, "faults") == [("bad", [0, 1], None)] * 2


def faults():
    ranks.start()
    tried = []

    def check(n):
        tried.append(n)
        return "bad" if (rank(), n) == (1, 1) else None

    return ranks.first_fault(partial(check, n) for n in range(3)), tried, ranks.first_fault([lambda: None])


def test_an_error_that_is_a_bug_keeps_its_traceback(on_ranks):
    codes, _, errors = on_ranks.run(2, "bug")
    assert codes == [1, 1] and "ZeroDivisionError" in errors[1]


def bug():
    ranks.start()
    ranks.gather(lambda: 1 / (1 - rank()))


# ---- the objective: gradients, denominators, metrics ----

def one_side_each(n):
    """n questions with a row each, of very different length: some ranks get only failures, the last one none."""
    failed = Group([7], [Trajectory([4, 5, 6, 7, 2] * 6, 0.0,
                                    [Fork(25, 0.5, [[3, 8, 4, 5, EOS], [6, EOS]], [0.0, 1.0])])])
    half = Group([8, 9], [Trajectory([4, 6, 5, 3] * 5, 0.0, [Fork(16, 0.5, [[EOS], [5, 6, EOS]], [0.0, 1.0])])])
    right = Group([2, 9], [Trajectory([5, EOS], 1.0), Trajectory([8, EOS], 1.0)])
    return [failed, *[half] * (n - 2), right]


CASES = {"example": (example, 30), "one micro-batch": (example, None), "a row each": (example, 1),
         "one side each, 2": (lambda: one_side_each(2), 45), "one side each, 3": (lambda: one_side_each(3), 45),
         "fewer rows than ranks": (lambda: example()[1:2], 30)}


def learn(case, same_policy, checkpointing, tied):
    """Everything that the update computes, on this rank, or in one process alone: with whole gradients and weights."""
    ranks.start()
    model, old = make_model(tie_word_embeddings=tied), make_model(tie_word_embeddings=tied)
    ref = make_model(seed=1, tie_word_embeddings=tied).requires_grad_(False)
    with torch.no_grad():
        for p in old.parameters():
            p += 0.02 * torch.randn_like(p)
    if distributed():
        model, old, ref = shard(model), shard(old), shard(ref)
    if checkpointing:
        checkpoint_activations(model)
    scored, score = set(), trainer.model.score_rows

    def score_rows(which, rows, temperature, **options):
        scored.update(row.ids[0] for row in rows if which is model)
        return score(which, rows, temperature, **options)

    trainer.model.score_rows = score_rows
    make_groups, tokens = CASES[case]
    config = Config(lam=0.4, beta=0.3, temperature=0.8, clip_low=0.1, clip_high=0.25)
    mine = Ranks() if distributed() else ALONE
    logps, entropies, forwarded = score_groups(old, make_groups(), config, tokens, mine)
    loss, metrics = objective(model, make_groups(), config, ref, None if same_policy else logps, tokens,
                              backward=True, ranks=mine)
    grads = {name: whole(p.grad).clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.01)
    updated = update(model, optimizer, make_groups(), Config(beta=0.3, updates=2), ref, tokens, mine)
    trainer.model.score_rows = score
    return {"loss": loss.item(), "metrics": metrics, "grads": grads, "updated": updated, "scored": scored,
            "old": (logps, entropies), "forwarded": forwarded,
            "weights": {name: whole(p.detach()) for name, p in model.named_parameters()}}


LEARNED = [                                            # n, case, same_policy, checkpointing, tied
    (2, "example", False, False, True), (3, "example", False, True, False), (2, "example", True, True, True),
    (3, "one micro-batch", False, False, False), (2, "a row each", False, False, True),
    (2, "one side each, 2", False, False, True), (3, "one side each, 3", False, False, True),
    (3, "fewer rows than ranks", False, False, True)]


@pytest.mark.parametrize("n, case, same_policy, checkpointing, tied", LEARNED)
def test_n_ranks_compute_the_gradient_of_one_process(on_ranks, n, case, same_policy, checkpointing, tied):
    alone = [[case, same_policy, False, tied] for _, case, same_policy, _, tied in LEARNED]
    expected, = on_ranks.once(0, "learn", alone, [case, same_policy, False, tied])
    results = on_ranks.once(n, "learn", [list(args) for m, *args in LEARNED if m == n],
                            [case, same_policy, checkpointing, tied])
    first_tokens = {g.prompt[0] for g in CASES[case][0]()}
    assert set.union(*(got["scored"] for got in results)) == first_tokens
    if case.startswith("one side each"):
        assert results[0]["scored"] == {7} and results[-1]["scored"] == {2}
    for got in results:
        assert got["forwarded"] == expected["forwarded"]
        for scores, own_scores in zip(got["old"], expected["old"]):                         # log pi, entropies
            assert len(scores) == sum(len(g.trajectories) for g in CASES[case][0]())
            torch.testing.assert_close(scores, own_scores, rtol=1e-11, atol=1e-13)
        assert got["loss"] == pytest.approx(expected["loss"], rel=1e-12, abs=1e-14)
        for which in ("metrics", "updated"):
            ignored = ("padding", "imbalance", "sampler_gap", "sampler_gap_max")    # of how rows were dealt; not known
            own = {name for name in got[which] if name not in ignored}
            assert {name: got[which][name] for name in own} == pytest.approx(
                {name: expected[which][name] for name in own}, rel=1e-11, abs=1e-14)
            assert 0 <= got[which]["padding"] < 1 <= got[which]["imbalance"] <= n
        for name, grad in expected["grads"].items():
            assert grad.abs().max() > 1e-4
            torch.testing.assert_close(got["grads"][name], grad, rtol=1e-10, atol=1e-13)
        for name, weights in expected["weights"].items():
            torch.testing.assert_close(got["weights"][name], weights, rtol=1e-10, atol=1e-11)


def test_imbalance_of_micro_batches_by_hand():
    rows = [pack([3], [4] * (n - 1)) for n in (10, 8, 8, 3)]
    metrics = batch_costs(rows, [[0], [1], [2, 3], []], 2)                         # 10 8 | 16 0
    assert metrics["forwarded_tokens"] == 29 and metrics["padding"] == pytest.approx(1 - 29 / 34)
    assert metrics["imbalance"] == pytest.approx((10 + 16) * 2 / 34)


# ---- what is sharded, and in which precision ----

def storage(dtype_name):
    """Sizes and types of this rank's tensors after one update, and of what a layer sees in its forward."""
    ranks.start()
    dtype = getattr(torch, dtype_name)
    model = shard(make_model(dtype=torch.float32, tie_word_embeddings=False), dtype)
    ref = shard(make_model(seed=1, dtype=torch.float32, tie_word_embeddings=False).requires_grad_(False), dtype)
    optimizer, seen = torch.optim.AdamW(model.parameters(), lr=1e-3), []
    model.base_model.layers[1].mlp.register_forward_hook(
        lambda module, args, out: seen.append((str(module.up_proj.weight.dtype), str(out.dtype))))
    with Collectives() as collectives:
        objective(model, example(), Config(beta=0.3), ref, None, 30, backward=True, ranks=Ranks())
    optimizer.step()

    def size(tensors):
        local = [x.to_local() for x in tensors]
        return sum(x.numel() for x in local), {str(x.dtype) for x in local}

    moments = [x for state in optimizer.state.values() for x in state.values() if isinstance(x, DTensor)]
    return {"weights": size(model.parameters()), "gradients": size(p.grad for p in model.parameters()),
            "moments": size(m for m in moments if m.ndim), "reference": size(ref.parameters()),
            "seen": set(seen), "summed in": {str(x) for name, x in collectives.calls if "reduce_scatter" in name},
            "gathered in": {str(x) for name, x in collectives.calls if "allgather_base" in name}}


def test_weights_gradients_moments_and_reference_are_sharded_in_fp32_and_compute_is_bf16(on_ranks):
    results = on_ranks(2, "storage", "bfloat16")
    parameters = sum(p.numel() for p in make_model(tie_word_embeddings=False).parameters())
    for name, total in (("weights", 1), ("gradients", 1), ("moments", 2), ("reference", 1)):
        sizes = [got[name][0] for got in results]
        assert sum(sizes) == total * parameters and max(sizes) < 0.52 * total * parameters
        assert all(got[name][1] == {"torch.float32"} for got in results)
    for got in results:
        assert got["seen"] == {("torch.bfloat16", "torch.bfloat16")}
        assert got["summed in"] == {"torch.float32"} and got["gathered in"] == {"torch.bfloat16"}


# ---- generation ----

FLAGS = ["--preset", "tiny", "--questions", "3", "--group-size", "4", "--branches", "3", "--eval-rows", "5",
         "--max-new-tokens", "40"]


SAMPLERS = {"resample": resample.sample, "decoding": decoding.sample,
            "compiled": partial(decoding.sample, compile_layers=True)}


def draws(path):
    """Greedy and random draws on this rank, and the collectives that they took."""
    ranks.start()
    run = train_gsm8k.prepare(train_gsm8k.parse_args([*FLAGS, "--out", "/none"]))
    policy, prompts = run.policy, [q.prompt for q in run.questions[:5]]
    got, counts, sample = {}, [], SAMPLERS[path]

    def counted(model, *args, **kwargs):
        with Collectives() as collectives:
            result = sample(model, *args, **kwargs)
        counts.append(len(collectives.calls))
        return result

    policy.sampler = counted
    with Collectives() as collectives:
        got["greedy"] = policy.sample(prompts, 2, [9, 40, 3, 25, 12], [9, 1, 3, 25, 12], temperature=0)
        got["few"] = policy.sample(prompts[:1], 1, 5, temperature=0)
        got["random"] = policy.sample([[3, 4]], 2 * world_size(), 40, temperature=5.0)[0]
    if distributed():
        got["counts"], counts[:] = list(counts), []
        got["gathers"] = sum("allgather_base" in name for name, _ in collectives.calls)
        got["groups"] = len(fsdp_modules(policy.model))
        got["sharded"] = all(isinstance(p, DTensor) for p in policy.model.parameters())
        counted(policy.model, prompts[:1], 1, max_new_tokens=8, eos_token_id=policy.stop, pad_token_id=0, temperature=0)
        got["ungathered"] = counts[0]
    return got


@pytest.mark.parametrize("n, path", [(2, "resample"), (3, "resample"), (2, "decoding"),
                                     pytest.param(2, "compiled", marks=pytest.mark.slow)])
def test_sampling_gathers_each_layer_once_per_call_and_not_per_token(on_ranks, n, path):
    expected, = on_ranks.once(0, "draws", [["resample"]], ["resample"])
    for got in on_ranks(n, "draws", path):
        assert got["greedy"] == expected["greedy"] and got["few"] == expected["few"]
        assert got["counts"] == [0, 0, 0]                      # while it generates: none
        assert got["groups"] == 4 and got["gathers"] == 3 * 4  # for each call: each layer and the root, once
        assert got["sharded"]                                  # and given back after it
        assert got["ungathered"] > 3 * 8                       # without: (the counter counts) each layer, each token
        assert len({tuple(y) for y in got["random"]}) == 2 * n        # no rank draws what another has drawn


# ---- a step, a run, a resumed run ----

def drawn(self, prefixes, k, max_new_tokens, expected_tokens=None, temperature=None):
    """In the place of Policy.sample: continuations that depend on prefix and number alone, the same on 1 rank and on n.
    """
    def one(prefix, i):
        rng = random.Random(f"{prefix} {i}")
        y = [*rng.choices(range(4, 16), k=rng.randint(3, 40)), *([self.stop[0]] if rng.random() < 0.9 else [])]
        return Continuation(y, [-rng.random() for _ in y], [rng.random() for _ in y])

    result = [[one(prefix, i) for i in range(k)] for prefix in prefixes]
    self.generated += sum(len(y) for branches in result for y in branches)
    return result


def graded(self, question, response):
    """In the place of Policy.reward: by the text, so that some ranks grade failures only, and some none."""
    return float(len(response) > 14 and response[-1] in self.stop)


def steps(n, *flags):
    """n training steps on fixed rollouts: metrics, forks, fit and weights on this rank."""
    ranks.start()
    trainer.policy.Policy.sample, trainer.policy.Policy.reward = drawn, graded
    run = train_gsm8k.prepare(train_gsm8k.parse_args([*FLAGS, "--out", "/none", *flags]))
    got = []
    for _ in range(n):
        metrics, _, _, groups = train_gsm8k.train_step(run)
        got.append((metrics, [[t.forks for t in g.trajectories] for g in groups]))
    return {"steps": got, "compiled": run.score is compiled_rows, "fit": run.recoverability.state_dict(),
            "weights": {name: whole(p.detach()) for name, p in run.policy.model.named_parameters()}}


def disputed_steps(n):
    """steps(n), and on every rank but the first line 2 chooses the question itself, whatever Q(t) says."""
    method = train_gsm8k.METHODS["deep_grpo"]

    def choose_pivots(*args):
        groups = method.choose_pivots(*args)
        return groups if rank() == 0 else reset_failed(groups, lambda x, t: 0)

    train_gsm8k.METHODS["deep_grpo"] = replace(method, choose_pivots=choose_pivots)
    return steps(n)


@pytest.mark.parametrize("n, flags", [(2, ["--offload-optimizer"]), (3, [])])
def test_n_ranks_make_the_steps_of_one_process(on_ranks, n, flags):
    expected, = on_ranks.once(0, "steps", [[4]], [4])
    assert expected["fit"]["fitted"] and expected["fit"]["w"] != 0
    for got in on_ranks(n, "steps", 4, *flags):
        assert got["fit"] == expected["fit"]                               # bit for bit: outcomes, w, b
        for (metrics, forks), (own_metrics, own_forks) in zip(got["steps"], expected["steps"]):
            assert forks == own_forks and sum(bool(of_rollout) for of_group in forks for of_rollout in of_group) > 3
            assert metrics == pytest.approx(own_metrics, rel=1e-4, abs=1e-6)             # float32
        for name, weights in expected["weights"].items():      # lr is 1e-4: an Adam step is about that long ...
            difference = got["weights"][name] - weights        # ... in either direction: single entries whose gradient
            assert difference.abs().max() < 1e-5               # is next to 0 make its rounding large, the rest not
            assert difference.square().mean().sqrt() < 1e-7


@pytest.mark.slow
def test_a_compiled_update_of_two_ranks_is_that_of_one_process(on_ranks):
    (expected,) = on_ranks(0, "steps", 2, "--no-compile")
    for got in on_ranks(2, "steps", 2, "--compile"):
        assert got["compiled"] and not expected["compiled"]
        for (metrics, forks), (own_metrics, own_forks) in zip(got["steps"], expected["steps"]):
            assert forks == own_forks and metrics == pytest.approx(own_metrics, rel=1e-3, abs=1e-5)
        for name, weights in expected["weights"].items():
            assert (got["weights"][name] - weights).square().mean().sqrt() < 1e-6


def stale_update(n):
    """An update of VCPO on rollouts of another policy: its metrics and the weights on this rank."""
    ranks.start()
    model, old = make_model(), make_model()
    with torch.no_grad():
        for p in old.parameters():
            p += 0.03 * torch.randn_like(p)
    logps = iter(score_groups(old, example(), Config())[0])
    groups = [Group(g.prompt, [Trajectory(Continuation(t.response, next(logps)[:len(t.response)]), t.reward)
                               for t in g.trajectories]) for g in example()]
    model = shard(model) if distributed() else model
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    metrics = vcpo.update(model, optimizer, groups, Config(branches=0, beta=0.0), micro_batch_tokens=n,
                          ranks=Ranks() if distributed() else ALONE)
    return metrics, {name: whole(p.detach()) for name, p in model.named_parameters()}


def test_n_ranks_make_the_stale_update_of_one_process(on_ranks):
    """The norm of each rollout's gradient is that of all shards together."""
    expected, weights = on_ranks(0, "stale_update", 30)[0]
    assert 0 < expected["ess_share"] < 0.9 and expected["grad_norm"] > 1e-3
    for got, own in on_ranks(2, "stale_update", 30):
        names = ("ess_share", "lr_scale", "grad_norm", "loss", "forwarded_tokens", "trained_tokens")
        assert {name: got[name] for name in names} == pytest.approx({name: expected[name] for name in names}, rel=1e-9)
        for name in weights:
            torch.testing.assert_close(own[name], weights[name], rtol=1e-9, atol=1e-11)


BRANCHED = [[2, "--method", "treerl", "--branches", "2"], [2, "--method", "attnrl", "--segment-tokens", "3"],
            [2, "--method", "spo_tree", "--segment-tokens", "4", "--prob-mask", "1"]]
BRANCHED_SLOW = [[2, "--method", "fr3e"], [2, "--method", "rrpo"], [2, "--method", "srpo"]]


@pytest.mark.parametrize("args, everything", [
    *(pytest.param(args, BRANCHED, id=args[2]) for args in BRANCHED),
    *(pytest.param(args, BRANCHED_SLOW, id=args[2], marks=pytest.mark.slow) for args in BRANCHED_SLOW)])
def test_n_ranks_branch_the_states_of_one_process(on_ranks, args, everything):
    """What the states depend on is computed in parts: log-probabilities, entropies, attention; draws are rank 0's."""
    expected, = on_ranks.once(0, "steps", everything, args)
    assert sum(bool(forks) for _, groups in expected["steps"] for g in groups for forks in g) > 3
    for got in on_ranks.once(2, "steps", everything, args):
        for (metrics, forks), (own_metrics, own_forks) in zip(got["steps"], expected["steps"]):
            assert forks == own_forks and metrics == pytest.approx(own_metrics, rel=1e-4, abs=1e-6)
            assert metrics["grad_norm"] > 1e-3 and metrics["generated_tokens"] > 0


def selecting_steps(n):
    """steps(n) on questions that a teacher chooses, and on every rank but the first it is one who learns nothing."""
    learn = train_gsm8k.Teacher.learn

    def learn_on_the_first(teacher, groups):
        before, metrics = teacher.state_dict(), learn(teacher, groups)
        if rank() > 0:
            teacher.load_state_dict(before)
        return metrics

    train_gsm8k.Teacher.learn = learn_on_the_first
    return steps(n, "--select", "goldilocks", "--candidates", "8", "--teacher-lr", "0.5")


def test_all_ranks_ask_the_questions_of_the_first(on_ranks):
    """Forks depend on the prompt here. Features are computed in parts, and the choice is that of one process."""
    (expected,), results = on_ranks(0, "selecting_steps", 2), on_ranks(2, "selecting_steps", 2)
    of_first, other = ([metrics["predicted_utility"] for metrics, _ in got["steps"]] for got in results)
    assert other == [0.25] * 2 and of_first[1] != 0.25
    for got in results:
        for (metrics, forks), (own_metrics, own_forks) in zip(got["steps"], expected["steps"]):
            assert forks == own_forks and metrics["observed_utility"] == own_metrics["observed_utility"] > 0
    assert of_first == pytest.approx([metrics["predicted_utility"] for metrics, _ in expected["steps"]], rel=1e-4)


def test_all_ranks_branch_the_pivots_of_the_first(on_ranks):
    """Pivots are agreed on: from log-probabilities that differ in a last digit, two ranks may choose two states."""
    (_, forks), = on_ranks(0, "steps", 1)[0]["steps"]
    assert any(fork.pivot for of_group in forks for of_rollout in of_group for fork in of_rollout)
    for got in on_ranks(2, "disputed_steps", 1):
        (_, agreed), = got["steps"]
        assert agreed == forks


def odd(self, question, response):
    """In the place of Policy.reward: what responses of 16 tokens can earn. Without any, nothing would be learned."""
    return float(sum(response) % 2)


def train(argv, reward=odd):
    """The command, with these rewards."""
    trainer.policy.Policy.reward = reward
    return train_gsm8k.main(argv)


OWN_REWARD = trainer.policy.Policy.reward


def train_as_it_is(argv):
    """The command, with the reward of the repository."""
    return train(argv, OWN_REWARD)


def resumed(folder, n_steps):
    """The run in `folder`, as train() would go on with it."""
    trainer.policy.Policy.reward = odd
    return train_gsm8k.prepare(train_gsm8k.parse_args(["--resume", folder, "--steps", str(n_steps)]))


SMALL = ["--preset", "tiny", "--questions", "2", "--group-size", "3", "--branches", "2", "--eval-rows", "4",
         "--max-new-tokens", "16", "--temperature", "3"]


def run_flags(out, steps, *more):
    return [*SMALL, "--steps", str(steps), "--eval-every", "2", "--save-every", "1", "--seed", "3", "--out", str(out),
            *more]


def files_of(out):
    return {name: (out / name).read_bytes() for name in ("metrics.jsonl", "samples.jsonl")}


@pytest.fixture(scope="module")
def whole_run(on_ranks, tmp_path_factory):
    """(folder, exit codes, stdouts, stderrs) of a run of three steps by two processes, from a model with stop ids."""
    folder = tmp_path_factory.mktemp("whole")
    shutil.copytree(ROOT / "assets" / "tiny", folder / "base")
    stop = {"eos_token_id": [1, 2], "pad_token_id": 0}
    (folder / "base" / "generation_config.json").write_text(json.dumps(stop))
    flags = run_flags(folder / "run", 3, "--model", str(folder / "base"))
    return folder / "run", *on_ranks.run(2, "train", flags)


@pytest.fixture
def killed_run(whole_run, tmp_path):
    """The folder of that run as it was when it had begun the third step: with logs that are ahead of the checkpoint."""
    out = tmp_path / "run"
    shutil.copytree(whole_run[0], out)
    shutil.rmtree(out / "checkpoints" / "step_3")
    return out


def state(folder, n_steps):
    """Whole weights, moments and fit of a run's newest checkpoint, as this number of ranks loads them."""
    ranks.start()
    run = resumed(folder, n_steps)
    names = {p: name for name, p in run.policy.model.named_parameters()}
    moments = {f"{names[p]} {key}": whole(value) for p, values in run.optimizer.state.items()
               for key, value in values.items()}
    return {"step": run.step, "fit": run.recoverability.state_dict(), "moments": moments,
            "weights": {name: whole(p.detach()) for p, name in names.items()}}


def same(a, b):
    """Nested dicts with tensors, equal bit for bit."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def test_a_resumed_sharded_run_equals_the_uninterrupted_one(on_ranks, whole_run, killed_run):
    on_ranks(2, "train", ["--resume", str(killed_run)])
    assert files_of(killed_run) == files_of(whole_run[0])
    expected, got = (on_ranks(2, "state", str(folder), 3) for folder in (whole_run[0], killed_run))
    assert expected[0]["step"] == 3 and same(expected[0], got[0]) and same(got[0], got[1])


@pytest.mark.parametrize("before, after", [(2, 3), (2, 0), pytest.param(0, 2, marks=pytest.mark.slow)])
def test_a_run_goes_on_with_another_number_of_ranks(before, after, on_ranks, killed_run, tmp_path):
    out = killed_run
    if before == 0:
        out = tmp_path / "alone"
        on_ranks(0, "train", run_flags(out, 2))
    expected, got = (on_ranks(n, "state", str(out), 3) for n in (before, after))
    assert expected[0]["step"] == 2 and all(same(other, expected[0]) for other in got)
    assert max(m.abs().max() for m in expected[0]["moments"].values()) > 1e-4
    on_ranks(after, "train", ["--resume", str(out), "--steps", "3"])
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [0, 1, 2, 3] and lines[-1]["grad_norm"] > 1e-2
    assert len({line["generated_total"] for line in lines}) == 4


def test_the_checkpoint_of_a_sharded_run_is_a_model_for_everybody(whole_run):
    folder = whole_run[0] / "checkpoints" / "step_3"
    model, _ = train_gsm8k.load_model(str(folder))
    base, _ = train_gsm8k.load_model(str(ROOT / "assets" / "tiny"))
    changed = [(a - b).abs().max().item() for a, b in zip(model.parameters(), base.parameters())]
    assert all(1e-5 < change < 0.01 for change in changed)
    assert {path.name for path in folder.iterdir()} >= {"config.json", "model.safetensors", "tokenizer.json",
                                                        "trainer.pt", "optimizer"}
    assert "optimizer" not in torch.load(folder / "trainer.pt", weights_only=False)
    assert len(list((folder / "optimizer").glob("*.distcp"))) == 2                  # a part of each rank


def test_the_stop_ids_of_a_hub_model_survive_sharding(whole_run):
    kept = json.loads((whole_run[0] / "checkpoints" / "step_3" / "generation_config.json").read_text())
    assert kept["eos_token_id"] == [1, 2]


@pytest.mark.parametrize("local_rank", ["0", "1"])
def test_more_processes_than_gpus_is_one_line_of_the_first(local_rank, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    for name, value in {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "LOCAL_RANK": local_rank}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit, match="2"):
        ranks.start()
    said = "error: torchrun --nproc-per-node asks for 2 GPUs, and this machine has 1\n" if local_rank == "0" else ""
    assert capsys.readouterr().err == said


def test_only_rank_0_prints_and_writes(whole_run):
    out, codes, outs, errors = whole_run
    assert codes == [0, 0] and "done after 3 steps" in outs[0] and "3/3" in errors[0]
    assert outs[1] == errors[1] == ""
    lines = (out / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [0, 1, 2, 3]
    timing = json.loads((out / "timing.jsonl").read_text().splitlines()[-1])
    assert all(1 <= timing[f"imbalance_{phase}"] <= 2 for phase in ("rollout", "resample", "update"))
    assert json.loads((out / "config.json").read_text())["ranks"] == 2


@pytest.mark.parametrize("argv, part", [
    (["--gamma", "much"], "--gamma"), (["--no-such-flag"], "--no-such-flag"), (["--steps", "0"], "--steps"),
    (["--model", "/none"], "/none"), (["--data", "/none.jsonl"], "/none.jsonl")])
def test_bad_input_is_one_line_of_all_ranks_together(argv, part, on_ranks, tmp_path):
    codes, outs, errors = on_ranks.run(3, "train", [*run_flags(tmp_path / "run", 1), *argv])
    assert codes == [2, 2, 2]
    line, = "".join(errors).splitlines()
    assert line.startswith("error: ") and part in line and not (tmp_path / "run").exists()
    assert outs[1:] == ["", ""]


def test_a_batch_without_any_weight_is_a_step_without_an_update(on_ranks, tmp_path):
    """No rank computes anything then, and none waits for another one. One token is too little for any answer."""
    flags = ["--beta", "0", "--group-size", "2", "--branches", "2", "--max-new-tokens", "1"]
    on_ranks(2, "train_as_it_is", run_flags(tmp_path / "run", 2, *flags))
    for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[1:]:
        metrics = json.loads(line)
        names = ("optimizer_steps", "forwarded_tokens", "trained_tokens", "grad_norm", "loss")
        assert [metrics[name] for name in names] == [0] * 5 and metrics["kl"] is None


def test_a_run_directory_of_another_process_is_one_line_of_all_ranks_together(on_ranks, tmp_path):
    with owned(tmp_path / "run"):
        codes, _, errors = on_ranks.run(2, "train", run_flags(tmp_path / "run", 1))
    assert codes == [2, 2] and [*(tmp_path / "run").iterdir()] == [tmp_path / "run" / ".lock"]
    line, = "".join(errors).splitlines()
    assert line.startswith("error: another process writes into")


def test_a_full_disk_is_one_line_of_all_ranks_together(on_ranks, tmp_path):
    codes, _, errors = on_ranks.run(2, "train_on_a_full_disk", run_flags(tmp_path / "run", 2))
    assert codes == [1, 1] and errors[1] == ""
    line = errors[0].splitlines()[-1]
    assert line.startswith("error: ") and "No space left" in line and "--resume" in line
    assert not list((tmp_path / "run" / "checkpoints").iterdir())


def train_on_a_full_disk(argv):
    save = torch.save

    def full(what, path, **settings):                    # (also pickles tensors that travel)
        if str(path).endswith("trainer.pt"):
            raise OSError(28, "No space left on device")
        save(what, path, **settings)

    torch.save = full
    return train_gsm8k.main(argv)


def evaluate(argv):
    return eval_math.main(argv)


@pytest.mark.parametrize("n", [2, 3])
def test_the_evaluation_is_spread_and_each_answer_is_there_once(on_ranks, n, tmp_path):
    flags = ["--model", str(ROOT / "assets" / "tiny"), "--sets", "tiny", "--max-new-tokens", "12", "--samples", "2",
             "--temperature", "1", "--batch-tokens", "900", "--out"]
    on_ranks(0, "evaluate", [*flags, str(tmp_path / "one")])
    codes, outs, errors = on_ranks.run(n, "evaluate", [*flags, str(tmp_path / "all")])
    assert codes == [0] * n and "".join(outs[1:]) == "".join(errors[1:]) == "" and "interval" in outs[0]
    answers = (tmp_path / "all" / "answers.jsonl").read_bytes()
    assert answers == (tmp_path / "one" / "answers.jsonl").read_bytes() and len(answers.splitlines()) == 2 * 64
    (tmp_path / "all" / "answers.jsonl").write_bytes(answers[:len(answers) // 2])         # goes on, in one process
    on_ranks(0, "evaluate", [*flags, str(tmp_path / "all")])
    assert (tmp_path / "all" / "answers.jsonl").read_bytes() == answers
    codes, _, errors = on_ranks.run(n, "evaluate", [*flags, str(tmp_path / "all"), "--seed", "1"])
    assert codes == [2] * n and len("".join(errors).splitlines()) == 1


# ---- torchrun itself ----

def torchrun(n, *argv):
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(n), "train_gsm8k.py"]
    return subprocess.Popen([*command, *map(str, argv)], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                            text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})


def pid_of_rank(launcher, rank):
    for pid in Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split():
        if f"\0RANK={rank}\0" in "\0" + Path(f"/proc/{pid}/environ").read_text():
            return int(pid)


@pytest.mark.slow
def test_a_rank_that_dies_ends_the_run_and_it_resumes(on_ranks, tmp_path):
    """Within a minute, on a machine that does nothing else. Without torchrun the others would wait for two hours."""
    out, data = tmp_path / "run", tmp_path / "rows.jsonl"        # the other processes of this file make fewer rows
    rows = tasks.lock.make_rows(tasks.lock.LOCKS["tiny"], 64, seed=0)
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    launcher = torchrun(2, *SMALL, "--data", data, "--steps", 500, "--eval-every", 0, "--save-every", 1, "--out", out)
    while not (out / "checkpoints" / "step_2").exists():
        assert launcher.poll() is None, launcher.communicate()
        time.sleep(0.05)
    os.kill(pid_of_rank(launcher, 1), signal.SIGKILL)
    _, errors = launcher.communicate(timeout=600)
    assert launcher.returncode == 1
    assert re.search(r"Root Cause.*rank +: 1 .*exitcode +: -9", errors, re.S)
    step = max(int(path.name[5:]) for path in (out / "checkpoints").glob("step_*[0-9]"))
    on_ranks(2, "train_as_it_is", ["--resume", str(out), "--steps", str(step + 1)])
    lines = [json.loads(line)["step"] for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert step >= 2 and lines == list(range(1, step + 2))


@pytest.mark.slow
def test_learns_the_tiny_task_under_torchrun(tmp_path):
    """As the one process of tests/trainer/test_train.py does. (Seed 0 with two processes ends at .92.)"""
    launcher = torchrun(2, "--preset", "tiny", "--eval-every", 40, "--eval-rows", 64, "--out", tmp_path / "run")
    _, errors = launcher.communicate()
    assert launcher.returncode == 0, errors
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert rows[0]["eval_accuracy"] < 0.2 and rows[-1]["eval_accuracy"] > 0.8


def evaluate_on_a_full_disk(argv):
    def full(path, lines):
        raise OSError(28, "No space left on device")

    eval_math.append_lines = full
    return eval_math.main(argv)


def test_an_evaluation_on_a_full_disk_is_one_line_of_all_ranks_together(on_ranks, tmp_path):
    codes, _, errors = on_ranks.run(2, "evaluate_on_a_full_disk", [
        "--model", str(ROOT / "assets" / "tiny"), "--sets", "tiny", "--max-new-tokens", "4", "--out", str(tmp_path)])
    assert codes == [1, 1] and errors[1] == ""
    assert re.search(r"^error: .*No space left on device; the answers so far are in ", errors[0], re.M)


def draws_after_resuming(folder):
    """What this rank draws first when the run goes on."""
    ranks.start()
    resumed(folder, 3)
    return torch.rand(3).tolist()


def test_no_rank_draws_what_another_draws_when_a_run_goes_on_with_more(on_ranks, killed_run):
    draws = on_ranks(3, "draws_after_resuming", str(killed_run))
    assert len(set(map(tuple, draws))) == 3
    again = on_ranks(3, "draws_after_resuming", str(killed_run))
    assert again == draws
