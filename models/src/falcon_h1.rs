//! Falcon-H1 (TII 2025): each layer mixes tokens by attention and by a state space, side by side; factors nearly everywhere,
//! as maximal update parametrization (Yang et al. 2022) leaves them.

use crate::attention::{Attention, AttentionSpec};
use crate::config::{Config, ConfigError, Defaults};
use crate::exec::Exec;
use crate::feed_forward::{PROJECTIONS, projections};
use crate::keys::Keys;
use crate::mamba::{GatedNorm, Mamba, MambaSpec};
use crate::op::{Linear, Norm, Value};
use crate::outline::{Builder, Outline};
use crate::rope::RopeKeys;
use crate::{Family, Model};

pub(crate) const FAMILY: Family = Family {
    model_type: "falcon_h1",
    honoured: &["attention_bias", "embedding_multiplier", "lm_head_multiplier"],
    scaled: None,
    build,
};

struct FalconH1 {
    outline: Outline,
    factors: Factors,
    layers: Vec<Layer>,
}

struct Layer {
    input_norm: Norm,
    attention: Attention,
    mamba: Mamba,
    pre_ff_norm: Norm,
    mlp: [Linear; 3],
}

/// `.._multiplier`s on what goes into a part and what comes out of it.
struct Factors {
    embedding: f32,
    head: f32,
    attention: [f32; 2],
    mamba: [f32; 2],
    /// On the gate, and on what comes out.
    mlp: [f32; 2],
}

fn build(keys: &Keys<'_>) -> Result<Box<dyn Model>, ConfigError> {
    let config = Config::read(keys, &Defaults { kv_heads: Some(8), positions: 8192, ..Defaults::default() })?;
    let (eps, hidden) = (keys.share("rms_norm_eps", 1e-5)?, config.hidden_size);
    let factor = |key: &str| keys.positive(key, 1.0).map(|factor| factor as f32);
    let factors = Factors {
        embedding: factor("embedding_multiplier")?,
        head: factor("lm_head_multiplier")?,
        attention: [factor("attention_in_multiplier")?, factor("attention_out_multiplier")?],
        mamba: [factor("ssm_in_multiplier")?, factor("ssm_out_multiplier")?],
        mlp: list(keys, "mlp_multipliers")?,
    };
    let mamba = MambaSpec::hybrid(keys, hidden)?;
    let norm = GatedNorm { eps, before_gate: keys.flag("mamba_norm_before_gate", true)? };
    let norm = keys.flag("mamba_rms_norm", false)?.then_some(norm);
    let mamba = MambaSpec { norm, factors: list(keys, "ssm_multipliers")?, ..mamba };
    let bias = keys.flag("attention_bias", false)?;
    let width = keys.size("intermediate_size")?;
    if keys.flag("projectors_bias", false)? {
        return Err(ConfigError::unsupported("projectors_bias", "nothing or false", true));
    }
    let rope = RopeKeys::of(&config).read(keys)?;
    // A factor on keys is one on scores.
    let scale = Some(factor("key_multiplier")? * (config.head_dim as f32).sqrt().recip());

    let mut b = Builder::new(config);
    let ropes = Some([b.rope(rope); 2]);
    let attention = AttentionSpec { ropes, scale, qkv_bias: bias, o_bias: bias, ..AttentionSpec::default() };
    let layer = |i| {
        let at = format!("model.layers.{i}");
        Layer {
            input_norm: b.rms_norm(&format!("{at}.input_layernorm"), hidden, eps),
            attention: Attention::new(&mut b, &format!("{at}.self_attn"), attention),
            mamba: Mamba::new(&mut b, &format!("{at}.mamba"), mamba),
            pre_ff_norm: b.rms_norm(&format!("{at}.pre_ff_layernorm"), hidden, eps),
            mlp: projections(&mut b, &format!("{at}.feed_forward"), PROJECTIONS, width),
        }
    };
    let layers = (0..keys.count("num_hidden_layers")?).map(layer).collect();
    let norm = b.rms_norm("model.final_layernorm", hidden, eps);
    Ok(Box::new(FalconH1 { outline: b.finish(norm), factors, layers }))
}

/// As many positive factors as are asked for; all 1 where there is no such key.
fn list<const N: usize>(keys: &Keys<'_>, key: &str) -> Result<[f32; N], ConfigError> {
    let Some(value) = keys.get(key) else { return Ok([1.0; N]) };
    let factor = |value: &serde_json::Value| value.as_f64().filter(|f| (1e-6..1e12).contains(f)).map(|f| f as f32);
    let list = value.as_array().and_then(|list| list.iter().map(factor).collect::<Option<Vec<f32>>>());
    let list = list.and_then(|list| list.try_into().ok());
    list.ok_or_else(|| ConfigError::new(key, format!("{N} numbers from 1e-6 to 1e12"), value))
}

impl Model for FalconH1 {
    fn outline(&self) -> &Outline {
        &self.outline
    }

    fn embed(&self, ex: &mut dyn Exec) -> Value {
        let x = ex.embed(self.outline.embedding);
        ex.scale(self.factors.embedding, x)
    }

    fn layer(&self, ex: &mut dyn Exec, index: usize, x: Value) -> Value {
        let (l, f) = (&self.layers[index], &self.factors);

        let h = ex.norm(l.input_norm, x);
        let m = ex.scale(f.mamba[0], h);
        let m = l.mamba.run(ex, m);
        let m = ex.scale(f.mamba[1], m);
        let a = ex.scale(f.attention[0], h);
        let a = l.attention.run(ex, a);
        let a = ex.scale(f.attention[1], a);
        let h = ex.add(m, a);
        let x = ex.add(x, h);

        let h = ex.norm(l.pre_ff_norm, x);
        let [gate, up, down] = l.mlp;
        let [gate, up] = ex.linear_group([gate, up], h);
        let gate = ex.scale(f.mlp[0], gate);
        let h = ex.swiglu(gate, up);
        let h = ex.linear(down, h);
        let h = ex.scale(f.mlp[1], h);
        ex.add(x, h)
    }

    /// The head is linear: what would be multiplied after it may be before.
    fn norm(&self, ex: &mut dyn Exec, x: Value) -> Value {
        let h = ex.norm(self.outline.norm, x);
        ex.scale(self.factors.head, h)
    }
}

#[cfg(test)]
mod tests {
    use crate::testing::refused_key;
    use serde_json::json;

    #[test]
    fn what_would_change_numbers_is_refused_by_name() {
        for (change, key) in [
            (json!({"mlp_multipliers": [1.0]}), "mlp_multipliers"),
            (json!({"ssm_multipliers": [1.0, 1.0, 1.0, 1.0, 0.0]}), "ssm_multipliers"),
            (json!({"projectors_bias": true}), "projectors_bias"),
            (json!({"mamba_d_ssm": 100}), "mamba_d_head"),
            (json!({"lm_head_multiplier": 0}), "lm_head_multiplier"),
        ] {
            let mut all = json!({"mamba_n_heads": 8, "num_key_value_heads": 8});
            all.as_object_mut().unwrap().extend(change.as_object().unwrap().clone());
            assert_eq!(refused_key("falcon_h1", &all).as_deref(), Some(key), "{change}");
        }
    }
}
