"""``lightning-distill check``."""

from pathlib import Path

import pytest

from lightning_distill.cli import main

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # LightningCLI with jsonargparse 4.53

EXAMPLE = Path(__file__).parents[2] / "examples" / "mnist1d_teacher.yaml"


@pytest.mark.chapter("D45")
def test_it_prints_the_table(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    main(["check", "-c", str(EXAMPLE), "--check.target", "cortex-a78", "--check.batch_sizes", "[1, 2]"])
    said = capsys.readouterr().out
    assert "all 10 can be folded" in said
    assert "measured on this machine" in said
    assert "cortex-a78: nothing found" in said


def test_it_ends_with_status_1_if_something_does_not_suit(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        main(["check", "-c", str(EXAMPLE), "--check.target", "x86-avx512"])
    assert stopped.value.code == 1
    assert "channels      FAILS  no multiples of 16: stem.0 makes 52 (take 48)" in capsys.readouterr().out


def test_an_unknown_target_is_refused():
    with pytest.raises(SystemExit, match=r"lightning-distill check: error: The target must be one of .*, got 'phone'"):
        main(["check", "-c", str(EXAMPLE), "--check.target", "phone"])
