"""Message catalogues as sentence pairs: what is read, what is left out, and that no part shares a text with another."""

from __future__ import annotations

import doctest
from pathlib import Path

import pytest
from catalogue_files import write_catalogue

from ortho_cli.errors import RecipeError
from ortho_cli.tasks import catalogues
from ortho_cli.tasks.catalogues import Message, catalogue_messages, message_part

MESSAGES = {
    "Save  the\n%(name)s": "%(name)s\nsichern",
    "verb\x04Close": "Schließen",
    "%(n)s hour\0%(n)s hours": "%(n)s Stunde\0%(n)s Stunden",
    "Email": "Email",  # not translated
    "N j, Y": "j. N Y",  # no words
    "Hello {user}": "Hallo {benutzer}",  # a placeholder that was translated
    "close.": "Zu.",  # "Close", but for case and full stop
}


@pytest.fixture
def packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    write_catalogue(tmp_path, "ortho_shop", "de", MESSAGES, "checkout")
    write_catalogue(tmp_path, "ortho_blog", "de", {"Close": "Zumachen", "Read more": "Weiterlesen"})
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


def test_what_is_read_and_what_is_left_out(packages: Path) -> None:
    assert catalogue_messages(["ortho_shop", "ortho_blog"], "de") == [
        Message("ortho_shop", "checkout", "%(n)s hour", "%(n)s Stunde"),
        Message("ortho_shop", "checkout", "Close", "Schließen"),
        Message("ortho_shop", "checkout", "Save the %(name)s", "%(name)s sichern"),
        Message("ortho_blog", "ortho_blog", "Read more", "Weiterlesen"),
    ]
    assert catalogue_messages(["ortho_blog", "ortho_shop"], "de")[0].foreign == "Zumachen"


def test_what_is_missing_says_what_to_type(packages: Path) -> None:
    with pytest.raises(RecipeError, match="the package ortho_nowhere is not installed") as caught:
        catalogue_messages(["ortho_nowhere"], "de")
    assert caught.value.hint == "pip install --no-deps ortho-nowhere"
    with pytest.raises(RecipeError, match="ortho_blog has no messages in 'fr'") as caught:
        catalogue_messages(["ortho_blog"], "fr")
    assert caught.value.hint == "it has: de"


def test_parts_are_tenths_that_hold_whatever_else_is_there() -> None:
    texts = [f"message number {number}" for number in range(4000)]
    parts = [message_part(text) for text in texts]
    for part, share in (("train", 0.8), ("val", 0.1), ("test", 0.1)):
        assert parts.count(part) / len(texts) == pytest.approx(share, abs=0.02)  # type: ignore[arg-type]
    assert parts == [message_part(f" {text.upper()}… ") for text in texts]


def test_djangos_own_messages() -> None:
    pytest.importorskip("django", reason="pip install django")
    found = catalogue_messages(["django"], "de")
    assert len(found) > 500
    assert len({message.english.casefold() for message in found}) == len(found)
    assert {"admin", "auth", "conf"} <= {message.component for message in found}


def test_examples_run() -> None:
    found = doctest.testmod(catalogues)
    assert (found.failed, found.attempted > 0) == (0, True)
