"""`sieve eval`, and the tasks that a run measures on the way."""

import json

import pytest
import torch

from sieve.eval import runner
from sieve.train import evaluate, export
from sieve.train.load import open_model
from sieve.train.mistakes import ConfigError
from sieve.train.overrides import load_config
from sieve.train.run import run


def test_a_run_measures_tasks_and_is_evaluated(one_rank, tiny_text, tmp_path, capsys, monkeypatch):
    config = load_config([
        *tiny_text, f"runs_dir={tmp_path}", "name=r", "steps=2", "attention=nsa", "eval.every=2", "eval.tasks=[mqar,copy]",
        "eval.recall.pairs=[4]", "eval.recall.lengths=[8]", "eval.recall.samples=2",
    ])
    assert run(config) == 0
    last = json.loads((tmp_path / "r" / "metrics.jsonl").read_text().splitlines()[-1])
    assert 0 <= last["eval/mqar_pairs_0004"] <= 1 and last["eval/mqar"] == last["eval/mqar_pairs_0004"]
    assert "eval/copy_len_0008" in last and "eval/loss" in last
    arguments = ["r", f"runs_dir={tmp_path}", "suite=[loss,mqar,copy]", "recall.pairs=[4]", "recall.lengths=[8]",
                 "recall.samples=2", "loss.max_tokens=300"]
    capsys.readouterr()
    assert evaluate.main(arguments) == 0
    out = capsys.readouterr().out
    data = json.loads((tmp_path / "r" / "report" / "eval" / "results.json").read_text())
    overall = {name: data["metrics"][name] for name in ("eval/loss", "eval/bits_per_byte", "eval/mqar", "eval/copy")}
    assert "loss by document length" in out and all(f"{name} {value:.4f}" in out for name, value in overall.items())
    # The same weights and the same examples as at the run's last evaluation.
    assert data["metrics"]["eval/mqar"] == last["eval/mqar"] and data["metrics"]["eval/copy"] == last["eval/copy"]
    assert data["about"]["checkpoint"] == "r" and data["about"]["commit"]

    def cut(task, *rest, **options):
        if task == "copy":
            raise KeyboardInterrupt
        return synthetic(task, *rest, **options)

    synthetic = runner.synthetic
    monkeypatch.setattr(runner, "synthetic", cut)
    assert evaluate.main([*arguments, f"out={tmp_path / 'cut'}"]) == 130
    there = json.loads((tmp_path / "cut" / "results.json").read_text())
    assert list(there["tasks"]) == ["loss", "mqar"] and there["metrics"]["eval/mqar"] == data["metrics"]["eval/mqar"]


def test_a_mixture_is_evaluated_by_source_in_the_phase_it_ended_in(mixture, one_rank, tmp_path, capsys):
    config = load_config([
        *mixture, f"runs_dir={tmp_path}", "name=m", "steps=5", "attention=nsa", "eval.every=5", "eval.tasks=[copy,needle]",
        "eval.recall.lengths=[30]", "eval.recall.samples=4", "eval.needle.lengths=[128]", "eval.needle.depths=[0.5]",
        "eval.needle.samples=2", "eval.needle.digits=2",
    ])
    assert run(config) == 0
    last = json.loads((tmp_path / "m" / "metrics.jsonl").read_text().splitlines()[-1])
    assert {"eval/letters/loss", "eval/pairs/loss", "eval/loss", "eval/copy", "eval/needle_len_0128"} <= last.keys()
    model = open_model("m", str(tmp_path), torch.device("cpu"), torch.float32).loaded
    assert model.seq_len == 128 and model.decoder.config.rope.scaling.factor == 2
    assert export.main([str(tmp_path / "m"), str(tmp_path / "exported")]) == 0
    exported = json.loads((tmp_path / "exported" / "config.json").read_text())
    assert exported["max_position_embeddings"] == 128 and exported["model"]["rope"]["scaling"]["factor"] == 2
    assert evaluate.main(["m", f"runs_dir={tmp_path}", "suite=[loss,copy]", "recall.lengths=[30]", "recall.samples=4",
                          "loss.max_tokens=400"]) == 0
    assert "loss by source" in capsys.readouterr().out
    results = json.loads((tmp_path / "m" / "report" / "eval" / "results.json").read_text())
    # Random tokens that the stretched rotary embedding tells apart: another one gives another loss.
    assert results["metrics"]["eval/copy_loss"] == pytest.approx(last["eval/copy_loss"], rel=1e-5)
    by_source = {row["source"]: row for row in results["tasks"]["loss"]["tables"]["loss by source"]}
    assert by_source.keys() == {"letters", "pairs"} and all(100 < row["tokens"] < 200 for row in by_source.values())
    total = sum(row["tokens"] * row["loss"] for row in by_source.values()) / sum(row["tokens"] for row in by_source.values())
    assert results["metrics"]["eval/loss"] == pytest.approx(total)
    assert results["metrics"]["eval/pairs/loss"] == by_source["pairs"]["loss"]


