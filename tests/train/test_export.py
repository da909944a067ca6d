"""Weights out of a checkpoint: equal to the model's, in files of bounded size, in bounded memory."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from sieve.model.decoder import Decoder
from sieve.train import checkpoint, cli
from sieve.train.checkpoint import Saved
from sieve.train.export import main
from sieve.train.overrides import load_config
from sieve.train.run import run
from sieve.train.weights import module_weights


@pytest.fixture
def trained(tiny_text, one_rank, tmp_path, request) -> Path:
    config = load_config([
        *tiny_text, "steps=2", "eval=none", f"runs_dir={tmp_path}", "name=run", *getattr(request, "param", []),
    ])
    assert run(config) == 0
    return config.directory


@pytest.mark.parametrize("trained", [["zero=0"], ["zero=3", "dtype=bf16"], ["model.tie_embeddings=false"]], indirect=True)
def test_the_files_hold_the_models_weights(trained, tmp_path, capsys):
    assert main([str(trained), str(tmp_path / "out"), "--shard-size", "20kB", "--no-tokenizer"]) == 0
    out = tmp_path / "out"
    index = json.loads((out / "model.safetensors.index.json").read_text())
    weights = {}
    for name in sorted(set(index["weight_map"].values())):
        part = load_file(out / name)
        assert {index["weight_map"][key] for key in part} == {name}
        assert len(part) == 1 or (out / name).stat().st_size < 24_000
        weights |= part
    config = json.loads((out / "config.json").read_text())
    assert config["model_type"] == "sieve" and config["vocab_size"] == 300
    saved = Saved.read(trained / "checkpoints" / "step-00000002")
    expected = module_weights(saved)
    if config["tie_word_embeddings"]:
        assert torch.equal(expected.pop("head.weight"), expected["embed.weight"])
    assert weights.keys() == expected.keys() and "layers.1.mlp.router.bias" in weights
    assert all(torch.equal(weights[key], value) and weights[key].dtype == value.dtype for key, value in expected.items())
    assert not (out / "tokenizer.json").exists()
    assert weights["layers.1.mlp.router.bias"].dtype == torch.float32
    assert str(weights["embed.weight"].dtype).removeprefix("torch.") == config["dtype"]

    run_config = load_config([f"{key}={value}" for key, value in {"model": "tiny"}.items()])
    model = type(run_config.model).model_validate(config["model"])
    attention = type(run_config.attention).model_validate(config["attention"])
    decoder = Decoder(model, attention, config["vocab_size"])
    decoder.load_state_dict(module_weights(saved))


def test_a_run_a_checkpoint_and_what_is_neither(trained, tmp_path, capsys):
    step = trained / "checkpoints" / "step-00000002"
    assert main([str(step), str(tmp_path / "a"), "--dtype", "bf16"]) == 0
    assert load_file(tmp_path / "a" / "model.safetensors")["embed.weight"].dtype == torch.bfloat16
    assert main([str(step), str(tmp_path / "a")]) == 2
    assert "is not empty; give another folder" in capsys.readouterr().err
    assert main([str(tmp_path), str(tmp_path / "b")]) == 2
    assert "neither a checkpoint nor a run" in capsys.readouterr().err
    (step / "rank-00000.pt").write_bytes(b"")
    assert main([str(trained), str(tmp_path / "b")]) == 2
    assert "passing over" in capsys.readouterr().err and not (tmp_path / "b").exists()


def test_a_full_disk_is_named_and_left_as_it_was(trained, tmp_path, capsys, monkeypatch):
    def full(path, *args):
        path.write_bytes(b"half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("sieve.train.export.write_tensors", full)
    assert cli.main(["export", str(trained), str(tmp_path / "new" / "out")]) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith(f"sieve export: {tmp_path}/new/.out.partial: No space left on device; ")
    assert not any((tmp_path / "new").iterdir())


def test_the_tokenizer_stands_beside_the_weights(trained, tmp_path, capsys, monkeypatch):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    import sieve.model.hf  # noqa: F401  registers the type
    from sieve.train import export as module
    from sieve.train.generate import main as generate

    out = tmp_path / "out"
    assert main([str(trained), str(out)]) == 0
    saved = Saved.read(trained / "checkpoints" / "step-00000002")
    own = saved.tokenizer()
    loaded, model = AutoTokenizer.from_pretrained(out), AutoModelForCausalLM.from_pretrained(out)
    text = "def f(x):\n    return x  # déjà"
    assert loaded(text)["input_ids"] == [own.bos_id, *own.encode([text])[0].tolist()]
    assert (out / "tokenizer.model").read_bytes() == own.model
    assert model.config.bos_token_id == own.bos_id == loaded.bos_token_id and model.config.eos_token_id == own.eos_id
    capsys.readouterr()
    assert generate([str(out), "--prompt", "def", "--max-tokens", "3", "--device", "cpu", "--no-stream"]) == 0
    assert capsys.readouterr().out.rstrip("\n").startswith("def")

    damaged = tmp_path / "damaged"
    shutil.copytree(saved.path, damaged)
    (damaged / "tokenizer.model").unlink()
    monkeypatch.setattr(checkpoint, "damage", lambda path: None)
    assert main([str(damaged), str(tmp_path / "b")]) == 2
    assert "tokenizer cannot be had: " in (said := capsys.readouterr().err) and "; --no-tokenizer leaves it out" in said
    assert main([str(damaged), str(tmp_path / "b"), "--no-tokenizer"]) == 0

    class Other:
        vocab_size = 301

    with pytest.raises(ValueError, match="has 301 pieces and the model embeds 300"):
        module.export(saved, tmp_path / "c", tokenizer=Other())


@pytest.mark.slow
def test_memory_is_bounded_by_a_shard(save_at, plain_engine, tmp_path):
    """64 tensors of 4 MB: a process that may take 96 MB more than it has after its imports writes all of them."""
    config = load_config([f"runs_dir={tmp_path}", "name=run", "model.tie_embeddings=true"])
    from sieve.train.state import RunState

    engine = plain_engine()
    engine.module = torch.nn.Module()
    engine.module.embed = torch.nn.Embedding(1024, 1024)
    engine.module.layers = torch.nn.ModuleList(torch.nn.Linear(1024, 1024, bias=False) for _ in range(63))
    engine.optimizer = type(engine.optimizer)(engine.module.parameters(), fused=False)
    save_at(RunState(config, config.directory, 0, 1, 100, {}), 1, engine=engine)
    code = (
        "import resource, sys; from sieve.train.export import main; import torch\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "assert main(sys.argv[1:]) == 0\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)"
    )
    arguments = [str(config.directory / "checkpoints" / "step-00000001"), str(tmp_path / "out"), "--shard-size", "16MB"]
    arguments += ["--no-tokenizer"]
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True)
    assert len(list((tmp_path / "out").glob("*.safetensors"))) == 22
    print(done.stdout)
    assert int(done.stdout.split()[-1]) < 96 * 1024


def test_an_export_forgets_which_kernels_trained_the_experts():
    from sieve.train.export import _any_kernels

    trained = {"moe": {"top_k": 2, "impl": "triton"}, "name": "a"}
    assert _any_kernels(trained) == {"moe": {"top_k": 2, "impl": "auto"}, "name": "a"}
    assert _any_kernels({"moe": None}) == {"moe": None}
