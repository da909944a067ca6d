import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from rich.console import Console

from sieve.train.twin import Child, Plan, main, run_twin

# Stands for `python -m sieve.train`: trains a step each 20 ms, saves at a signal, goes on from what it saved.
TRAINER = """
import json, pathlib, signal, sys, time
values = dict(a.split("=", 1) for a in sys.argv[1:])
run = pathlib.Path(values["runs_dir"]) / values["name"]
run.mkdir(parents=True, exist_ok=True)
stop = []
for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, lambda *a: stop.append(1))
(run / "started").write_text("")
metrics, steps = run / "metrics.jsonl", int(values["steps"])
done = len(metrics.read_text().splitlines()) if metrics.exists() else 0
with metrics.open("a") as file:
    for step in range(done + 1, steps + 1):
        time.sleep(0.02)
        row = {"step": step, "tokens": step, "train/loss": 5 / step, "data/tokens_hash": str(step)}
        print(json.dumps(row), file=file)
        if stop:
            (run / "stopped").write_text(str(len(stop)))
            break
sys.exit(int(values.get("code", 0)))
"""


@pytest.fixture
def trainer(tmp_path: Path) -> list[str]:
    (tmp_path / "trainer.py").write_text(TRAINER)
    return [sys.executable, str(tmp_path / "trainer.py")]


def plan(tmp_path: Path, *overrides: str) -> Plan:
    return Plan.of([f"runs_dir={tmp_path}/runs", "steps=12", *overrides], variant="nsa", cuda=False)


def test_the_preset_follows_the_hardware_unless_one_is_given() -> None:
    assert "experiment=twin-cpu" in Plan.of([], variant="nsa", cuda=False).full
    assert "experiment=twin-gpu" in Plan.of([], variant="nsa", cuda=True).sparse
    assert "experiment=twin-cpu" in Plan.of(["device=cpu"], variant="nsa", cuda=True).full
    given = Plan.of(["experiment=mine"], variant="nsa", cuda=True)
    assert [o for o in given.full if o.startswith("experiment=")] == ["experiment=mine"]


def test_overrides_go_to_the_runs_they_are_for() -> None:
    given = ["name=try", "steps=5", "attention.topk=8", "attention.output_gate=true", "model=tiny"]
    made = Plan.of(given, variant="nsa", cuda=False)
    common, gate = ("experiment=twin-cpu", "steps=5", "model=tiny"), "attention.output_gate=true"
    assert made.full == (*common, gate, "attention=full", "name=try-full")
    assert made.sparse == (
        *common, "attention.topk=8", gate, "attention=nsa", "name=try-nsa", "baseline=runs/try-full",
    )
    assert Plan.of([], variant="window", cuda=False).sparse[-3:-1] == ("attention=window", "name=twin-window")


def test_each_pair_has_a_comparison_of_its_own() -> None:
    nsa, window = (Plan.of(["name=try"], variant=variant, cuda=False) for variant in ("nsa", "window"))
    assert nsa.full_dir == window.full_dir
    assert (nsa.report_dir, window.report_dir) == (Path("runs/try"), Path("runs/try/window"))


@pytest.mark.parametrize("override", ["attention=full", "baseline=runs/x"])
def test_what_the_twin_decides_cannot_be_overridden(override: str) -> None:
    with pytest.raises(ValueError, match=override):
        Plan.of([override], variant="nsa", cuda=False)


def test_a_mistake_ends_in_one_line(capsys) -> None:
    assert main(["attention=full"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("sieve twin: attention=full") and error.count("\n") == 1


def test_both_runs_then_the_comparison_in_both_places(tmp_path: Path, trainer: list[str]) -> None:
    terminal = Console(file=io.StringIO(), width=120)
    assert run_twin(plan(tmp_path), Child(), terminal, trainer) == 0
    for folder in ("twin", "twin-nsa/report"):
        for name in ("comparison.png", "comparison.html", "comparison.json"):
            assert (tmp_path / "runs" / folder / name).stat().st_size > 100
    text = terminal.file.getvalue()
    assert text.index("twin-full") < text.index("twin-nsa") < text.index("loss at equal tokens")


def test_a_failed_run_ends_the_twin_with_its_code(tmp_path: Path, trainer: list[str]) -> None:
    terminal = Console(file=io.StringIO(), width=120)
    assert run_twin(plan(tmp_path, "code=3"), Child(), terminal, trainer) == 3
    assert not (tmp_path / "runs" / "twin-nsa").exists()


DRIVER = """
import sys
from pathlib import Path
from rich.console import Console
from sieve.train.twin import Child, Plan, run_twin
child = Child()
child.install()
plan = Plan.of(sys.argv[2:], variant="nsa", cuda=False)
sys.exit(run_twin(plan, child, Console(), [sys.executable, sys.argv[1]]))
"""


def wait_for(path: Path, seconds: float = 60.0) -> None:
    until = time.monotonic() + seconds
    while not path.exists():
        assert time.monotonic() < until, f"{path} did not appear"
        time.sleep(0.02)


def test_a_signal_stops_the_run_once_and_the_same_command_resumes(tmp_path: Path, trainer: list[str]) -> None:
    command = [sys.executable, "-c", DRIVER, trainer[1], f"runs_dir={tmp_path}/runs", "steps=60"]
    full = tmp_path / "runs" / "twin-full"
    first = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True)
    wait_for(full / "started")
    time.sleep(0.2)
    os.killpg(first.pid, signal.SIGINT)  # as Ctrl-C does: to all of the terminal's foreground group
    out, _ = first.communicate(timeout=60)
    assert first.returncode == 0 and "the same command goes on" in out
    assert (full / "stopped").read_text() == "1"
    done = len((full / "metrics.jsonl").read_text().splitlines())
    assert 0 < done < 60 and not (tmp_path / "runs" / "twin-nsa").exists()
    again = subprocess.run(command, stdout=subprocess.PIPE, text=True, timeout=120)
    assert again.returncode == 0 and "loss at equal tokens" in again.stdout
    steps = [json.loads(line)["step"] for line in (full / "metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(1, 61))


def test_a_killed_twin_leaves_no_run_behind(tmp_path: Path, trainer: list[str]) -> None:
    command = [sys.executable, "-c", DRIVER, trainer[1], f"runs_dir={tmp_path}/runs", "steps=3000"]
    twin = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    wait_for(tmp_path / "runs" / "twin-full" / "started")
    twin.kill()
    twin.wait(timeout=30)
    wait_for(tmp_path / "runs" / "twin-full" / "stopped", 30)
