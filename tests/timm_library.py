"""Whether timm can be imported here; where it cannot, tests that need it are skipped and say why."""

from __future__ import annotations

import importlib

import pytest

__all__ = ["TIMM", "needs_timm"]

try:
    importlib.import_module("timm")
except (ImportError, RuntimeError) as error:  # RuntimeError: a torchvision of another torch
    TIMM = f"timm cannot be imported here: {error}"
else:
    TIMM = ""
needs_timm = pytest.mark.skipif(bool(TIMM), reason=TIMM or "timm is here")
