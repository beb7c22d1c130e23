"""Tiny random encoders of text, and heads on encoders and decoders: classification, tagging, answers, masked words."""

from __future__ import annotations

from tests.sweep.text import BART, T5

SEQUENCE, TAGS = "AutoModelForSequenceClassification", "AutoModelForTokenClassification"
ANSWERS, MASKED = "AutoModelForQuestionAnswering", "AutoModelForMaskedLM"

ENCODERS: dict[str, tuple[str, dict[str, object]]] = {
    "bert": (SEQUENCE, {}),
    "bert masked": (MASKED, {}),
    "roberta": (TAGS, {}),
    "xlm-roberta": (ANSWERS, {}),
    "electra": (MASKED, {"embedding_size": 16}),
    "albert": (MASKED, {"embedding_size": 16}),
    "deberta": (SEQUENCE, {"relative_attention": True, "pos_att_type": ["c2p", "p2c"], "max_relative_positions": 8}),
    "deberta-v2": (SEQUENCE, {"relative_attention": True, "pos_att_type": ["c2p", "p2c"], "share_att_key": True}),
    "distilbert": (ANSWERS, {"dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 48}),
    "mpnet": (SEQUENCE, {}),
    "esm": (MASKED, {"mask_token_id": 3, "position_embedding_type": "rotary"}),
    "mobilebert": (SEQUENCE, {"embedding_size": 32, "intra_bottleneck_size": 16, "true_hidden_size": 16}),
    "mobilebert masked": (MASKED, {"embedding_size": 24, "intra_bottleneck_size": 16, "true_hidden_size": 16}),
    "squeezebert": (SEQUENCE, {"embedding_size": 32}),
    "convbert": (SEQUENCE, {"embedding_size": 32}),
    "funnel": (SEQUENCE, {"d_model": 32, "n_head": 4, "d_head": 8, "block_sizes": [1, 1], "num_hidden_layers": None}),
    "fnet": (SEQUENCE, {}),
    "modernbert": (MASKED, {"global_attn_every_n_layers": 2, "cls_token_id": 1, "sep_token_id": 2}),
    "nystromformer": (SEQUENCE, {"num_landmarks": 5, "segment_means_seq_len": 10}),
    "xlnet": (SEQUENCE, {"d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 48, "max_position_embeddings": None}),
    "longformer": (SEQUENCE, {"attention_window": [4, 4]}),
    "big_bird": (SEQUENCE, {"attention_type": "original_full"}),
    "canine": (SEQUENCE, {"num_hash_buckets": 64, "downsampling_rate": 2, "upsampling_kernel_size": 2}),
    "rembert": (MASKED, {"input_embedding_size": 16, "output_embedding_size": 24}),
    "luke": (MASKED, {"entity_vocab_size": 20, "entity_emb_size": 16}),
    "xmod": (MASKED, {"languages": ["en"], "default_language": "en"}),
    "xlm": (MASKED, {"emb_dim": 32, "n_layers": 2, "n_heads": 4}),
    "yoso": (SEQUENCE, {}),
    "layoutlm": (TAGS, {}),
    "gpt2 sequence": (SEQUENCE, {}),
    "llama sequence": (SEQUENCE, {}),
    "llama tags": (TAGS, {}),
    "llama answers": (ANSWERS, {}),
    "t5 sequence": (SEQUENCE, T5),
    "bart sequence": (SEQUENCE, BART),
}
