"""The command line: `fastllm info | bench | patch | data | train | eval | generate | report | demo`."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastllm._command import Parser, integer


def parser() -> argparse.ArgumentParser:
    """The parser of every command but `bench`, which has one of its own."""
    from fastllm._version import __version__
    from fastllm.data import command as data_command
    from fastllm.trainer import command, report

    everything = Parser(prog="fastllm", description="Fused kernels for training and running language models.")
    everything.add_argument("--version", action="version", version=f"fastllm {__version__}")
    commands = everything.add_subparsers(dest="command", required=True, metavar="COMMAND")

    info = commands.add_parser("info", help="what is installed, what was built, and what runs on this machine")
    info.add_argument("--json", action="store_true", help="one JSON object")
    commands.add_parser("bench", help="time the ops against their rivals (see fastllm bench --help)")

    patch = commands.add_parser("patch", help="what fastllm.patch would replace in a checkpoint of transformers")
    patch.add_argument("--model", required=True, metavar="DIR", help="as from_pretrained takes it; a local folder")
    patch.add_argument("--only", nargs="+", metavar="NAME", help="ops, or patterns of module paths")
    patch.add_argument("--exclude", nargs="+", metavar="NAME", help="likewise")
    patch.add_argument("--json", action="store_true", help="one JSON object")
    patch.add_argument("--device", help="as torch.device (default cpu)")

    command.add_parsers(commands)
    data_command.add_parser(commands)
    report.add_parser(commands)

    demo = commands.add_parser("demo", help="train a small GPT on Python's help texts and time it against PyTorch")
    demo.add_argument("--steps", type=integer)
    demo.add_argument("--rounds", type=integer, help="timed steps of each kind")
    demo.add_argument("--out", metavar="DIR")
    return everything


def _given(args: argparse.Namespace, names: Sequence[str]) -> dict[str, Any]:
    return {name: getattr(args, name) for name in names if getattr(args, name) is not None}


def _patch(args: argparse.Namespace) -> int:
    import json

    import fastllm
    from fastllm._extras import require
    from fastllm.trainer import resolve_device

    transformers = require("transformers", "transformers")
    if not args.model or not (Path(args.model) / "config.json").exists():
        raise ValueError(f"--model: {args.model or '(empty)'} has no config.json")
    if "" in [*(args.only or ()), *(args.exclude or ())]:
        raise ValueError("--only and --exclude take names, got an empty one")
    device = resolve_device("cpu" if args.device is None else args.device)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    try:
        config = transformers.AutoConfig.from_pretrained(args.model)
        names = config.architectures or []
        known = [getattr(transformers, name, None) for name in names]
        found: list[Any] = [x for x in known if isinstance(x, type) and issubclass(x, transformers.PreTrainedModel)]
        model_class = found[0] if found else transformers.AutoModelForCausalLM
        model = model_class.from_pretrained(args.model)
    except Exception as error:  # what is in the files decides which
        raise ValueError(f"--model: {args.model} cannot be loaded: {type(error).__name__}: {error}") from error
    model = model.to(device).train()
    report = fastllm.patch(model, only=args.only, exclude=args.exclude)
    print(json.dumps(report.to_dict(), indent=1) if args.json else report)
    return 0


def _run(argv: Sequence[str]) -> int:
    if argv[:1] == ["bench"]:  # has a parser of its own
        from fastllm.benchmarks import suite

        return suite.main(argv[1:])
    args = parser().parse_args(argv)
    _check_environment()
    if args.command == "info":
        from fastllm import info

        return info.main(args.json)
    if args.command == "demo":
        from fastllm import demo

        return demo.main(**_given(args, ["steps", "rounds", "out"]))
    if args.command == "report":
        from fastllm.trainer import report

        return report.run(args)
    if args.command == "patch":
        return _patch(args)
    if args.command == "data":
        from fastllm.data import command as data_command

        return data_command.run(args)
    from fastllm import use_backend
    from fastllm.trainer import command as trainer

    with use_backend(args.backend) if args.backend is not None else contextlib.nullcontext():
        return {"train": trainer.train, "eval": trainer.eval_, "generate": trainer.generate}[args.command](args)


def _check_environment() -> None:
    from fastllm import _ext

    if _ext.C is not None:
        try:
            _ext.C.cpu_capability()
        except (RuntimeError, ValueError) as error:
            raise ValueError(f"FASTLLM_CPU_CAPABILITY: {error}") from error


def _message(error: BaseException) -> str:
    """What went wrong, in one line."""
    message = str(error) or type(error).__name__
    if isinstance(error, OSError) and error.strerror:
        message = error.strerror if error.filename is None else f"{error.filename}: {error.strerror}"
    elif isinstance(error, MemoryError) or "allocate memory" in message:
        message = f"not enough memory: {message}"
    elif type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
        message = f"torch.compile: {message[:400]}"
    return " ".join(message.split()).encode(errors="backslashreplace").decode()  # names of files need not be text


def _expected(error: BaseException) -> bool:
    """Whether an error is one of the values, files and machine that a command was given, and none of our own."""
    from torch import OutOfMemoryError

    from fastllm import BackendUnavailable, PatchError

    known = (OSError, ValueError, ImportError, MemoryError, FloatingPointError, BackendUnavailable, PatchError)
    return (
        isinstance(error, (*known, OutOfMemoryError))
        or type(error).__module__.startswith(("torch._dynamo", "torch._inductor"))
        or (isinstance(error, RuntimeError) and "allocate memory" in str(error))  # torch, on the CPU
    )


def _drop_output() -> None:
    """Keeps Python from writing at exit what cannot be written."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _interrupted(error: BaseException | None) -> bool:
    """Whether an interrupt became this error on its way: what torch writes a file with makes another of it."""
    while error is not None and not isinstance(error, KeyboardInterrupt):
        error = error.__cause__ or error.__context__
    return error is not None


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code: 0, 1 for what went wrong, 2 for arguments that make no sense."""
    if hasattr(sys.stdout, "reconfigure"):  # text, or a name of a file, that the terminal has no characters for
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        code = _run(list(sys.argv[1:] if argv is None else argv))
        if sys.stdout is not None:
            sys.stdout.flush()
        return code
    except BrokenPipeError:  # the reader of a pipe has gone
        _drop_output()
        return 1
    except KeyboardInterrupt:
        print("fastllm: interrupted", file=sys.stderr)
        return 130
    except Exception as error:
        if _interrupted(error):
            print("fastllm: interrupted", file=sys.stderr)
            return 130
        if not _expected(error):
            raise
        if isinstance(error, OSError) and error.filename is None:
            _drop_output()
        print(f"fastllm: error: {_message(error)}", file=sys.stderr)
        return 1
