//! GraLoRA (Jung et al. 2025): W in `k` by `k` blocks, each with a low-rank term of its own of rank `r / k`, times `alpha / (r +
//! hybrid_r)`. The file has `A` `[k, in / k, r]`, `B` `[k, r, out / k]`: the block of inputs `i` and outputs `o` uses the columns
//! `o r / k ..` of `A_i` and the rows `i r / k ..` of `B_o`. It runs as one low-rank term of rank `k r`, with zeros outside the
//! blocks, which the base's product takes along. With `hybrid_r` there is an ordinary LoRA of that rank beside it.

use crate::adapter::made::Map;
use crate::adapter::method::{AdapterMethod, Settings, begin_with, check_divides, options_of, targets_in};
use crate::adapter::peft::{KeyUse, Keys, Use};
use crate::adapter::pieces::{Of, Piece, Plan};
use crate::adapter::tensor::{Stored, TensorSpec};
use crate::adapter::weight::LayerWeight;
use crate::error::{Error, Result};
use crate::rng::{Rng, mix};
use Use::{Default as OnlyDefault, Honoured, NoEffect};
use pocketlora_models::{Model, Param};
use serde_json::{Value, json};

/// Stream of random numbers for fresh matrices.
const INIT: u64 = 0x6772_616c;
const PARTS: &[&str] = &["gralora_A", "gralora_B", "gralora_A_general.weight", "gralora_B_general.weight"];

/// The keys of PEFT's GraLoRA configs (0.21).
const KEYS: &[KeyUse] = &[
    ("alpha", Honoured, ""),
    ("bias", Honoured, ""),
    ("exclude_modules", Honoured, ""),
    ("fan_in_fan_out", OnlyDefault, "linear layers of the supported families are not transposed: set it to `false`"),
    ("gralora_dropout", NoEffect, ""),
    ("gralora_k", Honoured, ""),
    ("hybrid_r", Honoured, ""),
    ("init_weights", NoEffect, ""), // how it began
    ("layers_pattern", Honoured, ""),
    ("layers_to_transform", Honoured, ""),
    ("r", Honoured, ""),
    ("target_modules", Honoured, ""),
];

/// Settings of GraLoRA.
#[derive(Clone, Debug, PartialEq)]
pub struct Gralora {
    /// Rank (`r`), a multiple of `k`.
    pub rank: usize,
    /// Rank of the LoRA beside it (`hybrid_r`), 0 for none.
    pub hybrid: usize,
    /// `alpha`.
    pub alpha: f64,
    /// Blocks along each side (`gralora_k`).
    pub k: usize,
    /// Suffixes of the adapted modules.
    pub targets: Vec<String>,
}

/// One low-rank term of the blocks'.
struct Blocks {
    k: usize,
    rank: usize,
    out: usize,
    input: usize,
}

impl Blocks {
    /// Calls `each` for every value of A with its place in the term's A, then for B.
    fn places(&self, mut each: impl FnMut(usize, usize, usize)) {
        let Self { k, rank, out, input } = *self;
        let (sub, wide, high) = (rank / k, input / k, out / k);
        // Row number `(i k + o) sub + s` of the term.
        let row = |i: usize, o: usize, s: usize| (i * k + o) * sub + s;
        for at in 0..k * wide * rank {
            let (i, c, os) = (at / (wide * rank), at / rank % wide, at % rank);
            each(0, at, row(i, os / sub, os % sub) * input + i * wide + c);
        }
        for at in 0..k * rank * high {
            let (o, is, d) = (at / (rank * high), at / high % rank, at % high);
            each(1, at, (o * high + d) * k * rank + row(is / sub, o, is % sub));
        }
    }
}

impl Map for Blocks {
    fn forward(&self, own: &[&[f32]], _weight: &dyn LayerWeight) -> Result<Vec<Vec<f32>>> {
        let rank = self.k * self.rank;
        let mut made = vec![vec![0.0; rank * self.input], vec![0.0; self.out * rank]];
        self.places(|part, from, to| made[part][to] = own[part][from]);
        Ok(made)
    }

    fn backward(&self, own: &[&[f32]], grads: &[&[f32]]) -> Vec<Vec<f32>> {
        let mut all: Vec<Vec<f32>> = own[..2].iter().map(|values| vec![0.0; values.len()]).collect();
        self.places(|part, from, to| all[part][from] = grads[part][to]);
        // The LoRA beside it works on the layer itself.
        all.resize(own.len(), Vec::new());
        all
    }
}

