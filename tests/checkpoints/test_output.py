"""Outputs are refused before any work, appear whole or not at all, and what interrupted runs left behind goes away."""

from __future__ import annotations

import errno
import os
import platform
import re
import shutil
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import pytest

from ortho_cli.checkpoints import output as module
from ortho_cli.checkpoints.output import atomic, check_output
from ortho_cli.errors import OutputError

Usage = namedtuple("Usage", "total used free")
DEAD = 4_194_303  # above the default limit of process numbers' everyday use; checked below
HOST = re.sub(r"[^\w.-]", "_", platform.node())


def checkpoint(folder: Path, content: str = "old") -> Path:
    folder.mkdir(parents=True)
    (folder / "model.safetensors").write_text(content)
    return folder


def refused(output: Path, *inputs: Path, needed: int = 0, force: bool = True) -> OutputError:
    with pytest.raises(OutputError) as caught:
        check_output(output, inputs, needed, force=force)
    assert caught.value.exit_code == 6
    return caught.value


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return checkpoint(tmp_path / "base") / "model.safetensors"


def test_a_new_output_is_fine_and_nothing_is_made_by_checking(source: Path, tmp_path: Path) -> None:
    before = sorted(tmp_path.rglob("*"))
    check_output(tmp_path / "new.safetensors", [source], 10, force=False)
    check_output(tmp_path / "deep" / "er" / "new", [source], 10, force=False)
    check_output(source.parent / "inside", [source], 10, force=False)
    assert sorted(tmp_path.rglob("*")) == before


def test_an_existing_output_needs_force(source: Path, tmp_path: Path) -> None:
    (tmp_path / "file.safetensors").touch()
    checkpoint(tmp_path / "folder")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    for name in ("file.safetensors", "folder", "dangling"):
        error = refused(tmp_path / name, source, force=False)
        assert "exists" in error.message
        assert "--force" in str(error.hint)
        check_output(tmp_path / name, [source], 0, force=True)


def test_an_input_is_no_output(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    links = tmp_path / "links"
    links.mkdir()
    (links / "soft.safetensors").symlink_to(source)
    (links / "twice.safetensors").symlink_to(links / "soft.safetensors")
    os.link(source, links / "hard.safetensors")
    (links / "folder").symlink_to(source.parent)
    monkeypatch.chdir(source.parent)
    outputs = [
        source, *sorted(links.glob("*.safetensors")), source.parent, tmp_path, links / "folder",
        Path("model.safetensors"), source.parent / ".." / "base" / "model.safetensors",
        links / "folder" / "model.safetensors",
    ]  # fmt: skip
    for output in outputs:
        for force in (True, False):
            assert "is an input" in refused(output, source, force=force).message, output
            assert "is an input" in refused(output, tmp_path / "gone", source, force=force).message
    assert source.read_text() == "old"


def test_a_folder_whose_links_lead_to_the_inputs_is_an_input(tmp_path: Path, source: Path) -> None:
    snapshot = tmp_path / "snapshot"
    snapshot.mkdir()
    (snapshot / "model.safetensors").symlink_to(source)
    assert "is an input" in refused(snapshot, snapshot / "model.safetensors").message
    check_output(snapshot, [source], 0, force=True)  # the link alone would go, not the file


def test_force_does_not_saw_off_the_branch_it_sits_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (checkpoint(tmp_path / "work") / "sub").mkdir()
    monkeypatch.chdir(tmp_path / "work" / "sub")
    for output in (Path(".."), Path.cwd().parent, Path()):
        refused(output)


@pytest.mark.parametrize("place", ["/proc/out.safetensors", "/proc/new/out", "/sys/out.safetensors", "/dev/null/out"])
def test_places_that_take_no_files(place: str) -> None:
    assert refused(Path(place)).hint == "name another place with -o"


def test_parents_that_are_no_folders(source: Path, tmp_path: Path) -> None:
    assert "is a file" in refused(source / "out.safetensors").message
    assert "is a file" in refused(source / "deep" / "out.safetensors").message
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    with pytest.raises(OutputError, match="cannot be written"), atomic(tmp_path / "dangling" / "out") as partial:
        partial.touch()


def test_names_that_are_too_long(tmp_path: Path) -> None:
    for length in (300, 250):  # the partial's name is longer than the output's
        assert "too long" in refused(tmp_path / ("x" * length)).message
    with pytest.raises(OutputError, match="too long"), atomic(tmp_path / ("x" * 250)) as partial:
        partial.touch()
    check_output(tmp_path / ("x" * 200), [], 0, force=False)


def test_a_folder_that_may_not_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def forbid(**_: object) -> None:  # as root, no folder refuses
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(module.tempfile, "TemporaryFile", forbid)
    assert refused(tmp_path / "out").message == f"cannot write into {tmp_path}: Permission denied"


def test_a_disk_too_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(10**10, 10**9, 3 * 10**9))
    check_output(tmp_path / "out", [], 2_900_000_000, force=False)
    assert "4.00 GB needed, 3.00 GB free" in refused(tmp_path / "out", needed=4 * 10**9).message
    refused(tmp_path / "new" / "out", needed=3 * 10**9)  # something must remain for the file system


