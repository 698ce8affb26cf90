//! MiniCPM3 (OpenBMB 2024): latent attention; factors on embeddings, on what each part adds to the residual stream, and on
//! logits, by the depth and the width that they were tuned at (Yang et al. 2022).

use crate::config::{Config, ConfigError, Defaults};
use crate::exec::Exec;
use crate::feed_forward::{FeedForward, Inner};
use crate::keys::Keys;
use crate::latent_attention::{LatentAttention, Widths};
use crate::op::{Activation, Norm, Value};
use crate::outline::{Builder, Outline};
use crate::rope::RopeKeys;
use crate::{Family, Model};

pub(crate) const FAMILY: Family = Family {
    model_type: "minicpm3",
    honoured: &[
        "attention_bias",
        "mlp_bias",
        "kv_lora_rank",
        "q_lora_rank",
        "scale_emb",
        "scale_depth",
        "dim_model_base",
    ],
    scaled: None,
    build,
};

struct MiniCpm3 {
    outline: Outline,
    embedding: f32,
    residual: f32,
    logits: f32,
    layers: Vec<Layer>,
}

struct Layer {
    input_norm: Norm,
    attention: LatentAttention,
    post_norm: Norm,
    mlp: FeedForward,
}

fn build(keys: &Keys<'_>) -> Result<Box<dyn Model>, ConfigError> {
    let config = Config::read(keys, &Defaults { positions: 32768, tied_head: true, ..Defaults::default() })?;
    let (widths, eps, hidden) = (Widths::read(keys)?, keys.share("rms_norm_eps", 1e-6)?, config.hidden_size);
    let (bias, mlp_bias) = (keys.flag("attention_bias", false)?, keys.flag("mlp_bias", false)?);
    let width = keys.size("intermediate_size")?;
    let embedding = keys.positive("scale_emb", 1.0)? as f32;
    let residual = (keys.positive("scale_depth", 1.0)? / (config.layers as f64).sqrt()) as f32;
    let logits = (keys.positive("dim_model_base", 1.0)? / hidden as f64) as f32;
    let rope = RopeKeys { head_dim: widths.turned, ..RopeKeys::of(&config) }.read(keys)?;
    let layers = config.layers;

    let mut b = Builder::new(config);
    let rope = b.rope(rope);
    let layer = |i| {
        let at = format!("model.layers.{i}");
        Layer {
            input_norm: b.rms_norm(&format!("{at}.input_layernorm"), hidden, eps),
            attention: LatentAttention::new(&mut b, &format!("{at}.self_attn"), widths, rope, bias),
            post_norm: b.rms_norm(&format!("{at}.post_attention_layernorm"), hidden, eps),
            mlp: FeedForward::new(&mut b, &format!("{at}.mlp"), Inner::Gated(Activation::Silu), width, mlp_bias),
        }
    };
    let layers = (0..layers).map(layer).collect();
    let norm = b.rms_norm("model.norm", hidden, eps);
    Ok(Box::new(MiniCpm3 { outline: b.finish(norm), embedding, residual, logits, layers }))
}

impl Model for MiniCpm3 {
    fn outline(&self) -> &Outline {
        &self.outline
    }

    fn embed(&self, ex: &mut dyn Exec) -> Value {
        let x = ex.embed(self.outline.embedding);
        ex.scale(self.embedding, x)
    }

    fn layer(&self, ex: &mut dyn Exec, index: usize, x: Value) -> Value {
        let l = &self.layers[index];

        let h = ex.norm(l.input_norm, x);
        let h = l.attention.run(ex, h);
        let h = ex.scale(self.residual, h);
        let x = ex.add(x, h);

        let h = ex.norm(l.post_norm, x);
        let h = l.mlp.run(ex, h);
        let h = ex.scale(self.residual, h);
        ex.add(x, h)
    }

    /// The head is linear: what would be multiplied after it may be before.
    fn norm(&self, ex: &mut dyn Exec, x: Value) -> Value {
        let h = ex.norm(self.outline.norm, x);
        ex.scale(self.logits, h)
    }
}
