//! LFM2 (Liquid AI 2025): most layers mix tokens by a short convolution between two gates, the others by attention.

use crate::attention::{Attention, AttentionSpec, QkNorms};
use crate::config::{Config, ConfigError, Defaults};
use crate::decoder::Mlp;
use crate::exec::Exec;
use crate::feed_forward::{FeedForward, projections};
use crate::keys::Keys;
use crate::op::{Conv, Linear, Norm, StateId, Value};
use crate::outline::{Builder, Outline};
use crate::rope::RopeKeys;
use crate::windows::{FULL, layer_types};
use crate::{Family, Model};

pub(crate) const FAMILY: Family = Family { model_type: "lfm2", honoured: &[], scaled: None, build };

/// A layer with a convolution, as `layer_types` spells it.
const CONV: &str = "conv";

pub(crate) struct Lfm2 {
    outline: Outline,
    layers: Vec<Layer>,
}

struct Layer {
    operator_norm: Norm,
    operator: Operator,
    ffn_norm: Norm,
    feed_forward: Mlp,
}

/// What mixes a layer's tokens.
enum Operator {
    Attention(Box<Attention>),
    Conv(ShortConv),
}

/// `y = out(C * conv(B * x))` with `B`, `C`, `x` of one projection.
pub(crate) struct ShortConv {
    input: Linear,
    conv: Conv,
    state: StateId,
    output: Linear,
    width: usize,
}

fn build(keys: &Keys<'_>) -> Result<Box<dyn Model>, ConfigError> {
    let width = feed_forward_width(keys)?;
    Ok(Box::new(Lfm2::new(keys, &|b, at, _| dense(b, at, width))?))
}

/// A feed-forward part of so many between its products.
pub(crate) fn dense(b: &mut Builder, at: &str, width: usize) -> Mlp {
    Mlp::Dense(FeedForward::of(projections(b, at, PROJECTIONS, width)))
}

/// Names of a feed-forward part's gate, up and down.
pub(crate) const PROJECTIONS: [&str; 3] = ["w1", "w3", "w2"];

impl Lfm2 {
    /// The model whose feed-forward parts `feed_forward` declares, for the module and the number of each layer.
    pub(crate) fn new(
        keys: &Keys<'_>,
        feed_forward: &dyn Fn(&mut Builder, &str, usize) -> Mlp,
    ) -> Result<Self, ConfigError> {
        let defaults = Defaults { kv_heads: Some(8), positions: 128_000, tied_head: true, ..Defaults::default() };
        let mut config = Config::read(keys, &defaults)?;
        config.tied_head = keys.flag("tie_embedding", config.tied_head)?;
        let eps = keys.share("norm_eps", 1e-5)?;
        let (taps, bias) = (keys.count_or("conv_L_cache", 3)?, keys.flag("conv_bias", false)?);
        let types = kinds(keys, config.layers)?;
        let rope = RopeKeys { theta: 1e6, ..RopeKeys::of(&config) }.read(keys)?;
        let width = config.hidden_size;

        let mut b = Builder::new(config);
        let norms = QkNorms { names: ["q_layernorm", "k_layernorm"], ..QkNorms::of_heads(eps) };
        let ropes = Some([b.rope(rope); 2]);
        let spec = AttentionSpec { ropes, o: "out_proj", norms: Some(norms), ..AttentionSpec::default() };
        let layers = types.into_iter().enumerate().map(|(i, kind)| {
            let at = format!("model.layers.{i}");
            Layer {
                operator_norm: b.rms_norm(&format!("{at}.operator_norm"), width, eps),
                operator: match kind {
                    FULL => Operator::Attention(Box::new(Attention::new(&mut b, &format!("{at}.self_attn"), spec))),
                    _ => Operator::Conv(ShortConv::new(&mut b, &format!("{at}.conv"), taps, bias)),
                },
                ffn_norm: b.rms_norm(&format!("{at}.ffn_norm"), width, eps),
                feed_forward: feed_forward(&mut b, &format!("{at}.feed_forward"), i),
            }
        });
        let layers = layers.collect();
        let norm = b.rms_norm("model.embedding_norm", width, eps);
        Ok(Self { outline: b.finish(norm), layers })
    }
}

