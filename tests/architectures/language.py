"""Language models and other token models from transformers, and models that read text and more."""

import torch
import transformers as hf
from torch import Tensor, nn

from .entry import TEXT_LENGTH, Architecture, Inputs, padding_mask, series, text, token_ids

SPECIAL = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
ENCODER = dict(  # what BERT-like configurations share
    vocab_size=64,
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    intermediate_size=96,
    max_position_embeddings=48,
    num_labels=3,
    **SPECIAL,
)
DECODER = dict(  # what Llama-like configurations share: grouped queries, two heads to a key
    vocab_size=64,
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    intermediate_size=96,
    max_position_embeddings=48,
    attention_dropout=0.1,
    use_cache=False,
    **SPECIAL,
)


def bert() -> nn.Module:
    return hf.BertForSequenceClassification(hf.BertConfig(**ENCODER))


def bert_eager() -> nn.Module:
    return hf.BertForMaskedLM(hf.BertConfig(**ENCODER, attn_implementation="eager"))


def distilbert() -> nn.Module:
    config = hf.DistilBertConfig(
        vocab_size=64, dim=32, n_layers=2, n_heads=4, hidden_dim=96, max_position_embeddings=48
    )
    return hf.DistilBertForSequenceClassification(config)


def albert() -> nn.Module:
    config = hf.AlbertConfig(
        **ENCODER | {"num_hidden_layers": 3},
        embedding_size=16,
        hidden_dropout_prob=0.1,
        attention_probs_dropout_prob=0.1,
    )
    return hf.AlbertForSequenceClassification(config)


def roberta() -> nn.Module:
    return hf.RobertaForTokenClassification(hf.RobertaConfig(**ENCODER))


def electra() -> nn.Module:
    config = hf.ElectraConfig(**ENCODER, embedding_size=16)
    return hf.ElectraForPreTraining(config)


def deberta() -> nn.Module:
    config = hf.DebertaV2Config(
        **ENCODER,
        relative_attention=True,
        pos_att_type=["p2c", "c2p"],
        position_buckets=8,
        share_att_key=True,
        norm_rel_ebd="layer_norm",
        position_biased_input=False,
        type_vocab_size=0,
    )
    return hf.DebertaV2ForSequenceClassification(config)


def mpnet() -> nn.Module:
    return hf.MPNetForSequenceClassification(hf.MPNetConfig(**ENCODER))


def fnet() -> nn.Module:
    options = {name: value for name, value in ENCODER.items() if name != "num_attention_heads"}
    return hf.FNetForMaskedLM(hf.FNetConfig(**options, type_vocab_size=2))


def squeezebert() -> nn.Module:
    config = hf.SqueezeBertConfig(**ENCODER, embedding_size=32)
    return hf.SqueezeBertForSequenceClassification(config)


def mobilebert() -> nn.Module:
    config = hf.MobileBertConfig(
        **ENCODER | {"intermediate_size": 48},
        embedding_size=16,
        intra_bottleneck_size=16,
        true_hidden_size=16,
        num_feedforward_networks=2,
        hidden_dropout_prob=0.1,
    )
    return hf.MobileBertForSequenceClassification(config)


def modernbert() -> nn.Module:
    config = hf.ModernBertConfig(
        **ENCODER,
        cls_token_id=1,
        sep_token_id=2,
        local_attention=8,
        global_attn_every_n_layers=2,
        attention_dropout=0.1,
        mlp_dropout=0.1,
        embedding_dropout=0.1,
    )
    return hf.ModernBertForSequenceClassification(config)


def gpt2() -> nn.Module:
    config = hf.GPT2Config(
        vocab_size=64, n_positions=48, n_embd=32, n_layer=2, n_head=4, use_cache=False, **SPECIAL
    )
    return hf.GPT2LMHeadModel(config)


def llama() -> nn.Module:
    return hf.LlamaForCausalLM(hf.LlamaConfig(**DECODER))


def qwen2() -> nn.Module:
    return hf.Qwen2ForCausalLM(hf.Qwen2Config(**DECODER, tie_word_embeddings=True))


def qwen3() -> nn.Module:
    return hf.Qwen3ForCausalLM(hf.Qwen3Config(**DECODER, head_dim=16))


def mistral() -> nn.Module:
    return hf.MistralForCausalLM(hf.MistralConfig(**DECODER, sliding_window=8))


def mixtral(experts: str = "batched_mm") -> nn.Module:
    options = {"num_local_experts": 4, "num_experts_per_tok": 2, "experts_implementation": experts}
    return hf.MixtralForCausalLM(hf.MixtralConfig(**DECODER, **options))


def gemma2() -> nn.Module:
    config = hf.Gemma2Config(
        **DECODER, head_dim=8, query_pre_attn_scalar=8, sliding_window=8, hidden_activation="gelu"
    )
    return hf.Gemma2ForCausalLM(config)


def phi() -> nn.Module:
    config = hf.PhiConfig(**DECODER | {"num_key_value_heads": 4}, resid_pdrop=0.1, embd_pdrop=0.1)
    return hf.PhiForCausalLM(config)


def gpt_neox() -> nn.Module:
    options = {k: v for k, v in DECODER.items() if k != "num_key_value_heads"}
    config = hf.GPTNeoXConfig(**options | {"hidden_dropout": 0.1})
    return hf.GPTNeoXForCausalLM(config)


