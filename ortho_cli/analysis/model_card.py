"""The model card of a run: `README.md` with the hub's front matter, what came out, how to load it, how to repeat it.

Everything is written as seen from inside the run's folder, so that the card is right wherever the folder goes; no path
of the machine is in it.
"""

from __future__ import annotations

import math
import re
import shlex
from pathlib import Path
from typing import Any

from ortho_cli import __version__
from ortho_cli.checkpoints.factored import CONFIG_NAME
from ortho_cli.checkpoints.store import read_json

from .metric_names import metric_title, metric_value, tail
from .recipe_text import hub_base, public_recipe, public_text, recipe_line
from .run_folder import Run
from .run_results import results_table

__all__ = ["CARD", "DATASETS", "TASK_TYPES", "card_text"]

CARD = "README.md"
# The hub's words for our tasks, and the metrics that it knows.
TASK_TYPES = {
    "classify": "image-classification", "glue": "text-classification", "forecast": "time-series-forecasting",
    "instruct": "text-generation",
}  # fmt: skip
HUB_METRICS = {"accuracy", "f1", "precision", "recall", "bleu", "perplexity", "rouge", "mse", "mae"}
# Where the sets that recipes name by a short word are on the hub; others say it in data.source.
DATASETS = {
    "mnist": "ylecun/mnist",
    "cifar10": "uoft-cs/cifar10",
    "cifar100": "uoft-cs/cifar100",
    "tiny-imagenet": "zh-plus/tiny-imagenet",
    "imagenet": "ILSVRC/imagenet-1k",
    "dsprites": "eurecom-ds/dsprites",
    "celeba": "flwrlabs/celeba",
    "lsun-church": "tglcourse/lsun_church_train",
    "ffhq": "merkol/ffhq-256",
    "anime-faces": "DrishtiSharma/Anime-Face-Dataset",
    "metamathqa": "meta-math/MetaMathQA",
    "metamathqa-40k": "meta-math/MetaMathQA-40K",
    "gsm8k": "openai/gsm8k",
    "math": "EleutherAI/hendrycks_math",
    "math-500": "HuggingFaceH4/MATH-500",
    **dict.fromkeys(("etth1", "etth2", "ettm1", "ettm2"), "AutonLab/Timeseries-PILE"),
}
FACTORED = "factors"  # in what methods with factors export
SHOWN_FIGURES = ("loss", "accuracy", "mse")


def card_text(run: Run) -> str:
    """The whole card of a run; a license is not named, for the run does not know one."""
    exports = sorted(path for path in (run.folder / "export").glob("*") if path.is_dir())
    adapters = sorted(path.parent for path in (run.folder / "export").rglob("adapter_config.json"))
    state = "best" if (run.folder / "checkpoints" / "best").is_dir() else f"step-{run.step:06d}"
    sections = [
        f"# {run.title}",
        f"Trained with `ortho` {__version__}: {recipe_line(run.recipe)}.",
        *_results(run),
        "## How to load it",
        "All commands are given inside this folder.",
        *(text for adapter in adapters for text in _adapter(run, adapter)),
        *(text for export in exports for text in _factors(export)),
        *_weights(state),
        "## The same again",
        _fenced("bash", "ortho train recipe.yaml --set run.dir=again"),
        "<details><summary>The resolved recipe</summary>",
        _fenced("yaml", public_recipe(run.recipe)),
        "</details>",
    ]
    return f"---\n{_front_matter(run, adapters)}\n---\n\n" + "\n\n".join(sections) + "\n"