/// The kind of each layer: named, or attention where `full_attn_idxs` has its number, or all attention.
fn kinds(keys: &Keys<'_>, layers: usize) -> Result<Vec<&'static str>, ConfigError> {
    let full = keys.indices("full_attn_idxs")?;
    let kind = |i| if full.as_ref().is_none_or(|full| full.contains(&i)) { FULL } else { CONV };
    Ok(layer_types(keys, layers, &[FULL, CONV])?.unwrap_or_else(|| (0..layers).map(kind).collect()))
}

/// `intermediate_size` as it is or, where it is to be adjusted, two thirds of it, times a factor, rounded up to whole
/// blocks.
fn feed_forward_width(keys: &Keys<'_>) -> Result<usize, ConfigError> {
    let given = keys.optional_size("block_ff_dim")?;
    let given = given.map_or_else(|| keys.size("intermediate_size"), Ok)?;
    let block = keys.optional_size("block_multiple_of")?.unwrap_or(256);
    if !keys.flag("block_auto_adjust_ff_dim", true)? {
        return Ok(given);
    }
    let width = 2 * given / 3;
    if keys.is_null("block_ffn_dim_multiplier") {
        return Ok(width);
    }
    let factor = keys.positive("block_ffn_dim_multiplier", 1.0)?;
    let width = ((factor * width as f64) as usize).div_ceil(block).saturating_mul(block);
    if (1..=1 << 24).contains(&width) {
        return Ok(width);
    }
    Err(ConfigError::new("block_ffn_dim_multiplier", "a factor that keeps `intermediate_size` a width", factor))
}

impl ShortConv {
    pub(crate) fn new(b: &mut Builder, at: &str, taps: usize, bias: bool) -> Self {
        let width = b.config.hidden_size;
        let (conv, state) = b.conv(&format!("{at}.conv"), width, taps, bias);
        Self {
            input: b.linear(&format!("{at}.in_proj"), 3 * width, width, bias),
            conv,
            state,
            output: b.linear(&format!("{at}.out_proj"), width, width, bias),
            width,
        }
    }

    pub(crate) fn run(&self, ex: &mut dyn Exec, h: Value) -> Value {
        let bcx = ex.linear(self.input, h);
        let [b, c, x] = ex.split(bcx, [self.width; 3]);
        let x = ex.multiply(b, x);
        let x = ex.conv(self.state, self.conv, x);
        let x = ex.multiply(c, x);
        ex.linear(self.output, x)
    }
}

impl Model for Lfm2 {
    fn outline(&self) -> &Outline {
        &self.outline
    }

    fn layer(&self, ex: &mut dyn Exec, index: usize, x: Value) -> Value {
        let l = &self.layers[index];

        let h = ex.norm(l.operator_norm, x);
        let h = match &l.operator {
            Operator::Attention(attention) => attention.run(ex, h),
            Operator::Conv(conv) => conv.run(ex, h),
        };
        let x = ex.add(x, h);

        let h = ex.norm(l.ffn_norm, x);
        let h = l.feed_forward.run(ex, h);
        ex.add(x, h)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::config;
    use serde_json::json;

    #[test]
    fn the_feed_forward_width_is_that_of_transformers() {
        for (change, want) in [
            (json!({"intermediate_size": 12288}), 8192),
            (json!({"intermediate_size": 144, "block_multiple_of": 16}), 96),
            (json!({"block_ff_dim": 1000, "block_ffn_dim_multiplier": 1.5}), 1024),
            (json!({"intermediate_size": 1000, "block_ffn_dim_multiplier": null}), 666),
            (json!({"intermediate_size": 1000, "block_auto_adjust_ff_dim": false}), 1000),
        ] {
            assert_eq!(feed_forward_width(&Keys(&config("lfm2", &change))).unwrap(), want, "{change}");
        }
        let too_wide = config("lfm2", &json!({"block_ffn_dim_multiplier": 1e12}));
        assert_eq!(feed_forward_width(&Keys(&too_wide)).unwrap_err().key, "block_ffn_dim_multiplier");
    }

    #[test]
    fn layers_without_a_name_are_where_the_list_says() {
        let kinds = |change| kinds(&Keys(&config("lfm2", &change)), 3).unwrap();
        assert_eq!(kinds(json!({})), [FULL; 3]);
        assert_eq!(kinds(json!({"full_attn_idxs": [1]})), [CONV, FULL, CONV]);
        assert_eq!(kinds(json!({"layer_types": ["conv", "conv", "full_attention"]})), [CONV, CONV, FULL]);
    }
}
