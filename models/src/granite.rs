//! Granite (IBM 2024): factors on the embeddings, the scores, what each part adds to the residual stream, and the logits.

use crate::attention::AttentionSpec;
use crate::config::{Config, ConfigError, Defaults};
use crate::decoder::{Decoder, Variant};
use crate::exec::Exec;
use crate::keys::Keys;
use crate::op::Value;
use crate::outline::Outline;
use crate::windows;
use crate::{Family, Model};

pub(crate) const FAMILY: Family = Family {
    model_type: "granite",
    honoured: &[
        "attention_bias",
        "mlp_bias",
        "attention_multiplier",
        "embedding_multiplier",
        "logits_scaling",
        "residual_multiplier",
    ],
    scaled: None,
    build,
};

pub(crate) struct Granite {
    decoder: Decoder,
    factors: Factors,
}

impl Granite {
    pub(crate) fn new(decoder: Decoder, factors: Factors) -> Self {
        Self { decoder, factors }
    }
}

/// Granite's factors, which its hybrids have, too.
pub(crate) struct Factors {
    /// On embeddings.
    pub(crate) embedding: f32,
    /// On scores.
    pub(crate) attention: f32,
    /// On what each part adds to the residual stream.
    pub(crate) residual: f32,
    /// What logits are divided by.
    logits: f32,
}

impl Factors {
    pub(crate) fn read(keys: &Keys<'_>) -> Result<Self, ConfigError> {
        let factor = |key: &str| keys.positive(key, 1.0).map(|factor| factor as f32);
        Ok(Self {
            embedding: factor("embedding_multiplier")?,
            attention: factor("attention_multiplier")?,
            residual: factor("residual_multiplier")?,
            logits: factor("logits_scaling")?,
        })
    }

    /// The head is linear: what is divided before it need not be divided after it.
    pub(crate) fn divide(&self, ex: &mut dyn Exec, h: Value) -> Value {
        ex.scale(1.0 / self.logits, h)
    }
}

fn build(keys: &Keys<'_>) -> Result<Box<dyn Model>, ConfigError> {
    let config = Config::read(keys, &Defaults { positions: 2048, ..Defaults::default() })?;
    let factors = Factors::read(keys)?;
    let bias = keys.flag("attention_bias", false)?;
    let scale = Some(factors.attention);
    let variant = Variant {
        attention: AttentionSpec { scale, qkv_bias: bias, o_bias: bias, ..AttentionSpec::default() },
        mlp_bias: keys.flag("mlp_bias", false)?,
        ..Variant::new(keys.share("rms_norm_eps", 1e-6)?, windows::none(keys, &config)?)
    };
    Ok(Box::new(Granite { decoder: Decoder::new(keys, config, &variant, &|_, _, _| None)?, factors }))
}

impl Model for Granite {
    fn outline(&self) -> &Outline {
        &self.decoder.outline
    }

    fn embed(&self, ex: &mut dyn Exec) -> Value {
        let x = ex.embed(self.decoder.outline.embedding);
        ex.scale(self.factors.embedding, x)
    }

    fn layer(&self, ex: &mut dyn Exec, index: usize, x: Value) -> Value {
        let l = &self.decoder.layers[index];

        let h = l.attention_norms.before(ex, x);
        let a = l.attention.run(ex, h);
        let a = ex.scale(self.factors.residual, a);
        let x = ex.add(x, a);

        let h = l.mlp_norms.before(ex, x);
        let h = l.mlp.run(ex, h);
        let h = ex.scale(self.factors.residual, h);
        ex.add(x, h)
    }

    fn norm(&self, ex: &mut dyn Exec, x: Value) -> Value {
        let h = ex.norm(self.decoder.outline.norm, x);
        self.factors.divide(ex, h)
    }
}

#[cfg(test)]
mod tests {
    use crate::testing::refused_key;
    use serde_json::json;

    #[test]
    fn what_would_change_numbers_is_refused_by_name() {
        for (change, key) in [
            (json!({"residual_multiplier": 0}), "residual_multiplier"),
            (json!({"logits_scaling": "8"}), "logits_scaling"),
            (json!({"num_local_experts": 8}), "num_local_experts"),
            (json!({"layer_types": vec!["sliding_attention"; 3], "sliding_window": 8}), "layer_types"),
        ] {
            assert_eq!(refused_key("granite", &change).as_deref(), Some(key), "{change}");
        }
    }
}
