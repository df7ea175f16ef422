"""`fastllm train | eval | generate`."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import math
import statistics
import time
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastllm._command import check_folder, integer
from fastllm.data import token_file
from fastllm.models import GPT
from fastllm.trainer import checkpoint, tasks
from fastllm.trainer.config import DataConfig, RunConfig, TrainConfig, from_mapping, nearest
from fastllm.trainer.distributed import Ranks, local_device, resolve_device
from fastllm.trainer.evaluation import evaluate
from fastllm.trainer.memory import memory_by_part
from fastllm.trainer.trainer import Trainer

# Flags are None unless given: a resumed run keeps what its checkpoint says.
MODEL_FLAGS: dict[str, tuple[Any, str]] = {
    "context": (integer, "tokens that the model sees at a time (default 128)"),
    "layers": (integer, "blocks (default 4)"),
    "heads": (integer, "query heads (default 4)"),
    "kv_heads": (integer, "key and value heads (default --heads)"),
    "width": (integer, "channels (default 256)"),
    "dropout": (float, "probability (default: the model's, 0 of a GPT)"),
    "label_smoothing": (float, "share of the loss that goes to all tokens alike (default: the model's)"),
}
_TRIAL_STEPS = 5  # that a time is estimated from
_METAVARS = {int: "N", float: "X", str: "NAME"}
_FIXED = ("tokenizer", "vocab_size", "objective", "order", "columns", "preprocessing")  # once a run has begun


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _add_fields(group: Any, kind: type, without: Sequence[str] = ()) -> None:
    """A flag for each field of a configuration."""
    hints = typing.get_type_hints(kind)
    for entry in dataclasses.fields(kind):
        if entry.name in without:
            continue
        kinds = [one for one in typing.get_args(hints[entry.name]) if one is not type(None)] or [hints[entry.name]]
        text, choices = entry.metadata["text"], entry.metadata["choices"]
        if entry.default is not dataclasses.MISSING and entry.default is not None:
            text += f" (default {entry.default!r})".replace("%", "%%")
        options: dict[str, Any] = {"help": text, "default": None}
        if kinds[0] is bool:
            options["action"] = argparse.BooleanOptionalAction
        else:
            options["type"] = integer if kinds[0] is int else kinds[0]
            if choices is not None:
                options["choices"] = [choice for choice in choices if choice is not None]
            else:
                options["metavar"] = "FILE" if text.startswith("JSON") else _METAVARS[kinds[0]]
        group.add_argument(_flag(entry.name), **options)


def _pair(text: str) -> tuple[str, str]:
    name, sign, value = text.partition("=")
    if not (name and sign and value):
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=COLUMN")
    return name, value


def add_parsers(commands: Any) -> None:
    """Adds the three commands to those of `fastllm`."""
    train = commands.add_parser("train", help="train a model on text, rows or token files")
    train.add_argument("--config", metavar="YAML", help="a configuration as a run's config.yaml; flags win over it")
    train.add_argument(
        "--resume",
        nargs="?",
        const="newest",
        metavar="auto|PATH",
        help="go on from the newest checkpoint in --out, or from PATH; auto begins where there is none, and passes "
        "over damaged ones",
    )
    train.add_argument("--dry-run", action="store_true", help="print what would be done, with memory and time, and end")
    train.add_argument("--find-lr", action="store_true", help="try learning rates for 100 steps, draw them, and end")
    source = train.add_argument_group("data")
    source.add_argument("--text", nargs="+", metavar="FILE", help="text, rows, token files; folders and globs")
    source.add_argument(
        "--valid", nargs="+", metavar="FILE", help="the same, to validate on instead of a part of --text"
    )
    source.add_argument("--columns", nargs="+", type=_pair, metavar="NAME=COLUMN", help="of rows, by name or number")
    _add_fields(source, DataConfig, ("text", "valid", "columns"))
    model = train.add_argument_group("model")
    model.add_argument("--preset", metavar="NAME", help="gpt2, llama (default), or a size of a model's PRESETS")
    model.add_argument("--init", metavar="RUN", help="begin with the weights of this run, and a new head if need be")
    for name, (kind, text) in MODEL_FLAGS.items():
        model.add_argument(_flag(name), type=kind, help=text, metavar="X" if kind is float else "N")
    training = train.add_argument_group("training")
    _add_fields(training, TrainConfig)
    training.add_argument("--bf16", action="store_const", const="bfloat16", dest="precision", help="bfloat16 autocast")
    _add_backend(train)

    evaluation = commands.add_parser("eval", help="the loss of a checkpoint on text or rows")
    evaluation.add_argument("checkpoint", metavar="CHECKPOINT", help="a checkpoint, or a directory with some")
    evaluation.add_argument("--text", nargs="+", required=True, metavar="FILE", help="as the run was trained on")
    evaluation.add_argument("--batch-size", type=integer, default=16)
    _add_place(evaluation)

    generate = commands.add_parser("generate", help="continue a prompt")
    generate.add_argument("checkpoint", metavar="CHECKPOINT", help="a checkpoint, or a directory with some")
    generate.add_argument("--prompt", required=True)
    generate.add_argument("--max-new-tokens", type=integer, help="default: what the context takes, at most 200")
    generate.add_argument("--temperature", type=float, default=0.8, help="0 is greedy (default %(default)s)")
    generate.add_argument("--top-k", type=integer, help="keep the k most likely tokens")
    generate.add_argument("--top-p", type=float, help="keep the most likely tokens up to this probability")
    generate.add_argument("--seed", type=integer, help="the same seed gives the same text")
    _add_place(generate)


def _add_backend(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--backend", metavar="NAME", help="force this implementation of every fastllm op")


def _add_place(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", help='as torch.device (default "auto": a GPU where there is one)')
    _add_backend(parser)


def _given(args: argparse.Namespace) -> RunConfig:
    """What `--config` and flags say."""
    sections: dict[str, Any] = {"data": {}, "model": {}, "train": {}}
    if args.config is not None:
        sections = {name: dict(values) for name, values in RunConfig.from_yaml(args.config).given.items()}
    for section, names in (
        ("data", [entry.name for entry in dataclasses.fields(DataConfig)]),
        ("model", ["preset", "init", *MODEL_FLAGS]),
        ("train", [entry.name for entry in dataclasses.fields(TrainConfig)]),
    ):
        for name in names:
            value = getattr(args, name)
            if value is not None:
                sections[section][name] = dict(value) if name == "columns" else value
    return RunConfig.from_dict(sections)


def _resumed(given: RunConfig, found: Path) -> RunConfig:
    """The configuration of a run that goes on from the checkpoint at `found`: its own, with what may change.

    Raises:
        ValueError: for what was given and may not.
    """
    saved = checkpoint.load_config(found)
    config = checkpoint.saved_config(found)
    data, begun = dataclasses.asdict(config.data), saved.get("given", {})
    for name, value in given.given.get("model", {}).items():
        if name in ("preset", "init"):
            if value != begun.get(name):
                raise ValueError(f"{_flag(name)} cannot be given with --resume: it is the checkpoint's")
        elif name not in config.model:
            raise ValueError(f"model has no key {name!r}{nearest(name, config.model)}")
        elif value != config.model[name]:
            raise ValueError(f"{_flag(name)} {value} differs from the {config.model[name]} of {found}")
    for name, value in given.given.get("data", {}).items():
        if name in _FIXED and value != data[name]:
            raise ValueError(f"{_flag(name)} cannot be given with --resume: it is the checkpoint's")
    data = {name: value for name, value in given.given.get("data", {}).items() if name not in _FIXED}
    config.data = dataclasses.replace(config.data, **data)
    # Checked again by its class, as all that is given.
    train = {**dataclasses.asdict(config.train), "out": str(found.parent), **given.given.get("train", {})}
    if "accumulate" in given.given.get("train", {}):
        train["batch_tokens"] = given.train.batch_tokens
    elif train["batch_tokens"]:
        train["accumulate"] = 1  # which it sets
    config.train = from_mapping(TrainConfig, train, "train")
    return config


def _checkpoint_to_resume(how: str, out: str) -> Path | None:
    """The checkpoint that `--resume` means; says what is wrong with those that it passes over, and puts them aside.

    Raises:
        FileNotFoundError, ValueError: where there is none, or none that is whole.
    """
    if how == "newest":
        path = checkpoint.find_checkpoint(out)
        checkpoint.verify(path)
        return path
    if how != "auto":
        path = checkpoint.find_checkpoint(how)
        checkpoint.verify(path)
        newest = checkpoint.list_checkpoints(out)[-1:]
        if newest and checkpoint.step_of(newest[0]) > checkpoint.step_of(path):
            raise ValueError(
                f"{newest[0]} is newer than {path}: delete it, or choose another --out to go on from there"
            )
        return path
    found, faults = checkpoint.newest_whole(out)
    if faults and found is None:
        raise ValueError(f"no checkpoint in {out} is whole: {'; '.join(faults)}")
    for fault, path in zip(faults, reversed(checkpoint.list_checkpoints(out)), strict=False):
        print(f"passed over: {fault}; it is {checkpoint.put_aside(path)} now")
    return found


def _saved_device(how: str, out: str) -> str | None:
    """The device of the newest checkpoint that can be read, if there is one."""
    for path in reversed(checkpoint.list_checkpoints(out if how in ("newest", "auto") else Path(how).parent)):
        with contextlib.suppress(OSError, ValueError):
            return checkpoint.saved_config(path).train.device
    return None


def train(args: argparse.Namespace) -> int:
    """`fastllm train`."""
    given = _given(args)
    check_folder(given.train.out, "--out")
    device = given.train.device
    if args.resume is not None and "device" not in given.given["train"]:
        device = _saved_device(args.resume, given.train.out) or device
    ranks = Ranks.join(local_device(resolve_device(device)))
    try:
        return _train(args, given, ranks)
    finally:
        ranks.leave()


def _train(args: argparse.Namespace, given: RunConfig, ranks: Ranks) -> int:
    def say(*lines: str) -> None:
        if ranks.first and lines:
            print(*lines, sep="\n", flush=True)

    resumed = None
    if args.resume is not None:
        if args.dry_run or args.find_lr:
            raise ValueError("--resume goes on with training, --dry-run and --find-lr do not train")
        resumed = ranks.from_first(_checkpoint_to_resume(args.resume, given.train.out) if ranks.first else None)
    config = given if resumed is None else _resumed(given, resumed)
    if not config.data.text:
        raise ValueError("--text must be given, or a --config that says it")
    found = checkpoint.list_checkpoints(config.train.out)
    if resumed is None and found and not args.dry_run and not args.find_lr:
        raise FileExistsError(f"{found[-1]} is there already: resume it, or choose another directory")
    train_config = config.train
    device = local_device(resolve_device(train_config.device))
    task = tasks.build(config, device, resumed)
    shape: Any = task.model.config
    _fit_samples(train_config, task, "sample_tokens" in given.given.get("train", {}) or resumed is not None)
    saved = {
        **task.saved,
        "given": config.model if resumed is None else checkpoint.load_config(resumed).get("given", {}),
    }
    whole = dataclasses.replace(config, model={**saved["given"], **dataclasses.asdict(shape)})
    trainer = Trainer(
        task.model,
        task.train,
        train_config,
        validation=task.validation,
        tokenizer=task.tokenizer,
        saved=saved,
        ranks=ranks,
    )
    if train_config.batch_tokens:
        tasks.check_size(
            shape, device, dataclasses.replace(train_config, batch_tokens=0, accumulate=trainer.accumulate)
        )
        tokens = train_config.batch_size * ranks.size * shape.context
        say(f"a step of {train_config.batch_tokens:,} tokens: {trainer.accumulate} x {tokens:,}")
    if resumed is not None:
        trainer.load(resumed, verified=True)  # by the rank that chose it
        if (why := trainer.finished) is not None:
            say(f"{resumed} is finished: {why} would go on")
            return 0
    if args.dry_run:
        say(whole.to_yaml(), *plan(trainer, task))
        return 0
    if args.find_lr:
        return _find_lr(trainer, say)
    say(*task.said)
    on = f"{ranks.size} x {trainer.device} ({train_config.parallel})" if ranks.size > 1 else str(trainer.device)
    say(
        f"{task.model.num_parameters():,} parameters on {on}, {task.size}"
        + (f"; resumed at step {trainer.step}" if resumed is not None else "")
    )
    if train_config.warmup >= train_config.steps and train_config.warmup:
        say(f"the warm-up of {train_config.warmup} steps is as long as the run: --lr is never reached")
    if ranks.first:
        trainer.write_config(whole.to_yaml())
        chosen = (f"{name}={value!r}" for values in given.given.values() for name, value in values.items())
        say(f"{trainer.out / 'config.yaml'}: {', '.join(chosen)}, else defaults")
    trainer.run()
    path = trainer.out / f"checkpoint-{trainer.step}"
    goes_on = "" if trainer.finished else "; --resume goes on"
    say(f"stopped by {trainer.stopped}: {path}{goes_on}" if trainer.stopped else str(path))
    return 0


def _fit_samples(config: TrainConfig, task: tasks.Task, chosen: bool) -> None:
    """Samples are as long as the context takes, unless somebody has chosen their length.

    Raises:
        ValueError: for samples of a model that writes none.
    """
    if config.sample_every and not isinstance(task.model, GPT):
        raise ValueError(f"--sample-every {config.sample_every}: a {type(task.model).__name__} does not continue text")
    if config.sample_every and not chosen and task.tokenizer is not None:
        from fastllm.data import encode

        room = task.model.config.context - len(encode(task.tokenizer, config.sample_prompt))
        config.sample_tokens = max(1, min(config.sample_tokens, room))


def plan(trainer: Trainer, task: tasks.Task) -> list[str]:
    """What a run would be: parameters, memory by part, tokens, and the time that a few steps say it takes."""
    config, shape, ranks = trainer.config, trainer.model.config, trainer.ranks
    times = []
    for _ in range(min(_TRIAL_STEPS, config.steps)):
        started = time.perf_counter()
        tokens = trainer.train_step()["tokens"]
        times.append(time.perf_counter() - started)
    seconds = statistics.median(times)
    rows = config.batch_size * trainer.accumulate * ranks.size
    parts = memory_by_part(
        shape,
        batch_size=config.batch_size,
        length=shape.context,
        optimizer_bytes=trainer.optimizer.bytes_per_parameter,
        master_weights=config.master_weights,
        ema=bool(config.ema),
        precision=config.precision,
        activation_checkpointing=config.activation_checkpointing,
        world_size=ranks.size,
        sharded=config.parallel == "fsdp",
        device=trainer.device.type,
    )
    total = config.steps * seconds
    parts = {name.replace("_", " "): size for name, size in parts.items() if size}
    width = max(map(len, parts))
    return [
        f"{trainer.model.num_parameters():,} parameters, {task.size}",
        "memory of a rank, estimated:",
        *(f"  {name:<{width}} {size / 2**20:>12,.1f} MiB" for name, size in parts.items()),
        f"  {'sum':<{width}} {sum(parts.values()) / 2**20:>12,.1f} MiB",
        f"a step: {rows:,} rows, {tokens:,.0f} targets, {1e3 * seconds:,.1f} ms, {tokens / seconds:,.0f} targets/s",
        f"the run: {config.steps:,} steps, about {config.steps * tokens:,.0f} targets, "
        f"{config.steps * rows / task.epoch:,.2f} epochs, {_duration(total)} without validation",
    ]


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60:,} h {minutes % 60} min" if minutes >= 60 else f"{minutes} min {rest} s"


def _find_lr(trainer: Trainer, say: Any) -> int:
    from fastllm.trainer.lr_finder import draw, find_learning_rate

    found = find_learning_rate(trainer)
    path = trainer.out / "learning_rates.png"
    if trainer.ranks.first:
        draw(found, path)
    say(f"--lr {found.suggestion:.2g}: the loss fell steepest there. {path} shows all {len(found.rates)} rates tried")
    return 0


def _load(args: argparse.Namespace) -> tuple[Any, Any, Any]:
    device = resolve_device("auto" if args.device is None else args.device)
    model, tokenizer = checkpoint.load_model(args.checkpoint, device)
    if tokenizer is None:
        raise ValueError(f"{args.checkpoint} has no tokenizer.json")
    tasks.check_tokenizer(args.checkpoint, tokenizer, model.config)
    return model, tokenizer, device


def eval_(args: argparse.Namespace) -> int:
    """`fastllm eval`."""
    from fastllm import data

    model, tokenizer, _ = _load(args)
    saved = checkpoint.load_config(checkpoint.find_checkpoint(args.checkpoint))
    objective = saved.get("data", {}).get("objective", "causal_lm")
    if objective in tasks.ROWS:
        rows = tasks.held_out(objective, args.text, saved, tokenizer, model.config)
        found = evaluate(model, rows, args.batch_size)
        accuracy = f", accuracy {found.accuracy:.4f}" if found.accuracy is not None else ""
        print(f"loss {found.loss:.4f} nats/target{accuracy}, {found.count:,} targets, {len(rows):,} rows")
        return 0
    tokens: Any
    size = None
    if token_file.is_token_files(args.text):
        tokens = tasks.open_tokens(args.text, tokenizer, args.checkpoint)
    else:
        text = tasks.read_texts(args.text, saved.get("data", {}).get("columns", {}))
        if len(args.text) > 1 and data.document_token(tokenizer) is None:
            raise ValueError(
                f"the tokenizer of {args.checkpoint} has no special token {data.END_OF_TEXT} to put between files: "
                "give --text one"
            )
        tokens, size = data.encode(tokenizer, text), len(text.encode())
    windows: Any = data.SequentialWindows(tokens, model.config.context)
    if objective == "masked_lm":
        windows = tasks.masked_windows(windows, tokenizer, model.config, 0)
    found = evaluate(model, windows, args.batch_size)
    perplexity = math.exp(found.loss) if found.loss < 700 else math.inf
    per_byte = ""
    if objective == "causal_lm" and size is not None:  # of a file of tokens, nobody knows how many bytes they were
        per_byte = f", {found.loss * found.count / math.log(2) / size:.3f} bits/byte"
    print(f"loss {found.loss:.4f} nats/token, perplexity {perplexity:.2f}{per_byte}, {found.count:,} tokens")
    return 0


def generate(args: argparse.Namespace) -> int:
    """`fastllm generate`."""
    from fastllm import data

    if not args.prompt:
        raise ValueError("--prompt must not be empty")
    if args.seed is not None and args.seed < 0:
        raise ValueError(f"--seed must be at least 0 and less than 2^64, got {args.seed}")
    model, tokenizer, device = _load(args)
    if not isinstance(model, GPT):
        raise ValueError(f"{args.checkpoint} is a {type(model).__name__}, which does not continue a prompt")
    saved = checkpoint.load_config(checkpoint.find_checkpoint(args.checkpoint))
    tokens_BT = data.encode(tokenizer, tasks.prompt(args.prompt, saved))[None].to(device)
    if tokens_BT.numel() == 0:
        raise ValueError(f"the tokenizer of {args.checkpoint} has no tokens for the prompt {args.prompt!r}")
    room = model.config.context - tokens_BT.shape[1]
    if room < 1:
        raise ValueError(f"the prompt's {tokens_BT.shape[1]} tokens fill the context of {model.config.context}")
    count = min(200, room) if args.max_new_tokens is None else args.max_new_tokens
    end = data.document_token(tokenizer)
    output_BT = model.generate(
        tokens_BT,
        count,
        temperature=args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
        seed=args.seed,
        stop=end,
    )
    tokens = output_BT[0, :-1] if output_BT[0, -1] == end else output_BT[0]
    print(data.decode(tokenizer, tokens))
    return 0
