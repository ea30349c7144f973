"""The metrics of a step that come from its rollouts and branches. trainer/README.md explains all metrics."""


def summarize(groups, eos_token_ids) -> dict:
    """What lines 1 to 3 of deep_grpo.step produced: shares of rollouts unless said, lengths in tokens."""
    roots = [t for g in groups for t in g.trajectories]
    forks = [fork for t in roots for fork in t.forks if fork.branches]
    siblings = [fork.rewards for fork in forks]
    branches = [y for fork in forks for y in fork.branches]
    drawn_from = [getattr(t.response, "entropies", None) for t in roots]     # those of resample.Continuation

    def mean(values):
        return sum(values) / len(values) if values else None                 # None: there is nothing to take it of

    return {
        "reward": mean([t.reward for t in roots]),
        "branch_reward": mean([r for rewards in siblings for r in rewards]),
        "dead_groups": mean([len({t.reward for t in g.trajectories}) == 1 for g in groups]),   # of questions
        "dead_branch_groups": mean([len(set(rewards)) == 1 for rewards in siblings]),          # of pivots
        "pivots": len(siblings),
        "live_branches": sum(len(rewards) for rewards in siblings if len(set(rewards)) > 1),
        "pivot_depth": mean([fork.ratio for fork in forks]),
        "recovered": mean([any(rewards) for rewards in siblings]),                             # of pivots
        "entropy": mean([e for entropies in drawn_from if entropies is not None for e in entropies.tolist()]),
        "response_length": mean([len(t.response) for t in roots]),
        "branch_length": mean([len(y) for y in branches]),
        "truncated": mean([t.response[-1] not in eos_token_ids for t in roots]),
        "sequences": len(roots) + len(branches),
        "generated_tokens": sum(map(len, branches)) + sum(len(t.response) for t in roots),
    }