@pytest.fixture
def moved(one_rank, tiny_text, tmp_path, monkeypatch):
    """moved(attention): the folder of a run after one step, moved since to "elsewhere"; it is not in the working directory."""

    def moved(attention="nsa"):
        settings = [*tiny_text, f"runs_dir={tmp_path}", "name=r", "steps=1", "eval.every=0"]
        assert run(load_config([*settings, f"attention={attention}"])) == 0
        (tmp_path / "r").rename(tmp_path / "elsewhere")
        (tmp_path / "here").mkdir()
        monkeypatch.chdir(tmp_path / "here")
        return tmp_path / "elsewhere"

    return moved


COPY = ["suite=[copy]", "recall.lengths=[8]", "recall.samples=1"]


def test_results_go_where_the_model_lies(moved, tmp_path):
    folder = moved()
    (checkpoint,) = (folder / "checkpoints").iterdir()
    for opened in (folder, checkpoint):
        assert evaluate.main([str(opened), *COPY]) == 0
        there = sorted(path.name for path in (folder / "report" / "eval").iterdir())
        assert there == ["report.html", "results.json"]
        (folder / "report" / "eval" / "results.json").unlink()
    assert not (tmp_path / "r").exists() and not any((tmp_path / "here").iterdir())
    alone = checkpoint.rename(tmp_path / "alone")
    assert evaluate.main([str(alone), *COPY]) == 0
    assert (tmp_path / "here" / "eval-alone" / "results.json").is_file()


def test_evaluations_add_up_in_a_folder(moved):
    folder = moved()
    where = folder / "report" / "eval"
    settings = [str(folder), "loss.max_tokens=100", "recall.pairs=[4]", "recall.samples=1", "recall.lengths=[8]"]
    found = []
    for suite in ("loss,copy", "mqar", "copy"):
        assert evaluate.main([*settings, f"suite=[{suite}]", f"seed={len(found)}"]) == 0
        found.append(json.loads((where / "results.json").read_text()))
    first, second, third = found
    assert list(second["tasks"]) == list(third["tasks"]) == ["loss", "copy", "mqar"]
    assert third["tasks"]["loss"] == second["tasks"]["loss"] == first["tasks"]["loss"]
    assert first["metrics"].items() <= second["metrics"].items() and "eval/mqar" in second["metrics"]
    seeds = {task: entry["about"]["settings"]["seed"] for task, entry in third["tasks"].items()}
    assert seeds == {"loss": 0, "copy": 2, "mqar": 1}
    assert third["metrics"]["eval/copy_loss"] == third["tasks"]["copy"]["metrics"]["eval/copy_loss"]
    assert third["metrics"]["eval/copy_loss"] != first["metrics"]["eval/copy_loss"]
    page = (where / "report.html").read_text()
    assert [f"<h2>{task}</h2>" in page for task in ("loss", "copy", "mqar")] == [True] * 3
    assert f"eval/loss {third['metrics']['eval/loss']:.4f}, eval/bits_per_byte" in page and "image/png" in page
    (where / "results.json").write_text("{")
    assert evaluate.main([*settings, "suite=[copy]"]) == 2
    assert (where / "results.json").read_text() == "{"


