"""`ortho bench`: measure on your own machine, side by side with the plain alternative."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from ortho_cli.cli.bench_bases import bench_nog, bench_polar, bench_stability, numbers
from ortho_cli.cli.bench_geometry import bench_geometry
from ortho_cli.cli.bench_llm import bench_llm
from ortho_cli.cli.bench_whiten import bench_whiten
from ortho_cli.cli.completion import presets, words
from ortho_cli.cli.options import JsonOption
from ortho_cli.errors import UsageError, check_choice

__all__ = ["app"]

HEAD_WIDTH = 64  # of a vision transformer

app = typer.Typer(help="Measure on your own machine, beside the plain alternative.", no_args_is_help=True)


@app.callback()
def _bench() -> None:
    pass


@app.command("surgery")
def bench_surgery(
    checkpoint: Annotated[str, typer.Argument(metavar="CHECKPOINT", help="A .safetensors file; it is only read.")],
    rounds: Annotated[int, typer.Option("--rounds", min=1, help="Each command runs this often, shuffled.")] = 5,
    targets: Annotated[
        list[str] | None,
        typer.Option("--targets", metavar="PATTERN|PRESET", autocompletion=presets, help="As for add-hra."),
    ] = None,
    folder: Annotated[
        Path | None, typer.Option("--folder", help="Where the outputs go for a moment; default beside the input.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Time and memory of add-hra and merge on your checkpoint, against copying the file.

    Example: ortho bench surgery v1-5-pruned.safetensors
    """
    from ortho_cli.cli.show import console_out, print_json, table
    from ortho_cli.cli.stopwatch import measure_surgery

    results = measure_surgery(Path(checkpoint), rounds=rounds, targets=targets or [], folder=folder)
    if as_json:
        listed = [result.as_dict() for result in results]
        print_json({"command": "bench surgery", "details": listed})
        return
    rows = [
        (
            result.name,
            f"{result.median:.2f}",
            f"{result.ratio:.2f}",
            f"{result.lowest:.2f} - {result.highest:.2f}",
            f"{result.peak_bytes / 2**20:.0f}",
        )
        for result in results
    ]
    table(console_out(), ["command", "median s", "x copy", "range s", "peak MiB"], rows)


@app.command("gor")
def bench_gor(
    rounds: Annotated[int, typer.Option("--rounds", min=1, help="Each form runs this often, shuffled.")] = 30,
    groups: Annotated[
        int, typer.Option("--groups", min=1, help="Groups a layer at most; 1 is full orthogonality.")
    ] = 32,
    mode: Annotated[
        str, typer.Option("--mode", autocompletion=words("inter", "intra"), help="inter or intra.")
    ] = "inter",
    threads: Annotated[int, typer.Option("--threads", min=1, help="CPU threads.")] = 2,
    device: Annotated[str, typer.Option("--device", help="Where the weights are, e.g. cuda.")] = "cpu",
    as_json: JsonOption = False,
) -> None:
    """Group orthogonality on ResNet-110's convolutions, penalty and gradient, against the loop over layers.

    Example: ortho bench gor
    """
    check_choice("--mode", mode, ("inter", "intra"))
    from ortho_cli.cli.show import console_out, print_json, table
    from ortho_cli.methods.gor_benchmark import measure_gor

    results = measure_gor(rounds=rounds, groups=groups, mode=mode, threads=threads, device=device)
    if as_json:
        listed = [result.as_dict() for result in results]
        print_json({"command": "bench gor", "details": listed})
        return
    rows = [
        (result.name, f"{result.median * 1e3:.2f}", f"{min(result.seconds) * 1e3:.2f}", f"{result.speedup:.2f}")
        for result in results
    ]
    table(console_out(), ["form", "median ms", "fastest ms", "x faster"], rows)


