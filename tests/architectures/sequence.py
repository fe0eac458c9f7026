"""Models of sequences: recurrent, attentive and convolutional, of signals and of tokens."""

import math

import torch
import torch.nn.functional as F
import transformers as hf
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from .blocks import ConvNorm, FeedForward
from .entry import Architecture, Inputs, series, token_ids


class LSTMClassifier(nn.Module):
    """Embedding, a two-layer LSTM with dropout, and a classifier of the last state."""

    def __init__(self, vocabulary: int = 64, width: int = 32):
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, 24, padding_idx=0)
        self.lstm = nn.LSTM(24, width, num_layers=2, batch_first=True, dropout=0.2)
        self.head = nn.Linear(width, 4)

    def forward(self, tokens: Tensor) -> Tensor:
        _, (state, _) = self.lstm(self.embedding(tokens))  # state: (layers, B, width)
        return self.head(state[-1])


class BidirectionalGRU(nn.Module):
    """Two bidirectional GRU layers that tag every frame, (B, T, 12) in."""

    def __init__(self, width: int = 24):
        super().__init__()
        self.gru = nn.GRU(12, width, 2, batch_first=True, bidirectional=True, dropout=0.2)
        self.norm = nn.LayerNorm(2 * width)
        self.head = nn.Linear(2 * width, 5)

    def forward(self, x: Tensor) -> Tensor:
        hidden, _ = self.gru(x)  # (B, T, 2 width)
        return self.head(self.norm(hidden))


