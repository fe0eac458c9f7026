"""A byte-level language model of Python code: a small GPT, 1.9 M parameters, on the sources of the
standard library, which every machine with Python has.

`paredown run examples/code_lm.py --max-drop 1% --size 0.5x --out runs/code_lm`
`python examples/code_lm.py [ARTIFACT]` prints accuracy and bits per byte on the test files.
"""

import math
import sys
import sysconfig
import zlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

import paredown
from paredown.core import progress

WEIGHTS = Path(__file__).with_name("code_lm.safetensors")  # trained once, then kept
SKIPPED = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
BYTES = 256  # the vocabulary
CONTEXT = 128  # bytes that the model sees at most
# Windows of each split, spread evenly over its files. The first training takes many more of the
# training files than the steps of a recipe, whose epochs take 80 seconds on 2 free cores.
WINDOWS = {"train": 8192, "calibration": 256, "validation": 500, "test": 2000}
FIRST_TRAINING = 24576
BATCH = 32


class Block(nn.Module):
    """Pre-norm attention and MLP, each added to the stream; (B, T, C) -> (B, T, C)."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width)
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.down(F.gelu(self.up(self.norm2(x))))

    def attention(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        shape = (batch, length, self.heads, width // self.heads)
        q, k, v = (part.view(shape).transpose(1, 2) for part in self.qkv(x).split(width, dim=2))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)  # (B, heads, T, C / heads)
        return self.out(y.transpose(1, 2).reshape(batch, length, width))


class CodeLM(nn.Module):
    """Bytes (B, T), T <= 128 -> logits of the next byte at each position (B, T, 256)."""

    def __init__(self, width: int = 192, blocks: int = 4, heads: int = 6):
        super().__init__()
        self.token = nn.Embedding(BYTES, width)
        self.position = nn.Embedding(CONTEXT, width)
        self.blocks = nn.ModuleList([Block(width, heads) for _ in range(blocks)])
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, BYTES, bias=False)
        self.start()

    def start(self) -> None:
        """GPT-2's start: small weights, smaller still where a block adds to the stream."""
        smaller = 0.02 / math.sqrt(2 * len(self.blocks))
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                added = name.endswith(("out.weight", "down.weight"))
                nn.init.normal_(parameter, std=smaller if added else 0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

    def forward(self, text: Tensor) -> Tensor:
        places = torch.arange(text.shape[1], device=text.device)  # (T,)
        x = self.token(text) + self.position(places)  # (B, T, C)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


class Windows(Dataset[tuple[Tensor, Tensor]]):
    """At most ``count`` windows of a text, spread evenly and apart from each other.

    Each is 128 bytes and, as the target, the byte that follows each of them; both (128,) int64.
    """

    def __init__(self, text: Tensor, count: int):
        self.text = text  # (N,) uint8
        stride = max(CONTEXT, (len(text) - 1) // count)
        self.starts = range(0, len(text) - CONTEXT, stride)[:count]

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        start = self.starts[index]
        window = self.text[start : start + CONTEXT + 1].long()  # (129,)
        return window[:-1], window[1:]


def sources() -> Iterator[tuple[str, Path]]:
    """The standard library's Python files: path below its folder, and path; sorted, no tests."""
    root = Path(sysconfig.get_path("stdlib"))
    for path in sorted(root.rglob("*.py")):
        below = path.relative_to(root)
        if not SKIPPED & set(below.parts):
            yield below.as_posix(), path


def split_of(name: str) -> str:
    """The split of a file: its path alone decides, so it is the same with every Python version.

    Example:
        >>> split_of("json/decoder.py"), split_of("dataclasses.py")
        ('train', 'test')
    """
    share = zlib.crc32(name.encode()) % 20
    return {0: "test", 1: "test", 2: "validation", 3: "calibration"}.get(share, "train")


@cache
def texts() -> dict[str, Tensor]:
    """Each split's files one after another, as bytes (N,) uint8."""
    joined: dict[str, bytearray] = {name: bytearray() for name in WINDOWS}
    for name, path in sources():
        joined[split_of(name)] += path.read_bytes()
    if min(map(len, joined.values())) <= 2 * CONTEXT:
        folder = sysconfig.get_path("stdlib")
        raise paredown.UserError(
            f"{folder}: expected the standard library's .py files, found too few; "
            "use a Python that was installed with its sources."
        )
    return {name: torch.frombuffer(text, dtype=torch.uint8) for name, text in joined.items()}


def loss(output: Tensor, target: Tensor) -> Tensor:
    """Cross entropy over all positions; (B, T, 256) and (B, T) -> ()."""
    return F.cross_entropy(output.flatten(0, 1), target.flatten())


def bits_per_byte(output: Tensor, target: Tensor) -> Tensor:
    """What each window would cost in bits per byte if the model were used to compress it.

    The mean over the window of -log2 of the probability given to the byte that came; lower is
    better, 8 is knowing nothing. Logits (B, T, 256) and targets (B, T) -> (B,).

    Example:
        >>> bits_per_byte(torch.zeros(1, 4, 256), torch.zeros(1, 4, dtype=torch.long)).tolist()
        [8.0]
    """
    nats = F.cross_entropy(output.transpose(1, 2), target, reduction="none")  # (B, T)
    return nats.mean(1) / math.log(2)


def task() -> paredown.Task:
    splits = {name: Windows(texts()[name], count) for name, count in WINDOWS.items()}
    return paredown.Task(
        example=(splits["train"][0][0][None],),
        score=paredown.token_accuracy,
        loss=loss,
        dynamic=({1: "length"},),
        batch_size=BATCH,
        **splits,
    )


def train(net: nn.Module) -> dict[str, Tensor]:
    """One pass over the training files; the trained state."""
    whole = replace(task(), train=Windows(texts()["train"], FIRST_TRAINING))
    captured = paredown.capture(net, whole.example, whole.dynamic)
    step = paredown.FineTune(epochs=1, lr=2e-3, warmup=0.05, batch_size=16)
    return step.apply(captured, whole).state_dict()


def model() -> nn.Module:
    torch.manual_seed(0)
    net = CodeLM()
    if not WEIGHTS.is_file():
        progress.say("Training the language model once: 4 minutes on 2 free cores")
        save_file(train(net), WEIGHTS)
    net.load_state_dict(load_file(WEIGHTS))
    return net.eval()


def evaluate(predict: Callable[[Tensor], Tensor]) -> tuple[float, float]:
    """Next-byte accuracy and bits per byte on the test split."""
    right, bits = [], []
    with torch.no_grad():
        for inputs, target in DataLoader(Windows(texts()["test"], WINDOWS["test"]), BATCH):
            output = predict(inputs)
            right.append(paredown.token_accuracy(output, target))
            bits.append(bits_per_byte(output, target))
    return float(torch.cat(right).mean()), float(torch.cat(bits).mean())


def main(artifact: str | None = None) -> None:
    """Print how good the model is, or an artifact made of it."""
    from rich.console import Console

    if artifact is None:
        with progress.shown(Console()):
            predict: Callable[[Tensor], Tensor] = model()
    else:
        opened = paredown.open(artifact)

        def predict(inputs: Tensor) -> Tensor:
            return torch.from_numpy(opened(inputs.numpy())[0])

    accuracy, bits = evaluate(predict)
    print(f"next-byte accuracy {accuracy:.2%}, {bits:.3f} bits per byte")


if __name__ == "__main__":
    try:
        main(*sys.argv[1:2])
    except paredown.UserError as error:
        sys.exit(str(error))
