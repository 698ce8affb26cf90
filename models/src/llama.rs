//! Llama (Touvron et al. 2023): pre-norm decoder with grouped-query attention, RoPE and SwiGLU.

use crate::config::{Config, ConfigError, Defaults};
use crate::exec::Exec;
use crate::keys::Keys;
use crate::op::{AttentionShape, Linear, Norm, Param, RopeTable, StateId, StateSpec, Value};
use crate::params::{ParamList, ParamSpec, Role};
use crate::rope::{Rope, RopeKeys};
use crate::windows::WindowKeys;
use crate::{Family, Model};

pub(crate) const FAMILY: Family = Family { model_type: "llama", honoured: &["attention_bias", "mlp_bias"], build };

/// How families of the Llama kind differ from it.
#[derive(Default)]
pub(crate) struct Variant {
    /// q, k, v have biases.
    pub(crate) qkv_bias: bool,
    /// o has a bias.
    pub(crate) o_bias: bool,
    /// gate, up, down have biases.
    pub(crate) mlp_bias: bool,
    /// Sliding window of each layer, in tokens; a layer without one sees all.
    pub(crate) windows: Vec<Option<usize>>,
}

/// A model of the Llama kind.
pub(crate) struct Llama {
    config: Config,
    params: Vec<ParamSpec>,
    ropes: [Rope; 1],
    states: Vec<StateSpec>,
    embed_tokens: Param,
    layers: Vec<Layer>,
    norm: Norm,
    lm_head: Linear,
}

struct Layer {
    input_norm: Norm,
    q: Linear,
    k: Linear,
    v: Linear,
    o: Linear,
    attention: AttentionShape,
    post_attention_norm: Norm,
    gate: Linear,
    up: Linear,
    down: Linear,
}

fn build(keys: &Keys<'_>) -> Result<Box<dyn Model>, ConfigError> {
    let config = Config::read(keys, &Defaults { positions: 2048, ..Defaults::default() })?;
    let attention_bias = keys.flag("attention_bias", false)?;
    let variant = Variant {
        qkv_bias: attention_bias,
        o_bias: attention_bias,
        mlp_bias: keys.flag("mlp_bias", false)?,
        windows: no_windows(keys, &config)?,
    };
    Ok(Box::new(Llama::new(keys, config, &variant)?))
}

/// No layer has a window; a key for one, which transformers would not heed, was meant for another family.
fn no_windows(keys: &Keys<'_>, config: &Config) -> Result<Vec<Option<usize>>, ConfigError> {
    let given = WindowKeys::read(keys, None, true)?;
    // A window as long as the context hides nothing.
    if let Some(window) = given.window.filter(|&window| given.on && window < config.max_positions) {
        return Err(ConfigError::unsupported("sliding_window", "none, for Llama has no window (Mistral has)", window));
    }
    given.same(keys, config.layers, None)
}

impl Llama {
    pub(crate) fn new(keys: &Keys<'_>, config: Config, variant: &Variant) -> Result<Self, ConfigError> {
        let mut p = ParamList::default();
        let embed_tokens = p.table("model.embed_tokens", config.vocab_size, config.hidden_size, Role::Embedding);
        let (ffn, eps) = (keys.size("intermediate_size")?, keys.share("rms_norm_eps", 1e-6)?);
        let layers = (0..config.layers).map(|i| Layer::new(&mut p, &config, ffn, eps, variant, i)).collect();
        let norm = p.rms_norm("model.norm", config.hidden_size, eps);
        let lm_head = p.head(&config, embed_tokens);
        let ropes = [RopeKeys::of(&config).read(keys)?];
        let (kv_heads, head_dim) = (config.kv_heads, config.head_dim);
        let states = variant.windows.iter().map(|&window| StateSpec::Kv { kv_heads, head_dim, window }).collect();
        Ok(Self { config, params: p.0, ropes, states, embed_tokens, layers, norm, lm_head })
    }
}