def _front_matter(run: Run, adapters: list[Path]) -> str:
    from huggingface_hub import EvalResult, ModelCardData

    recipe, data = run.recipe, run.recipe.data
    dataset = re.split("[@:]", getattr(data, "source", None) or "")[0] or DATASETS.get(data.name)
    task_type = TASK_TYPES.get(recipe.task.name, recipe.task.name)
    finals = {name: series.final for name, series in run.metrics.items() if name.startswith("eval/")}
    measured = {name: value for name, value in finals.items() if math.isfinite(value)}
    other = getattr(data, "judge", "")  # perhaps on another set
    judged = other if other in DATASETS else data.name
    judged_id = (dataset if judged == data.name else DATASETS[judged]) or data.name
    results = [
        EvalResult(
            task_type=task_type, dataset_type=judged_id, dataset_name=judged, metric_type=tail(name),
            metric_value=value, metric_name=metric_title(name),
        )
        for name, value in measured.items()
    ]  # fmt: skip
    known = sorted({tail(name) for name in measured} & HUB_METRICS)
    card = ModelCardData(
        base_model=hub_base(recipe),
        datasets=[dataset] if dataset else None,
        library_name="peft" if adapters else "ortho",
        metrics=known or None,
        model_name=run.name,
        eval_results=results or None,
        pipeline_tag=task_type,
        tags=["ortho", "orthogonality", *dict.fromkeys(method.name for method in recipe.methods)],
    )
    return str(card.to_yaml())


def _results(run: Run) -> list[str]:
    if not any(name.startswith("eval/") for name in run.metrics):
        return []
    facts, outcome = [], run.outcome
    if outcome:
        trained = f"{outcome['trainable']:,} of {outcome['parameters']:,} parameters trained"
        facts = [f"{trained}, {outcome['step']:,} steps."]
    best = run.recipe.run.best
    if best is not None and best.metric in run.metrics:
        step, value = run.metrics[best.metric].best(best.mode)
        shown = f"{metric_title(best.metric)} {metric_value(best.metric, value)}, at step {step:,}"
        facts.append(f"`checkpoints/best` is the state of the best evaluation: {shown}.")
    pictures = [name for name in SHOWN_FIGURES if (run.folder / "figures" / f"{name}.png").is_file()]
    shown = " ".join(f"![{name}](figures/{name}.png)" for name in pictures)
    return ["## Results", results_table(run).markdown().rstrip(), *([" ".join(facts)] if facts else []), shown]


def _adapter(run: Run, adapter: Path) -> list[str]:
    """How to use an adapter that PEFT reads."""
    config: dict[str, Any] = read_json(adapter / "adapter_config.json")
    base = run.recipe.model.base
    place = adapter.relative_to(run.folder).as_posix()
    named = hub_base(run.recipe)
    origin = f"`{named}`" if named else f"`{public_text(base)}`" if base else "this run's own random start"
    title = f"`{place}` is a PEFT adapter ({config.get('peft_type', 'unknown')}) of the base model, {origin}:"
    code = [
        "from peft import PeftModel",
        f'model = PeftModel.from_pretrained(model, "{place}")  # model: the base',
    ]
    parts = [title, _fenced("python", "\n".join(code))]
    if base:
        merge = f"ortho merge {shlex.quote(str(base) if named else 'BASE')} {place} -o merged.safetensors"
        about = "To fold it into the base's weights" + ("" if named else f" (`BASE`: those of `{public_text(base)}`)")
        parts += [f"{about}:", _fenced("bash", merge)]
    return parts


def _factors(export: Path) -> list[str]:
    """How to use the low-rank factors that a run left, and the dense network they multiply out to."""
    if not (export / FACTORED / CONFIG_NAME).is_file():
        return []
    place = f"export/{export.name}"
    code = f'import ortho_cli as ortho\n\nmodel = ortho.load_factorized(model, "{place}/{FACTORED}")  # model: dense'
    parts = [f"`{place}/{FACTORED}` holds its factors; they go into a model of the dense network's shape:"]
    parts += [_fenced("python", code)]
    if (export / "dense").is_dir():
        parts.append(f"`{place}/dense` is that network with the factors multiplied out, a drop-in.")
    return parts


def _weights(state: str) -> list[str]:
    file = f"checkpoints/{state}/model.safetensors"
    return [
        f"`{file}` holds all weights of the model as it was trained, under its own names:",
        _fenced("python", f'from safetensors.torch import load_file\n\nweights = load_file("{file}")'),
        _fenced("bash", "ortho evaluate .          # the model on its evaluation split"),
        "Another recipe starts from it with `model.base: FOLDER`.",
    ]


def _fenced(language: str, text: str) -> str:
    return f"```{language}\n{text.rstrip()}\n```"
