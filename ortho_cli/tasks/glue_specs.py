"""The tasks of GLUE: their columns, classes, evaluation parts and metrics, as the benchmark defines them."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["HUB", "SPECS", "GlueSpec"]

HUB = "nyu-mll/glue"


@dataclass(frozen=True)
class GlueSpec:
    """One task.

    Attributes:
        title: what is asked.
        text: the column of sentences, or the two of pairs.
        classes: their names in the order of their numbers; none where labels are scores.
        metrics: those that GLUE reports; their mean is its score.
        judged: the split that runs are judged on, or the two that MNLI has.
    """

    title: str
    text: tuple[str, ...]
    classes: tuple[str, ...]
    metrics: tuple[str, ...]
    judged: tuple[str, ...] = ("validation",)


_ENTAILS = ("entailment", "not_entailment")
SPECS: dict[str, GlueSpec] = {
    "cola": GlueSpec("is it grammatical?", ("sentence",), ("unacceptable", "acceptable"), ("matthews",)),
    "sst2": GlueSpec("does the critic like it?", ("sentence",), ("negative", "positive"), ("accuracy",)),
    "mrpc": GlueSpec(
        "do two sentences of the news say the same?", ("sentence1", "sentence2"), ("not_equivalent", "equivalent"),
        ("accuracy", "f1"),
    ),
    "qqp": GlueSpec(
        "do two questions ask the same?", ("question1", "question2"), ("not_duplicate", "duplicate"),
        ("accuracy", "f1"),
    ),
    "stsb": GlueSpec("how alike are they, from 0 to 5?", ("sentence1", "sentence2"), (), ("pearson", "spearman")),
    "mnli": GlueSpec(
        "does the premise entail or contradict the hypothesis?", ("premise", "hypothesis"),
        ("entailment", "neutral", "contradiction"), ("accuracy", "accuracy_mismatched"),
        ("validation_matched", "validation_mismatched"),
    ),
    "qnli": GlueSpec("does the sentence answer the question?", ("question", "sentence"), _ENTAILS, ("accuracy",)),
    "rte": GlueSpec("does the first sentence entail the second?", ("sentence1", "sentence2"), _ENTAILS, ("accuracy",)),
}  # fmt: skip
