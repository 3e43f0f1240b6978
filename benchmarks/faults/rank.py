"""A rank of torchrun that leaves word of its moments: `rank.py FOLDER PAUSE_AT ARGUMENTS...`, see `child.Job`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import importable  # noqa: F401
from faults.child import Job, enter

folder, pause_at, *arguments = sys.argv[1:]
enter(Job(Path(folder), tuple(arguments), pause_at=pause_at))
