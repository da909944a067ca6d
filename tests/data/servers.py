"""HTTP on the loopback interface: a server that fails on purpose, and one that answers as the Hugging Face Hub."""

import json
import re
import socket
import struct
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


class Server:
    """A context: serves with `handler` on a free port of 127.0.0.1; `url` ends without a slash."""

    def __init__(self, handler, **attributes):
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (handler,), {**attributes, "server_of": self}))
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self):
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *error):
        self._server.shutdown()
        self._server.server_close()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments):
        pass

    def answer(self, status, body=b"", **headers):
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def answer_file(self, data, **headers):
        """A whole file, or the range of it that is asked for."""
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        if not asked:
            return self.answer(200, data, **headers)
        start, end = int(asked[1]), min(int(asked[2] or len(data) - 1), len(data) - 1)
        return self.answer(206, data[start : end + 1], Content_Range=f"bytes {start}-{end}/{len(data)}", **headers)


class FlakyHandler(Handler):
    """Serves the files of `folder`. The n-th GET fails as the n-th of `faults` says, "" being no failure; behind their
    end it goes well. ranges, sizes: whether the server knows of them."""

    folder = Path()
    faults: list = []
    ranges = sizes = True
    head_fails = False  # whether a HEAD counts as a GET
    seen: Counter = Counter()
    stall = 1.0

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        name = self.path.split("?")[0].lstrip("/")
        file = self.folder / name
        if name.startswith("forbidden"):
            self.seen["forbidden"] += 1
            return self.answer(403, b"no")
        if not file.is_file():
            return self.answer(404, b"not here")
        data = file.read_bytes()
        counts = self.command == "GET" or self.head_fails
        kind = self.faults.pop(0) if counts and self.faults else ""
        self.seen[kind] += 1
        headers = {"ETag": f'"{len(data)}"', "Accept_Ranges": "bytes" if self.ranges else "none"}
        if not self.ranges:
            del self.headers["Range"]
        if not self.sizes:
            return self.chunked(data, cut=kind == "truncated")
        if kind == "503":
            return self.answer(503, b"busy")
        if kind == "429":
            return self.answer(429, b"slower")
        if kind == "reset":
            linger = struct.pack("ii", 1, 0)
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            self.wfile.flush()
            self.connection.close()
            self.close_connection = True
            return None
        if kind == "stall":
            time.sleep(self.stall)
        if kind in ("truncated", "short"):
            return self.less(data, headers, honest=kind == "short")
        return self.answer_file(data, **headers)

    def less(self, data, headers, honest):
        """Half of what is asked for: as if that were all (honest), or breaking off."""
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        start, end = (int(asked[1]), min(int(asked[2]), len(data) - 1)) if asked else (0, len(data) - 1)
        body = data[start : end + 1]
        self.send_response(206 if asked else 200)
        self.send_header("Content-Length", str(len(body) // 2 if honest else len(body)))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(body[: len(body) // 2])
        self.close_connection = True

    def chunked(self, data, cut):
        self.send_response(200)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        if self.command == "HEAD":
            return
        if cut:
            data = data[: len(data) // 2]
        for i in range(0, len(data), 1000):
            piece = data[i : i + 1000]
            self.wfile.write(f"{len(piece):x}\r\n".encode() + piece + b"\r\n")
        if not cut:
            self.wfile.write(b"0\r\n\r\n")
        self.close_connection = True


class HubHandler(Handler):
    """What `datasets` and `huggingface_hub` ask of the Hub, for the data set NAME whose files lie in `folder`."""

    folder = Path()
    name = "owner/books"
    sha = "0123456789abcdef0123456789abcdef01234567"
    busy: list = []  # statuses to answer first

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        path = self.path.split("?")[0]
        if self.busy and "/resolve/" in path and path.endswith((".parquet", ".zst")):
            return self.answer(self.busy.pop(0), b"busy")
        if path.startswith("/api/datasets/owner/gated") or path.startswith("/datasets/owner/gated"):
            return self.answer(403, b"{}", X_Error_Code="GatedRepo", X_Error_Message="ask for access")
        if re.fullmatch(rf"/api/datasets/{self.name}(/revision/[^/]+)?", path):
            about = {"id": self.name, "sha": self.sha, "private": False, "gated": False, "disabled": False,
                     "downloads": 0, "likes": 0, "tags": [], "siblings": []}
            return self.answer(200, json.dumps(about).encode(), Content_Type="application/json")
        if found := re.fullmatch(rf"/api/datasets/{self.name}/tree/[^/]+/?(.*)", path):
            return self.tree(found[1], "recursive=true" in self.path.lower())
        if found := re.fullmatch(rf"/datasets/{self.name}/resolve/[^/]+/(.+)", path):
            file = self.folder / found[1]
            if not file.is_file():
                return self.answer(404, b"Entry not found", X_Error_Code="EntryNotFound")
            return self.answer_file(file.read_bytes(), ETag=f'"{"0" * 40}"', X_Repo_Commit=self.sha, Accept_Ranges="bytes")
        return self.answer(404, b'{"error":"Repository not found"}', X_Error_Code="RepoNotFound")

    def tree(self, under, recursive):
        top = self.folder / under
        if not top.is_dir():
            return self.answer(404, b'{"error":"Entry not found"}', X_Error_Code="EntryNotFound")
        entries = [
            {"type": "directory" if p.is_dir() else "file", "oid": f"{len(p.name):040x}",
             "path": str(p.relative_to(self.folder)), "size": 0 if p.is_dir() else p.stat().st_size}
            for p in sorted(top.rglob("*") if recursive else top.iterdir())
        ]
        return self.answer(200, json.dumps(entries).encode(), Content_Type="application/json")
