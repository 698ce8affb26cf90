//! GPT-2 (Radford et al. 2019): learned positions, layer norms, biases everywhere, GELU without a gate; q, k and v are one
//! matrix. Files hold its matrices as `[in, out]`.

use crate::config::{Config, ConfigError};
use crate::exec::Exec;
use crate::keys::Keys;
use crate::op::{AttentionShape, Linear, Map, Norm, Param, StateId, StateSpec, Value};
use crate::outline::{Builder, Outline};
use crate::{Family, Model};

pub(crate) const FAMILY: Family = Family { model_type: "gpt2", honoured: &[], scaled: None, build };

struct Gpt2 {
    outline: Outline,
    positions: Param,
    layers: Vec<Layer>,
}

struct Layer {
    ln_1: Norm,
    c_attn: Linear,
    attention: (StateId, AttentionShape),
    attn_c_proj: Linear,
    ln_2: Norm,
    c_fc: Linear,
    mlp_c_proj: Linear,
}

fn build(keys: &Keys<'_>) -> Result<Box<dyn Model>, ConfigError> {
    keys.one_of("activation_function", &["gelu_new", "gelu_pytorch_tanh"])?;
    for (key, usual) in [("scale_attn_weights", true), ("scale_attn_by_inverse_layer_idx", false)] {
        if keys.flag(key, usual)? != usual {
            return Err(ConfigError::unsupported(key, format!("nothing or {usual}"), !usual));
        }
    }
    let (hidden, heads) = (keys.size("n_embd")?, keys.count("n_head")?);
    if !hidden.is_multiple_of(heads) {
        return Err(ConfigError::new("n_embd", format!("a multiple of {heads} heads"), hidden));
    }
    let (eps, head_dim) = (keys.share("layer_norm_epsilon", 1e-5)?, hidden / heads);
    let config = Config {
        model_type: FAMILY.model_type.to_owned(),
        hidden_size: hidden,
        layers: keys.count("n_layer")?,
        heads,
        kv_heads: heads,
        head_dim,
        vocab_size: keys.size("vocab_size")?,
        max_positions: keys.optional_size("n_positions")?.unwrap_or(1024),
        tied_head: keys.flag("tie_word_embeddings", true)?,
        attention_dropout: keys.share("attn_pdrop", 0.1)?,
    };
    let (layers, rows) = (config.layers, config.max_positions);
    let width = keys.optional_size("n_inner")?.unwrap_or(4 * hidden);

    let mut b = Builder::with_embedding(config, "transformer.wte");
    let positions = b.embedding("transformer.wpe", rows, hidden);
    let scale = (head_dim as f32).sqrt().recip();
    let shape = AttentionShape { heads, kv_heads: heads, head_dim, scale, softcap: None, window: None, sinks: None };
    let layer = |i| {
        let at = format!("transformer.h.{i}");
        // Masks, which the first files have among their weights.
        ["bias", "masked_bias"].iter().for_each(|name| b.ignore(format!("{at}.attn.{name}")));
        Layer {
            ln_1: b.layer_norm(&format!("{at}.ln_1"), hidden, eps),
            c_attn: b.transposed(&format!("{at}.attn.c_attn"), 3 * hidden, hidden),
            attention: (b.state(StateSpec::Kv { kv_heads: heads, head_dim, window: None }), shape),
            attn_c_proj: b.transposed(&format!("{at}.attn.c_proj"), hidden, hidden),
            ln_2: b.layer_norm(&format!("{at}.ln_2"), hidden, eps),
            c_fc: b.transposed(&format!("{at}.mlp.c_fc"), width, hidden),
            mlp_c_proj: b.transposed(&format!("{at}.mlp.c_proj"), hidden, width),
        }
    };
    let layers = (0..layers).map(layer).collect();
    let norm = b.layer_norm("transformer.ln_f", hidden, eps);
    Ok(Box::new(Gpt2 { outline: b.finish(norm), positions, layers }))
}

impl Model for Gpt2 {
    fn outline(&self) -> &Outline {
        &self.outline
    }

    fn embed(&self, ex: &mut dyn Exec) -> Value {
        let x = ex.embed(self.outline.embedding);
        let p = ex.embed_positions(self.positions);
        ex.add(x, p)
    }

    fn layer(&self, ex: &mut dyn Exec, index: usize, x: Value) -> Value {
        let l = &self.layers[index];
        let hidden = self.outline.config.hidden_size;

        let h = ex.norm(l.ln_1, x);
        let qkv = ex.linear(l.c_attn, h);
        let [q, k, v] = ex.split(qkv, [hidden; 3]);
        let a = ex.attention(l.attention.0, l.attention.1, q, k, v);
        let a = ex.linear(l.attn_c_proj, a);
        let x = ex.add(x, a);

        let h = ex.norm(l.ln_2, x);
        let h = ex.linear(l.c_fc, h);
        let h = ex.map(Map::GeluTanh, h);
        let h = ex.linear(l.mlp_c_proj, h);
        ex.add(x, h)
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    #[test]
    fn what_would_change_numbers_is_refused_by_name() {
        let refused = |key: &str, value: serde_json::Value| {
            let mut config = json!({"model_type": "gpt2", "n_embd": 8, "n_head": 2, "n_layer": 1, "vocab_size": 16});
            config[key] = value;
            crate::build(config.as_object().unwrap()).err().map(|e| e.key)
        };
        assert_eq!(refused("n_inner", json!(null)), None);
        for (key, value) in [
            ("activation_function", json!("relu")),
            ("scale_attn_by_inverse_layer_idx", json!(true)),
            ("scale_attn_weights", json!(false)),
            ("n_embd", json!(9)),
            ("add_cross_attention", json!(true)),
        ] {
            assert_eq!(refused(key, value).as_deref(), Some(key));
        }
    }
}
