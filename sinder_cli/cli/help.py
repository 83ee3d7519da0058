"""What help and manual pages say beside each option's own words: groups of options, metavars, and examples."""

from __future__ import annotations

from typing import Annotated, Any

import typer

# Of each group: the options that `-h` shows, and those that `--help-all` and the manual page show as well.
PANELS = {
    "Model": ("weights adapter filter", "heads revision branch attention"),
    "Second model": ("compare", "compare_weights compare_adapter compare_heads"),
    "Images": ("data train image_size limit", "resize max_tokens scan_images eval_images strict"),
    "Output": (
        "to out picture figures resume force dry_run format fail_on_defects license",
        "base_model repo_id features figure_formats json verify dynamic_size max_shard_size",
    ),
    "Tasks": ("option no_placebos", "reduce_zero_label sweep resamples"),
    "Machine": ("device dtype batch_size config", "tf32 workers offload seed"),
    "What is looked at": ("stage", "blocks clamp inpaint method exclude_masked"),
    "Which tokens are defective": ("mark norm_factor", "mask_threshold min_tokens min_gap kernel norm_threshold"),
    "How singular values move": (
        "recipe",
        "step trust max_drift min_gain lr momentum target temperature window visit",
    ),
    "How long, and what is kept": (
        "max_steps min_fidelity",
        "stop_clean_fraction stop_images eval_every keep checkpoint_every log",
    ),
    "Others": ("", ""),
    "Help": ("help help_all", ""),
}
OTHERS = "Others"  # the panel of an option that has none; `-h` shows it
PANEL_OF = {name: panel for panel, names in PANELS.items() for name in " ".join(names).split()}
FURTHER = frozenset(name for _, further in PANELS.values() for name in further.split())

# What an option takes, in words: its unit, or what it names.
METAVARS = {
    "batch_size": "IMAGES",
    "blocks": "BLOCKS",
    "checkpoint_every": "STEPS|MINUTES",
    "clamp": "K",
    "compare_heads": "HEADS",
    "device": "DEVICE",
    "eval_every": "STEPS",
    "eval_images": "IMAGES",
    "figures": "IMAGES",
    "heads": "HEADS",
    "image_size": "PIXELS",
    "limit": "IMAGES",
    "lr": "RATE",
    "mask_threshold": "DEVIATIONS",
    "max_drift": "SHARE",
    "max_steps": "STEPS",
    "max_tokens": "TOKENS",
    "min_fidelity": "COSINE",
    "min_gain": "RATIO",
    "min_gap": "RATIO",
    "min_tokens": "TOKENS",
    "momentum": "SHARE",
    "norm_factor": "MULTIPLE",
    "norm_threshold": "NORM",
    "resamples": "RESAMPLES",
    "scan_images": "IMAGES",
    "seed": "NUMBER",
    "stop_clean_fraction": "SHARE",
    "stop_images": "IMAGES",
    "temperature": "NUMBER",
    "trust": "SHARE",
    "window": "BLOCKS",
    "workers": "PROCESSES",
}

