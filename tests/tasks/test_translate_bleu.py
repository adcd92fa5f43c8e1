"""BLEU: sacrebleu's own command line says the same, and counts may be added up over processes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ortho_cli.tasks.translate_bleu import bleu_counts, bleu_of_counts

REFERENCES = [
    "The cat sat on the mat, didn't it?", "Save changes before you leave this page.", "Delete the user %(name)s.",
    "An unexpected ERROR occurred while saving.", "Hello",
]  # fmt: skip
FOUND = [
    "the cat sat on a mat, didn't it?", "Save the changes before you leave the page.", "Delete the user %(name)s.",
    "An unexpected error occurred while saving.", "",
]  # fmt: skip


def command_line(folder: Path, *options: str) -> float:
    (folder / "found").write_text("".join(f"{line}\n" for line in FOUND))
    (folder / "wanted").write_text("".join(f"{line}\n" for line in REFERENCES))
    words = [sys.executable, "-m", "sacrebleu", "wanted", "-i", "found", "-w", "6", *options]
    done = subprocess.run(words, cwd=folder, capture_output=True, text=True, check=True)
    return float(json.loads(done.stdout)["score"])


@pytest.mark.parametrize(
    ("compat", "options"), [(None, ()), ("tokenized-bleu", ("-lc", "-tok", "none", "-s", "none", "--force"))]
)
def test_the_command_line_says_the_same(tmp_path: Path, compat: str | None, options: tuple[str, ...]) -> None:
    found = bleu_of_counts(bleu_counts(FOUND, REFERENCES, compat), compat)
    assert found == pytest.approx(command_line(tmp_path, *options), abs=1e-5)
    parts = [bleu_counts(FOUND[part], REFERENCES[part], compat) for part in (slice(0, 2), slice(2, 5), slice(5, 5))]
    assert bleu_of_counts(torch.stack(parts).sum(0), compat) == pytest.approx(found, rel=1e-12)


def test_the_papers_form_takes_words_between_spaces_in_lower_case() -> None:
    forms = [
        bleu_of_counts(bleu_counts([text], ["a b c d e"], "tokenized-bleu"), "tokenized-bleu")
        for text in ("A B C D E", "a b c d e.")
    ]
    assert forms[0] == pytest.approx(100)
    assert forms[1] < 100
    assert bleu_of_counts(bleu_counts(["A B C D E"], ["a b c d e"])) < 1
    assert bleu_of_counts(bleu_counts(["x y"], ["a b c d e"], "tokenized-bleu"), "tokenized-bleu") == 0
