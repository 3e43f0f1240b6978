"""One process group per run folder: a lock that ends with its process, however that ends."""

from __future__ import annotations

import errno
import fcntl
import os
from pathlib import Path

from tempflow.common.errors import BadInput
from tempflow.common.say import say

NAME = ".lock"
UNKNOWN = (errno.ENOLCK, errno.ENOTSUP, errno.EINVAL, errno.ENOSYS)
"""what file systems without locks answer"""


class FolderLock:
    """A lock on a folder; taken once, held until `release` or the end of the process."""

    def __init__(self, folder: Path):
        self.folder = folder
        self._descriptor: int | None = None

    def take(self) -> None:
        """
        Raises:
            BadInput: another process holds it.
            OSError: the folder is out of reach.
        """
        if self._descriptor is not None:
            return
        descriptor = os.open(self.folder / NAME, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            os.close(descriptor)
            hint = "another process works on this run; wait for its end, or choose another run.dir"
            raise BadInput("run.dir", self.folder, hint) from error
        except OSError as error:
            if error.errno not in UNKNOWN:
                os.close(descriptor)
                raise
            say(f"warning: {self.folder} lies on a file system without locks; start no second process on this run")
        self._descriptor = descriptor
        os.register_at_fork(after_in_child=self._forget)  # a child that outlives this process must not hold it

    def release(self) -> None:
        """Gives it back; the file stays, since another process may have opened it."""
        self._forget()

    def _forget(self) -> None:
        descriptor, self._descriptor = self._descriptor, None
        if descriptor is not None:
            os.close(descriptor)
