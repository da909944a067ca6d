"""The check of a cache's choices: what it counts, that it can fail, and on a GPU what it finds."""

import json

import pytest
import torch

from sieve.scripts import check_selection
from sieve.scripts.bench.decode_model import build

SMALL = ("kernel_size=8", "kernel_stride=4", "block_size=16", "topk=4", "window_size=24")


@pytest.fixture
def small(monkeypatch):
    """Models whose queries choose among more blocks than they may read after 64 tokens, instead of 1024."""
    made = lambda *args: build(*args, tuple(f"attention.{key}" for key in SMALL))  # noqa: E731
    monkeypatch.setattr(check_selection, "build", made)
    return made


def test_on_a_cpu_no_choice_differs(tmp_path, capsys, small):
    out = tmp_path / "found.json"
    assert check_selection.main(["--lengths", "300,150", "--steps", "8", "--dtypes", "fp32", "--out", str(out)]) == 0
    found = {row["compared"]: row for row in json.loads(out.read_text())["found"]}
    layers, heads = 4, 2
    assert found["step"]["choices"] == 450 * layers * heads and found["steps"]["choices"] == 2 * 8 * layers * heads
    assert found["prefill"]["choices"] == (146 + 71) * layers * heads
    assert all(row["different"] == 0 == row["lost_most"] for row in found.values())
    assert "prefill" in capsys.readouterr().out


def test_a_wrong_choice_is_counted_and_weighed(monkeypatch, small):
    model = small("tiny", "nsa", "cpu", torch.float32)
    texts = check_selection.random_texts([300, 150], torch.device("cpu"))
    original = check_selection.nsa_decode

    def first_blocks(*args, **options):
        out, indices = original(*args, **options)
        query = args[8][:, :, None, None]
        return out, torch.where(query >= 64, torch.arange(4, dtype=torch.int32), indices)

    monkeypatch.setattr(check_selection, "nsa_decode", first_blocks)
    found = check_selection.compare(model, texts, 8)
    assert found["step"]["different"] > 100 and found["step"]["lost_most"] > 1e-3
    assert found["steps"]["different"] == 0


@pytest.mark.parametrize("arguments, message", [
    (["--dtypes", "int8"], "--dtypes int8: it takes bf16, fp16, fp32"),
    (["--lengths", "100,50", "--steps", "49"], "--steps 49 must be between 1 and the shortest of --lengths less 2, 48"),
    (["runs/x"], "checkpoints need a text to read: --text FILE"),
])  # fmt: skip
def test_mistakes(arguments, message, capsys):
    with pytest.raises(SystemExit):
        check_selection.main(arguments)
    assert message in capsys.readouterr().err


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_on_a_gpu(dtype):
    """Chunks and steps choose to the bit as the row does, steps too where nearly all are made without training's order; a
    whole model's steps differ from the forward no more than the forward from itself compiled."""
    model = build("1b", "nsa", "cuda", dtype, ("model.num_layers=3",))
    found = check_selection.compare(model, check_selection.random_texts([8192, 5000], torch.device("cuda")), 64)
    share = {name: row["different"] / row["choices"] for name, row in found.items()}
    assert share["run"] == share["step"] == share["anew"] == 0
    assert found["step"]["near"] < 0.02 * found["step"]["choices"] < 0.8 * found["anew"]["near"]
    assert share["steps"] < 2 * share["compiled"] + 1e-3 and share["prefill"] < 2 * share["compiled"] + 1e-3
