//! Gemma 3 (Gemma Team 2025), text: norms before and after both parts of a layer, whose weights are one less than what
//! they multiply by; a GELU gate; most layers see a window and turn by angles of their own.

use crate::attention::{Attention, AttentionSpec, HeadNorms};
use crate::config::{Config, ConfigError, Defaults};
use crate::exec::Exec;
use crate::feed_forward::{FeedForward, PROJECTIONS};
use crate::keys::Keys;
use crate::op::{Activation, Norm, Value};
use crate::outline::{Builder, Outline, Scaled};
use crate::rope::RopeKeys;
use crate::windows::{FULL, SLIDING, layer_types};
use crate::{Family, Model};

pub(crate) const FAMILY: Family = Family {
    model_type: "gemma3_text",
    honoured: &["hidden_activation", "attention_bias", "query_pre_attn_scalar", "sliding_window_pattern"],
    scaled: Scaled::QUERIES,
    build,
};

struct Gemma3 {
    outline: Outline,
    /// Factor on embeddings.
    scale: f32,
    layers: Vec<Layer>,
}

struct Layer {
    input_norm: Norm,
    attention: Attention,
    post_attention_norm: Norm,
    pre_feed_forward_norm: Norm,
    feed_forward: FeedForward,
    post_feed_forward_norm: Norm,
}

fn build(keys: &Keys<'_>) -> Result<Box<dyn Model>, ConfigError> {
    let config =
        Config::read(keys, &Defaults { kv_heads: Some(4), head_dim: Some(256), positions: 131_072, tied_head: true })?;
    keys.one_of("hidden_activation", &["gelu_pytorch_tanh"])?;
    let (ffn, eps) = (keys.size("intermediate_size")?, keys.share("rms_norm_eps", 1e-6)?);
    let bias = keys.flag("attention_bias", false)?;
    let types = kinds(keys, config.layers)?;
    let window = keys.size_or("sliding_window", Some(4096))?;
    if types.contains(&SLIDING) && window.is_none() {
        return Err(ConfigError::new("sliding_window", "a window for the sliding layers", "nothing"));
    }
    let plain = RopeKeys::of(&config);
    let full = RopeKeys { theta: 1e6, layers: Some(FULL), ..plain }.read(keys)?;
    let local = RopeKeys { theta_key: "rope_local_base_freq", scaled: false, layers: Some(SLIDING), ..plain };
    let local = local.read(keys)?;
    let scale = (keys.positive("query_pre_attn_scalar", 256.0)? as f32).sqrt().recip();
    let hidden = config.hidden_size;

    let mut b = Builder::new(config);
    let (full, local) = (b.rope(full), b.rope(local));
    let norms = Some(HeadNorms { names: ["q_norm", "k_norm"], eps, plus_one: true });
    let layers = types.into_iter().enumerate().map(|(i, kind)| {
        let at = format!("model.layers.{i}");
        let (rope, window) = if kind == FULL { (full, None) } else { (local, window) };
        let spec = AttentionSpec { rope, scale, window, qkv_bias: bias, o_bias: bias, o: "o_proj", norms };
        let norm = |b: &mut Builder, name: &str| plus_one(b.rms_norm(&format!("{at}.{name}"), hidden, eps));
        Layer {
            input_norm: norm(&mut b, "input_layernorm"),
            attention: Attention::new(&mut b, &format!("{at}.self_attn"), spec),
            post_attention_norm: norm(&mut b, "post_attention_layernorm"),
            pre_feed_forward_norm: norm(&mut b, "pre_feedforward_layernorm"),
            feed_forward: FeedForward::new(&mut b, &format!("{at}.mlp"), PROJECTIONS, ffn, false)
                .with(Activation::GeluTanh),
            post_feed_forward_norm: norm(&mut b, "post_feedforward_layernorm"),
        }
    });
    let layers = layers.collect();
    let norm = plus_one(b.rms_norm("model.norm", hidden, eps));
    Ok(Box::new(Gemma3 { outline: b.finish(norm), scale: embedding_scale(keys, hidden)?, layers }))
}

