"""fastllm.patch as a model converter of torchtitan, which is not imported unless `register` is called.

torchtitan 0.3: `model_registry(flavor, converters=[FastllmConverter.Config()])`. Before: `register()` in a module that
the job imports, and `converters = ["fastllm"]` under [model] in the job's file.
"""

from __future__ import annotations

import dataclasses
import logging
from typing import Any

import torch
from torch import nn

from fastllm.patching import PatchReport, patch

logger = logging.getLogger(__name__)
NORMS = {"rms_norm", "layer_norm"}


class FastllmConverter:
    """Patches the model that torchtitan has built on the meta device and will parallelize, compile and initialize.

    Attributes:
        report: what was replaced in the model that was converted last, also logged.
    """

    @dataclasses.dataclass(kw_only=True, slots=True)
    class Config:
        """What `fastllm.patch` takes.

        Args:
            only, exclude: names of ops, or patterns of module paths.
            strict: raise if anything that matched was not replaced.
        """

        only: list[str] | None = None
        exclude: list[str] | None = None
        strict: bool = False

        def build(self, **kwargs: Any) -> FastllmConverter:
            return FastllmConverter(self, **kwargs)

    def __init__(self, config: Any = None, parallel_dims: Any = None, **kwargs: Any):
        """Takes a Config, or a job's configuration, which has nothing for it, and what torchtitan gives beside."""
        self.config = config if isinstance(config, FastllmConverter.Config) else FastllmConverter.Config()
        self.tensor_parallel = getattr(parallel_dims, "tp_enabled", False)
        self.report: PatchReport | None = None

    def convert(self, model: Any) -> Any:
        """Patches a model in place, or returns a model's configuration whose `build` makes patched models.

        Raises:
            NotImplementedError: where `only` asks for more than norms with tensor parallelism.
            PatchError: with strict=True.
        """
        if not isinstance(model, nn.Module):
            return _building_patched(model, self)
        options = dataclasses.asdict(self.config)
        if self.tensor_parallel:
            if options["only"] is None:
                logger.info("fastllm.patch: with tensor parallelism only norms are replaced")
                options["only"] = sorted(NORMS)
            elif not NORMS.issuperset(options["only"]):
                raise NotImplementedError(
                    "FastllmConverter: with tensor parallelism modules are given DTensors, which norms alone take: "
                    f"only={sorted(NORMS)}, got {options['only']}"
                )
        with torch.device("cpu"):  # not the meta device, in whose context torchtitan builds
            self.report = patch(model, **options)
        logger.info("fastllm.patch:\n%s", self.report)
        return model

    def post_optimizer_hook(self, model: nn.Module | list[nn.Module]) -> None:
        """Nothing is left to do after a step."""


def _building_patched(config: Any, converter: FastllmConverter) -> Any:
    class Patched(type(config)):  # type: ignore[misc]
        __slots__ = ()

        def build(self, **kwargs: Any) -> nn.Module:
            return converter.convert(super().build(**kwargs))

    Patched.__name__, Patched.__qualname__ = type(config).__name__, type(config).__qualname__
    Patched.__module__ = type(config).__module__
    fields = {field.name: getattr(config, field.name) for field in dataclasses.fields(config) if field.init}
    return Patched(**fields)


def register(name: str = "fastllm") -> None:
    """Registers the converter under a name for `model.converters`, in a torchtitan before 0.3.

    Raises:
        ImportError: where there is no such torchtitan.
    """
    try:
        from torchtitan.protocols.model_converter import register_model_converter
    except ImportError as error:
        raise ImportError(
            "there is no torchtitan before 0.3 to be imported, which registers model converters by their names; later "
            "ones take converters=[FastllmConverter.Config()] in model_registry"
        ) from error
    register_model_converter(FastllmConverter, name)
