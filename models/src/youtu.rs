//! Youtu-LLM (Tencent 2025): Llama with latent attention, whose pairs are neighbours.

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
    model_type: "youtu",
    honoured: &["attention_bias", "mlp_bias", "kv_lora_rank", "q_lora_rank", "rope_interleave"],
    scaled: None,
    build,
};

struct Youtu {
    outline: Outline,
    layers: Vec<Layer>,
}

struct Layer {
    input_norm: Norm,
    attention: LatentAttention,
    post_norm: Norm,
    mlp: FeedForward,
}

fn build(keys: &Keys<'_>) -> Result<Box<dyn Model>, ConfigError> {
    let config = Config::read(keys, &Defaults { positions: 131_072, tied_head: true, ..Defaults::default() })?;
    let (widths, eps, hidden) = (Widths::read(keys)?, keys.share("rms_norm_eps", 1e-6)?, config.hidden_size);
    let (bias, mlp_bias) = (keys.flag("attention_bias", false)?, keys.flag("mlp_bias", false)?);
    let (pairs, width) = (keys.flag("rope_interleave", true)?, keys.size("intermediate_size")?);
    let rope = RopeKeys { head_dim: widths.turned, pairs, ..RopeKeys::of(&config) }.read(keys)?;
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
    Ok(Box::new(Youtu { outline: b.finish(norm), layers }))
}

impl Model for Youtu {
    fn outline(&self) -> &Outline {
        &self.outline
    }

    fn layer(&self, ex: &mut dyn Exec, index: usize, x: Value) -> Value {
        let l = &self.layers[index];

        let h = ex.norm(l.input_norm, x);
        let h = l.attention.run(ex, h);
        let x = ex.add(x, h);

        let h = ex.norm(l.post_norm, x);
        let h = l.mlp.run(ex, h);
        ex.add(x, h)
    }
}

#[cfg(test)]
mod tests {
    use crate::testing::refused_key;
    use serde_json::json;

    #[test]
    fn widths_that_cannot_be_are_refused_by_name() {
        for (change, key) in [
            (json!({"qk_rope_head_dim": 3}), "qk_rope_head_dim"),
            (json!({"v_head_dim": 64}), "v_head_dim"),
            (json!({"kv_lora_rank": null}), "kv_lora_rank"),
            (
                json!({"rope_scaling": {"rope_type": "yarn", "factor": 4, "mscale": 1, "mscale_all_dim": 1}}),
                "mscale_all_dim",
            ),
        ] {
            let mut all = json!({"kv_lora_rank": 8, "qk_nope_head_dim": 4, "qk_rope_head_dim": 2, "v_head_dim": 4});
            all.as_object_mut().unwrap().extend(change.as_object().unwrap().clone());
            assert_eq!(refused_key("youtu", &all).as_deref(), Some(key), "{change}");
        }
    }
}
