"""Weights & Biases: every metric of metrics.jsonl under the same name, online with a key, offline without."""

from __future__ import annotations

import logging
import netrc
import os
import secrets
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal
from urllib.parse import urlsplit

from pydantic import Field

from sieve.model.config import Config
from sieve.train.callbacks.callback import Callback

if TYPE_CHECKING:
    from sieve.train.state import RunState

log = logging.getLogger(__name__)
Mode = Literal["online", "offline", "disabled"]


class LoggerConfig(Config):
    """Where wandb keeps the run. `auto`: WANDB_MODE if it is set, else online with an API key and offline without."""

    wandb: Literal["auto", "online", "offline", "disabled"] = "auto"
    project: str = Field("sieve", min_length=1)
    entity: str | None = Field(None, description="team or user; null: the key's default")
    tags: tuple[str, ...] = ()
    init_timeout: float = Field(30.0, gt=0, description="seconds to wait for the server at start before going offline")
    finish_timeout: float = Field(60.0, gt=0, description="seconds to wait for the upload at the end")


def has_api_key(base_url: str) -> bool:
    """Whether wandb would log in without asking: WANDB_API_KEY, an identity token, or netrc's entry for the server."""
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    given = os.environ.get("NETRC")
    files = [Path(given).expanduser()] if given else [Path("~/.netrc").expanduser(), Path("~/_netrc").expanduser()]
    for file in files:
        try:
            entry = netrc.netrc(file).authenticators(urlsplit(base_url).netloc)
        except FileNotFoundError:
            continue
        except (OSError, netrc.NetrcParseError) as error:
            log.warning("wandb: cannot read %s (%s)", file, error)
            continue
        if entry and entry[2]:
            return True
    return False


def choose_mode(config: LoggerConfig, base_url: str) -> Mode:
    """The mode to start wandb in, so that it never has to ask for a key.

    An explicit logger.wandb stands above WANDB_MODE. ValueError for logger.wandb=online without a key.
    """
    if config.wandb == "online" and not has_api_key(base_url):
        raise ValueError(
            f"logger.wandb=online, but there is no API key for {base_url}; run `wandb login`, set WANDB_API_KEY, "
            "or leave logger.wandb=auto to log offline and `wandb sync` later"
        )
    if config.wandb != "auto":
        return config.wandb
    asked = os.environ.get("WANDB_MODE", "").lower()
    if asked in ("offline", "dryrun"):
        return "offline"
    if asked == "disabled":
        return "disabled"
    return "online" if has_api_key(base_url) else "offline"


class Wandb(Callback):
    """Logs every record and evaluation to one wandb run, on rank 0.

    The run's id travels in the checkpoints (`run.wandb_id`), so that a resumed training goes on in the same wandb run;
    metrics are plotted against our own `step`, because wandb's cannot go back when a run resumes from an earlier
    checkpoint. metrics.jsonl is the record of truth: whatever wandb raises is told and training goes on without it.
    """

    def __init__(self, config: LoggerConfig) -> None:
        self.config = config
        self.session: Any = None

    def start(self, run: RunState) -> None:
        if run.rank != 0 or self.config.wandb == "disabled":
            return
        base_url = os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai").rstrip("/")
        mode = choose_mode(self.config, base_url)
        if mode == "disabled":
            return
        run.wandb_id = run.wandb_id or secrets.token_hex(4)
        try:
            self.session = self._open(run, mode)
        except Exception as error:  # noqa: BLE001 - see _warn
            self._warn(error)
            return
        if self.session.offline:
            folder = Path(self.session.dir).parent
            log.info("wandb: offline in %s; watch: wandb leet %s; upload: wandb sync %s", folder, folder.parent, folder)
        else:
            log.info("wandb: run %s at %s", run.wandb_id, self.session.url)

    def step(self, run: RunState, record: dict | None) -> None:
        if record is not None:
            self._log(record)

    def evaluated(self, run: RunState, record: dict) -> None:
        self._log(record)

    def end(self, run: RunState, status: str) -> None:
        session, self.session = self.session, None
        if session is None:
            return
        try:
            session.finish(exit_code=1 if status == "failed" else 0)
        except Exception as error:  # noqa: BLE001 - see _warn
            self._warn(error)

    def _open(self, run: RunState, mode: Mode) -> Any:
        """A wandb run in `mode`, or offline when the server does not answer."""
        import wandb  # takes a second, which a run without it need not wait for

        limits = {
            key: getattr(self.config, key)
            for key in ("init_timeout", "finish_timeout")
            if f"WANDB_{key.upper()}" not in os.environ
        }
        try:
            session = wandb.init(
                id=run.wandb_id,
                resume="allow" if mode == "online" else None,
                mode=mode,
                name=run.directory.name,
                project=self.config.project,
                entity=self.config.entity,
                tags=list(self.config.tags),
                dir=str(run.directory),
                config=run.config.model_dump(mode="json"),
                # offline it has nothing to say that the line after this one does not
                settings=wandb.Settings(quiet=True, silent=mode == "offline", console="off", **limits),
            )
        except (wandb.errors.Error, TimeoutError) as error:
            if mode == "offline":
                raise
            log.warning("wandb: cannot log online (%s); logging offline instead", error)
            wandb.teardown()  # its service still holds the run's id
            return self._open(run, "offline")
        session.define_metric("step", hidden=True)
        session.define_metric("*", step_metric="step")
        return session

    def _log(self, record: dict) -> None:
        if self.session is None:
            return
        try:
            self.session.log(record)
        except Exception as error:  # noqa: BLE001 - see _warn
            self.session = None
            self._warn(error)

    def _warn(self, error: Exception) -> None:
        """Say why wandb does not log. It raises whatever its service, the disk or the network give it, of no common
        base class, and none of it is worth a training run."""
        kind = type(error).__name__
        log.warning("wandb is off: %s: %s; training goes on, metrics.jsonl has every number", kind, error)
