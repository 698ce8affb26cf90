//! Llama (Touvron et al. 2023): pre-norm decoder with grouped-query attention, RoPE and SwiGLU.

use crate::Model;
use crate::config::Config;
use crate::exec::{AttentionShape, Exec, Linear, Param, RopeTable, Tensor};
use crate::params::{ParamList, ParamSpec, Role};
use crate::rope::Rope;

/// How families of the Llama kind differ from it.
pub(crate) struct Variant {
    /// q, k, v have biases.
    pub qkv_bias: bool,
    /// o has a bias.
    pub o_bias: bool,
    /// gate, up, down have biases.
    pub mlp_bias: bool,
}

/// A model of the Llama kind.
pub(crate) struct Llama {
    config: Config,
    params: Vec<ParamSpec>,
    ropes: [Rope; 1],
    embed_tokens: Param,
    layers: Vec<Layer>,
    norm: Param,
    lm_head: Linear,
}

struct Layer {
    input_norm: Param,
    q: Linear,
    k: Linear,
    v: Linear,
    o: Linear,
    attention: AttentionShape,
    post_attention_norm: Param,
    gate: Linear,
    up: Linear,
    down: Linear,
}

/// Llama proper.
pub(crate) fn build(config: Config) -> Box<dyn Model> {
    let variant = Variant { qkv_bias: config.attention_bias, o_bias: config.attention_bias, mlp_bias: config.mlp_bias };
    Box::new(Llama::new(config, &variant))
}

impl Llama {
    pub(crate) fn new(config: Config, variant: &Variant) -> Self {
        let mut p = ParamList::default();
        let embed_tokens = p.table("model.embed_tokens", config.vocab_size, config.hidden_size, Role::Embedding);
        let layers = (0..config.layers).map(|i| Layer::new(&mut p, &config, variant, i)).collect();
        let norm = p.norm("model.norm", config.hidden_size);
        let head = if config.tied_head {
            embed_tokens
        } else {
            p.table("lm_head", config.vocab_size, config.hidden_size, Role::Head)
        };
        let ropes = [config.rope.clone()];
        let lm_head = Linear { weight: head, bias: None };
        Self { config, params: p.0, ropes, embed_tokens, layers, norm, lm_head }
    }
}

impl Layer {
    fn new(p: &mut ParamList, c: &Config, variant: &Variant, i: usize) -> Self {
        let at = format!("model.layers.{i}");
        let (q_width, kv_width) = (c.heads * c.head_dim, c.kv_heads * c.head_dim);
        let attention = AttentionShape {
            heads: c.heads,
            kv_heads: c.kv_heads,
            head_dim: c.head_dim,
            scale: (c.head_dim as f32).sqrt().recip(),
            window: c.windows[i],
        };
        Self {
            input_norm: p.norm(&format!("{at}.input_layernorm"), c.hidden_size),
            q: p.linear(&format!("{at}.self_attn.q_proj"), q_width, c.hidden_size, variant.qkv_bias),
            k: p.linear(&format!("{at}.self_attn.k_proj"), kv_width, c.hidden_size, variant.qkv_bias),
            v: p.linear(&format!("{at}.self_attn.v_proj"), kv_width, c.hidden_size, variant.qkv_bias),
            o: p.linear(&format!("{at}.self_attn.o_proj"), c.hidden_size, q_width, variant.o_bias),
            attention,
            post_attention_norm: p.norm(&format!("{at}.post_attention_layernorm"), c.hidden_size),
            gate: p.linear(&format!("{at}.mlp.gate_proj"), c.intermediate_size, c.hidden_size, variant.mlp_bias),
            up: p.linear(&format!("{at}.mlp.up_proj"), c.intermediate_size, c.hidden_size, variant.mlp_bias),
            down: p.linear(&format!("{at}.mlp.down_proj"), c.hidden_size, c.intermediate_size, variant.mlp_bias),
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

    fn head_param(&self) -> Param {
        self.lm_head.weight
    }

    fn embed(&self, ex: &mut dyn Exec) -> Tensor {
        ex.embed(self.embed_tokens)
    }

    fn layer(&self, ex: &mut dyn Exec, index: usize, x: Tensor) -> Tensor {
        let (l, eps, rope) = (&self.layers[index], self.config.rms_norm_eps, RopeTable(0));

        let h = ex.rms_norm(l.input_norm, eps, x);
        let [q, k, v] = ex.linear_group([l.q, l.k, l.v], h);
        let (q, k) = (ex.rope(rope, l.attention.heads, q), ex.rope(rope, l.attention.kv_heads, k));
        let a = ex.attention(index, &l.attention, q, k, v);
        let o = ex.linear(l.o, a);
        let x = ex.add(x, o);

        let h = ex.rms_norm(l.post_attention_norm, eps, x);
        let [gate, up] = ex.linear_group([l.gate, l.up], h);
        let h = ex.swiglu(gate, up);
        let down = ex.linear(l.down, h);
        ex.add(x, down)
    }

    fn norm(&self, ex: &mut dyn Exec, x: Tensor) -> Tensor {
        ex.rms_norm(self.norm, self.config.rms_norm_eps, x)
    }

    fn plain_head(&self) -> Option<Linear> {
        Some(self.lm_head)
    }

    fn head(&self, ex: &mut dyn Exec, x: Tensor) -> Tensor {
        let h = self.norm(ex, x);
        ex.linear(self.lm_head, h)
    }
}
