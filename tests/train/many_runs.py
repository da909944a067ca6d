"""Several trainings one after the other in the same ranks, to be started by torchrun: many_runs.py FILE, a JSON list of
lists of overrides. Starting ranks takes longer than a toy training does."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

from sieve.train.run import main


def run_all(file: Path) -> int:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo")  # the runs leave it open then
    for overrides in json.loads(file.read_text()):
        if code := main(overrides):
            print(f"exit code {code}: {' '.join(overrides)}", file=sys.stderr)
            return code
    torch.distributed.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(run_all(Path(sys.argv[1])))
