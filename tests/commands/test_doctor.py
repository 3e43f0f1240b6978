"""The doctor: what is there, what is missing for which feature, and what the hub says."""

import os
import re
import socket
import subprocess
import sys
import threading
import time
from contextlib import closing
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from socketserver import BaseRequestHandler, TCPServer

import pytest
from huggingface_hub import constants

from tempflow.__main__ import main
from tempflow.commands.doctor import reach
from tempflow.commands.features import FEATURES, NEEDED

ROOT = Path(__file__).resolve().parents[2]
SETUP = (ROOT / "setup.py").read_text()


@pytest.fixture
def offline(monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)


def examined(capsys) -> tuple[int, dict[str, str]]:
    """The exit code, and what was said under each word."""
    code = main(["doctor"])
    out = capsys.readouterr().out
    return code, {line.partition(" ")[0].rstrip(":"): line for line in out.splitlines()}


def test_a_machine_in_order(capsys, offline):
    code, told = examined(capsys)
    assert code == 0 and {"versions", "machine", "operators", "attention", "disk", "hub", "training"} <= told.keys()
    assert re.search(r"torch \d+\.\d+", told["versions"]) and re.search(r"cpu: (native|torch)", told["operators"])
    assert "native" in told["attention"] and "GiB free" in told["disk"] and "HF_HUB_OFFLINE" in told["hub"]


def test_what_is_missing_comes_with_the_line_that_brings_it(capsys, offline, monkeypatch):
    monkeypatch.setitem(sys.modules, "rapidfuzz", None)  # as if it were not installed
    code, _ = examined(capsys)
    main(["doctor"])
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "scorer ocr" in line]
    assert code == 0 and "pip install 'tempflow[rewards]'" in line and "(rapidfuzz)" in line


def test_what_training_needs_and_lacks_is_broken(capsys, offline, monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy", None)
    code, told = examined(capsys)
    assert code == 1 and "scipy" in told["versions"] and "versions" in told["broken"]


def of_its_own(folder: Path, **environment: str) -> tuple[int, dict[str, str], str]:
    """The same of a process, that finds the packages of a folder first, and what it wrote to stderr."""
    paths = os.pathsep.join([str(folder), *sys.path[1:], str(ROOT)])
    done = subprocess.run(
        [sys.executable, "-m", "tempflow", "doctor", "--seconds", "1"], capture_output=True, text=True, timeout=120,
        cwd=folder, env={**os.environ, "PYTHONPATH": paths, "HF_HUB_OFFLINE": "1", **environment},
    )  # fmt: skip
    return done.returncode, {line.partition(" ")[0].rstrip(":"): line for line in done.stdout.splitlines()}, done.stderr


@pytest.mark.parametrize("fault", ["raise ImportError('libcudart.so.12')", "raise OSError('libc10.so')", ""])
def test_a_damaged_torch_is_broken_and_what_else_is_missing_is_told(tmp_path, fault):
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text(fault)
    code, told, errors = of_its_own(tmp_path)
    assert code == 1 and "Traceback" not in errors
    assert {"machine", "operators"} <= set(re.findall(r"\w+", told["broken"])) and "missing" in told


def test_an_endpoint_that_is_no_address_is_broken(tmp_path):
    code, told, errors = of_its_own(tmp_path, HF_ENDPOINT="http://hub:abc", HF_HUB_OFFLINE="0")
    assert code == 1 and "Traceback" not in errors
    assert "abc" in told["hub"] and "hub" in told["broken"]


def test_operators_that_draw_something_else_are_broken(capsys, offline, monkeypatch):
    import tempflow_kernels

    draw = tempflow_kernels.normal_like
    monkeypatch.setattr(tempflow_kernels, "normal_like", lambda *arguments: draw(*arguments) + 1e-3)
    code, told = examined(capsys)
    assert code == 1 and told["broken"] == "broken: operators"


def test_every_line_installs_what_is_said(capsys):
    """Extras that setup.py has, with packages that it names there or that the package itself is called."""
    extras = set(re.findall(r'^        "(\w+)": ', SETUP, re.MULTILINE))
    named = {extra for each in FEATURES for extra in re.findall(r"tempflow\[(\w+)\]", each.line)}
    assert named and named <= extras
    required = {module for module in NEEDED if module not in ("tempflow_kernels", "PIL", "yaml")}
    assert all(f'"{module}' in SETUP for module in required)


@pytest.fixture
def server():
    """The address of a server that answers with a status."""
    servers = []

    def start(status: int) -> str:
        class Answer(BaseHTTPRequestHandler):
            def do_HEAD(self):
                self.send_response(status)
                self.end_headers()

            def log_message(self, *_):
                pass

        servers.append(HTTPServer(("127.0.0.1", 0), Answer))
        threading.Thread(target=servers[-1].serve_forever, daemon=True).start()
        return f"http://127.0.0.1:{servers[-1].server_port}"

    yield start
    for each in servers:
        each.shutdown()
        each.server_close()


def test_a_hub_that_answers(server):
    assert reach(server(200), 20).startswith("answers in ") and "(503)" in reach(server(503), 20)


def test_an_endpoint_that_speaks_no_http_is_out_of_reach():
    class Other(BaseRequestHandler):
        def handle(self):
            self.request.sendall(b"220 mail\r\n")

    with TCPServer(("127.0.0.1", 0), Other) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        answer = reach(f"http://127.0.0.1:{server.server_address[1]}", 20)
        server.shutdown()
    assert "out of reach" in answer and "220 mail" in answer


def test_a_hub_that_is_away_or_hangs_is_waited_for_no_longer_than_asked():
    with closing(socket.create_server(("127.0.0.1", 0))) as silent:
        began = time.monotonic()
        address = f"http://127.0.0.1:{silent.getsockname()[1]}"
        assert "does not answer within 0.3 s" in reach(address, 0.3)
        assert time.monotonic() - began < 10
    assert "out of reach" in reach(address, 20) and "out of reach" in reach("no address", 20)

