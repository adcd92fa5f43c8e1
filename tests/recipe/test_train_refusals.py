"""What a training recipe may not say, and what the user is told: line, key, reason, the nearest that exists."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import TypeAdapter
from training_recipes import FORECAST, errors, written

from ortho_cli.errors import RecipeError
from ortho_cli.recipe.data import Data
from ortho_cli.recipe.train import load_train
from ortho_cli.registry import TABLES

TASKS = ", ".join(sorted(TABLES["tasks"]))
DATA = ", ".join(sorted(TypeAdapter(Data).json_schema()["discriminator"]["mapping"]))
CASES: list[tuple[dict[str, str], str]] = [
    # names
    ({"task": "{name: clasify}"}, f"2: task.name: 'clasify' is none of {TASKS}; did you mean 'classify'?"),
    ({"task": "{}"}, f"2: task.name: missing; one of {TASKS}"),
    (
        {"model": "{name: resnet19}"},
        f"3: model.name: 'resnet19' is none of {', '.join(sorted(TABLES['models']))}; did you mean 'resnet18'?",
    ),
    ({"data": "{name: cifar}"}, f"4: data.name: 'cifar' is none of {DATA}; did you mean 'cifar10'?"),
    ({"optimizer": "{name: adamW, lr: 1}"}, "5: optimizer.name: 'adamW' is none of adam, adamw, muon, nag, nesterov,"
     " sgd; did you mean 'adamw'?"),
    # keys
    ({"model": "{name: resnet20, nrom: group}"}, "3: model.nrom: no such key; did you mean 'norm'?"),
    ({"optimizer": "{name: sgd, lr: 1, betas: [0, 0]}"}, "5: optimizer.betas: no such key here; known: name, lr,"
     " decay_norms, momentum, weight_decay"),
    ({"train": "{epoch: 2}"}, "6: train.epoch: no such key; did you mean 'epochs'?"),
    ({"run": "{dri: x}"}, "7: run.dri: no such key; did you mean 'dir'?"),
    ({"run": "{}"}, "7: run.dir: missing"),
    ({"optimizer": "{name: sgd}"}, "5: optimizer.lr: missing"),
    # types and ranges
    ({"optimizer": "{name: sgd, lr: '0.1'}"}, "5: optimizer.lr: expected a number, found '0.1' (remove the quotes)"),
    ({"optimizer": "{name: sgd, lr: 0}"}, "5: optimizer.lr: should be greater than 0, found 0"),
    ({"optimizer": "{name: sgd, lr: .inf}"}, "5: optimizer.lr: expected a finite number, found inf"),
    ({"optimizer": "{name: nesterov, lr: 1, momentum: 0}"}, "5: optimizer.momentum: should be greater than 0, found 0"),
    ({"optimizer": "{name: adam, lr: 1, betas: [0.9]}"}, "5: optimizer.betas.1: missing"),
    ({"data": "{name: digits, batch: 64.0}"}, "4: data.batch: expected a whole number, found 64.0"),
    ({"data": "{name: mnist, augment: flip}"}, "4: data.augment: expected a list, found 'flip'"
     " (write a list: [item, ...])"),
    ({"data": "{name: mnist, augment: [flipp]}"}, "4: data.augment.0: expected crop, flip, cutout or randaugment, found"
     " 'flipp'; did you mean 'flip'?"),
    ({"data": "{name: mnist, classes: []}"}, "4: data.classes: expected 1 or more of them, found an empty list"),
    ({"train": "{epochs: 2, compile: on}"}, "6: train.compile: expected true or false, found 'on'"
     " (write true without quotes)"),
    ({"train": "{epochs: 2, precision: fp8}"}, "6: train.precision: expected fp32, bf16 or fp16, found 'fp8'"),
    ({"run": "{dir: x, keep: some}"}, "7: run.keep: expected a whole number or all, found 'some'"),
    ({"run": "{dir: x, keep: 0}"}, "7: run.keep: should be greater than or equal to 1, found 0"),
    ({"run": "{dir: x, best: true}"}, "7: run.best: expected a mapping, found true"),
    ({"run": "{dir: x, trackers: [wandbb]}"}, "7: run.trackers.0: expected tensorboard, wandb, trackio, comet_ml, aim,"
     " mlflow, clearml, dvclive or swanlab, found 'wandbb'; did you mean 'wandb'?"),
    # rules between keys
    ({"train": "{epochs: 2, steps: 9}"}, "6: train.steps: epochs (2) and steps (9) exclude each other; give one of"
     " them"),
    ({"train": "{seed: 1}"}, "6: train: says neither epochs nor steps; give one of them"),
    ({"train": "{epochs: 2, accumulate: 3}"}, "6: train.accumulate: a batch of 64 cannot be split into 3 equal parts"),
    ({"data": "{name: digits, path: x}"}, "4: data.path: digits comes with scikit-learn and has none; remove the line"),
    ({"data": "{name: image-folder}"}, "4: data.name: an image-folder needs path: FOLDER (or source: HUB_ID)"),
    ({"data": "{name: mnist, classes: [1, 2, 1]}"}, "4: data.classes: 1 is named 2 times"),
    ({"data": "{name: mnist, augment: [crop, crop]}"}, "4: data.augment: crop is named 2 times"),
    ({"model": "{name: vit-mini, dim: 64}"}, "3: model.dim: a width of 64 cannot be shared by 6 heads;"
     " take a multiple of heads"),
    ({"run": "{dir: x, best: {metric: accuracy}}"}, "7: run.best.metric: expected eval/NAME, e.g. eval/accuracy,"
     " found 'accuracy'"),
    ({"run": "{dir: x, best: {metric: eval/loss}}"}, "7: run.best.metric: eval/loss is better when it is lower;"
     " write mode: min"),
    ({"data": "{name: eeg}"}, "4: data.name: eeg is for series, and the task classify for pictures"),
    ({"model": "{name: forecaster}"}, "3: model.name: forecaster is for series, and the task classify for pictures"),
    ({**FORECAST, "model": "{name: mlp}"}, "3: model.name: mlp is for pictures, and the task forecast for series"),
    ({**FORECAST, "data": "{name: eeg, path: x}"}, "4: data.path: eeg comes with matplotlib and has none; remove the"
     " line"),
    ({**FORECAST, "data": "{name: series-csv}"}, "4: data.name: a series-csv needs path: FILE (or source:"
     " HUB_ID:FILE)"),
    ({**FORECAST, "data": "{name: ettm2, columns: [OT, OT]}"}, "4: data.columns: OT is named 2 times"),
    ({**FORECAST, "data": "{name: ettm2, shares: [0.6, 0.4]}"}, "4: data.shares: 0.6 and 0.4 leave one of the three"
     " parts without rows"),
    ({**FORECAST, "data": "{name: eeg, augment: [crop]}"}, "4: data.augment: no such key here; known: name, path,"
     " source, columns, shares, judge, batch, eval_batch, workers"),
    ({**FORECAST, "model": "{name: forecaster, dim: 12}"}, "3: model.dim: a width of 12 cannot be shared by 8 heads;"
     " take a multiple of heads"),
    ({**FORECAST, "model": "{name: forecaster, moving_average: 1}"}, "3: model.moving_average: should be greater than"
     " or equal to 2, found 1"),
    ({**FORECAST, "run": "{dir: x, best: {metric: eval/mse}}"}, "7: run.best.metric: eval/mse is better when it is"
     " lower; write mode: min"),
]  # fmt: skip


@pytest.mark.parametrize(("sections", "expected"), CASES, ids=[expected[:40] for _, expected in CASES])
def test_refused(tmp_path: Path, sections: dict[str, str], expected: str) -> None:
    assert errors(written(tmp_path, **sections)) == [expected]


MORE: list[tuple[str, str]] = [
    ("methods: {name: hra}", "8: methods: expected a list, found a mapping"),
    ("methods: [hra]", "8: methods.0: expected a mapping, found 'hra'"),
    ("methods: [{rank: 8}]", f"8: methods.0.name: missing; one of {', '.join(sorted(TABLES['methods']))}"),
    ("methods:\n  - {name: gor}\n  - name: hra\n    rnk: 8", "11: methods.1.rnk: no such key; did you mean 'rank'?"),
    ("methods:\n  - name: hra\n    rank: 7", "10: methods.0.rank: must be even to start as the identity, found 7;"
     " take 6 or 8"),
    ("methods: [{name: hra, rank: 1}]", "8: methods.0.rank: must be even to start as the identity, found 1; take 2"),
    ("methods: [{name: hra, start: reflection}]", "8: methods.0.start: reflection is the start of gram_schmidt: true;"
     " plain HRA starts as the identity"),
    ("methods: [{name: hra, gram_schmidt: true, eps: 1e-4}]", "8: methods.0.eps: gram_schmidt has no soft form: eps"
     " must be 0, found 0.0001"),
    ("methods: [{name: hra, penalty: -1}]", "8: methods.0.penalty: should be greater than or equal to 0, found -1"),
    ("methods: [{name: hra, targets: '**.to_q'}]", "8: methods.0.targets: expected a list or auto, found '**.to_q'"
     " (write a list: [item, ...])"),
    ("methods: [{name: gor, targets: convs}]", "8: methods.0.targets: expected a list or auto, conv, linear, all or"
     " decoder-up, found 'convs'; did you mean 'conv'?"),
    ("methods: [{name: peft, config: {r: 8}}]", "8: methods.0.config: needs peft_type: NAME, e.g. OFT"),
    ("methods:\n  - {name: hra}\n  - {name: gor}\n  - {name: gor}\n  - {name: hra}", "12: methods.3: hra is already"
     " methods.0; a recipe has it once"),
    ("schedule: {name: cosin}", "8: schedule.name: 'cosin' is none of constant, cosine, inverse-sqrt, linear, "
     "multistep, one-cycle; did you mean 'cosine'?"),
    ("schedule: {name: multistep}", "8: schedule.at: missing"),
    ("schedule: {name: multistep, at: [5, 3]}", "8: schedule.at: epochs must rise, found 5, 3"),
    ("schedule: {name: linear, warmup: 5, warmup_ratio: 0.1}", "8: schedule.warmup_ratio: warmup and warmup_ratio say"
     " the same twice; give one of them"),
    ("mehtods: []", "8: mehtods: no such key; did you mean 'methods'?"),
    ("run: {dir: y}", "8: run: repeated; it is already on line 7"),
]  # fmt: skip


@pytest.mark.parametrize(("more", "expected"), MORE, ids=[more for more, _ in MORE])
def test_refused_in_further_sections(tmp_path: Path, more: str, expected: str) -> None:
    assert errors(written(tmp_path, f"{more}\n")) == [expected]


def test_all_errors_at_once(tmp_path: Path) -> None:
    path = written(
        tmp_path,
        "methods:\n  - {name: hra, rank: 7}\n  - {name: gor, pnalty: 1}\nrun: {}\nseed: 3\n",
        model="{name: resnet20, norm: goup}",
        data="{name: digits, batch: '64'}",
        train="{epochs: 1, steps: 2}",
    )
    assert errors(path) == [
        "3: model.norm: expected batch or group, found 'goup'; did you mean 'group'?",
        "4: data.batch: expected a whole number, found '64' (remove the quotes)",
        "6: train.steps: epochs (1) and steps (2) exclude each other; give one of them",
        "9: methods.0.rank: must be even to start as the identity, found 7; take 6 or 8",
        "10: methods.1.pnalty: no such key; did you mean 'penalty'?",
        "11: run: repeated; it is already on line 7",
        "12: seed: no such key here; known: version, task, model, data, methods, optimizer, schedule, train, run,"
        " matrix",
    ]


def test_sections_that_are_missing(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text("version: 1\ntask: {name: classify}\n", encoding="utf-8")
    assert errors(path) == [f"1: {key}: missing" for key in ("model", "data", "optimizer", "train", "run")]


def test_the_teachers_share_is_of_plain_cross_entropy(tmp_path: Path) -> None:
    """Taken from a smoothed loss, the share of plain cross-entropy would cancel the labels, or reverse them."""
    method = "methods: [{name: distill, teacher: x, alpha: %s}]\n"
    smoothed = written(tmp_path, method % 0.9, task="{name: classify, label_smoothing: 0.1}")
    assert errors(smoothed) == [
        "2: task.label_smoothing: the labels' share of methods.distill is of plain cross-entropy; give 0 here, or"
        " alpha 0 there"
    ]
    load_train(smoothed, ["task.label_smoothing=0"])
    load_train(smoothed, ["methods.distill.alpha=0", "methods.distill.attention=[layer1]"])


def test_a_teacher_teaches_classes(tmp_path: Path) -> None:
    path = written(tmp_path, "methods: [{name: distill, teacher: x}]\n", **FORECAST)
    assert errors(path) == ["8: methods.0: distill is for classes, and the task forecast has none"]


def test_the_hint_and_the_place(tmp_path: Path) -> None:
    path = written(tmp_path, train="{}")
    with pytest.raises(RecipeError) as caught:
        load_train(path)
    assert caught.value.hint == "all keys: ortho recipe schema --verb train"
    assert caught.value.where == f"{path}:6"
    assert caught.value.exit_code == 3


def test_a_verbs_recipe_is_not_trained() -> None:
    with pytest.raises(RecipeError, match="this recipe is for `ortho merge`, not for `ortho train`") as caught:
        load_train("sd15-merge")
    assert caught.value.hint == "ortho merge --recipe sd15-merge"


def test_a_file_that_is_not_there() -> None:
    with pytest.raises(RecipeError, match="no file and no shipped recipe is called 'quikstart'") as caught:
        load_train("quikstart")
    assert "quickstart" in str(caught.value.hint)


@pytest.mark.parametrize("several", ["gor"])
def test_what_may_be_there_twice(tmp_path: Path, several: str) -> None:
    path = written(tmp_path, f"methods: [{{name: {several}}}, {{name: {several}, targets: linear}}]\n")
    assert [method.name for method in load_train(path).methods] == [several, several]
