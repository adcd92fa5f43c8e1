"""What a factorisation says beside its numbers."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save_file

from ortho_cli.surgery.factorize import factorize
from ortho_cli.surgery.factorize_layers import FORMS


def test_what_the_numbers_do_not_say_is_said(tmp_path: Path) -> None:
    """Of whom the parameters and errors are, and which layers have all but gone."""
    left, right = torch.linspace(1, 2, 96), torch.linspace(2, 1, 96)
    save_file({"thin.weight": torch.outer(left, right)}, tmp_path / "thin.safetensors")
    save_file({"flat.weight": torch.eye(96)}, tmp_path / "flat.safetensors")
    notes = {form: factorize(tmp_path / "thin.safetensors", tmp_path / form, rank=1, form=form).notes for form in FORMS}
    assert any("the file its size" in note for note in notes["dense"])
    assert any("together are the checkpoint" in note for note in notes["lora-residual"])
    assert not any("of their energy" in note for note in notes["factors"])
    report = factorize(tmp_path / "flat.safetensors", tmp_path / "flat", rank=1)
    assert any("1 of 1 layers keep less than 5% of their energy, first flat" in note for note in report.notes)
