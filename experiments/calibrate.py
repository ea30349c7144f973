r"""Is recoverability a function of relative depth alone?   (an open question of arXiv 2602.14169)

    python calibrate.py        # 5 seeds of the embedded task; results/calibration.md and .png

Eq. (P) predicts from r_t = t/T alone whether at least one of K branches from a state of a failed rollout is right. Here
K branches are drawn from *every* state of failed rollouts, from the base model and from policies half-way through
training, and models of the outcome are compared by their log-likelihood on questions that they were not fitted to:

    P(success | r)                   Eq. (P), by the exact fit of recoverability.py
      + entropy                      of the policy over the step that follows the state: its mean, in nats per token
      + difficulty                   share of the question's G rollouts that failed
      + both
    one rate per depth               any function of r: r in tenths, a rate each (with one pseudo-outcome)
    before or after the error        what cannot be known: is the state before the first wrong step?

The settings were fixed before the first run; all seeds are in the table.
"""
import argparse
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import matplotlib
import numpy as np
from tqdm import tqdm

import tasks.lock
import train_gsm8k
from deep_grpo import Group, resample, roll_out, score_groups, segment_ends
from experiments.compare import interval
from loss import branch_groups
from pivot import candidate_ratios
from recoverability import Recoverability, sigmoid
from tasks import make_questions
from trainer.settings import OneLineParser, command_line, count, parse_args

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402 (after the choice of a backend that needs no screen)

STEPS = 12                                           # of DEEP-GRPO before a trained policy is measured
NAMES = ["constant", "r: Eq. (P)", "r + entropy", "r + difficulty", "r + both", "one rate per depth",
         "before or after the error"]


def branch_everywhere(groups, config, decode, most):
    """The first `most` failed rollouts of every question with all their states as pivots."""
    def branched(t):
        states = [0, *segment_ends(t.response, config, decode)[:-1]]
        return replace(t, pivot=states, ratio=candidate_ratios(len(states)).tolist())

    return [Group(g.prompt, [branched(t) for t in g.trajectories if t.reward == 0][:most]) for g in groups]


def first_error(text, gold) -> int:
    """Number of sentences of a response to the embedded task up to its first wrong one, which is not counted."""
    ours, right = text.split(".\n"), gold.split(".\n")
    return next((i for i, (a, b) in enumerate(zip(ours, right)) if a != b), min(len(ours), len(right)))


def observe(run, rows, questions, most=2) -> np.ndarray:
    """One row per state of failed rollouts of these questions: question, r, entropy, difficulty, before, success."""
    def reward(pairs):
        return run.rewards([(questions[x], y) for x, y in pairs])

    groups = roll_out(run.draw, [q.prompt for q in questions], reward, run.config)
    difficulty = [np.mean([t.reward == 0 for t in g.trajectories]) for g in groups]
    groups = resample(run.draw, branch_everywhere(groups, run.config, run.text, most), reward, run.config)
    roots = [Group(g.prompt, [replace(t, pivot=None, branches=[]) for t in g.trajectories])
             for g in groups if g.trajectories]
    _, entropies, _ = score_groups(run.model, roots, run.config, run.args.micro_batch_tokens)
    entropies, table = iter(entropies), []
    for x, g in enumerate(groups):
        for t in g.trajectories:
            entropy, error = next(entropies), first_error(run.text(t.response), rows[x]["answer"])
            ends = [*t.pivots[1:], len(t.response)]
            for i, ((start, part), end, r) in enumerate(zip(branch_groups(t), ends, t.ratios)):
                success = any(t.branch_rewards[part])
                table.append([x, r, entropy[start:end].mean().item(), difficulty[x], i <= error, success])
    return np.array(table, dtype=float)


def fit_logistic(features, y, l2=1.0) -> np.ndarray:
    """Weights [d + 1] (the last is the bias) that minimise summed cross-entropy + l2/2 |w|^2, by Newton's method.

    Eq. (P) for several features, each scaled to unit variance by the caller.
    """
    x = np.column_stack([features, np.ones(len(y))])
    penalty = l2 * np.diag([1.0] * features.shape[1] + [1e-9])
    w = np.zeros(x.shape[1])
    for _ in range(50):
        p = sigmoid(x @ w)
        step = np.linalg.solve((x * (p * (1 - p))[:, None]).T @ x + penalty, x.T @ (p - y) + penalty @ w)
        w -= step
        if np.abs(step).max() < 1e-10:
            break
    return w


