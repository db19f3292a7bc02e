"""`zaya`: the command line. Errors are one line on stderr and exit code 2."""

import signal
import sys
from typing import Annotated

import tyro

from pallas_kernels import selection
from zaya_jax.cli.bench import Bench
from zaya_jax.cli.chat import Chat
from zaya_jax.cli.convert import Convert
from zaya_jax.cli.data import Data
from zaya_jax.cli.demo import Demo
from zaya_jax.cli.doctor import Doctor
from zaya_jax.cli.eval import Eval
from zaya_jax.cli.generate import Generate
from zaya_jax.cli.info import Info
from zaya_jax.cli.output import fail
from zaya_jax.cli.plot import Plot
from zaya_jax.cli.solve import Solve
from zaya_jax.cli.train import Train
from zaya_jax.cli.verify import Verify
from zaya_jax.errors import ZayaError

Command = (
    Annotated[Generate, tyro.conf.subcommand("generate")]
    | Annotated[Solve, tyro.conf.subcommand("solve")]
    | Annotated[Eval, tyro.conf.subcommand("eval")]
    | Annotated[Chat, tyro.conf.subcommand("chat")]
    | Annotated[Info, tyro.conf.subcommand("info")]
    | Annotated[Doctor, tyro.conf.subcommand("doctor")]
    | Annotated[Demo, tyro.conf.subcommand("demo")]
    | Annotated[Convert, tyro.conf.subcommand("convert")]
    | Annotated[Verify, tyro.conf.subcommand("verify")]
    | Annotated[Bench, tyro.conf.subcommand("bench")]
    | Annotated[Train, tyro.conf.subcommand("train")]
    | Annotated[Plot, tyro.conf.subcommand("plot")]
    | Annotated[Data, tyro.conf.subcommand("data")]
)


def main(arguments: list[str] | None = None) -> None:
    """Runs one command."""
    command = tyro.cli(
        Command,  # type: ignore[arg-type]
        prog="zaya",
        description="ZAYA1 in JAX: generate text, chat, convert and inspect models.",
        args=arguments,
        config=(tyro.conf.OmitArgPrefixes, tyro.conf.FlagCreatePairsOff),
    )
    try:
        selection.requested()
    except ValueError as error:
        fail(str(error))
    try:
        command.run()
    except ZayaError as error:
        fail(str(error))
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # one more while Python shuts down
        sys.exit(130)
    except BrokenPipeError:
        sys.stderr.close()  # the reader of our output is gone
        sys.exit(1)


if __name__ == "__main__":
    main()
