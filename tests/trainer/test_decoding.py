"""The decoding loop of GPUs, on a CPU without graphs: all tests of sampling once more, and what is its own."""
import pytest
from test_resample import (  # noqa: F401
    draw,
    test_a_cap_for_each_prefix,
    test_bad_arguments_are_named,
    test_ends_are_kept_and_nothing_follows_them,
    test_greedy_equals_argmax_for_ragged_prefixes,
    test_no_prefixes_no_samples,
    test_one_prefill_for_all_branches,
    test_out_of_memory_halves_the_batch_and_goes_on,
    test_pad_equal_to_eos_loses_no_eos,
    test_rows_that_have_ended_leave_the_batch,
    test_same_seed_same_samples_and_branches_differ,
    test_sampled_distribution_is_softmax_of_logits_over_t_whatever_the_checkpoint_says,
    test_the_librarys_own_top_k_does_not_cut_the_vocabulary,
    test_the_model_comes_back_as_it_was,
    test_the_pad_id_inside_a_prefix_is_a_token_like_any_other,
    test_unlikely_tokens_come_up_as_often_as_they_should,
    test_what_the_policy_thought_of_every_token_is_kept,
)

from trainer import decoding


@pytest.fixture
def path():
    """The imported tests sample with this module."""
    return decoding
