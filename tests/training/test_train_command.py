"""`ortho train`: its JSON, its exit codes, what it plans, what it uploads, what it shows."""

from __future__ import annotations

import json
import os
import pty
import re
import select
import subprocess
import sys
from pathlib import Path
from typing import Any, ClassVar

import pytest
from training_runs import write
from typer.testing import CliRunner, Result

from ortho_cli.cli.app import app

SHORT = ("--set", "train.epochs=1", "--set", "train.limit_batches=2")


def call(*words: str) -> Result:
    return CliRunner().invoke(app, ["train", *words])


def test_json(tmp_path: Path) -> None:
    base = write(tmp_path, "base", methods="[]")
    assert call(str(base), *SHORT, "-q").exit_code == 0
    hra = write(tmp_path, "hra", methods="[{name: hra, rank: 4, targets: ['layers.0']}]",
                model=f"{{name: mlp, hidden: [32], base: {tmp_path / 'base'}}}")  # fmt: skip
    result = call(str(hra), *SHORT, "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert {
        "schema",
        "ok",
        "command",
        "inputs",
        "outputs",
        "layers",
        "parameters",
        "details",
        "totals",
        "notes",
        "seconds",
    } == found.keys()
    assert (found["schema"], found["ok"], found["command"], found["inputs"]) == (1, True, "train", [str(hra)])
    for output in found["outputs"]:
        assert Path(output["path"]).stat().st_size == output["bytes"]
    names = {Path(output["path"]).name for output in found["outputs"]}
    assert names >= {"model.safetensors", "adapter_model.safetensors", "adapter_config.json"}
    assert found["parameters"] == 4 * 64
    assert found["details"][0]["metrics"]["eval/accuracy"] <= 1


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (("--resume", "--force"), 2, "--resume goes on and --force begins anew"),
        (("--private",), 2, "--private is about --push-to-hub"),
        (("--dry-run", "--push-to-hub", "a/b"), 2, "--dry-run writes nothing"),
        (("--debug-run", "walk"), 2, "is none of step, overfit, profile"),
        (("--set", "train.epoch=1"), 3, "did you mean 'epochs'"),
        (("--set", "methods.gor.targets=[layer9]"), 4, "layer9"),
        (("--set", "optimizer.lr=1e30", "--set", "schedule={name: constant}", "--set", "train.clip=null"), 5, "step"),
        (("--resume",), 6, "holds no run"),
    ],
)  # fmt: skip
def test_exit_codes(words: tuple[str, ...], code: int, message: str, tmp_path: Path) -> None:
    path = str(write(tmp_path, "run"))
    result = call(path, *SHORT, "-q", *words)
    assert result.exit_code == code, result.output
    assert message in result.stderr
    refused = (
        call(path, *SHORT, "--force", "--json", *words) if "--resume" not in words else call(path, "--json", *words)
    )
    assert json.loads(refused.stdout)["error"]["exit_code"] == code


def test_the_table_for_people(tmp_path: Path) -> None:
    result = call(str(write(tmp_path, "run")), *SHORT)
    assert result.exit_code == 0, result.output
    for words in ("eval/accuracy", "2,410 of 2,410 train", "best", "at step 2"):
        assert words in result.stdout, words
    assert call(str(tmp_path / "run.yaml"), *SHORT, "-q", "--force").stdout == ""


def test_a_plan_counts_what_training_will_have(tmp_path: Path) -> None:
    """By pattern; the moments of the optimizer and the steps are those of the run."""
    names = ("layers.0", "layers.1")
    methods = f"[{{name: hra, rank: 4, targets: {list(names)}}}]"
    path = write(tmp_path, "run", methods=methods, model="{name: mlp, hidden: [32, 16]}")
    plan = json.loads(call(str(path), "--dry-run", "--json").stdout)
    details = [(line["pattern"], line["layers"], line["added"]) for line in plan["details"]]
    assert details == [(names[0], 1, 64 * 4), (names[1], 1, 32 * 4)]
    totals = plan["totals"]
    assert totals["steps"] == 3 * 22
    assert totals["trainable"] == totals["added"] == 4 * (64 + 32)
    assert totals["memory_gradients"] == totals["memory_average"] == 4 * totals["added"]
    assert totals["memory_moments"] == 2 * 4 * totals["added"] + 2 * 4  # adamw's two, and its step counters
    assert totals["memory_activations"] > 0
    people = call(str(path), "--dry-run").stdout
    assert "parameters added" in people and "would write" in people


