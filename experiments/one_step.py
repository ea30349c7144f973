r"""One step of DEEP-GRPO on the embedded task, told line by line with its real numbers.

    python deep_grpo.py            # or: python -m experiments.one_step

It takes a few seconds on a laptop. The step is `deep_grpo.step`, with the model, the questions and the grading that
`train_gsm8k.py --preset tiny` uses.
"""
import contextlib
import io
import tempfile

import transformers

from deep_grpo import segment_ends, step
from loss import advantages_of
from pivot import candidate_ratios, pivot_distribution
from recoverability import Recoverability
from train_gsm8k import batch_at, prepare
from trainer.settings import parse_args


def main():
    """Prepare a run that writes nothing, take one step, and tell it."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    with contextlib.redirect_stdout(io.StringIO()), tempfile.TemporaryDirectory() as folder:
        run = prepare(parse_args(["--preset", "tiny", "--questions", "6", "--seed", "3", "--out", f"{folder}/run"]))
        questions = batch_at(run, 1)
        groups, metrics = step(run.policy, [questions], run.policy.config, run.recoverability, run.pivot_rng,
                               run.optimizer, run.ref_model)
    print("\n".join(tell(run, questions, groups, metrics)))


def tell(run, questions, groups, metrics):
    """The lines of the story: of a failure that was recovered, and of a question with correct and wrong rollouts."""
    config, text = run.policy.config, run.policy.text

    def interest(candidate):
        _, g, t = candidate
        return any(t.forks[0].rewards) + (len({sibling.reward for sibling in g.trajectories}) > 1)

    candidates = [(q, g, t) for q, g in zip(questions, groups) for t in g.trajectories if t.forks]
    question, group, failed = max(candidates, key=interest)
    fork, number = failed.forks[0], group.trajectories.index(failed) + 1
    rewards = [t.reward for t in group.trajectories]
    forks = [f for g in groups for t in g.trajectories for f in t.forks]

    G, K = config.group_size, config.branches
    yield f"One step of DEEP-GRPO on {len(questions)} questions, with G = {G} and K = {K}."
    yield f"One question: {' '.join(question.text.split())}   (correct: {question.gold})"
    yield ""
    yield f"Line 1   Its {G} rollouts have the rewards {' '.join(f'{r:.0f}' for r in rewards)}."
    yield (f"Line 2   Rollout {number} failed. It can be cut before each of its steps; "
           f"Q(t) is proportional to P(success | r) r^{config.gamma:g}:")
    ends = segment_ends(failed.response, config, text)
    ratios = candidate_ratios(len(ends))
    before = pivot_distribution(ratios, Recoverability().predict(ratios), config.gamma)
    after = pivot_distribution(ratios, run.recoverability.predict(ratios), config.gamma)
    for start, end, r, q in zip([0, *ends], ends, ratios, before):
        mark = "   <- the pivot t* that was drawn" if start == fork.pivot else ""
        yield f"            r = {r:.2f}   Q = {q:.3f}   {' '.join(text(failed.response[start:end]).split())}{mark}"
    yield (f"Line 3   {K} branches keep the first {fork.pivot} of its {len(failed.response)} tokens. "
           "Their rewards R and advantages A_local:")
    for y, r, A in zip(fork.branches, fork.rewards, advantages_of(fork.rewards)):
        yield f"            R = {r:.0f}   A_local = {A:+.2f}   {' '.join(text(y).split())}"
    recovered = sum(any(f.rewards) for f in forks)
    estimate = run.recoverability
    fit = f"sigmoid({estimate.w:.2f} r {estimate.b:+.2f})" if estimate.fitted else "still 1"
    yield f"Line 4   {recovered} of the {len(forks)} pivots of this step were recovered by a branch."
    yield f"         P(success | r) was 1 for all r before the step. Now it is {fit}."
    yield f"         Q(t) of rollout {number} would now be {' '.join(f'{q:.3f}' for q in after)}."
    yield "Line 5   The rollouts of the question are compared with one another, the branches with their siblings only:"
    yield f"         A_global = {' '.join(f'{A:+.2f}' for A in advantages_of(rewards))}"
    rollouts = sum(len(t.response) for g in groups for t in g.trajectories)
    suffixes = sum(len(y) for g in groups for t in g.trajectories for _, y in t.branches)
    yield f"Line 6   J sums over the {rollouts} tokens of all rollouts and the {suffixes} tokens of all branches."
    masked = sum(f.pivot * len(f.branches) for f in forks)
    yield f"Line 7   The {masked} tokens of the prefixes of all branches carry no loss."
    yield f"Line 8   The loss is -J = {metrics['loss']:.2e}: its value is near 0, because advantages sum to 0."
    yield f"         The gradient is not 0. Its norm is {metrics['grad_norm']:.3f}; one clipped AdamW step was taken."


if __name__ == "__main__":
    main()
