"""The Slurm scripts, run by bash with a Slurm of the test's own: what they start, and do when they are warned."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).resolve().parents[2] / "cluster/slurm"
# Each writes down what it was asked; srun's stands for a step on the nodes, which scancel ends. A step hears SIGINT,
# what a shell starts with & does not, hence the other signal.
PROGRAMS = {
    "srun": 'echo "srun $*" >> log; echo $$ > step; exec sleep 60',
    "scancel": 'echo "scancel $*" >> log; kill -TERM "$(cat step)"',
    "scontrol": 'if [ "$1" = show ]; then echo first; sleep 0.1; echo second; else echo "scontrol $*" >> log; fi',
}
WAIT_S = 20


@pytest.fixture
def job(tmp_path: Path) -> Callable[..., subprocess.Popen[bytes]]:
    """Return a function that starts a script as sbatch would, in the folder of a project."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name, text in PROGRAMS.items():
        (folder / name).write_text(f"#!/bin/bash\n{text}\n", encoding="utf-8")
        (folder / name).chmod(0o755)
    (tmp_path / ".venv/bin").mkdir(parents=True)
    (tmp_path / ".venv/bin/activate").touch()

    def start(script: str, *words: str) -> subprocess.Popen[bytes]:
        environment = {"PATH": f"{folder}{os.pathsep}{os.environ['PATH']}", "HOME": "/home/me"}
        environment |= {"SLURM_JOB_ID": "17", "SLURM_JOB_NODELIST": "n[1-2]"}
        bash = shutil.which("bash")
        assert bash
        return subprocess.Popen([bash, str(SCRIPTS / script), *words], cwd=tmp_path, env=environment)

    return start


def wait_for(holds: Callable[[], bool]) -> None:
    until = time.monotonic() + WAIT_S
    while not holds():
        assert time.monotonic() < until
        time.sleep(0.01)


@pytest.mark.parametrize(
    ("script", "words", "started", "told"),
    [
        (
            "train.sbatch",
            ["x.yaml", "--runs", "/home/me/runs"],
            "srun ray symmetric-run --address first:6379 --min-nodes 4 --num-cpus 32 --num-gpus 4 -- "
            "env RAY_ADDRESS=first:6379 python tune.py --space x.yaml --runs /home/me/runs",
            ["scancel --signal=INT 17.0", "scontrol requeue 17"],
        ),
        (
            "evaluate.sbatch",
            ["spark", "best"],
            "srun python -m workloads evaluate spark best --out /home/me/runs/spark-evaluate",
            ["scontrol requeue 17"],
        ),
        (
            "predict.sbatch",
            ["spark", "best", "images"],
            "srun python -m search predict spark best images --out /home/me/runs/spark-predict "
            "--workers 4 --cpus-per-worker 8 --gpus-per-worker 1",
            ["scontrol requeue 17"],
        ),
    ],
)
@pytest.mark.row("C3")
def test_a_warned_script_puts_itself_in_the_queue_again(
    job: Callable[..., subprocess.Popen[bytes]],
    tmp_path: Path,
    script: str,
    words: list[str],
    started: str,
    told: list[str],
) -> None:
    process = job(script, *words)
    try:
        wait_for((tmp_path / "step").exists)
        wait_for(lambda: bool((tmp_path / "step").read_text().strip()))
        process.send_signal(signal.SIGUSR1)
        process.wait(WAIT_S)
    finally:
        process.kill()
        with_step = (tmp_path / "step").read_text().strip()
        if with_step and Path(f"/proc/{with_step}").exists():
            os.kill(int(with_step), signal.SIGKILL)
    assert (tmp_path / "log").read_text().splitlines() == [started, *told]


@pytest.mark.row("C3")
def test_a_search_that_fails_fails_its_job(job: Callable[..., subprocess.Popen[bytes]], tmp_path: Path) -> None:
    (tmp_path / "bin/srun").write_text("#!/bin/bash\nexit 2\n")
    assert job("train.sbatch", "x.yaml").wait(WAIT_S) == 2
