"""Tasks: how batches are read."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from lightning_distill.outputs import Outputs
from lightning_distill.tasks import Classification, Regression, SequenceClassification, to_outputs

X, Y, INDEX = torch.randn(3, 4), torch.tensor([0, 2, -100]), torch.tensor([7, 8, 9])


@pytest.mark.parametrize(
    ("batch", "labelled", "indexed"),
    [
        (X, False, False),
        ((X,), False, False),
        ((X, Y), True, False),
        ([X, Y, INDEX], True, True),
        ({"x": X}, False, False),
        ({"pixel_values": X, "labels": Y, "index": INDEX}, True, True),
    ],
    ids=["tensor", "one", "pair", "three", "dict", "dict with index"],
)
def test_reads_the_usual_batches(batch, labelled, indexed):
    task = Classification()
    assert task.inputs(batch) is X
    assert (task.labels(batch) is Y) == labelled
    assert (task.index(batch) is INDEX) == indexed
    assert task.batch_size(batch) == 3


def test_reads_named_keys():
    task = Classification(input_key="signal", label_key="what")
    assert task.inputs({"signal": X, "what": Y, "x": 0}) is X
    assert task.labels({"signal": X, "what": Y, "y": 0}) is Y
    with pytest.raises(ValueError, match=r"no labels 'what': its keys are \['signal'\]"):
        task.labels({"signal": X})
    with pytest.raises(ValueError, match=r"its keys are \['wave'\], expected signal. Name the key"):
        task.inputs({"wave": X})
    with pytest.raises(ValueError, match="expected one of x, input"):
        Classification().inputs({"wave": X})
    with pytest.raises(TypeError, match="got str with inputs of type str"):
        Classification().inputs("x")


def test_reads_what_networks_return():
    logits = torch.randn(3, 2)
    assert to_outputs(logits).logits is logits
    assert to_outputs(SimpleNamespace(logits=logits)).logits is logits
    assert to_outputs({"logits": logits}).logits is logits
    with pytest.raises(TypeError, match=r"A network must return logits \(a tensor\).*got tuple"):
        to_outputs((logits,))


def test_logits_stand_for_hidden_states_until_somebody_asks():
    calls = []
    head = nn.Linear(4, 2)

    def counted(hidden):
        calls.append(1)
        return head(hidden)

    outputs = Outputs(hidden=X, head=counted)
    assert outputs.item_shape == (3,)
    assert not outputs.has_logits
    assert not calls
    torch.testing.assert_close(outputs.logits, head(X))
    assert outputs.logits is outputs.logits
    assert len(calls) == 1
    with pytest.raises(ValueError, match="`Outputs` needs `logits`, or both of `hidden` and `head`"):
        Outputs(hidden=X)


def test_labels_of_the_wrong_kind_are_refused():
    outputs = Outputs(torch.randn(3, 4))
    task = Classification()
    task.check(outputs, Y)
    task.check(outputs, torch.full((3, 4), 0.25))
    with pytest.raises(ValueError, match=r"Label 4 is outside \[0, 4\): the student has 4 outputs"):
        task.check(outputs, torch.tensor([0, 4, 1]))
    with pytest.raises(ValueError, match=r"Label -1 is outside \[0, 4\)"):
        task.check(outputs, torch.tensor([0, -1, 1]))
    with pytest.raises(ValueError, match=r"Labels have shape \(3, 1\), expected one class index per item: \(3,\)"):
        task.check(outputs, torch.zeros(3, 1, dtype=torch.long))
    with pytest.raises(ValueError, match=r"Class indices must be integers: `labels\.long\(\)`"):
        task.check(outputs, torch.zeros(3))
    with pytest.raises(ValueError, match=r"Targets have shape \(3,\), the student's predictions \(3, 4\)"):
        Regression().check(outputs, torch.zeros(3))


def test_sequences_need_token_ids():
    with pytest.raises(ValueError, match=r"expects a mapping with `input_ids`, got \['x'\]"):
        SequenceClassification().inputs({"x": X})


def test_only_labelled_items_that_count_are_scored():
    task, outputs = Classification(), Outputs(torch.randn(3, 4))
    logits, labels = task.evaluable(outputs, Y, torch.tensor([True, False, True]))
    assert labels.tolist() == [0]
    torch.testing.assert_close(logits, outputs.logits[:1])
    assert task.evaluable(outputs, torch.full((3,), -100), None) is None
    assert task.evaluable(outputs, None, None) is None