def fit_depth(table) -> Recoverability:
    """Eq. (P), fitted to the rows of observe()."""
    estimate = Recoverability(window=len(table), min_observations=0)
    for ratio, success in table[:, [1, 5]]:
        estimate.observe(ratio, bool(success))
    estimate.fit()
    return estimate


def predictions(train, test) -> dict[str, np.ndarray]:
    """P(success) of the rows of `test` by every model of NAMES, fitted to `train`."""
    y = train[:, 5]
    result = {"constant": np.full(len(test), (y.sum() + 0.5) / (len(y) + 1))}
    result["r: Eq. (P)"] = fit_depth(train).predict(test[:, 1])
    center, scale = train.mean(0), train.std(0) + 1e-12
    for name, columns in {"r + entropy": [1, 2], "r + difficulty": [1, 3], "r + both": [1, 2, 3]}.items():
        w = fit_logistic(((train - center) / scale)[:, columns], y)
        result[name] = sigmoid(((test - center) / scale)[:, columns] @ w[:-1] + w[-1])
    for name, key in {"one rate per depth": lambda rows: np.rint(10 * rows[:, 1]),
                      "before or after the error": lambda rows: rows[:, 4]}.items():
        rates = {k: (y[key(train) == k].sum() + 0.5) / ((key(train) == k).sum() + 1) for k in np.unique(key(train))}
        result[name] = np.array([rates.get(k, y.mean()) for k in key(test)])
    return result


def log_likelihood(p, y) -> np.ndarray:
    """Of each outcome, in nats; probabilities are kept from 0 and 1 by 1e-6."""
    p = np.clip(p, 1e-6, 1 - 1e-6)
    return np.where(y == 1, np.log(p), np.log(1 - p))


def cross_validate(table, folds=5) -> dict[str, float]:
    """Mean held-out log-likelihood of every model; all states of a question are in one fold."""
    scores = {name: np.zeros(len(table)) for name in NAMES}
    for fold in range(folds):
        held = table[:, 0] % folds == fold
        for name, p in predictions(table[~held], table[held]).items():
            scores[name][held] = log_likelihood(p, table[held, 5])
    return {name: float(values.mean()) for name, values in scores.items()}


def measure(model, seed, n, args) -> np.ndarray:
    """observe() on n questions of their own, with the policy in a folder."""
    run = train_gsm8k.prepare(parse_args(["--preset", args.preset, "--model", str(model), "--beta", "0",
                                          "--seed", str(seed), "--out", str(args.out / "nothing")]))
    rows = tasks.lock.make_rows(tasks.lock.PRESETS[args.preset], n, 1000 + seed)
    questions, _ = make_questions(rows, run.tokenizer, run.args.max_prompt_tokens)
    return observe(run, rows, questions)


def trained(seed, args) -> Path:
    """The checkpoint after STEPS steps of DEEP-GRPO; trained now if it is not there."""
    folder = args.out / f"deep_grpo-{args.preset}-{args.steps}-{seed}"
    checkpoint = folder / "checkpoints" / f"step_{args.steps}"
    if not checkpoint.exists():
        program = str(Path(__file__).parents[1] / "train_gsm8k.py")
        flags = ["--preset", args.preset, "--seed", str(seed), "--steps", str(args.steps), "--eval-every", "0",
                 "--out", str(folder)]
        if (folder / "config.json").exists():        # it was interrupted
            flags = ["--resume", str(folder)]
        with open(folder.with_suffix(".log"), "w") as log:
            subprocess.run([sys.executable, program, *flags], check=True, stdout=log, stderr=log)
    return checkpoint


def tables(results) -> str:
    """Markdown: held-out log-likelihood, mean over seeds with 95 % interval, and the gain over Eq. (P); every seed."""
    lines = []
    for policy, scores in results.items():
        lines += [f"**{policy}**: log-likelihood per outcome (nats), held out; {len(scores)} seeds, \u00b1 95 %.",
                  "", "| model of the outcome | log-likelihood | minus Eq. (P) | every seed, minus Eq. (P) |",
                  "|---|---|---|---|"]
        for name in NAMES:
            gains = [s[name] - s["r: Eq. (P)"] for s in scores]
            mean, width, _ = interval([s[name] for s in scores])
            gain, gain_width, _ = interval(gains)
            lines.append(f"| {name} | {mean:.4f} \u00b1 {width:.4f} | {gain:+.4f} \u00b1 {gain_width:.4f} | "
                         f"{' '.join(f'{g:+.4f}' for g in gains)} |")
        lines.append("")
    return "\n".join(lines)


