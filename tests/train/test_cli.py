from __future__ import annotations

import errno
import json
import subprocess
import sys
import types

import pytest
import yaml

from sieve.train import cli
from sieve.train.run import main as train


def test_commands_are_those_whose_modules_are_there(capsys, monkeypatch):
    monkeypatch.setitem(cli.COMMANDS, "nothing", ("sieve.train.nothing", "is not there"))
    monkeypatch.setitem(cli.COMMANDS, "nowhere", ("sieve.nowhere.nothing", "is not there either"))
    assert cli.main(["--help"]) == 0
    usage = capsys.readouterr().out
    assert "  train " in usage and "  compare " in usage and "nothing" not in usage and "nowhere" not in usage
    assert cli.main([]) == 2


@pytest.mark.parametrize(("arguments", "message"), [
    (["trian"], "sieve: trian is no command; did you mean sieve train?"),
    (["qqq"], "sieve: qqq is no command; there are train,"),
    (["steps=3", "seed=1"], "overrides follow a command: sieve train steps=3 seed=1"),
])
def test_an_unknown_command(arguments, message, capsys):
    assert cli.main(arguments) == 2
    assert message in capsys.readouterr().err


def test_arguments_and_exit_code_pass_through(monkeypatch):
    seen = []
    module = types.ModuleType("fake")
    module.main = lambda arguments: seen.append(arguments) or 7
    monkeypatch.setitem(cli.COMMANDS, "fake", ("json", ""))
    monkeypatch.setattr(cli.importlib, "import_module", lambda name: module if name == "json" else None)
    assert cli.main(["fake", "a", "--help"]) == 7
    assert seen == [["a", "--help"]]


def test_a_disk_that_refuses_ends_a_command_in_one_line(monkeypatch, capsys):
    def ends_with(error):
        def fail(arguments):
            raise error

        monkeypatch.setattr(cli.importlib, "import_module", lambda name: types.SimpleNamespace(main=fail))
        return cli.main(["compare", "a", "b"])

    assert ends_with(PermissionError(errno.EACCES, "Permission denied", "/x/y.png")) == 2
    assert ends_with(OSError(errno.ENOSPC, "No space left on device")) == 2
    assert capsys.readouterr().err.splitlines() == [
        "sieve compare: /x/y.png: Permission denied", "sieve compare: No space left on device",
    ]
    for bug in (OSError("what?"), BrokenPipeError(errno.EPIPE, "Broken pipe"), KeyError("key")):
        with pytest.raises(type(bug)):
            ends_with(bug)


def test_a_run_folder_without_room_is_named(tiny_text, tmp_path, capsys, one_rank):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".config.yaml.tmp").symlink_to("/dev/full")
    assert cli.main(["train", *tiny_text, f"runs_dir={tmp_path}", "name=run", "steps=1", "attention=full"]) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith(f"sieve train: {tmp_path}/run: No space left on device; ")


def test_starting_the_command_imports_nothing_slow():
    code = "import sys, json, sieve.train.cli, sieve.train.run; print(json.dumps(sorted(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"torch", "deepspeed", "hydra", "pydantic", "numpy"} & set(json.loads(done.stdout))


def test_train_help_lists_groups_keys_and_defaults(capsys):
    assert train(["--help"]) == 0
    text = capsys.readouterr().out
    assert "model=        1b | base | dense-200m | moe-1b | nsa-27b | small | tiny" in text
    assert "  attention.topk=16 " in text and "  global_batch=8 " in text and "  optim.betas=[0.9,0.95]" in text
    assert "  model.num_layers=(required)" in text
    assert "attention.layers=null" in text and "full|nsa|window" in text
    assert "rows of a step, all processes together" in text


def test_cfg_job_prints_what_would_run(capsys):
    assert train(["--cfg", "job", "steps=7", "attention=[full,nsa]"]) == 0
    config = yaml.safe_load(capsys.readouterr().out)
    assert (config["steps"], config["attention"]["layers"], config["optim"]["clip"]) == (7, ["full", "nsa"], 1.0)
    assert config["name"] == "tiny-full+nsa-python"


@pytest.mark.parametrize("arguments", [
    ["stepz=1"], ["--cfg", "all"], ["steps=x", "dtype=fp16"], ["baseline=nothing", "runs_dir=RUNS"],
    ["device=cuda", "runs_dir=RUNS"], ["data=files", "data.paths=[/nowhere/at/all]", "runs_dir=RUNS"],
    ["runs_dir=/proc/nothing"], ["resume=5", "runs_dir=RUNS"], ["resume=nowhere", "runs_dir=RUNS"],
])
def test_a_mistake_ends_with_code_2_and_no_traceback(arguments, capsys, tmp_path, monkeypatch, one_rank):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert train([argument.replace("RUNS", str(tmp_path)) for argument in arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and "Traceback" not in captured.err
    lines = captured.err.splitlines()
    assert all(line.startswith("sieve train: ") for line in lines) and len(lines) == (2 if "steps=x" in arguments else 1)
    key = arguments[0].split("=")[0] if arguments[0] != "data=files" else "data.paths"
    assert key in captured.err


def test_what_others_raise_is_no_mistake_of_the_user(monkeypatch, tiny_text, tmp_path, one_rank):
    monkeypatch.setattr("sieve.train.build.build_corpus", lambda *arguments: json.loads("{"))
    with pytest.raises(json.JSONDecodeError):
        train([*tiny_text, f"runs_dir={tmp_path}", "steps=1"])


def test_two_processes_of_one_run_are_refused(tiny_text, tmp_path, capsys):
    from sieve.train.run import _only_process

    with _only_process(tmp_path / "run"):
        assert train([*tiny_text, f"runs_dir={tmp_path}", "name=run", "steps=1"]) == 2
    assert "is in use by another process" in capsys.readouterr().err


def test_a_loss_that_is_no_number_fails_the_run(tiny_text, one_rank, tmp_path, capsys):
    command = [*tiny_text, f"runs_dir={tmp_path}", "name=run", "attention=full", "steps=9", "optim.lr=1e18"]
    assert train([*command, "schedule.warmup=0", "optim.clip=0"]) == 1
    error = capsys.readouterr().err
    assert "the loss is " in error and "optim.lr=1e+18" in error and "Traceback" not in error


def test_a_batch_that_does_not_fit_the_processes(tiny_text, tmp_path, capsys, monkeypatch):
    for name, value in {"WORLD_SIZE": "3", "RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    assert train([*tiny_text, f"runs_dir={tmp_path}", "steps=1"]) == 2
    assert "global_batch=4 is not divisible by micro_batch=2 times 3 processes" in capsys.readouterr().err
