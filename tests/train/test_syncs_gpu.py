"""On a GPU a step that is not logged never waits for it: CUDA itself says so."""

import pytest
import torch

from sieve.scripts.bench.training_case import Case
from sieve.train.distributed import Place, process_group

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module", autouse=True)
def group():
    """One for all cases: DeepSpeed keeps the groups of the first engine of a process."""
    with process_group(Place.of("cuda")):
        yield


@pytest.mark.parametrize("offload", ["false", "true"])
@pytest.mark.parametrize("compiled", ["false", "true"])
@pytest.mark.parametrize("attention", ["full", "nsa"])
@pytest.mark.parametrize("zero", ["1", "2"])
def test_a_step_does_not_wait(attention, zero, compiled, offload, tmp_path, monkeypatch):
    never_waits([
        "model=small", f"attention={attention}", f"zero={zero}", f"compile={compiled}",
        f"activation_offload={offload}", f"activation_checkpointing={'block' if offload == 'true' else 'none'}",
    ], tmp_path, monkeypatch)


@pytest.mark.parametrize("rule", [
    ["bias_update=proportional", "bias_update_rate=0.02", "bias_settle=0"],
    ["bias_update=quantile", "bias_settle=0"],
    ["bias_update=quantile", "bias_settle=1000"],
], ids=" ".join)
def test_a_step_with_experts_does_not_wait(rule, tmp_path, monkeypatch):
    own = [f"model.moe.{key}" for key in ("num_experts=8", "top_k=2", "expert_size=128", *rule)]
    never_waits(["model=moe-1b", "model.hidden_size=256", "model.intermediate_size=512", "zero=1", *own], tmp_path, monkeypatch)


def never_waits(overrides, folder, monkeypatch):
    case = Case([
        *overrides, "model.num_layers=2", "dtype=bf16", "device=cuda", "seq_len=4096", "global_batch=2", "micro_batch=1",
        "steps=1000", f"runs_dir={folder}",
        "loss.impl=compiled", "loss.chunk_size=2048",  # Liger's counts its labels on the host
    ], 1024, documents=3)
    try:
        for _ in range(4):
            case.step()
        case.wait()
        torch.cuda.set_sync_debug_mode("error")
        with monkeypatch.context() as patch:  # of this call the mode takes no notice
            patch.setattr(torch.cuda, "synchronize", no_synchronize)
            for _ in range(3):
                # Outside of the step itself: the outcome of the step before, which has long been there.
                outcome = case.launch()
        torch.cuda.set_sync_debug_mode("default")
        case.wait()
        loss, skipped, norm = outcome.read()
        assert 0 < loss < 10 and not skipped and norm > 0
    finally:
        torch.cuda.set_sync_debug_mode("default")
        case.close()


def no_synchronize(*_, **__):
    raise RuntimeError("torch.cuda.synchronize() was called within a step")
