"""Hub ids `org/name[@revision][:file]`, fetched through huggingface-hub and its cache.

Only what a verb needs is fetched: one set of weights (safetensors before pickles, the plain variant before others) and
the small files beside them. `HF_HUB_OFFLINE=1` answers from the cache alone.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from ortho_cli.errors import CheckpointError

from .header import printable

__all__ = ["HubId", "choose_files", "fetch", "hub_failures", "parse_hub_id", "reason_of"]

_HUB_ID = re.compile(r"(?P<repo>[\w][\w.-]*/[\w][\w.-]*)(?:@(?P<revision>[\w./-]+))?(?::(?P<file>[^:]+))?")
_SMALL = (".json", ".txt", ".model", ".md", ".jinja")


@dataclass(frozen=True, slots=True)
class HubId:
    """A model on the hub, perhaps at a revision, perhaps one file of it."""

    repo: str
    revision: str | None = None
    file: str | None = None

    def __str__(self) -> str:
        return self.repo + (f"@{self.revision}" if self.revision else "") + (f":{self.file}" if self.file else "")


def parse_hub_id(text: str) -> HubId | None:
    """`text` as a hub id, or None where it cannot be one.

    >>> parse_hub_id("org/name@v1:unet/model.safetensors")
    HubId(repo='org/name', revision='v1', file='unet/model.safetensors')
    >>> parse_hub_id("./folder/file.safetensors") is None
    True
    """
    match = _HUB_ID.fullmatch(text)
    if match is None or (text.endswith((".safetensors", ".ckpt", ".bin", ".pt", ".pth")) and match["file"] is None):
        return None
    return HubId(match["repo"], match["revision"], match["file"])


def fetch(hub: HubId, *, repo_type: str = "model") -> Path:
    """The local path of a hub id: a file or the snapshot folder, downloaded if the cache lacks it.

    Args:
        hub: what to fetch.
        repo_type: `dataset` for a file of a data set.

    Raises:
        CheckpointError: unknown repository, revision or file, no network, or nothing in the cache while offline.
    """
    from huggingface_hub import constants, hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    # Whatever the hub client's network library is (requests, httpx), its errors are the bases of the client's own.
    network: tuple[type[Exception], ...] = HfHubHTTPError.__bases__
    try:
        if hub.file is not None:
            return Path(hf_hub_download(hub.repo, hub.file, revision=hub.revision, repo_type=repo_type))
        return _fetch_cached(hub) if constants.HF_HUB_OFFLINE else _fetch_folder(hub, network)
    except LocalEntryNotFoundError as error:
        beside = Path(hub.repo).parent
        if repo_type == "model" and beside.is_dir():
            raise CheckpointError(
                f"there is no {Path(hub.repo).name} in the folder {beside}, and as a hub id it is not in the cache",
                hint=f"look there: ls {beside}",
            ) from error
        raise CheckpointError(
            f"{hub} is not in the hub cache and the hub cannot be reached",
            hint="unset HF_HUB_OFFLINE, check the network with `ortho doctor`, or give a local path",
        ) from error
    except hub_failures() as error:
        raise CheckpointError(
            f"{hub} cannot be fetched: {reason_of(error)}",
            hint="check the name, the revision and your token (`ortho doctor`), or give a local path",
        ) from error


def _fetch_folder(hub: HubId, network: tuple[type[Exception], ...]) -> Path:
    """The snapshot as the hub has it now; as the cache has it where the hub cannot be reached."""
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError

    try:
        names = HfApi().list_repo_files(hub.repo, revision=hub.revision)
    except network as error:
        if isinstance(error, HfHubHTTPError):  # the hub was reached, and said no
            raise
        return _fetch_cached(hub)
    return Path(snapshot_download(hub.repo, revision=hub.revision, allow_patterns=choose_files(names)))


def _fetch_cached(hub: HubId) -> Path:
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(hub.repo, revision=hub.revision, local_files_only=True))


def hub_failures() -> tuple[type[Exception], ...]:
    """Everything by which the hub client says that it could not: refusals, bad names, and its HTTP library's errors."""
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    return (*HfHubHTTPError.__bases__, HFValidationError, OSError, ValueError)


def reason_of(error: Exception) -> str:
    """One printable line of an error that may be many, or none."""
    return printable((str(error).strip() or type(error).__name__).splitlines()[0][:200])


def choose_files(names: Collection[str]) -> list[str]:
    """Which files of a repository to fetch: per folder one set of weights, and every small file.

    >>> choose_files(["config.json", "model.safetensors", "model.fp16.safetensors", "pytorch_model.bin"])
    ['config.json', 'model.safetensors']
    """
    chosen = [name for name in names if name.endswith(_SMALL)]
    pipeline = "model_index.json" in names
    for folder in sorted({name.rpartition("/")[0] for name in names}):
        if pipeline and not folder:  # single-file copies beside a pipeline would double the download
            continue
        weights = [name for name in names if name.rpartition("/")[0] == folder and _is_weight(name)]
        for rule in (_plain_safetensors, _any_safetensors, _is_weight):
            kept = [name for name in weights if rule(name)]
            if kept:
                chosen += kept
                break
    return sorted(chosen)


def _is_weight(name: str) -> bool:
    return name.endswith((".safetensors", ".bin", ".ckpt", ".pt", ".pth"))


def _any_safetensors(name: str) -> bool:
    return name.endswith(".safetensors")


def _plain_safetensors(name: str) -> bool:
    """`model.safetensors` or `model-00001-of-00002.safetensors`, not `model.fp16.safetensors`."""
    return re.fullmatch(r"(.*/)?[^./]+\.safetensors", name) is not None