@pytest.mark.parametrize("overrides, message", [
    (["suite=neddle"], "did you mean needle"),
    (["needle.lenghts=[5]"], r"needle.lenghts=\[5\]: unknown key; did you mean needle.lengths"),
    (["needle.samples=0"], "needle.samples=0: must be greater than 0|needle.samples=0"),
    (["suite"], "suite: is not KEY=VALUE"),
    (["suite=[]"], r"suite=\[\]: names no task; there are standard, .*, needle"),
    (["recall.pairs=[1]"], "recall.pairs"),
    (["recall.pairs=1"], r"recall.pairs=\[1\]: must be counts|recall.pairs=1: must be counts"),
    (["needle.lengths=abc"], r"needle.lengths\[0\]=abc: must be a valid integer|needle.lengths=abc: must be a valid integer"),
    (["needle.lengths=null"], r"needle.lengths=null: must be a list, as \[...\]"),
    (["needle.lengths=true"], r"needle.lengths=true: must be a list, as \[true\]"),
])
def test_users_mistakes(overrides, message):
    with pytest.raises(ConfigError, match=message):
        evaluate.parse(overrides)


def test_a_single_value_is_a_list_of_one():
    found = evaluate.parse(["needle.lengths=100", "needle.depths=0.5", "recall.pairs=4", "loss.source=/tmp/x.txt",
                            "health.larger_topk=32", "harness.tasks=gsm8k", "suite=needle"])
    assert found == evaluate.parse(["needle.lengths=[100]", "needle.depths=[0.5]", "recall.pairs=[4]",
                                    "loss.source=[/tmp/x.txt]", "health.larger_topk=[32]",
                                    "harness.tasks=[gsm8k]", "suite=needle"])
    assert load_config(["eval.needle.lengths=100"]).eval.needle.lengths == (100,)


def test_results_need_a_folder(moved, tmp_path, capsys):
    (tmp_path / "file").write_text("kept")
    for out in (tmp_path / "file", tmp_path / "file" / "in"):
        assert evaluate.main(["nowhere", f"out={out}"]) == 2  # before the model is looked for
        assert capsys.readouterr().err == f"sieve eval: out={out}: {tmp_path / 'file'} is a file, and a folder is needed; " \
            "give another name\n"
    folder = moved("full")
    (folder / "report").write_text("kept")
    assert evaluate.main([str(folder), *COPY]) == 2
    captured = capsys.readouterr()
    assert f"{folder / 'report'} is a file" in captured.err and "copy" not in captured.out


def test_mistakes_of_the_command(capsys):
    assert evaluate.main([]) == 2 and "which model?" in capsys.readouterr().err
    assert evaluate.main(["nowhere", "suite=recall"]) == 2 and "nowhere is neither" in capsys.readouterr().err
    assert evaluate.main(["--help"]) == 0
    out = capsys.readouterr().out
    assert "needle.lengths=[1024,2048,4096,8192]" in out and "standard" in out
    assert evaluate.main(["nowhere", "--cfg", "job", "needle.keys=3"]) == 0 and "keys: 3" in capsys.readouterr().out


def test_needles_longer_than_the_rows_are_refused(tiny_text, mixture):
    with pytest.raises(ConfigError, match="eval.needle.lengths has 8192, more than seq_len=128"):
        load_config([*mixture, "eval.tasks=[needle]"])
    with pytest.raises(ConfigError, match="eval.needle.lengths has 8192, more than seq_len=64"):
        load_config([*tiny_text, "eval.tasks=[needle]"])
