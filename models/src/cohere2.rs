//! Command R7B (Cohere 2024): attention and the feed-forward part side by side behind one layer norm; windows with positions
//! in three of four layers, none of both in the others.

use crate::attention::{Attention, AttentionSpec};
use crate::config::{Config, ConfigError, Defaults};
use crate::exec::Exec;
use crate::feed_forward::{FeedForward, Inner};
use crate::keys::Keys;
use crate::op::{Activation, Norm, Value};
use crate::outline::{Builder, Outline};
use crate::rope::RopeKeys;
use crate::windows::{FULL, SLIDING, full_every, layer_types, windows_of};
use crate::{Family, Model};

pub(crate) const FAMILY: Family = Family {
    model_type: "cohere2",
    honoured: &["attention_bias", "logit_scale", "rope_interleaved", "sliding_window_pattern"],
    scaled: None,
    build,
};

struct Cohere2 {
    outline: Outline,
    logit_scale: f32,
    layers: Vec<Layer>,
}

struct Layer {
    norm: Norm,
    attention: Attention,
    mlp: FeedForward,
}

fn build(keys: &Keys<'_>) -> Result<Box<dyn Model>, ConfigError> {
    let config = Config::read(keys, &Defaults { positions: 8192, tied_head: true, ..Defaults::default() })?;
    let (eps, hidden) = (keys.share("layer_norm_eps", 1e-5)?, config.hidden_size);
    let logit_scale = keys.positive("logit_scale", 0.0625)? as f32;
    let (bias, width) = (keys.flag("attention_bias", false)?, keys.size("intermediate_size")?);
    let types = layer_types(keys, config.layers, &[FULL, SLIDING])?;
    let every = keys.optional_size("sliding_window_pattern")?.unwrap_or(4);
    let types = types.unwrap_or_else(|| full_every(every, config.layers));
    let windows = windows_of(keys, &types, Some(4096))?;
    let rope = RopeKeys { pairs: true, ..RopeKeys::of(&config) }.read(keys)?;

    let mut b = Builder::new(config);
    let table = b.rope(rope);
    let layers = windows.into_iter().enumerate().map(|(i, window)| {
        let at = format!("model.layers.{i}");
        let ropes = window.map(|_| [table; 2]);
        let spec = AttentionSpec { ropes, window, qkv_bias: bias, o_bias: bias, ..AttentionSpec::default() };
        Layer {
            norm: Norm { centered: true, ..b.rms_norm(&format!("{at}.input_layernorm"), hidden, eps) },
            attention: Attention::new(&mut b, &format!("{at}.self_attn"), spec),
            mlp: FeedForward::new(&mut b, &format!("{at}.mlp"), Inner::Gated(Activation::Silu), width, false),
        }
    });
    let layers = layers.collect();
    let norm = Norm { centered: true, ..b.rms_norm("model.norm", hidden, eps) };
    Ok(Box::new(Cohere2 { outline: b.finish(norm), logit_scale, layers }))
}

impl Model for Cohere2 {
    fn outline(&self) -> &Outline {
        &self.outline
    }

    fn layer(&self, ex: &mut dyn Exec, index: usize, x: Value) -> Value {
        let l = &self.layers[index];

        let h = ex.norm(l.norm, x);
        let a = l.attention.run(ex, h);
        let m = l.mlp.run(ex, h);
        let x = ex.add(x, a);
        ex.add(x, m)
    }

    /// The head is linear: what would be multiplied after it may be before.
    fn norm(&self, ex: &mut dyn Exec, x: Value) -> Value {
        let h = ex.norm(self.outline.norm, x);
        ex.scale(self.logit_scale, h)
    }
}
