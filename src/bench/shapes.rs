//! Configs of one published size of each of the families that people use most on devices. What has no effect on speed or
//! memory may differ: angles of positions, ids of special tokens.

use serde_json::{Value, json};

/// Names of the shapes, and what `config.json` says of each.
type Shapes = [(&'static str, fn() -> Value); 10];

pub(super) const SHAPES: Shapes = [
    ("qwen3-0.6b", || {
        json!({"model_type": "qwen3", "hidden_size": 1024, "num_hidden_layers": 28, "intermediate_size": 3072,
            "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151_936,
            "max_position_embeddings": 40960, "rope_theta": 1e6, "rms_norm_eps": 1e-6})
    }),
    ("gemma3-1b", || {
        json!({"model_type": "gemma3_text", "hidden_size": 1152, "num_hidden_layers": 26, "intermediate_size": 6912,
            "num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 256, "vocab_size": 262_144,
            "max_position_embeddings": 32768, "rope_theta": 1e6, "rope_local_base_freq": 1e4, "sliding_window": 512,
            "sliding_window_pattern": 6, "query_pre_attn_scalar": 256, "rms_norm_eps": 1e-6,
            "hidden_activation": "gelu_pytorch_tanh"})
    }),
    ("qwen3.5-0.8b", || {
        json!({"model_type": "qwen3_5_text", "hidden_size": 1024, "num_hidden_layers": 24, "intermediate_size": 3584,
            "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 256, "vocab_size": 248_320,
            "max_position_embeddings": 262_144, "full_attention_interval": 4, "linear_conv_kernel_dim": 4,
            "linear_num_key_heads": 16, "linear_num_value_heads": 16, "linear_key_head_dim": 128,
            "linear_value_head_dim": 128, "rms_norm_eps": 1e-6,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e7, "partial_rotary_factor": 0.25}})
    }),
    ("gemma4-e2b", || {
        json!({"model_type": "gemma4_text", "hidden_size": 1536, "num_hidden_layers": 35, "intermediate_size": 6144,
            "num_attention_heads": 8, "num_key_value_heads": 1, "head_dim": 256, "global_head_dim": 512,
            "vocab_size": 262_144, "vocab_size_per_layer_input": 262_144, "hidden_size_per_layer_input": 256,
            "num_kv_shared_layers": 20, "use_double_wide_mlp": true, "max_position_embeddings": 131_072,
            "sliding_window": 512, "final_logit_softcapping": 30.0, "rms_norm_eps": 1e-6,
            "layer_types": kinds(35, |i| i % 5 == 4, "sliding_attention"),
            "rope_parameters": {
                "full_attention": {"rope_type": "proportional", "rope_theta": 1e6, "partial_rotary_factor": 0.25},
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4}}})
    }),
    ("lfm2-1.2b", || {
        json!({"model_type": "lfm2", "hidden_size": 2048, "num_hidden_layers": 16, "intermediate_size": 12288,
            "block_auto_adjust_ff_dim": true, "block_multiple_of": 256, "block_ffn_dim_multiplier": 1.0,
            "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 65536, "conv_L_cache": 3,
            "conv_bias": false, "max_position_embeddings": 128_000, "rope_theta": 1e6, "norm_eps": 1e-5,
            "layer_types": kinds(16, |i| [2, 5, 8, 10, 12, 14].contains(&i), "conv")})
    }),
    ("granite-3.3-2b", || {
        json!({"model_type": "granite", "hidden_size": 2048, "num_hidden_layers": 40, "intermediate_size": 8192,
            "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 49159,
            "max_position_embeddings": 131_072, "rope_theta": 1e7, "attention_multiplier": 0.015_625,
            "embedding_multiplier": 12.0, "logits_scaling": 8.0, "residual_multiplier": 0.22, "rms_norm_eps": 1e-5})
    }),
    ("granite-4.0-h-350m", || {
        json!({"model_type": "granitemoehybrid", "hidden_size": 768, "num_hidden_layers": 32, "intermediate_size": 2048,
            "shared_intermediate_size": 2048, "num_local_experts": 0, "num_experts_per_tok": 0,
            "num_attention_heads": 12, "num_key_value_heads": 4, "vocab_size": 100_352,
            "position_embedding_type": "nope", "max_position_embeddings": 32768, "mamba_n_heads": 48,
            "mamba_d_head": 32, "mamba_d_state": 128, "mamba_d_conv": 4, "mamba_expand": 2, "mamba_n_groups": 1,
            "attention_multiplier": 0.015_625, "embedding_multiplier": 12.0, "logits_scaling": 3.0,
            "residual_multiplier": 0.246, "rms_norm_eps": 1e-5,
            "layer_types": kinds(32, |i| [10, 13, 17, 27].contains(&i), "mamba")})
    }),
    ("phi4-mini", || {
        json!({"model_type": "phi3", "hidden_size": 3072, "num_hidden_layers": 32, "intermediate_size": 8192,
            "num_attention_heads": 24, "num_key_value_heads": 8, "vocab_size": 200_064, "partial_rotary_factor": 0.75,
            "original_max_position_embeddings": 4096, "max_position_embeddings": 131_072, "rope_theta": 1e4,
            "rope_scaling": {"type": "longrope", "short_factor": vec![1.0; 48], "long_factor": vec![1.0; 48]},
            "rms_norm_eps": 1e-5})
    }),
    ("smollm3-3b", || {
        json!({"model_type": "smollm3", "hidden_size": 2048, "num_hidden_layers": 36, "intermediate_size": 11008,
            "num_attention_heads": 16, "num_key_value_heads": 4, "vocab_size": 128_256, "no_rope_layer_interval": 4,
            "max_position_embeddings": 65536, "rope_theta": 5e6, "rms_norm_eps": 1e-6})
    }),
    ("ministral3-3b", || {
        json!({"model_type": "ministral3", "hidden_size": 3072, "num_hidden_layers": 26, "intermediate_size": 9216,
            "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 131_072,
            "max_position_embeddings": 262_144, "rms_norm_eps": 1e-5,
            "rope_parameters": {"rope_type": "yarn", "rope_theta": 1e6, "factor": 16.0,
                "original_max_position_embeddings": 16384, "beta_fast": 32.0, "beta_slow": 1.0, "mscale": 1.0,
                "mscale_all_dim": 1.0, "llama_4_scaling_beta": 0.1}})
    }),
];

/// Kinds of layers: full attention where `full` says so, else `other`.
fn kinds(layers: usize, full: impl Fn(usize) -> bool, other: &str) -> Vec<String> {
    (0..layers).map(|i| if full(i) { "full_attention" } else { other }.to_owned()).collect()
}
