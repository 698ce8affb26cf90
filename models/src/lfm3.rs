//! LFM3 (Liquid AI 2026): LFM2 with norms after both parts of a layer, too, windows in most attention layers, and a gate for
//! each head's output.

use crate::attention::QkNorms;
use crate::config::{Config, ConfigError, Defaults};
use crate::exec::Exec;
use crate::feed_forward::{FeedForward, projections};
use crate::keys::Keys;
use crate::lfm2::{PROJECTIONS, ShortConv};
use crate::op::{AttentionShape, Linear, Map, Norm, RopeTable, StateId, StateSpec, Value};
use crate::outline::{Builder, Outline};
use crate::rope::RopeKeys;
use crate::windows::{FULL, SLIDING, layer_types, windows_of};
use crate::{Family, Model};

pub(crate) const FAMILY: Family = Family { model_type: "lfm3", honoured: &["attention_bias"], scaled: None, build };

/// A layer with a convolution, as `layer_types` spells it.
const CONV: &str = "conv";

struct Lfm3 {
    outline: Outline,
    layers: Vec<Layer>,
}

struct Layer {
    operator_norm: Norm,
    operator: Operator,
    post_operator_norm: Option<Norm>,
    ffn_norm: Norm,
    feed_forward: FeedForward,
    post_ffn_norm: Option<Norm>,
}

/// What mixes a layer's tokens.
enum Operator {
    Attention(GatedAttention),
    Conv(ShortConv),
}

struct GatedAttention {
    qkv: [Linear; 3],
    gate: Option<Linear>,
    o: Linear,
    norms: [Norm; 2],
    rope: RopeTable,
    shape: AttentionShape,
    state: StateId,
}

fn build(keys: &Keys<'_>) -> Result<Box<dyn Model>, ConfigError> {
    let defaults = Defaults { kv_heads: Some(8), positions: 128_000, tied_head: true, ..Defaults::default() };
    let config = Config::read(keys, &defaults)?;
    let (eps, hidden, width) = (keys.share("norm_eps", 1e-5)?, config.hidden_size, keys.size("intermediate_size")?);
    let (taps, bias) = (keys.count_or("conv_L_cache", 7)?, keys.flag("conv_bias", false)?);
    let attention_bias = keys.flag("attention_bias", false)?;
    let (gated, sandwich) = (keys.flag("use_attention_gate", true)?, keys.flag("use_sandwich_norm", true)?);
    let types = layer_types(keys, config.layers, &[FULL, SLIDING, CONV])?;
    let types = types.ok_or_else(|| ConfigError::new("layer_types", "a kind for each layer", "nothing"))?;
    let windows = windows_of(keys, &types, None)?;
    let rope = |name, theta| RopeKeys { theta, layers: Some(name), ..RopeKeys::of(&config) }.read(keys);
    let (full, sliding) = (rope(FULL, 1e6)?, rope(SLIDING, 1e4)?);

    let mut b = Builder::new(config);
    let layers = types.into_iter().zip(windows).enumerate().map(|(i, (kind, window))| {
        let at = format!("model.layers.{i}");
        let norm = |b: &mut Builder, name: &str| b.rms_norm(&format!("{at}.{name}"), hidden, eps);
        Layer {
            operator_norm: norm(&mut b, "operator_norm"),
            operator: match kind {
                CONV => Operator::Conv(ShortConv::new(&mut b, &format!("{at}.conv"), taps, bias)),
                _ => {
                    let rope = b.rope(if kind == FULL { full.clone() } else { sliding.clone() });
                    let at = format!("{at}.self_attn");
                    Operator::Attention(GatedAttention::new(&mut b, &at, rope, window, gated, attention_bias, eps))
                }
            },
            post_operator_norm: sandwich.then(|| norm(&mut b, "post_operator_norm")),
            ffn_norm: norm(&mut b, "ffn_norm"),
            feed_forward: FeedForward::of(projections(&mut b, &format!("{at}.feed_forward"), PROJECTIONS, width)),
            post_ffn_norm: sandwich.then(|| norm(&mut b, "post_ffn_norm")),
        }
    });
    let layers = layers.collect();
    let norm = b.rms_norm("model.embedding_norm", hidden, eps);
    Ok(Box::new(Lfm3 { outline: b.finish(norm), layers }))
}

impl GatedAttention {
    fn new(
        b: &mut Builder,
        at: &str,
        rope: RopeTable,
        window: Option<usize>,
        gated: bool,
        bias: bool,
        eps: f32,
    ) -> Self {
        let Config { heads, kv_heads, head_dim, hidden_size, .. } = b.config;
        let projections = [("q_proj", heads), ("k_proj", kv_heads), ("v_proj", kv_heads)];
        let scale = (head_dim as f32).sqrt().recip();
        Self {
            qkv: projections
                .map(|(name, heads)| b.linear(&format!("{at}.{name}"), heads * head_dim, hidden_size, bias)),
            gate: gated.then(|| {
                // Files call it otherwise than transformers does in memory.
                b.linear_as([&format!("{at}.gate_proj"), &format!("{at}.g_proj")], heads, hidden_size, false)
            }),
            o: b.linear(&format!("{at}.o_proj"), hidden_size, heads * head_dim, bias),
            norms: QkNorms::of_heads(eps).declare(b, at),
            rope,
            shape: AttentionShape { heads, kv_heads, head_dim, scale, softcap: None, window, sinks: None },
            state: b.state(StateSpec::Kv { kv_heads, head_dim, window }),
        }
    }

    fn run(&self, ex: &mut dyn Exec, h: Value) -> Value {
        let AttentionShape { heads, kv_heads, .. } = self.shape;
        let [q, k, v] = ex.linear_group(self.qkv, h);
        let (q, k) = (ex.norm(self.norms[0], q), ex.norm(self.norms[1], k));
        let (q, k) = (ex.rope(self.rope, heads, q), ex.rope(self.rope, kv_heads, k));
        let mut a = ex.attention(self.state, self.shape, q, k, v);
        if let Some(gate) = self.gate {
            let gate = ex.linear(gate, h);
            let gate = ex.map(Map::Sigmoid, gate);
            a = ex.scale_heads(gate, a);
        }
        ex.linear(self.o, a)
    }
}

impl Model for Lfm3 {
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
        let h = l.post_operator_norm.map_or(h, |norm| ex.norm(norm, h));
        let x = ex.add(x, h);

        let h = ex.norm(l.ffn_norm, x);
        let h = l.feed_forward.run(ex, h);
        let h = l.post_ffn_norm.map_or(h, |norm| ex.norm(norm, h));
        ex.add(x, h)
    }
}

#[cfg(test)]
mod tests {
    use crate::testing::refused_key;
    use serde_json::json;

    #[test]
    fn kinds_of_layers_must_be_named() {
        for (change, key) in [
            (json!({}), "layer_types"),
            (json!({"layer_types": ["conv", "conv", "attention"]}), "layer_types"),
            (json!({"layer_types": ["conv", "conv", "sliding_attention"]}), "sliding_window"),
        ] {
            assert_eq!(refused_key("lfm3", &change).as_deref(), Some(key), "{change}");
        }
    }
}
