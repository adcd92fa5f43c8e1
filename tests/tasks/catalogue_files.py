"""Message catalogues to test on: packages with `.mo` files as `msgfmt` writes them."""

from __future__ import annotations

import struct
from collections.abc import Mapping
from pathlib import Path

__all__ = ["write_catalogue"]

MAGIC, HEADER = 0x950412DE, "Content-Type: text/plain; charset=UTF-8\nPlural-Forms: nplurals=2; plural=(n != 1);\n"


def write_catalogue(
    folder: Path, package: str, language: str, messages: Mapping[str, str], component: str = ""
) -> None:
    """A package below `folder` with one catalogue; keys and values as GNU gettext joins contexts and plurals."""
    place = folder / package / component / "locale" / language / "LC_MESSAGES"
    place.mkdir(parents=True)
    (folder / package / "__init__.py").write_text("raise RuntimeError('catalogues are read, not run')\n")
    entries = [(key.encode(), value.encode()) for key, value in sorted({"": HEADER, **messages}.items())]
    first = 28
    offset = first + 16 * len(entries)
    tables: list[list[int]] = [[], []]
    data = b""
    for side in (0, 1):
        for entry in entries:
            tables[side] += [len(entry[side]), offset + len(data)]
            data += entry[side] + b"\0"
    numbers = [MAGIC, 0, len(entries), first, first + 8 * len(entries), 0, 0, *tables[0], *tables[1]]
    (place / "django.mo").write_bytes(struct.pack(f"<{len(numbers)}I", *numbers) + data)
