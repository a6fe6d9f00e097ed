"""Several teachers as one: what they say together, and how much each counts."""

import pytest
import torch
from torch import nn

from lightning_distill import KD
from lightning_distill.losses import EnsembleTargets, kl_divergence, mean_kl_divergence
from lightning_distill.tasks import Classification
from lightning_distill.teachers import (
    EnsembleTeacher,
    FunctionTeacher,
    complexity_weights,
    ensemble_log_probs,
    learn_weights,
    performance_weights,
)

BATCH = (torch.randn(5, 4), torch.tensor([0, 1, 2, 0, -100]))


def nets(count=3, classes=3):
    return [nn.Linear(4, classes) for _ in range(count)]


@pytest.mark.chapter("C16", api="lightning_distill.teachers.ensemble_log_probs")
def test_the_mean_of_probabilities(golden):
    case = golden("ensemble_uniform")
    found = ensemble_log_probs(case.inputs["probs"].log().unsqueeze(1)).exp()
    torch.testing.assert_close(found.squeeze(0), case.expected["p"], rtol=case.rtol, atol=case.atol)


@pytest.mark.chapter("C16", api="lightning_distill.teachers.EnsembleTeacher")
def test_a_mixture_is_no_worse_than_its_members_are_on_average():
    logits, labels = 3 * torch.randn(4, 50, 6), torch.randint(6, (50,))
    for space in ("prob", "logit"):
        log_p = ensemble_log_probs(logits, [4, 1, 2, 3], space=space)
        torch.testing.assert_close(log_p.exp().sum(-1), torch.ones(50))
    mixture = nn.functional.nll_loss(ensemble_log_probs(logits), labels)
    members = torch.stack([nn.functional.cross_entropy(z, labels) for z in logits])
    assert mixture < members.mean()
    mean = (logits * torch.tensor([0.4, 0.1, 0.2, 0.3])[:, None, None]).sum(0)
    torch.testing.assert_close(ensemble_log_probs(logits, [4, 1, 2, 3], space="logit"), mean.log_softmax(-1))
    alone = ensemble_log_probs(logits, [0, 0, 1, 0])
    torch.testing.assert_close(alone, logits[2].log_softmax(-1))
    assert torch.isfinite(ensemble_log_probs(1e4 * logits)).all()
    assert ensemble_log_probs(logits.half()).dtype == torch.float32


@pytest.mark.chapter("C17", api="lightning_distill.teachers.performance_weights")
def test_weights_by_accuracy_and_by_cost(golden):
    case = golden("ensemble_weights")
    performance = performance_weights(case.inputs["accuracy"].tolist())
    assert performance == pytest.approx(case.expected["performance"].tolist(), rel=case.rtol)
    expected = case.expected["inverse_complexity"].tolist()
    assert complexity_weights(case.inputs["complexity"].tolist()) == pytest.approx(expected, rel=case.rtol)
    found = ensemble_log_probs(case.inputs["probs"].log().unsqueeze(1), performance).exp()
    torch.testing.assert_close(found.squeeze(0), case.expected["p_performance"], rtol=case.rtol, atol=case.atol)


@pytest.mark.chapter("C17", api="lightning_distill.teachers.learn_weights")
def test_learned_weights_are_the_best_ones():
    """The numbers of the chapter's case: three models, three samples, the probability of the true label."""
    true = torch.tensor([[0.7, 0.2, 0.6], [0.4, 0.6, 0.3], [0.5, 0.1, 0.9]], dtype=torch.float64)
    log_probs = torch.stack([true, (1 - true)], dim=2).log()
    labels = torch.zeros(3, dtype=torch.long)

    def nll(weights):
        return -(torch.tensor(weights, dtype=torch.float64)[:, None] * true).sum(0).log().mean().item()

    weights = learn_weights(log_probs, labels)
    assert sum(weights) == pytest.approx(1)
    assert nll([1 / 3] * 3) == pytest.approx(0.781136, abs=1e-6)
    assert nll(weights) == pytest.approx(0.766698, abs=1e-6)
    with pytest.raises(ValueError, match="has no labelled sample"):
        learn_weights(log_probs, labels - 100)
    masked = learn_weights(torch.cat([log_probs, log_probs.flip(2)], 1), torch.cat([labels, labels - 100]))
    assert masked == pytest.approx(weights, abs=1e-6)


