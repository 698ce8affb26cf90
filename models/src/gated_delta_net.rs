//! Layers of a gated delta net (Yang et al. 2024), linear attention with a state of fixed size, among layers of attention
//! whose output passes a gate: Qwen3-Next and Qwen3.5.

use crate::Model;
use crate::attention::QkNorms;
use crate::config::{Config, ConfigError, Defaults};
use crate::exec::Exec;
use crate::feed_forward::{FeedForward, SharedMixture};
use crate::keys::Keys;
use crate::op::{
    AttentionShape, Conv, DeltaRuleShape, Linear, Map, Norm, Param, Piece, RopeTable, StateId, StateSpec, Value,
};
use crate::outline::{Builder, Outline};
use crate::rope::RopeKeys;
use crate::windows::{FULL, layer_types};

/// A layer of the delta rule, as `layer_types` spells it.
const LINEAR: &str = "linear_attention";

pub(crate) struct Hybrid {
    outline: Outline,
    layers: Vec<Layer>,
}

struct Layer {
    input_norm: Norm,
    mixer: Mixer,
    post_attention_norm: Norm,
    feed_forward: Mlp,
}

/// The feed-forward part of a layer.
pub(crate) enum Mlp {
    Dense(FeedForward),
    Shared(SharedMixture),
}

/// What mixes a layer's tokens.
enum Mixer {
    Attention(GatedAttention),
    DeltaNet(DeltaNet),
}

/// Attention with a gate for each element of its output; `q` holds a head's queries and gates in turn.
struct GatedAttention {
    q: Linear,
    k: Linear,
    v: Linear,
    o: Linear,
    norms: [Norm; 2],
    rope: RopeTable,
    shape: AttentionShape,
    state: StateId,
}

/// How its inputs are put together: queries, keys and values, then gates `z`, strengths `b` and decays `a`.
#[derive(Clone, Copy)]
pub(crate) enum InputsBy {
    /// A matrix for each of these.
    Kind,
    /// Two, in which each head of keys has its part of all.
    Head,
}

enum Inputs {
    ByKind([Linear; 4]),
    ByHead([Linear; 2]),
}

struct DeltaNet {
    inputs: Inputs,
    conv: Conv,
    conv_state: StateId,
    rate: Param,
    bias: Param,
    shape: DeltaRuleShape,
    state: StateId,
    norm: Norm,
    out: Linear,
}

impl Hybrid {
    /// The model that `keys` describe, whose layers have the feed-forward part that `mlp` declares for their module and number.
    pub(crate) fn new(
        keys: &Keys<'_>,
        kv_heads: usize,
        inputs: InputsBy,
        mlp: &dyn Fn(&mut Builder, &str, usize) -> Mlp,
    ) -> Result<Self, ConfigError> {
        let defaults =
            Defaults { kv_heads: Some(kv_heads), head_dim: Some(256), positions: 32768, ..Defaults::default() };
        let config = Config::read(keys, &defaults)?;
        if !keys.flag("attn_output_gate", true)? {
            return Err(ConfigError::unsupported("attn_output_gate", "nothing or true", false));
        }
        let eps = keys.share("rms_norm_eps", 1e-6)?;
        let bias = keys.flag("attention_bias", false)?;
        let types = kinds(keys, config.layers)?;
        // Text has the same position in all sections.
        let more = &["mrope_section", "mrope_interleaved"];
        let rope = RopeKeys { partial: Some(0.25), more, ..RopeKeys::of(&config) }.read(keys)?;
        let (shape, taps) = (delta_rule(keys, [16, 32])?, keys.count_or("linear_conv_kernel_dim", 4)?);
        let hidden = config.hidden_size;

        let mut b = Builder::new(config);
        let rope = b.rope(rope);
        let layers = types.into_iter().enumerate().map(|(i, kind)| {
            let at = format!("model.layers.{i}");
            Layer {
                input_norm: plus_one(b.rms_norm(&format!("{at}.input_layernorm"), hidden, eps)),
                mixer: match kind {
                    FULL => Mixer::Attention(GatedAttention::new(&mut b, &format!("{at}.self_attn"), rope, bias, eps)),
                    _ => Mixer::DeltaNet(DeltaNet::new(&mut b, &format!("{at}.linear_attn"), inputs, shape, taps, eps)),
                },
                post_attention_norm: plus_one(b.rms_norm(&format!("{at}.post_attention_layernorm"), hidden, eps)),
                feed_forward: mlp(&mut b, &format!("{at}.mlp"), i),
            }
        });
        let layers = layers.collect();
        let norm = plus_one(b.rms_norm("model.norm", hidden, eps));
        Ok(Self { outline: b.finish(norm), layers })
    }
}

