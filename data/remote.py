"""Files behind URLs (http, s3, hf and whatever else fsspec knows), listed and read so that a bad network loses nothing.

A file is fetched in blocks, each asked for by its range, checked for its length and asked for again, after a growing
pause, when the connection fails. A server that knows no ranges is read from the start once more and what was read
already is passed over.
"""

from __future__ import annotations

import difflib
import hashlib
import io
import logging
import random
import time
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any, BinaryIO, TypeVar
from urllib.parse import urlsplit

from sieve.data.files import File, Format, format_of, unknown_format

logger = logging.getLogger(__name__)

FIRST_BLOCK, LARGEST_BLOCK = 256 << 10, 8 << 20  # bytes; blocks double, so that a look at a first record stays cheap
READ_AHEAD = 4  # blocks under way
FIRST_PAUSE, LONGEST_PAUSE = 0.5, 30.0  # seconds
LISTERS = 16  # files whose size is asked for at once
_TRANSIENT_STATUS = frozenset({408, 425, 429, 500, 502, 503, 504, 509, 520, 521, 522, 523, 524})
_NETWORK_PACKAGES = frozenset({"aiohttp", "asyncio", "botocore", "fsspec", "httpcore", "httpx", "requests", "urllib3"})
_VERSIONS = ("ETag", "etag", "blob_id", "md5Hash", "Content-MD5", "Digest", "LastModified", "Last-Modified", "mtime")

T = TypeVar("T")


def is_url(entry: str) -> bool:
    """Whether `entry` names a file by URL and not by path."""
    return "://" in entry


@dataclass(frozen=True)
class Remote:
    """How files behind URLs are reached. options: fsspec's, for the file system of the URL. retries: of one block, with
    growing pauses. timeout: seconds without a byte before a connection counts as lost (http and s3)."""

    options: Mapping[str, Any] = field(default_factory=dict)
    retries: int = 8
    timeout: float = 60.0

    def expand(self, url: str, forced: Format | None, key: str) -> list[File]:
        """The files of a URL: one, those that match its `*`, or those under it if it ends with `/`, sorted by name.

        Raises ValueError where there is none, naming what is there instead.
        """
        system, path = self.system(url, key)
        if "*" in path:
            paths = sorted(str(p) for p in self.patiently(lambda: system.glob(path), f"listing {url}", key))
        elif url.endswith("/"):
            under = sorted(str(p) for p in self.patiently(lambda: system.find(path), f"listing {url}", key))
            paths = [p for p in under if forced or format_of(_pure(p))]
        else:
            paths = [path]
        if not paths:
            raise ValueError(f"{key}: {url} matches no file of a known format; {self._there(system, path)}")
        with ThreadPoolExecutor(LISTERS) as pool:
            return list(pool.map(lambda p: self._file(system, p, forced, key), paths))

    def system(self, url: str, key: str) -> tuple[Any, str]:
        """The fsspec file system of `url` and the path in it. ValueError if the package that it needs is missing."""
        import fsspec.core

        protocol = url.split("://")[0].split("::")[-1]
        options = dict(self.options)
        if protocol in ("http", "https"):
            import aiohttp

            waits = aiohttp.ClientTimeout(total=None, sock_connect=self.timeout, sock_read=self.timeout)
            options["client_kwargs"] = {"timeout": waits, **options.get("client_kwargs", {})}
        elif protocol in ("s3", "s3a"):
            waits = {"connect_timeout": self.timeout, "read_timeout": self.timeout}
            options["config_kwargs"] = {**waits, **options.get("config_kwargs", {})}
        try:
            return fsspec.core.url_to_fs(url, **options)
        except ImportError as error:
            raise ValueError(f"{key}: {url} needs a package that is not installed: {error}") from error
        except ValueError as error:  # an unknown protocol
            raise ValueError(f"{key}: {url}: {error}") from error

    def patiently(self, call: Callable[[], T], what: str, key: str = "") -> T:
        """call(), again after a pause while the network is to blame. ValueError when it stays so, or is refused."""
        pause = FIRST_PAUSE
        for attempt in range(self.retries + 1):
            try:
                return call()
            except Exception as raised:
                error = _behind(raised)
                if not is_transient(error):
                    if _is_refusal(error):
                        raise ValueError(f"{key}: {what}: {_words(error)}".removeprefix(": ")) from error
                    raise
                if attempt == self.retries:
                    raise ValueError(
                        f"{what} failed {attempt + 1} times, the last time with {_words(error)}; what is written so far "
                        "is kept: start again when the server answers, or raise data.retries"
                    ) from error
                logger.warning("%s: %s; trying again in %.1f s (%d of %d)", what, _words(error), pause, attempt + 1,
                               self.retries)
                time.sleep(pause * random.uniform(0.8, 1.2))  # many readers must not come back at one moment
                pause = min(2 * pause, LONGEST_PAUSE)
        raise AssertionError("unreachable")

    def _file(self, system: Any, path: str, forced: Format | None, key: str) -> RemoteFile:
        url = system.unstrip_protocol(path)
        kind = forced or format_of(_pure(path))
        if kind is None:
            raise ValueError(unknown_format(url, key))
        try:
            info = self.patiently(lambda: system.info(path), f"asking for {url}", key)
        except FileNotFoundError as error:
            raise ValueError(f"{key}: {url} does not exist; {self._there(system, path)}") from error
        version = next((str(info[name]) for name in _VERSIONS if info.get(name)), "")
        return RemoteFile(url, kind, info.get("size"), version, system, path, self)

    def _there(self, system: Any, path: str) -> str:
        folder = path.split("*")[0].rpartition("/")[0]
        try:
            names = sorted(str(entry).rstrip("/").rpartition("/")[2] for entry in system.ls(folder, detail=False))
        except Exception:  # a listing is a courtesy, which many servers do not give
            names = []
        if not names:
            return f"{folder} lists nothing"
        close = difflib.get_close_matches(path.rpartition("/")[2], names, n=3, cutoff=0.5)
        return f"{'closest in' if close else 'there is in'} {folder}: {', '.join(close or names[:8])}"


