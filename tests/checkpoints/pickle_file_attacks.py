"""Attacks on the file around the pickle: zip archives, the old format, other formats under a checkpoint's name."""

from __future__ import annotations

import io
import os
import pickle
import struct
import tarfile
import zlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
from pickle_assembler import (
    SIX_FLOATS,
    TOUCH,
    Case,
    Member,
    Payload,
    legacy,
    listed,
    mapping,
    members,
    number,
    pickle_of,
    several,
    storage,
    tensor,
    text,
    zipped,
)


def zip_attacks() -> Iterator[Case]:
    """Archives that are compressed, ambiguous, damaged or larger than they look."""
    good = pickle_of(mapping(("w", tensor())))
    huge = _bomb()
    bomb = Member("archive/data/1", huge, method=8, local_method=8, size=64 * 2**20, packed=len(huge))

    def having(*more: Member, **quirks: Any) -> Callable[[], bytes]:
        return lambda: zipped(members(good, *more), **quirks)

    yield "deflate-bomb", having(bomb), "'archive/data/1' of the archive is compressed"
    yield "stored-but-smaller", having(Member("archive/data/1", b"abc", packed=3, size=2**40)), "is compressed"
    yield "bzip2", having(Member("archive/data/1", b"abc", method=12, local_method=12)), "is compressed"
    yield "local-method", having(Member("archive/data/1", b"abc", local_method=8)), "contradicts its entry"
    yield "encrypted", having(Member("archive/data/1", b"abc", flags=1)), "encrypted"
    yield "strong-encryption", having(Member("archive/data/1", b"abc", flags=0x2040)), "encrypted"
    yield "other-disk", having(Member("archive/data/1", b"abc", disk=1)), "another disk"
    yield "twice-storage", having(Member("archive/data/0", SIX_FLOATS)), "two members named 'archive/data/0'"
    yield "twice-pickle", having(Member("archive/data.pkl", good)), "two members named 'archive/data.pkl'"
    yield "two-pickles", having(Member("other/data.pkl", good)), "exactly one data.pkl; here: archive/data.pkl, other/"
    yield "two-pickles-nested", having(Member("archive/data/data.pkl", good)), "exactly one data.pkl"
    yield "no-pickle", lambda: zipped([Member("archive/x", b"1")]), "here: none"
    yield "no-members", lambda: b"PK\5\6" + bytes(18), "here: none"
    yield "stray", having(Member("elsewhere/x", b"1")), "lies outside the archive's folder"
    yield "torchscript", having(Member("archive/constants.pkl", b"].")), "TorchScript"
    for name in (
        "/etc/passwd",
        "../x",
        "archive/../../x",
        "archive/./x",
        "archive//x",
        "C:/x",
        "archive\\x",
        "a\0b",
        "",
    ):
        yield f"name-{name!r}", having(Member(name, b"1")), "no plain relative path"
    yield "name-not-utf8", having(Member(b"archive/\xff", b"1")), "no plain relative path"
    yield "name-escape", having(Member("archive/\x1b[2J", b"1")), "no plain relative path"
    yield "big-endian", lambda: zipped([Member("a/data.pkl", good), Member("a/byteorder", b"big")]), "big-endian"
    yield "many-members", lambda: zipped([Member(f"a/{i}") for i in range(100_001)]), "claims 100,001 members"
    yield "claims-members", having(count=1_000_000), "claims 1,000,000 members"
    yield "claims-fewer", having(count=2), "directory is damaged"
    yield "claims-more", having(count=9), "directory is damaged"
    yield "directory-shifted", having(shift=1), "does not lie where its end says"
    yield "directory-beyond", having(shift=2**40, zip64=True), "does not lie where its end says"
    yield "overlap", having(Member("archive/data/1", b"1", header=60)), "starts where it cannot"
    yield "same-header", having(Member("archive/data/1", b"1", header=0)), "contradicts its entry|starts where"
    yield "header-beyond", having(Member("archive/data/1", b"1", header=2**31)), "starts where it cannot"
    yield "header-2^63", having(Member("archive/data/1", b"1", header=2**63)), "starts where it cannot"
    yield "member-beyond", having(Member("archive/data/1", b"1", size=10**9, local_size=10**9)), "into the directory"
    yield "local-name", having(Member("archive/data/1", b"1", local_name=b"archive/data/2")), "contradicts its entry"
    yield "local-size", having(Member("archive/data/1", b"1", local_size=2)), "contradicts its entry"
    yield "extra-damaged", having(Member("archive/data/1", b"1", extra=b"\1\0\x40\0")), "damaged extra field"
    yield (
        "extra-short",
        having(Member("archive/data/1", b"1", size=2**32 - 1, extra=b"\1\0\0\0")),
        "damaged|lacks|extra",
    )
    yield "comment", having(comment=b"hello"), "does not end with its directory"
    yield "trailing", lambda: zipped(members(good)) + b"\0", "does not end with its directory"
    yield "prepended", lambda: b"PK\3\4" + bytes(60) + zipped(members(good)), "does not lie where"
    yield "prepended-adjusted", lambda: _prepended(good), "starts where it cannot"
    yield "split", lambda: _patched(zipped(members(good)), -18, b"\1\0"), "split over several files"
    yield (
        "zip64-lie",
        lambda: _patched(zipped(members(good), zip64=True), -14, b"\7\0\7\0"),
        "contradicts its directory",
    )
    yield "zip64-elsewhere", lambda: _patched(zipped(members(good), zip64=True), -34, bytes(8)), "points elsewhere"
    whole = zipped(members(good))
    for cut in (
        1,
        2,
        4,
        21,
        22,
        30,
        len(whole) // 4,
        len(whole) // 2,
        len(whole) - 100,
        len(whole) - 22,
        len(whole) - 1,
    ):
        yield f"truncated-{cut}", partial(bytes, memoryview(whole)[:cut]), "truncated|not a checkpoint"


