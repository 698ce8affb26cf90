//! Qwen2 (Yang et al. 2024): Llama with biases on q, k and v; upper layers may slide a window.

use crate::Model;
use crate::config::Config;
use crate::llama::{Llama, Variant};

pub(crate) fn build(config: Config) -> Box<dyn Model> {
    let variant = Variant { qkv_bias: true, o_bias: false, mlp_bias: false };
    Box::new(Llama::new(config, &variant))
}