impl AdapterMethod for Gralora {
    const PEFT_TYPE: &'static str = "GRALORA";
    const NAME: &'static str = "GraLoRA";
    const KEYS: &'static [KeyUse] = KEYS;
    const PARTS: &'static [&'static str] = PARTS;
    const STORED: Stored = Stored::F16;
    const HAS_STRENGTH: bool = true;
    const SETTINGS: &'static [&'static str] = &["rank", "alpha", "targets", "options"];

    fn read(keys: &Keys<'_>) -> Result<Self> {
        let (rank, k) = (keys.whole("r", 1, 32)?, keys.whole("gralora_k", 1, 2)?);
        if !rank.is_multiple_of(k) {
            return Err(keys.wrong("r", &format!("a multiple of `gralora_k`, {k}")));
        }
        let (hybrid, alpha) = (keys.whole("hybrid_r", 0, 0)?, keys.number("alpha", Some(64.0))?);
        Ok(Self { rank, hybrid, alpha, k, targets: Vec::new() })
    }

    fn begin(settings: &Settings, model: &dyn Model) -> Result<(Self, Vec<Param>)> {
        let config = [("r", settings.rank.into()), ("alpha", crate::adapter::peft::number(settings.alpha))];
        let (method, layers): (Self, Vec<Param>) = begin_with(&config, settings, model)?;
        let mut sides = layers.iter().flat_map(|p| &model.params()[p.0 as usize].shape);
        match sides.find(|side| *side % method.k > 0) {
            Some(side) => {
                let expected = format!("a `gralora_k` that divides the {side} inputs or outputs of every layer");
                Err(Error::config("options", expected, format!("gralora_k={}", method.k)))
            }
            None => Ok((method, layers)),
        }
    }

    fn parts(&self, _module: &str) -> &'static [&'static str] {
        if self.hybrid > 0 { PARTS } else { &PARTS[..2] }
    }

    fn shapes(&self, _module: &str, [out, input]: [usize; 2]) -> Vec<Vec<usize>> {
        let Self { rank, hybrid, k, .. } = *self;
        // Of sides that are no whole number of blocks there is nothing that fits.
        let [high, wide] = [out, input].map(|side| if side.is_multiple_of(k) { side / k } else { 0 });
        let mut shapes = vec![vec![k, wide, rank], vec![k, rank, high]];
        if hybrid > 0 {
            shapes.extend([vec![hybrid, input], vec![out, hybrid]]);
        }
        shapes
    }

    /// A uniform in `±1/sqrt(inputs of a block)`, B zero.
    fn start(&self, spec: &TensorSpec, part: usize, module: usize, seed: u64) -> Vec<f32> {
        if part % 2 == 1 {
            return vec![0.0; spec.values()];
        }
        let mut rng = Rng::new(mix(mix(mix(seed, INIT), module as u64), part as u64));
        let bound = (spec.shape[1] as f32).sqrt().recip();
        rng.uniforms(bound, spec.values())
    }

    fn plan(&self, module: &str, weight: &dyn LayerWeight, factor: f32) -> Result<Plan> {
        let ([out, input], Self { rank, hybrid, k, .. }) = (weight.shape(), self);
        [out, input].into_iter().try_for_each(|side| check_divides(module, side, *k, "gralora_k"))?;
        let factor = factor * (self.alpha / (rank + hybrid) as f64) as f32;
        let (a, b) = (Of::Made(vec![k * rank, input]), Of::Made(vec![out, k * rank]));
        let mut pieces = vec![Piece::LowRank { a, b, factor }];
        if *hybrid > 0 {
            pieces.push(Piece::LowRank { a: Of::Part(PARTS[2]), b: Of::Part(PARTS[3]), factor });
        }
        Ok(Plan::made(pieces, Blocks { k: *k, rank: *rank, out, input }))
    }

    fn settings(&self, settings: Settings) -> Settings {
        let options = options_of(&settings.options, &self.write());
        Settings { rank: self.rank, alpha: self.alpha, targets: self.targets.clone(), options, ..settings }
    }

    targets_in!(targets);

    fn write(&self) -> Value {
        json!({
            "alpha": crate::adapter::peft::number(self.alpha),
            "gralora_dropout": 0.0, "gralora_k": self.k, "hybrid_r": self.hybrid,
              "r": self.rank,

        })
    }

    fn describe(&self) -> (String, Value) {
        let keys = json!({"rank": self.rank, "alpha": self.alpha, "gralora_k": self.k, "hybrid_r": self.hybrid});
        let text =
            format!("{} of rank {}, alpha {}, {} by {} blocks", Self::NAME, self.rank, self.alpha, self.k, self.k);
        (text, keys)
    }
}
