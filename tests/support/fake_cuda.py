"""A stand-in for torch.cuda, to try captures without a GPU."""

import warnings
import weakref
from contextlib import contextmanager
from types import SimpleNamespace

import torch


class Graph:
    def __init__(self, cuda):
        self.cuda = cuda
        cuda.graphs.add(self)

    def replay(self):
        self.cuda.now += 0.1


class Event:
    def __init__(self, cuda):
        self.cuda = cuda

    def record(self):
        self.at = self.cuda.now

    def synchronize(self): ...

    def elapsed_time(self, end):
        return 1000 * (end.at - self.at)


class FakeCuda:
    """torch.cuda as far as captures and their timing use it: a host wait, or CUDA itself, may break a capture.

    Calls take a second by its events, replays a tenth.
    """

    def __init__(self):
        self.mode, self.capturing, self.invalid, self.broken = 0, False, False, False
        self.device = torch.device("cpu")
        self.now, self.graphs, self.held = 0.0, weakref.WeakSet(), []

    def wait_for_the_host(self):
        if self.mode == "error":
            raise RuntimeError("called a synchronizing CUDA operation")
        if self.capturing:
            self.invalid = True
            raise RuntimeError("operation not permitted when stream is capturing")

    def set_mode(self, mode):
        warnings.warn("Synchronization debug mode is a prototype feature and does not yet detect all", stacklevel=1)
        self.mode = mode

    @contextmanager
    def graph(self, graph, **_):
        self.capturing, self.invalid = True, False
        try:
            yield
        finally:
            self.capturing = False
            if self.invalid:
                self.broken = True
                raise RuntimeError("operation failed due to a previous error during capture")

    @contextmanager
    def stream(self, stream):
        yield

    def install(self, monkeypatch):
        stream = SimpleNamespace(wait_stream=lambda other: None, device=self.device)
        values = {
            "Stream": lambda device: stream, "current_stream": lambda device: stream, "stream": self.stream,
            "set_stream": lambda stream: None, "graph_pool_handle": object, "graph": self.graph,
            "CUDAGraph": lambda: Graph(self), "Event": lambda **_: Event(self),
            "empty_cache": lambda: self.held.append(len(self.graphs)),
            "set_sync_debug_mode": self.set_mode,
            "get_sync_debug_mode": lambda: self.mode,
        }  # fmt: skip
        for name, value in values.items():
            monkeypatch.setattr(torch.cuda, name, value)
