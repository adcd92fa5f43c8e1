"""`ortho generate` with Stable Diffusion: what diffusers draws of the same weights, whatever the batch and shard."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from nudged import nudged
from PIL import Image
from tiny_sd import save_pipeline
from typer.testing import CliRunner

from ortho_cli.cli.app import app
from ortho_cli.cli.generate import SCHEDULERS as OFFERED
from ortho_cli.surgery.add_hra import add_hra
from ortho_cli.surgery.convert import convert
from ortho_cli.surgery.merge import merge
from ortho_cli.training.generate_diffusion import CONTROL_MAKER, SCHEDULERS

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # their own imports warn about packages they look for
    diffusers = pytest.importorskip("diffusers")

SIZE, STEPS, GUIDANCE = 64, 2, 3.0
FAST = ("--size", SIZE, "--steps", STEPS, "--guidance", GUIDANCE, "-q")
PROMPTS = ("a cat", "a dog", "a cow")


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("generate")


@pytest.fixture(scope="module")
def base(work: Path) -> Path:
    return save_pipeline(work / "sd")


@pytest.fixture(scope="module")
def ldm(work: Path, base: Path) -> Path:
    convert(base, work / "sd-ldm.safetensors", "ldm")
    return work / "sd-ldm.safetensors"


@pytest.fixture(scope="module")
def adapter(work: Path, base: Path) -> Path:
    """A trained HRA adapter of UNet and text encoder: a PEFT folder of each."""
    add_hra(base, work / "hra", targets=["sd15-control", "**.self_attn.{q,k,v,out}_proj"], rank=4)
    return nudged(work / "hra")


@pytest.fixture(scope="module")
def whole(work: Path, base: Path) -> Path:
    """Three prompts, two pictures of each, in one go."""
    code, out = ortho("generate", base, *prompts(), "--num", 2, "-o", work / "whole", *FAST)
    assert code == 0, out
    return work / "whole"


def ortho(*words: object) -> tuple[int, str]:
    result = CliRunner().invoke(app, [str(word) for word in words])
    return result.exit_code, result.output


def prompts() -> list[str]:
    return [word for prompt in PROMPTS for word in ("--prompt", prompt)]


def pixels(path: Path) -> np.ndarray[Any, np.dtype[np.int16]]:
    with Image.open(path) as picture:
        return np.asarray(picture).astype(np.int16)


def apart(first: Path, second: Path) -> int:
    """The largest difference of two pictures, of 255."""
    return int(np.abs(pixels(first) - pixels(second)).max())


def drawn(work: Path, name: str, *words: object) -> Path:
    """One picture of a cat."""
    folder = work / name
    if not folder.exists():
        code, out = ortho("generate", *words, "--prompt", "a cat", "-o", folder, *FAST)
        assert code == 0, out
    return folder / "000000_0.png"


def test_a_picture_is_what_diffusers_draws(work: Path, base: Path, whole: Path) -> None:
    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(base)
    pipeline.set_progress_bar_config(disable=True)
    expected = pipeline(
        "a cat", num_inference_steps=STEPS, guidance_scale=GUIDANCE, height=SIZE, width=SIZE,
        generator=torch.Generator("cpu").manual_seed(0),
    ).images[0]  # fmt: skip
    expected.save(work / "expected.png")
    assert apart(whole / "000000_0.png", work / "expected.png") <= 1


def test_neither_batch_nor_shard_changes_a_picture(work: Path, base: Path, whole: Path) -> None:
    for shard in ("1/2", "0/2"):
        code, out = ortho(
            "generate", base, *prompts(), "--num", 2, "--batch", 1, "--shard", shard, "-o", work / "parts", *FAST
        )
        assert code == 0, out
    names = sorted(path.name for path in whole.glob("*.png"))
    assert names == [f"00000{prompt}_{again}.png" for prompt in range(3) for again in range(2)]
    assert [path.name for path in sorted((work / "parts").glob("*.png"))] == names
    assert max(apart(whole / name, work / "parts" / name) for name in names) <= 1
    told = [sorted((folder / "manifest.jsonl").read_text().splitlines()) for folder in (whole, work / "parts")]
    assert told[0] == told[1]
    assert min(apart(whole / names[0], whole / name) for name in names[1:]) > 20


def test_a_killed_job_goes_on(work: Path, base: Path, whole: Path) -> None:
    code, out = ortho("generate", base, *prompts(), "-o", work / "killed", *FAST)
    assert code == 0, out
    (work / "killed" / "000001_0.png").unlink()
    kept = (work / "killed" / "000000_0.png").stat().st_mtime_ns
    code, out = ortho("generate", base, *prompts(), "--num", 2, "-o", work / "killed", *FAST[:-1], "--json")
    assert code == 0, out
    assert json.loads(out)["totals"] == {"made": 4, "skipped": 2}
    assert (work / "killed" / "000000_0.png").stat().st_mtime_ns == kept
    assert apart(whole / "000001_1.png", work / "killed" / "000001_1.png") <= 1
    code, out = ortho("generate", base, "--prompt", "a horse", "-o", work / "killed", *FAST)
    assert (code, "prompt was 'a cat', now 'a horse'" in out) == (6, True)
    code, out = ortho("generate", base, *prompts(), "-o", work / "killed", *FAST, "--scheduler", "euler")
    assert (code, "scheduler was 'ddim', now 'euler'" in out) == (6, True)


def test_the_picture_says_what_it_was_drawn_of(work: Path, base: Path, ldm: Path, adapter: Path) -> None:
    path = drawn(work, "told", ldm, "--config", base, "--adapter", f"{adapter}=0.5", "--negative", "blur")
    with Image.open(path) as picture:
        told = dict(picture.text)
    assert told["prompt"] == "a cat"
    assert told["seed"] == "0"
    assert told["base"] == "sd-ldm.safetensors"
    assert told["adapters"] == "hra=0.5"
    assert (told["steps"], told["scheduler"], told["negative"]) == (str(STEPS), "ddim", "blur")
    assert str(work) not in json.dumps(told)
    sheet = (path.parent / "contact-sheet.html").read_text()
    assert '<img src="000000_0.png" alt="a cat"' in sheet


def test_an_adapter_changes_the_picture_by_its_strength(work: Path, base: Path, ldm: Path, adapter: Path) -> None:
    plain, full = drawn(work, "plain", base), drawn(work, "full", base, "--adapter", adapter)
    assert apart(plain, drawn(work, "none", base, "--adapter", f"{adapter}=0")) <= 1
    assert apart(plain, full) > 20
    half = drawn(work, "half", base, "--adapter", f"{adapter}=0.5")
    assert min(apart(half, plain), apart(half, full)) > 2
    assert apart(half, drawn(work, "same", ldm, "--config", base, "--adapter", adapter, "--strength", 0.5)) <= 1
    merge(base, [(adapter, 0.5)], work / "merged-half")
    assert apart(half, drawn(work, "merged", work / "merged-half")) <= 1


def test_a_base_with_reflections_inside_draws_as_with_the_adapter(work: Path, base: Path, ldm: Path) -> None:
    add_hra(ldm, work / "inside.safetensors", targets=["sd15-control"], rank=4, form="checkpoint")
    trained = nudged(work / "inside.safetensors")
    merge(trained, [], work / "folded.safetensors")
    inside = drawn(work, "inside", trained, "--config", base)
    assert apart(inside, drawn(work, "folded", work / "folded.safetensors", "--config", base)) <= 1
    assert apart(inside, drawn(work, "plain", base)) > 20


@pytest.mark.parametrize("form", ["kohya-lora", "diffusers-lora"])
def test_loras_of_every_dialect_go_on(work: Path, base: Path, adapter: Path, form: str) -> None:
    convert(adapter, work / f"{form}.safetensors", form, base=str(base))
    found = drawn(work, form, base, "--adapter", work / f"{form}.safetensors")
    assert apart(found, drawn(work, "full", base, "--adapter", adapter)) <= 1


def test_a_dry_run_counts(base: Path, tmp_path: Path) -> None:
    words = ("--prompt", "a cat", "--num", 5, "--shard", "0/2", "-o", tmp_path / "x", "-n", "--json")
    code, out = ortho("generate", base, *words)
    assert code == 0, out
    plan = json.loads(out)
    assert (plan["files"], plan["of"], plan["prompts"], plan["steps"]) == (3, 5, 1, 50)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "nothing says what to draw"),
        (["--prompt", "a", "--size", "60"], "--size '60' is no size"),
        (["--prompt", "a", "--scheduler", "dimm"], "did you mean 'ddim'"),
        (["--prompt", "a", "--checkpoint", "best"], "--checkpoint is of a run"),
        (["--prompt", "a", "--strength", "0.5"], "--strength is of adapters"),
        (["--prompt", "a", "--traverse"], "for which there is no --traverse"),
    ],
)
def test_what_makes_no_sense_is_refused(base: Path, tmp_path: Path, words: list[str], said: str) -> None:
    code, out = ortho("generate", base, *words, "-o", tmp_path / "x")
    assert (code in (2, 4), said in out.replace("\n", " ")) == (True, True), out
    assert list(tmp_path.iterdir()) == []


def test_the_command_line_offers_what_there_is() -> None:
    assert tuple(SCHEDULERS) == OFFERED
    assert all(hasattr(diffusers, name) for name in SCHEDULERS.values())
    assert {"control", "control_type"} <= CONTROL_MAKER.options
