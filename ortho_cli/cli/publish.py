"""Upload a result to the Hugging Face hub."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import typer

from ortho_cli.errors import OutputError, UsageError

__all__ = ["check_upload", "publish"]


def check_upload(repo: str) -> None:
    """Refuse, before any work, an upload that cannot succeed.

    Raises:
        UsageError: no name that a repository can have.
        OutputError: the hub is switched off, or nobody is logged in.
    """
    from huggingface_hub import constants, get_token

    from ortho_cli.checkpoints.hub import HubId, parse_hub_id

    if parse_hub_id(repo) != HubId(repo):
        raise UsageError(f"--push-to-hub {repo!r} is no repository's name", hint="write it as ORG/NAME")
    later = f"leave --push-to-hub out and upload later: hf upload {repo} OUTPUT"
    if constants.HF_HUB_OFFLINE:
        raise OutputError("nothing can be uploaded: HF_HUB_OFFLINE is set", hint=f"unset it, or {later}")
    if get_token() is None:
        raise OutputError("nothing can be uploaded: no token", hint=f"log in with: hf auth login; or {later}")


def publish(output: Path, repo: str, *, private: bool, command: str, ignore: Sequence[str] = ()) -> None:
    """Create the repository if need be and upload a file, or a folder without what matches the globs `ignore`.

    Raises:
        OutputError: no token, no network, or the hub refused; the local result stays where it is.
    """
    from huggingface_hub import HfApi

    from ortho_cli.checkpoints.hub import hub_failures, reason_of

    api = HfApi()
    try:
        api.create_repo(repo, private=private, exist_ok=True)
        if output.is_dir():
            link = api.upload_folder(
                repo_id=repo, folder_path=output, commit_message=command, ignore_patterns=list(ignore) or None
            )
        else:
            link = api.upload_file(
                repo_id=repo, path_or_fileobj=output, path_in_repo=output.name, commit_message=command
            )
    except hub_failures() as error:
        raise OutputError(
            f"{output} is written; the upload to {repo} failed: {reason_of(error)}",
            hint=f"`ortho doctor` looks at the hub and your token; then: hf upload {repo} {output}",
        ) from error
    typer.echo(f"uploaded to {link}", err=True)
