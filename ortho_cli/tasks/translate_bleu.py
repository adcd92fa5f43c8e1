"""BLEU by sacrebleu, summed over processes: counts of n-grams are added up, and the score is of the sums."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ortho_cli.errors import UsageError

__all__ = ["bleu_counts", "bleu_of_counts"]

ORDER = 4  # n-grams of up to so many words


def bleu_counts(translations: Sequence[str], references: Sequence[str], compat: str | None = None) -> Tensor:
    """What BLEU is made of, for some sentences; the counts of others can be added.

    Args:
        translations: of the model.
        references: as many.
        compat: None is sacrebleu's default (13a tokens, case counts); "tokenized-bleu" lower-cases and takes words
            between spaces, for text that is tokenised already.

    Returns:
        `(10,)` float64: lengths of translations and references, n-grams that match, n-grams there are.

    Raises:
        UsageError: sacrebleu is not installed.
    """
    if not translations:
        return torch.zeros(2 + 2 * ORDER, dtype=torch.float64)
    found = _metric(compat).corpus_score(list(translations), [list(references)])
    return torch.tensor([found.sys_len, found.ref_len, *found.counts, *found.totals], dtype=torch.float64)


def bleu_of_counts(counts: Tensor, compat: str | None = None) -> float:
    """BLEU, in 0 to 100, of summed counts.

    The default smooths as sacrebleu does, exponentially; the paper's form does not, and is 0 without any match of four.

    References: Papineni et al. 2002; Post 2018, arXiv:1804.08771.
    """
    numbers = [round(number) for number in counts.tolist()]
    found = _library().BLEU.compute_bleu(
        numbers[2 : 2 + ORDER], numbers[2 + ORDER :], numbers[0], numbers[1],
        smooth_method="exp" if compat is None else "none",
    )  # fmt: skip
    return float(found.score)


def _metric(compat: str | None) -> Any:
    if compat is None:
        return _library().BLEU()
    return _library().BLEU(lowercase=True, tokenize="none", smooth_method="none", force=True)


def _library() -> Any:
    try:
        import sacrebleu
    except ImportError as error:
        raise UsageError("BLEU needs the library sacrebleu", hint="pip install 'ortho-cli[text]'") from error
    return sacrebleu
