//! Apertus (Swiss AI Initiative 2025): Llama with norms of each head of q and k, and xIELU in place of the gate.

use crate::attention::{Attention, AttentionSpec, QkNorms};
use crate::config::{Config, ConfigError, Defaults};
use crate::exec::Exec;
use crate::keys::Keys;
use crate::op::{Linear, Norm, Value, Xielu};
use crate::outline::{Builder, Outline};
use crate::rope::RopeKeys;
use crate::windows;
use crate::{Family, Model};

pub(crate) const FAMILY: Family = Family {
    model_type: "apertus",
    honoured: &["hidden_act", "attention_bias", "mlp_bias", "qk_norm"],
    scaled: None,
    build,
};

struct Apertus {
    outline: Outline,
    layers: Vec<Layer>,
}

struct Layer {
    attention_norm: Norm,
    attention: Attention,
    feedforward_norm: Norm,
    up: Linear,
    act: Xielu,
    down: Linear,
}

fn build(keys: &Keys<'_>) -> Result<Box<dyn Model>, ConfigError> {
    let config = Config::read(keys, &Defaults { positions: 65536, ..Defaults::default() })?;
    keys.one_of("hidden_act", &["xielu"])?;
    if !keys.flag("qk_norm", true)? {
        return Err(ConfigError::unsupported("qk_norm", "nothing or true", false));
    }
    // No layer has a window.
    windows::none(keys, &config)?;
    let (eps, hidden, width) = (keys.share("rms_norm_eps", 1e-5)?, config.hidden_size, keys.size("intermediate_size")?);
    let (bias, mlp_bias) = (keys.flag("attention_bias", false)?, keys.flag("mlp_bias", false)?);
    let rope = RopeKeys { theta: 12e6, ..RopeKeys::of(&config) }.read(keys)?;
    let layers = config.layers;

    let mut b = Builder::new(config);
    let ropes = Some([b.rope(rope); 2]);
    let norms = Some(QkNorms::of_heads(eps));
    let spec = AttentionSpec { ropes, qkv_bias: bias, o_bias: bias, norms, ..AttentionSpec::default() };
    let layer = |i| {
        let at = format!("model.layers.{i}");
        Layer {
            attention_norm: b.rms_norm(&format!("{at}.attention_layernorm"), hidden, eps),
            attention: Attention::new(&mut b, &format!("{at}.self_attn"), spec),
            feedforward_norm: b.rms_norm(&format!("{at}.feedforward_layernorm"), hidden, eps),
            up: b.linear(&format!("{at}.mlp.up_proj"), width, hidden, mlp_bias),
            act: Xielu {
                positive: b.vector(format!("{at}.mlp.act_fn.alpha_p"), 1),
                negative: b.vector(format!("{at}.mlp.act_fn.alpha_n"), 1),
                beta: b.number(format!("{at}.mlp.act_fn.beta")),
                eps: b.number(format!("{at}.mlp.act_fn.eps")),
            },
            down: b.linear(&format!("{at}.mlp.down_proj"), hidden, width, mlp_bias),
        }
    };
    let layers = (0..layers).map(layer).collect();
    let norm = b.rms_norm("model.norm", hidden, eps);
    Ok(Box::new(Apertus { outline: b.finish(norm), layers }))
}

impl Model for Apertus {
    fn outline(&self) -> &Outline {
        &self.outline
    }

    fn layer(&self, ex: &mut dyn Exec, index: usize, x: Value) -> Value {
        let l = &self.layers[index];

        let h = ex.norm(l.attention_norm, x);
        let h = l.attention.run(ex, h);
        let x = ex.add(x, h);

        let h = ex.norm(l.feedforward_norm, x);
        let h = ex.linear(l.up, h);
        let h = ex.xielu(l.act, h);
        let h = ex.linear(l.down, h);
        ex.add(x, h)
    }
}
