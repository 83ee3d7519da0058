"""Starting: help, the list of models and completion, against loading torch."""

from __future__ import annotations

from collections.abc import Iterator

from measuring import PYTHON, Row, in_turn, sinder

GOAL = 0.15
COMPLETED = (
    "import os, sys; from sinder_cli.cli.main import main; sys.argv[0] = 'sinder';"
    " os.environ |= {{'_SINDER_COMPLETE': 'complete_bash', 'COMP_WORDS': '{words}', 'COMP_CWORD': '{at}'}}; main()"
)


def rows(tiny: bool) -> Iterator[Row]:
    """Yield a row for each command, timed in turn with the import of torch."""
    commands = {
        "`sinder --help`": sinder("--help"),
        "`sinder backbones`": sinder("backbones"),
        "completion of a command": [PYTHON, "-c", COMPLETED.format(words="sinder rep", at=1)],
        "completion of a model": [PYTHON, "-c", COMPLETED.format(words="sinder repair dinov2_v", at=2)],
    }
    torch, *ours = in_turn([[PYTHON, "-c", "import torch"], *commands.values()], 1 if tiny else 9)
    for name, cost in zip(commands, ours, strict=True):
        met = (cost.seconds or 0) <= GOAL * (torch.seconds or 0)
        yield Row(name, cost, "`import torch`", torch, goal=f"≤ {GOAL} ×", met=met)
