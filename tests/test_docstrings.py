"""The examples in docstrings are true."""

import doctest
import importlib
import pkgutil

import pytest

import lightning_distill

MODULES = sorted(module.name for module in pkgutil.walk_packages(lightning_distill.__path__, "lightning_distill."))


def examples(name):
    found = doctest.DocTestFinder(exclude_empty=True).find(importlib.import_module(name))
    return [example for example in found if example.examples]


@pytest.mark.parametrize("name", MODULES)
def test_examples_say_what_happens(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    said = []
    for example in examples(name):
        doctest.DocTestRunner(optionflags=doctest.FAIL_FAST).run(example, out=said.append)
    assert "".join(said) == ""


def test_there_are_examples():
    assert sum(len(examples(name)) for name in MODULES) > 250
