"""Files and directories of this machine that are written whole: a reader sees the old content or the new, never a part.

Content is on disk before it takes its name, and the name is on disk before the call returns. Work in progress has a
name that begins with `.partial-`; `sweep` removes what a killed process left. Permissions follow the process's umask.
"""

from __future__ import annotations

import errno
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

PARTIAL = ".partial-"
#: How often a directory is put in the place of another where a second process does the same.
ATTEMPTS = 20


def write_file(path: Path, content: bytes) -> None:
    """Write a file, in the place of one that is there. Its directory is made where there is none."""
    make_directory(path.parent)
    partial = _unused(path.parent)
    try:
        _write_new(partial, content)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    sync_directory(path.parent)


def create_file(path: Path, content: bytes) -> bool:
    """Write a file that must not be there; False where it is. Of several processes exactly one gets True."""
    make_directory(path.parent)
    partial = _unused(path.parent)
    try:
        _write_new(partial, content)
        os.link(partial, path)
    except FileExistsError:
        return False
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK):
            raise
        return _create_without_links(path, content)
    finally:
        partial.unlink(missing_ok=True)
    sync_directory(path.parent)
    return True


def move_file(path: Path, target: Path) -> None:
    """Move a file within its file system, in the place of one that is there."""
    make_directory(target.parent)
    with path.open("rb") as file:
        os.fsync(file.fileno())
    path.replace(target)
    sync_directory(target.parent)


def make_directory(path: Path) -> None:
    """Make a directory, and those above it, where there is none."""
    new = [place for place in (path, *path.parents) if not place.exists()]
    path.mkdir(parents=True, exist_ok=True)
    for place in new:
        sync_directory(place.parent)


@contextmanager
def written_directory(target: Path, *, within: Path | None = None) -> Iterator[Path]:
    """Give an empty directory; what the block leaves there becomes `target` when it ends well, and nothing does if not.

    within: where the work is kept until then, on the same file system; beside `target` if absent
    """
    place = within or target.parent
    make_directory(place)
    partial = _unused(place)
    partial.mkdir()
    try:
        yield partial
        _finish_tree(partial)
        _put_in_place(partial, target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def sweep(root: Path) -> None:
    """Remove what killed processes left below a directory in which no other process works."""
    for directory, names, files in os.walk(root):
        for name in [name for name in names if name.startswith(PARTIAL)]:
            shutil.rmtree(Path(directory) / name, ignore_errors=True)
            names.remove(name)
        for name in files:
            if name.startswith(PARTIAL):
                (Path(directory) / name).unlink(missing_ok=True)


def sync_directory(path: Path) -> None:
    """Have the names in a directory on disk. File systems that know no such thing are left alone."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS):
            raise
    finally:
        os.close(descriptor)


def _unused(directory: Path) -> Path:
    return directory / f"{PARTIAL}{uuid.uuid4().hex[:16]}"


def _write_new(path: Path, content: bytes) -> None:
    try:
        with path.open("xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        if error.filename is None:  # a full disk or a quota is told of without a place
            raise OSError(error.errno, error.strerror, str(path.parent)) from error
        raise


def _create_without_links(path: Path, content: bytes) -> bool:
    """For file systems without hard links: a reader may see the file before its content."""
    try:
        _write_new(path, content)
    except FileExistsError:
        return False
    return True


def _finish_tree(root: Path) -> None:
    """Have everything below on disk, with the permissions of new files: safetensors' are the owner's alone."""
    usual = root.stat().st_mode & 0o666
    for directory, _, files in os.walk(root):
        for name in files:
            path = Path(directory) / name
            if path.is_symlink():
                continue
            with path.open("rb") as file:
                found = os.fstat(file.fileno())
                if found.st_nlink == 1:  # a hard link's permissions are those of the file elsewhere as well
                    os.fchmod(file.fileno(), usual | (found.st_mode & 0o111))
                os.fsync(file.fileno())
        sync_directory(Path(directory))


def _put_in_place(partial: Path, target: Path) -> None:
    make_directory(target.parent)
    olds = []
    for attempt in range(ATTEMPTS):
        old = _unused(partial.parent)
        with suppress(FileNotFoundError):
            target.rename(old)
            olds.append(old)
        try:
            partial.rename(target)
            break
        except OSError as error:  # another process put its own there in between
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST) or attempt + 1 == ATTEMPTS:
                raise
    sync_directory(target.parent)
    for old in olds:
        shutil.rmtree(old, ignore_errors=True)
