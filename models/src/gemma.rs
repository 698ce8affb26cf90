//! What the Gemma families share (Gemma Team 2024): norms before and after both parts of a layer, whose weights are one
//! less than what they multiply by; a GELU gate; embeddings times the root of their width; logits that may be held below
//! a bound.

use crate::Model;
use crate::config::ConfigError;
use crate::decoder::{Decoder, NormKind, NormNames, Variant};
use crate::exec::Exec;
use crate::feed_forward::Inner;
use crate::keys::Keys;
use crate::op::{Activation, Linear, Map, Value};
use crate::outline::Outline;

const NORMS: NormNames = [
    [Some("input_layernorm"), Some("post_attention_layernorm")],
    [Some("pre_feedforward_layernorm"), Some("post_feedforward_layernorm")],
];

pub(crate) struct Gemma {
    decoder: Decoder,
    /// Factor on embeddings.
    scale: f32,
    /// Bound of the logits.
    softcap: Option<f32>,
}

/// What all of them have.
pub(crate) fn variant(eps: f32, windows: Vec<Option<usize>>) -> Variant {
    let mlp = Inner::Gated(Activation::GeluTanh);
    Variant { mlp, norms: NORMS, norm: NormKind::RmsPlusOne, ..Variant::new(eps, windows) }
}

impl Gemma {
    pub(crate) fn new(keys: &Keys<'_>, decoder: Decoder, softcap: Option<f32>) -> Result<Self, ConfigError> {
        let scale = embedding_scale(keys, decoder.outline.config.hidden_size)?;
        Ok(Self { decoder, scale, softcap })
    }
}

/// The root of the width, rounded to the type of the weights: with that factor the models were trained.
pub(crate) fn embedding_scale(keys: &Keys<'_>, hidden: usize) -> Result<f32, ConfigError> {
    let dtype = keys.text("dtype")?.or(keys.text("torch_dtype")?);
    // Bits of an f32's mantissa that do not fit. A root of up to 2^12 is far from the bounds of exponents.
    let lost = match dtype {
        Some("bfloat16") => 16,
        Some("float16") => 13,
        _ => 0,
    };
    let bits = (hidden as f32).sqrt().to_bits();
    if lost == 0 {
        return Ok(f32::from_bits(bits));
    }
    // To the nearest, of two the even one.
    let half = (1 << (lost - 1)) - 1 + ((bits >> lost) & 1);
    Ok(f32::from_bits((bits + half) >> lost << lost))
}

impl Model for Gemma {
    fn outline(&self) -> &Outline {
        &self.decoder.outline
    }

    fn embed(&self, ex: &mut dyn Exec) -> Value {
        let x = ex.embed(self.decoder.outline.embedding);
        ex.scale(self.scale, x)
    }

    fn layer(&self, ex: &mut dyn Exec, index: usize, x: Value) -> Value {
        self.decoder.layer(ex, index, x)
    }

    fn plain_head(&self) -> Option<Linear> {
        self.softcap.is_none().then_some(self.decoder.outline.head)
    }

    fn head(&self, ex: &mut dyn Exec, x: Value) -> Value {
        let h = self.norm(ex, x);
        let y = ex.linear(self.decoder.outline.head, h);
        self.softcap.map_or(y, |cap| ex.map(Map::Softcap(cap), y))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::config;
    use serde_json::json;

    #[test]
    fn embeddings_are_scaled_by_a_rounded_root() {
        let scale = |change| embedding_scale(&Keys(&config("gemma3_text", &change)), 640).unwrap();
        assert_eq!(scale(json!({})), 640f32.sqrt());
        assert_eq!(scale(json!({"torch_dtype": "bfloat16"})), 25.25);
        assert_eq!(scale(json!({"dtype": "float16"})), 25.296_875);
    }
}
