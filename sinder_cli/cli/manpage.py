"""Manual pages from the command tree: `python -m sinder_cli.cli.manpage FOLDER` writes all of them."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from sinder_cli.cli.help import EXAMPLES, usage_of
from sinder_cli.cli.main import HELP, whole_tree
from sinder_cli.files import write_text
from sinder_cli.repairing.folder import RUN_FILES
from sinder_cli.report.manual import NAME, escape, head, schema_page, wrapped

EXIT_CODES = {
    0: "success; skipped inputs, if any, were reported",
    1: "negative result: --fail-on-defects found some, or a repair did not improve the model",
    2: "usage",
    65: "bad input data: checkpoint, image, or a plugin's layer map",
    66: "no input: a missing file or an empty folder",
    69: "a plugin or its library is unavailable, or a download failed",
    70: "internal error",
    73: "the output cannot be created",
    74: "input or output failed, or the disk is full",
    75: "try again: out of memory, another process holds the folder, or a process that helped has died",
    78: "settings or plugins contradict each other",
    130: "interrupted (143: terminated, 141: closed pipe)",
}


DESCRIPTIONS = {
    "predict-defects": (
        "Reads the weights of a model, block by block, and prints the directions in which its tokens would"
        " grow without bound: the leading left singular vectors of the linearized blocks. No image is looked"
        " at, and the module is never built. A direction that has settled is not yet a defect; sinder analyze"
        " shows whether tokens take it."
    ),
    "analyze": (
        "Runs images through a model and looks at the tokens after every block, before the final norm: which"
        " stand out, from which block on, in which direction, whether the weights predict that, and what it"
        " spoils. Up to eight photographs as plain arguments are answered in five lines and a picture; a set"
        " of images (--data) is answered in a table, and with --out in a report."
    ),
    "repair": (
        "Finds the defective tokens of a model, and shrinks the singular values that write them, one at a"
        " step. A tenth of the images, never trained on, is the guard that judges every state: the one that is"
        " kept has the fewest outlying tokens of those that spoil neither cls nor good tokens. Without images,"
        " drawn images are used. A run that was interrupted goes on with --resume, to the same bytes on the"
        " same machine; one that has ended at --max-steps goes on if it is given more."
    ),
    "evaluate": (
        "Runs tasks on a model, or on a run's model before and after, beside placebos that change the same"
        " tokens without a repair. Every difference to the original has an interval over resampled images. A"
        " repair that does not beat averaging the marked tokens away is called an inpainting filter."
    ),
    "export": (
        "Writes weights for the library that will load them. Across libraries tensors are converted by their"
        " roles; what a format cannot hold is refused with the reason. What was written is loaded by that"
        " library in another process, and its features are compared token by token, before it gets its name."
    ),
    "runs": (
        "Looks for run directories below a folder, by default sinder-runs/, and prints a line for each, also"
        " for those that have not ended or cannot be read."
    ),
    "backbones": (
        "Asks the installed plugins which models they describe, and prints name, size, patch and prefix"
        " tokens of each. Any of these names can be given wherever a command takes a model."
    ),
    "check-backbone": (
        "Runs a model through all that sinder relies on: its layer map against its weights, tokens against"
        " pixels, passes with and without hooks, gradients, the linearized blocks, a step of a repair, and an"
        " export. Prints a line for each check."
    ),
    "doctor": (
        "Prints what this machine has: versions of libraries, cores and memory, attention kernels, plugins"
        " and the folders of downloads. Something that is missing is named with what needs it. For a bug"
        " report, add its output."
    ),
    "demo": (
        "Tells the whole story on demo_vit, a small model from a seed with a defect planted in block 5: the"
        " prediction, the repair, and the export. Ends with commands that go on from there, ready to be"
        " pasted."
    ),
    "man": (
        "Prints the page of a command, of sinder itself, or of the JSON document of an analysis (sinder man"
        " analysis), also where sinder was installed into an environment that the manual's path does not know."
    ),
}

DOWNLOADS = {"~/.cache/torch/hub/checkpoints/": "official checkpoints that were downloaded"}
# What a command reads or writes, beside the files that its options name.
FILES = {
    "sinder": {
        "sinder-runs/": "where repair puts runs without --out; a run directory can be named wherever a model is",
        "sinder-looks/": "where analyze keeps the pictures of photographs given as plain arguments",
        **DOWNLOADS,
    },
    "predict-defects": {
        "FILE.safetensors": "with -o: one float32 tensor [blocks, width] for each stage, rows of unit norm",
        **DOWNLOADS,
    },
    "analyze": {
        "sinder-looks/": "the pictures of photographs given as plain arguments, without --picture",
        "DIR/report.html": "with --out: the report, in one file that loads nothing",
        "DIR/report.json": "the document of sinder-analysis(5)",
        "DIR/directions.safetensors": "the predicted and the observed directions of every block",
        "DIR/figures/": "the charts and pictures of the report; --figure-formats adds SVG, PDF or CSV",
        "DIR/IMAGE.safetensors": "with --features: patches and cls of each image",
        **DOWNLOADS,
    },
    "repair": {
        "sinder-runs/MODEL/": "the run directory without --out; the following are in it",
        **{name: meaning.replace("`", "") for name, meaning in RUN_FILES.items()},
        **DOWNLOADS,
    },
    "evaluate": {
        "DIR/evaluation.json": "with --out: every figure, with its interval and what it is compared with",
        "DIR/evaluation.csv": "the same figures, a line for each",
        "DIR/report.html": "the report, in one file that loads nothing",
        "DIR/pictures/": "the images that changed most, and a chart for each task",
        "DIR/features/": "tokens of every image, from which an interrupted evaluation goes on; --features names"
        " another folder",
        **DOWNLOADS,
    },
    "export": {
        "DIR/config.json, DIR/model.safetensors": "transformers, hf-repo and timm: what the library loads, in"
        " shards with --max-shard-size",
        "DIR/hubconf.py": "torchhub: the folder for torch.hub.load, with the weights beside it",
        "DIR/README.md, DIR/pictures/": "a model card, in every folder; in hf-repo without a path or a photograph"
        " of yours",
        "DIR/sinder_export.json": "in every folder: what was exported, and how it was checked",
        "FILE.onnx": "onnx: pixels [B, 3, H, W] in, normalized tokens out",
        "FILE.safetensors, FILE.pth, FILE.pt": "native, dinov2: a state dict, as the ending says",
        "FILE.safetensors": "adapter: the changes of singular values; diff: the changed tensors; for --adapter",
        **DOWNLOADS,
    },
    "runs": {
        "sinder-runs/": "the folder that is looked through if none is named",
        "config.json, metrics.jsonl, summary.json": "what is read of each run directory",
    },
    "backbones": {},
    "check-backbone": DOWNLOADS,
    "doctor": {"~/.cache/torch/hub/": "torch hub's cache", "~/.cache/huggingface/": "that of the Hugging Face hub"},
    "demo": {
        "sinder-runs/demo/": "the run directory, without --out; that of an earlier demo is replaced",
        "exported.pth": "in it: the repaired weights, with the model's own keys",
    },
    "man": {},
}
# Pages that a reader of one may want next; each has sinder(1) as well.
SEE_ALSO = {
    "predict-defects": ("analyze", "repair"),
    "analyze": ("predict-defects", "repair", "analysis"),
    "repair": ("analyze", "evaluate", "export", "runs"),
    "evaluate": ("repair", "export"),
    "export": ("repair", "evaluate"),
    "runs": ("repair",),
    "backbones": ("check-backbone",),
    "check-backbone": ("backbones",),
    "doctor": ("backbones",),
    "demo": ("analyze", "repair", "export"),
    "man": (),
}
FIRST_HOUR = ("demo", "analyze", "repair", "evaluate", "export")  # the commands whose examples the main page has
ENVIRONMENT = {
    "SINDER_PLUGINS": "names of the plugins that may load, separated by commas; all, if it is unset",
    "TORCH_HOME, XDG_CACHE_HOME, HF_HOME": "where downloads are kept",
    "OMP_NUM_THREADS": "threads of the matrix products; by default as many as the container has cores",
    "NO_COLOR": "no colours on a terminal",
    "SINDER_PICTURES": "1: ask any terminal whether it shows pictures, 0: none; else those that are known to",
}


def pages() -> dict[str, str]:
    """Return the roff text of each page by file name: `sinder`, every subcommand and the format of an analysis."""
    tree = whole_tree()
    rendered = {"sinder.1": _main_page(tree)}
    for name, subcommand in sorted(tree.commands.items()):
        rendered[f"sinder-{name}.1"] = _page(name, subcommand)
    return rendered | {NAME: schema_page()}


def _main_page(tree: Any) -> str:
    lines = [*_head("sinder", HELP.split("\n")[0]), ".SH SYNOPSIS", ".B sinder", "[\\-\\-debug] COMMAND [ARGS]"]
    lines += [".SH DESCRIPTION", *(escape(line) for line in HELP.split("\n") if line)]
    lines += [".SH COMMANDS"]
    for name, subcommand in sorted(tree.commands.items()):
        lines += [".TP", f".BR sinder\\-{escape(name)} (1)", escape(_summary(subcommand))]
    examples = [EXAMPLES[name][0] for name in FIRST_HOUR]
    lines += [".SH OPTIONS", *_options(tree), *_help_option(), *_examples(examples), *_surroundings("sinder")]
    return "\n".join(wrapped([*lines, *_see_also([*sorted(tree.commands), "analysis"])])) + "\n"


def _page(name: str, subcommand: Any) -> str:
    arguments = [p for p in subcommand.params if p.param_type_name == "argument"]
    synopsis = " ".join(["[OPTIONS]", *(escape(usage_of(argument)) for argument in arguments)])
    lines = [*_head(f"sinder-{name}", _summary(subcommand)), ".SH SYNOPSIS", f".B sinder {escape(name)}", synopsis]
    lines += [".SH DESCRIPTION", escape(DESCRIPTIONS[name])]
    if arguments:
        lines += [".SH ARGUMENTS"]
    for argument in arguments:
        lines += [".TP", f".I {escape(argument.metavar)}", escape(argument.help or "")]
    lines += [".SH OPTIONS", *_options(subcommand), *_examples(EXAMPLES[name]), *_surroundings(name)]
    return "\n".join(wrapped([*lines, *_see_also(["", *SEE_ALSO[name]])])) + "\n"


def _examples(examples: Iterable[tuple[str, str]]) -> list[str]:
    lines = [".SH EXAMPLES"]
    for words, example in examples:
        lines += [".TP", escape(f"{words[0].upper()}{words[1:]}:"), f".B {escape(example)}"]
    return lines


def _see_also(names: Sequence[str]) -> list[str]:
    """Return the section that names other pages; the empty name is that of the main page."""
    pages = [(f"sinder-{name}" if name else "sinder", 5 if name == "analysis" else 1) for name in names]
    lines = [f".BR {escape(page)} ({section})," for page, section in pages]
    return [".SH SEE ALSO", *lines[:-1], lines[-1].removesuffix(",")]


def _surroundings(name: str) -> list[str]:
    """Return what stands around a command: its files, if it has any, the environment, the exit status."""
    lines = []
    for heading, entries in ((".SH FILES", FILES[name]), (".SH ENVIRONMENT", ENVIRONMENT)):
        lines += [heading] if entries else []
        for entry, meaning in entries.items():
            lines += [".TP", f".I {escape(entry)}", escape(meaning)]
    return [*lines, ".SH EXIT STATUS", *_exit_status()]


def _exit_status() -> list[str]:
    return [line for code, meaning in EXIT_CODES.items() for line in (".TP", f".B {code}", escape(meaning))]


def _options(subcommand: Any) -> list[str]:
    lines = []
    for option in subcommand.params:
        record = option.get_help_record(_context(subcommand)) if option.param_type_name == "option" else None
        if record:
            flags, text = record
            lines += [".TP", f".B {escape(flags)}", escape(text)]
    return lines


def _help_option() -> list[str]:
    """Return the option that the parser adds to the main command."""
    return [".TP", ".B \\-h, \\-\\-help", "Show this message and exit."]


def _context(subcommand: Any) -> Any:
    return subcommand.context_class(subcommand)


def _head(name: str, summary: str) -> list[str]:
    return head(name, 1, summary, "User Commands")


def _summary(subcommand: Any) -> str:
    return (subcommand.help or "").split("\n")[0]


def write_pages(folder: Path) -> None:
    """Write all pages into `folder`."""
    for name, text in pages().items():
        write_text(folder / name, text)


if __name__ == "__main__":
    write_pages(Path(sys.argv[1]))
