"""paredown pares a trained model down to a budget, and proves it."""

from paredown.compress import compress, replay
from paredown.graph.capture import capture
from paredown.graph.model import Model
from paredown.measure import measure
from paredown.pack import pack, unpack
from paredown.plan import plan
from paredown.recipe import apply
from paredown.report import report
from paredown.runtimes import export, open
from paredown.scores import accuracy, multilabel_accuracy, squared_error, token_accuracy
from paredown.steps.binarize import Binarize
from paredown.steps.cast import Cast
from paredown.steps.distill import Distill
from paredown.steps.fine_tune import FineTune
from paredown.steps.hash_weights import HashWeights
from paredown.steps.low_rank import LowRank
from paredown.steps.prune_channels import PruneChannels
from paredown.steps.prune_layers import PruneLayers
from paredown.steps.prune_weights import PruneWeights
from paredown.steps.quantize import Quantize
from paredown.steps.quantize_weights import QuantizeWeights
from paredown.steps.share_weights import ShareWeights
from paredown.types import (
    Artifact,
    Goals,
    Limit,
    Measurement,
    Run,
    Step,
    Target,
    Task,
    UserError,
)
from paredown.verify import Exactness, verify

__all__ = [
    "Artifact",
    "Binarize",
    "Cast",
    "Distill",
    "Exactness",
    "FineTune",
    "Goals",
    "HashWeights",
    "Limit",
    "LowRank",
    "Measurement",
    "Model",
    "PruneChannels",
    "PruneLayers",
    "PruneWeights",
    "Quantize",
    "QuantizeWeights",
    "Run",
    "ShareWeights",
    "Step",
    "Target",
    "Task",
    "UserError",
    "accuracy",
    "apply",
    "capture",
    "compress",
    "export",
    "measure",
    "multilabel_accuracy",
    "open",
    "pack",
    "plan",
    "replay",
    "report",
    "squared_error",
    "token_accuracy",
    "unpack",
    "verify",
]
