"""How many bytes of tensors a training step holds, as JSON: python held_states.py DTYPE STAGE BUCKET, or under torchrun."""

import dataclasses
import gc
import json
import sys
import warnings

import torch

from sieve.scripts.bench import training_case
from sieve.train.loop import train_step

VOCAB = 512  # no parameter is much larger than the buckets


def live() -> dict[int, torch.Tensor]:
    found = {}
    for thing in gc.get_objects():
        if issubclass(type(thing), torch.Tensor) and thing.device.type == "cpu" and thing.layout == torch.strided:
            found[thing.untyped_storage().data_ptr()] = thing
    found.pop(0, None)
    return found


def count(before: set[int]) -> dict[str, int]:
    gc.collect()
    new = [thing for key, thing in live().items() if key not in before]
    rounded = [thing for thing in new if thing.dtype == torch.bfloat16]
    return {"bytes": sum(t.untyped_storage().nbytes() for t in new), "bf16": sum(t.untyped_storage().nbytes() for t in rounded)}


def main(dtype: str, stage: str, bucket: str) -> None:
    warnings.filterwarnings("ignore")
    before = set(live())
    told = training_case.deepspeed_config
    training_case.deepspeed_config = lambda zero, **rest: told(zero, **rest | {"world_size": world})
    place = training_case.Place.of("cpu")
    world = place.world_size
    case = training_case.Case([
        "model=tiny", "model.moe=null", "attention=full", "seq_len=64", f"global_batch={2 * world}", "device=cpu", "steps=100",
        f"dtype={dtype}", f"zero={stage}", f"zero.bucket_size={bucket}", "loss.chunk_size=64",
    ], VOCAB, 1)
    moments = []

    def step() -> None:
        whole = next(case.steps)
        own = dataclasses.replace(whole, micro_batches=whole.micro_batches[:2])
        train_step(case.run, case.engine, own, case.place, case.ledger.guard, False)

    step()  # the moments are made here
    # The ends of both backwards, before their gradients are reduced, and the moment before the update.
    engine = case.engine._engine
    epilogue = engine._backward_epilogue

    def at_the_end() -> None:
        moments.append(count(before))
        epilogue()

    engine._backward_epilogue = at_the_end
    case.engine.before_update = lambda: moments.append(count(before))
    step()
    if place.rank == 0:
        assert len(moments) == 3
        print(json.dumps(max(moments, key=lambda m: m["bytes"]) | {"parameters": case.parameters.total}))
    case.close()


if __name__ == "__main__":
    main(*sys.argv[1:])
