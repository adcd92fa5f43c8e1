"""`ortho sweep` on runs of a second: values and folders, going on after Ctrl-C and after a kill, pruning, refusals."""

from __future__ import annotations

import csv
import json
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from ortho_cli.cli.app import app
from ortho_cli.errors import NumericsError, OutputError, RecipeError, UsageError
from ortho_cli.recipe.train import load_train
from ortho_cli.training import sweep as sweep_module
from ortho_cli.training import sweep_study
from ortho_cli.training.run import Interrupted, Outcome
from ortho_cli.training.sweep import Sweep, _Watch, plan_sweep, run_sweep
from ortho_cli.training.sweep_space import check_space, parse_params
from ortho_cli.training.sweep_study import TrialRecord, open_study, records, shown_storage

optuna = pytest.importorskip("optuna")

QUICK = ("model={name: mlp, hidden: [8]}", "methods=[]", "train.epochs=3", "data.batch=512", "train.threads=1")
LR = "optimizer.lr=log:1e-3..1"


def planned(folder: Path, *params: str, sets: tuple[str, ...] = (), **options: Any) -> Sweep:
    return plan_sweep("quickstart", params or (LR,), (*QUICK, f"run.dir={folder}", *sets), **{"trials": 3, **options})


def evaluations(folder: Path) -> list[float]:
    lines = map(json.loads, (folder / "metrics.jsonl").read_text("utf-8").splitlines())
    return [line["eval/accuracy"] for line in lines if "eval/accuracy" in line]


@pytest.mark.parametrize(
    ("text", "kind", "ends"),
    [
        ("a.lr=log:1e-5..1e-3", "log", (1e-5, 1e-3)), ("a.b=float:-1..1", "float", (-1.0, 1.0)),
        ("a.rank=int:2..64", "int", (2, 64)), ("m.norm=batch,group", "choice", ("batch", "group")),
        ("m.h=[8, 8],[16]", "choice", ([8, 8], [16])), ("m.x=null,1e-2,true", "choice", (None, 0.01, True)),
    ],
)  # fmt: skip
def test_what_a_param_means(text: str, kind: str, ends: tuple[object, ...]) -> None:
    (param,) = parse_params([text])
    assert (param.kind, param.ends) == (kind, ends) and f"{param.key}={param.text}".replace(" ", "")
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    for _ in range(20):
        trial = study.ask()
        value = param.suggest(trial)
        assert value in ends if kind == "choice" else ends[0] <= value <= ends[1]  # type: ignore[operator]
        assert type(value) is type(ends[0]) or kind == "choice"
        assert param.value(trial.params[param.key]) == value


@pytest.mark.parametrize(
    "texts",
    [
        [], ["lr"], ["lr="], ["=1,2"], ["lr=1"], ["lr=log:0..1"], ["lr=log:1..x"], ["lr=int:1..2.5"], ["lr=int:4..2"],
        ["lr=float:1"], ["lr=a,a"], ["lr=[1"], ["lr=1,2", "lr=3,4"], ["run.dir=a,b"], ["run=a,b"], ["lr=float:0..inf"],
    ],
)  # fmt: skip
def test_params_that_mean_nothing(texts: list[str]) -> None:
    with pytest.raises(UsageError):
        parse_params(texts)


def test_values_that_the_recipe_does_not_allow() -> None:
    recipe = load_train("quickstart")
    for text, told in (("optimizer.rate=1,2", "rate"), ("optimizer.lr=float:-1..1", "optimizer.lr"),
                       ("methods.hra.rank=int:2..4", "hra"), ("model.norm=group,none-such", "model.norm")):  # fmt: skip
        with pytest.raises(RecipeError, match=told) as caught:
            check_space(recipe, parse_params([text]))
        assert "--param" in str(caught.value)
    check_space(recipe, parse_params([LR, "methods.gor.groups=int:2..32", "model.norm=group,batch"]))


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[TrialRecord]]:
    folder = tmp_path_factory.mktemp("sweeps") / "plain"
    found, _ = run_sweep(planned(folder, LR, "model.hidden=[8],[8, 8]", trials=4))
    return folder, found


