"""Artifacts of finished stages: content-addressed, published atomically, shared by runs and trials.

An artifact is a folder `<store>/<stage>/<key>/` with the stage's files and `artifact.json`. The key is the hash of
the stage's name, code version and config and of its inputs' keys, so equal work is done once. A stage writes into
a work folder that survives a crash (long stages resume in it); publication is one rename on a file system, or an
upload with `artifact.json` last elsewhere. A lease keeps two processes from computing the same key at once.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import fsspec
import psutil
from fsspec.implementations.local import LocalFileSystem

from allo_ray.errors import UserError

FORMAT = 1
HEARTBEAT_SECONDS = 5.0
LEASE_SECONDS = 30.0
#: Whoever writes a lease last holds it; by then the others have written theirs.
SETTLE_SECONDS = 1.0


@dataclass(frozen=True)
class Artifact:
    """A published result: where it is, and what its stage said of it."""

    stage: str
    key: str
    path: str
    facts: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0.0
    startup_seconds: float = 0.0

    def file(self, name: str) -> str:
        """Path or URL of one of its files."""
        return f"{self.path}/{name}"


def cache_folder() -> Path:
    """Where files of remote stores are kept on this machine."""
    return Path(os.environ.get("ALLO_RAY_CACHE", Path.home() / ".cache" / "allo_ray"))


def work_beside(out: str) -> Path:
    """A folder on this machine for what a job prepares: `out` itself where it is one."""
    if "://" not in out:
        return Path(out)
    return cache_folder() / "work" / hashlib.blake2b(out.encode(), digest_size=12).hexdigest()


def local_path(path: str) -> Path:
    """A path on this machine for a path or URL: a URL is fetched once a machine and then found in the cache."""
    if "://" not in path:
        return Path(path)
    # Its own name stays: readers go by endings.
    place = hashlib.blake2b(path.encode(), digest_size=12).hexdigest()
    target = cache_folder() / "fetched" / place / path.rstrip("/").rpartition("/")[-1]
    if not target.exists():
        files, root = fsspec.core.url_to_fs(path)
        part = target.with_name(f"{target.name}.{uuid.uuid4().hex}")
        part.parent.mkdir(parents=True, exist_ok=True)
        files.get(root, str(part), recursive=True)
        _rename_or_discard(part, target)
    return target


def fetch_anew(url: str, folder: Path) -> Path:
    """Returns `folder` with what is behind a URL now, and nothing else; for content that may change.

    (`local_path` finds again what it has fetched once.)
    """
    shutil.rmtree(folder, ignore_errors=True)
    folder.parent.mkdir(parents=True, exist_ok=True)
    files, root = fsspec.core.url_to_fs(url)
    files.invalidate_cache()
    files.get(root, str(folder), recursive=True)
    return folder


def hand_over(made: Iterable[Path], out: str) -> None:
    """Copies files from the folder `work_beside(out)` to `out`, where that is a URL."""
    if "://" in out:
        for file in made:
            files, target = fsspec.core.url_to_fs(f"{out}/{file.name}")
            files.put_file(str(file), target)


class _Watch:
    """Since when a lease has looked as it looks now, by the clock of the one who waits: hosts' clocks may differ."""

    def __init__(self) -> None:
        self._told: Mapping[str, Any] | None = None
        self._since = 0.0

    def unchanged(self, told: Mapping[str, Any]) -> float:
        """Seconds since `told` was first seen here; 0 where it is another than the last time."""
        if told != self._told:
            self._told, self._since = told, time.monotonic()
        return time.monotonic() - self._since


