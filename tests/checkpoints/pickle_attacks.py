"""A corpus of pickled checkpoints made to run code, to lie about their data, or to exhaust the reader.

Each must end in one CheckpointError, whose message must match the pattern given beside the case, and must run nothing:
the payloads would create the file `ortho-canary` in the working directory.
"""

from __future__ import annotations

import os
import pickle
import struct
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from pickle_assembler import (
    OPEN,
    TOUCH,
    Case,
    Payload,
    archive,
    called,
    checkpoint,
    imported,
    legacy,
    mapping,
    members,
    number,
    pickle_of,
    several,
    storage,
    storage_of,
    tensor,
    text,
    zipped,
)
from pickle_file_attacks import format_attacks, legacy_attacks, zip_attacks
from pickle_tensor_attacks import tensor_attacks, weight_attacks


def _code() -> Iterator[Case]:
    """Calls of what runs code, in every protocol, inside the weights and beside them."""
    run = r"imports \S+, which no weight file needs"
    for protocol in range(6):
        for name, payload in (("system", Payload(os.system, TOUCH)), ("exec", Payload(exec, OPEN))):
            inside = pickle.dumps({"state_dict": {"w": payload}}, protocol)
            beside = pickle.dumps({"callbacks": [{"x": (payload,)}], "state_dict": {}}, protocol)
            yield f"{name}-p{protocol}-inside", partial(_packed, inside), run
            yield f"{name}-p{protocol}-beside", partial(_packed, beside), run
    targets = {
        "os": ("os", "system"), "nt": ("nt", "system"), "posix": ("posix", "fork"), "os-path": ("os.path", "os.system"),
        "eval": ("builtins", "eval"), "eval2": ("__builtin__", "eval"), "import": ("builtins", "__import__"),
        "compile": ("builtins", "compile"), "getattr": ("builtins", "getattr"), "open": ("builtins", "open"),
        "type": ("builtins", "type"), "globals": ("builtins", "globals"), "setattr": ("builtins", "setattr"),
        "popen": ("subprocess", "Popen"), "commands": ("commands", "getoutput"), "sys": ("sys", "exit"),
        "importlib": ("importlib", "import_module"), "runpy": ("runpy", "run_path"), "socket": ("socket", "socket"),
        "shutil": ("shutil", "rmtree"), "ctypes": ("ctypes.util", "find_library"), "pty": ("pty", "spawn"),
        "dotted": ("collections", "abc.sys.modules"), "through-torch": ("torch", "os.system"),
    }  # fmt: skip
    for name, (module, attribute) in targets.items():
        for protocol in (2, 4):
            fragment = called(module, attribute, text(TOUCH), protocol=protocol)
            yield f"{name}-p{protocol}-inside", partial(checkpoint, ("x", fragment), protocol=protocol), run
            yield f"{name}-p{protocol}-beside", partial(checkpoint, beside=fragment, protocol=protocol), run
    yield "bare-reference", lambda: checkpoint(beside=imported("os", "system")), run
    yield "as-key", lambda: checkpoint((imported("os", "system"), number(1))), run
    yield "inst", lambda: checkpoint(beside=b"(" + text(TOUCH) + b"ios\nsystem\n"), run
    yield "obj", lambda: checkpoint(beside=b"(" + imported("os", "system") + text(TOUCH) + b"o"), run
    yield "newobj", lambda: checkpoint(beside=imported("os", "system") + several(text(TOUCH)) + b"\x81"), run
    yield "newobj-ex", lambda: checkpoint(beside=imported("os", "system") + several(text(TOUCH)) + b"}\x92"), run
    yield (
        "names-from-memo",
        lambda: checkpoint(beside=text("os") + b"q\7" + text("system") + b"q\x0800h\7h\x08\x93"),
        run,
    )
    chain = called("builtins", "getattr", called("builtins", "__import__", text("os")), text("system"))
    yield "getattr-chain", lambda: checkpoint(beside=chain + several(text(TOUCH)) + b"R"), run
    yield "storage-class", lambda: checkpoint(("x", tensor(of=storage_of(imported("os", "system"))))), run
    for code in (b"\x82\1", b"\x83\1\0", b"\x84\1\0\0\0"):
        yield f"ext-{code[0]:x}", partial(checkpoint, beside=code), "copyreg.extension_1"
    yield "legacy-object", lambda: legacy(mapping(("w", called("os", "system", text(TOUCH))))), run
    yield "legacy-keys", lambda: legacy(mapping(("w", tensor())), keys=called("os", "system", text(TOUCH))), run
    yield "legacy-system", lambda: legacy(b"}", little=called("os", "system", text(TOUCH))), run


def _packed(pickle: bytes) -> bytes:
    return zipped(members(pickle))


