"""The command line: a table of verbs, each imported only when it is used.

A verb lives in its room's `command.py`; this file knows names and one-line helps alone, so that
`clover --help` does not pay for torch.
"""

from __future__ import annotations

import errno
import importlib
import io
import os
import sys

import click

from clover.core.errors import CloverError, nearest

# verb -> (module:attribute, one line of help). The words are a promise (DESIGN, section 4).
VERBS: dict[str, tuple[str, str]] = {
    "demo": ("clover.demo.command:demo", "The whole recipe on the phantom, in minutes."),
    "phantom": ("clover.phantom.command:phantom", "Make synthetic histology with known truth."),
    "data": ("clover.data.command:data", "Other people's data as records; looked over."),
    "instruct": ("clover.instruct.command:instruct", "Captions in, checked instructions out."),
    "features": ("clover.vision.command:features", "Run the frozen image encoder once."),
    "align": ("clover.align.command:align", "Stage 1: contrast, match, caption."),
    "tune": ("clover.tune.command:tune", "Stage 2: instruction tuning, frozen language model."),
    "evaluate": ("clover.evaluate.command:evaluate", "Predict and score, with controls."),
    "score": ("clover.evaluate.command:score", "Score anybody's predictions."),
    "ask": ("clover.serve.command:ask", "One question about one image."),
    "chat": ("clover.serve.command:chat", "A conversation about an image."),
    "serve": ("clover.serve.command:serve", "An OpenAI-compatible server on this machine."),
    "convert": ("clover.convert.command:convert", "Checkpoints of CLOVER, LAVIS, transformers."),
    "plan": ("clover.plan.command:plan", "Memory, time and money before you start."),
    "report": ("clover.report.command:report", "One self-contained HTML page for a run."),
    "fetch": ("clover.serve.fetch:fetch", "Bring the models a recipe names into the cache."),
    "doctor": ("clover.serve.doctor:doctor", "What this machine can do."),
}

_REFUSED = (errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EEXIST, errno.ENAMETOOLONG)
"""What a folder says that may not be used, or is none."""


class LazyGroup(click.Group):
    """A click group whose commands are imported when they are named."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the verbs in the order of the table."""
        return list(VERBS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import and return one verb's command."""
        if cmd_name not in VERBS:
            raise CloverError(f"no verb '{cmd_name}'{nearest(cmd_name, VERBS)}")
        module, attribute = VERBS[cmd_name][0].split(":")
        command: click.Command = getattr(importlib.import_module(module), attribute)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """List the verbs from the table, importing none of them."""
        with formatter.section("Verbs"):
            formatter.write_dl([(verb, text) for verb, (_, text) in VERBS.items()])


@click.group(
    cls=LazyGroup,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Example: clover demo --out clover-demo. Research use only, not for diagnosis.",
)
@click.version_option(package_name="clover-pathology", prog_name="clover")
def cli() -> None:
    """CLOVER: from captions of pathology images to a model you can talk to."""


def main(arguments: list[str] | None = None) -> None:
    """Run the command line; a user's mistake is one line on stderr and exit code 2."""
    # Both libraries print advice to stderr that is no business of a CLOVER user's.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    _say_what_can_be_said()
    try:
        code = cli.main(args=arguments, prog_name="clover", standalone_mode=False)
    except (CloverError, click.ClickException) as error:
        message = error.format_message() if isinstance(error, click.ClickException) else str(error)
        click.echo("clover: " + " ".join(message.split()), err=True)
        sys.exit(2)
    except (KeyboardInterrupt, click.Abort):
        click.echo("clover: stopped; the same command continues where it was", err=True)
        sys.exit(130)
    except BrokenPipeError:
        sys.exit(0)
    except OSError as error:
        refusal = _refusal(error)
        if refusal is None:
            raise
        click.echo(f"clover: {refusal}", err=True)
        sys.exit(2)
    sys.exit(code if isinstance(code, int) else 0)


def _say_what_can_be_said() -> None:
    """Let a sign that the output's encoding lacks become a question mark, not the command's end.

    Redirected output is cp1252 on Windows and whatever the locale says elsewhere: neither has all
    of "→", "≥" and what a model may answer.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")


def _refusal(error: OSError) -> str | None:
    """Return what to say of an error that the user's disk or path is to blame for."""
    from clover.core.files import FULL, disk_refused

    if error.errno in FULL:
        return str(disk_refused(error.filename or "a file", error))
    if error.errno in _REFUSED and error.filename is not None:
        return f"cannot use {error.filename}: {error.strerror}; give another path"
    return None


if __name__ == "__main__":
    main()
