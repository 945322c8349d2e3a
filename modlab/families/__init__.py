"""Which causal language models can be converted, proven by converting a tiny one of each type."""

from modlab.families.support import REQUIRED, causal_types, report, why_not
from modlab.families.tiny_models import tiny_config, tiny_model

__all__ = ["REQUIRED", "causal_types", "report", "tiny_config", "tiny_model", "why_not"]
