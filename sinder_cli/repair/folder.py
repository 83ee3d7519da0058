"""The run directory: what a repair leaves behind, by name."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from sinder_cli.errors import BadInputError, NoInputError
from sinder_cli.repair.loop import StepRecord


@dataclass(frozen=True)
class RunFolder:
    """The names inside a run directory."""

    path: Path

    @property
    def config(self) -> Path:
        return self.path / "config.json"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def model(self) -> Path:
        return self.path / "model.safetensors"

    @property
    def adapter(self) -> Path:
        return self.path / "adapter.safetensors"

    @property
    def summary(self) -> Path:
        return self.path / "summary.json"

    @property
    def report(self) -> Path:
        return self.path / "report.html"

    @property
    def card(self) -> Path:
        return self.path / "README.md"

    def record(self, step: StepRecord) -> None:
        """Append one line to the metrics."""
        with self.metrics.open("a", encoding="utf-8") as file:
            file.write(json.dumps(asdict(step)) + "\n")

    def repaired_model(self) -> tuple[str, int | None]:
        """The name of the model that was repaired here, and the heads that its user gave.

        Raises `BadInputError` for an unreadable `config.json` and `NoInputError` for a run that did not finish.
        """
        if not self.config.is_file():
            raise NoInputError(f"cannot use {self.path}", "it is no run directory of `sinder repair`", "check the path")
        try:
            config: dict[str, Any] = json.loads(self.config.read_text(encoding="utf-8"))
            model, heads = str(config["model"]), config.get("heads")
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            why = f"{type(error).__name__}: {error}"
            raise BadInputError(f"cannot read {self.config}", why, "is it a run directory?") from error
        if not self.model.is_file():
            why = "there is no model.safetensors: its run did not finish"
            raise NoInputError(f"cannot use {self.path}", why, "run `sinder repair` anew")
        return model, heads