/// The kind of each layer: named, or every fourth full, or as often as `full_attention_interval` says.
fn kinds(keys: &Keys<'_>, layers: usize) -> Result<Vec<&'static str>, ConfigError> {
    let every = keys.optional_size("full_attention_interval")?.unwrap_or(4);
    let named = layer_types(keys, layers, &[FULL, LINEAR])?;
    Ok(named.unwrap_or_else(|| (1..=layers).map(|i| if i % every == 0 { FULL } else { LINEAR }).collect()))
}

/// The shape that the keys describe; `heads` are those of keys and of values where the file does not say.
pub(crate) fn delta_rule(keys: &Keys<'_>, heads: [usize; 2]) -> Result<DeltaRuleShape, ConfigError> {
    let count = |key: &str, default| keys.count_or(key, default);
    let shape = DeltaRuleShape {
        key_heads: count("linear_num_key_heads", heads[0])?,
        value_heads: count("linear_num_value_heads", heads[1])?,
        key_dim: count("linear_key_head_dim", 128)?,
        value_dim: count("linear_value_head_dim", 128)?,
    };
    if !shape.value_heads.is_multiple_of(shape.key_heads) {
        let expected = format!("a multiple of {} heads of keys", shape.key_heads);
        return Err(ConfigError::new("linear_num_value_heads", expected, shape.value_heads));
    }
    Ok(shape)
}

fn plus_one(norm: Norm) -> Norm {
    Norm { plus_one: true, ..norm }
}

impl GatedAttention {
    fn new(b: &mut Builder, at: &str, rope: RopeTable, bias: bool, eps: f32) -> Self {
        let Config { heads, kv_heads, head_dim, hidden_size, .. } = b.config;
        let (width, kv_width) = (heads * head_dim, kv_heads * head_dim);
        Self {
            q: b.linear(&format!("{at}.q_proj"), 2 * width, hidden_size, bias),
            k: b.linear(&format!("{at}.k_proj"), kv_width, hidden_size, bias),
            v: b.linear(&format!("{at}.v_proj"), kv_width, hidden_size, bias),
            o: b.linear(&format!("{at}.o_proj"), hidden_size, width, bias),
            norms: QkNorms { plus_one: true, ..QkNorms::of_heads(eps) }.declare(b, at),
            rope,
            shape: AttentionShape {
                heads,
                kv_heads,
                head_dim,
                scale: (head_dim as f32).sqrt().recip(),
                softcap: None,
                window: None,
                sinks: None,
            },
            state: b.state(StateSpec::Kv { kv_heads, head_dim, window: None }),
        }
    }

    fn run(&self, ex: &mut dyn Exec, h: Value) -> Value {
        let AttentionShape { heads, kv_heads, head_dim, .. } = self.shape;
        let [q, k, v] = ex.linear_group([self.q, self.k, self.v], h);
        let [q, gate] = ex.split_heads(q, heads, [head_dim; 2]);
        let (q, k) = (ex.norm(self.norms[0], q), ex.norm(self.norms[1], k));
        let (q, k) = (ex.rope(self.rope, heads, q), ex.rope(self.rope, kv_heads, k));
        let a = ex.attention(self.state, self.shape, q, k, v);
        let gate = ex.map(Map::Sigmoid, gate);
        let a = ex.multiply(gate, a);
        ex.linear(self.o, a)
    }
}

impl DeltaNet {
    fn new(b: &mut Builder, at: &str, inputs: InputsBy, shape: DeltaRuleShape, taps: usize, eps: f32) -> Self {
        let DeltaRuleShape { key_heads, value_heads, key_dim, value_dim } = shape;
        let (hidden, values) = (b.config.hidden_size, value_heads * value_dim);
        let channels = 2 * key_heads * key_dim + values;
        let (conv, conv_state) = b.conv(&format!("{at}.conv1d"), channels, taps, false);
        Self {
            inputs: {
                let mut input = |name: &str, out| b.linear(&format!("{at}.in_proj_{name}"), out, hidden, false);
                match inputs {
                    InputsBy::Kind => Inputs::ByKind([
                        input("qkv", channels),
                        input("z", values),
                        input("b", value_heads),
                        input("a", value_heads),
                    ]),
                    InputsBy::Head => Inputs::ByHead([input("qkvz", channels + values), input("ba", 2 * value_heads)]),
                }
            },
            conv,
            conv_state,
            rate: b.vector(format!("{at}.A_log"), value_heads),
            bias: b.vector(format!("{at}.dt_bias"), value_heads),
            shape,
            state: b.state(StateSpec::Matrix { heads: value_heads, key: key_dim, value: value_dim }),
            norm: b.rms_norm(&format!("{at}.norm"), value_dim, eps),
            out: b.linear(&format!("{at}.out_proj"), hidden, values, false),
        }
    }

    /// Queries, keys and values side by side, then `z`, `b` and `a`.
    fn read(&self, ex: &mut dyn Exec, h: Value) -> [Value; 4] {
        let DeltaRuleShape { key_heads, value_heads, key_dim, value_dim } = self.shape;
        match self.inputs {
            Inputs::ByKind(all) => ex.linear_group(all, h),
            Inputs::ByHead(both) => {
                let [qkvz, ba] = ex.linear_group(both, h);
                let heads = value_heads / key_heads;
                let [q, k, v, z] =
                    ex.split_heads(qkvz, key_heads, [key_dim, key_dim, heads * value_dim, heads * value_dim]);
                let [b, a] = ex.split_heads(ba, key_heads, [heads; 2]);
                let keys = key_heads * key_dim;
                let pieces = [(q, keys), (k, keys), (v, value_heads * value_dim)];
                [ex.join(1, &pieces.map(|(value, width)| Piece::of_heads(value, width))), z, b, a]
            }
        }
    }

    fn run(&self, ex: &mut dyn Exec, h: Value) -> Value {
        let DeltaRuleShape { key_heads, value_heads, key_dim, value_dim } = self.shape;
        let [qkv, z, b, a] = self.read(ex, h);
        let qkv = ex.conv(self.conv_state, self.conv, qkv);
        let qkv = ex.map(Map::Silu, qkv);
        let keys = key_heads * key_dim;
        let [q, k, v] = ex.split(qkv, [keys, keys, value_heads * value_dim]);
        // Queries and keys of length 1; queries are divided by the root of their width, too.
        let root = (key_dim as f32).sqrt();
        let (q, k) = (ex.l2_norm(key_dim, 1e-6, q), ex.l2_norm(key_dim, 1e-6, k));
        let q = ex.scale(root.recip(), q);
        let (g, beta) = (ex.decay(self.rate, self.bias, a), ex.map(Map::Sigmoid, b));
        let y = ex.delta_rule(self.state, self.shape, [q, k, v], g, beta);
        let y = ex.norm(self.norm, y);
        let y = ex.swiglu(z, y);
        ex.linear(self.out, y)
    }
}

impl Model for Hybrid {
    fn outline(&self) -> &Outline {
        &self.outline
    }

    fn layer(&self, ex: &mut dyn Exec, index: usize, x: Value) -> Value {
        let l = &self.layers[index];

        let h = ex.norm(l.input_norm, x);
        let h = match &l.mixer {
            Mixer::Attention(attention) => attention.run(ex, h),
            Mixer::DeltaNet(net) => net.run(ex, h),
        };
        let x = ex.add(x, h);

        let h = ex.norm(l.post_attention_norm, x);
        let h = match &l.feed_forward {
            Mlp::Dense(mlp) => mlp.run(ex, h),
            Mlp::Shared(mixture) => mixture.run(ex, h),
        };
        ex.add(x, h)
    }
}
