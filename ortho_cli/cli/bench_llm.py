"""`ortho bench llm`: a whole language model with HRA, LoRA and OFT."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from ortho_cli.cli.completion import presets, words
from ortho_cli.cli.options import JsonOption
from ortho_cli.errors import UsageError, check_choice

__all__ = ["bench_llm"]


def bench_llm(
    model: Annotated[
        str | None, typer.Argument(metavar="[MODEL]", help="A folder or hub id; default: a LLaMA of random weights.")
    ] = None,
    config: Annotated[
        list[str] | None,
        typer.Option("--config", metavar="NAME=N", help="Size of the random LLaMA, e.g. hidden_size=2048; repeatable."),
    ] = None,
    rank: Annotated[int, typer.Option("--rank", min=2, help="Reflections, and the LoRAs' rank; even.")] = 8,
    targets: Annotated[
        list[str] | None,
        typer.Option("--targets", metavar="PATTERN|PRESET", autocompletion=presets, help="Adapted layers."),
    ] = None,
    batch: Annotated[int, typer.Option("--batch", min=1, help="Rows of tokens in a step.")] = 2,
    length: Annotated[int, typer.Option("--length", min=2, help="Tokens of a row.")] = 256,
    dtype: Annotated[
        str, typer.Option("--dtype", autocompletion=words("fp32", "bf16"), help="fp32 or bf16, of the frozen weights.")
    ] = "fp32",
    checkpointing: Annotated[
        bool, typer.Option("--checkpointing", help="Recompute activations, as large models are trained.")
    ] = False,
    rounds: Annotated[int, typer.Option("--rounds", min=1, help="Each adapter runs this often, shuffled.")] = 7,
    threads: Annotated[int, typer.Option("--threads", min=1, help="CPU threads.")] = 2,
    device: Annotated[str, typer.Option("--device", help="Where to train, e.g. cuda.")] = "cpu",
    as_json: JsonOption = False,
) -> None:
    """A training step of a language model: tokens a second and memory with HRA, LoRA, and PEFT's LoRA, HRA and OFT.

    Example: ortho bench llm --config hidden_size=512 --config num_hidden_layers=8

    All adapters stand on the same frozen weights. Where PEFT is installed, both HRAs are first held to equal logits.
    """
    check_choice("--dtype", dtype, ("fp32", "bf16"))
    sizes = dict(map(_size, config or []))
    from ortho_cli.cli.show import console_out, print_json, show_notes, table
    from ortho_cli.training.llm_benchmark import measure_llm, missing_peers

    settings: dict[str, Any] = {
        "rank": rank, "targets": targets or ["auto"], "batch": batch, "length": length, "dtype": dtype,
        "checkpointing": checkpointing, "rounds": rounds, "threads": threads, "device": device,
    }  # fmt: skip
    found = measure_llm(model, sizes=sizes, **settings)
    if as_json:
        details = [each.as_dict() for each in found]
        command = {"command": "bench llm", "model": model, "config": sizes}
        print_json({**command, **settings, "details": details, "notes": missing_peers()})
        return
    rows = [
        (
            each.name,
            f"{each.trained:,}",
            f"{each.tokens / each.median:,.0f}",
            f"{each.ratio:.3f}",
            f"{each.kept_bytes / 2**20:.1f}",
            f"{each.kept_ratio:.3f}",
            "-" if each.peak_bytes is None else f"{each.peak_bytes / 2**20:.0f}",
        )
        for each in found
    ]
    headings = ["adapter", "parameters", "tokens/s", "x LoRA", "kept MiB", "x LoRA", "peak MiB"]
    table(console_out(), headings, rows)
    show_notes(console_out(), missing_peers())


def _size(text: str) -> tuple[str, int]:
    name, _, value = text.partition("=")
    if not name or not value.isdecimal():
        raise UsageError(f"--config {text!r}: expected NAME=N", hint="e.g. --config hidden_size=2048")
    return name, int(value)
