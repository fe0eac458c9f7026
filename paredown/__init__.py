"""paredown pares a trained model down to a budget, and proves it."""

from paredown.core.errors import UserError
from paredown.core.goals import Goals
from paredown.core.measurement import Measurement
from paredown.core.results import Artifact, Run
from paredown.core.task import Target, Task
from paredown.core.units import Limit
from paredown.data.scores import accuracy, multilabel_accuracy, squared_error, token_accuracy
from paredown.graph.capture import capture
from paredown.graph.coupling.verify import Exactness, verify
from paredown.graph.model import Model
from paredown.measure.measure import measure
from paredown.report.page import report
from paredown.run.compress import compress
from paredown.run.replay import replay
from paredown.search.plan import plan
from paredown.ship.open import open
from paredown.ship.pack.container import pack, unpack
from paredown.steps.low_rank.low_rank import LowRank
from paredown.steps.pruning.prune_channels import PruneChannels
from paredown.steps.pruning.prune_layers import PruneLayers
from paredown.steps.pruning.prune_weights import PruneWeights
from paredown.steps.quantization.binarize import Binarize
from paredown.steps.quantization.cast import Cast
from paredown.steps.quantization.quantize import Quantize
from paredown.steps.quantization.quantize_weights import QuantizeWeights
from paredown.steps.recipe import apply
from paredown.steps.sharing.hash_weights import HashWeights
from paredown.steps.sharing.share_weights import ShareWeights
from paredown.steps.step import Step
from paredown.steps.training.distill import Distill
from paredown.steps.training.fine_tune import FineTune
from paredown.targets.artifact import export

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
