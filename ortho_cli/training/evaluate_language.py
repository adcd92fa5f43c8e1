"""A language model by any task of lm-evaluation-harness, where that is installed: `--metrics lm-eval:hellaswag`."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any, ClassVar

from ortho_cli.analysis.evaluation import Missing
from ortho_cli.errors import UsageError
from ortho_cli.tasks.generation import bare_model

from .model_judge import ModelJudge

__all__ = ["LanguageJudge"]

INSTALL = "pip install lm-eval"


class LanguageJudge(ModelJudge):
    """The harness's own metrics of its tasks, by the model in memory with its adapter on."""

    def harness(self, name: str) -> dict[str, float]:
        """Let the harness judge by one of its tasks.

        Args:
            name: of the task or group, as `lm-eval ls tasks` lists them.

        Returns:
            Its metrics, named `lm-eval/TASK/METRIC`; standard errors are left out.

        Raises:
            Missing: lm-eval is not installed.
            UsageError: it has no such task.
        """
        try:
            library, language = import_module("lm_eval"), import_module("lm_eval.models.huggingface")
        except ImportError as error:
            raise Missing("lm-eval is not installed", INSTALL) from error
        model = bare_model(self.model)
        batch = self.session.recipe.data.eval_batch or self.session.recipe.data.batch
        wrapped = language.HFLM(pretrained=model.model, tokenizer=model.tokenizer, batch_size=batch)
        self.say(f"lm-eval: {name}")
        try:
            found = library.simple_evaluate(model=wrapped, tasks=[name])
        except KeyError as error:
            raise UsageError(f"--metrics lm-eval:{name}: lm-eval has no such task", hint="lm-eval ls tasks") from error
        values = {}
        for task, metrics in found["results"].items():
            for key, value in metrics.items():
                metric, _, filtered = key.partition(",")
                if isinstance(value, (int, float)) and not metric.endswith("_stderr"):
                    suffix = "" if filtered in ("", "none") else f"-{filtered}"
                    values[f"lm-eval/{task}/{metric}{suffix}"] = float(value)
        self.notes.append(f"lm-eval/{name}: by lm-evaluation-harness {library.__version__}")
        return values

    families: ClassVar[dict[str, Callable[[Any, str], dict[str, float]]]] = {"lm-eval": harness}
