"""Files that are whole or not there."""

import pytest

from lightning_distill.files import draft_of


def test_a_draft_takes_its_place_when_all_went_well(tmp_path):
    path = tmp_path / "new" / "file.txt"
    with draft_of(path) as draft:
        assert draft.name == "file.txt"
        draft.write_text("first")
        assert not path.exists()
    assert path.read_text() == "first"
    with draft_of(path, overwrite=True) as draft:
        draft.write_text("second")
        assert path.read_text() == "first"
    assert path.read_text() == "second"
    assert list(path.parent.iterdir()) == [path]


def test_a_folder_may_be_one_too(tmp_path):
    with draft_of(tmp_path / "network") as draft:
        draft.mkdir()
        (draft / "weights").write_text("w")
    assert (tmp_path / "network" / "weights").read_text() == "w"


def test_nothing_changes_after_an_error_or_unasked(tmp_path):
    path = tmp_path / "file.txt"
    path.write_text("mine")
    with pytest.raises(FileExistsError, match=r"file\.txt' exists\. Choose another path, or pass `overwrite=True`"):
        draft_of(path).__enter__()
    with pytest.raises(RuntimeError, match="half"):
        write_half(path)
    assert path.read_text() == "mine"
    assert list(tmp_path.iterdir()) == [path]


def write_half(path):
    with draft_of(path, overwrite=True) as draft:
        draft.write_text("ha")
        raise RuntimeError("half")