@dataclass(frozen=True)
class RemoteFile:
    """A File behind a URL. version: what the server says of its content (an ETag, a time), or nothing."""

    location: str
    kind: Format
    size: int | None
    version: str
    system: Any = field(repr=False, compare=False)
    path: str = field(repr=False)
    remote: Remote = field(repr=False, compare=False)

    @property
    def name(self) -> str:
        return _pure(self.path).name

    @property
    def key(self) -> str:
        return self.location

    def open(self) -> BinaryIO:
        return io.BufferedReader(_Blocks(self), 1 << 20)

    def digest(self, whole: int) -> bytes:
        """Of the URL, the size and the server's word on the version: the content is not read for it."""
        return hashlib.blake2b(repr((self.location, self.size, self.version)).encode(), digest_size=16).digest()


def is_transient(error: BaseException) -> bool:
    """Whether the network or an overloaded server may be to blame, so that asking again is worth it."""
    status = _status(error)
    if status is not None:
        return status in _TRANSIENT_STATUS
    if isinstance(error, (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError)):
        return False
    packages = {kind.__module__.partition(".")[0] for kind in type(error).__mro__}
    return isinstance(error, (OSError, EOFError)) or bool(packages & _NETWORK_PACKAGES)


def _behind(error: Exception) -> Exception:
    """What an error stands for: fsspec tells of a refused or broken request for a file's size as of a missing file."""
    cause = error.__cause__
    if isinstance(error, FileNotFoundError) and isinstance(cause, Exception) and _status(cause) not in (404, 410):
        return cause
    return error


def _is_refusal(error: BaseException) -> bool:
    return _status(error) is not None or isinstance(error, PermissionError)


def _status(error: BaseException) -> int | None:
    """The HTTP status that an error of aiohttp, of requests and httpx, or of botocore tells."""
    response = getattr(error, "response", None)
    if isinstance(response, dict):
        status = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
    else:
        status = getattr(error, "status", None) or getattr(response, "status_code", None)
    return status if isinstance(status, int) else None


def _words(error: BaseException) -> str:
    return f"{type(error).__name__} {str(error).strip()}".strip()


def _pure(path: str) -> PurePosixPath:
    return PurePosixPath(urlsplit(path).path if is_url(path) else path)


