"""The Slurm scripts with a Slurm of a few lines: what reaches srun, containers, and going on after a time limit."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

SCRIPTS = Path(__file__).parents[2] / "recipes" / "slurm"
TRAIN, INTERACTIVE = SCRIPTS / "train.sbatch", SCRIPTS / "interactive.sbatch"

# srun: notes its options and runs the command; as the real one, it passes a SIGTERM on to its task.
SRUN = """#!/usr/bin/env bash
printf '%s\\n' "$@" > "$LOG/srun.args"
while [[ $1 == --* ]]; do shift; done
"$@" & task=$!
trap 'kill -TERM $task' TERM
code=0; wait $task || code=$?
while kill -0 $task 2>/dev/null; do code=0; wait $task || code=$?; done
exit $code
"""
# accelerate: notes its arguments; the first time it trains until it is told to stop, the second time it ends well.
ACCELERATE = """#!/usr/bin/env bash
printf '%s\\n' "$@" > "$LOG/accelerate.args"
echo "$VIRTUAL" > "$LOG/environment"
if [[ " $* " == *" --resume "* || -n $QUICK ]]; then exit ${QUICK:-0}; fi
mkdir -p "$RUN"; touch "$RUN/recipe.yaml"
trap 'touch "$RUN/saved"; exit 130' TERM
while :; do sleep 0.05; done
"""
NOTES = """#!/usr/bin/env bash
printf '%s\\n' "$@" > "$LOG/$(basename "$0").args"
"""
APPTAINER = (
    NOTES
    + """while [[ $1 != *.sif ]]; do shift; done
