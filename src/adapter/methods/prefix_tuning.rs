//! Prefix tuning (Li & Liang 2021): in every layer, trained keys and values stand before those of the text. PEFT keeps them
//! as `prompt_embeddings` `[n, 2 layers kv_width]`: of each virtual token the first layer's key, its value, the next
//! layer's key, and so on. Keys are not turned; the text's own tokens have positions from `n` on.
//!
//! In a layer with a window, virtual tokens are as far away as their positions say, and are seen no more once the window has
//! passed them, as in PEFT.

use crate::adapter::forms::Prefix;
use crate::adapter::held::Loader;
use crate::adapter::method::{AdapterMethod, Settings};
use crate::adapter::peft::{KeyUse, Keys, Use};
use crate::adapter::prompt::whole;
use crate::adapter::tensor::{Stored, TensorSpec};
use crate::error::{Error, ErrorCode, Result};
use crate::rng::{Rng, mix};
use Use::{Default as OnlyDefault, Honoured};
use pocketlora_kernels::Backend;
use pocketlora_models::{Model, Param, StateSpec};
use serde_json::{Value, json};

/// The keys of PEFT's prefix tuning configs (0.21).
const KEYS: &[KeyUse] = &[
    ("encoder_hidden_size", Honoured, ""),
    ("init_weights", Honoured, ""),
    ("num_attention_heads", Honoured, ""),
    ("num_layers", Honoured, ""),
    ("num_transformer_submodules", Honoured, ""),
    ("num_virtual_tokens", Honoured, ""),
    ("prefix_projection", Honoured, ""),
    ("token_dim", Honoured, ""),
    ("tokenizer_name_or_path", OnlyDefault, "it is of prompt tuning: remove the key"),
];
/// Name of the tensor.
pub(crate) const EMBEDDINGS: &str = "prompt_embeddings";
/// Stream of random numbers for fresh keys and values.
const INIT: u64 = 4;

/// Settings of prefix tuning.
#[derive(Clone, Debug, PartialEq)]
pub struct PrefixTuning {
    /// Virtual tokens (`num_virtual_tokens`).
    pub tokens: usize,
    /// Layers of the model (`num_layers`).
    pub layers: usize,
    /// Heads of keys and values (`num_attention_heads`).
    pub heads: usize,
    /// Width of a token's keys, all heads together (`token_dim`).
    pub width: usize,
    /// Width of the network that made them, if one did (`encoder_hidden_size`); it is not in the file.
    hidden: usize,
    /// One did (`prefix_projection`).
    projected: bool,
    /// They began as zeros.
    zero: bool,
}

/// Layers, key/value heads and width of a key of a model whose layers all keep keys and values alike, or what it has
/// instead.
fn shape_of(model: &dyn Model) -> Result<[usize; 3], String> {
    let layers = model.config().layers;
    let mut shapes = model.states().iter().map(|spec| match *spec {
        StateSpec::Kv { kv_heads, head_dim, .. } => Some((kv_heads, head_dim)),
        _ => None,
    });
    let first = shapes.next().flatten();
    match first {
        Some((heads, dim)) if model.states().len() == layers && shapes.all(|shape| shape == first) => {
            Ok([layers, heads, heads * dim])
        }
        _ => Err(format!("a `{}`, whose layers do not", model.config().model_type)),
    }
}

impl PrefixTuning {
    /// Reads the numbers that configs have for keys and values.
    pub(super) fn of_numbers(keys: &Keys<'_>) -> Result<Self> {
        let (heads, width) = (whole(keys, "num_attention_heads")?, whole(keys, "token_dim")?);
        if !width.is_multiple_of(heads) {
            return Err(keys.wrong("token_dim", &format!("a multiple of `num_attention_heads`, {heads}")));
        }
        if keys.get("num_transformer_submodules").is_some() && whole(keys, "num_transformer_submodules")? != 1 {
            return Err(keys.wrong("num_transformer_submodules", "1, for a model that only decodes"));
        }
        let (tokens, layers) = (whole(keys, "num_virtual_tokens")?, whole(keys, "num_layers")?);
        Ok(Self { tokens, layers, heads, width, hidden: width, projected: false, zero: false })
    }