def draw(observed, results, path):
    """Observed rates and the fit over depth for each policy, and what the features gain; the figure is returned."""
    figure, axes = plt.subplots(1, len(observed) + 1, figsize=(5.5 * (len(observed) + 1), 5), layout="constrained")
    for axis, (policy, tables_) in zip(axes, observed.items()):
        table = np.concatenate(tables_)
        before, after = table[table[:, 4] == 1], table[table[:, 4] == 0]
        for name, rows, color in (("all states", table, "black"), ("before the first wrong step", before, "tab:green"),
                                  ("after it", after, "tab:red")):
            place = np.rint(10 * rows[:, 1])
            used = [i for i in np.unique(place) if (place == i).sum() >= 10]
            rate = np.array([rows[place == i, 5].mean() for i in used])
            error = np.array([np.sqrt(max(p * (1 - p), 1e-4) / (place == i).sum()) for p, i in zip(rate, used)])
            axis.errorbar(np.array(used) / 10, rate, yerr=1.96 * error, fmt="o", color=color, label=name, markersize=4)
        depth = np.linspace(0.05, 0.95, 50)
        for i, seed in enumerate(tables_):
            estimate = fit_depth(seed)
            axis.plot(depth, sigmoid(estimate.w * depth + estimate.b), color="black", alpha=0.5, linewidth=1,
                      label=None if i else "fit of Eq. (P), a line per seed")
        axis.set(title=policy, xlabel="relative depth r of the state", ylabel="at least one of K = 8 branches right",
                 ylim=(-0.02, 1.02))
        axis.legend(fontsize=8)
    for offset, (policy, scores), color in zip((-0.17, 0.17), results.items(), ("tab:gray", "tab:blue")):
        gains = [interval([s[name] - s["r: Eq. (P)"] for s in scores])[:2] for name in NAMES]
        axes[-1].barh(np.arange(len(NAMES)) + offset, [g for g, _ in gains], xerr=[w for _, w in gains], height=0.32,
                      color=color, label=policy)
    axes[-1].set(yticks=range(len(NAMES)), yticklabels=NAMES, title="log-likelihood minus that of Eq. (P)",
                 xlabel="nats per outcome, held out")
    axes[-1].axvline(0, color="black", linewidth=0.8)
    axes[-1].invert_yaxis()
    axes[-1].legend(fontsize=8)
    figure.savefig(path, dpi=90)
    return figure


def main(argv=None):
    """Measure, fit, write table and figure."""
    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=list(tasks.lock.PRESETS), default="tiny-deep")
    parser.add_argument("--seeds", type=count, default=5)
    parser.add_argument("--questions", type=count, default=24, help="per seed, policy; at most 2 failures of each")
    parser.add_argument("--steps", type=count, default=STEPS, help="of DEEP-GRPO before the second measurement")
    parser.add_argument("--out", type=Path, default=Path("runs/calibrate"))
    parser.add_argument("--results", type=Path, default=Path("results"), help="folder of table and figure")
    args = parser.parse_args(argv)
    policies = {"base model": lambda seed: tasks.lock.ASSETS / args.preset,
                f"after {args.steps} steps of DEEP-GRPO": lambda seed: trained(seed, args)}
    observed = {policy: [] for policy in policies}
    args.out.mkdir(parents=True, exist_ok=True)
    for seed in tqdm(range(args.seeds), desc="seeds"):
        for steps, (policy, model) in zip((0, args.steps), policies.items()):
            path = args.out / f"states-{args.preset}-{args.questions}-{steps}-{seed}.npy"
            if not path.exists():
                np.save(path, measure(model(seed), seed, args.questions, args))
            observed[policy].append(np.load(path))
    results = {policy: [cross_validate(table) for table in tables_] for policy, tables_ in observed.items()}
    args.results.mkdir(parents=True, exist_ok=True)
    counts = "; ".join(f"{policy}: {sum(map(len, t))} states, {np.concatenate(t)[:, 5].mean():.2f} recovered"
                       for policy, t in observed.items())
    text = tables(results)
    (args.results / "calibration.md").write_text(
        "# Is recoverability a function of relative depth alone?\n\n"
        f"    {command_line('calibrate.py', argv)}\n\n"
        f"{args.preset}, K = 8 branches from every state of failed rollouts. {counts}.\n\n"
        f"![calibration](calibration.png)\n\n{text}")
    plt.close(draw(observed, results, args.results / "calibration.png"))
    print(text)


if __name__ == "__main__":
    main()
