//! BitNet (Ma et al. 2024) with weights that are ordinary numbers: Llama with a squared ReLU as the gate, and a norm before
//! each product that goes back to the residual stream.

use crate::attention::{Attention, AttentionSpec};
use crate::config::{Config, ConfigError, Defaults};
use crate::exec::Exec;
use crate::feed_forward::{PROJECTIONS, projections};
use crate::keys::Keys;
use crate::op::{Linear, Map, Norm, Value};
use crate::outline::{Builder, Outline};
use crate::rope::RopeKeys;
use crate::windows;
use crate::{Family, Model};

pub(crate) const FAMILY: Family =
    Family { model_type: "bitnet", honoured: &["hidden_act", "attention_bias"], scaled: None, build };

struct BitNet {
    outline: Outline,
    layers: Vec<Layer>,
}

struct Layer {
    input_norm: Norm,
    attention: Attention,
    post_norm: Norm,
    mlp: [Linear; 3],
    ffn_sub_norm: Norm,
}

fn build(keys: &Keys<'_>) -> Result<Box<dyn Model>, ConfigError> {
    let config = Config::read(keys, &Defaults { kv_heads: Some(5), positions: 2048, ..Defaults::default() })?;
    keys.one_of("hidden_act", &["relu2"])?;
    // No layer has a window.
    windows::none(keys, &config)?;
    let (eps, hidden, width) = (keys.share("rms_norm_eps", 1e-5)?, config.hidden_size, keys.size("intermediate_size")?);
    let bias = keys.flag("attention_bias", false)?;
    let rope = RopeKeys { theta: 5e5, ..RopeKeys::of(&config) }.read(keys)?;
    let layers = config.layers;

    let mut b = Builder::new(config);
    let ropes = Some([b.rope(rope); 2]);
    let o_norm = Some(("attn_sub_norm", eps));
    let spec = AttentionSpec { ropes, qkv_bias: bias, o_bias: bias, o_norm, ..AttentionSpec::default() };
    let layer = |i| {
        let at = format!("model.layers.{i}");
        Layer {
            input_norm: b.rms_norm(&format!("{at}.input_layernorm"), hidden, eps),
            attention: Attention::new(&mut b, &format!("{at}.self_attn"), spec),
            post_norm: b.rms_norm(&format!("{at}.post_attention_layernorm"), hidden, eps),
            mlp: projections(&mut b, &format!("{at}.mlp"), PROJECTIONS, width),
            ffn_sub_norm: b.rms_norm(&format!("{at}.mlp.ffn_sub_norm"), width, eps),
        }
    };
    let layers = (0..layers).map(layer).collect();
    let norm = b.rms_norm("model.norm", hidden, eps);
    Ok(Box::new(BitNet { outline: b.finish(norm), layers }))
}

impl Model for BitNet {
    fn outline(&self) -> &Outline {
        &self.outline
    }

    fn layer(&self, ex: &mut dyn Exec, index: usize, x: Value) -> Value {
        let l = &self.layers[index];

        let h = ex.norm(l.input_norm, x);
        let h = l.attention.run(ex, h);
        let x = ex.add(x, h);

        let h = ex.norm(l.post_norm, x);
        let [gate, up, down] = l.mlp;
        let [gate, up] = ex.linear_group([gate, up], h);
        let gate = ex.map(Map::SquaredRelu, gate);
        let h = ex.multiply(gate, up);
        let h = ex.norm(l.ffn_sub_norm, h);
        let h = ex.linear(down, h);
        ex.add(x, h)
    }
}
