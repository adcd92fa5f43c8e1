"""Runs with OIALR and with stability tracked: killed and resumed, on two processes, compiled, exported, evaluated."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from training_runs import LAUNCH, assert_same_runs, die_at, lines_of, write

import ortho_cli as ortho
from ortho_cli.analysis.stability_report import read_changes
from ortho_cli.methods.track_stability import COLUMNS
from ortho_cli.models.mlp import build
from ortho_cli.recipe.models import MLP
from ortho_cli.recipe.train import load_train
from ortho_cli.training.dry_run import describe
from ortho_cli.training.evaluate import evaluate_run
from ortho_cli.training.run import train
from ortho_cli.training.schedule import build_schedule

MODEL = "{name: mlp, hidden: [48, 40]}"
OIALR = "{name: oialr, every: 6, threshold: 0.9, patience: 1, order: all, beta: 0.2}"
STEP = "{name: oialr, when: step, delay: 9, every: 5, order: all, beta: 0.2}"
TRACK = "{name: track_stability, every: 6}"
SGD = "{name: sgd, lr: 0.1, momentum: 0.9, weight_decay: 0.01}"
ADAMW = "{name: adamw, lr: 2e-3}"


@pytest.mark.parametrize(("methods", "optimizer", "stop"), [
    (f"[{OIALR}, {TRACK}]", ADAMW, 17), pytest.param(f"[{OIALR}, {TRACK}]", SGD, 30, marks=pytest.mark.slow),
    pytest.param(f"[{STEP}]", ADAMW, 40, marks=pytest.mark.slow),
])  # fmt: skip
def test_killed_and_resumed(methods: str, optimizer: str, stop: int, tmp_path: Path) -> None:
    sections = {"methods": methods, "optimizer": optimizer, "model": MODEL}
    outcome = train(load_train(write(tmp_path, "whole", **sections)))
    assert any("2 of 2 layers converted" in note for note in outcome.notes)
    broken = write(tmp_path, "broken", **sections)
    die_at(broken, stop)
    train(load_train(broken), resume=True)
    assert_same_runs(tmp_path / "whole", tmp_path / "broken")
    exports = [path.relative_to(tmp_path / "whole") for path in (tmp_path / "whole" / "export").rglob("*.*")]
    assert len(exports) == (6 if "track" in methods else 5)
    for path in exports:
        assert (tmp_path / "whole" / path).read_bytes() == (tmp_path / "broken" / path).read_bytes()


def test_what_a_run_logs_and_leaves(tmp_path: Path) -> None:
    path = write(tmp_path, "run", methods=f"[{OIALR}, {TRACK}]", optimizer=ADAMW, model=MODEL)
    outcome = train(load_train(path))
    run = tmp_path / "run"
    shares = lines_of(run, "method/oialr/trained_share")
    assert shares[0] == 1.0 and shares[-1] < 0.6 and shares == sorted(shares, reverse=True)
    assert lines_of(run, "method/oialr/layers_converted")[-1] == 2.0
    assert lines_of(run, "method/oialr/mean_rank")[-1] < 44 and lines_of(run, "method/oialr/flops_share")[-1] <= 1
    assert outcome.trainable < outcome.parameters
    rates = lines_of(run, "train/lr")
    assert rates[2:] == sorted(rates[2:], reverse=True)  # a rebuilt optimizer shows the schedule's rate too
    found = {}
    for kind in ("dense", "factors"):
        folder = run / "export" / "oialr" / kind
        found[kind] = load_file(folder / "model.safetensors")
        base = build(MLP(name="mlp", hidden=(48, 40)), 10, 1, 8)
        if kind == "dense":
            base.load_state_dict(found[kind])
        else:
            ortho.load_factorized(base, folder)
        found[kind] = base(torch.ones(1, 1, 8, 8))
    assert torch.allclose(found["dense"], found["factors"], atol=1e-5)
    for _ in range(2):
        judged = evaluate_run(run, checkpoint="last").metrics
        assert judged["accuracy"] == outcome.metrics["eval/accuracy"]
        (run / "checkpoints/step-000066/optimizer.safetensors").unlink(missing_ok=True)  # as it is published
    with (run / "export/oialr/layers.csv").open(encoding="utf-8") as file:
        table = {row["layer"]: row for row in csv.DictReader(file)}
    with (run / "export/oialr/ranks.csv").open(encoding="utf-8") as file:
        ranks = list(csv.DictReader(file))
    for name, row in table.items():
        own = [each for each in ranks if each["layer"] == name]
        assert row["converted_at"] == own[0]["step"] and row["rank"] == own[-1]["rank"]
        assert float(row["highest_stability"]) >= 0.9
    text = (run / "report.html").read_text("utf-8")
    assert "trained share" in text.lower() and "mean rank" in text.lower()


def test_a_run_from_a_base_leaves_a_lora_on_it(tmp_path: Path) -> None:
    """With its error in the result, and in the card how to use it; the same after a kill."""
    base = write(tmp_path, "base", methods="[]", optimizer=ADAMW, model=MODEL, train="{steps: 20, threads: 1}")
    train(load_train(base))
    model = MODEL.replace("}", f", base: {tmp_path / 'base'}}}")
    sections = {"methods": f"[{OIALR.replace('}', ', lora_rank: 4}')}]", "optimizer": ADAMW, "model": model}
    outcome = train(load_train(write(tmp_path, "whole", **sections)))
    (note,) = (note for note in outcome.notes if "lora: a LoRA of rank 4 on 2 layers" in note)
    assert "% of what training changed" in note
    assert 'from_pretrained(model, "export/oialr/lora")' in (tmp_path / "whole/README.md").read_text("utf-8")
    broken = write(tmp_path, "broken", **sections)
    die_at(broken, 40)
    train(load_train(broken), resume=True)
    for path in (tmp_path / "whole/export/oialr/lora").iterdir():
        assert path.read_bytes() == (tmp_path / "broken/export/oialr/lora" / path.name).read_bytes()


def test_recorded_stability_is_that_of_the_checkpoints(tmp_path: Path) -> None:
    """The tracker's numbers are what `ortho.stability` says of the weights that were saved at its checks."""
    sections = {"model": MODEL, "optimizer": ADAMW, "run": "{dir: FOLDER, save_every_steps: 6, keep: all}"}
    methods = f"[{OIALR.replace('0.9', '0.97')}, {TRACK.replace('6', '6, lag: 2')}]"
    train(load_train(write(tmp_path, "run", methods=methods, **sections, train="{steps: 30, threads: 1}")))
    with (tmp_path / "run/export/track_stability/stability.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert tuple(rows[0]) == COLUMNS and len(rows) == 3 * 3
    assert {(row["step"], row["reference_step"], row["lag"]) for row in rows} == {
        ("18", "6", "2"), ("24", "12", "2"), ("30", "18", "2"),
    }  # fmt: skip
    changes = read_changes(tmp_path / "run/export/track_stability/stability.csv")  # as `ortho analyze stability` does
    assert [change.stability for change in changes] == [float(row["stability"]) for row in rows]
    factored = 0
    for row in rows:
        pair = []
        for step in (int(row["reference_step"]), int(row["step"])):
            saved = load_file(tmp_path / f"run/checkpoints/step-{step:06d}/model.safetensors")
            name = row["layer"]
            factored += f"{name}.M" in saved
            parts = [saved[f"{name}.{part}"] for part in ("U", "M", "VT")] if f"{name}.M" in saved else []
            pair.append(torch.linalg.multi_dot(parts) if parts else saved[f"{name}.weight"])
        assert float(row["stability"]) == pytest.approx(ortho.stability(*pair), abs=2e-5)
        assert float(row["sigma_max"]) == pytest.approx(float(torch.linalg.matrix_norm(pair[1], 2)), rel=1e-4)
    assert factored  # a layer that has become a product is compared by it


def test_averages_follow_the_basis(tmp_path: Path) -> None:
    """At the step that converts and cuts, a core's average is the image of the dense weight's; so it goes on."""
    saved = {}
    for name, methods in (("dense", "[]"), ("ours", f"[{STEP}]")):
        sections = {
            "train": "{steps: 16, ema: 0.9, threads: 1}",
            "run": "{dir: FOLDER, save_every_steps: 9, keep: all}",
        }
        outcome = train(load_train(write(tmp_path, name, methods=methods, optimizer=SGD, model=MODEL, **sections)))
        folder = tmp_path / name / "checkpoints/step-000009"
        saved[name] = [load_file(folder / f"{file}.safetensors") for file in ("model", "ema")]
    (weights, averages), (_, dense) = saved["ours"], saved["dense"]
    cores = [name for name in averages if name.endswith(".M")]
    assert len(cores) == 2
    for name in cores:
        layer = name.removesuffix(".M")
        image = weights[f"{layer}.U"].mT @ dense[f"{layer}.weight"] @ weights[f"{layer}.VT"].mT
        assert torch.allclose(averages[name], image, atol=1e-5)
        assert (averages[name] - weights[name]).norm() > 0.01 * weights[name].norm()
    judged = evaluate_run(tmp_path / "ours", checkpoint="last")  # after a further cut, read back from the file
    assert judged.metrics["accuracy"] == outcome.metrics["eval/accuracy"]


def test_nothing_converted_is_said(tmp_path: Path) -> None:
    methods = "[{name: oialr, every: 5, threshold: 1.0, patience: 2}, {name: track_stability, every: 50}]"
    outcome = train(load_train(write(tmp_path, "run", methods=methods, optimizer=SGD, train="{steps: 20, threads: 1}")))
    warning = next(note for note in outcome.notes if note.startswith("oialr: warning"))
    assert "nothing converted: the highest stability was 0.9" in warning and "of layers.0" in warning
    assert any("nothing was recorded" in note for note in outcome.notes)
    assert not (tmp_path / "run/export/track_stability").exists()
    late = "[{name: oialr, when: step, delay: 50}]"
    outcome = train(load_train(write(tmp_path, "late", methods=late, optimizer=SGD, train="{steps: 20, threads: 1}")))
    assert any("no check falls into the 20 steps" in note for note in outcome.notes)


def test_a_run_is_compiled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compile_ = torch.compile
    monkeypatch.setattr(torch, "compile", lambda model, **_: compile_(model, backend="eager", fullgraph=True))
    for name, extra in (("plain", ""), ("compiled", ", compile: true")):
        sections = {"methods": f"[{STEP}]", "model": MODEL, "train": f"{{steps: 16, threads: 1{extra}}}"}
        train(load_train(write(tmp_path, name, optimizer=SGD, **sections)))
    first, second = (lines_of(tmp_path / name, "train/loss") for name in ("plain", "compiled"))
    assert first == pytest.approx(second, rel=1e-4)


def test_bfloat16(tmp_path: Path) -> None:
    for precision in ("bf16", "fp32"):
        length = f"{{epochs: 2, threads: 1, precision: {precision}}}"
        train(load_train(write(tmp_path, precision, methods=f"[{STEP}]", model=MODEL, optimizer=SGD, train=length)))
    losses, exact = (lines_of(tmp_path / name, "train/loss") for name in ("bf16", "fp32"))
    assert losses != exact and losses == pytest.approx(exact, rel=2e-2)
    assert lines_of(tmp_path / "bf16", "method/oialr/mean_rank")[-1] < 40


def test_processes_end_with_the_same_factors(tmp_path: Path) -> None:
    """The first process decides, whatever the others' decompositions say; and two do what one does."""
    script = str(Path(__file__).parent / "oialr_processes.py")
    found = {}
    for world in (1, 2):
        folder = tmp_path / str(world)
        folder.mkdir()
        start = [sys.executable, *LAUNCH, str(world)] if world > 1 else [sys.executable]
        own = {**os.environ, "ACCELERATE_USE_CPU": "true"}
        done = subprocess.run([*start, script, str(folder)], env=own, capture_output=True, text=True, timeout=280)
        assert done.returncode == 0, done.stderr
        found[world] = [torch.load(folder / f"rank{rank}.pt") for rank in range(world)]
    (weights, moments, dense, wrappers), other = found[2]
    assert wrappers > 1 and dense and any(".M" in name for name in weights)
    for ours, theirs in ((weights, other[0]), (moments, other[1])):
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    alone = found[1][0]
    assert dense.keys() == alone[2].keys()
    for name, weight in dense.items():
        assert torch.allclose(weight, alone[2][name], atol=1e-4), name


def test_a_dry_run_counts_what_delay_zero_makes() -> None:
    recipe = load_train("digits-vit-pretrain", ["methods=[{name: oialr, when: step, delay: 0}]"])
    totals = describe(recipe)["totals"]
    cores = 4 * (64 * 64 * 4)
    dense = 4 * (192 * 64 + 64 * 64 + 2 * 256 * 64)
    assert totals["parameters"] - totals["trainable"] == dense - cores
    assert describe(recipe)["details"][0]["layers"] == 16


def test_shipped_recipes_have_the_papers_parameters() -> None:
    """The mini-ViT trains 37.56 % at full inner rank in the authors' code, which keeps the last fc2 dense."""
    at_once = "methods=[{name: oialr, when: step, delay: 0}]"
    totals = describe(load_train("cifar10-minivit-oialr", [at_once]))["totals"]
    assert totals["parameters"] == 42_684_682 and totals["trainable"] == 14_262_538
    with_fc2 = totals["trainable"] + 4 * 768**2 - 768**2
    assert round(100 * with_fc2 / totals["parameters"], 2) == 37.56
    plans = {name: describe(load_train(name)) for name in ("cifar10-minivit-oialr", "imagenet-vit-b16-oialr")}
    assert [plan["details"][0]["layers"] for plan in plans.values()] == [25, 48]
    assert plans["imagenet-vit-b16-oialr"]["totals"]["parameters"] == 86_567_656
    assert plans["cifar10-minivit-oialr"]["details"][1]["layers"] == 26


def test_the_mini_vits_learning_rate_is_the_authors() -> None:
    """At epochs 10, 50, 100 and 200 of their schedule: 3e-4, 1.5e-4, 8e-5, 2.3e-5."""
    recipe = load_train("cifar10-minivit-oialr")
    schedule = build_schedule(recipe.schedule, 300 * 48, 48)
    rates = [recipe.optimizer.lr * schedule(48 * epoch) for epoch in (10, 50, 100, 200)]
    assert rates == pytest.approx([3e-4, 1.5e-4, 8e-5, 2.3e-5], rel=0.02)