    /// Refuses a model of other layers than those that it was made for.
    fn check_model(&self, model: &dyn Model) -> Result<()> {
        let shown =
            |[layers, heads, width]: [usize; 3]| format!("{layers} layers with keys of width {width} in {heads} heads");
        let own = [self.layers, self.heads, self.width];
        let got = match shape_of(model) {
            Ok(there) if there == own => return Ok(()),
            Ok(there) => shown(there),
            Err(got) => got,
        };
        let message =
            format!("expected a model of {}, got {got}; use the base that the adapter was trained on", shown(own));
        Err(Error::new(ErrorCode::AdapterMismatch, format!("tensor `{EMBEDDINGS}`"), message))
    }
}

impl AdapterMethod for PrefixTuning {
    const PEFT_TYPE: &'static str = "PREFIX_TUNING";
    const NAME: &'static str = "prefix tuning";
    const KEYS: &'static [KeyUse] = KEYS;
    const PARTS: &'static [&'static str] = &[];
    const SHARED: &'static [&'static str] = &[EMBEDDINGS];
    const STORED: Stored = Stored::F32;
    const ADDS_UP: bool = false;
    const SETTINGS: &'static [&'static str] = &["num-virtual-tokens"];

    fn read(keys: &Keys<'_>) -> Result<Self> {
        let own = Self::of_numbers(keys)?;
        let zero = match keys.text("init_weights")?.as_deref() {
            None => false,
            Some("zero") => true,
            Some(_) => return Err(keys.wrong("init_weights", "`zero` or nothing")),
        };
        let hidden = keys.get("encoder_hidden_size").map_or(Ok(own.width), |_| whole(keys, "encoder_hidden_size"))?;
        Ok(Self { hidden, projected: keys.flag("prefix_projection")?, zero, ..own })
    }

    fn begin(settings: &Settings, model: &dyn Model) -> Result<(Self, Vec<Param>)> {
        let [layers, heads, width] = shape_of(model).map_err(|got| {
            Error::config("method", "another one, or a model whose layers all keep keys and values alike", got)
        })?;
        let tokens = settings.num_virtual_tokens;
        Ok((Self { tokens, layers, heads, width, hidden: width, projected: false, zero: false }, Vec::new()))
    }

    fn shapes(&self, _module: &str, _layer: [usize; 2]) -> Vec<Vec<usize>> {
        Vec::new()
    }

    fn shared(&self, model: &dyn Model) -> Result<Vec<TensorSpec>> {
        self.check_model(model)?;
        let shape = vec![self.tokens, 2 * self.layers * self.width];
        Ok(vec![TensorSpec { name: EMBEDDINGS.to_owned(), shape }])
    }

    /// Normal with a deviation of 1, as PEFT begins.
    fn start(&self, spec: &TensorSpec, _part: usize, _module: usize, seed: u64) -> Vec<f32> {
        let mut rng = Rng::new(mix(seed, INIT));
        (0..spec.values()).map(|_| rng.normal()).collect()
    }

    fn in_attention<B: Backend>(&self, load: &mut Loader<'_, B>) -> Result<Option<Prefix>> {
        Ok(Some(Prefix::new(self.tokens, self.layers, load.buffer(EMBEDDINGS)?)))
    }

    fn is_final(&self) -> Option<&'static str> {
        self.projected.then_some("the network that made its prefix (`prefix_projection`) is not in its file")
    }

    fn settings(&self, settings: Settings) -> Settings {
        Settings { num_virtual_tokens: self.tokens, ..settings }
    }

    fn write(&self) -> Value {
        json!({
            "encoder_hidden_size": self.hidden,
            "init_weights": self.zero.then_some("zero"),
            "num_attention_heads": self.heads,
            "num_layers": self.layers,
            "num_transformer_submodules": 1,
            "num_virtual_tokens": self.tokens,
            "prefix_projection": self.projected,
            "token_dim": self.width,
        })
    }

    fn describe(&self) -> (String, Value) {
        let text = format!("{} with {} virtual tokens", Self::NAME, self.tokens);
        (text, json!({"num_virtual_tokens": self.tokens}))
    }
}
