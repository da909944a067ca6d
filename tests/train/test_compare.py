import base64
import json
import re
import struct

import pytest

from sieve.train import cli
from sieve.train.compare import main


def test_the_command_writes_table_png_html_and_json(make_run, capsys) -> None:
    run, baseline = make_run("nsa", offset=0.1, environment={"git": {"diff": "+a <b>\n-c"}}), make_run("full")
    assert main([str(run), "full", "--runs-dir", str(baseline.parent)]) == 0
    out = capsys.readouterr().out
    for part in ("loss at equal tokens", "+0.1000 nats", "loss at equal FLOPs", "loss at equal time", "validation loss",
                 "tokens per second", "peak memory", "equal hashes at 40 common steps", "comparison.html"):
        assert part in out
    folder = run / "report"
    png = (folder / "comparison.png").read_bytes()
    assert png[:8] == b"\x89PNG\r\n\x1a\n" and struct.unpack(">2I", png[16:24]) > (1200, 700)
    page = (folder / "comparison.html").read_text()
    assert base64.b64decode(re.search(r"base64,([^\"]+)", page).group(1)) == png
    assert not re.search(r"(src|href)=\"(?!data:)", page), "the page must need nothing beside it"
    assert "sieve train name=nsa" in page and "+a &lt;b&gt;" in page
    numbers = json.loads((folder / "comparison.json").read_text())
    assert numbers["at_equal_tokens"]["gap"] == pytest.approx(0.1) and numbers["baseline"] == str(baseline)


def test_different_tokens_stand_in_every_output(make_run, capsys, tmp_path) -> None:
    assert main([str(make_run("a", tag="x")), str(make_run("b")), "--out", str(tmp_path / "out")]) == 0
    assert "DIFFERENT tokens" in capsys.readouterr().out
    assert "DIFFERENT tokens" in (tmp_path / "out" / "comparison.html").read_text()
    assert json.loads((tmp_path / "out" / "comparison.json").read_text())["same_tokens"] is False


def test_a_full_disk_is_named(make_run, capsys, tmp_path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "comparison.png").symlink_to("/dev/full")
    assert cli.main(["compare", str(make_run("a")), str(make_run("b")), "--out", str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err.startswith(f"sieve compare: {tmp_path}/out: No space left on device; ")


def test_a_run_of_one_step_without_times_is_still_plotted(make_run, tmp_path) -> None:
    short, long = make_run("short", steps=1), make_run("long")
    row = json.loads((short / "metrics.jsonl").read_text())
    (short / "metrics.jsonl").write_text(json.dumps({k: row[k] for k in ("step", "tokens", "train/loss")}) + "\n")
    for name in ("config.yaml", "environment.json"):
        (short / name).unlink()
    assert main([str(short), str(long), "--out", str(tmp_path / "out")]) == 0
    assert (tmp_path / "out" / "comparison.png").stat().st_size > 10_000


def test_mistakes_end_in_one_line(make_run, capsys) -> None:
    directory = make_run("full")
    assert main(["ful", "full", "--runs-dir", str(directory.parent)]) == 2
    error = capsys.readouterr().err
    assert "did you mean" in error and "Traceback" not in error
    file = directory / "config.yaml"
    assert main([str(directory), str(directory), "--out", str(file)]) == 2
    assert f"--out {file}: {file} is a file, and a folder is needed" in capsys.readouterr().err