@app.command("hra")
def bench_hra(
    device: Annotated[str, typer.Option("--device", help="Where to train, e.g. cuda.")] = "cpu",
    dims: Annotated[
        str, typer.Option("--dims", metavar="N,...", help="Widths of the frozen layer.")
    ] = "320,768,1280,2048,4096",
    tokens: Annotated[str, typer.Option("--tokens", metavar="N,...", help="Rows of its input.")] = "512,4096",
    ranks: Annotated[str, typer.Option("--ranks", metavar="N,...", help="Reflections, and the LoRAs' rank.")] = "8,32",
    dtype: Annotated[
        str, typer.Option("--dtype", autocompletion=words("fp32", "bf16"), help="fp32 or bf16, of the frozen layer.")
    ] = "fp32",
    rounds: Annotated[int, typer.Option("--rounds", min=1, help="Each layer runs this often at most, shuffled.")] = 50,
    seconds: Annotated[float, typer.Option("--seconds", min=0, help="Enough time for one size.")] = 10.0,
    input_grad: Annotated[
        bool, typer.Option("--input-grad/--no-input-grad", help="Whether the input needs a gradient.")
    ] = True,
    as_json: JsonOption = False,
) -> None:
    """A training step of one HRA layer, in time and memory, against LoRA and PEFT's HRA.

    Example: ortho bench hra --dims 768,4096 --tokens 512
    """
    check_choice("--dtype", dtype, ("fp32", "bf16"))
    sizes = [numbers(name, text) for name, text in (("--dims", dims), ("--tokens", tokens), ("--ranks", ranks))]
    from ortho_cli.cli.show import console_out, print_json, show_notes, table
    from ortho_cli.methods.hra_benchmark import OURS, measure_hra, missing_peers, summary

    settings: dict[str, Any] = {
        "dtype": dtype, "rounds": rounds, "seconds": seconds, "input_grad": input_grad, "device": device,
    }  # fmt: skip
    cases = list(measure_hra(*sizes, **settings))
    if as_json:
        details = [case.as_dict() for case in cases]
        notes = missing_peers()
        print_json({"command": "bench hra", **settings, "details": details, "totals": summary(cases), "notes": notes})
        return
    totals = summary(cases)
    rows: list[list[object]] = [
        [case.dim, case.tokens, case.rank, f"{case.steps[OURS].median * 1e3:.2f}"]
        + [f"{case.ratios()[peer]:.3f}" for peer in totals]
        for case in cases
    ]
    for which in ("median", "highest"):
        rows.append([which, "-", "-", "-", *(f"{spread[which]:.3f}" for spread in totals.values())])
    table(console_out(), ["dim", "tokens", "rank", f"{OURS} ms", *(f"x {peer}" for peer in totals)], rows)
    show_notes(console_out(), missing_peers())


@app.command("frobenius")
def bench_frobenius(
    rounds: Annotated[int, typer.Option("--rounds", min=1, help="Each decay runs this often, shuffled.")] = 30,
    batch: Annotated[int, typer.Option("--batch", min=1, help="Pictures in the training step.")] = 128,
    target_ratio: Annotated[
        float, typer.Option("--target-ratio", min=0, max=1, help="Parameters of the factored network over the dense.")
    ] = 0.1,
    threads: Annotated[int, typer.Option("--threads", min=1, help="CPU threads.")] = 2,
    device: Annotated[str, typer.Option("--device", help="Where to train, e.g. cuda.")] = "cpu",
    as_json: JsonOption = False,
) -> None:
    """Frobenius decay of a factored ResNet32x2, against its training step and against autograd.

    Example: ortho bench frobenius
    """
    from ortho_cli.cli.show import console_out, print_json, table
    from ortho_cli.methods.frobenius_benchmark import measure_frobenius

    results = measure_frobenius(rounds=rounds, batch=batch, target_ratio=target_ratio, threads=threads, device=device)
    if as_json:
        print_json({"command": "bench frobenius", "details": [result.as_dict() for result in results]})
        return
    rows = [
        (result.name, f"{result.median * 1e3:.2f}", f"{result.share:.2%}", f"{result.speedup:.1f}")
        for result in results[1:]
    ]
    step = results[0]
    table(
        console_out(),
        ["form", "median ms", "of a step", "x faster"],
        [(step.name, f"{step.median * 1e3:.2f}", "", ""), *rows],
    )


