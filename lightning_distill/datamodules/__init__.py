"""Data modules that resume exactly, and the samplers behind them."""

# The folder `datamodules` at the top of the repository is a link to this one. Imported by that name, every class here
# would exist a second time.
if __name__ == "datamodules":
    raise ImportError("import lightning_distill.datamodules, not datamodules")

from lightning_distill.datamodules.digits import DigitsDataModule
from lightning_distill.datamodules.image_folder import ImageFolderDataModule
from lightning_distill.datamodules.mnist1d import MNIST1DDataModule
from lightning_distill.datamodules.samplers import (
    ResumableDataModule,
    ResumableLoader,
    ResumableSampler,
    systematic_resample,
)
from lightning_distill.datamodules.short_texts import SentenceDataModule, TextClassificationDataModule, sentences
from lightning_distill.datamodules.teacher_text import TeacherTextDataModule
from lightning_distill.datamodules.tensors import (
    InMemoryDataModule,
    Splits,
    TensorDataModule,
    choose_stratified,
    corrupt_labels,
)
from lightning_distill.datamodules.text import TextDataModule
from lightning_distill.datamodules.two_tokenizers import TwoTokenizers, aligned_positions

__all__ = [
    "DigitsDataModule",
    "ImageFolderDataModule",
    "InMemoryDataModule",
    "MNIST1DDataModule",
    "ResumableDataModule",
    "ResumableLoader",
    "ResumableSampler",
    "SentenceDataModule",
    "Splits",
    "TeacherTextDataModule",
    "TensorDataModule",
    "TextClassificationDataModule",
    "TextDataModule",
    "TwoTokenizers",
    "aligned_positions",
    "choose_stratified",
    "corrupt_labels",
    "sentences",
    "systematic_resample",
]