class Hub:
    """Stands in for the hub's client: remembers what was asked of it."""

    asked: ClassVar[list[tuple[str, dict[str, Any]]]] = []

    def create_repo(self, repo: str, **options: Any) -> None:
        self.asked.append((repo, options))

    def upload_folder(self, **options: Any) -> str:
        self.asked.append((options["repo_id"], options))
        return "https://hub/" + options["repo_id"]


@pytest.mark.parametrize(("best", "weights"), [([], "best"), (["--set", "run.best=null"], "step-")])
def test_upload(best: list[str], weights: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is needed to use the run: the weights of the best checkpoint or else the last, never two, never moments."""
    import huggingface_hub
    from huggingface_hub.utils import filter_repo_objects

    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: "hf_token")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(Hub, "asked", [])
    path = write(tmp_path, "run")
    result = call(str(path), *SHORT, *best, "--push-to-hub", "me/digits", "--private", "-q")
    assert result.exit_code == 0, result.output
    (_, created), (repo, options) = Hub.asked
    assert (repo, created["private"], options["folder_path"]) == ("me/digits", True, tmp_path / "run")
    files = [file.relative_to(tmp_path / "run").as_posix() for file in (tmp_path / "run").rglob("*") if file.is_file()]
    sent = set(filter_repo_objects(files, ignore_patterns=options["ignore_patterns"]))
    assert {"recipe.yaml", "metrics.jsonl", "outcome.json"} <= sent
    held = [file for file in sent if file.startswith("checkpoints/") and file.endswith("model.safetensors")]
    assert len(held) == 1 and held[0].startswith(f"checkpoints/{weights}")
    assert not any("optimizer" in file or "timing" in file for file in sent)


def test_no_upload_offline(tmp_path: Path) -> None:
    result = call(str(write(tmp_path, "run")), *SHORT, "--push-to-hub", "me/digits", "-q")
    assert result.exit_code == 6
    assert "nothing can be uploaded: HF_HUB_OFFLINE is set" in result.stderr
    assert not (tmp_path / "run").exists()  # said before hours of training, not after


def test_a_line_for_each_evaluation_where_nobody_watches(tmp_path: Path) -> None:
    """A log file gets no control characters, and says how far the run is and how well it does."""
    result = call(str(write(tmp_path, "run")), *SHORT)
    assert result.exit_code == 0, result.output
    lines = [line for line in result.stderr.splitlines() if ": step " in line]
    shape = r"train: step [\d,]+ of [\d,]+, epoch \d+  train loss [\d.]+  eval loss [\d.]+  eval accuracy [\d.]+.*"
    assert re.fullmatch(shape, lines[-1]), result.stderr
    assert "\x1b" not in result.stderr
    assert ": step " not in call(str(write(tmp_path, "other")), *SHORT, "-q").stderr


def test_the_live_view_in_a_terminal(tmp_path: Path) -> None:
    """A bar with its end, the speed, the time left, and the latest of training, evaluation and each method."""
    master, slave = pty.openpty()
    words = ["train", str(write(tmp_path, "run")), "--set", "run.log_every=1"]
    environment = {name: value for name, value in os.environ.items() if name != "NO_COLOR"}
    process = subprocess.Popen([sys.executable, "-m", "ortho_cli", *words], stderr=slave, stdout=subprocess.DEVNULL,
                               env={**environment, "TERM": "xterm-256color", "COLUMNS": "140"})  # fmt: skip
    os.close(slave)
    seen = b""
    while process.poll() is None:
        if not select.select([master], [], [], 0.1)[0]:
            continue
        try:
            seen += os.read(master, 65536)
        except OSError:
            break
    assert process.wait(60) == 0
    text = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", seen.decode("utf-8", "replace"))
    assert re.search(r"\d+/66 .*steps/s .*elapsed .*:\d\d left", text), text[-2000:]
    assert re.search(r"train\s+loss [\d.]+\s+accuracy [\d.]+\s+gradient norm [\d.]+\s+lr", text), text[-2000:]
    assert re.search(r"gor\s+penalty [\d.]+\s+layers 2", text)
    assert re.search(r"eval\s+loss [\d.]+", text)
