//! Gemma 4 (Gemma Team 2026), text: a second embedding has a part for each layer, which comes in at the layer's end; full
//! layers have wider heads than sliding ones; the last layers take keys and values of the last earlier layer of their kind.
//! There may be experts beside the feed-forward part of each layer.

use crate::config::{Config, ConfigError, Defaults};
use crate::exec::Exec;
use crate::feed_forward::{FeedForward, Inner};
use crate::gemma::embedding_scale;
use crate::gemma4_attention::{Attention, kinds};
use crate::gemma4_experts::{Experts, MixtureKeys};
use crate::keys::Keys;
use crate::op::{Activation, Linear, Map, Norm, Param, StateId, Value};
use crate::outline::{Builder, Outline};
use crate::rope::RopeKeys;
use crate::windows::{FULL, SLIDING, windows_of};
use crate::{Family, Model};

pub(crate) const FAMILY: Family = Family {
    model_type: "gemma4_text",
    honoured: &[
        "hidden_activation",
        "attention_bias",
        "final_logit_softcapping",
        "num_experts",
        "num_kv_shared_layers",
        "use_bidirectional_attention",
    ],
    scaled: None,
    build,
};

/// Numbers of what is carried from layer to layer: the layers' own inputs, then keys and values of sliding layers and of full
/// ones.
const INPUTS: u16 = 0;
const KEYS_VALUES: [[u16; 2]; 2] = [[1, 2], [3, 4]];

struct Gemma4 {
    outline: Outline,
    scale: f32,
    inputs: Option<Inputs>,
    softcap: Option<f32>,
    layers: Vec<Layer>,
}

/// What makes the layers' own inputs.
struct Inputs {
    table: Param,
    scale: f32,
    projection: Linear,
    norm: Norm,
}

struct Layer {
    norms: [Norm; 4],
    attention: Attention,
    mlp: FeedForward,
    experts: Option<Experts>,
    input: Option<LayerInput>,
    scalar: Param,
}

/// What a layer does with its own input.
struct LayerInput {
    gate: Linear,
    projection: Linear,
    norm: Norm,
}

