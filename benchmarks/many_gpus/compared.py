"""What several GPUs said next to what one said."""

from __future__ import annotations

from typing import Any

from benchmarks.many_gpus.parts import INFERENCE, KILLED, OF_TWO, ONE, ONE_LARGE

TIMES = "tokens a second, times one GPU"
TIMES_TWO = "tokens a second, times two GPUs"
EFFICIENCY = "scaling efficiency"
AS_MANY = "as many rows a GPU"
OF_LOGITS = "largest difference of logits"
OF_INFERENCE = (OF_LOGITS, "largest logit", "decided alike", "same tokens", "of tokens")
"""What `inference.against_one` says, once a part and one GPU have both found something."""

UNINTERRUPTED = "uninterrupted"
"""Names the scene, of one GPU and of several, that a run which is killed or taken up would have been."""


def compared(found: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """By part and scene: tokens a second as a multiple of one GPU's, and of two of more, with the same global
    batch and with as many rows a GPU, of these the share of what as many GPUs would do that are as fast as
    one, or as two; the largest differences of a log line's figures with the same global batch. Of inference
    what its parts hold of one GPU's logits, decisions and tokens."""
    of_small, of_large = (found.get(part, {}).get("scenes", {}) for part in (ONE, ONE_LARGE))
    one = of_small | of_large
    said = _of_inference(found)
    for part, figures in found.items():
        if part in (ONE, ONE_LARGE):
            continue
        for name, scene in figures.get("scenes", {}).items():
            if "lines" not in scene:
                continue
            meant = scene.get(UNINTERRUPTED)
            of_scene = _against(scene, one.get(meant or name, {})) | _times(scene, figures, one, name)
            two = found.get(OF_TWO.get(part, ""), {}).get("scenes", {})
            of_scene |= _times(scene, figures, two, name, gpus=2)
            if of_scene:
                said[f"{part}, {name}"] = of_scene
            sharded = found.get(KILLED, {}).get("scenes", {}).get(meant, {})
            if meant is not None and (of_scene := _against(scene, sharded)):
                said[f"{part}, {name}, against several GPUs {UNINTERRUPTED}"] = of_scene
    return said


def _of_inference(found: dict[str, dict[str, Any]]) -> dict[str, Any]:
    return {
        f"{part}, {kind}": {name: figures[name] for name in OF_INFERENCE}
        for part in INFERENCE
        for kind, figures in found.get(part, {}).items()
        if isinstance(figures, dict) and OF_LOGITS in figures
    }


def _times(
    scene: dict[str, Any], figures: dict[str, Any], others: dict[str, Any], name: str, gpus: int = 1
) -> dict[str, float]:
    """Against the scenes of so few GPUs."""
    if "tokens_per_s" not in scene:
        return {}
    model, said = name.rpartition(", ")[0], {}
    a_gpu = scene["rows"] // figures["processes"]
    words, few = (TIMES, "one GPU") if gpus == 1 else (TIMES_TWO, "two GPUs")
    for what, rows in (("the same global batch", scene["rows"]), (AS_MANY, gpus * a_gpu)):
        other = others.get(f"{model}, {rows} rows")
        if other is not None:
            said[f"{words}, {what}"] = scene["tokens_per_s"] / other["tokens_per_s"]
    if (times := said.get(f"{words}, {AS_MANY}")) is not None:
        said[f"{EFFICIENCY}, of {few}"] = times * gpus / figures["processes"]
    return said


def _against(scene: dict[str, Any], one: dict[str, Any]) -> dict[str, Any]:
    before = {line["step"]: line for line in one.get("lines", [])}
    pairs = [(before[line["step"]], line) for line in scene["lines"] if line["step"] in before]
    if not pairs:
        return {}
    said: dict[str, Any] = {"log lines compared": len(pairs)}
    for name in ("loss", "kl", "keep_ratio"):
        off = [abs(a[name] - b[name]) for a, b in pairs if name in a and name in b]
        if off:
            said[f"largest difference of {name}"] = max(off)
    return said
