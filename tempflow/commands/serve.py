"""Serves scorers to trainers on other machines: `tempflow serve SCORER ... --port 9000`."""

from __future__ import annotations

import argparse
import asyncio
import ipaddress
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from tempflow.commands.ending import Parser, end
from tempflow.common.errors import BadInput
from tempflow.rewards.names import SCORERS
from tempflow.rewards.servers.limits import Limits
from tempflow.rewards.servers.secret import read_token

if TYPE_CHECKING:
    from tempflow.rewards.servers.server import ScorerServer

MOST = 2**20
"""Of MiB, images, characters and requests."""


def _arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    defaults = Limits()
    example = "tempflow serve digits digits_gold --port 9000"
    parser = Parser(prog="tempflow serve", description=__doc__.split("\n\n")[0], example=example)
    parser.add_argument("scorers", nargs="+", help=f"{', '.join(SCORERS)}, or module:attribute")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen at; any but a loopback needs a token")
    parser.add_argument("--port", type=int, default=9000, help="0 takes a free one; the first line printed names it")
    parser.add_argument("--token-file", help="file whose first line is the token (or set TEMPFLOW_SCORER_TOKEN)")
    parser.add_argument("--device", default="auto", help="of the scorers; auto takes a GPU if there is one")
    parser.add_argument("--option", action="append", default=[], metavar="KEY=VALUE",
                        help="an option of the scorer; SCORER.KEY=VALUE for one of several scorers")  # fmt: skip
    parser.add_argument("--requests", type=int, default=16, help="requests taken in at once; others wait")
    parser.add_argument("--max-mib", type=float, default=defaults.body / 2**20, help="largest request in MiB")
    parser.add_argument("--max-images", type=int, default=defaults.images, help="images of a request")
    parser.add_argument("--max-prompt", type=int, default=defaults.prompt, help="characters of a prompt")
    return parser.parse_args(arguments)


def build(given: argparse.Namespace) -> ScorerServer:
    """The server that the command line asks for.

    Raises:
        BadInput: no such scorer, wrong options, or an address open to others without a token.
    """
    from tempflow.rewards.parts.options import read_device, read_options
    from tempflow.rewards.scorer import load_scorer
    from tempflow.rewards.servers.server import ScorerServer

    token = read_token("--token-file", given.token_file)
    if token is None and not _is_loopback(given.host):
        hint = "is open to other machines: give a token by --token-file or TEMPFLOW_SCORER_TOKEN, or use 127.0.0.1"
        raise BadInput("--host", given.host, hint)
    for name in ("requests", "max_mib", "max_images", "max_prompt"):
        if not 0 < getattr(given, name) <= MOST:  # nor is NaN
            raise BadInput(f"--{name.replace('_', '-')}", getattr(given, name), f"must be above 0, at most {MOST:,}")
    if len(set(given.scorers)) < len(given.scorers):
        raise BadInput("scorers", " ".join(given.scorers), "names a scorer twice")
    if not 0 <= given.port < 2**16:
        raise BadInput("--port", given.port, "a port lies in 0 .. 65535")
    device = read_device(given.device)
    options = read_options(given.option, given.scorers)
    scorers = [load_scorer("scorer", name, given.max_images, options.get(name), device) for name in given.scorers]
    limits = Limits(int(given.max_mib * 2**20), given.max_images, prompt=given.max_prompt)
    return ScorerServer(scorers, limits, given.requests, token)


def _is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code."""

    def work() -> int:
        given = _arguments(arguments)
        from tempflow.rewards.servers.server import serve  # heavy, and not needed for help

        server = build(given)
        try:
            asyncio.run(serve(server, given.host, given.port))
        except (OSError, ValueError) as error:
            raise BadInput("--port", given.port, f"cannot listen at {given.host} ({error})") from error
        except KeyboardInterrupt:
            pass
        return 0

    return end(work)


if __name__ == "__main__":
    sys.exit(main())
