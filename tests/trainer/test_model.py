"""The trainer's model: activations that are computed twice instead of kept change nothing but memory."""
import pytest
from conftest import EOS, argmax_step_by_step, make_model
from test_packing import check_against_separate_rows
from test_resample import RAGGED, draw

from trainer.model import checkpoint_activations


@pytest.mark.parametrize("chunk", [3, 4096])
def test_checkpointed_activations_give_the_same_log_probabilities_and_gradients(chunk):
    model = make_model()
    checkpoint_activations(model)
    assert model.training
    assert check_against_separate_rows(model, make_model(), chunk) == 2          # a layer was really computed again


@pytest.mark.parametrize("training", [True, False])
def test_sampling_from_a_model_with_checkpointed_activations_leaves_it_as_it_was(training):
    """In training mode checkpointing switches the cache off; sampling turns to evaluation mode and back."""
    model = make_model(attention_dropout=0.5)
    checkpoint_activations(model)
    model.train(training)
    greedy = draw(model)
    assert model.training == training
    assert getattr(model, "is_activation_checkpointing", None) or model.is_gradient_checkpointing
    assert greedy == [[argmax_step_by_step(model.eval(), p, 9, {EOS})] for p in RAGGED]      # and without dropout
