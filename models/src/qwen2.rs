//! Qwen2 (Yang et al. 2024): Llama with biases on q, k and v; upper layers may slide a window.

use crate::Model;
use crate::config::Config;
use crate::llama::{Llama, Variant};

pub(crate) fn build(config: Config) -> Box<dyn Model> {
    let window = |c: &Config, layer: usize| {
        let listed = c.layer_windows.as_ref().and_then(|windows| windows.get(layer).copied());
        c.window.filter(|_| listed.unwrap_or(layer >= c.window_from))
    };
    let variant = Variant { qkv_bias: true, o_bias: false, mlp_bias: false, window };
    Box::new(Llama::new(config, &variant))
}
