"""The command line: `fastllm info | bench | patch | train | eval | generate | demo`."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastllm._command import Parser, check_folder, integer

PRESETS = ("gpt2", "llama")
VOCAB_SIZE = 2048

# Flags are None unless given: a resumed run keeps what its checkpoint says.
MODEL_FLAGS: dict[str, tuple[Any, str]] = {
    "context": (128, "tokens that the model sees at a time"),
    "layers": (4, "blocks"),
    "heads": (4, "query heads"),
    "kv_heads": (None, "key and value heads"),
    "width": (256, "channels"),
    "dropout": (0.0, "probability"),
}
TRAIN_FLAGS = {
    "steps": "optimizer steps in all",
    "batch_size": "rows a forward pass",
    "accumulate": "forward passes an optimizer step",
    "lr": "highest learning rate",
    "min_lr_ratio": "lowest learning rate as a share of the highest",
    "warmup": "steps that the learning rate rises",
    "weight_decay": "of matrices",
    "clip": "largest norm of the gradient, 0 for any",
    "eval_every": "steps between validations, 0 for none",
    "eval_batches": "batches a validation, 0 for all",
    "checkpoint_every": "steps between checkpoints, 0 for the last only",
    "keep": "checkpoints to keep, 0 for all",
    "sample_every": "steps between samples, 0 for none",
    "sample_prompt": "what samples continue",
    "sample_tokens": "tokens of a sample, at most what the context takes unless given",
    "seed": "of weights, dropout, data and samples",
}


def parser() -> argparse.ArgumentParser:
    """The parser of every command but `bench`, which has one of its own."""
    from fastllm._version import __version__

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

    train = commands.add_parser("train", help="train a GPT on text files")
    train.add_argument("--text", nargs="+", required=True, metavar="FILE", help="UTF-8 text, line ends as they are")
    train.add_argument("--out", default="runs/train", metavar="DIR", help="default %(default)s")
    train.add_argument(
        "--resume", action="store_true", help="go on from the newest checkpoint in --out, with the same --text"
    )
    train.add_argument("--validation", type=float, default=0.05, help="the last part of the text (default %(default)s)")
    train.add_argument("--tokenizer", metavar="JSON", help="use this tokenizer instead of training one")
    train.add_argument("--vocab-size", type=integer, help=f"of the tokenizer to train (default {VOCAB_SIZE})")
    train.add_argument(
        "--document-mask",
        action=argparse.BooleanOptionalAction,
        help="attention stays inside a document; <|endoftext|> ends one, and so does a file (default: yes)",
    )
    model = train.add_argument_group("model")
    model.add_argument("--preset", choices=PRESETS, help="architecture (default llama)")
    for name, (default, text) in MODEL_FLAGS.items():
        kind: Any = float if name == "dropout" else integer
        model.add_argument(_flag(name), type=kind, help=f"{text} (default {'--heads' if default is None else default})")
    training = train.add_argument_group("training")
    from_config = {field.name: field for field in dataclasses.fields(_train_config())}
    for name, text in TRAIN_FLAGS.items():
        default = from_config[name].default
        kind = integer if isinstance(default, int) else type(default)
        training.add_argument(_flag(name), type=kind, help=f"{text} (default {default!r})")
    training.add_argument("--bf16", action="store_const", const="bfloat16", dest="precision", help="bfloat16 autocast")
    training.add_argument("--compile", action="store_const", const=True, help="run the model through torch.compile")
    _add_place(train)

    evaluate = commands.add_parser("eval", help="the loss of a checkpoint on text files")
    evaluate.add_argument("checkpoint", metavar="CHECKPOINT", help="a checkpoint, or a directory with some")
    evaluate.add_argument("--text", nargs="+", required=True, metavar="FILE", help="UTF-8 text, line ends as they are")
    evaluate.add_argument("--batch-size", type=integer, default=16)
    _add_place(evaluate)

    generate = commands.add_parser("generate", help="continue a prompt")
    generate.add_argument("checkpoint", metavar="CHECKPOINT", help="a checkpoint, or a directory with some")
    generate.add_argument("--prompt", required=True)
    generate.add_argument("--max-new-tokens", type=integer, help="default: what the context takes, at most 200")
    generate.add_argument("--temperature", type=float, default=0.8, help="0 is greedy (default %(default)s)")
    generate.add_argument("--top-k", type=integer, help="keep the k most likely tokens")
    generate.add_argument("--top-p", type=float, help="keep the most likely tokens up to this probability")
    generate.add_argument("--seed", type=integer, help="the same seed gives the same text")
    _add_place(generate)

    demo = commands.add_parser("demo", help="train a small GPT on Python's help texts and time it against PyTorch")
    demo.add_argument("--steps", type=integer)
    demo.add_argument("--rounds", type=integer, help="timed steps of each kind")
    demo.add_argument("--out", metavar="DIR")
    return everything


def _train_config() -> type:
    from fastllm.trainer import TrainConfig

    return TrainConfig


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _add_place(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", help='as torch.device (default "auto": a GPU where there is one)')
    parser.add_argument("--backend", metavar="NAME", help="force this implementation of every fastllm op")


def _given(args: argparse.Namespace, names: Sequence[str]) -> dict[str, Any]:
    return {name: getattr(args, name) for name in names if getattr(args, name) is not None}


def _read(files: Sequence[str]) -> str:
    from fastllm import data

    if "" in files:
        raise ValueError("--text must not be empty")
    return data.END_OF_TEXT.join(data.read_text(file) for file in files)


def _check_length(text: str, tokens: int, context: int, option: str) -> None:
    if tokens < context + 1:
        raise ValueError(
            f"a window of --context {context} tokens and their targets needs {context + 1} tokens, the text has only "
            f"{tokens} in the {len(text):,} characters {option}"
        )


def _check_tokenizer(path: str | Path, tokenizer: Any, config: Any) -> None:
    from fastllm import data

    size = data.vocabulary_size(tokenizer)
    if size > config.vocab_size:
        raise ValueError(
            f"the tokenizer of {path} is another model's: it has {size} tokens, the model {config.vocab_size}"
        )


def _train(args: argparse.Namespace) -> int:
    import torch

    from fastllm import data
    from fastllm.models import GPT, GPTConfig
    from fastllm.trainer import TrainConfig, Trainer, check_memory, checkpoint, resolve_device, saved_config

    check_folder(args.out, "--out")
    model_flags = _given(args, list(MODEL_FLAGS))
    train_flags = _given(args, [*TRAIN_FLAGS, "precision", "compile", "device"])
    if args.resume:
        for name in _given(args, ["preset", "tokenizer", "vocab_size"]):
            raise ValueError(f"{_flag(name)} cannot be given with --resume: it is the checkpoint's")
        found = checkpoint.find_checkpoint(args.out)
        config = GPTConfig.from_dict(checkpoint.load_config(found)["model"])
        for name, value in model_flags.items():
            if value != getattr(config, name):
                raise ValueError(f"{_flag(name)} {value} differs from the {getattr(config, name)} of {found}")
        train = dataclasses.replace(saved_config(found), **train_flags, out=args.out)
    else:
        if args.tokenizer is not None and args.vocab_size is not None:
            raise ValueError("--vocab-size cannot be given with --tokenizer: it is the tokenizer's")
        defaults = {name: default for name, (default, _) in MODEL_FLAGS.items()}
        make = GPTConfig.gpt2 if args.preset == "gpt2" else GPTConfig.llama
        config = make(vocab_size=data.BYTES + 1, **{**defaults, **model_flags})  # as small as there is, for now
        train = TrainConfig(**train_flags, out=args.out)
    device = resolve_device(train.device)
    check_memory(config, device, batch_size=train.batch_size, accumulate=train.accumulate)

    text = _read(args.text)
    several = data.END_OF_TEXT in text
    text, held_out = data.split_text(text, args.validation)
    if args.resume:
        masked = config.document_token is not None
        if args.document_mask is not None and args.document_mask != masked and (masked or several):
            flag = "--document-mask" if args.document_mask else "--no-document-mask"
            raise ValueError(f"{flag} cannot be given with --resume: {found} is one {'with' if masked else 'without'}")
        tokenizer = checkpoint.load_checkpoint_tokenizer(found)
        _check_tokenizer(found, tokenizer, config)
    else:
        if args.tokenizer is not None:
            tokenizer = data.load_tokenizer(args.tokenizer)
        else:
            tokenizer = data.train_tokenizer([text], VOCAB_SIZE if args.vocab_size is None else args.vocab_size)
        document_token = data.document_token(tokenizer)
        if document_token is None and (args.document_mask or (several and args.document_mask is None)):
            raise ValueError(
                f"{args.tokenizer} has no special token {data.END_OF_TEXT}, by which documents are told apart: add it, "
                "or give --no-document-mask, which takes it for text like any other"
            )
        masked = several and args.document_mask is not False
        config = dataclasses.replace(
            config,
            vocab_size=data.vocabulary_size(tokenizer),
            document_token=document_token if masked else None,
        )
        check_memory(config, device, batch_size=train.batch_size, accumulate=train.accumulate)
    tokens, held_out_tokens = data.encode(tokenizer, text), data.encode(tokenizer, held_out)
    _check_length(text, len(tokens), config.context, "to train on: give more text, or a smaller --context")
    _check_length(
        held_out,
        len(held_out_tokens),
        config.context,
        f"to validate on (--validation {args.validation}): give more text, a larger --validation, or smaller --context",
    )
    if train.sample_every and args.sample_tokens is None and not args.resume:
        room = config.context - len(data.encode(tokenizer, train.sample_prompt))
        train.sample_tokens = max(1, min(train.sample_tokens, room))
    torch.manual_seed(train.seed)
    trainer = Trainer(
        GPT(config),
        data.RandomWindows(tokens, config.context, train.seed),
        train,
        validation=data.SequentialWindows(held_out_tokens, config.context),
        tokenizer=tokenizer,
    )
    if args.resume:
        trainer.load(found)
    if trainer.step >= train.steps:
        print(f"{found} is finished: it has taken {trainer.step} of {train.steps} steps; more --steps would go on")
        return 0
    print(
        f"{trainer.model.num_parameters():,} parameters on {trainer.device}, {len(tokens):,} tokens to train on, "
        f"{len(held_out_tokens):,} to validate on" + (f"; resumed at step {trainer.step}" if args.resume else "")
    )
    trainer.run()
    print(f"{Path(args.out) / f'checkpoint-{trainer.step}'}")
    return 0


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


def _load(args: argparse.Namespace) -> tuple[Any, Any, Any]:
    from fastllm.trainer import checkpoint, resolve_device

    device = resolve_device("auto" if args.device is None else args.device)
    model, tokenizer = checkpoint.load_model(args.checkpoint, device)
    if tokenizer is None:
        raise ValueError(f"{args.checkpoint} has no tokenizer.json")
    _check_tokenizer(args.checkpoint, tokenizer, model.config)
    return model, tokenizer, device


def _eval(args: argparse.Namespace) -> int:
    import numpy

    from fastllm import data
    from fastllm.trainer import evaluate

    model, tokenizer, _ = _load(args)
    text = _read(args.text)
    if len(args.text) > 1 and data.document_token(tokenizer) is None:
        raise ValueError(
            f"the tokenizer of {args.checkpoint} has no special token {data.END_OF_TEXT} to put between files: give "
            "--text one"
        )
    windows = data.SequentialWindows(data.encode(tokenizer, text), model.config.context)
    loss, tokens = evaluate(model, windows, args.batch_size)
    bits = loss * tokens / numpy.log(2) / len(text.encode())
    with numpy.errstate(over="ignore"):
        perplexity = numpy.exp(loss)
    print(f"loss {loss:.4f} nats/token, perplexity {perplexity:.2f}, {bits:.3f} bits/byte, {tokens:,} tokens")
    return 0


def _generate(args: argparse.Namespace) -> int:
    from fastllm import data

    if not args.prompt:
        raise ValueError("--prompt must not be empty")
    if args.seed is not None and args.seed < 0:
        raise ValueError(f"--seed must be at least 0 and less than 2^64, got {args.seed}")
    model, tokenizer, device = _load(args)
    tokens_BT = data.encode(tokenizer, args.prompt)[None].to(device)
    if tokens_BT.numel() == 0:
        raise ValueError(f"the tokenizer of {args.checkpoint} has no tokens for the prompt {args.prompt!r}")
    room = model.config.context - tokens_BT.shape[1]
    if room < 1:
        raise ValueError(f"the prompt's {tokens_BT.shape[1]} tokens fill the context of {model.config.context}")
    count = min(200, room) if args.max_new_tokens is None else args.max_new_tokens
    output_BT = model.generate(
        tokens_BT,
        count,
        temperature=args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
        seed=args.seed,
        stop=data.document_token(tokenizer),
    )
    print(data.decode(tokenizer, output_BT[0]))
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
    if args.command == "patch":
        return _patch(args)
    from fastllm import use_backend

    with use_backend(args.backend) if args.backend is not None else contextlib.nullcontext():
        return {"train": _train, "eval": _eval, "generate": _generate}[args.command](args)


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
