//! Mistral (Jiang et al. 2023): Llama with a sliding window in every layer.

use crate::Model;
use crate::config::Config;
use crate::llama::{Llama, Variant};

pub(crate) fn build(config: Config) -> Box<dyn Model> {
    let variant = Variant { qkv_bias: false, o_bias: false, mlp_bias: false };
    Box::new(Llama::new(config, &variant))
}
