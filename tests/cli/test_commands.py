"""The command line as a user meets it: exit codes, JSON, errors, recipes, the demo."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from ortho_cli.checkpoints.store import open_checkpoint
from ortho_cli.cli.app import app
from ortho_cli.cli.demo import STEPS
from ortho_cli.surgery.small_sd15 import small_sd15

runner = CliRunner()
REPORT_KEYS = {
    "schema", "ok", "command", "inputs", "outputs", "layers", "parameters", "details", "totals", "notes", "seconds",
}  # fmt: skip


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("base") / "v1-5-small.safetensors"
    small_sd15(path)
    return path


def ortho(*words: object) -> tuple[int, str, str]:
    result = runner.invoke(app, [str(word) for word in words])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.stdout, result.stderr


def test_json_reports_have_the_promised_fields(base: Path, tmp_path: Path) -> None:
    for words in (
        ["inspect", base],
        ["add-hra", base, "-o", tmp_path / "adapter"],
        ["merge", base, tmp_path / "adapter", "-o", tmp_path / "merged.safetensors"],
        ["convert", tmp_path / "adapter", "--to", "peft-lora", "--base", base, "-o", tmp_path / "lora"],
    ):
        code, out, err = ortho(*words, "--json")
        report = json.loads(out)
        assert code == 0 and err == "" and set(report) >= REPORT_KEYS, words
        assert report["schema"] == 1 and report["ok"] is True and report["command"] == words[0]
        for output in report["outputs"]:
            assert Path(output["path"]).stat().st_size == output["bytes"]


def test_a_failure_is_one_line_and_a_hint(base: Path, tmp_path: Path) -> None:
    code, out, err = ortho("add-hra", base, "-o", tmp_path / "x", "--targets", "attn*.to_qq")
    assert code == 4 and out == ""
    assert err.startswith("error: pattern 'attn*.to_qq' matched 0 of ")
    assert "hint: " in err and "to_q" in err and "Traceback" not in err


def test_a_failure_with_json_is_one_object_on_stdout(tmp_path: Path) -> None:
    code, out, err = ortho("inspect", tmp_path / "none.safetensors", "--json")
    failure = json.loads(out)
    assert code == 4 and err == "" and failure["ok"] is False
    assert set(failure["error"]) == {"type", "message", "hint", "where", "exit_code"}
    assert failure["error"]["type"] == "CheckpointError" and failure["error"]["exit_code"] == 4


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (["merge"], 2),
        (["convert", "x", "-o", "y"], 2),
        (["no-such-verb"], 2),
        (["add-hra", "{base}", "-o", "{tmp}/x.ckpt"], 2),
        (["add-hra", "{base}", "-o", "{tmp}/x", "--rank", "7"], 4),
        (["add-hra", "{base}", "-o", "{tmp}/x", "--rank", "100000"], 4),
        (["add-hra", "{base}", "-o", "{tmp}/x", "--rank", "many"], 2),
        (["add-hra", "{base}", "-o", "{base}"], 6),
        (["add-hra", "--recipe", "{tmp}/none.yaml"], 3),
        (["inspect", "{base}", "--fail-above", "1"], 2),
        (["inspect", "{base}", "--globals"], 2),
        (["convert", "{base}", "--to", "base", "-o", "{tmp}/x.safetensors"], 4),
        (["convert", "{base}", "--to", "nonsense", "-o", "{tmp}/x.safetensors"], 2),
    ],
)
def test_exit_codes(words: list[str], code: int, base: Path, tmp_path: Path) -> None:
    found, _, err = ortho(*(word.format(base=base, tmp=tmp_path) for word in words))
    assert found == code, err
    assert err and "Traceback" not in err
    assert not list(tmp_path.iterdir())


def test_dry_run_says_what_would_be_written_and_writes_nothing(base: Path, tmp_path: Path) -> None:
    code, out, _ = ortho("add-hra", base, "-o", tmp_path / "x.safetensors", "--dry-run", "--json")
    report = json.loads(out)
    assert code == 0 and report["dry_run"] is True and report["outputs"] == [] and report["layers"] == 144
    assert not list(tmp_path.iterdir())
    ortho("add-hra", base, "-o", tmp_path / "x.safetensors", "-q")
    assert (tmp_path / "x.safetensors").stat().st_size == report["totals"]["bytes_out"]


def test_a_saved_recipe_repeats_the_command(base: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "again.yaml"
    first = ["add-hra", base, "-o", tmp_path / "a", "--rank", "4", "--rank", "**.attn2.**=6", "--exclude", "to_v"]
    assert ortho(*first, "--save-recipe", recipe, "-q")[0] == 0
    code, _, err = ortho("add-hra", "--recipe", recipe, "-o", tmp_path / "b", "-q")
    assert code == 0, err
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    code, _, err = ortho("merge", "--recipe", recipe)
    assert code == 3 and "add-hra" in err


def test_a_saved_recipe_reads_as_the_command_is_written(base: Path, tmp_path: Path) -> None:
    """Input first, whatever order the words came in."""
    recipe = tmp_path / "r.yaml"
    words = ["--rank", 4, "-q", "--targets", "attn1.*", "--save-recipe", recipe, "-o", tmp_path / "a", base]
    assert ortho("add-hra", *words)[0] == 0
    keys = [line.partition(":")[0] for line in recipe.read_text().splitlines() if re.match(r"\w+:", line)]
    assert keys == ["version", "verb", "checkpoint", "output", "rank", "targets"]


@pytest.mark.parametrize(
    "words",
    [
        ["add-hra", "base", "-o", "a"],
        ["add-hra", "base", "-o", "a.safetensors", "--rank", "4", "--rank", "**.to_q=8", "--exclude", "ff.**"],
        ["add-hra", "base", "-o", "a", "--as", "checkpoint", "--gram-schmidt", "--max-shard-size", "20MB"],
        ["merge", "base", "hra", "hra", "-o", "a.safetensors", "--exact", "--dtype", "bf16"],
        ["convert", "hra", "-o", "a.safetensors", "--to", "kohya-lora", "--base", "base"],
    ],
    ids=lambda words: " ".join(words),
)  # fmt: skip
def test_the_command_in_the_metadata_does_the_same_again(
    words: list[str], base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It holds no folder, and no output: everything else is there, and is accepted."""
    monkeypatch.chdir(tmp_path)
    Path("base.safetensors").symlink_to(base)
    assert ortho("add-hra", "base.safetensors", "-o", "hra", "-q")[0] == 0
    assert ortho(*[{"base": "base.safetensors"}.get(word, word) for word in words], "-q")[0] == 0
    output = words[words.index("-o") + 1]
    again = output.replace("a", "b", 1)
    command = open_checkpoint(output).metadata["ortho.command"].split()
    assert ortho(*command[1:], "-o", again, "-q") == (0, "", "")
    for path in [Path(again)] if Path(again).is_file() else Path(again).iterdir():
        assert path.read_bytes() == Path(str(path).replace(again, output, 1)).read_bytes(), path