class _NoRanges(Exception):
    """The server sent the whole file when a part of it was asked for."""


class _Blocks(io.RawIOBase):
    """A remote file from any place on; blocks behind the current one are fetched meanwhile by threads."""

    def __init__(self, file: RemoteFile):
        self._file, self._position, self._ready = file, 0, memoryview(b"")
        self._pool = ThreadPoolExecutor(READ_AHEAD, thread_name_prefix="sieve-fetch")
        self._stream: _Stream | None = _Stream(file) if file.size is None else None
        self._restart(0)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True  # else BufferedReader refuses in its own words

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        if self._stream is not None:
            raise ValueError(
                f"{self._file.location} cannot be read from its middle, as {self._file.kind} needs, since its server "
                "knows no ranges; download it first"
            )
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._file.size}[whence]
        target = base + offset
        ahead = target - self._position
        if 0 <= ahead <= len(self._ready):
            self._ready = self._ready[ahead:]
        else:
            self._restart(target)
        self._position = target
        return target

    def readinto(self, buffer: Any) -> int:
        if not self._ready:
            self._ready = memoryview(self._next_block())
        count = min(len(buffer), len(self._ready))
        buffer[:count] = self._ready[:count]
        self._ready = self._ready[count:]
        self._position += count
        return count

    def close(self) -> None:
        if not self.closed:
            self._pool.shutdown(wait=False, cancel_futures=True)
            if self._stream is not None:
                self._stream.close()
        super().close()

    def _restart(self, offset: int) -> None:
        for _, future in getattr(self, "_pending", ()):
            future.cancel()
        self._pending: deque[tuple[int, Future[bytes]]] = deque()
        self._next, self._block, self._depth, self._ready = offset, FIRST_BLOCK, 1, memoryview(b"")

    def _next_block(self) -> bytes:
        if self._stream is not None:
            return self._stream.read()
        while len(self._pending) < self._depth and self._next < self._file.size:
            end = min(self._next + self._block, self._file.size)
            self._pending.append((self._next, self._pool.submit(self._fetch, self._next, end)))
            self._next, self._block = end, min(2 * self._block, LARGEST_BLOCK)
        if not self._pending:
            return b""
        start, future = self._pending.popleft()
        self._depth = min(self._depth + 1, READ_AHEAD)
        try:
            return future.result()
        except _NoRanges:
            logger.info("%s: its server knows no ranges; reading it in one go", self._file.location)
            self._restart(start)
            self._stream = _Stream(self._file, start)
            return self._stream.read()

    def _fetch(self, start: int, end: int) -> bytes:
        file = self._file

        def get() -> bytes:
            data = file.system.cat_file(file.path, start=start, end=end)
            if len(data) != end - start:
                if len(data) == file.size:
                    raise _NoRanges
                raise EOFError(f"{len(data)} bytes came instead of {end - start}")
            return data

        return file.remote.patiently(get, f"reading {file.location} from byte {start}")


class _Stream:
    """A remote file from its start to its end, begun again where it breaks."""

    def __init__(self, file: RemoteFile, position: int = 0):
        self._file, self._position, self._open = file, position, None

    def read(self) -> bytes:
        """The next block, b"" at the end."""
        where = f"reading {self._file.location} from byte {self._position}"
        data = self._file.remote.patiently(self._read, where)
        self._position += len(data)
        return data

    def close(self) -> None:
        if self._open is not None:
            self._open.close()
            self._open = None

    def _read(self) -> bytes:
        try:
            if self._open is None:
                self._open = self._file.system.open(self._file.path, "rb", block_size=0)
                passed = 0
                while passed < self._position:
                    skipped = len(self._open.read(min(LARGEST_BLOCK, self._position - passed)))
                    if not skipped:
                        raise EOFError(f"it ends at byte {passed}")
                    passed += skipped
            data = self._open.read(FIRST_BLOCK)
            if not data and self._file.size is not None and self._position < self._file.size:
                raise EOFError(f"it ends at byte {self._position} of {self._file.size}")
            return data
        except Exception:  # whatever it was, the next try opens the file anew; the caller judges the error
            self.close()
            raise
