"""`sieve eval CHECKPOINT suite=...`: measure a trained model; JSON, tables, pictures and an HTML report."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sieve.train.command import check_folder, key_lines, log_to_stderr, run_command

if TYPE_CHECKING:
    from sieve.eval.config import SuiteConfig
    from sieve.eval.runner import Result
    from sieve.train.load import Opened

USAGE = """\
usage: sieve eval CHECKPOINT [KEY=VALUE ...] [--cfg job] [--help]

CHECKPOINT is a run (its newest checkpoint), a checkpoint's folder, or an exported model.

  sieve eval my-run                                            the standard suite, into runs/my-run/report/eval
  sieve eval my-run suite=needle needle.lengths=[1024,8192,65536]
  sieve eval exported/ suite=[loss,health] loss.source=[books/*.txt]
  sieve eval my-run suite=paper                                lm-evaluation-harness: pip install 'sieve-lm[eval]'
"""

WITHOUT_TEXT = {"mqar", "copy", "induction", "harness"}  # tasks: a needle's hay is of the text


def main(argv: Sequence[str] | None = None) -> int:
    """The command: 0, or 2 after a message for a user's mistake."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    checkpoint = ""

    def load(words: list[str]) -> SuiteConfig:
        nonlocal checkpoint
        if not words or "=" in words[0] or words[0].startswith("-"):
            raise ValueError("which model? sieve eval CHECKPOINT [KEY=VALUE ...]; --help says more")
        checkpoint = words[0]
        return parse(words[1:])

    log_to_stderr(logging.WARNING)
    return run_command(
        "sieve eval", arguments, load=load, run=lambda config: evaluate(checkpoint, config), help_text=help_text
    )


def parse(overrides: Sequence[str]) -> SuiteConfig:
    """KEY=VALUE, values as YAML. ConfigError, with the closest key, for any mistake."""
    import yaml
    from pydantic import ValidationError

    from sieve.eval.config import SuiteConfig
    from sieve.train.mistakes import ConfigError, check_keys, explain

    tree: dict[str, Any] = {}
    for text in overrides:
        key, equals, raw = text.partition("=")
        if not equals or not key:
            raise ConfigError(f"{text}: is not KEY=VALUE")
        try:
            value = yaml.safe_load(raw)
        except yaml.YAMLError as error:
            raise ConfigError(f"{text}: {str(error).splitlines()[0]}") from error
        *parents, last = key.split(".")
        place = tree
        for name in parents:
            place = place.setdefault(name, {})
            if not isinstance(place, dict):
                raise ConfigError(f"{text}: {name} has been given a value already")
        place[last] = value
    check_keys(SuiteConfig, tree)
    try:
        return SuiteConfig.model_validate(tree)
    except ValidationError as error:
        raise explain(error, SuiteConfig, tree) from error


def evaluate(checkpoint: str, config: SuiteConfig) -> int:
    """Run the suite and write its results."""
    from rich.console import Console

    from sieve.data.disk import writing
    from sieve.eval.documents import Documents, read_documents, stored_documents
    from sieve.eval.load import place_and_precision
    from sieve.eval.report import print_result, write_report
    from sieve.eval.results import FILE, read_results, write_results
    from sieve.eval.runner import run_suite
    from sieve.train.load import open_model

    if config.out:  # before the model, which may take its time to open
        check_folder(Path(config.out), f"out={config.out}")
    device, dtype = place_and_precision(config.device, config.dtype)
    opened = open_model(checkpoint, config.runs_dir, device, dtype)
    model, terminal = opened.loaded, Console()
    documents: dict[str, Documents] = {}
    if config.loss.source:
        if model.text is None:
            raise ValueError(f"loss.source: {checkpoint} has no tokenizer to read it with")
        documents = {"loss.source": partial(read_documents, config.loss.source, model.text)}
    elif not set(config.suite) <= WITHOUT_TEXT:
        documents = {name: partial(stored_documents, store) for name, store in opened.validation().items()}
    folder = Path(config.out) if config.out else _folder(opened)
    check_folder(folder, f"out={folder}")
    measured = read_results(folder)
    about = {"model": model.name, **_about(checkpoint, config, device, dtype)}

    def report(result: Result) -> None:
        nonlocal measured
        print_result(result, terminal)
        measured = write_results([result], folder, about)  # a suite that is cut short keeps the tasks it has measured

    run_suite(model, config, documents, _bar, report)
    with writing(folder):
        files = write_report(measured, folder, model.name)
    for path in (folder / FILE, *files):
        terminal.print(str(path), markup=False, soft_wrap=True)
    return 0


def _folder(opened: Opened) -> Path:
    """Where results go by default: report/eval in the run as it lies now, which may have been moved or copied since it was
    trained; for an exported model, and a checkpoint outside of a run, eval-NAME in the working directory."""
    from sieve.train.checkpoint import FOLDER, MANIFEST

    folder = opened.folder
    if opened.config is not None and not (folder / MANIFEST).is_file():
        return folder / "report" / "eval"
    whole = folder.resolve()  # "." has no name
    if opened.config is not None and whole.parent.name == FOLDER:
        return whole.parent.parent / "report" / "eval"
    return Path(f"eval-{whole.name}")


def _about(checkpoint: str, config: SuiteConfig, device: Any, dtype: Any) -> dict[str, Any]:
    import torch

    from sieve.train.environment import git_state

    state = git_state(Path(__file__).resolve().parent)
    return {
        "checkpoint": checkpoint, "settings": config.model_dump(mode="json"), "device": str(device), "dtype": str(dtype),
        "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else None, "torch": str(torch.__version__),
        "commit": None if state is None else state["commit"], "uncommitted": bool(state and state["diff"]),
    }


@contextmanager
def _bar(label: str, total: float | None) -> Iterator[Callable[[int], None]]:
    """A bar on stderr where a person watches, nothing elsewhere: the tables come one by one anyway."""
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty()) as progress:
        task = progress.add_task(label, total=total)
        yield lambda n: progress.advance(task, n)


def help_text() -> str:
    """Usage, then the suites, then every key with its default."""
    from sieve.eval.config import SUITES, SuiteConfig

    lines = [USAGE, "Suites:"]
    lines += [f"  {name:10} {', '.join(tasks)}" for name, tasks in SUITES.items()]
    lines += ["", "Keys, with their defaults:", *key_lines(SuiteConfig)]
    return "\n".join(lines) + "\n"
