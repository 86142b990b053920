"""Halves of downloads: kept when their process is killed or gives up, and gone on with by the next one.

The hub's library writes a file under a name of that process alone and takes it away where it fails, so a large file
would begin anew after each outage. Here it gets a second name on the disk while it grows; what is under that is fetched
to its end by ``Range``, and becomes the file only if it has the hash that the hub has of it.
"""

import contextlib
import glob
import hashlib
import logging
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from workers import hub

log = logging.getLogger(__name__)

_ENDING = ".tunesmith.incomplete"
_QUIET = 5.0
"""Seconds without a byte after which a half has no writer: some network file systems only pretend to lock."""
_LOCK_SECONDS = 0.2
_AT_ONCE = 8
_STALE = 3600.0
"""Seconds after which a part that the library left behind belongs to nobody: its process was killed."""
_FORGOTTEN = 7 * 86_400.0
"""The same for one that is kept here."""


class Wanted(NamedTuple):
    """A file of the hub: where its bytes will lie, how many, their SHA-256 (None: the hub has only git's hash)."""

    blob: Path
    size: int
    sha256: str | None


def keep(wanted: Iterable[Wanted]) -> None:
    """Gives the halves that are being written a second name, where the file system has hard links.

    A half that has one keeps it: somebody may be at work under that name.
    """
    for blob in (file.blob for file in wanted if file.sha256):
        for part in _of_the_library(blob):
            with contextlib.suppress(OSError):
                os.link(part, _kept(blob))


def size(blob: Path) -> int:
    """Bytes of a file that are here: whole, or of its largest half."""
    with contextlib.suppress(OSError):
        return blob.stat().st_size
    sizes = [0]
    for part in _halves(blob):
        with contextlib.suppress(OSError):
            sizes.append(part.stat().st_size)
    return max(sizes)


def usable(wanted: Wanted) -> int:
    """Bytes of a kept half that need not be fetched again; 0 without one."""
    with contextlib.suppress(OSError):
        there = _kept(wanted.blob).stat().st_size
        return there if wanted.sha256 and not wanted.blob.exists() and there <= wanted.size else 0
    return 0


def discard(wanted: Iterable[Wanted]) -> None:
    """Takes away the second names of files that are whole by now."""
    for file in wanted:
        if file.blob.exists():
            _kept(file.blob).unlink(missing_ok=True)


def sweep(folder: Path) -> None:
    """Takes away halves that nobody comes back for; ``folder``: where a repository's blobs lie."""
    for path in folder.glob("*.incomplete"):
        with contextlib.suppress(OSError):
            patience = _FORGOTTEN if path.name.endswith(_ENDING) else _STALE
            if time.time() - path.stat().st_mtime > patience:
                path.unlink()


def finish(wanted: Mapping[str, Wanted], url_of: Callable[[str], str], secret: str | None) -> None:
    """Fetches what is missing of kept halves. Raises what the library raises; the halves are kept then.

    ``wanted``: by the file's name. A half that turns out wrong is thrown away, and the file is left to the library.
    """
    halves = [name for name, file in wanted.items() if usable(file)]
    if not halves:
        return
    with ThreadPoolExecutor(_AT_ONCE, thread_name_prefix="parts") as pool:
        for done in [pool.submit(_finish, wanted[name], url_of(name), secret) for name in halves]:
            done.result()


def _finish(file: Wanted, url: str, secret: str | None) -> None:
    kept = _kept(file.blob)
    with _alone(file.blob) as alone:
        if not alone or not _is_quiet(kept) or file.blob.exists():
            return
        why = _fetch_rest(kept, file, url, secret)
        for part in _of_the_library(file.blob):
            with contextlib.suppress(OSError):
                if part.samefile(kept):
                    part.unlink()
        if why is None:
            os.replace(kept, file.blob)
        else:
            log.warning("a half of %s is of no use, %s; it is fetched from the beginning", file.blob.name, why)
            kept.unlink()


def _fetch_rest(kept: Path, file: Wanted, url: str, secret: str | None) -> str | None:
    """Why the half cannot become the file; None: it is whole and right. Raises for what passes: the half stays."""
    from huggingface_hub.errors import HfHubHTTPError
    from huggingface_hub.file_download import http_get
    from huggingface_hub.utils import build_hf_headers

    headers = build_hf_headers(token=secret or False, library_name="tunesmith")
    try:
        with kept.open("ab") as out:
            http_get(url, out, resume_size=kept.stat().st_size, headers=headers, expected_size=file.size)
    except HfHubHTTPError as error:
        status = error.response.status_code
        if status >= 500 or status in hub.BUSY:
            raise
        # The library has other ways than this one, and words of its own for what it may not.
        return f"the hub answers {status}"
    with kept.open("rb") as whole:
        same = hashlib.file_digest(whole, "sha256").hexdigest() == file.sha256
    return None if same else "its bytes are not the hub's"


@contextlib.contextmanager
def _alone(blob: Path) -> Iterator[bool]:
    """Under the lock that the library has while it fetches the file; False while somebody else has it."""
    from huggingface_hub.utils import WeakFileLock

    home = blob.parent.parent
    path = home.parent / ".locks" / home.name / f"{blob.name}.lock"
    path.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(WeakFileLock(path, timeout=_LOCK_SECONDS))
        except TimeoutError:
            yield False
            return
        yield True


def _is_quiet(kept: Path) -> bool:
    """Whether nobody writes to it; waits until that can be told."""
    try:
        before = kept.stat()
        time.sleep(min(_QUIET, max(0.0, before.st_mtime + _QUIET - time.time())))
        return kept.stat().st_mtime_ns == before.st_mtime_ns
    except OSError:
        return False


def _kept(blob: Path) -> Path:
    return blob.with_name(blob.name + _ENDING)


def _of_the_library(blob: Path) -> list[Path]:
    return [part for part in _halves(blob) if part != _kept(blob)]


def _halves(blob: Path) -> list[Path]:
    return list(blob.parent.glob(f"{glob.escape(blob.name)}.*incomplete"))
