//! Bottleneck adapters: a narrow network with a bend in it, `b(x) = f(x Dᵀ + d) Uᵀ + u`, with `D` `[r, in]`, `d` `[r]`,
//! `U` `[out, r]`, `u` `[out]`.
//!
//! - `houlsby` (Houlsby et al. 2019): behind attention and behind the feed-forward part, before what they give is added
//!   to the
//!   hidden state: `y + s b(y)` of what `o_proj` and `down_proj` give.
//! - `pfeiffer` (Pfeiffer et al. 2021): behind the feed-forward part alone.
//! - `parallel` (He et al. 2022): beside a layer, `x Wᵀ + s b(x)`.
//!
//! PEFT has none of them. The file is a PEFT folder with `peft_type: BOTTLENECK`, keys `adapter_type`, `r`,
//! `non_linearity`, `scaling`, and for each module `bottleneck_down.weight`, `.bias`, `bottleneck_up.weight` and
//! `.bias` for D, d, U and u. Because of the bend it is not merged. Backward computes the bottleneck once more.

use crate::adapter::method::{AUTO, AdapterMethod, Settings, begin_with, options_of, targets_in};
use crate::adapter::peft::{KeyUse, Keys, Use, number};
use crate::adapter::pieces::{Of, Piece, Plan};
use crate::adapter::tensor::{Stored, TensorSpec};
use crate::adapter::weight::LayerWeight;
use crate::error::Result;
use crate::rng::{Rng, mix};
use Use::Honoured;
use pocketlora_kernels::Map;
use pocketlora_models::{Model, Param};
use serde_json::{Value, json};

/// Stream of random numbers for fresh matrices.
const INIT: u64 = 0x626f_7474;
const PARTS: &[&str] =
    &["bottleneck_down.weight", "bottleneck_down.bias", "bottleneck_up.weight", "bottleneck_up.bias"];

/// The keys of its configs.
const KEYS: &[KeyUse] = &[
    ("adapter_type", Honoured, ""),
    ("non_linearity", Honoured, ""),
    ("r", Honoured, ""),
    ("scaling", Honoured, ""),
    ("target_modules", Honoured, ""),
];

/// Functions by their names.
const FUNCTIONS: [(&str, Map); 4] = [
    ("silu", Map::Silu),
    ("gelu_tanh", Map::GeluTanh),
    // 1 tanh(x / 1).
    ("tanh", Map::Softcap(1.0)),
    ("relu2", Map::SquaredRelu),
];

/// Where it works, with the ends of the layers' names.
const TYPES: [(&str, &[&str]); 3] =
    [("houlsby", &["o_proj", "down_proj"]), ("pfeiffer", &["down_proj"]), ("parallel", &["all"])];

/// Settings of a bottleneck.
#[derive(Clone, Debug, PartialEq)]
pub struct Bottleneck {
    /// Width (`r`).
    pub rank: usize,
    /// Number of its type in the list (`adapter_type`).
    place: usize,
    /// Number of its function in the list (`non_linearity`).
    function: usize,
    /// `s` (`scaling`).
    pub scaling: f64,
    /// Suffixes of the adapted modules.
    pub targets: Vec<String>,
}

/// The number of what `key` names, among `names`; the first where it names nothing.
fn chosen<'n>(keys: &Keys<'_>, key: &str, names: impl Iterator<Item = &'n str> + Clone) -> Result<usize> {
    let Some(name) = keys.text(key)? else { return Ok(0) };
    let known = names.clone().collect::<Vec<_>>().join("`, `");
    names.into_iter().position(|own| own == name).ok_or_else(|| keys.wrong(key, &format!("one of `{known}`")))
}

impl AdapterMethod for Bottleneck {
    const PEFT_TYPE: &'static str = "BOTTLENECK";
    const NAME: &'static str = "bottleneck";
    const KEYS: &'static [KeyUse] = KEYS;
    const PARTS: &'static [&'static str] = PARTS;
    const STORED: Stored = Stored::F16;
    const HAS_STRENGTH: bool = true;
    const SETTINGS: &'static [&'static str] = &["rank", "targets", "options"];

    fn read(keys: &Keys<'_>) -> Result<Self> {
        let place = chosen(keys, "adapter_type", TYPES.iter().map(|(name, _)| *name))?;
        let function = chosen(keys, "non_linearity", FUNCTIONS.iter().map(|(name, _)| *name))?;
        let (rank, scaling) = (keys.whole("r", 1, 8)?, keys.number("scaling", Some(1.0))?);
        if scaling == 0.0 || !scaling.is_finite() {
            return Err(keys.wrong("scaling", "a number other than 0, which leaves nothing of it"));
        }
        Ok(Self { rank, place, function, scaling, targets: Vec::new() })
    }

    fn begin(settings: &Settings, model: &dyn Model) -> Result<(Self, Vec<Param>)> {
        let named = settings.options.get("adapter_type").and_then(Value::as_str).unwrap_or(TYPES[0].0);
        let usual = TYPES.iter().find(|(name, _)| *name == named).map_or(&["all"][..], |(_, targets)| targets);
        let targets = match settings.targets == [AUTO] {
            true => usual.iter().map(|target| (*target).to_owned()).collect(),
            false => settings.targets.clone(),
        };
        begin_with(&[("r", settings.rank.into())], &Settings { targets, ..settings.clone() }, model)
    }

    fn shapes(&self, _module: &str, [out, input]: [usize; 2]) -> Vec<Vec<usize>> {
        let read = if self.is_behind() { out } else { input };
        vec![vec![self.rank, read], vec![self.rank], vec![out, self.rank], vec![out]]
    }

    /// D uniform in `±1/sqrt(in)`, the others zero: it begins as nothing.
    fn start(&self, spec: &TensorSpec, part: usize, module: usize, seed: u64) -> Vec<f32> {
        if part > 0 {
            return vec![0.0; spec.values()];
        }
        Rng::new(mix(mix(seed, INIT), module as u64)).uniforms((spec.shape[1] as f32).sqrt().recip(), spec.values())
    }

    fn plan(&self, _module: &str, _weight: &dyn LayerWeight, factor: f32) -> Result<Plan> {
        let [down, down_bias, up, up_bias] = [0, 1, 2, 3].map(|i| Of::Part(PARTS[i]));
        let (function, factor) = (FUNCTIONS[self.function].1, self.scaling as f32 * factor);
        let behind = self.is_behind();
        Ok(Plan::plain(vec![Piece::Bottleneck { down, down_bias, up, up_bias, function, factor, behind }]))
    }

    fn settings(&self, settings: Settings) -> Settings {
        let options = options_of(&settings.options, &self.write());
        Settings { rank: self.rank, targets: self.targets.clone(), options, ..settings }
    }

    targets_in!(targets);

    fn write(&self) -> Value {
        json!({
            "adapter_type": TYPES[self.place].0, "non_linearity": FUNCTIONS[self.function].0, "r": self.rank,
            "scaling": number(self.scaling),
        })
    }

    fn describe(&self) -> (String, Value) {
        let keys = json!({"rank": self.rank, "adapter_type": TYPES[self.place].0});
        let text = format!("{} ({}) of width {}", Self::NAME, TYPES[self.place].0, self.rank);
        (text, keys)
    }
}

impl Bottleneck {
    /// Whether it works on what a layer gives.
    fn is_behind(&self) -> bool {
        TYPES[self.place].0 != "parallel"
    }
}
