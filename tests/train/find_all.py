"""What the ranks of a job find to resume from in many runs, to be started by torchrun: find_all.py FOLDER RESUME.

Each rank writes FOLDER/found-RESUME-RANK.json: by run, the checkpoint's name, or the error, and what was warned of."""

from __future__ import annotations

import json
import logging
import sys
from pathlib import Path

from sieve.train.checkpoint import find
from sieve.train.distributed import Place, process_group


def find_all(folder: Path, resume: str) -> None:
    place, found, said = Place.of("cpu"), {}, []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())
    logging.getLogger("sieve").addHandler(handler)
    with process_group(place):
        for run in sorted(path for path in folder.iterdir() if path.is_dir()):
            said.clear()
            try:
                start = find(run, resume, place)
                outcome = None if start is None else start.path.name
            except ValueError as error:
                outcome = f"ValueError: {error}"
            found[run.name] = [outcome, *said]
    (folder / f"found-{resume}-{place.rank}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    find_all(Path(sys.argv[1]), sys.argv[2])
