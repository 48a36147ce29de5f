"""Objects of a bucket, each written whole or not at all, known by name, size and hash.

A store has no rename, so nothing is written under a temporary name: an object that is sent in one request, or in parts
that a last request joins, is there as a whole when that is answered, and not before. What counts is said by whoever
wrote it, last: by a hash in the object's own name, or by a manifest.

pyarrow's file systems speak to the stores; they come with what reads the tables anyway (docs/decisions/data.md).
Credentials are those of the environment: AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_SESSION_TOKEN, AWS_REGION,
AWS_ENDPOINT_URL (or AWS_ENDPOINT_URL_S3) for a store of one's own, or the machine's role; for gs:// Google's.
"""

from __future__ import annotations

import functools
import hashlib
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

import xxhash

from raphael.base.files import written_whole
from raphael.base.stage import StageError
from raphael.base.store.address import check_address

# Between the attempts: a burst of errors is over at once, a server that restarts takes half a minute.
WAITS_S: tuple[float, ...] = (0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0)
CONNECT_S, SILENT_S = 10.0, 30.0  # until a connection is there; silence on one
DOWNLOADS = 3  # of an object whose bytes are not what they should be: the network's fault or the store's
PARTS = 3  # attempts at one request, by the library itself
BLOCK_BYTES = 8 << 20  # of one request: what is cut off costs no more than that again
DENIED = ("ACCESS_DENIED", "AccessDenied", "HTTP status 403", "Forbidden", "INVALID_ACCESS_KEY", "SIGNATURE_DOES_NOT")
NO_BUCKET = ("NO_SUCH_BUCKET", "NoSuchBucket", "bucket does not exist")
HASHES: dict[str, Callable[[], Any]] = {"sha256": hashlib.sha256, "xxh3": xxhash.xxh3_128}
Answer = TypeVar("Answer")


class StoreError(StageError):
    """A store did not do what was asked. One line: the address, what it said, what to do."""


class MissingObject(StoreError):
    """There is no object of that name."""


class DamagedObject(StoreError):
    """An object has other bytes than were written."""


@dataclass(frozen=True)
class Entry:
    """An object in a listing. changed_s: by the store's clock."""

    bytes: int
    changed_s: float


@functools.lru_cache(maxsize=16)
def open_store(address: str) -> Store:
    """The store below an address; one for a process, whose connections are kept. Nothing is asked of it yet."""
    return Store(address)


