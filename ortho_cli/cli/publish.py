"""Upload a result to the Hugging Face hub."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import typer

from ortho_cli.errors import OutputError

__all__ = ["publish"]


def publish(output: Path, repo: str, *, private: bool, command: str, ignore: Sequence[str] = ()) -> None:
    """Create the repository if need be and upload a file, or a folder without what matches the globs `ignore`.

    Raises:
        OutputError: no token, no network, or the hub refused; the local result stays where it is.
    """
    from huggingface_hub import HfApi, constants

    from ortho_cli.checkpoints.hub import hub_failures, reason_of

    if constants.HF_HUB_OFFLINE:
        raise OutputError(
            f"{output} is written; it was not uploaded because HF_HUB_OFFLINE is set",
            hint=f"unset it and run: hf upload {repo} {output}",
        )
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
            hint="check your token with ortho doctor (log in with: hf auth login)",
        ) from error
    typer.echo(f"uploaded to {link}", err=True)
