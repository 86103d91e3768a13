"""What ``clkit fit --help`` says: clkit's own settings, in one screen and without an import of torch.

``--help.all`` shows every setting instead. A test compares the names here with the classes that they are of.
"""

from __future__ import annotations

import textwrap

__all__ = ["CALLBACKS", "CLASSES", "COMMANDS", "OPTIONS", "STRATEGY_NAMES", "settings_help"]

COMMANDS = {
    "fit": "learn from a stream",
    "validate": "evaluate a checkpoint on the validation samples",
    "test": "evaluate a checkpoint on the test samples",
    "predict": "write predictions.csv for the test samples, or answer image files",
}

STRATEGY_NAMES = ("gradient_free", "er", "er_ace", "der_pp", "scr", "onpro", "editor_training")
CALLBACKS = (
    "AEFOCL",
    "AnaCP",
    "DEUP",
    "DSimplex",
    "DST",
    "KLDA",
    "LDA",
    "MEND",
    "NMC",
    "StreamEvaluation",
    "StreamProgressBar",
)
SCENARIOS = (
    "ClassIncremental",
    "TaskIncremental",
    "DomainIncremental",
    "NaturalOrder",
    "Joint",
    "LongTailed",
    "Blurry",
)

# names that a setting takes, for the completion of a shell
CLASSES = {
    "--trainer.strategy": STRATEGY_NAMES,
    "--trainer.callbacks": CALLBACKS,
    "--trainer.callbacks.help": CALLBACKS,
    "--data.scenario": SCENARIOS,
    "--data.scenario.help": SCENARIOS,
}

_Rows = tuple[tuple[str, str], ...]

_GROUPS: dict[str, _Rows] = {
    "options": (
        ("-c, --config FILE", "settings from a YAML file; a second one changes the first"),
        ("--ckpt_path FILE", "fit goes on from this checkpoint, the others evaluate it"),
        ("--seed_everything N", "seed of weights and of what modules draw (default: 0)"),
        ("--print_config", "print all settings as YAML and end"),
        ("--verbose", "where something is refused, say all that is known of it"),
        ("--help.all", "every setting, Lightning's too"),
        (
            "--trainer.callbacks.help CLASS",
            "settings of a class; so with strategy and data.scenario",
        ),
    ),
    "what arrives (StreamDataModule; another data module by --data CLASS)": (
        (
            "--data.source NAME",
            "digits, digits:flat, digits:shifts, npz:NAME, folder:NAME, or a class (default: digits)",
        ),
        ("--data.root DIR", "where data lie (default: the folder that CLKIT_DATA names)"),
        ("--data.scenario CLASS", f"{', '.join(SCENARIOS)} (default: ClassIncremental)"),
        ("--data.scenario.experiences N", "into how many experiences the classes are cut (default: 5)"),
        ("--data.epochs_per_experience N", "how often an experience is seen before the next (default: 1)"),
        ("--data.batch_size N", "samples of a batch (default: 32)"),
        ("--data.preprocessing CLASS", "Preprocessing, whose size, mean and std follow as --data.preprocessing.size N"),
        (
            "--data.val_fraction SHARE",
            "held out of the training samples to evaluate on; else the test samples are used",
        ),
        ("--data.stop_after N", "end after so many experiences"),
        ("--data.seed N", "seed of the order of samples (default: 0)"),
        ("--data.num_workers N", "processes that load (default: 0)"),
    ),
    "the network (TimmClassifier; another module by --model CLASS)": (
        ("--model.backbone NAME", "a timm model, or identity for features as they are (default: resnet18)"),
        ("--model.pretrained true", "start from timm's weights, as they lie in its cache"),
        ("--model.checkpoint_path FILE", "start from weights in a file"),
        ("--model.model_kwargs DICT", "more arguments of timm.create_model, e.g. '{in_chans: 1}'"),
        ("--model.small_images true", "a first convolution for images of about 32 pixels"),
    ),
    "how it learns": (
        ("--trainer.strategy NAME", f"{', '.join(STRATEGY_NAMES)}; without one the network trains as ever"),
        ("--trainer.strategy.SETTING VALUE", "a setting of a strategy that the configuration names by its class"),
        ("--trainer.strategy.warmup NAME", "of gradient_free, what warmup_epochs train: all, norms, last_block, lora"),
        ("--trainer.callbacks+ CLASS", f"add {', '.join(CALLBACKS[:-1])}, or any callback of Lightning"),
        ("--trainer.callbacks.SETTING VALUE", "a setting of the callback that was added last"),
        ("--trainer.max_epochs N", "-1: as long as the stream"),
        ("--trainer.accelerator NAME", "cpu, gpu, auto (default: auto); --trainer.devices N says how many"),
        ("--trainer.precision NAME", "32-true, 16-mixed, bf16-mixed, ..."),
        ("--trainer.default_root_dir DIR", "where results go, if no logger has a folder"),
        ("--trainer.enable_progress_bar false", "no bar; so with --trainer.enable_model_summary"),
    ),
}

OPTIONS = tuple(
    word.rstrip(",+") for rows in _GROUPS.values() for name, _ in rows for word in name.split() if word[0] == "-"
)


def settings_help(command: str, width: int) -> str:
    """Return the help of a command, for a terminal of this width."""
    text = [
        f"usage: clkit {command} [--config FILE] [--SETTING VALUE ...] [--ckpt_path FILE]",
        "       clkit predict CHECKPOINT IMAGE [IMAGE ...] [--head NAME] [--top N]" if command == "predict" else "",
        f"{COMMANDS[command].capitalize()}. Start from a recipe: clkit recipes nmc > mine.yaml, then clkit {command} "
        "--config mine.yaml.",
    ]
    text[2:] = ["", *textwrap.wrap(text[2], width)] if text[1] else textwrap.wrap(text[2], width)
    column = 36
    for title, rows in _GROUPS.items():
        text += ["", f"{title}:"]
        for name, said in rows:
            lines = textwrap.wrap(said, max(width - column, 30))
            head = f"  {name}"
            if len(head) >= column - 1:
                text.append(head)
                head = ""
            text += [f"{head if not number else '':<{column}}{line}" for number, line in enumerate(lines)]
    return "\n".join(text) + "\n"