fn build(keys: &Keys<'_>) -> Result<Box<dyn Model>, ConfigError> {
    let defaults = Defaults {
        heads: Some(8),
        kv_heads: Some(4),
        head_dim: Some(256),
        positions: 131_072,
        tied_head: true,
        vocab: Some(262_144),
    };
    let config = Config::read(keys, &defaults)?;
    keys.one_of("hidden_activation", &["gelu_pytorch_tanh"])?;
    // Tokens of pictures would see each other; in a text there are none.
    keys.one_of("use_bidirectional_attention", &["vision"])?;
    let (eps, hidden, layers) = (keys.share("rms_norm_eps", 1e-6)?, config.hidden_size, config.layers);
    let bias = keys.flag("attention_bias", false)?;
    let kinds = kinds(keys, &config)?;
    let types: Vec<_> = kinds.iter().map(|kind| if kind.full { FULL } else { SLIDING }).collect();
    let windows = windows_of(keys, &types, Some(512))?;
    let own = layers - keys.index("num_kv_shared_layers")?.unwrap_or(0).min(layers);
    if (own..layers).any(|i| !types[..own].contains(&types[i])) {
        let expected = "an earlier layer of the same kind for each that shares";
        return Err(ConfigError::new("num_kv_shared_layers", expected, layers - own));
    }
    let (wide, same_values) = (keys.flag("use_double_wide_mlp", false)?, keys.flag("attention_k_eq_v", false)?);
    let ffn = keys.size("intermediate_size")?;
    let experts = if keys.flag("enable_moe_block", false)? { Some(MixtureKeys::read(keys, layers)?) } else { None };
    let ropes = [FULL, SLIDING].map(|name| {
        let kind = kinds.iter().find(|kind| kind.full == (name == FULL));
        let head_dim = kind.map_or(config.head_dim, |kind| kind.head_dim);
        let theta = if name == FULL { 1e6 } else { 1e4 };
        RopeKeys { head_dim, theta, layers: Some(name), ..RopeKeys::of(&config) }.read(keys)
    });
    if keys.object("rope_parameters")?.is_none() {
        return Err(ConfigError::new("rope_parameters", "an object for each kind of layers", "nothing"));
    }
    let [full, sliding] = ropes;
    let (full, sliding) = (full?, sliding?);
    let input_width = keys.index("hidden_size_per_layer_input")?.unwrap_or(256);
    let scales = [embedding_scale(keys, hidden)?, embedding_scale(keys, input_width)?];
    let rows = keys.optional_size("vocab_size_per_layer_input")?.unwrap_or(262_144);
    if input_width > 0 && rows < config.vocab_size {
        let expected = format!("at least `vocab_size` {}", config.vocab_size);
        return Err(ConfigError::unsupported("vocab_size_per_layer_input", expected, rows));
    }
    let softcap = keys.positive_or("final_logit_softcapping", None)?.map(|cap| cap as f32);

    let mut b = Builder::new(config);
    let inputs = (input_width > 0).then(|| Inputs {
        table: b.embedding("model.embed_tokens_per_layer", rows, layers * input_width),
        scale: scales[1],
        projection: b.linear("model.per_layer_model_projection", layers * input_width, hidden, false),
        norm: b.rms_norm("model.per_layer_projection_norm", input_width, eps),
    });
    let mut states: [Option<StateId>; 2] = [None; 2];
    let mut built = Vec::with_capacity(layers);
    for (i, (kind, window)) in kinds.iter().zip(windows).enumerate() {
        let at = format!("model.layers.{i}");
        let shares = i >= own;
        let width = if wide && shares { 2 * ffn } else { ffn };
        let norm = |b: &mut Builder, name: &str| b.rms_norm(&format!("{at}.{name}"), hidden, eps);
        let rope = b.rope(if kind.full { full.clone() } else { sliding.clone() });
        let state = &mut states[usize::from(kind.full)];
        if shares {
            // Published files have these all the same.
            for name in ["k_proj.weight", "v_proj.weight", "k_norm.weight"] {
                b.ignore(format!("{at}.self_attn.{name}"));
            }
        }
        let owner = state.filter(|_| shares);
        let attention =
            Attention::new(&mut b, &format!("{at}.self_attn"), kind, (window, rope), owner, same_values, bias, eps);
        let last_of_kind = !shares && !kinds[i + 1..own.max(i + 1)].iter().any(|next| next.full == kind.full);
        let carries = own < layers && (shares || last_of_kind);
        let slots = carries.then_some(KEYS_VALUES[usize::from(kind.full)]);
        *state = Some(attention.state);
        built.push(Layer {
            norms: [
                "input_layernorm",
                "post_attention_layernorm",
                "pre_feedforward_layernorm",
                "post_feedforward_layernorm",
            ]
            .map(|name| norm(&mut b, name)),
            attention: attention.carrying(slots),
            mlp: FeedForward::new(&mut b, &format!("{at}.mlp"), Inner::Gated(Activation::GeluTanh), width, false),
            experts: experts.map(|keys| Experts::new(&mut b, &at, keys, eps)),
            input: inputs.as_ref().map(|_| LayerInput {
                gate: b.linear(&format!("{at}.per_layer_input_gate"), input_width, hidden, false),
                projection: b.linear(&format!("{at}.per_layer_projection"), hidden, input_width, false),
                norm: norm(&mut b, "post_per_layer_input_norm"),
            }),
            scalar: b.vector(format!("{at}.layer_scalar"), 1),
        });
    }
    let norm = b.rms_norm("model.norm", hidden, eps);
    Ok(Box::new(Gemma4 { outline: b.finish(norm), scale: scales[0], inputs, softcap, layers: built }))
}

impl Model for Gemma4 {
    fn outline(&self) -> &Outline {
        &self.outline
    }

