"""Tests that wait for long work of another process: it begins with the session, and they come last.

Where several workers share the tests (`pytest -n 2`) they come first instead, and the work begins when it is waited
for: the other workers are what runs beside it.

def begin() -> Beside: ...
def test_it(begun): done = begun.wait()
test_it.begin = begin
"""

import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest

BEGUN = pytest.StashKey()


class Beside:
    """A command that runs beside the tests."""

    def __init__(self, command, **options):
        self.folder = Path(tempfile.mkdtemp(prefix="beside-"))
        command = [str(part).format(folder=self.folder) for part in command]
        with (self.folder / "output.txt").open("w") as output:
            self.process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, **options)

    def wait(self):
        """The exit status and all it printed."""
        return self.process.wait(), (self.folder / "output.txt").read_text()


def _begins(item):
    return getattr(getattr(item, "function", None), "begin", None)


def _is_worker(config):
    return hasattr(config, "workerinput")


def pytest_collection_modifyitems(config, items):
    items.sort(key=lambda item: (_begins(item) is not None) != _is_worker(config))


def pytest_collection_finish(session):
    session.config.stash[BEGUN] = {}
    if not session.config.option.collectonly and not _is_worker(session.config):
        session.config.stash[BEGUN] |= {item.nodeid: begin() for item in session.items if (begin := _begins(item))}


def pytest_sessionfinish(session):
    for beside in session.config.stash.get(BEGUN, {}).values():
        beside.process.terminate()
        beside.process.wait()
        shutil.rmtree(beside.folder, ignore_errors=True)


@pytest.fixture
def begun(request):
    """What this test's `begin` has begun."""
    all_begun = request.config.stash[BEGUN]
    if request.node.nodeid not in all_begun:
        all_begun[request.node.nodeid] = _begins(request.node)()
    return all_begun[request.node.nodeid]
