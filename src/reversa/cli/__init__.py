"""The command line: it parses, calls and prints. Each verb is one file here and one line in the table."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Sequence

import reversa
from reversa.errors import ReversaError, SettingError, nearest

# What each verb does. Its module ``reversa.cli.VERB``, imported when asked for, has ``run(arguments) -> exit status``.
VERBS = {
    "train": "train a reversible network on real images, and measure what it costs",
    "models": "list the networks by name, with their parameters",
    "convert": "what a conversion makes of a network: stages, bytes, and what is left",
    "check": "find out whether a converted model trains right",
    "memory": "what a training step costs in memory: estimated, measured, drawn",
    "plan": "the fastest way to train within a memory budget, block by block",
}

FAILED, INTERRUPTED = 2, 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Run ``reversa VERB ...`` and return the exit status.

    0: done. 1: a check found training to be wrong. 2: bad input, with a message. 130: Ctrl-C.
    """
    try:
        status = _run(sys.argv[1:] if arguments is None else list(arguments))
        sys.stdout.flush()
        return status
    except BrokenPipeError:  # whoever read, such as head, has seen enough; Python would complain at its end
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except ReversaError as error:
        print(f"reversa: {error}", file=sys.stderr)
        return FAILED
    except KeyboardInterrupt as interrupt:
        print(str(interrupt) or "Interrupted.", file=sys.stderr)
        return INTERRUPTED


def _run(arguments: list[str]) -> int:
    verbs = "\n".join(f"  {verb:<8} {does}" for verb, does in VERBS.items())
    parser = argparse.ArgumentParser(
        prog="reversa",
        description="Deep residual networks whose activation memory does not grow with depth.",
        epilog=f"verbs:\n{verbs}\n\nreversa VERB --help tells the settings of a verb.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"reversa {reversa.__version__}")
    parser.add_argument("command", nargs=argparse.PARSER, metavar="VERB ...", help="what to do, and its settings")
    verb, *rest = parser.parse_args(arguments or ["--help"]).command
    if verb not in VERBS:
        raise SettingError(nearest(verb, VERBS, "verb"))
    return importlib.import_module(f"reversa.cli.{verb}").run(rest)
