"""Runs with results, with losses alone, and with nothing."""

import json

from sieve.scripts.needle_maps import main


def run(folder, *, maps=True, losses=True):
    (folder / "report" / "eval").mkdir(parents=True)
    if maps:
        rows = [{"length": n, "depth": d, "accuracy": d} for n in (1024, 2048) for d in (0.0, 1.0)]
        tasks = {task: {"tables": {task: rows}} for task in ("needle", "passkey")}
        (folder / "report" / "eval" / "results.json").write_text(json.dumps({"tasks": tasks | {"mqar": {"tables": {}}}}))
    rows = [{"step": 1, "tokens": 8, "train/loss": 3.0}]
    if losses:
        rows += [{"step": s, "tokens": 8 * s, "eval/books/loss": 3 / s, "eval/recall/loss": 2 / s} for s in (2, 4)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(folder)


def size(path):
    """Width and height of a PNG."""
    head = path.read_bytes()[16:24]
    return int.from_bytes(head[:4]), int.from_bytes(head[4:])


def test_a_line_of_maps_for_each_run_and_one_of_losses(tmp_path):
    out = tmp_path / "maps.png"
    both = [run(tmp_path / name) for name in ("full", "nsa")]
    assert main([str(out), *both]) == 0
    three_lines = size(out)[1]
    assert main([str(out), both[0]]) == 0
    assert size(out)[1] * 3 == three_lines * 2
    assert main([str(out), run(tmp_path / "young", maps=False), str(tmp_path / "not-begun")]) == 0
    assert size(out)[1] * 3 == three_lines


def test_nothing_to_draw_and_torn_results(tmp_path, capsys):
    out, empty = tmp_path / "maps.png", run(tmp_path / "empty", maps=False, losses=False)
    assert main([str(out), empty]) == 2 and "neither results of `sieve eval` nor validation losses" in capsys.readouterr().err
    (tmp_path / "empty" / "report" / "eval" / "results.json").write_text("{")
    assert main([str(out), empty]) == 2 and "results.json holds no results" in capsys.readouterr().err
    assert not out.exists()
