"""`python -m ortho_cli`, which is also what `accelerate launch -m ortho_cli train R.yaml` starts."""

from ortho_cli.cli.app import main

__all__ = ["main"]

if __name__ == "__main__":
    main()
