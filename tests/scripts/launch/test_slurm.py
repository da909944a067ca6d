"""The SLURM job, with stand-ins for srun, scontrol and Python that tell what they were called with."""

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

JOB = Path(__file__).parents[3] / "scripts" / "launch" / "slurm.sh"
STANDINS = {
    "scontrol": 'echo "$@" >>"$TOLD"; [ "$1" = show ] && echo node7 || true',
    # like srun: passes SIGTERM on to the task, and ends with it
    "srun": 'shift; "$@" & task=$!; trap "kill -TERM $task" TERM; wait $task; code=$?; '
            'kill -0 $task 2>/dev/null && { wait $task; code=$?; }; exit $code',
    "trainer": 'echo "$@" $RANK/$WORLD_SIZE $LOCAL_RANK $MASTER_ADDR:$MASTER_PORT >>"$TOLD"; '
               'trap "exit 0" TERM; [ -n "$LONG" ] && for i in $(seq 300); do sleep 0.1; done; exit "${CODE:-0}"',
}


@pytest.fixture
def job(tmp_path):
    for name, text in STANDINS.items():
        (tmp_path / name).write_text(f"#!/usr/bin/env bash\n{text}\n")
        (tmp_path / name).chmod(0o755)
    told = tmp_path / "told"
    told.touch()
    environment = os.environ | {
        "PATH": f"{tmp_path}:{os.environ['PATH']}", "TOLD": str(told), "PYTHON": "trainer", "LONG": "", "SLURM_JOB_ID": "4711",
        "SLURM_JOB_NODELIST": "node[7-8]", "SLURM_PROCID": "3", "SLURM_LOCALID": "1", "SLURM_NTASKS": "16",
    }  # fmt: skip
    environment.pop("MASTER_ADDR", None)
    environment.pop("MASTER_PORT", None)

    def start(**changes):
        return subprocess.Popen([str(JOB), "name=long", "zero=2"], env=environment | changes)

    return start, told


def test_a_run_that_finishes_is_not_requeued(job):
    start, told = job
    assert start().wait(20) == 0
    assert told.read_text().splitlines() == [
        "show hostnames node[7-8]", "-m sieve.train name=long zero=2 3/16 1 node7:24711",
    ]


def test_a_run_that_fails_keeps_its_code(job):
    start, told = job
    assert start(CODE="3").wait(20) == 3 and "requeue" not in told.read_text()


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
def test_near_the_time_limit_the_ranks_save_and_the_job_is_requeued(job, number):
    start, told = job
    process = start(LONG="1")
    until = time.monotonic() + 20
    while "sieve.train" not in told.read_text() and time.monotonic() < until:
        time.sleep(0.05)
    process.send_signal(number)
    assert process.wait(20) == 0
    assert told.read_text().splitlines()[-1] == "requeue 4711"
