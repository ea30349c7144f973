r"""In which regime does STAPO act? How many tokens of correct responses it would silence, at several temperatures.

    python -m experiments.silenced        # the two base models of the embedded task: three minutes on one core

STAPO (variants/stapo.py) silences a token of a correct response when its probability is below .002, unless its entropy
is in the highest quarter of those of all such tokens. So it can act only where correct responses contain improbable
tokens at all. Nothing is trained here. Rollouts are drawn from a base model and graded, and their tokens are counted as
one batch.

Writes the table of results/stapo-regime.md.
"""
import argparse
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import tasks.lock
from deep_grpo import Config, Group, Trajectory, sampled_logps
from experiments.runs import write_page, written_by
from loss import loss_table, sequence_weights
from tasks import make_questions, stop_ids
from trainer.model import load_model
from trainer.policy import Policy
from trainer.settings import PRESETS, OneLineParser, count
from variants.stapo import silence_spurious

TEMPERATURES = (1.0, 1.2, 1.4, 1.6, 1.8, 2.0)
TITLE = "In which regime does STAPO act?"


def draw(name, temperature, questions, group_size=8, seed=0) -> list[Group]:
    """Graded rollouts of the base model of a preset, as line 1 of the algorithm has them."""
    model, tokenizer = load_model(PRESETS[name]["model"])
    config = Config(group_size=group_size, temperature=temperature, max_new_tokens=PRESETS[name]["max_new_tokens"])
    policy = Policy(model, tokenizer, stop_ids(tokenizer, model), config)
    rows = tasks.lock.make_rows(tasks.lock.LOCKS[name], questions, seed)
    asked, _ = make_questions(rows, tokenizer, PRESETS[name]["max_prompt_tokens"])
    torch.manual_seed(seed)
    drawn = policy.sample([q.prompt for q in asked], group_size, config.max_new_tokens)
    rewards = iter(policy.rewards([(q, y) for q, group in zip(asked, drawn) for y in group]))
    return [Group(q.prompt, [Trajectory(y, next(rewards)) for y in group]) for q, group in zip(asked, drawn)]


def count_tokens(groups) -> dict[str, float]:
    """Of a batch of rollouts: the share of correct ones, their tokens, and how many are improbable and silenced.

    improbable: tokens with an advantage above 0 and a probability below .002. in_wrong: tokens with such a probability,
    per 1,000 tokens of wrong responses. touched: the share of correct responses that have one.
    """
    table = loss_table(groups, sequence_weights(groups, Config()))
    logps = sampled_logps(groups)
    entropies = np.concatenate([t.response.entropies for g in groups for t in g.trajectories]).astype(float)
    changed = silence_spurious(table, logps, torch.from_numpy(entropies))
    improbable = (table[:, 0] > 0) & (logps.exp() < 0.002)
    correct = torch.tensor([t.reward == 1 for g in groups for t in g.trajectories])
    lengths = [len(t.response) for g in groups for t in g.trajectories]
    wrong = ~correct.repeat_interleave(torch.tensor(lengths))
    touched = torch.tensor([bool(part.any()) for part in improbable.split(lengths)])
    return {"correct": correct.float().mean().item(), "tokens": int(torch.tensor(lengths)[correct].sum()),
            "improbable": int(improbable.sum()),
            "in_wrong": 1000 * (logps.exp() < 0.002)[wrong].float().mean().item(),
            "silenced": int(((table[:, 1] != 0) & (changed[:, 1] == 0)).sum()),
            "touched": (touched & correct).sum().item() / max(1, int(correct.sum()))}


def tables(found) -> str:
    """Markdown: a row per base model and temperature. found: (name, temperature) -> what count_tokens() gives."""
    lines = ["| base model | temperature | correct rollouts | tokens of correct rollouts | of these, improbable | "
             "per 1,000 | per 1,000 tokens of wrong rollouts | silenced | correct rollouts with an improbable token |",
             "|---|---|---|---|---|---|---|---|---|"]
    for (name, temperature), numbers in found.items():
        lines.append(f"| {name} | {temperature:.1f} | {100 * numbers['correct']:.1f} % | {numbers['tokens']:,} | "
                     f"{numbers['improbable']} | {1000 * numbers['improbable'] / max(1, numbers['tokens']):.2f} | "
                     f"{numbers['in_wrong']:.2f} | {numbers['silenced']} | {100 * numbers['touched']:.0f} % |")
    return "\n".join(lines)


def main(argv=None):
    """Draw, count, and write the table."""
    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--questions", type=count, default=256,
                        help="Sets the questions per base model and temperature. The default is 256.")
    parser.add_argument("--results", type=Path, default=Path("results"),
                        help="Names the folder for the table. The default is results.")
    args = parser.parse_args(argv)
    cells = [(name, temperature) for name in tasks.lock.LOCKS for temperature in TEMPERATURES]
    found = {cell: count_tokens(draw(*cell, args.questions)) for cell in tqdm(cells, desc="temperatures")}
    about = written_by("-m experiments.silenced", argv, f"{args.questions} questions with 8 rollouts each")
    write_page(args.results / "stapo-regime.md", TITLE, None, f"{about}\n\n{tables(found)}")
    print(tables(found))


if __name__ == "__main__":
    main()
