"""One repair of the tiny planted model into a run directory, as a process that may be killed."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

import torch
from tiny_runs import RED, Pictures, Run
from tiny_vit import plant

from sinder_cli.backbone.sources import infos_of
from sinder_cli.backbone.storing import write_safetensors
from sinder_cli.repairing.folder import RunFolder
from sinder_cli.repairing.session import checkpointed
from sinder_cli.signals import Stop

CONFIG = {"model": "tiny", "weights": {}, "images": {}, "settings": {}, "versions": {}}


def main(arguments: Sequence[str]) -> None:
    """Repair into the folder that is named, and go on with the run that is there."""
    torch.set_num_threads(1)
    folder = RunFolder(Path(arguments[0]))
    planted = plant(True, torch.float32)
    pictures = Pictures(*[planted.image(index, torch.float32, red=RED) for index in range(2)])
    run = Run(planted, pictures, lr=0.01, max_steps=3, stop_clean_fraction=1.0, window=1, checkpoint_every=1)
    checkpoints = folder.checkpoints
    with folder.held():
        if not folder.require_free(resume=True, force=False):
            folder.begin(CONFIG)
        else:
            checkpoints.restore(run.deltas, run.progress, print)
        folder.forget_after(run.progress.steps)

        def save() -> None:
            folder.flush_lines()
            checkpoints.write(run.deltas, run.progress)

        with closing(checkpointed(run.steps, save, run.progress, run.settings, Stop(), print)) as records:
            for record in records:
                folder.record(record)
        write_safetensors(folder.model, infos_of(run.weights), run.weights.values())