    fn embed(&self, ex: &mut dyn Exec) -> Value {
        let x = ex.embed(self.outline.embedding);
        let x = ex.scale(self.scale, x);
        if let Some(inputs) = &self.inputs {
            let own = ex.embed(inputs.table);
            let own = ex.scale(inputs.scale, own);
            let p = ex.linear(inputs.projection, x);
            let p = ex.scale((self.outline.config.hidden_size as f32).sqrt().recip(), p);
            let p = ex.norm(inputs.norm, p);
            let p = ex.add(p, own);
            let p = ex.scale(std::f32::consts::FRAC_1_SQRT_2, p);
            ex.carry(INPUTS, p);
        }
        x
    }

    fn layer(&self, ex: &mut dyn Exec, index: usize, x: Value) -> Value {
        let l = &self.layers[index];
        let input = l.input.as_ref().zip(self.inputs.as_ref()).map(|(layer, inputs)| {
            let width = inputs.norm.width;
            (layer, ex.carried(INPUTS, index * width..(index + 1) * width))
        });

        let h = ex.norm(l.norms[0], x);
        let a = l.attention.run(ex, h);
        let a = ex.norm(l.norms[1], a);
        let x = ex.add(x, a);

        let h = ex.norm(l.norms[2], x);
        let h = l.mlp.run(ex, h);
        let h = l.experts.as_ref().map_or(h, |experts| experts.beside(ex, x, h));
        let h = ex.norm(l.norms[3], h);
        let mut x = ex.add(x, h);

        if let Some((layer, own)) = input {
            let gate = ex.linear(layer.gate, x);
            let h = ex.geglu(gate, own);
            let h = ex.linear(layer.projection, h);
            let h = ex.norm(layer.norm, h);
            x = ex.add(x, h);
        }
        ex.scale_by(l.scalar, x)
    }

    fn plain_head(&self) -> Option<Linear> {
        self.softcap.is_none().then_some(self.outline.head)
    }

    fn head(&self, ex: &mut dyn Exec, x: Value) -> Value {
        let h = self.norm(ex, x);
        let y = ex.linear(self.outline.head, h);
        self.softcap.map_or(y, |cap| ex.map(Map::Softcap(cap), y))
    }
}

#[cfg(test)]
mod tests {
    use crate::testing::{config, refused_key};
    use serde_json::json;

    #[test]
    fn what_cannot_be_is_refused_by_name() {
        let ropes = json!({"full_attention": {"rope_type": "proportional", "partial_rotary_factor": 0.25},
            "sliding_attention": {"rope_type": "default"}});
        let with = |change: serde_json::Value| {
            let mut all =
                json!({"rope_parameters": ropes, "num_key_value_heads": 4, "vocab_size_per_layer_input": 100});
            all.as_object_mut().unwrap().extend(change.as_object().unwrap().clone());
            all
        };
        for (change, key) in [
            (json!({"enable_moe_block": true, "top_k_experts": 2, "moe_intermediate_size": 8}), "num_experts"),
            (json!({"enable_moe_block": true, "num_experts": 2, "top_k_experts": 3}), "num_experts_per_tok"),
            (json!({"num_kv_shared_layers": 3}), "num_kv_shared_layers"),
            (json!({"vocab_size_per_layer_input": 99}), "vocab_size_per_layer_input"),
            (json!({"per_layer_config": {"0": {"head_dim": 32}}}), "per_layer_config"),
            (json!({"rope_parameters": null}), "rope_parameters"),
            (json!({"use_bidirectional_attention": "all"}), "use_bidirectional_attention"),
        ] {
            assert_eq!(refused_key("gemma4_text", &with(change.clone())).as_deref(), Some(key), "{change}");
        }
        let model = crate::build(&config("gemma4_text", &with(json!({"num_kv_shared_layers": 1})))).unwrap();
        assert_eq!(model.states().len(), 2, "the last of three layers has no state of its own");
    }
}
