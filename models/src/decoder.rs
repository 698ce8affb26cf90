//! The pre-norm decoder that most families share (Touvron et al. 2023): attention and a gated feed-forward part, each
//! behind a norm and added to the residual stream.

use crate::Model;
use crate::attention::{Attention, AttentionSpec, HeadNorms};
use crate::config::{Config, ConfigError};
use crate::exec::Exec;
use crate::feed_forward::{FeedForward, Mixture, PROJECTIONS};
use crate::keys::Keys;
use crate::op::{Norm, Value};
use crate::outline::{Builder, Outline};
use crate::rope::RopeKeys;

/// What families differ in.
#[derive(Default)]
pub(crate) struct Variant {
    /// q, k, v have biases.
    pub(crate) qkv_bias: bool,
    /// o has a bias.
    pub(crate) o_bias: bool,
    /// gate, up, down have biases.
    pub(crate) mlp_bias: bool,
    /// Each head of q and k has a norm, of one weight for all heads.
    pub(crate) head_norms: bool,
    /// Sliding window of each layer, in tokens; a layer without one sees all.
    pub(crate) windows: Vec<Option<usize>>,
}

struct Decoder {
    outline: Outline,
    layers: Vec<Layer>,
}

struct Layer {
    input_norm: Norm,
    attention: Attention,
    post_attention_norm: Norm,
    mlp: Mlp,
}

enum Mlp {
    Dense(FeedForward),
    Sparse(Mixture),
}

/// The model that `keys` describe beside `config`.
pub(crate) fn build(keys: &Keys<'_>, config: Config, variant: &Variant) -> Result<Box<dyn Model>, ConfigError> {
    build_with(keys, config, variant, &|_, _, _| None)
}

/// The same, with a mixture of experts in the layers for whose module and number `mixture` declares one.
pub(crate) fn build_with(
    keys: &Keys<'_>,
    config: Config,
    variant: &Variant,
    mixture: &dyn Fn(&mut Builder, &str, usize) -> Option<Mixture>,
) -> Result<Box<dyn Model>, ConfigError> {
    let (ffn, eps) = (keys.size("intermediate_size")?, keys.share("rms_norm_eps", 1e-6)?);
    let rope = RopeKeys::of(&config).read(keys)?;
    let (hidden, head_dim) = (config.hidden_size, config.head_dim);
    let mut b = Builder::new(config);
    let plain = AttentionSpec::plain(head_dim, b.rope(rope));
    let norms = HeadNorms { names: ["q_norm", "k_norm"], eps, plus_one: false };
    let layer = |(i, window): (usize, &Option<usize>)| {
        let at = format!("model.layers.{i}");
        let attention = AttentionSpec {
            window: *window,
            qkv_bias: variant.qkv_bias,
            o_bias: variant.o_bias,
            norms: variant.head_norms.then_some(norms),
            ..plain
        };
        Layer {
            input_norm: b.rms_norm(&format!("{at}.input_layernorm"), hidden, eps),
            attention: Attention::new(&mut b, &format!("{at}.self_attn"), attention),
            post_attention_norm: b.rms_norm(&format!("{at}.post_attention_layernorm"), hidden, eps),
            mlp: {
                let at = format!("{at}.mlp");
                let dense = |b: &mut Builder| FeedForward::new(b, &at, PROJECTIONS, ffn, variant.mlp_bias);
                mixture(&mut b, &at, i).map_or_else(|| Mlp::Dense(dense(&mut b)), Mlp::Sparse)
            },
        }
    };
    let layers = variant.windows.iter().enumerate().map(layer).collect();
    let norm = b.rms_norm("model.norm", hidden, eps);
    Ok(Box::new(Decoder { outline: b.finish(norm), layers }))
}

impl Model for Decoder {
    fn outline(&self) -> &Outline {
        &self.outline
    }

    fn layer(&self, ex: &mut dyn Exec, index: usize, x: Value) -> Value {
        let l = &self.layers[index];

        let h = ex.rms_norm(l.input_norm, x);
        let a = l.attention.run(ex, h);
        let x = ex.add(x, a);

        let h = ex.rms_norm(l.post_attention_norm, x);
        let h = match &l.mlp {
            Mlp::Dense(mlp) => mlp.run(ex, h),
            Mlp::Sparse(mlp) => mlp.run(ex, h),
        };
        ex.add(x, h)
    }
}
