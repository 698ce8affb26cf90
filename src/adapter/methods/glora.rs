//! GLoRA (Chavan et al. 2023): `y = x (W + W * A + B)ᵀ`, the first product element by element. `A` and `B` each are `Xd Xu` of rank
//! `r`, or one value `X` for each output. What else the method can do changes a layer's bias (`C`, `D`, `E`): on layers without one
//! PEFT saves zeros for that, and on others it is refused. The product with W is made in tiles (`hadamard.rs`), which costs a second
//! product with the layer. Backward makes the tiles once more.

use crate::adapter::method::{AdapterMethod, Settings, begin_with, options_of, targets_in};
use crate::adapter::peft::{KeyUse, Keys, MERGE, Use};
use crate::adapter::pieces::{Of, Piece, Plan};
use crate::adapter::tensor::{Stored, TensorSpec};
use crate::adapter::weight::LayerWeight;
use crate::error::{Error, Result};
use crate::rng::{Rng, mix};
use Use::{Honoured, NoEffect};
use pocketlora_models::{Model, Param};
use serde_json::{Value, json};

/// Stream of random numbers for fresh matrices.
const INIT: u64 = 0x676c_6f72;
const ZEROS: [&str; 3] = ["glora_C.zeros", "glora_D.zeros", "glora_E.zeros"];
const LOW_RANK: &[&str] =
    &["glora_A.Xd", "glora_A.Xu", "glora_B.Xd", "glora_B.Xu", "glora_C.zeros", "glora_D.zeros", "glora_E.zeros"];
const VECTORS: &[&str] = &["glora_A.X", "glora_B.X", "glora_C.zeros", "glora_D.zeros", "glora_E.zeros"];
const PARTS: &[&str] = &[
    "glora_A.Xd",
    "glora_A.Xu",
    "glora_B.Xd",
    "glora_B.Xu",
    "glora_A.X",
    "glora_B.X",
    "glora_C.zeros",
    "glora_D.zeros",
    "glora_E.zeros",
];

/// The keys of PEFT's GLoRA configs (0.21).
const KEYS: &[KeyUse] = &[
    ("bias", Honoured, ""),
    ("config_A_B", Honoured, ""),
    ("config_C", Honoured, ""),
    ("config_D_E", Honoured, ""),
    ("init_weights", NoEffect, ""), // how it began
    ("r", Honoured, ""),
    ("target_modules", Honoured, ""),
];

/// Settings of GLoRA.
#[derive(Clone, Debug, PartialEq)]
pub struct Glora {
    /// Rank (`r`).
    pub rank: usize,
    /// A and B are products, and not vectors (`config_A_B`).
    pub low_rank: bool,
    /// What a bias would get (`config_C`, `config_D_E`).
    pub of_bias: [String; 2],
    /// Suffixes of the adapted modules.
    pub targets: Vec<String>,
}

fn ones([rows, cols]: [usize; 2]) -> Vec<f32> {
    vec![1.0; rows * cols]
}

impl AdapterMethod for Glora {
    const PEFT_TYPE: &'static str = "GLORA";
    const NAME: &'static str = "GLoRA";
    const KEYS: &'static [KeyUse] = KEYS;
    const PARTS: &'static [&'static str] = PARTS;
    const FIRSTS: &'static [usize] = &[0, 4];
    const FROZEN: &'static [&'static str] = &ZEROS;
    const STORED: Stored = Stored::F32;
    const HAS_STRENGTH: bool = true;
    // Merged one after the other, the second would multiply what the first has changed.
    const ADDS_UP: bool = false;
    const SETTINGS: &'static [&'static str] = &["rank", "targets", "options"];

    fn read(keys: &Keys<'_>) -> Result<Self> {
        let text = |key: &str, usual: &str| Ok::<_, Error>(keys.text(key)?.unwrap_or_else(|| usual.to_owned()));
        let low_rank = match text("config_A_B", "lora")?.as_str() {
            "lora" => true,
            "vector" => false,
            "constant" | "none" => {
                let what = "GLoRA with one number for a whole weight (`config_A_B`)";
                return Err(Error::unsupported(keys.path, what, MERGE));
            }
            _ => return Err(keys.wrong("config_A_B", "`lora` or `vector`")),
        };
        let of_bias = [text("config_C", "lora")?, text("config_D_E", "constant")?];
        Ok(Self { rank: keys.whole("r", 1, 8)?, low_rank, of_bias, targets: Vec::new() })
    }

    fn begin(settings: &Settings, model: &dyn Model) -> Result<(Self, Vec<Param>)> {
        let (method, layers): (Self, Vec<Param>) = begin_with(&[("r", settings.rank.into())], settings, model)?;
        for layer in &layers {
            let bias = format!("{}.bias", model.params()[layer.0 as usize].module());
            if model.params().iter().any(|spec| spec.name == bias) {
                return Err(Error::config("targets", "layers without a bias for GLoRA, or another method", bias));
            }
        }
        Ok((method, layers))
    }

    fn parts(&self, _module: &str) -> &'static [&'static str] {
        if self.low_rank { LOW_RANK } else { VECTORS }
    }

    fn shapes(&self, _module: &str, [out, input]: [usize; 2]) -> Vec<Vec<usize>> {
        let pair =
            || if self.low_rank { vec![vec![out, self.rank], vec![self.rank, input]] } else { vec![vec![out, 1]] };
        let zeros = [vec![input, 1], vec![out], vec![out]];
        pair().into_iter().chain(pair()).chain(zeros).collect()
    }

    /// `Xu` uniform in `±1/sqrt(in)`, the others zero.
    fn start(&self, spec: &TensorSpec, part: usize, module: usize, seed: u64) -> Vec<f32> {
        if !spec.name.ends_with(".Xu") {
            return vec![0.0; spec.values()];
        }
        let bound = (spec.shape[1] as f32).sqrt().recip();
        Rng::new(mix(mix(mix(seed, INIT), module as u64), part as u64)).uniforms(bound, spec.values())
    }

    fn plan(&self, _module: &str, weight: &dyn LayerWeight, factor: f32) -> Result<Plan> {
        let [_, input] = weight.shape();
        let pair = |both: [&'static str; 2], one: &'static str| match self.low_rank {
            true => (Of::Part(both[1]), Of::Part(both[0])),
            false => (Of::Pattern("ones", [1, input], ones), Of::Part(one)),
        };
        let (a, b) = pair([PARTS[0], PARTS[1]], PARTS[4]);
        let times = Piece::Hadamard { a, b, factor };
        let (a, b) = pair([PARTS[2], PARTS[3]], PARTS[5]);
        Ok(Plan::plain(vec![times, Piece::LowRank { a, b, factor }]))
    }

    fn settings(&self, settings: Settings) -> Settings {
        let options = options_of(&settings.options, &self.write());
        Settings { rank: self.rank, targets: self.targets.clone(), options, ..settings }
    }

    targets_in!(targets);

    fn write(&self) -> Value {
        let [of_c, of_d_e] = &self.of_bias;
        let of_both = if self.low_rank { "lora" } else { "vector" };
        json!({"config_A_B": of_both, "config_C": of_c, "config_D_E": of_d_e, "r": self.rank})
    }

    fn describe(&self) -> (String, Value) {
        let text = if self.low_rank { format!(" of rank {}", self.rank) } else { " with vectors".to_owned() };
        (format!("{}{text}", Self::NAME), json!({"rank": self.rank}))
    }
}