def test_each_trial_is_a_run_and_the_best_a_recipe(done: tuple[Path, list[TrialRecord]]) -> None:
    folder, found = done
    assert [trial.number for trial in found] == [0, 1, 2, 3]
    for trial in found:
        own = load_train(folder / trial.folder / "recipe.yaml")
        assert own.optimizer.lr == trial.params["optimizer.lr"]
        assert json.dumps(list(own.model.hidden)) == trial.params["model.hidden"]
        assert trial.value == max(evaluations(folder / trial.folder))  # quickstart keeps the best
        assert list(trial.evaluations.values()) == evaluations(folder / trial.folder)
    best = max(found, key=lambda trial: trial.value or 0.0)
    recipe = load_train(folder / "best.yaml")
    assert recipe.optimizer.lr == best.params["optimizer.lr"] and Path(recipe.run.dir) == folder / "best"
    with (folder / "trials.csv").open() as file:
        assert [float(row["eval/accuracy"]) for row in csv.DictReader(file)] == [trial.value for trial in found]
    names = {"history.png", "evaluations.png", "over-optimizer-lr.png", "over-model-hidden.png", "importance.png"}
    assert {path.name for path in (folder / "figures").iterdir()} >= names - {"importance.png"}
    assert str(folder.parent) not in (folder / "report.json").read_text("utf-8")


def test_a_sweep_that_is_done_is_left_alone_and_more_trials_go_on(tmp_path: Path) -> None:
    first, _ = run_sweep(planned(tmp_path / "s", trials=2))
    stamp = (tmp_path / "s" / "trial-0001" / "outcome.json").stat().st_mtime_ns
    again, _ = run_sweep(planned(tmp_path / "s", trials=2))
    assert again == first
    more, _ = run_sweep(planned(tmp_path / "s", trials=3))
    assert more[:2] == first and len(more) == 3
    assert more[2].params != more[0].params and more[2].params != more[1].params, "a new draw, not the old seed's"
    assert (tmp_path / "s" / "trial-0001" / "outcome.json").stat().st_mtime_ns == stamp


def interrupting(name: str) -> Callable[[str], Any]:
    """An observer that presses Ctrl-C at the first evaluation of one trial."""

    class Finger:
        def total(self, steps: int, done: int) -> None: ...

        def timing(self, counters: Any, values: dict[str, float]) -> None: ...

        def stopping(self) -> None: ...

        def metrics(self, counters: Any, values: dict[str, float]) -> None:
            if "eval/accuracy" in values:
                signal.raise_signal(signal.SIGINT)

    @contextmanager
    def observe(title: str) -> Iterator[Any]:
        yield Finger() if title == name else None

    return observe


def test_ctrl_c_leaves_a_sweep_to_go_on_with(tmp_path: Path) -> None:
    whole, _ = run_sweep(planned(tmp_path / "whole", trials=2))
    with pytest.raises(Interrupted, match="stopped after 1 of 2 trials") as caught:
        run_sweep(planned(tmp_path / "cut", trials=2), observe=interrupting("trial-0001"))
    assert caught.value.exit_code == 130 and "same command" in str(caught.value.hint)
    assert len(evaluations(tmp_path / "cut" / "trial-0001")) == 1
    found, _ = run_sweep(planned(tmp_path / "cut", trials=2))
    assert [trial.state for trial in found] == ["complete", "interrupted", "complete"]
    assert [trial.folder for trial in found] == ["trial-0000", "trial-0001", "trial-0001"]
    resumed = found[2]
    assert (resumed.params, resumed.value) == (whole[1].params, whole[1].value)  # bit for bit the uninterrupted run
    assert resumed.evaluations == whole[1].evaluations


def test_a_trial_whose_process_died_is_taken_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sweep_study, "HEARTBEAT", 1)
    monkeypatch.setattr(sweep_study, "GRACE", 1)
    sweep = planned(tmp_path / "s", trials=2)
    study = open_study(sweep.recipe, sweep.params, sweep.metric, sweep.direction, "random", None)
    with pytest.warns(UserWarning, match="Heartbeat"):  # this process shall look dead
        trial = study.ask()
    lost = sweep.params[0].suggest(trial)
    trial.set_user_attr("folder", "trial-0000")
    study._storage.record_heartbeat(trial._trial_id)
    time.sleep(2.5)
    found, _ = run_sweep(sweep)
    assert [trial.state for trial in found] == ["interrupted", "complete", "complete"]
    assert found[1].params["optimizer.lr"] == lost and found[1].folder == "trial-0000"