def bloom() -> nn.Module:
    config = hf.BloomConfig(
        vocab_size=64,
        hidden_size=32,
        n_layer=2,
        n_head=4,
        hidden_dropout=0.1,
        attention_dropout=0.1,
        use_cache=False,
    )
    return hf.BloomForCausalLM(config)


def opt() -> nn.Module:
    config = hf.OPTConfig(
        vocab_size=64,
        hidden_size=32,
        num_hidden_layers=2,
        ffn_dim=96,
        num_attention_heads=4,
        max_position_embeddings=48,
        word_embed_proj_dim=16,
        use_cache=False,
    )
    return hf.OPTForCausalLM(config)


def mamba() -> nn.Module:
    config = hf.MambaConfig(
        vocab_size=64, hidden_size=32, state_size=8, num_hidden_layers=2, use_cache=False
    )
    return hf.MambaForCausalLM(config)


T5 = {
    "vocab_size": 64,
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 96,
    "num_layers": 2,
    "num_heads": 4,
    "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 16,
    "decoder_start_token_id": 0,
    "use_cache": False,
}


def t5() -> nn.Module:
    return hf.T5ForConditionalGeneration(hf.T5Config(**T5, feed_forward_proj="gated-gelu"))


def t5_encoder() -> nn.Module:
    return hf.T5EncoderModel(hf.T5Config(**T5))


def bart() -> nn.Module:
    config = hf.BartConfig(
        vocab_size=64,
        d_model=32,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=96,
        decoder_ffn_dim=96,
        max_position_embeddings=48,
        attention_dropout=0.1,
        use_cache=False,
    )
    return hf.BartForConditionalGeneration(config)


def both_sides() -> Inputs:
    """Keyword inputs of an encoder-decoder: 16 tokens in, 12 tokens out so far."""
    return {
        "input_ids": token_ids(16),
        "attention_mask": padding_mask(16),
        "decoder_input_ids": token_ids(12),
    }


def clip() -> nn.Module:
    text_config = dict(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=16,
        attention_dropout=0.1,
        **SPECIAL,
    )
    vision_config = {
        "hidden_size": 48,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "image_size": 32,
        "patch_size": 8,
        "attention_dropout": 0.1,
    }
    config = hf.CLIPConfig(text_config=text_config, vision_config=vision_config, projection_dim=24)
    return hf.CLIPModel(config)


def captions_and_images() -> Inputs:
    """Keyword inputs of CLIP, as many texts as images."""
    pixels = {"pixel_values": torch.randn(2, 3, 32, 32)}
    return {"input_ids": token_ids(16), **pixels, "attention_mask": padding_mask(16)}


class WhisperEncoder(nn.Module):
    """Whisper's encoder with a classifier of its mean, (B, mel bands, frames) in."""

    def __init__(self):
        super().__init__()
        config = hf.WhisperConfig(
            vocab_size=64,
            num_mel_bins=16,
            d_model=32,
            encoder_layers=2,
            encoder_attention_heads=4,
            encoder_ffn_dim=96,
            decoder_layers=1,
            decoder_attention_heads=4,
            max_source_positions=24,
            decoder_start_token_id=1,
            dropout=0.1,
            **SPECIAL,
        )
        self.encoder = hf.WhisperModel(config).encoder
        self.head = nn.Linear(32, 12)

    def forward(self, features: Tensor) -> Tensor:
        return self.head(self.encoder(features).last_hidden_state.mean(dim=1))


def entry(build, example=None, dynamic=None, family="decoder", fixed=()) -> Architecture:
    """A model of this file; of token numbers and a padding mask unless said otherwise."""
    if example is None:
        example, dynamic = text(), TEXT_LENGTH
    return Architecture(build=build, example=example, family=family, dynamic=dynamic, fixed=fixed)


def encoder(build) -> Architecture:
    """An encoder of text, whose output does not depend on an order of generation."""
    return entry(build, family="encoder")


BOTH_LENGTHS = {**TEXT_LENGTH, "decoder_input_ids": {1: "decoder_length"}}
ENTRIES = {
    "bert": encoder(bert),
    "bert_eager": encoder(bert_eager),
    "distilbert": encoder(distilbert),
    "albert": encoder(albert),
    "roberta": encoder(roberta),
    "electra": encoder(electra),
    "deberta": encoder(deberta),
    "mpnet": encoder(mpnet),
    "fnet": entry(fnet, lambda: (token_ids(),), ({1: "length"},), "encoder"),
    "squeezebert": encoder(squeezebert),
    "mobilebert": encoder(mobilebert),
    "modernbert": encoder(modernbert),
    "t5_encoder": encoder(t5_encoder),
    "gpt2": entry(gpt2),
    "llama": entry(llama),
    "qwen2": entry(qwen2),
    "qwen3": entry(qwen3),
    "mistral": entry(mistral),
    "mixtral": entry(mixtral),
    "gemma2": entry(gemma2),
    "phi": entry(phi),
    "gpt_neox": entry(gpt_neox),
    "bloom": entry(bloom),
    "opt": entry(opt),
    "mamba": entry(mamba, fixed=("length",)),
    "t5": entry(t5, both_sides, BOTH_LENGTHS, "encoder-decoder"),
    "bart": entry(bart, both_sides, BOTH_LENGTHS, "encoder-decoder"),
    "clip": entry(clip, captions_and_images, None, "two towers"),
    "whisper_encoder": entry(WhisperEncoder, series(16, 48), None, "audio"),
}
