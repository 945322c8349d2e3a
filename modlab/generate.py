"""What a converted model's own class gains: generation with the ragged cache, saving with its routers."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from modlab.cache import RaggedCache
from modlab.errors import ModlabError
from modlab.layer import RoutedModule

if TYPE_CHECKING:
    from transformers import GenerationConfig

RAGGED_IMPLEMENTATIONS = (None, "dynamic", "dynamic_full", "hybrid")


class RoutedModel(RoutedModule):
    """Mixed into the class of a converted model (of that object only)."""

    def _prepare_cache_for_generation(
        self, generation_config: GenerationConfig, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> Any:
        """`generate` asks this method of transformers for a cache; the converted model's is ragged."""
        wants_cache = generation_config.use_cache is not False
        if not wants_cache or model_kwargs.get("past_key_values") is not None:
            dense: Any = super()
            return dense._prepare_cache_for_generation(generation_config, model_kwargs, *args, **kwargs)
        if generation_config.cache_implementation not in RAGGED_IMPLEMENTATIONS:
            raise ModlabError(
                f"cache_implementation={generation_config.cache_implementation!r} stores every token; a "
                "converted model "
                "generates with modlab's ragged cache. Leave cache_implementation out, or "
                "modlab.revert(model) first."
            )
        model: Any = self
        model_kwargs["past_key_values"] = RaggedCache(model)
        return None

    def save_pretrained(self, save_directory: str | os.PathLike[str], **kwargs: Any) -> None:
        """Saves dense weights as transformers does, the routers and their config beside them; all or nothing.

        The folder loads with `modlab.load` as the converted model and with plain transformers as the dense
        one.
        """
        from modlab.checkpoint import save_converted

        dense: Any = super()
        save_converted(self, dense.save_pretrained, save_directory, **kwargs)
