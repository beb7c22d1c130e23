"""Tiny random language models of transformers: decoders, encoders, encoder-decoders, state spaces, mixtures."""

from __future__ import annotations

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, PreTrainedConfig

TOKENS = torch.randint(4, 64, (3, 10), generator=torch.Generator().manual_seed(3))
SMALL = {
    **{"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4},
    **{"num_key_value_heads": 2, "intermediate_size": 48, "max_position_embeddings": 64, "head_dim": 8},
    **{"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "initializer_range": 0.1},
}
MOE = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
MLA = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8}
DEEPSEEK = {**MLA, "n_routed_experts": 4, "n_group": 1, "topk_group": 1, "moe_intermediate_size": 24}
DEEPSEEK |= {"num_experts_per_tok": 2, "first_k_dense_replace": 1, "n_shared_experts": 1, "num_key_value_heads": 4}
STATE = {"state_size": 8, "num_heads": 8, "n_groups": 1, "time_step_rank": 16, "chunk_size": 8, "head_dim": 8}


def quiet(config: PreTrainedConfig) -> PreTrainedConfig:
    """Without dropout of any kind, without masking, and without a cache, in the parts as well."""
    for key, value in list(vars(config).items()):
        if isinstance(value, PreTrainedConfig):
            quiet(value)
        elif ("drop" in key or "mask_time_prob" in key) and isinstance(value, float):
            setattr(config, key, 0.0)
    if getattr(config, "use_cache", False):
        config.use_cache = False
    return config


def language_model(kind: str, seq2seq: bool = False, **more: object) -> nn.Module:
    """The causal or encoder-decoder model of a type."""
    options = {key: value for key, value in (SMALL | more).items() if value is not None}
    config = quiet(AutoConfig.for_model(kind, **options))
    return (AutoModelForSeq2SeqLM if seq2seq else AutoModelForCausalLM).from_config(config)


HEADS_OF_8 = {"mamba_n_heads": 8, "mamba_d_head": 8}
HYBRID = {"hybrid_override_pattern": "M*-", "ssm_state_size": 8}

DECODERS: dict[str, dict[str, object]] = {
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "phi", "phi3", "olmo", "olmo2"), {}),
    **dict.fromkeys(("gpt2", "gpt_bigcode", "gpt_neox", "opt", "biogpt", "stablelm", "starcoder2", "cohere"), {}),
    **dict.fromkeys(("cohere2", "glm", "glm4", "granite", "nemotron", "persimmon", "helium", "smollm3", "xglm"), {}),
    **dict.fromkeys(("exaone4", "olmo3", "ministral", "seed_oss", "diffllama", "arcee", "ernie4_5"), {}),
    "gemma3_text": {"layer_types": ["sliding_attention", "full_attention"]},
    "gptj": {"rotary_dim": 4},
    "codegen": {"rotary_dim": 4},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "num_layers": 2},
    "falcon": {"new_decoder_architecture": True, "num_kv_heads": 2, "head_dim": None},
    "bloom": {},
    "bloom pretraining_tp": {"pretraining_tp": 2, "slow_but_exact": True},
    "mpt": {"d_model": 32, "n_heads": 4, "n_layers": 2},
    "ctrl": {"n_embd": 32, "n_layer": 2, "n_head": 4, "dff": 48},
    "jamba": {"mamba_dt_rank": 8, "mamba_d_state": 8, "attn_layer_period": 2, "attn_layer_offset": 1, **MOE},
    "bamba": {"mamba_n_heads": 8, "mamba_d_state": 8, "mamba_d_head": 8, "attn_layer_indices": [1]},
    "zamba2": {"mamba_d_state": 8, "n_mamba_heads": 8, "mamba_headdim": 8, "layers_block_type": ["mamba", "hybrid"]},
    "granitemoehybrid": {"mamba_n_heads": 8, "mamba_d_state": 8, "layer_types": ["mamba", "attention"], **MOE},
    "recurrent_gemma": {"lru_width": 32, "block_types": ["recurrent", "attention"], "num_hidden_layers": 2},
    "rwkv": {"attention_hidden_size": 32},
    "xlstm": {"num_heads": 4, "num_blocks": 2, "chunk_size": 8},
    "lfm2": {"layer_types": ["conv", "full_attention"], "block_auto_adjust_ff_dim": False},
    "mixtral": MOE,
    "qwen2_moe": {**MOE, "shared_expert_intermediate_size": 24},
    "qwen3_moe": MOE,
    "qwen3_next": {**MOE, "shared_expert_intermediate_size": 24, "layer_types": ["linear_attention", "full_attention"]}
    | {"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8},
    "olmoe": MOE,
    "deepseek_v2": DEEPSEEK,
    "deepseek_v3": DEEPSEEK,
    "gpt_oss": MOE,
    "jetmoe": {**MOE, "kv_channels": 8, "num_key_value_heads": 2},
    "granitemoe": MOE,
    "ernie4_5_moe": {**MOE, "moe_num_experts": 4, "moe_k": 2},
    "minimax": {**MOE, "layer_types": ["full_attention", "linear_attention"], "block_size": 8},
    "dots1": DEEPSEEK,
    "glm4_moe": DEEPSEEK,
}

NAMED: dict[str, tuple[list[str], dict[str, object]]] = {
    "mamba": (["in_proj", "x_proj", "dt_proj"], STATE),
    "falcon_mamba": (["in_proj", "x_proj", "dt_proj"], STATE),
    "mamba2": (["in_proj"], STATE),
    "falcon_h1": (["in_proj", "q_proj", "down_proj"], {"mamba_d_ssm": 64, "mamba_d_state": 8, **HEADS_OF_8}),
    "nemotron_h": (["in_proj", "q_proj", "up_proj"], {"mamba_num_heads": 8, "mamba_head_dim": 8, **HYBRID}),
}
"""Decoders for which PEFT refuses all-linear, and what a user would name instead."""

T5 = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "decoder_start_token_id": 0}
BART = {"d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4}
BART |= {"decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "decoder_start_token_id": 2}
SEQ2SEQ: dict[str, dict[str, object]] = {
    **dict.fromkeys(("t5", "mt5", "umt5"), T5),
    "longt5": {**T5, "local_radius": 4},
    "switch_transformers": {**T5, "num_experts": 2, "num_sparse_encoder_layers": 1, "num_sparse_decoder_layers": 1},
    **dict.fromkeys(("bart", "mbart", "pegasus", "marian", "blenderbot", "m2m_100", "plbart"), BART),
    "nllb-moe": {**BART, "num_experts": 4, "encoder_sparse_step": 2, "decoder_sparse_step": 2},
    "led": {**BART, "attention_window": [4, 4], "max_encoder_position_embeddings": 64},
    "prophetnet": {"num_encoder_layers": 2, "num_decoder_layers": 2, "encoder_ffn_dim": 48, "num_hidden_layers": None}
    | {"num_encoder_attention_heads": 4, "num_decoder_attention_heads": 4, "decoder_ffn_dim": 48, "ngram": 2},
}