def write(output: Path, kind: str, content: str = "new") -> None:
    with atomic(output) as partial:
        assert partial.name == f".{output.name}.partial-{os.getpid()}-{HOST}"
        if kind == "folder":
            checkpoint(partial, content)
            checkpoint(partial / "unet", content)
        else:
            partial.write_text(content)


def content(path: Path) -> str:
    return (path / "model.safetensors" if path.is_dir() else path).read_text()


@pytest.mark.parametrize("swap", ["in one step", "in two"])
@pytest.mark.parametrize("kind", ["file", "folder"])
@pytest.mark.parametrize("old", ["nothing", "file", "folder", "link", "dangling", "link to folder"])
def test_the_output_replaces_whatever_was_there(
    kind: str, old: str, swap: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if swap == "in two":
        monkeypatch.setattr(module, "_exchange", lambda first, second: False)
    elif sys.platform.startswith("linux"):  # at no moment is there no output
        monkeypatch.setattr(os, "rename", None)
    output, other = tmp_path / "out", tmp_path / "other"
    if old == "file":
        output.write_text("old")
    elif old == "folder":
        checkpoint(output)
    elif old != "nothing":
        output.symlink_to(other)
        if old == "link":
            other.write_text("old")
        elif old == "link to folder":
            checkpoint(other)
    write(output, kind)
    assert content(output) == "new"
    assert not output.is_symlink()
    if other.exists():
        assert content(other) == "old"  # a link is replaced, never what it leads to
    assert {path.name for path in tmp_path.iterdir()} <= {"out", "other"}


@pytest.mark.parametrize("how", ["in one step", "without the call", "without links"])
@pytest.mark.parametrize("kind", ["file", "folder"])
@pytest.mark.parametrize("other", ["nothing", "file", "folder", "empty folder", "dangling"])
def test_what_came_meanwhile_stays_without_force(
    other: str, kind: str, how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_links(*_: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    if how != "in one step":
        monkeypatch.setattr(module, "_rename", lambda first, second, flags: errno.ENOSYS)
    if how == "without links":
        monkeypatch.setattr(os, "link", no_links)
    output = tmp_path / "out"

    def make() -> None:
        with atomic(output, force=False) as partial:
            checkpoint(partial, "new") if kind == "folder" else partial.write_text("new")
            if other == "file":
                output.write_text("theirs")
            elif other == "folder":
                checkpoint(output, "theirs")
            elif other == "empty folder":
                output.mkdir()
            elif other == "dangling":
                output.symlink_to("nowhere")

    if other == "nothing":
        make()
        assert content(output) == "new"
    else:
        with pytest.raises(OutputError, match="output exists") as caught:
            make()
        assert "--force" in str(caught.value.hint)
        if other in ("file", "folder"):
            assert content(output) == "theirs"
        elif other == "empty folder":
            assert list(output.iterdir()) == []
        else:
            assert os.readlink(output) == "nowhere"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_what_exists_is_refused_before_the_work_without_force(tmp_path: Path) -> None:
    checkpoint(tmp_path / f".out.old-{DEAD}-{HOST}", "older")  # put back by the sweep
    with pytest.raises(OutputError, match="output exists"), atomic(tmp_path / "out", force=False):
        raise AssertionError("nothing may be computed")
    assert content(tmp_path / "out") == "older"


@pytest.mark.parametrize("error", [KeyboardInterrupt(), ValueError("bug"), OSError(28, "No space left on device")])
@pytest.mark.parametrize("kind", ["file", "folder"])
def test_a_failure_leaves_the_old_and_no_partial(error: BaseException, kind: str, tmp_path: Path) -> None:
    output = tmp_path / "out"
    write(output, kind, "old")
    with pytest.raises(OutputError if isinstance(error, OSError) else type(error)), atomic(output) as partial:
        checkpoint(partial) if kind == "folder" else partial.write_text("half")
        raise error
    assert content(output) == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_failure_takes_the_folders_it_made_along(tmp_path: Path) -> None:
    (tmp_path / "here").mkdir()
    with pytest.raises(KeyboardInterrupt), atomic(tmp_path / "here" / "a" / "b" / "out") as partial:
        partial.write_text("half")
        raise KeyboardInterrupt
    assert [path.name for path in tmp_path.rglob("*")] == ["here"]
    write(tmp_path / "here" / "a" / "b" / "out", "file")
    assert content(tmp_path / "here" / "a" / "b" / "out") == "new"


def test_partials_of_the_dead_are_swept_and_of_the_living_left(tmp_path: Path) -> None:
    assert not Path(f"/proc/{DEAD}").exists()
    living = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    try:
        names = {
            f".out.partial-{DEAD}-{HOST}": False, f".out.partial-{os.getpid()}-{HOST}": False,
            f".out.partial-9999999999-{HOST}": False, f".out.old-{DEAD}-{HOST}": False,
            f".out.partial-{living.pid}-{HOST}": True, f".other.partial-{DEAD}-{HOST}": True,
            f".out.partial-x-{HOST}": True, f"out.partial-{DEAD}-{HOST}": True, f".out.partial-{'9' * 30}-{HOST}": True,
            f".out.partial-{DEAD}-{HOST}x": True, f".out.old-{DEAD}-other": True,
        }  # fmt: skip
        for number, name in enumerate(names):
            checkpoint(tmp_path / name) if number % 2 else (tmp_path / name).touch()
        (tmp_path / "out").write_text("old")
        write(tmp_path / "out", "file")
        assert {path.name for path in tmp_path.iterdir()} == {"out", *(name for name, stays in names.items() if stays)}
    finally:
        living.communicate(b"\n")


def test_an_old_folder_whose_successor_never_came_is_put_back(tmp_path: Path) -> None:
    checkpoint(tmp_path / f".out.old-{DEAD}-{HOST}", "older")
    with pytest.raises(KeyboardInterrupt), atomic(tmp_path / "out"):
        raise KeyboardInterrupt
    assert content(tmp_path / "out") == "older"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_failure_between_the_two_steps_puts_the_old_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rename, output = os.rename, checkpoint(tmp_path / "out")

    def interrupted(source: Path, target: Path) -> None:
        if ".partial-" in str(source):
            raise KeyboardInterrupt
        rename(source, target)

    monkeypatch.setattr(module, "_exchange", lambda first, second: False)
    monkeypatch.setattr(os, "rename", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write(output, "folder")
    assert content(output) == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_the_system_swaps_folders_in_one_step(tmp_path: Path) -> None:
    first, second = checkpoint(tmp_path / "a", "1"), checkpoint(tmp_path / "b", "2")
    if not sys.platform.startswith("linux"):
        pytest.skip("renameat2 is Linux's")
    assert module._exchange(first, second)
    assert (content(first), content(second)) == ("2", "1")
    assert not module._exchange(first, tmp_path / "none")


SMALL_DISK = """
import sys
from pathlib import Path
from ortho_cli.checkpoints.output import atomic
from ortho_cli.checkpoints.writer import computed, write_file
from ortho_cli.errors import OutputError
blocks = lambda: (bytes(100_000) for _ in range(40))
try:
    with atomic(Path("new/out.safetensors")) as partial:
        write_file(partial, [computed("x", "U8", (4_000_000,), blocks)], {})
except OutputError as error:
    print(error.exit_code, error.message, sorted(map(str, Path().rglob("*"))))
"""


def test_a_disk_that_fills_up(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    mount = f"mount -t tmpfs -o size=2m none '{tmp_path}' && cd '{tmp_path}' && "
    if shutil.which("unshare") is None or subprocess.run(["unshare", "-m", "sh", "-c", f"{mount} true"]).returncode:
        pytest.skip("no right to mount a small disk here")
    code = tmp_path.with_suffix(".py")
    code.write_text(SMALL_DISK)
    environment = {**os.environ, "PYTHONPATH": str(Path(module.__file__).parents[2])}
    subprocess.run(["unshare", "-m", "sh", "-c", f"{mount} '{sys.executable}' '{code}'"], check=True, env=environment)
    assert capfd.readouterr().out.strip() == "6 cannot be written: No space left on device []"
