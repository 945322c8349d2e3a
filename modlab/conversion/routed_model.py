"""What a converted model's own class gains: generation with the ragged cache, saving with its routers."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from modlab.cache.ragged import RaggedCache
from modlab.conversion.extend import Extended
from modlab.errors import ModlabError
from modlab.hf.names import cache_argument, drops_caches, given_cache
from modlab.integrations.fsdp import give_groups
from modlab.routing.state import generating
from modlab.saving.hub import UPLOAD_ARGUMENTS
from modlab.saving.save import save_converted
from modlab.saving.save_adapters import let_routers_travel
from modlab.saving.upload import upload

if TYPE_CHECKING:
    from transformers import GenerationConfig

    from modlab.measure import Evaluation

RAGGED_IMPLEMENTATIONS = (None, "dynamic", "dynamic_full", "hybrid")


class RoutedModel(Extended):
    """Mixed into the class of a converted model (of that object only)."""

    mod_base_model: str | None = None
    """Hub id of the model that was converted, if it came from there."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """As torch's. FSDP2 sets itself up in the first forward: routers get groups of their own before."""
        give_groups(self)
        return super().__call__(*args, **kwargs)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """As transformers'. In train mode it decides as in eval mode, with a cache and without."""
        model: Any = self
        if drops_caches(model, gradients=False) and given_cache(kwargs) is None:
            kwargs["use_cache"] = False  # else each forward would see the newest token alone
        with generating(model):
            return super().generate(*args, **kwargs)  # type: ignore[misc]

    def _prepare_cache_for_generation(
        self, generation_config: GenerationConfig, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> Any:
        """`generate` asks this method of transformers for a cache; the converted model's is ragged."""
        off: bool = self.mod.is_off  # type: ignore[assignment, union-attr]
        wants_cache = generation_config.use_cache is not False and not off
        if not wants_cache or given_cache(model_kwargs) is not None:
            dense: Any = super()
            return dense._prepare_cache_for_generation(generation_config, model_kwargs, *args, **kwargs)
        if generation_config.cache_implementation not in RAGGED_IMPLEMENTATIONS:
            raise ModlabError(
                f"cache_implementation={generation_config.cache_implementation!r}: routed layers store only "
                "the tokens they keep, so a converted model generates with modlab's ragged cache, which has "
                "no static, offloaded or quantized form. Leave cache_implementation out, or "
                "modlab.revert(model) first."
            )
        model: Any = self
        cache = RaggedCache(model)
        if getattr(generation_config, "is_assistant", False):
            cache.activate_past_recording()  # as transformers does: what it drafts in vain is cropped away
        model_kwargs[cache_argument(model)] = cache
        return None

    def init_continuous_batching(self, *args: Any, **kwargs: Any) -> Any:
        """Continuous batching (`generate_batch`, too) keeps its own paged cache of every token: refused."""
        raise ModlabError(
            "continuous batching stores every token of every layer in a paged cache, which a routed layer "
            "cannot use: call model.generate on padded batches, or modlab.revert(model) first."
        )

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """As torch's; code that saves adapters asks for it before, see saving/save_adapters.py."""
        let_routers_travel(self, kwargs.get("prefix", ""))
        dense: Any = super()
        return dense.state_dict(*args, **kwargs)

    def save_pretrained(
        self, save_directory: str | os.PathLike[str], *, push_to_hub: bool = False, **kwargs: Any
    ) -> None:
        """Saves dense weights as transformers does, the routers, their config and a model card next to them;
        all or nothing.

        The folder loads as the converted model with `modlab.load`, and with `AutoModelForCausalLM` once
        modlab is imported; as the dense one without modlab.

        Args:
            save_directory: the folder.
            push_to_hub: upload it, to `repo_id` or else to the folder's name in your namespace.
            kwargs: as transformers', and `evaluation` (of `modlab.measure.evaluate`): figures for the card.
        """
        hub = {name: kwargs.pop(name) for name in UPLOAD_ARGUMENTS if name in kwargs}
        dense: Any = super()
        save_converted(self, dense.save_pretrained, save_directory, **kwargs)
        if push_to_hub:
            upload(save_directory, hub.pop("repo_id", Path(save_directory).name), **hub)

    def push_to_hub(self, repo_id: str, *, evaluation: Evaluation | None = None, **kwargs: Any) -> str:
        """Saves to a temporary folder and uploads it; arguments as transformers', and `evaluation`.

        Returns:
            the address of the commit.
        """
        hub = {name: kwargs.pop(name) for name in UPLOAD_ARGUMENTS if name in kwargs}
        with tempfile.TemporaryDirectory() as folder:
            target = Path(folder, repo_id.split("/")[-1])  # the card is headed by the folder's name
            self.save_pretrained(target, evaluation=evaluation, **kwargs)
            return upload(target, repo_id, **hub)
