import json
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from sieve.train.callbacks.wandb import LoggerConfig, Wandb, choose_mode, has_api_key

KEY = "a" * 40
CLOUD = "https://api.wandb.ai"


@pytest.fixture(autouse=True)
def clean(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """No key, no mode, no home of the developer's; wandb's service ends with the test."""
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_BASE_URL", "WANDB_IDENTITY_TOKEN_FILE", "WANDB_DIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")
    yield
    if "wandb" in sys.modules:
        sys.modules["wandb"].teardown()


def log_three_steps(callback: Wandb, state) -> None:
    callback.start(state)
    for step in (1, 2, 3):
        callback.step(state, {"step": step, "tokens": 10 * step, "train/loss": 1.5 / step, "data/tokens_hash": "ab"})
    callback.step(state, None)
    callback.evaluated(state, {"step": 3, "tokens": 30, "eval/loss": 0.75})
    callback.end(state, "finished")


def inspect(folder: Path) -> list[dict]:
    """The history of the one offline run under `folder`, read by wandb's own command, as the README tells users to."""
    (file,) = folder.glob("offline-run-*/run-*.wandb")
    command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(file)]
    text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    records = [json.loads(line) for line in text.splitlines()]
    return [record["history"]["item"] for record in records if record["type"] == "history"]


def test_the_mode_follows_key_and_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert choose_mode(LoggerConfig(), CLOUD) == "offline"
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    assert choose_mode(LoggerConfig(), CLOUD) == "online"
    for asked, mode in (("offline", "offline"), ("dryrun", "offline"), ("disabled", "disabled"), ("online", "online")):
        monkeypatch.setenv("WANDB_MODE", asked)
        assert choose_mode(LoggerConfig(), CLOUD) == mode
    assert choose_mode(LoggerConfig(wandb="offline"), CLOUD) == "offline"


def test_online_without_a_key_is_offline_when_the_environment_asks_and_an_error_when_the_user_does(monkeypatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "online")
    assert choose_mode(LoggerConfig(), CLOUD) == "offline"
    with pytest.raises(ValueError, match="logger.wandb=online.*wandb login"):
        choose_mode(LoggerConfig(wandb="online"), CLOUD)


def test_a_key_in_netrc_counts_for_its_own_server(tmp_path: Path) -> None:
    (tmp_path / "netrc").write_text(f"machine api.wandb.ai login user password {KEY}\n")
    assert has_api_key(CLOUD) and not has_api_key("https://wandb.example.org")


def test_an_unknown_key_of_the_config_is_refused() -> None:
    with pytest.raises(ValueError, match="projects"):
        LoggerConfig(projects="x")


def test_offline_keeps_every_number_and_the_id(make_state, caplog) -> None:
    state = make_state()
    with caplog.at_level("INFO"):
        log_three_steps(Wandb(LoggerConfig()), state)
    assert state.wandb_id and state.wandb_id in caplog.text
    history = inspect(state.directory / "wandb")
    assert [(row["step"], row["train/loss"]) for row in history[:3]] == [(1, 1.5), (2, 0.75), (3, 0.5)]
    assert history[3]["eval/loss"] == 0.75 and history[3]["step"] == 3
    again = make_state(wandb_id=state.wandb_id, directory=state.directory.parent / "again")
    again.directory.mkdir()
    log_three_steps(Wandb(LoggerConfig()), again)
    assert [p.name[-8:] for p in (again.directory / "wandb").glob("offline-run-*")] == [state.wandb_id]


def test_a_folder_that_cannot_be_written_is_told_and_no_more(make_state, caplog) -> None:
    state = make_state()
    (state.directory / "wandb").write_text("a file where wandb wants a folder")
    log_three_steps(Wandb(LoggerConfig()), state)
    assert [r.levelname for r in caplog.records if "metrics.jsonl has every number" in r.message] == ["WARNING"]


def test_a_session_that_breaks_is_dropped_with_one_warning(make_state, caplog) -> None:
    class Broken:
        def log(self, record: dict) -> None:
            raise BrokenPipeError("the service is gone")

    callback, state = Wandb(LoggerConfig()), make_state()
    callback.session = Broken()
    callback.step(state, {"step": 1})
    callback.step(state, {"step": 2})
    callback.end(state, "failed")
    assert len(caplog.records) == 1 and "the service is gone" in caplog.text


def test_disabled_and_other_ranks_do_not_start_wandb(make_state, monkeypatch) -> None:
    off = LoggerConfig(wandb="disabled")
    for config, rank, mode in ((off, 0, ""), (LoggerConfig(), 1, ""), (LoggerConfig(), 0, "disabled")):
        monkeypatch.setenv("WANDB_MODE", mode)
        state = make_state(rank=rank)
        log_three_steps(Wandb(config), state)
        assert state.wandb_id is None and not (state.directory / "wandb").exists()


class Server(BaseHTTPRequestHandler):
    """As much of wandb's server as a run needs: GraphQL with one run, file_stream, uploads."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments: object) -> None:
        pass

    def answer(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.server.seen.append((self.path, body.decode(errors="replace")))
        reply: dict = {}
        if self.path == "/graphql":
            request = json.loads(body)
            reply = {"data": self.graphql(request["operationName"], request["variables"])}
        text = json.dumps(reply).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    do_GET = do_POST = do_PUT = answer

    def graphql(self, operation: str, variables: dict) -> dict:
        if operation == "UpsertBucket":
            entity = {"id": "e", "name": "me"}
            bucket = {"id": "b", "name": variables["name"], "displayName": "run", "config": "{}", "historyLineCount": 0,
                      "project": {"id": "p", "name": "sieve", "entity": entity}}
            return {"upsertBucket": {"bucket": bucket, "inserted": True}}
        if operation == "CreateRunFiles":
            url = f"http://127.0.0.1:{self.server.server_port}/upload/"
            files = [{"name": name, "uploadUrl": url + name} for name in variables["files"]]
            return {"createRunFiles": {"runID": "b", "uploadHeaders": [], "files": files}}
        return {"model": {"bucket": None}}


@pytest.fixture
def server():
    with ThreadingHTTPServer(("127.0.0.1", 0), Server) as server:
        server.seen = []
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


def test_online_sends_every_number_under_the_kept_id(make_state, monkeypatch, server) -> None:
    monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    state = make_state(wandb_id="keptid42")
    log_three_steps(Wandb(LoggerConfig(project="sieve")), state)
    streamed = [json.loads(body) for path, body in server.seen if path == "/files/me/sieve/keptid42/file_stream"]
    rows = [
        json.loads(line) for body in streamed
        for line in body.get("files", {}).get("wandb-history.jsonl", {}).get("content", [])
    ]
    assert [(row["step"], row.get("train/loss")) for row in rows] == [(1, 1.5), (2, 0.75), (3, 0.5), (3, None)]
    assert any('"RunResumeStatus"' in body and "keptid42" in body for _, body in server.seen), "asks for the old run"


def test_a_server_that_does_not_answer_leaves_an_offline_run(make_state, monkeypatch, caplog) -> None:
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")  # the discard port: refused
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    state = make_state()
    log_three_steps(Wandb(LoggerConfig(init_timeout=2)), state)
    assert "logging offline instead" in caplog.text
    assert len(inspect(state.directory / "wandb")) == 4
