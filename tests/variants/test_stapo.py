"""STAPO: which tokens are spurious, by hand, and what the objective makes of it."""
import pytest
import torch
from test_deep_grpo import BETA, example
from test_methods import shorten_the_task

import train_gsm8k
from deep_grpo import Config, needed_sequences, objective, score_groups
from loss import loss_table, sequence_weights
from packing import attention_length, pack_groups
from trainer.settings import parse_args
from variants.stapo import silence_spurious


def doubles(values):
    return torch.tensor(values, dtype=torch.float64)


def test_improbable_confident_accidents_of_right_answers_are_silenced():
    # The probability of the last token is .002, which is not below .002.
    logp = doubles([0.001, 0.5, 0.001, 0.001, 0.001, 0.5, 0.002]).log()
    entropy = doubles([0.1, 0.1, 5.0, 0.2, 0.1, 0.1, 0.1])
    table = doubles([[1.0, 0.1, 0.01, 1, -1]] * 4 + [[-1.0, 0.2, 0.02, 0, -2]] * 2 + [[2.0, 0.3, 0.03, 1, -3]])
    before = table.clone()
    # Improbable tokens of right responses have the entropies .1, 5 and .2: their 75 % quantile is .2 + .5 * 4.8.
    # Two are below it. The fifth token is improbable, too, but of a wrong response.
    scale = (0.1 * 4 + 0.2 * 2 + 0.3) / (0.1 * 2 + 0.2 * 2 + 0.3)
    factors = doubles([0, scale, scale, 0, scale, scale, scale])
    silenced = silence_spurious(table, logp, entropy)
    torch.testing.assert_close(silenced[:, 1], table[:, 1] * factors, rtol=1e-12, atol=0)
    torch.testing.assert_close(silenced[:, 2], table[:, 2] * factors, rtol=1e-12, atol=0)
    assert torch.equal(silenced[:, [0, 3, 4]], table[:, [0, 3, 4]])                    # the rest of the table stays
    assert silenced[:, 1].sum().item() == pytest.approx(table[:, 1].sum().item(), rel=1e-12)
    assert torch.equal(table, before)                                                  # and so does the argument
    assert torch.equal(silence_spurious(table, torch.zeros(7), entropy), table)
    low = silence_spurious(table, logp, entropy, quantile=0.0)                         # .1, and .1 is not below it
    torch.testing.assert_close(low, table, rtol=1e-12, atol=0)
    alone = silence_spurious(table[:1], logp[:1], entropy[:1], quantile=1.0)           # nor is the only one
    assert torch.equal(alone, table[:1])
    assert torch.equal(silence_spurious(table, logp, entropy, probability=0.0005), table)
    assert torch.isfinite(silence_spurious(table[[0, 2]], logp[[0, 2]], entropy[[0, 2]])).all()


def test_a_right_response_by_hand():
    """The entropies of the four improbable tokens give the threshold 1.25; the mean is over the other two."""
    logp, entropy = doubles([0.001, 0.001, 0.0015, 0.0019, 0.3]).log(), doubles([0.1, 0.5, 1.0, 2.0, 0.2])
    table = doubles([[1.0, 1 / 5, 0.0, 1, 0]] * 5)
    assert silence_spurious(table, logp, entropy)[:, 1].tolist() == pytest.approx([0, 0, 0, 1 / 2, 1 / 2], rel=1e-12)


def test_tokens_of_wrong_responses_have_no_part_in_the_quantile():
    logp, entropy = doubles([0.001] * 6).log(), doubles([1.0, 2.0, 3.0, 9.0, 9.0, 9.0])
    table = doubles([[1.0, 0.1, 0.0, 1, 0]] * 3 + [[-1.0, 0.1, 0.0, 1, 0]] * 3)
    silenced = silence_spurious(table, logp, entropy)                                  # threshold 2.5
    assert (silenced[:, 1] == 0).tolist() == [True, True, False, False, False, False]
    unchanged = table.clone()
    unchanged[:3, 0] = -1.0
    assert torch.equal(silence_spurious(unchanged, logp, entropy), unchanged)


