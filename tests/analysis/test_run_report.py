"""A run's report and card: true numbers, valid front matter, commands that run, and no path of the machine."""

from __future__ import annotations

import base64
import io
import json
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from run_folders import real_run, written_run
from typer.testing import CliRunner

from ortho_cli.analysis.model_card import DATASETS, card_text
from ortho_cli.analysis.recipe_text import flat_recipe, hub_base, public_text
from ortho_cli.analysis.run_folder import find_runs, open_run, read_lines
from ortho_cli.analysis.run_report import run_report, write_run_report
from ortho_cli.cli.app import app
from ortho_cli.errors import CheckpointError
from ortho_cli.recipe.train import load_train

HRA = ("model={name: vit-mini, patch: 4, depth: 1, heads: 2, dim: 8}", "methods=[{name: hra, rank: 2}]")


@pytest.fixture(scope="module")
def gor(tmp_path_factory: pytest.TempPathFactory) -> Path:
    methods = "methods=[{name: gor, targets: linear, groups: 4}]"
    return real_run(tmp_path_factory.mktemp("runs") / "small run", methods, "train.clip=1.0")


@pytest.fixture(scope="module")
def hra(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A transformer without reflections, and one that was fine-tuned from it by reflections."""
    folder = tmp_path_factory.mktemp("tuned")
    base = real_run(folder / "base", HRA[0])
    return real_run(folder / "tuned", f"model={HRA[0][6:-1]}, base: {json.dumps(str(base))}}}", HRA[1])


def test_everything_measured_is_shown(gor: Path) -> None:
    written = [path.relative_to(gor).as_posix() for path in write_run_report(gor)]
    assert written[0] == "report.html" and written[-1] == "README.md"
    pictures = {Path(name).stem for name in written[1:-1]}
    assert pictures >= {"loss", "accuracy", "lr", "gradient_norm", "method-gor-penalty", "steps_per_second"}
    report = run_report(open_run(gor))
    text = report.html()
    assert "gor layers" in text  # a scalar that does not change is told, not drawn
    run = open_run(gor)
    shown = {part.name: part for part in report.parts() if hasattr(part, "lines")}
    for name, metrics in {"loss": ("train/loss", "eval/loss"), "lr": ("train/lr",)}.items():
        for line, metric in zip(shown[name].lines, metrics, strict=True):
            assert (line.x, line.y) == (run.metrics[metric].steps, run.metrics[metric].values)
    best = max(run.metrics["eval/accuracy"].values)
    assert [line.mark[1] for line in shown["accuracy"].lines if line.mark] == [best]


def test_what_the_model_made_is_shown_over_the_steps(tmp_path: Path) -> None:
    run = written_run(tmp_path / "run", {"train/loss": [(100, 0.5)]})
    for step in range(1, 10):
        folder = run / "samples" / f"step-{step * 1000:06d}"
        folder.mkdir(parents=True)
        side = 2000 if step == 9 else 20
        Image.fromarray(np.full((side, side), step, np.uint8)).save(folder / "samples.png")
    (run / "samples" / ".step-009000.partial-1").mkdir()
    text = run_report(open_run(run)).html()
    assert re.findall(r"<h3>(Step [0-9,]+)</h3>", text) == [f"Step {step},000" for step in (1, 2, 4, 5, 7, 9)]
    found = re.findall(r'alt="Step [^"]*" src="data:image/png;base64,([^"]+)"', text)
    shown = [Image.open(io.BytesIO(base64.b64decode(each))) for each in found]
    assert [(picture.size, picture.getextrema()) for picture in shown] == [
        *(((20, 20), (step, step)) for step in (1, 2, 4, 5, 7)), ((1024, 1024), (9, 9)),
    ]  # fmt: skip
    (run / "samples" / "step-001000" / "samples.png").write_text("no picture")
    with pytest.raises(CheckpointError, match="no picture"):
        run_report(open_run(run)).html()


def test_the_card_is_one_that_the_hub_reads(gor: Path) -> None:
    from huggingface_hub import ModelCard, metadata_load

    write_run_report(gor)
    card = ModelCard.load(gor / "README.md")
    data, run = card.data, open_run(gor)
    assert data.library_name == "ortho" and data.pipeline_tag == "image-classification"
    assert {"ortho", "gor"} <= set(data.tags) and data.license is None and data.base_model is None
    assert data.model_name == "small run" and data.metrics == ["accuracy"]
    results = {result.metric_type: result for result in data.eval_results}
    for name in ("accuracy", "accuracy_top5", "loss"):
        assert results[name].metric_value == run.metrics[f"eval/{name}"].final
        assert (results[name].task_type, results[name].dataset_name) == ("image-classification", "digits")
    assert metadata_load(gor / "README.md") == yaml.safe_load((gor / "README.md").read_text().split("---")[1])
    assert f"| accuracy (%) | {100 * run.metrics['eval/accuracy'].final:.2f} |" in card.text


def test_no_path_of_the_machine_is_told(gor: Path, hra: Path) -> None:
    for folder in (gor, hra):
        write_run_report(folder)
        for path in (folder / "report.html", folder / "README.md", *folder.glob("figures/*")):
            assert str(folder.parent).encode() not in path.read_bytes(), path
    text = (hra / "README.md").read_text()
    assert "base: base\n" in text and "dir: tuned\n" in text


def test_what_the_card_says_to_type_works(hra: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from peft import PeftModel

    from ortho_cli.models.vit import build
    from ortho_cli.training.base import load_base

    write_run_report(hra)
    card = (hra / "README.md").read_text()
    monkeypatch.chdir(hra)
    commands = [
        line.partition("#")[0].strip()
        for block in re.findall(r"```bash\n(.*?)```", card, re.DOTALL)
        for line in block.splitlines()
    ]
    assert [command.split()[1] for command in commands] == ["merge", "evaluate", "train"]
    for command in commands:
        words = shlex.split(command.replace("BASE", "../base/checkpoints/best/model.safetensors"))
        result = CliRunner().invoke(app, words[1:])
        assert result.exit_code == 0, f"{command}\n{result.output}"
    assert (hra / "again" / "outcome.json").is_file()

    model = build(load_train(hra / "recipe.yaml").model, 10, 1, 8)
    load_base(model, str(hra.parent / "base"))
    scope = {"model": model}
    for block in re.findall(r"```python\n(.*?)```", card, re.DOTALL):
        exec(block, scope)  # the card's own code
    assert isinstance(scope["model"], PeftModel) and "weights" in scope
    from safetensors.torch import load_file

    merged, x = build(load_train(hra / "recipe.yaml").model, 10, 1, 8), torch.randn(4, 1, 8, 8)
    merged.load_state_dict(load_file(hra / "merged.safetensors"))
    with torch.no_grad():
        torch.testing.assert_close(scope["model"].eval()(x), merged.eval()(x), rtol=1e-4, atol=1e-5)


def test_a_base_of_the_hub_is_named_and_a_folder_is_not(
    hra: Path, tmp_path: Path, hub_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (hub_home / "models--org--name").mkdir(parents=True)  # as a run that starts from it leaves the cache
    for base, expected in (("org/name@v1:model.safetensors", "org/name"), ("/home/me/x", None), ("runs/base", None)):
        recipe = load_train(hra / "recipe.yaml", [f"model.base={base}"])
        assert hub_base(recipe) == expected, base
        run = written_run(tmp_path / f"run{len(base)}", {"eval/accuracy": [(1, 0.5)]}, *HRA, f"model.base={base}")
        (run / "export" / "hra").mkdir(parents=True)
        (run / "export" / "hra" / "adapter_config.json").write_text('{"peft_type": "HRA"}')
        card = card_text(open_run(run))
        assert ("base_model: org/name" in card) is (expected is not None)
        assert "/home/me" not in card and ("library_name: peft" in card)
        assert f"ortho merge {base if expected else 'BASE'} export/hra" in card


def test_a_run_that_is_not_finished_or_lost_its_numbers(tmp_path: Path) -> None:
    folder = written_run(tmp_path / "cut", {"train/loss": [(1, 2.0), (2, 1.0)]}, finished=False)
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "train/loss": null}\n{"step": 4, "train/lo')
    run = open_run(folder)
    assert run.metrics["train/loss"].steps == (1, 2, 3)
    assert run.metrics["train/loss"].best("min") == (2, 1.0)
    assert "not finished" in run_report(run).html()
    assert len(write_run_report(folder)) == 3
    (folder / "metrics.jsonl").write_text('{"step": 3, "train/l\n{"step": 4}\n')
    with pytest.raises(CheckpointError, match=re.escape("metrics.jsonl:1 is damaged")):
        list(read_lines(folder / "metrics.jsonl"))


def test_where_there_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="is no run"):
        write_run_report(tmp_path)
    with pytest.raises(CheckpointError, match="no runs in"):
        find_runs([tmp_path])
    with pytest.raises(CheckpointError, match="there is no folder"):
        find_runs([tmp_path / "none"])


def test_runs_are_found_below_folders_and_once(tmp_path: Path) -> None:
    for name in ("matrix/seed=0", "matrix/seed=1", "alone", "alone/checkpoints/inner"):
        written_run(tmp_path / name, {"eval/loss": [(1, 1.0)]})
    found = find_runs([tmp_path / "matrix", tmp_path / "matrix" / "seed=1", tmp_path])
    assert [run.title for run in found] == ["matrix/seed=0", "matrix/seed=1", "alone"]


def test_sets_are_named_as_the_tasks_name_them() -> None:
    from ortho_cli.tasks.image_specs import SPECS as PICTURES
    from ortho_cli.tasks.instruct_specs import SPECS as PAIRS
    from ortho_cli.tasks.series_specs import SPECS as SERIES

    pictures = {name: spec.hub.id for name, spec in PICTURES.items() if spec.hub is not None}
    series = {name: spec.hub.partition(":")[0] for name, spec in SERIES.items() if spec.hub is not None}
    pairs = {name: spec.hub for name, spec in PAIRS.items() if spec.hub is not None}
    assert pictures | series | pairs == DATASETS


@pytest.mark.parametrize(
    ("text", "public"),
    [
        ("~me/x/model.bin", "model.bin"), ("C:\\data\\cifar", "cifar"), ("../up/there", "there"), ("a/../../b", "b"),
        ("org/name@v1", "org/name@v1"), ("**.attn.*", "**.attn.*"), (r"\d+\.weight", r"\d+\.weight"), ("", ""),
        ("/", "."), ("conv..x", "conv..x"),
    ],
)  # fmt: skip
def test_paths_of_a_machine(text: str, public: str) -> None:
    assert public_text(text) == public


def test_two_methods_of_a_name_have_keys_of_their_own(tmp_path: Path) -> None:
    methods = "methods=[{name: gor, targets: ['0']}, {name: gor, targets: ['2'], groups: 4}]"
    folder = written_run(tmp_path / "run", {"eval/loss": [(1, 1.0)]}, methods)
    recipe = load_train(folder / "recipe.yaml")
    flat = flat_recipe(recipe)
    assert flat["methods"] == "gor, gor" and flat["methods.gor-2.groups"] == 4
