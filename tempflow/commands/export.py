"""Writes what a run has learnt for other programs: `tempflow export RUN --to FORMAT`.

    tempflow export runs/digits --to comfyui

writes exports/digits_comfyui.safetensors. At strength 1 every format is the trained change, at .5 half of it.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from tempflow.commands.ending import Parser, end
from tempflow.common.errors import BadInput
from tempflow.export.names import FILES, FORMATS, SUFFIX

if TYPE_CHECKING:
    from tempflow.export.upload import HubOptions

WEIGHTS = ("averaged", "raw")


def _parser() -> Parser:
    formats = "\n".join(f"  {name:<10} {words}" for name, words in FORMATS.items())
    parser = Parser(
        prog="tempflow export", description=__doc__, epilog=f"formats:\n{formats}",
        example="tempflow export runs/digits --to comfyui",
    )  # fmt: skip
    parser.add_argument("run", help="folder of the run, such as runs/digits")
    parser.add_argument("--to", required=True, choices=list(FORMATS), metavar="FORMAT", help=", ".join(FORMATS))
    parser.add_argument("--checkpoint", default="last", metavar="WHICH",
                        help="last, best (by gold), the number of an iteration, or final (default: last)")  # fmt: skip
    parser.add_argument("--weights", default="averaged", choices=WEIGHTS, metavar="WHICH",
                        help="averaged, as evaluations are, or raw (default: averaged)")  # fmt: skip
    parser.add_argument("--dtype", choices=("fp32", "bf16", "fp16"), metavar="PRECISION",
                        help="fp32, bf16 or fp16 (default: a LoRA in fp32, whole weights as in the run)")  # fmt: skip
    parser.add_argument("--output", type=Path, help="file or folder (default: exports/RUN_FORMAT)")
    parser.add_argument("--force", action="store_true", help="replace the files of an earlier export")
    hub = parser.add_argument_group("--to hub")
    hub.add_argument("--base-model", metavar="ID", help="the base's name on the hub, where the run has it in a folder")
    hub.add_argument("--push", metavar="OWNER/NAME", help="upload the folder to this repository of the hub")
    hub.add_argument("--private", action="store_true", help="a repository that is made is private")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code: 0, or 2 for wrong input."""
    return end(lambda: _run(_parser().parse_args(arguments)))


def _run(given: argparse.Namespace) -> int:
    """Exports, and says where to.

    Raises:
        BadInput: whatever the user has to change; nothing was written then.
    """
    from tempflow.export.upload import HubOptions, check_login, push

    _check_hub_options(given)
    output = _output(given)
    options = HubOptions(given.base_model, given.push, given.private)
    if given.push:
        check_login(given.push)
    made = _export(given, output, options)
    print(output)
    if given.push:
        print(push(output, made, options))
    return 0


def _export(given: argparse.Namespace, output: Path, options: HubOptions) -> list[str]:
    """Writes; returns the names of the files, relative to a folder.

    Raises:
        BadInput: as `_run`.
    """
    from tempflow.common.files import resolve
    from tempflow.export.place import check_apart, check_place, check_room, placed

    check_place(output, given.to in FILES, given.force)
    from tempflow.export.subject import open_subject  # torch and diffusers: seconds, which a wrong place need not take
    from tempflow.export.writers import WRITERS

    subject, writer = open_subject(Path(given.run), given.checkpoint, given.weights, given.dtype), WRITERS[given.to]
    check_apart(output, {"run": subject.run.folder, "base": resolve(subject.model.path, "model.path")})
    check_room(output, writer.needed(subject, options))
    with placed(output) as made:
        writer.write(subject, made, options)
        return [str(file.relative_to(made)) for file in sorted(made.rglob("*")) if file.is_file()]


def _output(given: argparse.Namespace) -> Path:
    """The file or folder to be written."""
    name = f"{Path(given.run).resolve().name}_{given.to}" + (SUFFIX if given.to in FILES else "")
    if given.output is None:
        return Path("exports") / name
    inside = given.to in FILES and given.output.suffix != SUFFIX
    return given.output.expanduser() / name if inside else given.output.expanduser()


def _check_hub_options(given: argparse.Namespace) -> None:
    for option in ("base_model", "push", "private"):
        if getattr(given, option) and given.to != "hub":
            raise BadInput(f"--{option.replace('_', '-')}", getattr(given, option), "goes with --to hub")


if __name__ == "__main__":
    sys.exit(main())
