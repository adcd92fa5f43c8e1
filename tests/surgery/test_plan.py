"""Plans touch nothing until they run; what ran is told in one report, the same for people and programs."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from ortho_cli import __version__
from ortho_cli.checkpoints.store import open_checkpoint
from ortho_cli.checkpoints.writer import computed, copied
from ortho_cli.cli.app import app
from ortho_cli.errors import CheckpointError, NumericsError, OutputError
from ortho_cli.surgery import plan as module
from ortho_cli.surgery.plan import Companion, OutputFile, Plan, provenance, run

Save = Callable[..., Path]
Tensors = dict[str, torch.Tensor]
VERBS = {
    "add-hra": ["add-hra", "{base}", "--targets", "all-linear", "--rank", "2", "-o", "{out}.safetensors"],
    "add-hra adapter": ["add-hra", "{base}", "--targets", "all-linear", "--rank", "2", "-o", "{out}"],
    "merge": ["merge", "{hra}", "-o", "{out}"],
    "merge, shards": ["merge", "{hra}", "-o", "{out}", "--max-shard-size", "300"],
    "convert": ["convert", "{hra}", "--to", "base", "-o", "{out}.safetensors"],
    "convert adapter": ["convert", "{hra}", "--to", "peft-hra", "-o", "{out}"],
}
KEYS = ["schema", "ok", "command", "inputs", "outputs", "layers", "parameters", "details", "totals", "notes", "seconds"]


@pytest.fixture
def files(tmp_path: Path, tiny: Tensors, save: Save) -> dict[str, str]:
    """A base, the same with an adapter in it, and where to write."""
    base = save(tmp_path / "in" / "base.safetensors", tiny, format="pt")
    adapted = {name.replace("to_q.weight", "to_q.fixed_linear.weight"): tensor for name, tensor in tiny.items()}
    adapted["block.to_q.hra_u"] = torch.randn(16, 2, generator=torch.Generator().manual_seed(1))
    hra = save(tmp_path / "in" / "hra.safetensors", adapted)
    (tmp_path / "out").mkdir()
    return {"base": str(base), "hra": str(hra), "out": str(tmp_path / "out" / "x")}


def ortho(words: list[str], files: dict[str, str], *more: str) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, [word.format(**files) for word in words] + list(more))
    return result.exit_code, result.stdout, result.stderr


def tree(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("verb", VERBS)
def test_the_json_report(verb: str, files: dict[str, str], tmp_path: Path) -> None:
    code, out, err = ortho(VERBS[verb], files, "--json")
    assert (code, err) == (0, "")
    report = json.loads(out)
    assert list(report) == KEYS
    assert (report["schema"], report["ok"], report["command"]) == (1, True, verb.partition(" ")[0].rstrip(","))
    assert report["inputs"] == [Path(files["base" if "add" in verb else "hra"]).name]
    assert {item["path"]: item["bytes"] for item in report["outputs"]} == {
        str(tmp_path / "out" / name): len(content) for name, content in tree(tmp_path / "out").items()
    }
    assert len(report["outputs"]) == len(tree(tmp_path / "out")) >= 1
    assert isinstance(report["layers"], int) and report["layers"] >= 1
    assert isinstance(report["parameters"], int)
    assert isinstance(report["totals"], dict)
    assert all(isinstance(note, str) for note in report["notes"])
    assert 0 <= report["seconds"] < 60
    assert all({"name", "shape"} <= detail.keys() for detail in report["details"])
    if not verb.startswith("convert"):
        assert len(report["details"]) == report["layers"]
        assert sum(detail["parameters"] for detail in report["details"]) == report["parameters"] > 0


@pytest.mark.parametrize("verb", VERBS)
def test_a_dry_run_tells_and_writes_nothing(verb: str, files: dict[str, str], tmp_path: Path) -> None:
    before = tree(tmp_path)
    code, out, _ = ortho(VERBS[verb], files, "--json", "--dry-run")
    told = json.loads(out)
    assert code == 0
    assert list(told) == [*KEYS, "dry_run"]
    assert (told["dry_run"], told["outputs"]) == (True, [])
    assert tree(tmp_path) == before
    assert list((tmp_path / "out").iterdir()) == []
    code, out, _ = ortho(VERBS[verb], files, "--json")
    done = json.loads(out)
    assert told["totals"]["bytes_out"] == sum(item["bytes"] for item in done["outputs"])
    assert told["totals"]["peak_bytes"] > 2**20
    assert (told["layers"], told["parameters"]) == (done["layers"], done["parameters"])
    code, out, _ = ortho(VERBS[verb], files, "--json", "--dry-run")  # refused as the run would be
    assert (code, json.loads(out)["error"]["exit_code"]) == (6, 6)
    code, out, _ = ortho(VERBS[verb], files, "--dry-run", "--force")
    assert code == 0
    assert "would write" in out or "bytes out" in out


@pytest.mark.parametrize("verb", VERBS)
def test_the_same_command_gives_the_same_bytes(verb: str, files: dict[str, str], tmp_path: Path) -> None:
    assert ortho(VERBS[verb], files)[0] == 0
    first = tree(tmp_path / "out")
    assert ortho(VERBS[verb], files, "--force", "-q")[:2] == (0, "")
    assert tree(tmp_path / "out") == first
    assert all(str(tmp_path).encode() not in content for content in first.values())  # names, never folders


def test_a_failure_is_one_json_object(files: dict[str, str]) -> None:
    code, out, err = ortho(["merge", "{base}", "-o", "{out}.ckpt"], files, "--json")
    told = json.loads(out)
    assert (code, err, list(told), told["schema"], told["ok"]) == (2, "", ["schema", "ok", "error"], 1, False)
    assert list(told["error"]) == ["type", "message", "hint", "where", "exit_code"]


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("output", ["{source}", "{link}", "{hard}", "{folder}", "{source}/below", "/proc/out"])
def test_refused_outputs_exit_6_before_any_work(verb: str, output: str, files: dict[str, str], tmp_path: Path) -> None:
    folder, source = tmp_path / "in", Path(files["base" if "add" in verb else "hra"])
    (folder / "link.safetensors").symlink_to(source)
    (folder / "hard.safetensors").hardlink_to(source)
    files |= {"link": f"{folder}/link.safetensors", "hard": f"{folder}/hard.safetensors"}
    files |= {"folder": str(folder), "source": str(source)}
    words = [*VERBS[verb][: VERBS[verb].index("-o") + 1], output]
    before = tree(tmp_path)
    for force in ([], ["--force"]):
        code, out, err = ortho(words, files, *force)
        if output in ("{source}", "{link}", "{hard}") and "adapter is a folder" in err:
            assert (verb, code) == ("convert adapter", 2)
        else:
            assert code == 6, err
        assert out == ""
        assert err.startswith("error: ")
        assert tree(tmp_path) == before


def small(tmp_path: Path, save: Save, **fields: Any) -> Plan:
    path = save(tmp_path / "in.safetensors", {"x": torch.ones(4)})
    piece = computed("y", "F32", (2,), lambda: iter([bytes(8)]))
    files = [OutputFile("a/x.safetensors", [copied(open_checkpoint(path).tensors["x"]), piece], {"format": "pt"})]
    given = {"files": files, "copies": [(path, "copy.bin")], "texts": {"b/config.json": "ü\n"}} | fields
    return Plan("test", [path], tmp_path / "out", **given)


class Watch:
    """A progress bar that counts."""

    total = done = 0

    def start(self, total_bytes: int) -> None:
        self.total = total_bytes

    def advance(self, count: int) -> None:
        self.done += count


def test_a_plan_writes_files_copies_and_texts(tmp_path: Path, save: Save) -> None:
    plan, watch = small(tmp_path, save), Watch()
    report = run(plan, progress=watch)
    assert sorted(tree(tmp_path / "out")) == ["a/x.safetensors", "b/config.json", "copy.bin"]
    assert sorted(load_file(tmp_path / "out" / "a" / "x.safetensors")) == ["x", "y"]
    assert (tmp_path / "out" / "copy.bin").read_bytes() == (tmp_path / "in.safetensors").read_bytes()
    assert (tmp_path / "out" / "b" / "config.json").read_bytes() == "ü\n".encode()
    assert plan.bytes_out == sum(item["bytes"] for item in report.outputs) == watch.total
    assert 0 < watch.done <= watch.total
    assert [item["path"] for item in report.outputs] == [
        str(tmp_path / "out" / name) for name in ("a/x.safetensors", "copy.bin", "b/config.json")
    ]


def test_details_and_texts_may_be_completed_while_running(tmp_path: Path, save: Save) -> None:
    detail: dict[str, Any] = {"name": "x"}

    def produce() -> Iterator[bytes]:
        detail["norm"] = 1.5
        yield bytes(4)

    def finish(plan: Plan) -> None:
        plan.texts["card.md"] = f"norm {detail['norm']}"

    files = [OutputFile("x.safetensors", [computed("x", "F32", (1,), produce)], {})]
    report = run(small(tmp_path, save, files=files, details=[detail], finish=finish))
    assert report.details == [{"name": "x", "norm": 1.5}]
    assert (tmp_path / "out" / "card.md").read_text() == "norm 1.5"
    assert str(tmp_path / "out" / "card.md") in [item["path"] for item in report.outputs]


@pytest.mark.parametrize("error", [NumericsError("not finite"), KeyboardInterrupt(), OSError(28, "No space left")])
def test_a_failure_in_the_second_file_leaves_nothing(error: BaseException, tmp_path: Path, save: Save) -> None:
    def produce() -> Iterator[bytes]:
        raise error
        yield b""

    good = computed("x", "F32", (1,), lambda: iter([bytes(4)]))
    files = [
        OutputFile("1.safetensors", [good], {}),
        OutputFile("2.safetensors", [computed("y", "F32", (1,), produce)], {}),
    ]
    plan = small(tmp_path, save, files=files)
    with pytest.raises(OutputError if isinstance(error, OSError) else type(error)):
        run(plan)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.safetensors"]


def test_copies_are_inputs_too(tmp_path: Path, save: Save) -> None:
    tokenizer = save(tmp_path / "out" / "tokenizer.safetensors", {"x": torch.ones(1)})
    plan = small(tmp_path, save, copies=[(tokenizer, "tokenizer.json")])
    with pytest.raises(OutputError, match="is an input, or the folder of one"):
        run(plan, force=True)
    assert tokenizer.exists()


def test_names_are_refused_before_any_work(tmp_path: Path, save: Save, monkeypatch: pytest.MonkeyPatch) -> None:
    pieces = [computed("x", "F32", (1,), lambda: iter([bytes(4)]))] * 2
    monkeypatch.setattr(module, "write_file", None)
    with pytest.raises(CheckpointError, match="two tensors have the name 'x'"):
        run(small(tmp_path, save, files=[OutputFile("", pieces, {})], copies=[], texts={}))


@pytest.mark.parametrize(
    "fields",
    [
        {"texts": {"copy.bin": ""}},
        {"texts": {"./a/../copy.bin": ""}},
        {"texts": {"a/x.safetensors": ""}},
        {"copies": "a/x.safetensors"},
        {"files": 2},
    ],
    ids=str,
)
@pytest.mark.parametrize("dry_run", [True, False])
def test_files_of_one_name_are_refused_before_any_work(
    fields: dict[str, Any], dry_run: bool, tmp_path: Path, save: Save, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = small(tmp_path, save, **{key: value for key, value in fields.items() if key == "texts"})
    if "copies" in fields:
        plan.copies[0] = (plan.copies[0][0], fields["copies"])
    plan.files *= fields.get("files", 1)
    monkeypatch.setattr(module, "write_file", None)
    with pytest.raises(CheckpointError, match="2 files of the output would have the name"):
        run(plan, dry_run=dry_run)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.safetensors"]


def test_a_text_that_comes_last_overwrites_nothing(tmp_path: Path, save: Save) -> None:
    plan = small(tmp_path, save, finish=lambda plan: plan.texts.update({"copy.bin": ""}))
    with pytest.raises(CheckpointError, match=r"would have the name 'copy\.bin'"):
        run(plan)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("taken", ["out", "beside"])
def test_no_output_is_without_its_companion(taken: str, tmp_path: Path, save: Save) -> None:
    def write(partial: Path, own: Path, advance: Callable[[int], None]) -> None:
        assert (partial / "copy.bin").exists()
        own.write_text("made of it")
        (tmp_path / taken).write_text("theirs")

    plan = small(tmp_path, save, companion=Companion(tmp_path / "beside", 0, write))
    with pytest.raises(OutputError, match=f"output exists: .*{taken}"):
        run(plan)
    found = {path.name: path.read_text() for path in tmp_path.iterdir() if path.suffix != ".safetensors"}
    assert found == ({"beside": "theirs"} if taken == "beside" else {"beside": "made of it", "out": "theirs"})


@pytest.mark.parametrize("force", [True, False])
def test_an_output_made_meanwhile_stays_without_force(force: bool, tmp_path: Path, save: Save) -> None:
    output = tmp_path / "out"
    plan = small(tmp_path, save, finish=lambda plan: output.write_text("theirs") and None)
    if force:
        run(plan, force=True)
        assert (output / "copy.bin").exists()
    else:
        with pytest.raises(OutputError, match="output exists"):
            run(plan)
        assert output.read_text() == "theirs"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.safetensors", "out"]


def test_provenance_holds_names_and_no_folders() -> None:
    options = {
        "rank": 8,
        "exact": True,
        "dry": False,
        "none": None,
        "targets": ["a", "b"],
        "empty": [],
        "to": Path("/d/x"),
    }
    found = provenance("merge", ["/home/me/base.safetensors", Path("a/b"), "org/name@v1", "."], options)
    assert found == {
        "ortho.version": __version__,
        "ortho.command": "ortho merge base.safetensors b name@v1 . --rank 8 --exact --targets a --targets b --to x",
    }
    more = provenance("x", [], {}, method={"b": 1, "a": [2]}, targets=["**.to_q"], fingerprint="0" * 64)
    assert more["ortho.method"] == '{"a": [2], "b": 1}'
    assert more["ortho.targets"] == '["**.to_q"]'
    assert more["ortho.base_fingerprint"] == "0" * 64
    assert provenance("x", ["caf\udce9.safetensors"], {})["ortho.command"] == "ortho x caf\\udce9.safetensors"
