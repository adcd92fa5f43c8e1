"""The checks of `ortho doctor`: versions, devices, extras, hub, disk, and a second of arithmetic."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import re
import shutil
import sys
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

__all__ = ["Check", "examine"]

DISTRIBUTION = "ortho-cli"
ALL = "all"  # the extra that is the others together
MODULES = {"opencv-python-headless": "cv2"}  # what other distributions bring, too
OLDEST_TORCH = (2, 10)  # CVE-2026-24747
HUB_SECONDS = 5.0
SELF_TEST_ERROR = 1e-10  # float64 at these sizes errs by 1e-14; 1e-10 is another precision
LOW_DISK_BYTES = 10 * 10**9  # less does not hold one Stable Diffusion checkpoint and its result


@dataclass(frozen=True)
class Check:
    """One line: `ok`, `note` (works without), or `broken`."""

    name: str
    status: str
    found: str
    hint: str | None = None


def examine(*, reach_hub: bool = True) -> list[Check]:
    """Run every check, the quick ones first."""
    return [*_versions(), *_devices(), *_extras(), *_hub(reach_hub), *_disk(), *_arithmetic()]


def _versions() -> Iterator[Check]:
    yield Check("python", "ok", f"{platform.python_version()} ({sys.executable})")
    try:
        core = requirements()[""]
    except importlib.metadata.PackageNotFoundError:
        yield Check(DISTRIBUTION, "note", "not installed: its requirements are not known", "pip install -e .")
        core = ["torch"]
    for name in core:
        version = _version(name)
        if version is None:
            yield Check(name, "broken", "missing", f"pip install {name}")
            continue
        old = name == "torch" and tuple(int(part) for part in version.split(".")[:2]) < OLDEST_TORCH
        yield Check(name, "broken" if old else "ok", version, "pip install 'torch>=2.10'" if old else None)


def requirements() -> dict[str, list[str]]:
    """The distributions that the installed package asks for, by extra; "" are those that it cannot do without.

    Raises:
        PackageNotFoundError: it runs from a source tree that is not installed.
    """
    found: dict[str, list[str]] = {"": []}
    for line in importlib.metadata.requires(DISTRIBUTION) or []:
        name, extra = re.match(r"[\w.-]+", line), re.search(r"extra == ['\"]([\w-]+)", line)
        if name is not None and name[0] != DISTRIBUTION:
            found.setdefault(extra[1] if extra else "", []).append(name[0])
    found.pop(ALL, None)
    return found


def _version(distribution: str) -> str | None:
    """The installed version; None: it is missing."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        module = MODULES.get(distribution)
        return "of another distribution" if module and importlib.util.find_spec(module) else None


def _devices() -> Iterator[Check]:
    import torch

    yield Check("threads", "ok", f"{torch.get_num_threads()} of {os.cpu_count()} cores")
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(index)
            yield Check(f"cuda:{index}", "ok", f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB")
    elif torch.backends.mps.is_available():
        yield Check("device", "ok", "Apple mps")
    else:
        yield Check("device", "note", "no GPU: surgery is as fast, training is slow")


def _extras() -> Iterator[Check]:
    try:
        extras = {extra: names for extra, names in requirements().items() if extra}
    except importlib.metadata.PackageNotFoundError:
        return  # said with the versions
    for extra, names in extras.items():
        missing = [name for name in names if _version(name) is None]
        if missing:
            install = f"pip install '{DISTRIBUTION}[{extra}]'"
            yield Check(f"extra [{extra}]", "note", f"lacks {', '.join(missing)}", install)
        else:
            yield Check(f"extra [{extra}]", "ok", "installed")


def _hub(reach: bool) -> Iterator[Check]:
    from huggingface_hub import constants, get_token

    yield Check("hub cache", "ok", str(constants.HF_HUB_CACHE))
    if get_token() is not None:
        yield Check("hub token", "ok", "present")
    else:
        yield Check("hub token", "note", "none", "hf auth login")
    if constants.HF_HUB_OFFLINE or not reach:
        yield Check("hub", "note", "not tried: offline", "unset HF_HUB_OFFLINE" if constants.HF_HUB_OFFLINE else None)
        return
    try:
        with urllib.request.urlopen(constants.ENDPOINT, timeout=HUB_SECONDS):
            yield Check("hub", "ok", constants.ENDPOINT)
    except OSError as error:  # what urllib raises for names, routes, certificates and HTTP errors alike
        yield Check("hub", "note", f"not reached: {error}", "local files work; check the proxy and HF_ENDPOINT")


def _disk() -> Iterator[Check]:
    free = shutil.disk_usage(Path.cwd()).free
    low = free < LOW_DISK_BYTES
    yield Check(
        "free disk here", "note" if low else "ok", f"{free / 1e9:.1f} GB", "a checkpoint may not fit" if low else None
    )


def _arithmetic() -> Iterator[Check]:
    """Each numerical backend against its own law, at a size that takes milliseconds."""
    import torch

    from ortho_cli.linalg.cayley import cayley
    from ortho_cli.linalg.householder import Householder

    generator = torch.Generator().manual_seed(0)
    vectors = torch.randn(64, 8, generator=generator, dtype=torch.float64)
    weight = torch.randn(32, 64, generator=generator, dtype=torch.float64)
    skew = torch.randn(16, 16, generator=generator, dtype=torch.float64)
    chain = Householder(vectors)

    def reflections() -> float:
        return float((chain.inverse().apply(chain.apply(weight)) - weight).norm() / weight.norm())

    def rotation() -> float:
        turned = cayley((skew - skew.T).unsqueeze(0))[0]
        return float((turned @ turned.T - torch.eye(16, dtype=torch.float64)).norm())

    def decomposition() -> float:
        u, s, vh = torch.linalg.svd(weight, full_matrices=False)
        return float((u * s @ vh - weight).norm() / weight.norm())

    def eigen() -> float:
        gram = weight @ weight.T
        values, basis = torch.linalg.eigh(gram)
        return float((basis * values @ basis.T - gram).norm() / gram.norm())

    laws: dict[str, Callable[[], float]] = {
        "Householder chain": reflections, "Cayley rotation": rotation, "SVD": decomposition, "eigh": eigen,
    }  # fmt: skip
    for name, law in laws.items():
        error = law()
        fine = error < SELF_TEST_ERROR
        hint = None if fine else "reinstall torch"
        yield Check(f"arithmetic: {name}", "ok" if fine else "broken", f"error {error:.0e}", hint)