class Store:
    """Objects below `address`, by their names there. Safe to use from several threads.

    What fails for want of an answer is tried again, WAITS_S apart; what is refused is not. Raises StoreError.
    """

    def __init__(self, address: str):
        check_address(address)
        self.address = address.rstrip("/")
        parts = urlsplit(self.address)
        self.is_local = parts.scheme == "file"
        self.bucket = "" if self.is_local else parts.netloc
        self.prefix = parts.path if self.is_local else f"{parts.netloc}{parts.path}"
        self.system = _file_system(parts.scheme, self.bucket)

    def expect(self) -> None:
        """Raises StoreError where the bucket is not there or not ours to list."""
        if self.is_local:
            Path(self.prefix).mkdir(parents=True, exist_ok=True)
            return
        kind = self._again("", lambda: self.system.get_file_info(self.bucket).type.name)
        if kind == "NotFound":
            raise self._no_bucket()

    def put(self, path: Path, name: str) -> None:
        """A finished file as an object; one of the same name is replaced."""
        if self.is_local:
            with self._local(name) as temporary:
                shutil.copyfile(path, temporary)
            return
        size = path.stat().st_size
        self._again(name, lambda: self._send(path, name, size))

    def put_bytes(self, data: bytes, name: str) -> None:
        if self.is_local:
            with self._local(name) as temporary:
                temporary.write_bytes(data)
            return

        def send() -> None:
            with self.system.open_output_stream(self._path(name)) as stream:
                stream.write(data)

        self._again(name, send)

    def get(self, name: str, into: Path, size: int, kind: str, digest: str) -> None:
        """An object as a file, whole and compared. kind: of its hash, "sha256" or "xxh3".

        Raises MissingObject, and DamagedObject where all of DOWNLOADS have other bytes.
        """
        with written_whole(into, lasting=False) as temporary:
            self.fill(name, temporary, size, kind, digest)

    def fill(self, name: str, into: Path, size: int, kind: str, digest: str) -> None:
        """`get` into a file that counts for nobody yet; one that is there keeps its length while it is filled."""
        for _ in range(DOWNLOADS):
            got = self._receive(name, into, size, HASHES[kind]())
            if got == digest:
                return
        raise DamagedObject(
            f"{self.address}/{name}: damaged: got {kind} {got[:12]}..., expected {digest[:12]}...; remove it and run "
            "what makes it again"
        )

    def read(self, name: str) -> bytes:
        """A small object, as it is."""

        def receive() -> bytes:
            with self.system.open_input_stream(self._path(name)) as stream:
                return stream.read()

        return self._again(name, receive)

    def size(self, name: str) -> int | None:
        """Bytes of an object; None where there is none."""
        try:
            return self._again(name, lambda: self._there(name))
        except MissingObject:
            return None

    def entries(self, folder: str) -> dict[str, Entry]:
        """The objects below a folder, by their names there; {} where there are none."""
        from pyarrow.fs import FileSelector

        start = self._path(folder)
        wanted = FileSelector(start, recursive=True, allow_not_found=True)
        found = self._again(folder, lambda: self.system.get_file_info(wanted))
        return {
            info.path.removeprefix(f"{start}/"): Entry(info.size, info.mtime.timestamp())
            for info in found
            if info.is_file and not os.path.basename(info.path).startswith(".")  # of a local write
        }

    def remove(self, *names: str) -> None:
        """Objects, where they are there. Arrow then leaves an empty object of their folder's name."""
        for name in names:
            try:
                self._again(name, functools.partial(self.system.delete_file, self._path(name)))
            except MissingObject:
                continue

    def remove_folder(self, folder: str) -> None:
        """A folder with all that is in it, where it is there."""
        self._again(folder, lambda: self.system.delete_dir_contents(self._path(folder), missing_dir_ok=True))

    def _path(self, name: str) -> str:
        return f"{self.prefix}/{name}" if name else self.prefix

    def _local(self, name: str) -> Any:
        path = Path(self._path(name))
        path.parent.mkdir(parents=True, exist_ok=True)
        return written_whole(path)

    def _send(self, path: Path, name: str, size: int) -> None:
        with open(path, "rb") as file, self.system.open_output_stream(self._path(name)) as stream:
            shutil.copyfileobj(file, stream, BLOCK_BYTES)
        if (there := self._there(name)) != size:
            raise OSError(f"got {there} bytes after sending {size}")

    def _there(self, name: str) -> int:
        """Bytes of an object, in one request."""
        with self.system.open_input_file(self._path(name)) as opened:
            return opened.size()

    def _receive(self, name: str, into: Path, size: int, digest: Any) -> str:
        """Block by block, so that only what was cut off is asked for again. Returns the hash."""
        opened: list[Any] = []

        def block(start: int) -> bytes:
            try:
                if not opened:
                    opened.append(self.system.open_input_file(self._path(name)))
                if (there := opened[0].size()) != size:
                    raise DamagedObject(
                        f"{self.address}/{name}: damaged: got {there} bytes, expected {size}; remove it and run what "
                        "makes it again"
                    )
                data = opened[0].read_at(min(BLOCK_BYTES, size - start), start)
            except OSError:
                opened.clear()
                raise
            if len(data) != min(BLOCK_BYTES, size - start):
                raise OSError(f"cut off after {start + len(data)} of {size} bytes")
            return data

        with open(into, "r+b" if into.exists() else "wb") as file:
            for start in range(0, max(size, 1), BLOCK_BYTES):
                data = self._again(name, functools.partial(block, start))
                digest.update(data)
                file.write(data)
        return digest.hexdigest()

    def _again(self, name: str, ask: Callable[[], Answer]) -> Answer:
        """What it gives, after several attempts where it has to be. Raises StoreError."""
        for wait_s in (*WAITS_S, None):
            try:
                return ask()
            except FileNotFoundError:
                raise self._missing(name) from None
            except OSError as error:
                said = str(error)
                if any(word in said for word in NO_BUCKET):
                    raise self._no_bucket() from None
                if isinstance(error, PermissionError) or any(word in said for word in DENIED):
                    raise self._denied(name, said) from None
                if wait_s is None:
                    raise StoreError(
                        f"{self.address}: no answer that counts in {len(WAITS_S) + 1} attempts over "
                        f"{sum(WAITS_S):.0f} s for {name or self.bucket!r} ({_short(said)}); what is finished stays: "
                        "the same command resumes when the store is back"
                    ) from None
                time.sleep(wait_s)
        raise AssertionError("the last attempt returns or raises")

    def _missing(self, name: str) -> StoreError:
        if not self.is_local:
            self.expect()
        return MissingObject(f"{self.address}/{name}: no such object; run what makes it again")

    def _denied(self, name: str, said: str) -> StoreError:
        rights = "the folder's rights" if self.is_local else "AWS_ACCESS_KEY_ID and its secret, or the bucket's rules"
        return StoreError(
            f"{self.address}: access denied for {name or self.bucket!r}: this user may not do that there "
            f"({_short(said)}); set {rights}"
        )

    def _no_bucket(self) -> StoreError:
        return StoreError(
            f"{self.address}: no such bucket: {self.bucket}; make it, or set pipeline.storage (nothing here makes one)"
        )


def _file_system(scheme: str, bucket: str) -> Any:
    from pyarrow import fs

    if scheme == "file":
        return fs.LocalFileSystem()
    if scheme == "gs":
        from datetime import timedelta

        return fs.GcsFileSystem(retry_time_limit=timedelta(seconds=SILENT_S))
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
    if not region:
        region = "us-east-1" if endpoint else _region(bucket)
    return fs.S3FileSystem(
        endpoint_override=endpoint,
        region=region,
        connect_timeout=CONNECT_S,
        request_timeout=SILENT_S,
        retry_strategy=fs.AwsStandardS3RetryStrategy(max_attempts=PARTS),
    )


def _region(bucket: str) -> str | None:
    """Where AWS has the bucket; None where it does not say: the first request tells why."""
    from pyarrow import fs

    try:
        return fs.resolve_s3_region(bucket)
    except OSError:
        return None


def _short(said: str) -> str:
    """The part of the library's message that says why."""
    start = said.find("AWS Error")
    return " ".join(said[max(start, 0) :].split())[:160]