shift; exec "$@"
"""
)


class Cluster:
    def __init__(self, folder: Path) -> None:
        self.folder, self.log, self.bin = folder, folder / "log", folder / "bin"
        self.log.mkdir()
        self.bin.mkdir()
        programs = {"srun": SRUN, "accelerate": ACCELERATE, "scontrol": NOTES, "apptainer": APPTAINER}
        for name, text in programs.items():
            (self.bin / name).write_text(text)
            (self.bin / name).chmod(0o755)
        kept = {key: value for key, value in os.environ.items() if not key.startswith(("SLURM", "RUN_DIR", "VENV"))}
        self.environment = {
            **kept, "PATH": f"{self.bin}:{os.environ['PATH']}", "LOG": str(self.log), "SLURM_JOB_ID": "4711",
            "SLURM_GPUS_ON_NODE": "4", "RUN": str(folder / "runs" / "r-4711"),
        }  # fmt: skip

    def start(self, script: Path, *words: str, **environment: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            ["bash", str(script), *words], cwd=self.folder, env={**self.environment, **environment}, text=True,
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip

    def run(self, script: Path, *words: str, **environment: str) -> tuple[int, str]:
        process = self.start(script, *words, **environment)
        output, _ = process.communicate(timeout=60)
        return process.returncode, output

    def told(self, program: str) -> list[str]:
        return (self.log / f"{program}.args").read_text().splitlines()


@pytest.fixture
def cluster(tmp_path: Path) -> Cluster:
    return Cluster(tmp_path)


@pytest.mark.parametrize("script", [TRAIN, INTERACTIVE], ids=lambda path: path.name)
def test_bash_understands_them(script: Path) -> None:
    subprocess.run(["bash", "-n", script], check=True)
    assert max(map(len, script.read_text().splitlines())) <= 120


def test_what_reaches_srun_and_accelerate(cluster: Cluster) -> None:
    code, output = cluster.run(TRAIN, "r.yaml", "--set", "data.path=/a b", QUICK="0", SLURM_JOB_NUM_NODES="2",
                               SLURM_NODEID="1", SLURMD_NODENAME="node7")  # fmt: skip
    assert code == 0, output
    assert cluster.told("srun")[:3] == ["--ntasks=2", "--ntasks-per-node=1", "--kill-on-bad-exit=1"]
    launched = cluster.told("accelerate")
    assert "--multi_gpu" in launched  # or nodes of one GPU each would train alone
    launched.remove("--multi_gpu")
    options = dict(zip(launched[1:-7:2], launched[2:-7:2], strict=False))
    assert launched[0] == "launch" and options["--num_machines"] == "2" and options["--num_processes"] == "8"
    assert options["--machine_rank"] == "1" and options["--main_process_ip"] == "node7"
    assert launched[-7:] == ["ortho_cli", "train", "r.yaml", "--set", "run.dir=runs/r-4711", "--set", "data.path=/a b"]


def test_a_failure_keeps_its_exit_code_and_is_not_repeated(cluster: Cluster) -> None:
    assert cluster.run(TRAIN, "r.yaml", QUICK="5")[0] == 5
    assert not (cluster.log / "scontrol.args").exists()


def test_a_job_at_its_time_limit_saves_is_queued_again_and_goes_on(cluster: Cluster) -> None:
    job = cluster.start(TRAIN, "r.yaml")
    run = cluster.folder / "runs" / "r-4711"
    until = time.monotonic() + 30
    while not (run / "recipe.yaml").exists():
        assert time.monotonic() < until and job.poll() is None
        time.sleep(0.02)
    job.send_signal(signal.SIGUSR1)  # as --signal=B:USR1 does
    output, _ = job.communicate(timeout=60)
    assert job.returncode == 0 and (run / "saved").exists(), output
    assert cluster.told("scontrol") == ["requeue", "4711"] and "goes on in runs/r-4711" in output
    assert "--resume" not in cluster.told("accelerate")
    (cluster.log / "scontrol.args").unlink()
    code, output = cluster.run(TRAIN, "r.yaml")  # Slurm starts the same job again
    assert code == 0, output
    assert cluster.told("accelerate")[-1] == "--resume" and not (cluster.log / "scontrol.args").exists()


def test_containers(cluster: Cluster) -> None:
    code, output = cluster.run(TRAIN, "r.yaml", QUICK="0", CONTAINER="enroot", IMAGE="nvcr.io#x", MOUNTS="/data,/more")
    assert code == 0, output
    here = cluster.folder
    assert cluster.told("srun")[3:6] == [
        "--container-image=nvcr.io#x", f"--container-mounts={here}:{here},/data:/data,/more:/more",
        f"--container-workdir={here}",
    ]  # fmt: skip
    code, output = cluster.run(TRAIN, "r.yaml", QUICK="0", CONTAINER="apptainer", IMAGE="x.sif", MOUNTS="/data")
    assert code == 0, output
    assert cluster.told("apptainer")[:6] == ["exec", "--nv", "--bind", f"{here},/data", "--pwd", str(here)]
    assert cluster.told("accelerate")[0] == "launch"
    for script in (TRAIN, INTERACTIVE):
        code, output = cluster.run(script, "r.yaml", CONTAINER="docker")
        assert code == 2 and "none of enroot, apptainer, none" in output
        code, output = cluster.run(script, "r.yaml", CONTAINER="enroot")
        assert code != 0 and "CONTAINER=enroot needs IMAGE" in output
    code, output = cluster.run(TRAIN)
    assert code != 0 and "usage: sbatch train.sbatch RECIPE" in output


def test_the_environment_is_activated_on_the_node(cluster: Cluster) -> None:
    (cluster.folder / "venv" / "bin").mkdir(parents=True)
    (cluster.folder / "venv" / "bin" / "activate").write_text("export VIRTUAL=there\n")
    assert cluster.run(TRAIN, "r.yaml", QUICK="0", VENV=str(cluster.folder / "venv"))[0] == 0
    assert (cluster.log / "environment").read_text().strip() == "there"


def test_the_interactive_script_by_hand_and_submitted(cluster: Cluster) -> None:
    code, output = cluster.run(INTERACTIVE, "echo", "a b", SLURM_JOB_ID="", OPTIONS="--partition=dev")
    assert code == 0 and output == "a b\n"
    told = cluster.told("srun")
    assert "--gpus-per-node=1" in told and "--partition=dev" in told and "--pty" in told
    job = cluster.start(INTERACTIVE, CONTAINER="enroot", IMAGE="a image")
    assert job.stdout is not None
    line = job.stdout.readline()
    assert line.startswith("reach it with: srun --jobid=4711 --overlap --pty --container-image=a\\ image")
    job.terminate()
    job.communicate(timeout=30)
    assert job.returncode == -signal.SIGTERM


def test_one_process_needs_no_launcher(cluster: Cluster) -> None:
    (cluster.bin / "python").write_text(NOTES)
    (cluster.bin / "python").chmod(0o755)
    code, output = cluster.run(TRAIN, "r.yaml", PROCESSES="1")
    assert code == 0, output
    assert cluster.told("python") == ["-m", "ortho_cli", "train", "r.yaml", "--set", "run.dir=runs/r-4711"]
    assert not (cluster.log / "accelerate.args").exists()


@pytest.fixture
def real(cluster: Cluster) -> Callable[..., tuple[list[str], dict[str, str], Path]]:
    """The real Python and launcher on the cluster: a small run's words, environment and folder."""
    for name, words in (("accelerate", "-m accelerate.commands.accelerate_cli "), ("python", "")):
        (cluster.bin / name).write_text(f'#!/usr/bin/env bash\nexec {sys.executable} {words}"$@"\n')
        (cluster.bin / name).chmod(0o755)

    def arrange(processes: int, epochs: int) -> tuple[list[str], dict[str, str], Path]:
        sets = ["model={name: mlp, hidden: [8]}", "methods=[]", "data.batch=512", "train.threads=1"]
        words = [word for text in (*sets, f"train.epochs={epochs}") for word in ("--set", text)]
        job = str(os.getpid())  # of which the port is made
        places = {"PROCESSES": str(processes), "ACCELERATE_USE_CPU": "true", "SLURM_JOB_ID": job}
        return ["quickstart", *words], places, cluster.folder / "runs" / f"quickstart-{job}"

    return arrange


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_a_real_run_by_the_script(cluster: Cluster, real: Callable[..., Any], processes: int) -> None:
    words, places, run = real(processes, epochs=1)
    code, output = cluster.run(TRAIN, *words, **places)
    assert code == 0, output
    assert json.loads((run / "outcome.json").read_text())["step"] == 2


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("told", ["task", "group"])
def test_a_real_run_saves_before_its_job_ends(
    cluster: Cluster, real: Callable[..., Any], told: str, processes: int
) -> None:
    """Whether Slurm tells the task alone or all of its group, the job waits until what trains has saved."""
    if told == "group":
        group = SRUN.replace("bash\n", "bash\nset -m\n", 1).replace("kill -TERM $task", "kill -TERM -- -$task")
        (cluster.bin / "srun").write_text(group)
    words, places, run = real(processes, epochs=100000)
    job = cluster.start(TRAIN, *words, **places)
    until = time.monotonic() + 120
    while not (run / "metrics.jsonl").exists() or (run / "metrics.jsonl").read_text().count("\n") < 5:
        assert time.monotonic() < until and job.poll() is None
        time.sleep(0.05)
    job.send_signal(signal.SIGUSR1)
    output, _ = job.communicate(timeout=120)
    assert job.returncode == 0 and list((run / "checkpoints").glob("step-*")), output
    assert 0 < output.find("; the state is saved") < output.find("is queued again"), output
