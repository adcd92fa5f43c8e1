"""The sets of queries and responses that recipes name by a word: where they are, and what their columns are called."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

__all__ = ["JUDGED", "SPECS", "PairSpec"]


@dataclass(frozen=True)
class PairSpec:
    """A set of pairs.

    Attributes:
        title: what it is.
        hub: its id; None: it is on no hub.
        configs: of the hub set, all of which are put together; empty: its only one.
        columns: query and response.
        test: the split that answers are judged on; None: it has none, and some training samples are held out.
        files: names that its local copies go by, below `train` and `test`.
        fetch: how to get it.
    """

    title: str
    hub: str | None = None
    configs: tuple[str, ...] = ()
    columns: tuple[str, str] = ("query", "response")
    test: str | None = None
    files: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    fetch: tuple[str, ...] = ()


_LINES = {"train": ("train.jsonl", "train.json", "train.parquet"), "test": ("test.jsonl", "test.json", "test.parquet")}
_SUBJECTS = (
    "algebra", "counting_and_probability", "geometry", "intermediate_algebra", "number_theory", "prealgebra",
    "precalculus",
)  # fmt: skip

SPECS = {
    "metamathqa": PairSpec(
        "395,000 rewritten GSM8K and MATH training questions with solutions (MetaMath)", "meta-math/MetaMathQA",
        files={"train": ("MetaMathQA-395K.json", *_LINES["train"])},
        fetch=("hf download meta-math/MetaMathQA --repo-type dataset   (306 MB, MIT)",),
    ),
    "metamathqa-40k": PairSpec(
        "40,000 of MetaMathQA", "meta-math/MetaMathQA-40K",
        files={"train": ("MetaMathQA-40K.json", *_LINES["train"])},
        fetch=("hf download meta-math/MetaMathQA-40K --repo-type dataset   (31 MB, MIT)",),
    ),
    "gsm8k": PairSpec(
        "7,473 and 1,319 school problems in words (GSM8K)", "openai/gsm8k", ("main",), ("question", "answer"), "test",
        _LINES, ("hf download openai/gsm8k --repo-type dataset   (2.7 MB, MIT)",),
    ),
    "math": PairSpec(
        "7,500 and 5,000 competition problems (MATH)", "EleutherAI/hendrycks_math", _SUBJECTS, ("problem", "solution"),
        "test", _LINES, ("hf download EleutherAI/hendrycks_math --repo-type dataset   (5 MB)",),
    ),
    "math-500": PairSpec(
        "500 of MATH's test problems", "HuggingFaceH4/MATH-500", (), ("problem", "solution"), "test",
        {"test": _LINES["test"]}, ("hf download HuggingFaceH4/MATH-500 --repo-type dataset   (0.4 MB)",),
    ),
    "instruct-file": PairSpec("a file or hub set of your own", test="test", files=_LINES),
    "arithmetic": PairSpec("arithmetic in words, made here", fetch=("nothing: it is made",)),
}  # fmt: skip
JUDGED = ("gsm8k", "math", "math-500")
