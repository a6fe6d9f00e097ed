"""Metrics against SciPy, and summed over processes."""

import math
import pickle

import numpy as np
import pytest
import torch
from scipy.special import log_softmax, rel_entr, softmax
from scipy.stats import entropy

from lightning_distill.metrics import (
    Agreement,
    DarkKnowledge,
    Fidelity,
    NegativeLogLikelihood,
    TeacherEntropy,
    dark_knowledge,
)

CLASSES = 5
LABELS = torch.tensor([0, 4, -100, 2, 1, 3, -100])


def logits(seed, *shape):
    return 3 * torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


STUDENT, TEACHER = logits(1, 7, CLASSES), logits(2, 7, CLASSES)
CASES = {
    "nll": (NegativeLogLikelihood, (STUDENT, LABELS)),
    "agreement": (Agreement, (STUDENT, TEACHER)),
    "fidelity": (Fidelity, (STUDENT, TEACHER)),
    "entropy": (TeacherEntropy, (TEACHER,)),
    "dark_knowledge": (DarkKnowledge, (TEACHER, LABELS)),
}
over_metrics = pytest.mark.parametrize(("metric", "inputs"), CASES.values(), ids=CASES.keys())


def dark_by_definition(p, label):
    rest = np.delete(p, label)
    return rest.sum() * entropy(rest)  # scipy's entropy normalizes


def expected():
    q, p = softmax(STUDENT.numpy(), -1), softmax(TEACHER.numpy(), -1)
    labelled = (LABELS != -100).numpy()
    labels = LABELS.numpy()[labelled]
    return {
        "nll": -log_softmax(STUDENT.numpy(), -1)[labelled][np.arange(len(labels)), labels].mean(),
        "agreement": (q.argmax(-1) == p.argmax(-1)).mean(),
        "fidelity": rel_entr(p, q).sum(-1).mean(),
        "entropy": entropy(p, axis=-1).mean(),
        "dark_knowledge": np.mean([dark_by_definition(p[i], LABELS[i]) for i in np.flatnonzero(labelled)]),
    }


@pytest.mark.chapter("A05", "A06")
@pytest.mark.parametrize("name", CASES)
def test_matches_scipy(name):
    metric, inputs = CASES[name]
    metric = metric()
    metric.update(*inputs)
    assert metric.compute().item() == pytest.approx(expected()[name], rel=1e-6)


@over_metrics
def test_states_of_two_processes_add_up_to_the_whole(metric, inputs):
    first, second, whole = metric(), metric(), metric()
    for shard, (start, end) in ((first, (0, 2)), (second, (2, 7))):  # of unequal size
        shard.update(*(value[start:end] for value in inputs))
    whole.update(*inputs)
    first.merge_state(second)
    torch.testing.assert_close(first.compute(), whole.compute())


@over_metrics
def test_several_updates_are_one_and_reset_forgets(metric, inputs):
    parts, whole = metric(), metric()
    parts.update(*(value[:1] for value in inputs))
    parts.reset()
    for start, end in ((0, 3), (3, 4), (4, 7)):
        parts.update(*(value[start:end] for value in inputs))
    whole.update(*inputs)
    torch.testing.assert_close(parts.compute(), whole.compute())


@over_metrics
def test_tokens_are_items(metric, inputs):
    flat, tokens = metric(), metric()
    flat.update(*(value[:6] for value in inputs))
    tokens.update(*(value[:6].reshape(2, 3, *value.shape[1:]) for value in inputs))
    torch.testing.assert_close(tokens.compute(), flat.compute())


@over_metrics
@pytest.mark.filterwarnings("ignore:The ``compute`` method of metric")  # torchmetrics' own notice about this very case
def test_nothing_seen_is_not_a_number(metric, inputs):
    assert metric().compute().isnan()


@over_metrics
def test_can_be_pickled_and_called_per_batch(metric, inputs):
    metric = pickle.loads(pickle.dumps(metric()))
    value = metric(*inputs)
    torch.testing.assert_close(value, metric.compute())


@over_metrics
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_inputs(metric, inputs, dtype):
    half, exact = metric(), metric()
    rounded = [value.to(dtype) if value.is_floating_point() else value for value in inputs]
    half.update(*rounded)
    exact.update(*(value.double() if value.is_floating_point() else value for value in rounded))
    assert half.compute().dtype == torch.float32
    torch.testing.assert_close(half.compute(), exact.compute(), rtol=1e-5, atol=1e-6)


@pytest.mark.chapter("A06", api="lightning_distill.metrics.dark_knowledge")
@pytest.mark.erratum("ERR-04")
def test_dark_knowledge_is_the_part_of_the_entropy_among_the_other_classes(golden):
    """The entropy as a whole never exceeds the log K of a hard label, so it is no measure of extra information."""
    case = golden("dark_knowledge_entropy")
    p, target = case.inputs["p_teacher"], int(case.inputs["target"])
    dark = dark_knowledge(p.log()[None], torch.tensor([target])).item()
    assert dark == pytest.approx(case.expected["dark_nats"], rel=1e-9)
    assert case.expected["binary_entropy"] + dark == pytest.approx(case.expected["entropy_nats"], rel=1e-9)
    metric = TeacherEntropy()
    metric.update(p.log()[None])
    assert metric.compute().item() == pytest.approx(case.expected["entropy_nats"], rel=1e-6)
    assert metric.compute().item() <= math.log(len(p))


@pytest.mark.chapter("A06")
def test_dark_knowledge_of_sure_and_of_uniform_predictions():
    labels = torch.tensor([0, 1])
    sure = torch.tensor([[1e4, 0.0, 0.0], [0.0, 1e4, 0.0]])
    assert dark_knowledge(sure, labels).tolist() == [0.0, 0.0]
    uniform = dark_knowledge(torch.zeros(2, 4), labels)
    torch.testing.assert_close(uniform, torch.full((2,), 3 / 4 * math.log(3)))
    assert dark_knowledge(torch.randn(2, 1), torch.zeros(2, dtype=torch.long)).tolist() == [0.0, 0.0]


@pytest.mark.parametrize("metric", [TeacherEntropy, DarkKnowledge])
def test_softened(metric):
    inputs = (TEACHER,) if metric is TeacherEntropy else (TEACHER, LABELS)
    softened, divided = metric(temperature=4.0), metric()
    softened.update(*inputs)
    divided.update(TEACHER / 4, *inputs[1:])
    torch.testing.assert_close(softened.compute(), divided.compute())
    with pytest.raises(ValueError, match="`temperature` must be positive and finite, got 0"):
        metric(temperature=0)


@pytest.mark.parametrize("metric", [Agreement, Fidelity])
def test_refuses_other_classes(metric):
    with pytest.raises(ValueError, match="student has 5 classes, the teacher 4"):
        metric().update(STUDENT, TEACHER[:, :4])