class CRNN(nn.Module):
    """Text recognition: convolutions that collapse the height, then a bidirectional LSTM."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Sequential(
            ConvNorm(1, 16),
            nn.MaxPool2d(2),
            ConvNorm(16, 32),
            nn.MaxPool2d((2, 1)),
            nn.Conv2d(32, 48, (4, 3), padding=(0, 1)),
            nn.ReLU(),
        )
        self.lstm = nn.LSTM(48, 24, bidirectional=True)
        self.head = nn.Linear(48, 20)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x).squeeze(2).permute(2, 0, 1)  # (T, B, 48), the image's width as time
        hidden, _ = self.lstm(x)
        return self.head(hidden).permute(1, 0, 2).log_softmax(-1)  # (B, T, letters)


class CellTagger(nn.Module):
    """A recurrent cell whose time steps are unrolled, (B, 6, 8) in."""

    def __init__(self, width: int = 16):
        super().__init__()
        self.cell = nn.GRUCell(8, width)
        self.width = width
        self.head = nn.Linear(width, 4)

    def forward(self, x: Tensor) -> Tensor:
        state = x.new_zeros(x.shape[0], self.width)
        states = []
        for step in x.unbind(1):
            state = self.cell(step, state)
            states.append(self.head(state))
        return torch.stack(states, dim=1)  # (B, 6, 4)


class CrossAttention(nn.Module):
    """Learned queries that attend to the input with nn.MultiheadAttention (a Perceiver step)."""

    def __init__(self, width: int = 32):
        super().__init__()
        self.queries = nn.Parameter(torch.randn(4, width))
        self.cross = nn.MultiheadAttention(width, 4, 0.1, kdim=24, vdim=24, batch_first=True)
        self.keys = nn.Linear(12, 24)
        self.self_attention = nn.MultiheadAttention(width, 4, dropout=0.1, batch_first=True)
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(4 * width, 5)

    def forward(self, x: Tensor) -> Tensor:
        queries = self.queries.unsqueeze(0).repeat(x.shape[0], 1, 1)  # (B, 4, D)
        keys = self.keys(x)
        latent = queries + self.cross(queries, keys, keys, need_weights=False)[0]
        normed = self.norm(latent)
        mixed, _ = self.self_attention(normed, normed, normed)
        return self.head((latent + mixed).flatten(1))


class TransformerClassifier(nn.Module):
    """nn.TransformerEncoder on embedded tokens, with fixed sine positions and a padding mask."""

    def __init__(self, vocabulary: int = 64, width: int = 32):
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.register_buffer("positions", self._waves(48, width))
        layer = nn.TransformerEncoderLayer(width, 4, 96, batch_first=True, activation="gelu")
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(width, 4)

    @staticmethod
    def _waves(length: int, width: int) -> Tensor:
        """Sines and cosines of the position, (length, width)."""
        rates = torch.exp(-math.log(1e4) * torch.arange(0, width, 2) / width)
        angles = torch.arange(length)[:, None] * rates
        return torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(1)

    def forward(self, tokens: Tensor) -> Tensor:
        padding = tokens == 0  # (B, L)
        x = self.embedding(tokens) * math.sqrt(self.embedding.embedding_dim)
        x = self.encoder(x + self.positions[: tokens.shape[1]], src_key_padding_mask=padding)
        kept = (~padding).unsqueeze(-1).to(x.dtype)  # (B, L, 1)
        return self.head((x * kept).sum(1) / kept.sum(1).clamp(min=1))


class Translator(nn.Module):
    """nn.Transformer: an encoder and a decoder with a causal mask, which `hint` calls causal."""

    def __init__(self, vocabulary: int = 64, width: int = 32, hint: bool | None = True):
        super().__init__()
        self.hint = hint
        self.source_embedding = nn.Embedding(vocabulary, width)
        self.target_embedding = nn.Embedding(vocabulary, width)
        shape = {"num_encoder_layers": 2, "num_decoder_layers": 2, "dim_feedforward": 64}
        self.transformer = nn.Transformer(width, 4, **shape, batch_first=True)
        self.head = nn.Linear(width, vocabulary)

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        length = target.shape[1]
        blocked = torch.ones(length, length, dtype=torch.bool, device=target.device).triu(1)
        embedded = self.source_embedding(source), self.target_embedding(target)
        return self.head(self.transformer(*embedded, tgt_mask=blocked, tgt_is_causal=self.hint))


class SpeechFeatures(nn.Module):
    """wav2vec 2.0 by hand: strided 1-D convolutions of the wave, grouped positions, attention."""

    def __init__(self, width: int = 32):
        super().__init__()
        shapes = [(1, 10, 5), (width, 3, 2), (width, 3, 2)]
        self.convs = nn.ModuleList(nn.Conv1d(i, width, k, s, bias=False) for i, k, s in shapes)
        self.group_norm = nn.GroupNorm(width, width)
        self.project = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 48), nn.Dropout(0.1))
        self.positions = weight_norm(nn.Conv1d(48, 48, 8, padding=4, groups=4), dim=2)
        layer = nn.TransformerEncoderLayer(48, 4, 96, 0.1, "gelu", batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(48, 8)

    def forward(self, wave: Tensor) -> Tensor:
        x = wave.unsqueeze(1)  # (B, 1, samples)
        for index, conv in enumerate(self.convs):
            x = conv(x)
            x = F.gelu(self.group_norm(x) if index == 0 else x)
        x = self.project(x.transpose(1, 2))  # (B, T, 48)
        positions = F.gelu(self.positions(x.transpose(1, 2))[..., :-1])
        return self.head(self.encoder(x + positions.transpose(1, 2)))


def wav2vec2() -> nn.Module:
    """wav2vec 2.0 for letters, (B, samples) in."""
    config = hf.Wav2Vec2Config(
        vocab_size=20,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        conv_dim=[16, 16, 16],
        conv_stride=[5, 2, 2],
        conv_kernel=[10, 3, 3],
        num_conv_pos_embeddings=8,
        num_conv_pos_embedding_groups=4,
        apply_spec_augment=False,
        layerdrop=0.0,
        ctc_loss_reduction="mean",
    )
    return hf.Wav2Vec2ForCTC(config)


class WaveClassifier(nn.Module):
    """1-D residual convolutions of a many-channel signal, such as an electrocardiogram."""

    def __init__(self, width: int = 24):
        super().__init__()
        self.stem = nn.Conv1d(12, width, 7, stride=2, padding=3, bias=False)
        self.norm = nn.BatchNorm1d(width)
        self.convs = nn.ModuleList(nn.Conv1d(width, width, 5, padding=2) for _ in range(3))
        self.norms = nn.ModuleList(nn.BatchNorm1d(width) for _ in range(3))
        self.head = nn.Sequential(nn.Dropout(0.3), nn.Linear(2 * width, 6))

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool1d(F.relu(self.norm(self.stem(x))), 2)
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = F.elu(x + norm(conv(x)))
        pooled = F.adaptive_avg_pool1d(x, 1), F.adaptive_max_pool1d(x, 1)  # (B, C, 1) each
        return self.head(torch.cat(pooled, 1).squeeze(-1))


class TemporalBlock(nn.Module):
    """Two dilated causal convolutions with weight norm, and a residual."""

    def __init__(self, inputs: int, outputs: int, dilation: int, kernel: int = 3):
        super().__init__()
        self.pad = (kernel - 1) * dilation
        self.conv1 = weight_norm(nn.Conv1d(inputs, outputs, kernel, dilation=dilation))
        self.conv2 = weight_norm(nn.Conv1d(outputs, outputs, kernel, dilation=dilation))
        self.dropout = nn.Dropout(0.1)
        self.skip = nn.Conv1d(inputs, outputs, 1) if inputs != outputs else None

    def forward(self, x: Tensor) -> Tensor:
        out = self.dropout(F.relu(self.conv1(F.pad(x, (self.pad, 0)))))
        out = self.dropout(F.relu(self.conv2(F.pad(out, (self.pad, 0)))))
        return F.relu(out + (x if self.skip is None else self.skip(x)))


def temporal_net() -> nn.Module:
    """A temporal convolution network, (B, 4, T) to (B, 3, T)."""
    blocks = [TemporalBlock(4, 16, 1), TemporalBlock(16, 24, 2), TemporalBlock(24, 24, 4)]
    return nn.Sequential(*blocks, nn.Conv1d(24, 3, 1))


class WaveNet(nn.Module):
    """Dilated causal convolutions with tanh-sigmoid gates; the skip paths are summed."""

    def __init__(self, width: int = 16, layers: int = 4):
        super().__init__()
        self.enter = nn.Conv1d(1, width, 1)
        self.gates = nn.ModuleList(
            nn.Conv1d(width, 2 * width, 2, dilation=2**i) for i in range(layers)
        )
        self.residuals = nn.ModuleList(nn.Conv1d(width, width, 1) for _ in range(layers - 1))
        self.skips = nn.ModuleList(nn.Conv1d(width, 24, 1) for _ in range(layers))
        self.leave = nn.Conv1d(24, 32, 1)

    def forward(self, wave: Tensor) -> Tensor:
        x, total = self.enter(wave), 0
        for index, (gate, skip) in enumerate(zip(self.gates, self.skips, strict=True)):
            filtered, gating = gate(F.pad(x, (2**index, 0))).chunk(2, dim=1)
            active = filtered.tanh() * gating.sigmoid()
            total = total + skip(active)
            if index < len(self.residuals):
                x = x + self.residuals[index](active)
        return self.leave(F.relu(total))  # (B, 32, T)


class Conformer(nn.Module):
    """Half-step feed-forwards around attention and a gated depthwise convolution, (B, T, 32)."""

    def __init__(self, width: int = 32):
        super().__init__()
        self.before = nn.Sequential(nn.LayerNorm(width), FeedForward(width, 4 * width))
        self.norm = nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(width, 4, dropout=0.1, batch_first=True)
        self.conv_norm = nn.LayerNorm(width)
        self.gate = nn.Conv1d(width, 2 * width, 1)
        self.depthwise = nn.Conv1d(width, width, 7, padding=3, groups=width)
        self.batch_norm = nn.BatchNorm1d(width)
        self.pointwise = nn.Conv1d(width, width, 1)
        self.after = nn.Sequential(nn.LayerNorm(width), FeedForward(width, 4 * width))
        self.last_norm = nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + 0.5 * self.before(x)
        normed = self.norm(x)
        x = x + self.attention(normed, normed, normed, need_weights=False)[0]
        inner = F.glu(self.gate(self.conv_norm(x).mT), dim=1)  # (B, 32, T)
        x = x + self.pointwise(F.silu(self.batch_norm(self.depthwise(inner)))).mT
        return self.last_norm(x + 0.5 * self.after(x))


def conformer() -> nn.Module:
    """Two Conformer blocks between linear layers, (B, T, 16) to (B, T, 10)."""
    return nn.Sequential(nn.Linear(16, 32), Conformer(), Conformer(), nn.Linear(32, 10))


class BasisForecaster(nn.Module):
    """N-BEATS: each block explains a part of the past away and adds to the forecast."""

    def __init__(self, past: int = 24, future: int = 6, width: int = 32):
        super().__init__()
        self.past = past
        self.blocks = nn.ModuleList(self._block(past, width, past + future) for _ in range(3))

    @staticmethod
    def _block(inputs: int, width: int, outputs: int) -> nn.Module:
        body = [nn.Linear(inputs, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU()]
        return nn.Sequential(*body, nn.Linear(width, outputs))

    def forward(self, x: Tensor) -> Tensor:
        forecast = 0
        for block in self.blocks:
            out = block(x)  # (B, past + future)
            x = x - out[:, : self.past]
            forecast = forecast + out[:, self.past :]
        return forecast


def tokens() -> Inputs:
    """Token numbers, (2, 16), the second row ending in padding."""
    ids = token_ids()
    ids[1, 12:] = 0
    return (ids,)


def two_texts() -> Inputs:
    """Tokens of a source of 16 and a target of 12."""
    return (token_ids(16), token_ids(12))


def entry(build, example, dynamic=None, family="sequence", fixed=()) -> Architecture:
    """A model of this file; `dynamic` names the dimensions of its one input."""
    dynamic = dynamic if dynamic is None or isinstance(dynamic, tuple) else (dynamic,)
    return Architecture(build=build, example=example, family=family, dynamic=dynamic, fixed=fixed)


TIME = {1: "length"}
SAMPLES = {2: "samples"}
ENTRIES = {
    "lstm": entry(LSTMClassifier, tokens, TIME, "recurrent", ("length",)),
    "gru_bidirectional": entry(BidirectionalGRU, series(16, 12), TIME, "recurrent", ("length",)),
    "crnn": entry(CRNN, series(1, 16, 32), {3: "width"}, "recurrent", ("width",)),
    "gru_cell": entry(CellTagger, series(6, 8), None, "recurrent"),
    "multihead_attention": entry(CrossAttention, series(16, 12), TIME),
    "transformer_encoder": entry(TransformerClassifier, tokens, TIME),
    "transformer": entry(Translator, two_texts, (TIME, {1: "target_length"})),
    "speech_features": entry(SpeechFeatures, series(400), {1: "samples"}, "audio"),
    "wav2vec2": entry(wav2vec2, series(400), {1: "samples"}, "audio"),
    "conv1d": entry(WaveClassifier, series(12, 64), SAMPLES, fixed=("samples",)),
    "temporal_conv": entry(temporal_net, series(4, 32), SAMPLES),
    "wavenet": entry(WaveNet, series(1, 48), SAMPLES, "audio"),
    "conformer": entry(conformer, series(24, 16), TIME, "audio"),
    "nbeats": entry(BasisForecaster, series(24)),
}