class Store:
    """A folder, or a URL that fsspec opens, holding artifacts."""

    def __init__(self, url: str) -> None:
        self.files, root = fsspec.core.url_to_fs(url)
        self.local = isinstance(self.files, LocalFileSystem)
        self.root = str(Path(root).resolve()) if self.local else url.rstrip("/")
        #: Where stages work until they publish; shards and checkpoints of every node go there.
        self.work_root = Path(self.root) / ".work" if self.local else cache_folder() / "work"
        self._check_format()

    def key(self, stage: str, version: int, config: Mapping[str, Any], inputs: Mapping[str, str]) -> str:
        """Hash of everything that decides a stage's result; 16 hexadecimal digits."""
        told = {"stage": stage, "version": version, "config": config, "inputs": inputs}
        return hashlib.blake2b(json.dumps(told, sort_keys=True).encode(), digest_size=8).hexdigest()

    def find(self, stage: str, key: str) -> Artifact | None:
        """The published artifact, or None."""
        path = f"{self.root}/{stage}/{key}"
        try:
            with self.files.open(f"{path}/artifact.json", "rt") as file:
                told = json.load(file)
        except FileNotFoundError:
            return None
        return Artifact(stage, key, path, told["facts"], told["seconds"], told["startup_seconds"])

    def work_folder(self, stage: str, key: str) -> Path:
        """The folder in which the stage works until it is published; what a crashed attempt left is still there."""
        folder = self.work_root / f"{stage}-{key}"
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def publish(self, stage: str, key: str, told: Mapping[str, Any]) -> Artifact:
        """Makes the work folder an artifact. `told` needs facts, seconds and startup_seconds.

        Whoever publishes second finds the first one's artifact in place and throws its own away.
        """
        folder = self.work_folder(stage, key)
        (folder / "artifact.json").write_text(json.dumps(dict(told), indent=1, sort_keys=True, default=str))
        target = f"{self.root}/{stage}/{key}"
        if self.local:
            _rename_or_discard(folder, Path(target))
        else:
            for file in sorted(folder.rglob("*"), key=lambda path: path.name == "artifact.json"):
                if file.is_file():
                    self.files.put_file(str(file), f"{target}/{file.relative_to(folder)}")
            shutil.rmtree(folder)
        found = self.find(stage, key)
        assert found is not None, "just published"
        return found

    @contextmanager
    def lease(
        self, stage: str, key: str, waiting: Callable[[], AbstractContextManager[None]] = nullcontext
    ) -> Iterator[None]:
        """Held by the one process that computes `key`; others wait here, in `waiting`, until it is done or has died.

        The holder renews a heartbeat; a lease in which a waiter saw none for 30 s, by its own clock, is taken over.
        """
        path = f"{self.root}/.leases/{stage}-{key}.json"
        owner = f"{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex[:8]}"
        watch = _Watch()
        if not self._take(path, owner, watch):
            with waiting():
                while not self._take(path, owner, watch):
                    time.sleep(1.0)
        done = threading.Event()

        def renew() -> None:
            while not done.wait(HEARTBEAT_SECONDS):
                try:
                    if self._holder(path) != owner:  # it had stopped for so long that another took over
                        return
                    self._write_lease(path, owner)
                except OSError:  # storage that hiccups: the next beat may pass
                    continue

        thread = threading.Thread(target=renew, daemon=True, name=f"lease-{stage}")
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()
            if self._holder(path) == owner:
                self.files.rm_file(self._strip(path))

    def free_bytes(self) -> int | None:
        """Free disk of a local store, None elsewhere."""
        return shutil.disk_usage(self.root).free if self.local else None

    def _take(self, path: str, owner: str, watch: _Watch) -> bool:
        told = self._read_lease(path)
        if told is not None and not self._expired(told, watch):
            return False
        if told is None and self.local:
            try:
                self._write_lease(path, owner, new=True)
            except FileExistsError:
                return False
            return True
        # No file system has "replace if it still is what I read": all who see that it is free write, the last one wins.
        self._write_lease(path, owner)
        time.sleep(SETTLE_SECONDS)
        return self._holder(path) == owner

    def _expired(self, told: Mapping[str, Any], watch: _Watch) -> bool:
        if told["host"] == socket.gethostname() and not _runs(told["pid"]):
            return True
        return watch.unchanged(told) > LEASE_SECONDS

    def _holder(self, path: str) -> str | None:
        told = self._read_lease(path)
        return None if told is None else str(told["owner"])

    def _read_lease(self, path: str) -> dict[str, Any] | None:
        try:
            with self.files.open(path, "rt") as file:
                return json.load(file)
        except FileNotFoundError:
            return None
        except json.JSONDecodeError:  # just being written, or by one that died over it
            return {"owner": "", "host": "", "pid": 0}

    def _write_lease(self, path: str, owner: str, new: bool = False) -> None:
        # The time is there to be another at each beat.
        told = {"owner": owner, "host": socket.gethostname(), "pid": os.getpid(), "time": time.time()}
        text = json.dumps(told)
        if self.local and not new:
            part = Path(f"{path}.{owner}")
            part.write_text(text)
            part.replace(path)
            return
        self.files.makedirs(str(Path(self._strip(path)).parent), exist_ok=True)
        with self.files.open(path, "xt" if new else "wt") as file:
            file.write(text)

    def _strip(self, path: str) -> str:
        return str(self.files._strip_protocol(path))

    def _check_format(self) -> None:
        path = f"{self.root}/store.json"
        try:
            with self.files.open(path, "rt") as file:
                found = json.load(file)["format"]
        except FileNotFoundError:
            self._create(path)
            return
        except (json.JSONDecodeError, KeyError, TypeError):
            found = "that cannot be told (store.json is broken)"
        except OSError as error:
            raise self._unusable(error) from None
        if found != FORMAT:
            raise UserError(
                f"store {self.root}: written in format {found}, this program reads {FORMAT}. "
                "Give another folder with store: ..., or use the program version that wrote it."
            )

    def _create(self, path: str) -> None:
        try:
            self.files.makedirs(self._strip(self.root), exist_ok=True)
            part = f"{path}.{uuid.uuid4().hex}.part" if self.local else path
            with self.files.open(part, "wt") as file:
                json.dump({"format": FORMAT}, file)
            if self.local:
                os.replace(part, path)
        except OSError as error:
            raise self._unusable(error) from None

    def _unusable(self, error: OSError) -> UserError:
        return UserError(f"store {self.root}: {error}. Give a folder that you may write with store: ...")


def _runs(pid: int) -> bool:
    """Whether the process lives; one that has ended and was not waited for does not."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _rename_or_discard(folder: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.rename(folder, target)
    except OSError:
        if not target.exists():
            raise
        shutil.rmtree(folder)
