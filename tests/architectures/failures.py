"""Models that torch cannot capture or export as they stand, each with its reason."""

from .dense import StackedHourglass
from .entry import IMAGE_SIZE, TEXT_LENGTH, Architecture, images, text
from .language import mixtral
from .sequence import Translator, two_texts

# Name -> why, and what would help.
KNOWN_FAILURES: dict[str, str] = {
    "transformer_unhinted": (
        "Capture fails: nn.Transformer compares a mask's values to learn whether it is causal; "
        "pass tgt_is_causal=True with the mask."
    ),
    "mixtral_looped": (
        "Capture fails: the loop over the experts that some token chose depends on the data; "
        'set experts_implementation="batched_mm".'
    ),
    "mixtral_grouped": (
        "Captures, but ONNX export fails: the grouped matrix product is an operator that "
        'transformers defines and torch cannot translate; set experts_implementation="batched_mm".'
    ),
    "hourglass_any_size": (
        "Captures with height and width fixed: the solver for shapes gives up on a map halved "
        "twice and doubled again by a scale factor; upsample to a size."
    ),
}

# The same names -> how to build the models, and their inputs.
FAILING: dict[str, Architecture] = {
    "transformer_unhinted": Architecture(
        build=lambda: Translator(hint=None), example=two_texts, family="sequence"
    ),
    "mixtral_looped": Architecture(
        build=lambda: mixtral("eager"), example=text(), family="decoder", dynamic=TEXT_LENGTH
    ),
    "mixtral_grouped": Architecture(
        build=lambda: mixtral("grouped_mm"), example=text(), family="decoder", dynamic=TEXT_LENGTH
    ),
    "hourglass_any_size": Architecture(
        build=StackedHourglass, example=images(), family="dense", dynamic=IMAGE_SIZE
    ),
}
