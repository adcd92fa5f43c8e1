"""The examples in the documentation of what tasks share run."""

from __future__ import annotations

import doctest
import importlib

import pytest


@pytest.mark.parametrize("module", ["augment", "batching", "classify", "draws", "image_set", "pictures", "series_data"])
def test_examples_run(module: str) -> None:
    found = doctest.testmod(importlib.import_module(f"ortho_cli.tasks.{module}"))
    assert found.attempted > 0
    assert found.failed == 0
