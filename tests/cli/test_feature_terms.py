"""Terms on features and attention, built from YAML."""

import pytest
import torch
import yaml
from jsonargparse import ArgumentParser

from lightning_distill import KD
from lightning_distill.cli import main
from lightning_distill.losses import MMD, LocalGlobal, SparseAttention, Term
from tests.cli.test_trainer_commands import CONFIGURATION

pytestmark = pytest.mark.filterwarnings("ignore")  # the command line shows users whatever it has to warn of
PAIRS = {"blocks.0": "blocks.0"}


def matching(distance, **more):
    return of("FeatureMatching", pairs=PAIRS, distance=distance, **more)


def of(name, **arguments):
    return {"class_path": f"lightning_distill.losses.{name}", "init_args": arguments}


TERMS = {
    "named": matching("rkd"),
    "settings": matching(of("MMD", kernel="rbf", sigma=1.5, bandwidths=[1.0, 2.0])),
    "module": matching(of("LowRank", rank=4)),
    "contrast": matching(of("InfoNCE", temperature=0.2, similarity="bilinear")),
    "moved": matching("cosine", transform=of("Procrustes", every=5)),
    "classes": of("ContrastiveMatching", pairs=PAIRS),
    "apart": of("Decorrelation", taps=["blocks.0"]),
    "sparse": of("ActivationSparsity", taps=["blocks.0"]),
    "slope": of("LipschitzPenalty", inputs="blocks.0@input"),
}


def test_fit_with_terms_from_yaml(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = CONFIGURATION["model"]
    arguments = model["init_args"] | {"terms": TERMS, "weights": dict.fromkeys(TERMS, 0.01)}
    (tmp_path / "kd.yaml").write_text(yaml.safe_dump(CONFIGURATION | {"model": model | {"init_args": arguments}}))
    main(["fit", "-c", "kd.yaml"])
    module = KD.load_from_checkpoint(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)
    assert module.terms["settings"].distances == [MMD(sigma=1.5, bandwidths=[1.0, 2.0])]
    assert module.terms["module"].distances[0].basis.shape == (32, 4)
    assert module.terms["moved"].transforms[0].rotation.shape == (8, 32)
    assert not torch.equal(module.terms["moved"].transforms[0].rotation, torch.eye(8, 32))
    assert module.terms["contrast"].distances[0].similarity.weight.shape == (32, 32)


@pytest.mark.parametrize(
    ("distance", "expected"),
    [
        (of("LocalGlobal", window=2), [LocalGlobal(window=2)]),
        (
            [of("SparseAttention", threshold=t) for t in (0.1, 0.2)],
            [SparseAttention(0.1), SparseAttention(0.2)],
        ),
    ],
)
def test_attention_terms_from_yaml(distance, expected):
    parser = ArgumentParser()
    parser.add_argument("--term", type=Term)
    pairs = {f"attentions.{i}": f"attentions.{2 * i}" for i in range(len(expected))}
    parsed = parser.parse_object({"term": of("AttentionMatching", pairs=pairs, distance=distance, heads="mean")})
    term = parser.instantiate_classes(parsed).term
    assert term.distances == expected
    assert term.heads == "mean"
