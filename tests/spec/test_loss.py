"""The loss, and training."""

import copy

import pytest
import torch

from af3 import AudioFlamingo3ForConditionalGeneration

SOUND = 644


def audio():
    """One window of 8 mel frames, so 2 audio frames."""
    features = torch.randn(1, 128, 3000, generator=torch.Generator().manual_seed(0))
    mask = (torch.arange(3000) < 8).long()[None]
    return {"input_features": features, "feature_attention_mask": mask}


def cross_entropies(logits, ids):
    """-log of the probability of each id, in float64, from the logits before it."""
    losses = []
    for row, token_id in zip(logits.double(), ids):
        probabilities = row.exp() / row.exp().sum()
        losses.append(-probabilities[token_id].log())
    return torch.stack(losses)


def test_the_loss_is_the_mean_cross_entropy_of_each_token_given_those_before(model):
    ids = torch.tensor([[3, 1, 4, 1]])
    output = model(ids, labels=ids)
    expected = cross_entropies(output.logits[0, :3], [1, 4, 1]).mean()
    assert abs(output.loss - expected) < 1e-5


def test_labels_of_minus_100_are_not_counted_and_all_others_count_alike(model):
    ids = torch.tensor([[3, 1, 4], [1, 5, 9]])
    output = model(ids, labels=torch.tensor([[3, 1, 4], [-100, -100, 9]]))
    first = cross_entropies(output.logits[0, :2], [1, 4])
    second = cross_entropies(output.logits[1, 1:2], [9])
    assert abs(output.loss - torch.cat([first, second]).mean()) < 1e-5


@pytest.mark.differs("transformers lets padding on the left predict the first real token")
def test_padding_on_the_left_predicts_nothing(model):
    ids = torch.tensor([[7, 7, 3, 1, 4]])
    mask = torch.tensor([[0, 0, 1, 1, 1]])
    alone = torch.tensor([[3, 1, 4]])
    loss = model(ids, mask, labels=torch.tensor([[-100, -100, 3, 1, 4]])).loss
    assert abs(loss - model(alone, labels=alone).loss) < 1e-5


def test_the_loss_of_a_bfloat16_model_is_computed_in_float32(model):
    ids = torch.tensor([[3, 1, 4, 1]])
    output = copy.deepcopy(model).bfloat16()(ids, labels=ids)
    expected = cross_entropies(output.logits[0, :3], [1, 4, 1]).mean()
    assert output.logits.dtype == torch.bfloat16
    assert output.loss.dtype == torch.float32
    assert abs(output.loss - expected) < 1e-5


def test_a_model_is_loaded_for_inference_and_trains_after_train_alone(checkpoint):
    model = AudioFlamingo3ForConditionalGeneration.from_pretrained(checkpoint, device_map="cpu")
    assert not model.training
    model.train()
    ids = torch.tensor([[3, SOUND, SOUND, 5]])
    model(ids, **audio(), labels=torch.tensor([[-100, -100, -100, 5]])).loss.backward()
    for name, parameter in model.named_parameters():
        if not name.endswith("embed_positions.weight"):  # transformers keeps them as they are
            assert parameter.grad.isfinite().all(), name
            assert parameter.grad.abs().sum() > 0, name


def test_training_mode_has_no_dropout(model):
    ids = torch.tensor([[3, SOUND, SOUND, 5]])
    logits = model(ids, **audio()).logits
    assert torch.equal(copy.deepcopy(model).train()(ids, **audio()).logits, logits)