@app.command("factorize")
def bench_factorize(
    rounds: Annotated[int, typer.Option("--rounds", min=1, help="Each way runs this often, shuffled.")] = 3,
    rank_scale: Annotated[float, typer.Option("--rank-scale", min=0, max=1, help="Share of the full rank.")] = 0.25,
    rank: Annotated[int, typer.Option("--rank", min=1, help="The same rank for all layers.")] = 32,
    every: Annotated[
        int, typer.Option("--every", min=1, help="Take one layer of so many of each shape; 1 takes minutes a round.")
    ] = 8,
    as_json: JsonOption = False,
) -> None:
    """Factorising the 160 attention linears of Stable Diffusion 1.5, against torch.linalg.svd of each.

    Example: ortho bench factorize --every 1
    """
    from ortho_cli.cli.show import console_out, print_json, table
    from ortho_cli.methods.factorize_benchmark import measure_factorize

    results = measure_factorize(rounds=rounds, rank_scale=rank_scale, rank=rank, every=every)
    if as_json:
        print_json({"command": "bench factorize", "details": [result.as_dict() for result in results]})
        return
    rows = [
        (result.name, f"{result.median:.2f}", f"{result.speedup:.1f}", f"{result.excess:+.3%}") for result in results
    ]
    table(console_out(), ["way", "median s", "x faster", "squared error over the least"], rows)


@app.command("oialr")
def bench_oialr(
    device: Annotated[str, typer.Option("--device", help="Where to train, e.g. cuda.")] = "cpu",
    dims: Annotated[
        str, typer.Option("--dims", metavar="N,...", help="Widths of the blocks, multiples of 64.")
    ] = "768",
    rank_share: Annotated[
        float, typer.Option("--rank-share", min=0.001, max=1, help="Rank of every core over the width.")
    ] = 0.15,
    depth: Annotated[int, typer.Option("--depth", min=1, help="Blocks.")] = 2,
    tokens: Annotated[int, typer.Option("--tokens", min=1, help="Tokens of a picture.")] = 197,
    batch: Annotated[int, typer.Option("--batch", min=1, help="Pictures in the training step.")] = 8,
    rounds: Annotated[int, typer.Option("--rounds", min=1, help="Each form runs this often, shuffled.")] = 10,
    threads: Annotated[int, typer.Option("--threads", min=1, help="CPU threads.")] = 2,
    as_json: JsonOption = False,
) -> None:
    """A training step of transformer blocks with frozen bases (OIALR), in time and memory, against the dense step.

    Example: ortho bench oialr --dims 768,1024
    """
    widths = numbers("--dims", dims)
    odd = [dim for dim in widths if dim % HEAD_WIDTH]
    if odd:
        raise UsageError(f"--dims {odd[0]} is no multiple of {HEAD_WIDTH}, the width of a head")
    from ortho_cli.cli.show import console_out, print_json, table
    from ortho_cli.training.oialr_benchmark import measure_oialr

    settings: dict[str, Any] = {
        "rank_share": rank_share, "depth": depth, "tokens": tokens, "batch": batch, "rounds": rounds,
        "threads": threads, "device": device,
    }  # fmt: skip
    found = list(measure_oialr(widths, **settings))
    if as_json:
        print_json({"command": "bench oialr", **settings, "details": [each.as_dict() for each in found]})
        return
    rows: list[list[object]] = [
        [each.dim, each.name, "-" if each.rank is None else each.rank, f"{each.median * 1e3:.1f}", f"{each.ratio:.3f}"]
        + [f"{size / 2**20:.1f}" for size in (each.held_bytes, each.activation_bytes)]
        for each in found
    ]
    headings = ["width", "blocks", "rank", "median ms", "x dense", "gradients and moments MiB", "activations MiB"]
    table(console_out(), headings, rows)


app.command("geometry")(bench_geometry)
app.command("llm")(bench_llm)
app.command("polar")(bench_polar)
app.command("nog")(bench_nog)
app.command("stability")(bench_stability)
app.command("whiten")(bench_whiten)