impl Layer {
    fn new(p: &mut ParamList, c: &Config, ffn: usize, eps: f32, variant: &Variant, i: usize) -> Self {
        let at = format!("model.layers.{i}");
        let (q_width, kv_width) = (c.heads * c.head_dim, c.kv_heads * c.head_dim);
        let attention = AttentionShape {
            heads: c.heads,
            kv_heads: c.kv_heads,
            head_dim: c.head_dim,
            scale: (c.head_dim as f32).sqrt().recip(),
            window: variant.windows[i],
        };
        Self {
            input_norm: p.rms_norm(&format!("{at}.input_layernorm"), c.hidden_size, eps),
            q: p.linear(&format!("{at}.self_attn.q_proj"), q_width, c.hidden_size, variant.qkv_bias),
            k: p.linear(&format!("{at}.self_attn.k_proj"), kv_width, c.hidden_size, variant.qkv_bias),
            v: p.linear(&format!("{at}.self_attn.v_proj"), kv_width, c.hidden_size, variant.qkv_bias),
            o: p.linear(&format!("{at}.self_attn.o_proj"), c.hidden_size, q_width, variant.o_bias),
            attention,
            post_attention_norm: p.rms_norm(&format!("{at}.post_attention_layernorm"), c.hidden_size, eps),
            gate: p.linear(&format!("{at}.mlp.gate_proj"), ffn, c.hidden_size, variant.mlp_bias),
            up: p.linear(&format!("{at}.mlp.up_proj"), ffn, c.hidden_size, variant.mlp_bias),
            down: p.linear(&format!("{at}.mlp.down_proj"), c.hidden_size, ffn, variant.mlp_bias),
        }
    }
}

impl Model for Llama {
    fn config(&self) -> &Config {
        &self.config
    }

    fn params(&self) -> &[ParamSpec] {
        &self.params
    }

    fn ropes(&self) -> &[Rope] {
        &self.ropes
    }

    fn states(&self) -> &[StateSpec] {
        &self.states
    }

    fn head_param(&self) -> Param {
        self.lm_head.weight
    }

    fn embed(&self, ex: &mut dyn Exec) -> Value {
        ex.embed(self.embed_tokens)
    }

    fn layer(&self, ex: &mut dyn Exec, index: usize, x: Value) -> Value {
        let (l, state, rope) = (&self.layers[index], StateId(index as u16), RopeTable(0));

        let h = ex.rms_norm(l.input_norm, x);
        let [q, k, v] = ex.linear_group([l.q, l.k, l.v], h);
        let (q, k) = (ex.rope(rope, l.attention.heads, q), ex.rope(rope, l.attention.kv_heads, k));
        let a = ex.attention(state, l.attention, q, k, v);
        let o = ex.linear(l.o, a);
        let x = ex.add(x, o);

        let h = ex.rms_norm(l.post_attention_norm, x);
        let [gate, up] = ex.linear_group([l.gate, l.up], h);
        let h = ex.swiglu(gate, up);
        let down = ex.linear(l.down, h);
        ex.add(x, down)
    }

    fn norm(&self, ex: &mut dyn Exec, x: Value) -> Value {
        ex.rms_norm(self.norm, x)
    }

    fn plain_head(&self) -> Option<Linear> {
        Some(self.lm_head)
    }

    fn head(&self, ex: &mut dyn Exec, x: Value) -> Value {
        let h = self.norm(ex, x);
        ex.linear(self.lm_head, h)
    }
}

#[cfg(test)]
mod tests {
    use crate::testing::{config, refused_key};
    use serde_json::json;

    #[test]
    fn no_layer_has_a_window() {
        let full = "full_attention";
        for change in [
            json!({}),
            json!({"sliding_window": null}),
            json!({"sliding_window": 512}),
            json!({"layer_types": [full, full, full]}),
        ] {
            assert_eq!(refused_key("llama", &change), None, "{change}");
        }
        for (change, key) in [
            (json!({"sliding_window": 16}), "sliding_window"),
            (json!({"layer_types": [full, full, "sliding_attention"]}), "layer_types"),
            (json!({"layer_types": [full, full]}), "layer_types"),
            (json!({"rotary_dim": 32}), "rotary_dim"),
            (json!({"qkv_bias": true}), "qkv_bias"),
        ] {
            assert_eq!(refused_key("llama", &change).as_deref(), Some(key), "{change}");
        }
        assert_eq!(refused_key("llama", &json!({"rotary_dim": 2})), None);
    }

    #[test]
    fn a_file_without_key_value_heads_has_as_many_as_heads() {
        assert_eq!(crate::build(&config("llama", &json!({}))).unwrap().config().kv_heads, 32);
    }
}
