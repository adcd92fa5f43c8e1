"""Which imports of a pickle are known, which are strange but harmless, and which are refused on sight.

Nothing is imported or called whatever the answer: the verdict only decides what the user is told.
"""

from __future__ import annotations

from ortho_cli.checkpoints.tensors import TORCH_DTYPES
from ortho_cli.errors import CheckpointError

__all__ = ["DTYPE_GLOBALS", "STORAGE_DTYPES", "admit", "full_name", "is_known"]

# Names that Python 2, and Python 3 below protocol 3, write for modules of today (pickle's own `fix_imports`).
_ALIASES = {"__builtin__": "builtins", "copy_reg": "copyreg", "commands": "subprocess"}

# No weight needs these; a file that imports them was made to run something.
_FORBIDDEN = frozenset(
    {"os", "posix", "nt", "subprocess", "sys", "importlib", "runpy", "socket", "shutil", "ctypes", "pty"}
)
_BUILTINS = frozenset(
    {"bool", "bytearray", "bytes", "complex", "dict", "float", "frozenset", "int", "list", "object", "range", "set"}
    | {"slice", "str", "tuple", "long", "unicode", "xrange"}  # the last three: Python 2
)

# The dtype behind each storage class; None: raw bytes, typed by the tensor that uses them.
STORAGE_DTYPES: dict[str, str | None] = {
    f"{module}.{name}Storage": dtype
    for module in ("torch", "torch.cuda")
    for name, dtype in {
        "Bool": "BOOL", "Byte": "U8", "Char": "I8", "Short": "I16", "Int": "I32", "Long": "I64",
        "Half": "F16", "BFloat16": "BF16", "Float": "F32", "Double": "F64", "ComplexFloat": "C64",
    }.items()
} | {"torch.storage.UntypedStorage": None, "torch.UntypedStorage": None}  # fmt: skip

DTYPE_GLOBALS = {f"torch.{name}": dtype for dtype, name in TORCH_DTYPES.items()}

_KNOWN = (
    frozenset({"collections.OrderedDict", "collections.defaultdict", "_codecs.encode", "copyreg._reconstructor"})
    | {"torch.Size", "torch.device", "torch.Tensor", "torch._tensor.Tensor", "torch._tensor._rebuild_from_type_v2"}
    | {"torch.nn.parameter.Parameter", "torch.ComplexDoubleStorage", "torch.complex128"}
    | {"numpy.dtype", "numpy.ndarray"}
    | {f"numpy.{core}.multiarray.{name}" for core in ("core", "_core") for name in ("scalar", "_reconstruct")}
    | {"numpy.core.numeric._frombuffer", "numpy._core.numeric._frombuffer"}
    | STORAGE_DTYPES.keys()
    | DTYPE_GLOBALS.keys()
)


def full_name(module: str, name: str) -> str:
    """The full name of an import, under today's module name; unprintable characters are shown escaped."""
    path = f"{_ALIASES.get(module, module)}.{name}"
    return path if path.isprintable() else ascii(path)


def admit(module: str, name: str) -> str:
    """The full name of an import that may stand in a checkpoint.

    Raises:
        CheckpointError: a module that runs things (also as part of a dotted name), a builtin outside the allow-list,
            a copyreg extension (a number that stands for an import), or what is no Python name at all.
    """
    path = full_name(module, name)
    root = path.partition(".")[0]
    parts = name.split(".")
    if (
        root in _FORBIDDEN
        or not _FORBIDDEN.isdisjoint(parts)
        or (root == "builtins" and name not in _BUILTINS)
        or path.startswith("copyreg.extension_")
    ):
        raise CheckpointError(
            f"the pickle imports {path[:200]}, which no weight file needs: it may have been made to run code "
            "(none was run)",
            hint="open it with nothing else; list every import with: ortho inspect FILE --globals",
        )
    if not all(part.isidentifier() for part in (*module.split("."), *parts)):
        raise CheckpointError(f"the pickle imports {path[:200]}, which is no Python name")
    return path


def is_known(path: str) -> bool:
    """Whether an admitted import belongs to how torch and numpy write data; all others are inert placeholders."""
    return path in _KNOWN or path.startswith(("builtins.", "torch._utils._rebuild_", "numpy.dtypes."))
