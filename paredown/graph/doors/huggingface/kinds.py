"""What a model of transformers is for, by the name of its class."""

from __future__ import annotations

from typing import Any

KINDS = {  # the end of a class's name -> kind
    "ForSequenceClassification": "classification",
    "ForImageClassification": "classification",
    "ForImageClassificationWithTeacher": "classification",
    "ForAudioClassification": "classification",
    "ForVideoClassification": "classification",
    "ForNextSentencePrediction": "classification",
    "ForMultipleChoice": "classification",
    "ForTokenClassification": "tokens",
    "ForCausalLM": "tokens",
    "LMHeadModel": "tokens",
    "ForMaskedLM": "tokens",
    "ForConditionalGeneration": "tokens",
    "ForCTC": "tokens",
    "ForSemanticSegmentation": "segmentation",
    "ForObjectDetection": "detection",
    "ForDepthEstimation": "regression",
    "ForImageSuperResolution": "regression",
    "Model": "embedding",
    "ModelWithProjection": "embedding",
    "Backbone": "embedding",
}
SEVERAL = (
    "its classes do not exclude each other (problem_type), so the one that comes first says "
    "little; --task regression compares all its logits"
)


def kind_of(architecture: str, config: Any) -> str | None:
    """Of the doors' ``KINDS``; None where the name does not tell.

    Example:
        >>> import types
        >>> kind_of("BertForSequenceClassification", types.SimpleNamespace(num_labels=1))
        'regression'
    """
    fitting = [end for end in KINDS if architecture.endswith(end)]
    if not fitting:
        return None
    kind = KINDS[max(fitting, key=len)]
    if kind != "classification":
        return kind
    problem = getattr(config, "problem_type", None)
    if problem == "regression" or getattr(config, "num_labels", None) == 1:
        return "regression"
    return None if problem == "multi_label_classification" else kind


def notes(config: Any) -> list[str]:
    """What the kind does not tell."""
    several = getattr(config, "problem_type", None) == "multi_label_classification"
    return [SEVERAL] if several else []


def classes(kind: str | None, config: Any) -> tuple[str, ...]:
    """Names of the classes; none where they were given none.

    Example:
        >>> import types
        >>> classes("classification", types.SimpleNamespace(id2label={0: "bad", 1: "good"}))
        ('bad', 'good')
    """
    found = getattr(config, "id2label", None)
    if kind not in ("classification", "tokens", "segmentation", "detection") or not found:
        return ()
    named = {int(index): str(name) for index, name in found.items()}
    ordered = [named[index] for index in sorted(named)]
    unnamed = all(name == f"LABEL_{index}" for index, name in enumerate(ordered))
    whole = sorted(named) == list(range(len(named))) and len(set(ordered)) == len(ordered)
    return tuple(ordered) if whole and not unnamed else ()
