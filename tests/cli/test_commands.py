"""What the commands share."""

import sys

import pytest

from lightning_distill.cli.commands import call_with_options, use_configuration
from lightning_distill.cli.trainer import DistillationCLI

LINE = ["cache", "--model", "KD", "--model.alpha", "1.0", "--data", "MNIST1DDataModule"]
LINE += [
    "--trainer.logger=false",
    "--model.student",
    "torch.nn.Linear",
    "--model.student.in_features=4",
    "--model.student.out_features=3",
]
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # LightningCLI with jsonargparse 4.53


def test_other_processes_are_started_with_the_whole_line_and_the_callers_own_comes_back():
    before, seen = list(sys.argv), []

    def work(cli):
        seen.append((sys.argv[1:], cli.model.student.out_features))
        raise ValueError("enough")

    with pytest.raises(SystemExit, match="lightning-distill cache: error: enough"):
        use_configuration(DistillationCLI, LINE, work)
    assert seen == [(LINE, 3)]
    assert sys.argv == before


def test_only_expected_errors_become_messages():
    def fail(number: int = 0) -> None:
        """Fail.

        Args:
            number: Which error.
        """
        raise [ValueError, KeyError][number]("so it is")

    with pytest.raises(SystemExit, match="lightning-distill search: error: so it is"):
        call_with_options(fail, ["search"])
    with pytest.raises(KeyError, match="so it is"):
        call_with_options(fail, ["search", "--number", "1"])
