//! Mamba 2 (Dao & Gu 2024): layers are state spaces and nothing else.

use crate::config::{Config, ConfigError};
use crate::exec::Exec;
use crate::keys::Keys;
use crate::mamba::{GatedNorm, Mamba, MambaSpec, limits};
use crate::op::{Norm, Value};
use crate::outline::{Builder, Outline};
use crate::{Family, Model};

pub(crate) const FAMILY: Family = Family { model_type: "mamba2", honoured: &["use_bias"], scaled: None, build };

struct Mamba2 {
    outline: Outline,
    layers: Vec<(Norm, Mamba)>,
}

fn build(keys: &Keys<'_>) -> Result<Box<dyn Model>, ConfigError> {
    let (hidden, eps) = (keys.size("hidden_size")?, keys.share("layer_norm_epsilon", 1e-5)?);
    let spec = MambaSpec {
        heads: keys.count_or("num_heads", 128)?,
        head_dim: keys.count_or("head_dim", 64)?,
        groups: keys.count_or("n_groups", 8)?,
        state_dim: keys.count_or("state_size", 128)?,
        taps: keys.count_or("conv_kernel", 4)?,
        conv_bias: keys.flag("use_conv_bias", true)?,
        bias: keys.flag("use_bias", false)?,
        limits: limits(keys)?,
        norm: Some(GatedNorm { eps, before_gate: false }),
        factors: [1.0; 5],
    };
    spec.check("n_groups")?;
    let inner = keys.count_or("expand", 2)? * hidden;
    if spec.heads * spec.head_dim != inner {
        let expected = format!("a number of heads of {} that make {inner}", spec.head_dim);
        return Err(ConfigError::new("num_heads", expected, spec.heads));
    }
    let config = Config {
        model_type: FAMILY.model_type.to_owned(),
        hidden_size: hidden,
        layers: keys.count("num_hidden_layers")?,
        heads: spec.heads,
        kv_heads: spec.heads,
        head_dim: spec.head_dim,
        vocab_size: keys.size("vocab_size")?,
        // Nothing in it depends on positions; so long are the texts of its training.
        max_positions: keys.optional_size("max_position_embeddings")?.unwrap_or(2048),
        tied_head: keys.flag("tie_word_embeddings", false)?,
        attention_dropout: 0.0,
    };
    let layers = config.layers;
    let mut b = Builder::with_embedding(config, "backbone.embeddings");
    let layer = |i| {
        let at = format!("backbone.layers.{i}");
        (b.rms_norm(&format!("{at}.norm"), hidden, eps), Mamba::new(&mut b, &format!("{at}.mixer"), spec))
    };
    let layers = (0..layers).map(layer).collect();
    let norm = b.rms_norm("backbone.norm_f", hidden, eps);
    Ok(Box::new(Mamba2 { outline: b.finish(norm), layers }))
}

impl Model for Mamba2 {
    fn outline(&self) -> &Outline {
        &self.outline
    }

    fn layer(&self, ex: &mut dyn Exec, index: usize, x: Value) -> Value {
        let (norm, mixer) = &self.layers[index];
        let h = ex.norm(*norm, x);
        let h = mixer.run(ex, h);
        ex.add(x, h)
    }
}
