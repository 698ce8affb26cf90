//! The attention of Gemma 4: wider heads in full layers, norms of queries, keys and values, and layers that take keys and
//! values of an earlier one.

use crate::config::{Config, ConfigError};
use crate::exec::Exec;
use crate::keys::Keys;
use crate::op::{AttentionShape, Linear, Norm, RopeTable, StateId, StateSpec, Value};
use crate::outline::Builder;
use crate::windows::{FULL, SLIDING, full_every, layer_types};

pub(crate) struct Attention {
    q: Linear,
    q_norm: Norm,
    /// None where they are an earlier layer's.
    kv: Option<KeysValues>,
    o: Linear,
    rope: RopeTable,
    shape: AttentionShape,
    pub(crate) state: StateId,
    /// Where keys and values are carried, if later layers share them.
    slots: Option<[u16; 2]>,
}

struct KeysValues {
    k: Linear,
    /// None: the keys as they are before their norm.
    v: Option<Linear>,
    norms: [Norm; 2],
}

/// What the layers differ in.
pub(crate) struct Kind {
    pub(crate) full: bool,
    pub(crate) head_dim: usize,
    kv_heads: usize,
}

/// The kind of each layer: the first configs give all full layers the same heads, those of transformers 5 list each layer's.
pub(crate) fn kinds(keys: &Keys<'_>, config: &Config) -> Result<Vec<Kind>, ConfigError> {
    let types = layer_types(keys, config.layers, &[FULL, SLIDING])?;
    let types = types.unwrap_or_else(|| full_every(6, config.layers));
    let listed = keys.object("per_layer_config")?;
    let head_dim = keys.count_or("global_head_dim", 512)?;
    let kv_heads = match keys.flag("attention_k_eq_v", false)? {
        true => keys.count_or("num_global_key_value_heads", config.kv_heads)?,
        false => config.kv_heads,
    };
    let kind = |(i, name): (usize, &str)| {
        let (full, own) = (name == FULL, (config.head_dim, config.kv_heads));
        let (head_dim, kv_heads) = match &listed {
            None if full => (head_dim, kv_heads),
            None => own,
            Some(listed) => match listed.object(&i.to_string())? {
                Some(layer) => (layer.count_or("head_dim", own.0)?, layer.count_or("num_key_value_heads", own.1)?),
                None => own,
            },
        };
        if !config.heads.is_multiple_of(kv_heads) || head_dim % 2 != 0 {
            let expected = format!("even heads, and keys' in a number that divides {}", config.heads);
            return Err(ConfigError::new("per_layer_config", expected, format!("{kv_heads} of {head_dim}")));
        }
        Ok(Kind { full, head_dim, kv_heads })
    };
    let kinds: Vec<Kind> = types.into_iter().enumerate().map(kind).collect::<Result<_, _>>()?;
    let first = |full| kinds.iter().find(|kind| kind.full == full);
    let alike = |kind: &Kind| {
        first(kind.full).is_some_and(|first| (first.head_dim, first.kv_heads) == (kind.head_dim, kind.kv_heads))
    };
    if kinds.iter().all(alike) {
        return Ok(kinds);
    }
    Err(ConfigError::unsupported("per_layer_config", "the same heads in all layers of a kind", "others"))
}

impl Attention {
    #[expect(clippy::too_many_arguments, reason = "what a layer is, said once")]
    pub(crate) fn new(
        b: &mut Builder,
        at: &str,
        kind: &Kind,
        (window, rope): (Option<usize>, RopeTable),
        owner: Option<StateId>,
        same_values: bool,
        bias: bool,
        eps: f32,
    ) -> Self {
        let (heads, hidden) = (b.config.heads, b.config.hidden_size);
        let Kind { full, head_dim, kv_heads } = *kind;
        let kv_width = kv_heads * head_dim;
        let head_norm = |b: &mut Builder, name: &str| b.rms_norm(&format!("{at}.{name}"), head_dim, eps);
        Self {
            q: b.linear(&format!("{at}.q_proj"), heads * head_dim, hidden, bias),
            q_norm: head_norm(b, "q_norm"),
            kv: owner.is_none().then(|| KeysValues {
                k: b.linear(&format!("{at}.k_proj"), kv_width, hidden, bias),
                v: (!(same_values && full)).then(|| b.linear(&format!("{at}.v_proj"), kv_width, hidden, bias)),
                norms: {
                    let k = head_norm(b, "k_norm");
                    [k, Norm { weight: None, ..k }]
                },
            }),
            o: b.linear(&format!("{at}.o_proj"), hidden, heads * head_dim, bias),
            rope,
            shape: AttentionShape { heads, kv_heads, head_dim, scale: 1.0, softcap: None, window, sinks: None },
            state: owner.unwrap_or_else(|| b.state(StateSpec::Kv { kv_heads, head_dim, window })),
            slots: None,
        }
    }

    /// The same with keys and values under these numbers, where later layers find them.
    pub(crate) fn carrying(self, slots: Option<[u16; 2]>) -> Self {
        Self { slots, ..self }
    }

    pub(crate) fn run(&self, ex: &mut dyn Exec, h: Value) -> Value {
        let AttentionShape { heads, kv_heads, head_dim, .. } = self.shape;
        let q = ex.linear(self.q, h);
        let q = ex.norm(self.q_norm, q);
        let q = ex.rope(self.rope, heads, q);
        let a = match (&self.kv, self.slots) {
            (Some(kv), slots) => {
                let k = ex.linear(kv.k, h);
                let v = kv.v.map_or(k, |v| ex.linear(v, h));
                let (k, v) = (ex.norm(kv.norms[0], k), ex.norm(kv.norms[1], v));
                let k = ex.rope(self.rope, kv_heads, k);
                let (k, v) = match slots {
                    Some([of_k, of_v]) => (ex.carry(of_k, k), ex.carry(of_v, v)),
                    None => (k, v),
                };
                ex.attention(self.state, self.shape, q, k, v)
            }
            (None, slots) => {
                let [of_k, of_v] = slots.expect("a layer without keys shares those of another");
                let width = kv_heads * head_dim;
                let (k, v) = (ex.carried(of_k, 0..width), ex.carried(of_v, 0..width));
                ex.shared_attention(self.state, self.shape, q, k, v)
            }
        };
        ex.linear(self.o, a)
    }
}
