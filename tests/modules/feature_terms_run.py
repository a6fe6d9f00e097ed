"""A small transformer whose terms refresh something. Run by test_feature_terms.py, by itself with two processes."""

import sys
from functools import partial
from pathlib import Path

import lightning as L
import torch
from torch.utils.data import DataLoader, Dataset

from lightning_distill import KD
from lightning_distill.losses import AttentionMatching, FeatureMatching, LowRank, Procrustes
from lightning_distill.networks import from_config
from lightning_distill.tasks import SequenceClassification

CLASSES = 3


def bert(heads, layers):
    return from_config(
        "bert",
        "sequence-classification",
        {
            "vocab_size": 50,
            "hidden_size": 8 * heads,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "intermediate_size": 16,
            "hidden_dropout_prob": 0.0,
            "attention_probs_dropout_prob": 0.0,
            "initializer_range": 0.3,
            "num_labels": CLASSES,
        },
    )


class batches(Dataset):
    """Padded batches, the same every time."""

    def __init__(self, number):
        self.number = number

    def __len__(self):
        return self.number

    def __getitem__(self, index):
        if index >= self.number:
            raise IndexError
        generator = torch.Generator().manual_seed(index)
        ids = torch.randint(1, 50, (4, 6), generator=generator)
        mask = torch.ones_like(ids)
        mask[1, 4:] = mask[2, 2:] = 0
        return {"input_ids": ids, "attention_mask": mask, "labels": torch.arange(4) % CLASSES}


def refreshed_module():
    torch.manual_seed(1)
    layers = {"hidden_states.1": "hidden_states.2"}
    terms = {
        "aligned": AttentionMatching({"attentions.0": "attentions.0"}, every=3),
        "low_rank": FeatureMatching(layers, LowRank(4, every=3)),
        "moved": FeatureMatching(layers, transform=Procrustes(every=3, scale=True)),
    }
    task, optimizer = SequenceClassification(), partial(torch.optim.SGD, lr=0.1)
    module = KD(bert(4, 2), bert(4, 3), terms=terms, task=task, optimizer=optimizer)
    module.build(batches(1)[0])
    return module


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    module = refreshed_module()
    trainer = L.Trainer(
        accelerator="cpu",
        devices=2,
        strategy="ddp",
        max_steps=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
    )
    trainer.fit(module, DataLoader(batches(2), batch_size=None))
    parts = ("teacher_heads", "basis", "rotation", "factor", "student_mean", "teacher_mean")
    state = {name: value for name, value in module.terms.state_dict().items() if name.endswith(parts)}
    torch.save(state, folder / f"{trainer.global_rank}.pt")
