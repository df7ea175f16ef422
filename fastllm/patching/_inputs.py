"""Random inputs for any model of transformers, as its forward, its configuration and its own dummies have them."""

from __future__ import annotations

import contextlib
import functools
import inspect
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from fastllm.patching import _probe
from fastllm.patching._media import Inputs, Maker, vocabulary

__all__ = ["candidates", "decoded_shape", "random_inputs", "unreached", "vocabulary"]

ROWS = 2
HIDDEN = 3  # words by padding
MOST = 3  # attempts at giving a model everything that it takes
KINDS = {"image": 1, "video": 2, "audio": 3}
"""What stands in a text beside words, with the types that transformers gives their tokens."""


def decoded_shape(inputs: Inputs) -> tuple[int, int]:
    """For how many rows and positions the model gives logits."""
    ids = inputs.get("decoder_input_ids", inputs.get("input_ids"))
    if ids is None:
        raise ValueError("it takes no tokens")
    return ids.shape[0], ids.shape[1]


def random_inputs(
    model: Any, device: torch.device, run: Callable[[Inputs], Any] | None = None, padded: bool = False
) -> Inputs:
    """The first candidate that the model runs in evaluation mode.

    Args:
        run: tries one. Default: the model's forward, without gradients.
        padded: as in `candidates`.

    Raises:
        Exception: the first candidate's, if the model runs none.
    """
    first: Exception | None = None
    for inputs in candidates(model, device, padded):
        try:
            with _still(model):
                if run is not None:
                    run(inputs)
                else:
                    with torch.no_grad():
                        model(**inputs)
        except Exception as error:
            first = first or error
        else:
            return inputs
    raise first or ValueError("nothing is known of what its forward takes")


def candidates(model: Any, device: torch.device, padded: bool = False) -> Iterator[Inputs]:
    """What the model may run on: all that it takes, text alone, its main input alone, a single row of text, its own
    dummies.

    Args:
        padded: hides the end of the second row of a text or sound, where the model takes a mask.
    """
    seen = []
    for make in _attempts(model, device):
        try:
            made = {name: value.to(device) for name, value in make().items()}
        except Exception:  # a part of the model does not run on its own, or no vocabulary is known
            continue
        shapes = {name: value.shape for name, value in made.items()}
        if made and shapes not in seen:
            seen.append(shapes)
            yield _padded(model, made) if padded else made


def unreached(model: Any, inputs: Inputs) -> list[nn.Module]:
    """The models inside this one of which nothing runs on these inputs; of those inside each other, the outermost."""
    from transformers import PreTrainedModel

    ran: set[int] = set()
    handles = [m.register_forward_pre_hook(lambda m, args: ran.add(id(m))) for m in model.modules()]
    try:
        with _still(model), torch.no_grad():
            model(**inputs)
    finally:
        for handle in handles:
            handle.remove()
    found: dict[int, nn.Module] = {}

    def look(module: nn.Module) -> None:
        for child in module.children():
            if isinstance(child, PreTrainedModel) and not any(id(m) in ran for m in child.modules()):
                found[id(child)] = child
            else:
                look(child)

    look(model)
    return list(found.values())


@contextlib.contextmanager
def _still(model: Any) -> Iterator[None]:
    """In evaluation mode; what a run leaves in the model and in the random state is taken back."""
    with _probe.quiet(model), _probe.attributes_kept(model):
        model.eval()
        yield


def _attempts(model: Any, device: torch.device) -> Iterator[Callable[[], Inputs]]:
    maker, single = Maker(model, ROWS), Maker(model, 1)
    media = maker.images(), maker.videos(), maker.sounds()
    if any(media):
        for parts in itertools.islice(itertools.product(*(given or [{}] for given in media)), MOST):
            yield functools.partial(_together, maker, dict(zip(KINDS, parts, strict=True)), device)
    yield lambda: maker.text() | maker.decoded()
    yield maker.text  # of which some models make the decoder's
    yield lambda: next((x for given in media for x in given if maker.main in x), {}) | maker.decoded()
    yield lambda: single.text() | single.decoded()
    own = model.dummy_inputs
    if own.keys() <= maker.takes:
        yield lambda: {name: value for name, value in own.items() if isinstance(value, Tensor)}


def _together(maker: Maker, parts: dict[str, Inputs], device: torch.device) -> Inputs:
    """Images, videos and sounds with a text, in which tokens stand for what their models make of them."""
    decoded, inputs = maker.decoded(), {name: value for part in parts.values() for name, value in part.items()}
    if decoded and parts["audio"]:  # which is what the encoder is given, then
        return inputs | decoded
    text = maker.text()
    places: list[tuple[int, int]] = []  # tokens that stand for something else, with their types
    for kind, part in parts.items():
        token = maker.read(f"{kind}_token_id", f"{kind}_token_index", of="text")
        if text and part and token is not None:
            count = _count(maker.model, kind, {name: value.to(device) for name, value in part.items()})
            places += [(token, KINDS[kind])] * (count // maker.rows)
    if places:
        tokens, types = zip(*places, strict=True)
        start, end = text["input_ids"].chunk(2, 1)
        text["input_ids"] = torch.cat((start, maker.every(*tokens), end), 1)
        words = torch.zeros_like(start), torch.zeros_like(end)
        text |= maker.taken(mm_token_type_ids=torch.cat((words[0], maker.every(*types), words[1]), 1))
    return inputs | text | decoded


def _count(model: Any, kind: str, inputs: Inputs) -> int:
    """How many vectors the model makes of them, each in the place of a token."""
    function, field = getattr(model, f"get_{kind}_features", None), "pooler_output"
    if function is None:
        tower = next(m for path, m in model.named_modules() if path.endswith(f"{kind}_tower"))
        function, field = tower.forward, "last_hidden_state"
    given = inspect.signature(function).parameters
    with _still(model), torch.no_grad():
        made = function(**{name: value for name, value in inputs.items() if name in given})
    made = made if isinstance(made, (Tensor, list, tuple)) else getattr(made, field)
    return sum(x.shape[:-1].numel() for x in ([made] if isinstance(made, Tensor) else made))


def _padded(model: Any, inputs: Inputs) -> Inputs:
    """With a mask that hides the end of the second row, before which a text's last word then stands."""
    maker = Maker(model, ROWS)
    ids = inputs.get("input_ids")
    features, waves = inputs.get("input_features"), inputs.get("input_values")
    if ids is not None:
        mask, hidden = torch.ones_like(ids), HIDDEN
    elif features is not None and features.dim() == 3:
        mask = torch.ones_like(features.select(2 if features.shape[2] == maker.bins() else 1, 0)).long()
        hidden = mask.shape[1] // 2
    elif waves is not None and waves.dim() == 2:
        mask, hidden = torch.ones_like(waves).long(), waves.shape[1] // 2
    else:
        return inputs
    if len(mask) == 1 or "attention_mask" not in maker.takes:
        return inputs
    mask[1, -hidden:] = 0
    if ids is None:
        return inputs | {"attention_mask": mask}
    pad = maker.read("pad_token_id", of="text")
    ids = ids.clone()
    ids[1, -hidden - 1] = ids[1, -1]
    ids[1, -hidden:] = ids[1, 0] if pad is None else pad
    return inputs | {"input_ids": ids, "attention_mask": mask}
