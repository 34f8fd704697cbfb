"""Verdicts kept on disk, keyed by what was asked of whom: resuming and replaying a run costs nothing."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import logging
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

from rlaif_fast.errors import RlaifFastError, UsageError
from rlaif_fast.oracle.base import Oracle, Ranking, RankRequest, rank_all
from rlaif_fast.oracle.in_flight import InFlight
from rlaif_fast.oracle.judge import Judge
from rlaif_fast.oracle.records import content_text, ranking_from_json, ranking_to_json, request_to_json
from rlaif_fast.oracle.wrappers import AroundOracle, identity_of

logger = logging.getLogger(__name__)

T = TypeVar("T")

_SCHEMA_VERSION = 2
_SCHEMA = """
CREATE TABLE IF NOT EXISTS verdicts (
    key TEXT PRIMARY KEY, ranking TEXT NOT NULL, checksum TEXT NOT NULL
) WITHOUT ROWID
"""
# SQLite errors caused by the machine, not the file: the file is left alone.
_NOT_DAMAGE = (
    "locked",
    "busy",
    "full",
    "readonly",
    "unable to open",
    "disk i/o",
    "interrupted",
    "out of memory",
)
_BUSY_SECONDS = 30.0
_MAGIC = b"SQLite format 3\0"
_LOOKUP = 500  # keys per statement, below SQLite's limit on variables


class VerdictCache:
    """A SQLite file of rankings; any number of processes may read and write it at once.

    Every row carries a checksum. A row that does not match it is dropped with a warning, and its group is asked about
    again. A file that is damaged or has an unknown layout is renamed to NAME.corrupt-TIME with a warning, and a new one
    is started.

    Args:
        path: The file; its folder is created if needed.

    Raises:
        UsageError: The file cannot be a cache, or was never one: it is no database, and no lock of ours lies beside it.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path).expanduser()
        self._lock = threading.Lock()
        self._opened: tuple[int, int] | None = None
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UsageError(f"verdict cache: cannot make {self.path.parent}: {error.strerror}") from None
        if self.path.is_dir():
            raise UsageError(f"verdict cache: {self.path} is a folder; name a file")
        if _is_foreign(self.path):
            raise UsageError(f"verdict cache: {self.path} holds something else; name another file")
        self._connection = self._open_or_rebuild()

    def get_many(self, keys: Sequence[str]) -> dict[str, Ranking]:
        """The stored rankings, by key."""

        def read(connection: sqlite3.Connection) -> dict[str, Ranking]:
            found: dict[str, Ranking] = {}
            damaged: list[str] = []
            for start in range(0, len(keys), _LOOKUP):
                part = keys[start : start + _LOOKUP]
                marks = ",".join("?" * len(part))
                query = f"SELECT key, ranking, checksum FROM verdicts WHERE key IN ({marks})"
                for key, text, checksum in connection.execute(query, part):
                    ranking = _checked(key, text, checksum)
                    if ranking is None:
                        damaged.append(key.decode("utf-8", "replace"))
                    else:
                        found[key.decode()] = ranking
            self._drop(connection, damaged)
            return found

        return self._run(read)

    def _drop(self, connection: sqlite3.Connection, keys: Sequence[str]) -> None:
        """Delete damaged rows, so that they can be written again."""
        if not keys:
            return
        logger.warning(
            "verdict cache %s: %d damaged rows are dropped and asked about anew", self.path, len(keys)
        )
        with connection:
            connection.executemany("DELETE FROM verdicts WHERE key = ?", [(key,) for key in keys])

    def put_many(self, rankings: Sequence[tuple[str, Ranking]]) -> None:
        """Store rankings by key; the first one stored for a key stays."""
        texts = [(key, json.dumps(ranking_to_json(ranking))) for key, ranking in rankings]
        rows = [(key, text, _checksum(key.encode(), text.encode())) for key, text in texts]

        def write(connection: sqlite3.Connection) -> None:
            with connection:
                connection.executemany("INSERT OR IGNORE INTO verdicts VALUES (?, ?, ?)", rows)

        self._run(write)

    def __len__(self) -> int:
        return self._run(lambda connection: connection.execute("SELECT count(*) FROM verdicts").fetchone()[0])

    def close(self) -> None:
        """Close the file."""
        with self._lock:
            self._connection.close()

    def _run(self, work: Callable[[sqlite3.Connection], T]) -> T:
        """Run `work`; if the file turns out to be damaged, set it aside and run it on a new one."""
        with self._lock:
            try:
                return work(self._connection)
            except sqlite3.Error as error:
                if not _is_damage(error):
                    raise RlaifFastError(
                        f"verdict cache {self.path}: {error}; free the disk or name another"
                    ) from None
                self._connection.close()
                self._set_aside(error)
                self._connection = self._open_or_rebuild()
                return work(self._connection)

    def _open_or_rebuild(self) -> sqlite3.Connection:
        self._opened = self._identity()
        try:
            return self._open()
        except sqlite3.Error as error:
            if not _is_damage(error):
                raise RlaifFastError(f"verdict cache: cannot open {self.path}: {error}") from None
            self._set_aside(error)
            return self._open()

    def _open(self) -> sqlite3.Connection:
        with self._exclusive():
            connection = sqlite3.connect(self.path, timeout=_BUSY_SECONDS, check_same_thread=False)
            try:
                connection.execute("PRAGMA journal_mode=WAL")
                connection.execute("PRAGMA synchronous=NORMAL")
                version = connection.execute("PRAGMA user_version").fetchone()[0]
                if version not in (0, _SCHEMA_VERSION):
                    raise sqlite3.DatabaseError(f"layout {version}, expected {_SCHEMA_VERSION}")
                verdict = connection.execute("PRAGMA quick_check").fetchone()[0]
                if verdict != "ok":
                    raise sqlite3.DatabaseError(verdict)
                with connection:
                    connection.execute(_SCHEMA)
                    connection.execute(f"PRAGMA user_version={_SCHEMA_VERSION}")
                connection.execute("SELECT key, ranking, checksum FROM verdicts LIMIT 1").fetchone()
                # a flipped bit may leave invalid text, so rows are decoded only when they are checked
                connection.text_factory = bytes
            except sqlite3.Error:
                connection.close()
                raise
            self._opened = self._identity()
            return connection

    def _identity(self) -> tuple[int, int] | None:
        """What distinguishes this file from one that another process put in its place."""
        with contextlib.suppress(OSError):
            facts = self.path.stat()
            return facts.st_dev, facts.st_ino
        return None

    def _set_aside(self, error: Exception) -> None:
        """Rename the damaged file, unless another process has done so already."""
        with self._exclusive():
            if self._opened is not None and self._identity() != self._opened:
                return
            aside = self.path.with_name(f"{self.path.name}.corrupt-{time.time_ns()}")
            for suffix in ("", "-wal", "-shm"):
                with contextlib.suppress(FileNotFoundError):
                    Path(f"{self.path}{suffix}").rename(f"{aside}{suffix}")
        logger.warning(
            "verdict cache %s is damaged (%s); set aside as %s, beginning anew", self.path, error, aside
        )

    @contextlib.contextmanager
    def _exclusive(self) -> Iterator[None]:
        """Keep other processes from opening or renaming the file in the meantime."""
        with _lock_of(self.path).open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield


