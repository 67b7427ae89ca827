"""The command line. Parsers are built from jsonargparse; torch is imported by the command that needs it."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from jsonargparse import ArgumentError, ArgumentParser

from qaware.commands import COMMANDS
from qaware.errors import QawareError

EXIT_USER_ERROR = 2
EXIT_UNREAD = 141
"""As of a process that SIGPIPE ends."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command. A mistake of the user's is one line on stderr and exit code 2."""
    parser = make_parser()
    try:
        options = parser.parse_args(list(sys.argv[1:] if arguments is None else arguments))
        command = options.subcommand
        if command is None:
            parser.print_help()
            return EXIT_USER_ERROR
        code = COMMANDS[command](options[command])
        sys.stdout.flush()
        return code
    except (QawareError, ArgumentError) as error:
        return _fail(str(error))
    except BrokenPipeError:
        # Whoever reads has seen enough, such as head. What is left would be an error again at the end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_UNREAD
    except OSError as error:
        return _fail(f"{error.filename or 'input/output'}: {error.strerror or error}")
    except KeyboardInterrupt:
        return _fail("interrupted; what was finished stays in the run folder", 130)


def _fail(message: str, code: int = EXIT_USER_ERROR) -> int:
    print(f"qaware: error: {' '.join(message.split())}", file=sys.stderr)
    return code


def make_parser() -> ArgumentParser:
    """The parser of every command; abbreviations are not accepted."""
    parser = _parser("Quantize Lightning models and score them on every runtime they ship to.", "qaware")
    commands = parser.add_subcommands(required=False)
    run = _parser("Run an experiment file; prints the table and writes a run folder.")
    _add_experiment(run)
    commands.add_subcommand("run", run, help="run an experiment file")
    check = _parser("Match recipes and ask the runtimes what they cannot hold, without training.")
    _add_experiment(check)
    commands.add_subcommand("check", check, help="what would happen to every parameter, and what cannot work")
    sensitivity = _parser("Rank the layers of a recipe by the nats that quantizing each alone costs.")
    _add_experiment(sensitivity)
    _add_sensitivity(sensitivity)
    commands.add_subcommand("sensitivity", sensitivity, help="what quantizing each layer alone costs")
    search = _parser("Find a scheme for each layer within a budget, then export and score it.")
    _add_experiment(search)
    _add_search(search)
    commands.add_subcommand("search", search, help="find a mixed-precision recipe")
    report = _parser("Rebuild table, plot and report from the results.jsonl of a run folder.")
    report.add_argument(
        "folder", type=str, help="a run folder, or the folder of an experiment's runs (newest)"
    )
    commands.add_subcommand("report", report, help="rebuild a run's report")
    evaluate = _parser("Score an exported artifact on its own runtime.")
    _add_evaluate(evaluate)
    commands.add_subcommand("evaluate", evaluate, help="score an artifact")
    generate = _parser("Continue a prompt with an exported language model, on its own runtime.")
    _add_generate(generate)
    commands.add_subcommand("generate", generate, help="continue a prompt with an artifact")
    recipes = _parser("List the named recipes, or print one as YAML.")
    recipes.add_argument("name", type=str, nargs="?", help="a recipe; also a file, or torchchat's JSON")
    recipes.add_argument("--matrix", action="store_true", help="which runs on which runtime, as a table")
    commands.add_subcommand("recipes", recipes, help="list the named recipes")
    overlay = _parser("List the overlays for LightningCLI, or print one: qaware overlay qat > qat.yaml")
    overlay.add_argument("name", type=str, nargs="?", help="an overlay")
    commands.add_subcommand("overlay", overlay, help="print a configuration that adds a callback")
    return parser


def _parser(description: str, prog: str | None = None) -> ArgumentParser:
    return ArgumentParser(prog=prog, description=description, allow_abbrev=False, exit_on_error=False)


def _add_experiment(parser: ArgumentParser) -> None:
    parser.add_argument(
        "config",
        type=str,
        nargs="+",
        help="YAML files, later ones over earlier ones, and key=value (key+=value appends to a list)",
    )
    parser.add_argument(
        "--trust", type=str, action="append", metavar="PACKAGE", help="allow classes of PACKAGE in the files"
    )


def _add_evaluate(parser: ArgumentParser) -> None:
    parser.add_argument("artifact", type=str, help="an exported file, with its sidecar beside it")
    parser.add_argument(
        "--data", type=str, required=True, help="text, jsonl or parquet file; of a classifier images"
    )
    parser.add_argument(
        "--window", type=int, default=None, help="tokens in a window; default as when exported"
    )
    parser.add_argument("--max-windows", type=int, default=None, help="score so many windows or images")


def _add_generate(parser: ArgumentParser) -> None:
    parser.add_argument("artifact", type=str, help="an exported file, with sidecar and tokenizer beside it")
    parser.add_argument("--prompt", type=str, required=True, help="text; empty to start from nothing")
    parser.add_argument("--max-new-tokens", type=int, default=64, help="at most; less where the text ends")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 (default): the likeliest token")
    parser.add_argument("--top-k", type=int, default=0, help="draw from so many likeliest tokens; 0: all")
    parser.add_argument("--seed", type=int, default=0, help="of the draws")


def _add_sensitivity(parser: ArgumentParser) -> None:
    parser.add_argument(
        "--recipe", type=str, help="name, file or torchchat's JSON; default: the experiment's first"
    )
    parser.add_argument(
        "--method", type=str, default="exact", help="exact (measured), estimate (from gradients) or both"
    )
    parser.add_argument("--out", type=str, metavar="FOLDER", help="of table and plot; default: the run's")
    _add_measured(parser)


def _add_search(parser: ArgumentParser) -> None:
    parser.add_argument(
        "--budget", type=str, required=True, help="4.5bpw, bytes=120000 (of the model) or d_nats=0.05"
    )
    parser.add_argument("--bits", type=str, default="2,3,4,5,6,8", help="widths to choose from, e.g. 3,4,8")
    parser.add_argument("--base", type=str, metavar="RECIPE", help="default: the experiment's first")
    parser.add_argument(
        "--method", type=str, default="exact", help="a layer's cost: exact (measured) or estimate (gradients)"
    )
    parser.add_argument("--out", type=str, metavar="FILE", help="the recipe; default: recipe.yaml of the run")
    parser.add_argument("--train", action="store_true", help="train what was found, by the file's finetune")
    parser.add_argument("--seed", type=int, default=None, help="default: the experiment's")
    _add_measured(parser)


def _add_measured(parser: ArgumentParser) -> None:
    parser.add_argument(
        "--windows", type=int, default=32, help="validation windows or batches that layers are measured on"
    )
    parser.add_argument("--checkpoint", type=str, help="weights of the float model, instead of its training")


if __name__ == "__main__":
    sys.exit(main())
