//! Multi-head latent attention (DeepSeek-AI 2024): keys and values come from a narrow vector of each token; a part of each
//! head's query turns, and its counterpart among the keys is one for all heads.

use crate::config::ConfigError;
use crate::exec::Exec;
use crate::keys::Keys;
use crate::op::{AttentionShape, Linear, Norm, Piece, RopeTable, StateId, StateSpec, Value};
use crate::outline::Builder;

/// Added to the mean square in norms of latent vectors, whatever `rms_norm_eps` says.
const EPS: f32 = 1e-6;

/// Widths of a head's parts, and of what they come from.
#[derive(Clone, Copy)]
pub(crate) struct Widths {
    /// Rank of queries; without one they come from the hidden state.
    q_rank: Option<usize>,
    /// Rank of keys and values.
    kv_rank: usize,
    /// The part of queries and keys that does not turn.
    plain: usize,
    /// The part that does.
    pub(crate) turned: usize,
    value: usize,
}

pub(crate) struct LatentAttention {
    widths: Widths,
    q: Query,
    kv_a: Linear,
    kv_a_norm: Norm,
    kv_b: Linear,
    o: Linear,
    rope: RopeTable,
    shape: AttentionShape,
    state: StateId,
}

enum Query {
    Whole(Linear),
    LowRank(Linear, Norm, Linear),
}

impl Widths {
    pub(crate) fn read(keys: &Keys<'_>) -> Result<Self, ConfigError> {
        let widths = Self {
            q_rank: keys.optional_size("q_lora_rank")?,
            kv_rank: keys.size("kv_lora_rank")?,
            plain: keys.count("qk_nope_head_dim")?,
            turned: keys.count("qk_rope_head_dim")?,
            value: keys.count("v_head_dim")?,
        };
        // It would be a factor on scores.
        for object in ["rope_parameters", "rope_scaling"] {
            const KEY: &str = "mscale_all_dim";
            if let Some(factor) = keys.object(object)?.and_then(|rope| rope.get(KEY)) {
                return Err(ConfigError::unsupported(KEY, "nothing beside latent attention", factor));
            }
        }
        if !widths.turned.is_multiple_of(2) {
            return Err(ConfigError::new("qk_rope_head_dim", "an even number", widths.turned));
        }
        if widths.value > widths.head() {
            let expected = format!("at most the {} of a query", widths.head());
            return Err(ConfigError::unsupported("v_head_dim", expected, widths.value));
        }
        Ok(widths)
    }

    /// Width of a query.
    fn head(&self) -> usize {
        self.plain + self.turned
    }
}

impl LatentAttention {
    /// Declares the projections of the module `at`, with biases on those from the hidden state and the output if `bias`.
    pub(crate) fn new(b: &mut Builder, at: &str, widths: Widths, rope: RopeTable, bias: bool) -> Self {
        let Widths { q_rank, kv_rank, plain, turned, value } = widths;
        let (heads, hidden, head_dim) = (b.config.heads, b.config.hidden_size, widths.head());
        let q = match q_rank {
            None => Query::Whole(b.linear(&format!("{at}.q_proj"), heads * head_dim, hidden, false)),
            Some(rank) => Query::LowRank(
                b.linear(&format!("{at}.q_a_proj"), rank, hidden, bias),
                b.rms_norm(&format!("{at}.q_a_layernorm"), rank, EPS),
                b.linear(&format!("{at}.q_b_proj"), heads * head_dim, rank, false),
            ),
        };
        let scale = (head_dim as f32).sqrt().recip();
        Self {
            widths,
            q,
            kv_a: b.linear(&format!("{at}.kv_a_proj_with_mqa"), kv_rank + turned, hidden, bias),
            kv_a_norm: b.rms_norm(&format!("{at}.kv_a_layernorm"), kv_rank, EPS),
            kv_b: b.linear(&format!("{at}.kv_b_proj"), heads * (plain + value), kv_rank, false),
            o: b.linear(&format!("{at}.o_proj"), hidden, heads * value, bias),
            rope,
            shape: AttentionShape { heads, kv_heads: heads, head_dim, scale, softcap: None, window: None, sinks: None },
            state: b.state(StateSpec::Kv { kv_heads: heads, head_dim, window: None }),
        }
    }

    pub(crate) fn run(&self, ex: &mut dyn Exec, h: Value) -> Value {
        let Widths { kv_rank, plain, turned, value, .. } = self.widths;
        let (heads, beyond) = (self.shape.heads, self.widths.head() - value);
        let q = match self.q {
            Query::Whole(q) => ex.linear(q, h),
            Query::LowRank(a, norm, b) => {
                let q = ex.linear(a, h);
                let q = ex.norm(norm, q);
                ex.linear(b, q)
            }
        };
        let [q, q_turned] = ex.split_heads(q, heads, [plain, turned]);
        let q_turned = ex.rope(self.rope, heads, q_turned);
        let q = ex.join(heads, &[Piece::of_heads(q, plain), Piece::of_heads(q_turned, turned)]);

        let kv = ex.linear(self.kv_a, h);
        let [kv, k_turned] = ex.split(kv, [kv_rank, turned]);
        let k_turned = ex.rope(self.rope, 1, k_turned);
        let kv = ex.norm(self.kv_a_norm, kv);
        let kv = ex.linear(self.kv_b, kv);
        let [k, v] = ex.split_heads(kv, heads, [plain, value]);
        let k = ex.join(heads, &[Piece::of_heads(k, plain), Piece::of_all(k_turned, turned)]);
        // Attention has values as wide as keys: zeros fill them, and what comes of those is left out.
        let v = ex.join(heads, &[Piece::of_heads(v, value), Piece::zeros(beyond)]);
        let a = ex.attention(self.state, self.shape, q, k, v);
        let [a, _] = ex.split_heads(a, heads, [value, beyond]);
        ex.linear(self.o, a)
    }
}