def _lock_of(path: Path) -> Path:
    return path.with_name(f"{path.name}.lock")


def _is_foreign(path: Path) -> bool:
    """Whether a file is no database and, as it has no lock, never was a cache."""
    if not path.is_file() or _lock_of(path).exists():
        return False
    with contextlib.suppress(PermissionError), path.open("rb") as file:
        return file.read(len(_MAGIC)) not in (b"", _MAGIC)
    return False


def _checksum(key: bytes, text: bytes) -> str:
    return hashlib.sha256(key + b"\0" + text).hexdigest()[:32]


def _checked(key: bytes, text: bytes, checksum: bytes) -> Ranking | None:
    """The ranking of a row; None if the row is not as it was written."""
    try:
        if _checksum(key, text).encode() != checksum:
            return None
        return ranking_from_json(json.loads(text))
    except (ValueError, TypeError, AttributeError, RecursionError):
        return None


def _is_damage(error: sqlite3.Error) -> bool:
    """Whether an error is the file's fault, not the machine's (a full disk, a held lock, no permission)."""
    return not any(words in str(error).casefold() for words in _NOT_DAMAGE)


class CachedOracle(AroundOracle):
    """Another oracle behind a verdict cache; only valid rankings are kept.

    The key is the content of the request (not its id; for a judge, what it is shown) and the oracle's `identity`, which
    names the judge, its options and the version of its prompt.

    Args:
        inner: The oracle to ask when the cache has no verdict.
        path: The cache file.

    Raises:
        UsageError: The oracle has no usable identity, or the file cannot be a cache.
    """

    def __init__(self, inner: Oracle, *, path: str | Path) -> None:
        super().__init__(inner)
        self.name = inner.name
        identity_of(inner)
        self.cache = VerdictCache(path)
        self._in_flight: InFlight[Ranking] = InFlight()
        self.hits = 0
        self.misses = 0

    @property
    def identity(self) -> str:
        """What a cached verdict depends on besides the request: the inner oracle's identity."""
        return identity_of(self.inner)

    def stats(self) -> dict[str, float]:
        """Hits and misses since the start, and the inner oracle's own figures."""
        own = {"oracle/cache_hits": float(self.hits), "oracle/cache_misses": float(self.misses)}
        return own | super().stats()

    def rank(self, requests: Sequence[RankRequest]) -> list[Ranking]:
        """Rank every request; those in the cache, or already being asked, cost no tokens and no time."""
        keys = [self.key(request) for request in requests]
        found = self.cache.get_many(sorted(set(keys)))
        missing = [at for at, key in enumerate(keys) if key not in found]
        asked: list[int] = []

        def ask(places: list[int]) -> list[Ranking]:
            own = [missing[place] for place in places]
            late = self.cache.get_many([keys[at] for at in own])  # stored by another thread meanwhile
            asked.extend(at for at in own if keys[at] not in late)
            fresh = dict(zip(asked, self._ask([requests[at] for at in asked], [keys[at] for at in asked])))
            return [fresh[at] if at in fresh else late[keys[at]] for at in own]

        wanted = [keys[at] for at in missing]
        found.update(zip(wanted, self._in_flight.run(wanted, ask)))
        self.hits += len(requests) - len(asked)
        self.misses += len(asked)
        return [found[key] for key in keys]

    def _ask(self, requests: Sequence[RankRequest], keys: Sequence[str]) -> list[Ranking]:
        """Rank what the cache lacks, and store it, including what a judge returned before an interruption."""
        if not requests:
            return []

        def keep(place: int, ranking: Ranking) -> None:
            if ranking.valid:
                self.cache.put_many([(keys[place], ranking)])

        kept = isinstance(self.inner, Judge) and type(self.inner).rank is Judge.rank
        rankings = rank_all(self.inner, requests, **({"keep": keep} if kept else {}))
        # A judge does not report groups that another thread was already asking about.
        self.cache.put_many([(key, ranking) for key, ranking in zip(keys, rankings) if ranking.valid])
        return rankings

    def key(self, request: RankRequest) -> str:
        """The hash under which the verdict on a request is kept."""
        if isinstance(self.inner, Judge):
            request = self.inner.asked(request)
        content = content_text([identity_of(self.inner), request_to_json(request)])
        return hashlib.sha256(content.encode()).hexdigest()
