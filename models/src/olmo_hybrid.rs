//! OLMo Hybrid (OLMo Team 2026): most layers are a gated delta net with projections and convolutions of its own for queries,
//! keys and values, and norms before both parts; the others are OLMo 3's attention, with norms after them.

use crate::attention::{Attention, AttentionSpec, QkNorms};
use crate::config::{Config, ConfigError, Defaults};
use crate::exec::Exec;
use crate::feed_forward::{FeedForward, Inner};
use crate::gated_delta_net::delta_rule;
use crate::keys::Keys;
use crate::op::{Activation, Conv, DeltaRuleShape, Linear, Map, Norm, Param, StateId, StateSpec, Value};
use crate::outline::{Builder, Outline};
use crate::rope::RopeKeys;
use crate::windows::{FULL, layer_types};
use crate::{Family, Model};

pub(crate) const FAMILY: Family =
    Family { model_type: "olmo_hybrid", honoured: &["attention_bias"], scaled: None, build };

/// A layer of the delta rule, as `layer_types` spells it.
const LINEAR: &str = "linear_attention";

struct OlmoHybrid {
    outline: Outline,
    layers: Vec<Layer>,
}

struct Layer {
    mixer: Mixer,
    /// Around the two parts: before them in a delta net's layer, after them in the others.
    norms: [Norm; 2],
    mlp: FeedForward,
}

/// What mixes a layer's tokens.
enum Mixer {
    Attention(Attention),
    DeltaNet(DeltaNet),
}

struct DeltaNet {
    qkv: [Linear; 3],
    convs: [(Conv, StateId); 3],
    a: Linear,
    b: Linear,
    gate: Linear,
    rate: Param,
    bias: Param,
    /// Factor on how strongly is written.
    strength: f32,
    shape: DeltaRuleShape,
    state: StateId,
    norm: Norm,
    o: Linear,
}

fn build(keys: &Keys<'_>) -> Result<Box<dyn Model>, ConfigError> {
    let config = Config::read(keys, &Defaults { positions: 65536, ..Defaults::default() })?;
    let (eps, hidden) = (keys.share("rms_norm_eps", 1e-6)?, config.hidden_size);
    let (bias, width) = (keys.flag("attention_bias", false)?, keys.size("intermediate_size")?);
    let types = layer_types(keys, config.layers, &[FULL, LINEAR])?;
    let every_fourth = |i: usize| if i.is_multiple_of(4) { FULL } else { LINEAR };
    let types = types.unwrap_or_else(|| (1..=config.layers).map(every_fourth).collect());
    let (shape, taps) = (delta_rule(keys, [config.heads; 2])?, keys.count_or("linear_conv_kernel_dim", 4)?);
    let strength = if keys.flag("linear_allow_neg_eigval", true)? { 2.0 } else { 1.0 };
    // Published models have no positions, and say so by an absent object or base.
    let nested = keys.object("rope_parameters")?;
    let turns = nested.is_some_and(|rope| rope.get("rope_theta").is_some()) || keys.get("rope_theta").is_some();
    let rope = if turns { Some(RopeKeys::of(&config).read(keys)?) } else { None };

    let mut b = Builder::new(config);
    let ropes = rope.map(|rope| [b.rope(rope); 2]);
    let norms = Some(QkNorms { whole: true, ..QkNorms::of_heads(eps) });
    let spec = AttentionSpec { ropes, qkv_bias: bias, o_bias: bias, norms, ..AttentionSpec::default() };
    let layers = types.into_iter().enumerate().map(|(i, kind)| {
        let at = format!("model.layers.{i}");
        let (mixer, names) = match kind {
            FULL => {
                let attention = Attention::new(&mut b, &format!("{at}.self_attn"), spec);
                // The first is what transformers makes of `post_attention_layernorm` when it saves.
                (Mixer::Attention(attention), ["feedforward_layer_norm", "post_feedforward_layernorm"])
            }
            _ => {
                let net = DeltaNet::new(&mut b, &format!("{at}.linear_attn"), shape, taps, strength);
                (Mixer::DeltaNet(net), ["attention_layer_norm", "feedforward_layer_norm"])
            }
        };
        let norms = names.map(|name| b.rms_norm(&format!("{at}.{name}"), hidden, eps));
        let mlp = FeedForward::new(&mut b, &format!("{at}.mlp"), Inner::Gated(Activation::Silu), width, false);
        Layer { mixer, norms, mlp }
    });
    let layers = layers.collect();
    let norm = b.rms_norm("model.norm", hidden, eps);
    Ok(Box::new(OlmoHybrid { outline: b.finish(norm), layers }))
}

