//! Qwen3.5 (Qwen Team 2026), text: three of four layers are a gated delta net, the others attention whose output passes a
//! gate.

use crate::config::ConfigError;
use crate::feed_forward::{FeedForward, Inner};
use crate::gated_delta_net::{Hybrid, InputsBy, Mlp};
use crate::keys::Keys;
use crate::op::Activation;
use crate::outline::Builder;
use crate::{Family, Model};

pub(crate) const FAMILY: Family = Family {
    model_type: "qwen3_5_text",
    honoured: &["attention_bias", "attn_output_gate", "partial_rotary_factor"],
    scaled: None,
    build,
};

fn build(keys: &Keys<'_>) -> Result<Box<dyn Model>, ConfigError> {
    let width = keys.size("intermediate_size")?;
    let mlp = |b: &mut Builder, at: &str, _| {
        Mlp::Dense(FeedForward::new(b, at, Inner::Gated(Activation::Silu), width, false))
    };
    Ok(Box::new(Hybrid::new(keys, 4, InputsBy::Kind, &mlp)?))
}