def test_tokens_without_a_weight_have_no_part_in_the_quantile():
    """Those of a prefix that several trajectories share are trained once (spo_tree), so they count once."""
    logp, entropy = doubles([0.001] * 5).log(), doubles([1.0, 2.0, 3.0, 9.0, 9.0])
    table = doubles([[1.0, 0.1, 0.0, 1, 0]] * 3 + [[1.0, 0.0, 0.0, 1, 0]] * 2)
    silenced = silence_spurious(table, logp, entropy)                                  # threshold 2.5
    assert silenced[:, 1].tolist() == pytest.approx([0, 0, 0.3, 0, 0], rel=1e-12)


def test_the_improbable_token_of_the_highest_entropy_keeps_its_weight():
    """So something is always left to weigh, and the factor of the others is a number."""
    table = doubles([[1.0, 0.1, 0.01, 1, 0], [1.0, 0.0, 0.0, 1, 0]])
    assert torch.equal(silence_spurious(table, doubles([0.001, 0.001]).log(), doubles([1.0, 2.0])), table)
    table[1, 1] = 0.2
    silenced = silence_spurious(table, doubles([0.001, 0.001]).log(), doubles([1.0, 2.0]))
    assert silenced[:, 1].tolist() == pytest.approx([0, 0.3])


def test_stapo_in_the_objective(model, ref_model):
    config = Config(beta=BETA, temperature=0.4)
    logps, entropies, forwarded = score_groups(model, example(), config)
    plain_table = loss_table(example(), sequence_weights(example(), config))
    table = silence_spurious(plain_table, torch.cat(logps), torch.cat(entropies))
    assert 0 < ((table[:, 1] == 0) & (plain_table[:, 1] != 0)).sum() < 10     # some tokens are that unlikely
    refs, *_ = score_groups(ref_model, example(), config)
    d = torch.cat(refs) - torch.cat(logps)
    by_hand = -(table[:, 1] * table[:, 0] - table[:, 2] * (d.exp() - d - 1)).sum().item()             # rho = 1
    plain, before = objective(model, example(), config, ref_model)
    for micro_batch_tokens in (None, 30):
        loss, metrics = objective(model, example(), config, ref_model, None, micro_batch_tokens,
                                  reweigh=silence_spurious)
        assert loss.item() == pytest.approx(by_hand, rel=1e-10) and abs(loss - plain) > 1e-3
        assert metrics["trained_tokens"] == ((table[:, 1] != 0) & (table[:, 0] != 0)).sum() < before["trained_tokens"]
    # The first pass is over everything. The second one leaves out a branch whose only token is silenced.
    needed, _ = needed_sequences(example(), table, True)
    rows = pack_groups(example(), attention_length(model), 30, needed)
    assert metrics["forwarded_tokens"] == forwarded + sum(len(row.ids) for row in rows) and not all(map(all, needed))


def test_a_run_counts_what_it_silences(tmp_path, monkeypatch):
    """The factor of the other tokens may round to a little less than 1, which does not silence them."""
    shorten_the_task(monkeypatch)

    def first_three(table, logp, entropy):
        changed = table.clone()
        changed[:, 1] *= 1 - 1e-16
        changed[torch.nonzero(table[:, 1])[:3], 1] = 0
        return changed

    monkeypatch.setattr(train_gsm8k, "silence_spurious", first_three)
    flags = ["--preset", "tiny", "--method", "grpo", "--questions", "1", "--group-size", "4", "--max-new-tokens", "48",
             "--eval-every", "0"]
    found = []
    for name, more in (("with", ["--stapo", "--updates", "2"]), ("without", [])):
        run = train_gsm8k.prepare(parse_args([*flags, *more, "--out", str(tmp_path / name)]))
        found.append(train_gsm8k.train_step(run)[0].get("silenced_tokens"))
    assert found == [2 * 3, None]