def test_every_option_of_a_verb_is_a_recipe_key() -> None:
    import typer

    from ortho_cli.cli.arguments import recipe_keys
    from ortho_cli.recipe.verbs import VERBS

    group = typer.main.get_command(app)
    for verb, model in VERBS.items():
        part = verb.removeprefix("analyze-")
        commands = group.commands if part == verb else group.commands["analyze"].commands  # type: ignore[attr-defined]
        command = commands[part]
        keys = {field.alias or name for name, field in model.model_fields.items()} - {"version", "verb"}
        assert set(recipe_keys(command).values()) == keys, verb


def test_names_that_look_like_markup_are_printed_as_they_are(tmp_path: Path) -> None:
    import torch
    from safetensors.torch import save_file

    save_file(
        {"[red]x[/red].weight": torch.zeros(4, 4), "a[link=http://x].weight": torch.zeros(4, 4)},
        tmp_path / "m.safetensors",
    )
    code, out, _ = ortho("inspect", tmp_path / "m.safetensors", "--layers")
    assert code == 0 and "[red]x[/red]" in out and "a[link=http://x]" in out


def test_ctrl_c_leaves_130(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from ortho_cli.surgery import plan

    def interrupted(*_: object, **__: object) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(plan, "write_file", interrupted)
    code, _, _ = ortho("add-hra", base, "-o", tmp_path / "x.safetensors")
    assert code == 130
    assert not list(tmp_path.iterdir())


def test_the_demo_runs_and_every_command_it_prints_is_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    code, out, err = ortho("demo")
    assert code == 0, err
    assert len(re.findall(r"^\$ ortho ", out, re.MULTILINE)) >= 15
    folder = tmp_path / "ortho-demo"
    assert (folder / "merged.safetensors").is_file()
    assert json.loads((folder / "oialr/outcome.json").read_text("utf-8"))["metrics"]["eval/accuracy"] > 0.93
    sizes = [(folder / f"oialr/export/oialr/{form}/model.safetensors").stat().st_size for form in ("factors", "dense")]
    assert sizes[0] < 0.6 * sizes[1]
    place = folder
    for line in out[out.index("Done. It is all in") :].splitlines()[1:-2]:  # everything that it lists is there
        name, inner = line.split()[0], line.startswith("    ")
        place = place if inner else folder / name
        assert (place / name if inner else place).exists(), line
    assert ortho("demo")[0] == 6
    (folder / "mine.txt").write_text("keep")
    monkeypatch.setattr("ortho_cli.cli.demo.STEPS", STEPS[:2])  # to begin anew is the same for all
    assert ortho("demo", "--force")[0] == 0
    assert (folder / "mine.txt").read_text() == "keep" and not (folder / "oialr").exists()


def test_doctor_finds_a_working_house() -> None:
    code, out, _ = ortho("doctor", "--offline", "--json")
    report = json.loads(out)
    assert code == 0 and report["ok"] is True
    assert {"python", "torch", "free disk here", "arithmetic: SVD"} <= {check["name"] for check in report["details"]}
    assert not any("hf_" in str(check["found"]) for check in report["details"])


def test_doctor_knows_what_the_package_asks_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """The installed metadata, of whatever builder: the extra `all` as one name or as all of them."""
    from ortho_cli.cli import health

    asked = ["torch>=2.10", "Some.Thing", "optuna>=5; extra == 'sweep'", 'no-such-one>=1; extra == "sweep"',
             "ortho-cli[sweep]; extra == 'all'", "optuna>=5; extra == 'all'"]  # fmt: skip
    monkeypatch.setattr(health.importlib.metadata, "requires", lambda name: asked if name == "ortho-cli" else None)
    assert health.requirements() == {"": ["torch", "Some.Thing"], "sweep": ["optuna", "no-such-one"]}
    checks = {check.name: check for check in health.examine(reach_hub=False)}
    assert checks["torch"].status == "ok" and checks["Some.Thing"].status == "broken"
    assert "no-such-one" in checks["extra [sweep]"].found
    assert checks["extra [sweep]"].hint == "pip install 'ortho-cli[sweep]'" and "extra [all]" not in checks


@pytest.mark.parametrize(
    ("repo", "offline", "token", "code", "message"),
    [
        ("me/adapter", True, "hf_x", 6, "HF_HUB_OFFLINE is set"),
        ("me/adapter", False, None, 6, "no token"),
        ("me/my adapter", False, "hf_x", 2, "is no repository's name"),
    ],
)
def test_an_upload_that_cannot_be_is_refused_before_the_work(
    repo: str, offline: bool, token: str | None, code: int, message: str,
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", offline)
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: token)
    found, _, err = ortho("add-hra", base, "-o", tmp_path / "a", "--push-to-hub", repo)
    assert found == code and message in err and "hint: " in err
    assert not (tmp_path / "a").exists()


def test_module_entry_point() -> None:
    done = subprocess.run([sys.executable, "-m", "ortho_cli", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("ortho 0.")


def test_a_recipe_is_saved_after_the_work_and_overwrites_nothing(base: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "r.yaml"
    assert ortho("add-hra", base, "-o", tmp_path / "n", "--dry-run", "-q", "--save-recipe", recipe)[0] == 0
    assert not recipe.exists()
    assert ortho("add-hra", base, "-o", tmp_path / "a", "-q", "--save-recipe", recipe)[0] == 0, "defaults alone"
    code, _, err = ortho("add-hra", base, "-o", tmp_path / "b", "-q", "--force", "--save-recipe", recipe)
    assert code == 6 and "recipe file exists" in err and not (tmp_path / "b").exists()
    before = base.read_bytes()
    code, _, _ = ortho("add-hra", base, "-o", tmp_path / "b", "--force", "--save-recipe", base)
    assert code == 2 and base.read_bytes() == before


def test_usage_errors_are_json_too(base: Path) -> None:
    code, out, err = ortho("merge", base, "--json", "--bogus")
    failure = json.loads(out)
    assert (
        code == 2
        and err == ""
        and failure["error"]["type"] == "UsageError"
        and "--bogus" in failure["error"]["message"]
    )


def test_options_that_would_do_nothing_are_refused(base: Path, tmp_path: Path) -> None:
    assert ortho("add-hra", base, "-o", tmp_path / "a", "--private")[0] == 2
    assert ortho("add-hra", base, "-o", tmp_path / "a", "--dry-run", "--push-to-hub", "a/b")[0] == 2


def test_a_hub_that_cannot_be_reached_is_one_line(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    def refuse(*_: object, **__: object) -> None:
        raise OSError("")

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: "hf_x")
    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", refuse)
    code, _, err = ortho("add-hra", base, "-o", tmp_path / "a", "-q", "--push-to-hub", "me/adapter")
    assert code == 6 and "is written; the upload to me/adapter failed: OSError" in err
    assert f"hf upload me/adapter {tmp_path / 'a'}" in err and (tmp_path / "a" / "adapter_config.json").is_file()


def test_a_limit_is_refused_before_the_comparison(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from ortho_cli.surgery import diff

    monkeypatch.setattr(diff, "open_checkpoint", lambda source: pytest.fail("opened"))
    assert ortho("inspect", base, "--diff", base, "--fail-above", "-1")[0] == 2


@pytest.mark.slow
def test_the_benchmark_measures_every_command(base: Path) -> None:
    code, out, _ = ortho("bench", "surgery", base, "--rounds", 1, "--json")
    found = {entry["name"]: entry for entry in json.loads(out)["details"]}
    assert code == 0 and next(iter(found)) == "copy + fsync" and len(found) == 7
    assert all(entry["median_seconds"] > 0 and entry["peak_bytes"] > 10**6 for entry in found.values())
    assert sorted(path.name for path in base.parent.iterdir()) == [base.name]


def test_a_closed_pipe_is_no_error(base: Path) -> None:
    line = f"{sys.executable} -m ortho_cli inspect {base} --layers | head -1; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", line], capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr == ""
