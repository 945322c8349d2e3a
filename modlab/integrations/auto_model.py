"""`AutoModelForCausalLM.from_pretrained(folder)` gives the converted model, by transformers' own registry.

A converted folder's config.json says ``"quantization_config": {"quant_method": "modlab"}``. Quantisation
methods are the one kind of plug-in that transformers looks up by a name in config.json and then hands the
loaded model to (`register_quantizer`, `register_quantization_config`); nothing about the weights is
quantised here. Without modlab transformers does not know the method, says that it skips it, and gives the
dense model.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from modlab.saving.files import METHOD


@register_quantization_config(METHOD)
class ConvertedFolder(QuantizationConfigMixin):
    """The marker in config.json; what was converted and how stands in modlab_config.json."""

    def __init__(self, **kwargs: Any) -> None:
        self.quant_method = METHOD  # type: ignore[assignment]
        # transformers takes all marks of a quantised model off one that is dequantised on loading
        self.dequantize = True


@register_quantizer(METHOD)
class RouterLoader(HfQuantizer):
    """Converts the model once its dense weights are in place, and loads the routers."""

    def _process_model_before_weight_loading(
        self, model: Any, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> Any:
        self.folder = Path(checkpoint_files[0]).parent if checkpoint_files else None
        return model

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        from modlab.saving.restore import restore_routers  # it imports the models of transformers

        return restore_routers(model, model.name_or_path, **_where(self.folder))

    def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
        """A converted model saves itself, see `modlab.conversion.routed_model.RoutedModel`."""
        return True

    @property
    def is_trainable(self) -> bool:
        """The weights are plain ones."""
        return True


def _where(folder: Path | None) -> dict[str, Any]:
    """Arguments that find further files next to the weights in `folder`: of a folder none, of a hub cache
    (.../models--<repo>/snapshots/<commit>/<subfolder>) the cache, commit and subfolder."""
    parts = () if folder is None else folder.parts
    if "snapshots" not in parts or not parts[parts.index("snapshots") - 1].startswith("models--"):
        return {}
    at = parts.index("snapshots")
    return {
        "cache_dir": str(Path(*parts[: at - 1])),
        "revision": parts[at + 1],
        "subfolder": "/".join(parts[at + 2 :]),
    }