@pytest.mark.chapter("C20", api="lightning_distill.losses.mean_kl_divergence")
def test_the_mean_divergence_is_that_from_the_mixture_and_a_constant(golden):
    case = golden("knowledge_reuse_mixture")
    student = case.inputs["p_student"].log().unsqueeze(0)
    members = torch.stack([case.inputs["p_prev"], case.inputs["p_teacher"]]).log().unsqueeze(1)
    alpha = case.inputs["alpha"]
    loss = mean_kl_divergence(student, members, [alpha, 1 - alpha])
    assert loss.item() == pytest.approx(float(case.expected["loss"]), rel=1e-9)
    mixture = ensemble_log_probs(members, [alpha, 1 - alpha])
    to_mixture = kl_divergence(student, mixture)
    assert to_mixture.item() == pytest.approx(float(case.expected["kl_to_mixture"]), rel=1e-9)
    assert (loss - to_mixture).item() == pytest.approx(float(case.expected["constant"]), rel=1e-9)


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_the_term_softens_each_member(temperature):
    members, student = nets(), nn.Linear(4, 3)
    module = KD(student, EnsembleTeacher(members, [2, 1, 1]), temperature, terms={"soft": EnsembleTargets()})
    step = module.observe(BATCH)
    loss, losses = module.loss(step)
    z = student(BATCH[0])
    each = [kl_divergence(z, member(BATCH[0]), temperature=temperature) for member in members]
    expected = (0.5 * each[0] + 0.25 * each[1] + 0.25 * each[2]).mean()
    torch.testing.assert_close(losses["soft"], expected)
    # the same gradient as from the mixture of the softened predictions
    soft = torch.stack([(member(BATCH[0]) / temperature).softmax(-1) for member in members])
    mixture = (torch.tensor([0.5, 0.25, 0.25])[:, None, None] * soft).sum(0)
    to_mixture = kl_divergence(z / temperature, mixture.log()).mean() * temperature**2
    found = torch.autograd.grad(losses["soft"], student.weight, retain_graph=True)
    torch.testing.assert_close(found, torch.autograd.grad(to_mixture, student.weight, retain_graph=True))
    assert loss.requires_grad


def test_the_teacher_says_the_average_and_is_frozen(make_trainer):
    members = nets()
    teacher = EnsembleTeacher(members, space="prob")
    said = teacher(BATCH, Classification())
    expected = torch.stack([member(BATCH[0]).softmax(-1) for member in members]).mean(0)
    torch.testing.assert_close(said.logits.exp(), expected)
    assert not list(teacher.parameters())
    module = KD(nn.Linear(4, 3), teacher)
    before = [member.weight.clone() for member in members]
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(*BATCH), batch_size=5)
    make_trainer(max_epochs=1).fit(module, loader)
    assert all(torch.equal(a, b.weight) for a, b in zip(before, members, strict=True))
    assert set(module.state_dict()) == {"student.weight", "student.bias"}


def test_members_that_say_nothing_yet():
    class Later(FunctionTeacher):
        ready = False

        def forward(self, batch, task):
            return None

    teacher = EnsembleTeacher([nn.Linear(4, 3), Later(len)])
    assert not teacher.ready
    assert teacher(BATCH, Classification()) is None


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: EnsembleTeacher([]), "`members` is empty"),
        (lambda: EnsembleTeacher(nets(), [1, 2]), "`weights` must be 3 numbers that are not negative.*got"),
        (lambda: EnsembleTeacher(nets(), [1, -2, 3]), "must be 3 numbers that are not negative"),
        (lambda: EnsembleTeacher(nets(), [0, 0, 0]), "not all 0"),
        (lambda: EnsembleTeacher(nets(), space="mean"), "`space` must be 'prob' or 'logit', got 'mean'"),
        (lambda: EnsembleTeacher(["gpt2"]), "none of them None or a name"),
        (lambda: ensemble_log_probs(torch.zeros(2, 1, 3), space="mean"), "`space` must be 'prob' or 'logit'"),
        (lambda: complexity_weights([1, 0]), "`costs` must be positive"),
        (
            lambda: EnsembleTeacher([*nets(1), *nets(1, classes=4)])(BATCH, Classification()),
            r"must speak about the same classes, but their logits have the shapes \(5, 3\), \(5, 4\)",
        ),
        (lambda: KD(nn.Linear(4, 3), nn.Linear(4, 3), terms={"soft": EnsembleTargets()}).loss(
            KD(nn.Linear(4, 3), nn.Linear(4, 3), terms={"soft": EnsembleTargets()}).observe(BATCH)),
            "reads what each member of an ensemble says, but the teacher is a single one"),
    ],
)  # fmt: skip
def test_refuses(build, message):
    with pytest.raises(ValueError, match=message):
        build()