impl DeltaNet {
    fn new(b: &mut Builder, at: &str, shape: DeltaRuleShape, taps: usize, strength: f32) -> Self {
        let DeltaRuleShape { key_heads, value_heads, key_dim, value_dim } = shape;
        let (hidden, keys, values) = (b.config.hidden_size, key_heads * key_dim, value_heads * value_dim);
        let widths = [("q", keys), ("k", keys), ("v", values)];
        Self {
            qkv: widths.map(|(name, width)| b.linear(&format!("{at}.{name}_proj"), width, hidden, false)),
            convs: widths.map(|(name, width)| b.conv(&format!("{at}.{name}_conv1d"), width, taps, false)),
            a: b.linear(&format!("{at}.a_proj"), value_heads, hidden, false),
            b: b.linear(&format!("{at}.b_proj"), value_heads, hidden, false),
            gate: b.linear(&format!("{at}.g_proj"), values, hidden, false),
            rate: b.vector(format!("{at}.A_log"), value_heads),
            bias: b.vector(format!("{at}.dt_bias"), value_heads),
            strength,
            shape,
            state: b.state(StateSpec::Matrix { heads: value_heads, key: key_dim, value: value_dim }),
            norm: b.rms_norm(&format!("{at}.o_norm"), value_dim, 1e-5),
            o: b.linear(&format!("{at}.o_proj"), hidden, values, false),
        }
    }

    fn run(&self, ex: &mut dyn Exec, h: Value) -> Value {
        let [q, k, v] = self.qkv;
        let [q, k, v, a, b, gate] = ex.linear_group([q, k, v, self.a, self.b, self.gate], h);
        let mut mixed = |(conv, state): (Conv, StateId), x| {
            let x = ex.conv(state, conv, x);
            ex.map(Map::Silu, x)
        };
        let (q, k, v) = (mixed(self.convs[0], q), mixed(self.convs[1], k), mixed(self.convs[2], v));
        // Queries and keys of length 1; queries are divided by the root of their width, too.
        let width = self.shape.key_dim;
        let (q, k) = (ex.l2_norm(width, 1e-6, q), ex.l2_norm(width, 1e-6, k));
        let q = ex.scale((width as f32).sqrt().recip(), q);
        let g = ex.decay(self.rate, self.bias, a);
        let beta = ex.map(Map::Sigmoid, b);
        let beta = ex.scale(self.strength, beta);
        let y = ex.delta_rule(self.state, self.shape, [q, k, v], g, beta);
        let y = ex.norm(self.norm, y);
        let y = ex.swiglu(gate, y);
        ex.linear(self.o, y)
    }
}

impl Model for OlmoHybrid {
    fn outline(&self) -> &Outline {
        &self.outline
    }

    fn layer(&self, ex: &mut dyn Exec, index: usize, x: Value) -> Value {
        let Layer { mixer, norms, mlp } = &self.layers[index];
        match mixer {
            Mixer::Attention(attention) => {
                let h = attention.run(ex, x);
                let h = ex.norm(norms[0], h);
                let x = ex.add(x, h);
                let h = mlp.run(ex, x);
                let h = ex.norm(norms[1], h);
                ex.add(x, h)
            }
            Mixer::DeltaNet(net) => {
                let h = ex.norm(norms[0], x);
                let h = net.run(ex, h);
                let x = ex.add(x, h);
                let h = ex.norm(norms[1], x);
                let h = mlp.run(ex, h);
                ex.add(x, h)
            }
        }
    }
}