EXAMPLES = {
    "predict-defects": (
        ("the directions of an official model", "sinder predict-defects dinov2_vits14"),
        (
            "of a checkpoint, as safetensors",
            "sinder predict-defects dinov2_vitg14 --weights vitg14.pth -o directions.safetensors",
        ),
    ),
    "analyze": (
        ("one photograph, in five lines and a picture", "sinder analyze dinov2_vits14 photo.jpg"),
        (
            "a run before and after, with a report",
            "sinder analyze dinov2_vits14 --data photos/ --compare run/ --out analysis/",
        ),
    ),
    "repair": (
        ("with the default recipe", "sinder repair dinov2_vitl14 --data photos/ --out run/"),
        ("go on with an interrupted run", "sinder repair run/ --resume"),
        ("go on with a run that has ended at --max-steps", "sinder repair run/ --resume --max-steps 2000"),
    ),
    "evaluate": (
        ("without labels", "sinder evaluate run/ dense --data photos/ --out eval/"),
        ("on class folders, two tasks", "sinder evaluate run/ knn linear --data classes/ --out eval/"),
    ),
    "export": (
        ("for transformers", "sinder export run/ --to transformers --out folder/"),
        ("the small file of the changes alone", "sinder export run/ --to adapter --out repaired.safetensors"),
    ),
    "backbones": (
        ("all models", "sinder backbones"),
        ("those whose names hold a word", "sinder backbones --filter dinov3"),
    ),
    "check-backbone": (
        ("a plugin that draws its weights", "sinder check-backbone demo_vit"),
        ("with a checkpoint", "sinder check-backbone dinov2_vits14 --weights vits14.pth"),
    ),
    "runs": (
        ("all runs below a folder", "sinder runs sinder-runs/"),
        ("the verdicts, for a script", "sinder runs sinder-runs/ --format json | jq '.[].verdict'"),
    ),
    "doctor": (
        ("what is installed here", "sinder doctor"),
        ("for pasting into an issue", "sinder doctor --format json"),
    ),
    "demo": (
        ("predict, repair and export a small model", "sinder demo"),
        ("into a folder of one's own", "sinder demo --out demo/"),
    ),
    "man": (
        ("the main page", "sinder man"),
        ("the page of a command", "sinder man repair"),
    ),
}


def dressed(command: Any, name: str) -> Any:
    """Give a loaded subcommand its groups of options, their metavars, its examples, `-h` and `--help-all`."""
    command.add_help_option = False  # its own ones have a group, and two lengths
    command.params += _help_options(len([each for each in command.params if each.param_type_name == "option"]))
    for parameter in command.params:
        _describe(parameter)
    command.params.sort(key=_place)
    command.epilog = "\n\n".join(f"[dim]# {words}[/]\n[bold]{line}[/]" for words, line in EXAMPLES[name])
    return command


def usage_of(argument: Any) -> str:
    """Return an argument as a synopsis shows it: in brackets if it can be left out, with dots if it repeats."""
    name = argument.metavar if argument.required else f"[{argument.metavar}]"
    return f"{name}..." if argument.nargs != 1 else name


def _describe(parameter: Any) -> None:
    """Give a parameter its group and metavar; flags and arguments show no type."""
    if parameter.param_type_name != "option":
        parameter.metavar = (parameter.metavar or parameter.name.upper()).strip("[].")
        parameter.display_type_rich = _nothing
        return
    parameter.rich_help_panel = PANEL_OF.get(parameter.name, OTHERS)
    if parameter.is_flag:
        parameter.metavar = ""
    else:  # None where there are choices, which the parser shows
        parameter.metavar = parameter.metavar or METAVARS.get(parameter.name)


def _nothing(ctx: Any) -> None:  # the parser's name for it
    """Show no type."""


def _help_options(others: int) -> list[Any]:
    """Return the parser's objects of `--help` and `--help-all`, for a command with so many other options."""
    app = typer.Typer(add_completion=False)
    app.command()(_asked)
    options: list[Any] = typer.main.get_command(app).params
    short, every = options
    every.help = f"Show all {others} options." if others > 1 else every.help
    return [short, every]


def _show_common(context: typer.Context, wanted: bool) -> None:
    if not wanted or context.resilient_parsing:
        return
    parameters: list[Any] = context.command.params  # of this call alone
    for parameter in parameters:
        parameter.hidden = parameter.name in FURTHER
    _show_all(context, wanted)


def _show_all(context: typer.Context, wanted: bool) -> None:
    if wanted and not context.resilient_parsing:
        typer.echo(context.get_help())
        raise typer.Exit


def _asked(
    help: Annotated[  # the option's name
        bool,
        typer.Option(
            "-h",
            "--help",
            is_eager=True,
            expose_value=False,
            callback=_show_common,
            help="Show the common options.",
        ),
    ] = False,
    help_all: Annotated[
        bool,
        typer.Option(
            "--help-all", is_eager=True, expose_value=False, callback=_show_all, help="Show the same as --help."
        ),
    ] = False,
) -> None: ...


def _place(parameter: Any) -> int:
    """Return the place of a parameter's group; arguments come first, and groups keep their order."""
    return -1 if parameter.param_type_name != "option" else list(PANELS).index(PANEL_OF.get(parameter.name, OTHERS))
