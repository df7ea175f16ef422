"""Random text, images, videos and sound of the sizes in a model's configuration, and of those of its parts."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

LENGTH = 8  # of a text, without what stands for images and the like
DECODED = 6  # of what a decoder is given: another length, so that the two are not confused
FRAMES = 64  # of sound, of which convolutions may leave a quarter
SIDE = 64  # of images, where the configuration has no size

Inputs = dict[str, Tensor]
"""A model's arguments by name."""


def vocabulary(model: Any) -> int:
    try:
        embedding = model.get_input_embeddings()
    except NotImplementedError:
        embedding = None
    return int(getattr(embedding, "num_embeddings", None) or model.config.get_text_config().vocab_size)


def parameters(model: Any) -> set[str]:
    """What its forward takes; where that takes anything, what those in the model do, until its main input is named."""
    main, named = getattr(model, "main_input_name", "input_ids"), set()
    for module in model.modules():
        found = inspect.signature(type(module).forward).parameters.values()
        named |= {p.name for p in found if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)} - {"self"}
        if main in named or not any(p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD) for p in found):
            break
    return named


def _configurations(config: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    from transformers import PreTrainedConfig

    yield path, config
    for name, value in vars(config).items():
        if isinstance(value, PreTrainedConfig):
            yield from _configurations(value, f"{path}.{name}")


class Maker:
    """Makes the inputs of one model, the same each time."""

    def __init__(self, model: Any, rows: int):
        self.model, self.rows = model, rows
        self.takes = parameters(model)
        self.configs = list(_configurations(model.config))
        self.generator = torch.Generator().manual_seed(0)
        dtype = getattr(model, "dtype", torch.float32)
        self.dtype = dtype if dtype.is_floating_point else torch.float32
        main = getattr(model, "main_input_name", "input_ids")
        self.main = main if isinstance(main, str) else main[0]

    def read(self, *names: str, of: str, default: Any = None) -> Any:
        """The first of these settings that there is, of a part whose configuration is called so before all others."""
        for _, config in sorted(self.configs, key=lambda pair: of not in pair[0]):
            for name in names:
                if getattr(config, name, None) is not None:
                    return getattr(config, name)
        return default

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(self.rows, *shape, generator=self.generator).to(self.dtype)

    def every(self, *values: int) -> Tensor:
        """These for each row."""
        return torch.tensor([values] * self.rows)

    def taken(self, **inputs: Tensor) -> Inputs:
        return {name: value for name, value in inputs.items() if name in self.takes}

    # Text

    def special(self) -> set[int]:
        """Tokens that a model may look for."""
        named = [pair for _, config in self.configs for pair in vars(config).items()]
        values = [value for name, value in named if name.endswith(("token_id", "token_ids", "token_index"))]
        flat = [v for value in values for v in (value if isinstance(value, (list, tuple)) else [value])]
        return {v for v in flat if isinstance(v, int) and v >= 0}

    def tokens(self, size: int, length: int) -> Tensor:
        allowed = torch.ones(size, dtype=torch.bool)
        allowed[: min(10, size // 2)] = False  # where special tokens stand that no configuration names
        allowed[[i for i in self.special() if i < size]] = False
        ordinary = allowed.nonzero().squeeze(1)
        return ordinary[torch.randint(len(ordinary), (self.rows, length), generator=self.generator)]

    def text(self) -> Inputs:
        """It ends as texts do: some models look there for what all of it means."""
        if "input_ids" not in self.takes:
            return {}
        size = vocabulary(self.model)
        longest = self.read("max_position_embeddings", of="text", default=LENGTH)
        ids = self.tokens(size, min(LENGTH, longest) if longest > 0 else LENGTH)
        end, pad = (self.read(f"{which}_token_id", of="text") for which in ("eos", "pad"))
        end = end[0] if isinstance(end, (list, tuple)) else end
        if end is not None and 0 <= end < size and end != pad:
            ids[:, -1] = end
        return {"input_ids": ids}

    def decoded(self) -> Inputs:
        if not any(getattr(config, "is_encoder_decoder", False) for _, config in self.configs):
            return {}
        config = self.model.config.get_text_config(decoder=True)
        sizes = [getattr(config, name, None) for name in ("decoder_vocab_size", "vocab_size")]
        return self.taken(decoder_input_ids=self.tokens(sizes[0] or sizes[1] or vocabulary(self.model), DECODED))

    # What else there is, in the shapes that models take

    def images(self, name: str = "pixel_values", grid: str = "image_grid_thw") -> list[Inputs]:
        if name not in self.takes:
            return []
        size = self.read("image_size", "crop_size", of="vision", default=SIDE)
        size = list(size.values()) if isinstance(size, dict) else [size] * 2 if isinstance(size, int) else list(size)
        channels = self.read("num_channels", "in_channels", "in_chans", of="vision", default=3)
        patch = self.read("patch_size", of="vision", default=1)
        frames = self.read("num_frames", "frames_per_clip", of="vision")
        side = 2 * self.read("spatial_merge_size", of="vision", default=1)  # in patches, where those are given
        if grid in self.takes:
            values = channels * self.read("temporal_patch_size", of="vision", default=1) * patch**2
            return [{name: self.normal(side * side, values).flatten(0, 1), grid: self.every(1, side, side)}]
        if "spatial_shapes" in self.takes:
            mask = torch.ones(self.rows, side * side, dtype=torch.int64)
            values = self.normal(side * side, channels * patch**2)
            return [{name: values, "spatial_shapes": self.every(side, side), "pixel_attention_mask": mask}]
        if frames or name == "pixel_values_videos":
            return [{name: self.normal(frames or 2, channels, *size)}]
        pixels = self.normal(channels, *size)
        points = torch.full((self.rows, 1, 1, 2), size[0] / 2, dtype=self.dtype)
        seen = torch.ones(self.rows, LENGTH, 1, dtype=torch.int64)
        sizes = self.taken(image_sizes=self.every(*size))
        return [
            {name: pixels, **self.taken(input_points=points)},
            {name: pixels, **sizes},
            {name: pixels[:, None], **sizes, **self.taken(image_attention_mask=seen)},  # one of a text's images
        ]

    def videos(self) -> list[Inputs]:
        return self.images("pixel_values_videos", "video_grid_thw")

    def bins(self) -> int:
        names = "feature_projection_input_dim", "input_feat_per_channel", "num_mel_bins"
        return self.read(*names, of="audio", default=80)

    def sounds(self) -> list[Inputs]:
        bins, longest = self.bins(), self.read("max_source_positions", of="audio")
        kernels, strides = (self.read(f"conv_{name}", of="audio") for name in ("kernel", "stride"))
        if "input_values" in self.takes and isinstance(kernels, (list, tuple)):
            length = FRAMES // 4
            for kernel, stride in zip(reversed(kernels), reversed(strides), strict=True):
                length = (length - 1) * stride + kernel
            return [{"input_values": self.normal(length)}]
        if "input_values" in self.takes:
            length, channels = self.read("max_length", of="audio"), self.read("audio_channels", of="audio", default=1)
            spectrum = [self.normal(length, bins)] if isinstance(length, int) else []
            waves = self.normal(channels, FRAMES * FRAMES)
            return [{"input_values": x} for x in (*spectrum, waves, waves[:, 0])]
        if "input_features" not in self.takes:
            return []
        side = self.read("spec_size", of="audio")
        if side:
            longer = torch.ones(self.rows, 1, dtype=torch.bool)
            return [{"input_features": self.normal(1, side * (side // bins), bins), **self.taken(is_longer=longer)}]
        whole = longest is not None and bins == self.read("num_mel_bins", of="audio")
        features = self.normal(2 * longest if whole else FRAMES, bins)
        there = torch.ones(features.shape[:2], dtype=torch.int64)
        masks = self.taken(feature_attention_mask=there, input_features_mask=there)
        turned = [{"input_features": x, **masks} for x in (features.transpose(1, 2), features)]
        return turned if whole else turned[::-1]