def _machine() -> Iterator[Case]:
    """Opcodes that reach for the reader's own state, or are no pickle."""
    malformed = "malformed pickle"
    ordered = imported("collections", "OrderedDict")
    rebuild = imported("torch._utils", "_rebuild_tensor_v2")
    state = mapping(("__call__", called("builtins", "dict")))
    yield "build-on-class", lambda: checkpoint(beside=ordered + state + b"b"), "attributes set on collections.Ordered"
    yield "build-on-function", lambda: checkpoint(beside=rebuild + state + b"b"), "attributes set on torch._utils"
    yield "build-slots-on-class", lambda: checkpoint(beside=ordered + several(b"N", state) + b"b"), "attributes set on"
    yield "build-on-list", lambda: checkpoint(beside=b"]" + state + b"b"), "attributes set on a list"
    yield "build-on-storage", lambda: checkpoint(beside=storage() + state + b"b"), "attributes set on a storage"
    yield "setitem-on-class", lambda: checkpoint(beside=ordered + text("a") + b"Ns"), "put into collections.OrderedDict"
    yield "append-to-class", lambda: checkpoint(beside=ordered + b"Na"), "put into collections.OrderedDict"
    yield "append-to-tuple", lambda: checkpoint(beside=b")Na"), "put into a tuple of 0"
    yield "call-of-text", lambda: checkpoint(beside=text("os.system") + b")R"), "a call of 'os.system'"
    yield "call-with-list", lambda: checkpoint(beside=ordered + b"]R"), malformed
    yield "import-of-number", lambda: checkpoint(beside=number(1) + text("x") + b"\x93"), "whose name is no string"
    yield "import-of-nothing", lambda: checkpoint(beside=imported("", "")), "no Python name"
    yield "import-of-space", lambda: checkpoint(beside=imported("torch", "x; import os")), "no Python name"
    yield "import-of-escape", lambda: checkpoint(beside=imported("torch", "\x1b[2J", 4)), "no Python name"
    yield "import-of-private-use", lambda: checkpoint(beside=imported("a\u202eb", "c", 4)), r"a\\u202eb"
    yield "underflow", lambda: archive(b"0000"), malformed
    yield "no-mark", lambda: archive(b"tNN"), malformed
    yield "tuple-underflow", lambda: archive(b"N\x87"), malformed
    yield "memo-unset", lambda: archive(b"h\x09"), "memo 9 was never set"
    yield "odd-dict", lambda: archive(b"(NNNd"), malformed
    yield "unknown-opcode", lambda: archive(b"\xff"), malformed
    yield "protocol-6", lambda: archive(b"}", 6), "PROTO 6 does not belong"
    yield "buffer", lambda: archive(b"\x97"), "NEXT_BUFFER"
    yield "no-stop", lambda: zipped(members(b"\x80\2}")), malformed
    yield "empty-pickle", lambda: zipped(members(b"")), malformed
    yield (
        "trailing-pickle",
        lambda: zipped(members(pickle_of(b"}") + b"cos\nsystem\n.")),
        "follow the end of the pickle",
    )
    yield "bytes-lie", lambda: archive(b"\x8e" + struct.pack("<Q", 2**62) + b"x"), malformed
    yield "long-lie", lambda: archive(b"\x8b" + struct.pack("<i", -1)), malformed
    yield "digits", lambda: archive(b"L" + b"9" * 100_000 + b"L\n"), malformed
    yield "bad-utf8", lambda: archive(b"X\2\0\0\0\xff\xff"), malformed
    yield "deep-lists", lambda: archive(b"]" * 200_000 + b"a" * 199_999), "holds a list of 1"
    yield "deep-tuples", lambda: archive(b")" + b"\x85" * 200_000), "holds a tuple of 1"
    yield "deep-parameters", lambda: checkpoint(("x", _nested_parameters(100_000))), "a parameter made of None"
    yield "billion-laughs-name", lambda: checkpoint((_laughs(60), tensor())), "named a tuple of 2"
    yield "cycle", lambda: archive(b"}q\0" + text("state_dict") + b"h\0s"), "more than 8 dicts in one another"
    yield "cyclic-list", lambda: archive(b"]q\0h\0a"), "holds a list"


def _laughs(levels: int) -> bytes:
    """A tuple of two equal tuples of two equal tuples ...: hashing, comparing or printing it takes 2**levels steps."""
    return b")" + b"".join(b"2\x86" for _ in range(levels))


def _nested_parameters(levels: int) -> bytes:
    rebuild = imported("torch._utils", "_rebuild_parameter") + b"q\x050"
    return rebuild + b"h\5" * levels + b"N" + b"\x85R" * levels


def all_attacks() -> list[Case]:
    """Every case that is a file's contents."""
    groups = (_code, _machine, zip_attacks, legacy_attacks, format_attacks, tensor_attacks, weight_attacks)
    return [case for group in groups for case in group()]


def write_attacks(folder: Path) -> Iterator[tuple[str, Path]]:
    """Write every attack into a folder: its name, and the path to open (a file, a folder, a pipe, or nothing)."""
    for number_, (name, contents, _) in enumerate(all_attacks()):
        path = folder / f"{number_:03d}.ckpt"
        path.write_bytes(contents())
        yield name, path
    yield "missing", folder / "missing.ckpt"
    (folder / "folder.ckpt").mkdir()
    yield "folder", folder / "folder.ckpt"
    if hasattr(os, "mkfifo"):
        os.mkfifo(folder / "pipe.ckpt")
        yield "pipe", folder / "pipe.ckpt"
