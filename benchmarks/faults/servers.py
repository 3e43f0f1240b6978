"""The scorer's server of a run, a process of its own: it can be killed, begun again, told to answer wrongly."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
import sys
import time
import urllib.parse
from pathlib import Path
from typing import NoReturn

from importable import ROOT

sys.path.append(str(ROOT / "tests" / "support"))
import scorer_faults
from faults.processes import fork

from tempflow.rewards.scorer import load_scorer
from tempflow.rewards.servers.limits import Limits
from tempflow.rewards.servers.server import serve

SCORER = "faults.scorer:Judge"
ANSWERS = tuple(scorer_faults.FAULTS)
"""names of wrong answers"""


class Server:
    """Serves the scorer of the runs on a port of its own."""

    def __init__(self, folder: Path):
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        self.url, self.log, self.pid = f"http://127.0.0.1:{self.port}", folder / "server.txt", 0
        self.start()

    def start(self) -> None:
        """Returns when it answers."""
        self.pid = fork(self._serve)
        end = time.monotonic() + 20
        while time.monotonic() < end:
            try:
                socket.create_connection(("127.0.0.1", self.port), 1).close()
                return
            except OSError:
                time.sleep(0.05)
        raise RuntimeError(f"the server did not start: {self.log.read_text()}")

    def stop(self) -> None:
        """Kills it."""
        if self.pid:
            os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)
            self.pid = 0

    def spoil(self, fault: str, times: int) -> None:
        """Its next answers are wrong in that way (`scorer_faults.FAULTS`)."""
        scorer_faults.post(f"{self.url}/fault?" + urllib.parse.urlencode({"name": fault, "times": times}))

    def _serve(self) -> NoReturn:
        file = os.open(self.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(file, 1)
        os.dup2(file, 2)
        logging.disable()
        faulty = scorer_faults.FaultyServer([load_scorer("scorer", SCORER, 512)], Limits(), 16, None)
        asyncio.run(serve(faulty, "127.0.0.1", self.port))
        os._exit(0)
