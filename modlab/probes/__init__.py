"""What a conversion may break and a mean loss hides: recall, retrieval, the text that a model writes.

    recall(model, data, tokenizer)              loss on the second copy of a repeated passage
    retrieval(model, data, tokenizer)           values assigned to names among real text, asked for later
    generation_health(model, data, tokenizer)   repetition, loops and routing of generated text
    ruler(model, data, tokenizer)               needles, variables and word counts in long prompts
    recall_gap, retrieval_gap                   a converted model against its dense self, row by row

Each takes dense and converted models alike and runs what their users run: eval mode, present thresholds, only
kept tokens in routed layers. The same data, settings and seed give two models of one context length the same
rows, so that their figures can be subtracted.
"""

from modlab.probes.generation import GenerationHealth, TextHealth, generation_health
from modlab.probes.key_value import retrieval
from modlab.probes.long_tasks import ruler
from modlab.probes.paired import recall_gap, retrieval_gap
from modlab.probes.repeated_passage import recall

__all__ = [
    "GenerationHealth",
    "TextHealth",
    "generation_health",
    "recall",
    "recall_gap",
    "retrieval",
    "retrieval_gap",
    "ruler",
]