def _bomb() -> bytes:
    """64 MB of zeros as a raw DEFLATE stream."""
    packer = zlib.compressobj(9, wbits=-15)
    return packer.compress(bytes(64 * 2**20)) + packer.flush()


def _patched(data: bytes, at: int, new: bytes) -> bytes:
    at %= len(data)
    return data[:at] + new + data[at + len(new) :]


def _prepended(pickle: bytes) -> bytes:
    """An archive behind 64 other bytes, every offset in it adjusted."""
    shifted = members(pickle)
    junk = Member("archive/junk", b"x" * 64)
    data = bytearray(zipped([junk, *shifted]))
    directory = data.rindex(b"PK\1\2archive/junk"[:4], 0, data.index(b"archive/junk", 100))
    length = 46 + len("archive/junk")
    end = len(data) - 22
    count, size, offset = len(shifted), end - directory - length, directory
    del data[directory : directory + length]
    data[-22:] = struct.pack("<4sHHHHIIH", b"PK\5\6", 0, 0, count, count, size, offset, 0)
    return bytes(data)


def legacy_attacks() -> Iterator[Case]:
    """torch's format of before 1.6, damaged."""
    good = mapping(("w", tensor()))
    two = mapping(("w", tensor()), ("x", tensor(of=storage(kind="IntStorage"))))

    def view(first: int, numel: int) -> bytes:
        fields = several(text("v"), number(first), number(numel))
        return mapping(("w", tensor(of=storage(text("0"), 6, "FloatStorage", fields))))

    yield "legacy-protocol", lambda: legacy(good, protocol=1002), "old format in protocol 1002"
    yield "legacy-big-endian", lambda: legacy(good, little=b"I00\n"), "does not say that it is little-endian"
    yield "legacy-truncated", lambda: legacy(good, data=SIX_FLOATS[:-1]), "damaged or truncated"
    yield "legacy-trailing", lambda: legacy(good, data=SIX_FLOATS + b"x"), "1 bytes follow"
    yield "legacy-numel", lambda: legacy(good, numel=2**60), "the object says 6"
    yield "legacy-numel-negative", lambda: legacy(good, numel=-1), "the object says 6"
    yield "legacy-no-keys", lambda: legacy(good, keys=listed()), "lists a list of 0 as its storages"
    yield "legacy-other-key", lambda: legacy(good, keys=listed(text("1"))), "'1' twice or without use"
    yield "legacy-key-number", lambda: legacy(good, keys=listed(number(0))), "0 twice or without use"
    yield "legacy-keys-text", lambda: legacy(good, keys=text("0")), "lists '0'"
    yield "legacy-two-types", lambda: legacy(two), "two types or two sizes"
    yield "legacy-view-beyond", lambda: legacy(view(1, 6)), "leaves its storage"
    yield "legacy-view-small", lambda: legacy(view(1, 5)), "leaves its storage of 5"
    yield "legacy-view-negative", lambda: legacy(view(-1, 7)), "has the view"
    yield "legacy-cut-in-pickle", lambda: legacy(good)[:120], "malformed pickle"
    yield "legacy-only-magic", lambda: legacy(good)[:16], "malformed pickle|bare pickle"


def format_attacks() -> Iterator[Case]:
    """Files of other formats under a checkpoint's name."""

    def saved_array(save: Callable[..., None]) -> bytes:
        file = io.BytesIO()
        save(file, np.ones(3))
        return file.getvalue()

    def tar(mode: str) -> bytes:
        file = io.BytesIO()
        with tarfile.open(fileobj=file, mode=mode) as packed:  # type: ignore[call-overload]
            for name in ("storages", "tensors", "pickle"):
                packed.addfile(tarfile.TarInfo(name))
        return file.getvalue()

    yield "empty", lambda: b"", "the file is empty"
    yield "garbage", lambda: b"\xde\xad\xbe\xef" * 64, "its first bytes are"
    yield "garbage-pk", lambda: b"PK" + b"\xaa" * 400, "does not end with its directory"
    yield "garbage-pk34", lambda: b"PK\3\4" + b"\xaa" * 400, "does not end with its directory"
    yield "tar", lambda: tar("w"), "a tar archive"
    yield "tar-gz", lambda: tar("w:gz"), "a gzip archive"
    yield "npy", lambda: saved_array(np.save), "a numpy array"
    yield "npz", lambda: saved_array(np.savez), "exactly one data.pkl; here: none"
    yield "npz-compressed", lambda: saved_array(np.savez_compressed), "is compressed"
    yield "html", lambda: b"<!DOCTYPE html><html>404</html>", "a web page"
    yield "lfs", lambda: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git-lfs pointer"
    yield "hdf5", lambda: b"\x89HDF\r\n\x1a\n" + bytes(100), "an HDF5 file"
    yield "safetensors", lambda: struct.pack("<Q", 2) + b"{}", "a safetensors file under another name"
    yield "bare-pickle", lambda: pickle.dumps({"w": [1.0]}, 2), "a bare pickle of protocol 2"
    yield "bare-payload", lambda: pickle.dumps(Payload(os.system, TOUCH), 2), "a bare pickle of protocol 2"
    yield "bare-payload-p0", lambda: pickle.dumps(Payload(os.system, TOUCH), 0), "its first bytes are"
