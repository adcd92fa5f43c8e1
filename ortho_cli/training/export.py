"""What a run leaves behind: what each method exports, and the forms of `run.export` made of it."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ortho_cli.errors import OrthoError, RecipeError
from ortho_cli.recipe.exports import ADAPTERS

from .export_forms import PLACES, ExportSource, write_form
from .processes import on_main, own_place
from .session import Session

__all__ = ["EXPORT", "check_exports", "export"]

EXPORT = "export"  # the folder of a run that holds them


def export(session: Session, folder: Path) -> list[str]:
    """Write what a run leaves behind, as it was judged: with averaged weights where there are any.

    Every process must call it; the main one writes.

    Returns:
        Files and folders, those of the methods first.
    """
    written: list[str] = []
    adapters: list[Path] = []
    if session.is_main or session.is_sharded:
        with session.for_judging():
            for name, method in session.named_methods.items():
                with own_place(session.accelerator, folder / EXPORT / name) as target:
                    with _set_aside(target):
                        method.export(session.model, target)
                    if target.exists():
                        written.append(str(target))
                        adapters += [target] if method.name in ADAPTERS else []
    on_main(session.accelerator, lambda: written.extend(_forms(session, folder / EXPORT, adapters)))
    session.accelerator.wait_for_everyone()
    return written


def check_exports(session: Session) -> None:
    """See, before training, that every form of `run.export` can be made; nothing is left on the disk.

    Raises:
        RecipeError: one that cannot, with the reason.
    """
    forms = session.recipe.run.export
    if not forms or session.is_sharded:
        return

    def check() -> None:
        with tempfile.TemporaryDirectory() as scratch:
            adapters = []
            for name, method in session.named_methods.items():
                if method.name in ADAPTERS:
                    adapters.append(Path(scratch) / name)
                    notes = list(getattr(method, "notes", ()))
                    method.export(session.model, adapters[-1])
                    method.notes = notes  # type: ignore[attr-defined]  # it tells them again at the end
            with ExportSource(session.recipe, adapters, Path(scratch)) as source:
                for form in forms:
                    try:
                        write_form(source, form, Path(scratch) / PLACES[form], dry_run=True)
                    except OrthoError as error:
                        raise RecipeError(f"run.export: {form}: {error.message}", hint=error.hint) from error

    on_main(session.accelerator, check)


def _forms(session: Session, folder: Path, adapters: list[Path]) -> list[str]:
    """Make the forms that the recipe asks for of the adapters that its methods wrote."""
    forms = session.recipe.run.export
    if not forms:
        return []
    with ExportSource(session.recipe, adapters, folder) as source:
        for form in forms:
            with _set_aside(folder / PLACES[form]):
                notes = write_form(source, form, folder / PLACES[form])
            session.notes += [note for note in (f"{form}: {note}" for note in notes) if note not in session.notes]
    return [str(folder / PLACES[form]) for form in forms]


@contextmanager
def _set_aside(target: Path) -> Iterator[None]:
    """Make room for a new export; the earlier one comes back if it fails."""
    old = target.with_name(f".{target.name}.old")
    if target.exists():
        _remove(old)
        target.rename(old)
    try:
        yield
    except BaseException:
        if old.exists():
            _remove(target)
            old.rename(target)
        raise
    _remove(old)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