/// The kind of each layer: named, or every sixth full, or as often as `sliding_window_pattern` says.
fn kinds(keys: &Keys<'_>, layers: usize) -> Result<Vec<&'static str>, ConfigError> {
    let every = keys.optional_size("sliding_window_pattern")?.unwrap_or(6);
    let named = layer_types(keys, layers, &[FULL, SLIDING])?;
    Ok(named.unwrap_or_else(|| (1..=layers).map(|i| if i % every == 0 { FULL } else { SLIDING }).collect()))
}

/// The root of the width, rounded to the type of the weights: with that factor the models were trained.
fn embedding_scale(keys: &Keys<'_>, hidden: usize) -> Result<f32, ConfigError> {
    let dtype = keys.text("dtype")?.or(keys.text("torch_dtype")?);
    // Bits of an f32's mantissa that do not fit. A root of up to 2^12 is far from the bounds of exponents.
    let lost = match dtype {
        Some("bfloat16") => 16,
        Some("float16") => 13,
        _ => 0,
    };
    let bits = (hidden as f32).sqrt().to_bits();
    if lost == 0 {
        return Ok(f32::from_bits(bits));
    }
    // To the nearest, of two the even one.
    let half = (1 << (lost - 1)) - 1 + ((bits >> lost) & 1);
    Ok(f32::from_bits((bits + half) >> lost << lost))
}

fn plus_one(norm: Norm) -> Norm {
    Norm { plus_one: true, ..norm }
}

impl Model for Gemma3 {
    fn outline(&self) -> &Outline {
        &self.outline
    }

    fn embed(&self, ex: &mut dyn Exec) -> Value {
        let x = ex.embed(self.outline.embedding);
        ex.scale(self.scale, x)
    }

    fn layer(&self, ex: &mut dyn Exec, index: usize, x: Value) -> Value {
        let l = &self.layers[index];

        let h = ex.rms_norm(l.input_norm, x);
        let a = l.attention.run(ex, h);
        let a = ex.rms_norm(l.post_attention_norm, a);
        let x = ex.add(x, a);

        let h = ex.rms_norm(l.pre_feed_forward_norm, x);
        let h = l.feed_forward.run(ex, h);
        let h = ex.rms_norm(l.post_feed_forward_norm, h);
        ex.add(x, h)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{config, refused_key};
    use serde_json::json;

    #[test]
    fn embeddings_are_scaled_by_a_rounded_root() {
        let scale = |change| embedding_scale(&Keys(&config("gemma3_text", &change)), 640).unwrap();
        assert_eq!(scale(json!({})), 640f32.sqrt());
        assert_eq!(scale(json!({"torch_dtype": "bfloat16"})), 25.25);
        assert_eq!(scale(json!({"dtype": "float16"})), 25.296_875);
    }

    #[test]
    fn layers_are_full_where_transformers_has_them_so() {
        let kinds = |change| kinds(&Keys(&config("gemma3_text", &change)), 7).unwrap();
        let full = |kinds: Vec<&str>| (0..7).filter(|&i| kinds[i] == FULL).collect::<Vec<_>>();
        assert_eq!(full(kinds(json!({}))), [5]);
        assert_eq!(full(kinds(json!({"sliding_window_pattern": 2}))), [1, 3, 5]);
    }

    #[test]
    fn what_would_change_numbers_is_refused_by_name() {
        for (change, key) in [
            (json!({"final_logit_softcapping": 30.0}), "final_logit_softcapping"),
            (json!({"hidden_activation": "silu"}), "hidden_activation"),
            (json!({"sliding_window": null}), "sliding_window"),
            (json!({"query_pre_attn_scalar": 0}), "query_pre_attn_scalar"),
            (json!({"use_bidirectional_attention": true}), "use_bidirectional_attention"),
        ] {
            assert_eq!(refused_key("gemma3_text", &change).as_deref(), Some(key), "{change}");
        }
    }
}