def lacking(*words: Any, **options: Any) -> Outcome:
    """A run on a machine without a library of the model."""
    raise UsageError("models of timm need timm", hint="pip install timm")


def test_a_machine_that_lacks_a_library_leaves_other_calls_trials(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    whole, _ = run_sweep(planned(tmp_path / "whole", trials=1))
    sweep = planned(tmp_path / "s", trials=1)
    with pytest.raises(Interrupted):
        run_sweep(sweep, observe=interrupting("trial-0000"))
    for _ in range(2):
        with monkeypatch.context() as patch:
            patch.setattr(sweep_module, "train", lacking)
            with pytest.raises(UsageError, match="need timm"):
                run_sweep(sweep)
        assert list((tmp_path / "s" / "trial-0000" / "checkpoints").glob("step-*"))
    found, _ = run_sweep(sweep)
    assert [trial.state for trial in found] == ["interrupted"] * 3 + ["complete"]
    assert (found[3].folder, found[3].value) == ("trial-0000", whole[0].value)


def test_a_refusal_leaves_a_trial_that_another_machine_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sweep = planned(tmp_path / "s", trials=2)
    study = open_study(sweep.recipe, sweep.params, sweep.metric, sweep.direction, "random", None)
    with pytest.warns(UserWarning, match="Heartbeat"):  # the other machine's
        other = study.ask()
    other.set_user_attr("folder", "trial-0000")
    (tmp_path / "s" / "trial-0000").mkdir()
    monkeypatch.setattr(sweep_module, "train", lacking)
    with pytest.raises(UsageError, match="need timm"):
        run_sweep(sweep)
    assert (tmp_path / "s" / "trial-0000").is_dir() and records(study)[0].state == "running"
    with pytest.raises(UsageError, match="need timm"):
        run_sweep(planned(tmp_path / "own"))
    assert [path.name for path in (tmp_path / "own").iterdir()] == ["study.db"]  # what only this call began goes


def test_a_trial_that_died_before_its_first_line_is_taken_up(tmp_path: Path) -> None:
    study = optuna.create_study(direction="maximize")
    watch = _Watch(None, study.ask(), "eval/accuracy")
    watch.repeat(tmp_path)
    assert not study.trials[0].intermediate_values


def test_an_evaluation_that_is_not_finite_is_a_failed_trial(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def diverged(recipe: Any, **options: Any) -> Outcome:
        return Outcome("", recipe.run.dir, 6, {"eval/accuracy": None}, 1, 1, 1.0)

    monkeypatch.setattr(sweep_module, "train", diverged)
    with pytest.raises(NumericsError, match=r"3 trials failed.*eval/accuracy is not finite at step 6"):
        run_sweep(planned(tmp_path / "s", trials=5))


def test_a_trial_worse_than_the_median_is_pruned() -> None:
    study = optuna.create_study(direction="maximize", pruner=optuna.pruners.MedianPruner())
    counters = type("Counters", (), {"step": 10})()
    for _ in range(5):
        trial = study.ask()
        _Watch(None, trial, "eval/accuracy").metrics(counters, {"eval/accuracy": 0.9})
        study.tell(trial, 0.9)
    watch = _Watch(None, study.ask(), "eval/accuracy")
    watch.metrics(counters, {"train/loss": 1.0})
    with pytest.raises(optuna.TrialPruned, match="step 10"):
        watch.metrics(counters, {"eval/accuracy": 0.1})
    watch.metrics(counters, {"eval/accuracy": 0.1})  # told once for each step
    _Watch(None, study.ask(), "eval/accuracy").metrics(counters, {"eval/accuracy": 0.95})


def test_values_that_do_not_train_are_failures_with_a_reason(tmp_path: Path) -> None:
    spread = planned(tmp_path / "s", "optimizer.lr=0.1,1e30", trials=4, sampler="random")
    found, _ = run_sweep(spread)
    failed = [trial for trial in found if trial.state == "failed"]
    assert 0 < len(failed) < 4 and all("train/loss is" in trial.reason for trial in failed)
    assert all(trial.params["optimizer.lr"] == "1e+30" for trial in failed)
    with pytest.raises(NumericsError, match="3 trials failed and none was complete"):
        run_sweep(planned(tmp_path / "all", "optimizer.lr=1e29,1e30", trials=9))


def test_refusals(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    with pytest.raises(OutputError, match="holds no sweep"):
        run_sweep(planned(tmp_path / "full"))
    with pytest.raises(UsageError, match="is not evaluated") as caught:
        run_sweep(planned(tmp_path / "metric", metric="eval/acuracy", sets=("run.best=null",)))
    assert "eval/accuracy" in str(caught.value.hint)
    run_sweep(planned(tmp_path / "metric", trials=1, sets=("run.best=null",)))  # the slip left nothing behind
    with pytest.raises(OutputError, match="another sweep named metric"):
        run_sweep(planned(tmp_path / "metric", "optimizer.lr=log:1e-2..1", sets=("run.best=null",)))
    with pytest.raises(UsageError, match="cannot be used"):
        run_sweep(planned(tmp_path / "x", storage="nonsense"))
    for options in ({"trials": 0}, {"metric": "train/loss"}, {"sets": ("matrix={train.seed: [0, 1]}",)}):
        with pytest.raises(UsageError):
            planned(tmp_path / "y", **options)
    for options in ({"sampler": "grid"}, {"direction": "up"}):
        with pytest.raises(UsageError, match="none of"):
            planned(tmp_path / "z", **options)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UsageError, match="one process each"):
        planned(tmp_path / "y")
    monkeypatch.delenv("WORLD_SIZE")
    assert "secret" not in shown_storage("postgresql://me:secret@host/db")


def test_what_is_searched_is_checked_without_the_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("optuna", "sqlalchemy.engine"):
        monkeypatch.setitem(sys.modules, name, None)
    words = ["sweep", "quickstart", "--set", f"run.dir={tmp_path / 'y'}", "--dry-run"]
    storage = ["--storage", "postgresql://me:secret@host/db"]
    result = CliRunner().invoke(app, [*words, "--param", "optimizer.lr=log:1e-2..1", *storage])
    assert result.exit_code == 0 and "log:0.01..1" in result.stdout and "secret" not in result.output
    result = CliRunner().invoke(app, [*words, "--param", "optimizer.rate=log:1e-2..1"])
    assert result.exit_code == 3 and "--param optimizer.rate" in result.stderr
    with pytest.raises(UsageError, match="needs Optuna") as caught:
        run_sweep(planned(tmp_path / "y"))
    assert caught.value.hint == "pip install 'ortho-cli[sweep]'" and not (tmp_path / "y").exists()


def test_one_database_for_two_sweeps(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'shared.db'}"
    for name, sampler in (("a", "tpe"), ("b", "nsgaii")):
        found, _ = run_sweep(planned(tmp_path / name, trials=1, storage=url, sampler=sampler))
        assert len(found) == 1 and not (tmp_path / name / "study.db").exists()
    a = planned(tmp_path / "a", trials=1, storage=url)
    study = open_study(a.recipe, a.params, a.metric, a.direction, "random", url)
    assert len(records(study)) == 1


def test_the_command(tmp_path: Path) -> None:
    words = ["sweep", "quickstart", "--param", LR, "--metric", "eval/loss", "--direction", "minimize", "--trials", "2"]
    words += [word for text in (*QUICK, "run.best=null", f"run.dir={tmp_path / 's'}") for word in ("--set", text)]
    dry = CliRunner().invoke(app, [*words, "--dry-run"])
    assert dry.exit_code == 0 and "log:0.001..1" in dry.stdout and not (tmp_path / "s").exists(), dry.output
    plan = json.loads(CliRunner().invoke(app, [*words, "--dry-run", "--json"]).stdout)
    assert plan["dry_run"] is True and plan["details"] == [
        {"key": "optimizer.lr", "kind": "log", "values": "log:0.001..1"}
    ]
    result = CliRunner().invoke(app, [*words, "--json"])
    assert result.exit_code == 0, result.output
    content = json.loads(result.stdout)
    values = [trial["value"] for trial in content["details"]]
    assert content["totals"]["best"] == min(values) and len(content["outputs"]) >= 6
    shown = CliRunner().invoke(app, words)
    assert shown.exit_code == 0 and f"best: eval/loss {min(values):.4g}" in shown.stdout
    assert f"wrote {tmp_path / 's' / 'best.yaml'}" in shown.stdout
    assert CliRunner().invoke(app, [*words, "--param", "optimizer.rate=1,2"]).exit_code == 3
    assert CliRunner().invoke(app, [*words[:2], "--json"]).exit_code == 2
