//! OFT (Qiu et al. 2023) as PEFT has it: `y = W (M x) + b` with orthogonal `M` in blocks of columns. The file has the upper triangle of
//! a skew matrix `S` for each block. By Cayley, `M = (1 - S)^-1 (1 + S) = 2 (1 - S)^-1 - 1`; with `use_cayley_neumann` its series, `1 +
//! 2 Q + 2 Q² + .. + Q^(t-1)` of `Q = -S`. `block_share` has one block for all; `coft` keeps the norm of each `S` below `eps /
//! sqrt(blocks)`, and what is trained is put back to that after each step. Backward reads the layer's input.

use crate::adapter::cayley::Rotations;
use crate::adapter::method::{AdapterMethod, Settings, begin_with, check_divides, options_of, targets_in};
use crate::adapter::peft::{KeyUse, Keys, Use};
use crate::adapter::pieces::{Of, Piece, Plan};
use crate::adapter::tensor::{Stored, TensorSpec};
use crate::adapter::weight::LayerWeight;
use crate::error::{Error, Result};
use Use::{Default as OnlyDefault, Honoured, NoEffect};
use pocketlora_models::{Model, Param};
use serde_json::{Value, json};

/// The keys of PEFT's OFT configs (0.21).
const KEYS: &[KeyUse] = &[
    ("bias", Honoured, ""),
    ("block_share", Honoured, ""),
    ("coft", Honoured, ""),
    ("eps", Honoured, ""),
    ("exclude_modules", Honoured, ""),
    ("fan_in_fan_out", OnlyDefault, "linear layers of the supported families are not transposed: set it to `false`"),
    ("init_weights", NoEffect, ""), // how it began
    ("layers_pattern", Honoured, ""),
    ("layers_to_transform", Honoured, ""),
    ("module_dropout", NoEffect, ""),
    ("num_cayley_neumann_terms", Honoured, ""),
    ("oft_block_size", Honoured, ""),
    ("r", Honoured, ""),
    ("target_modules", Honoured, ""),
    ("use_cayley_neumann", Honoured, ""),
];

/// Settings of OFT.
#[derive(Clone, Debug, PartialEq)]
pub struct Oft {
    /// Blocks (`r`), 0 where their size is given.
    pub blocks: usize,
    /// Columns of a block (`oft_block_size`), 0 where their number is given.
    pub block_size: usize,
    /// One matrix for all blocks (`block_share`).
    pub shared: bool,
    /// Bound on the norm of all that is stored (`eps` of `coft`).
    pub bound: Option<f64>,
    /// `eps` of the config, which only `coft` reads.
    pub eps: f64,
    /// Terms of the series (`num_cayley_neumann_terms`), where it is used.
    pub series: Option<usize>,
    /// The same as the config has it.
    pub terms: usize,
    /// Suffixes of the adapted modules.
    pub targets: Vec<String>,
}

impl Oft {
    /// Columns of a block of a layer with `input` of them; 0 where they are no whole number of blocks.
    fn size(&self, input: usize) -> usize {
        let size = if self.block_size > 0 { self.block_size } else { input / self.blocks.max(1) };
        if size > 0 && input.is_multiple_of(size) && (self.block_size > 0 || size * self.blocks == input) {
            size
        } else {
            0
        }
    }
}

impl AdapterMethod for Oft {
    const PEFT_TYPE: &'static str = "OFT";
    const NAME: &'static str = "OFT";
    const KEYS: &'static [KeyUse] = KEYS;
    const PARTS: &'static [&'static str] = &["oft_R.weight"];
    const STORED: Stored = Stored::F32;
    const SETTINGS: &'static [&'static str] = &["targets", "options"];

    fn read(keys: &Keys<'_>) -> Result<Self> {
        let blocks = keys.whole("r", 0, 0)?;
        let block_size = keys.whole("oft_block_size", 0, if blocks > 0 { 0 } else { 32 })?;
        if (blocks == 0) == (block_size == 0) || block_size == 1 {
            return Err(
                keys.wrong("oft_block_size", "a size of blocks from 2 beside `r: 0`, or 0 beside a number of them")
            );
        }
        let (eps, terms) = (keys.number("eps", Some(6e-5))?, keys.whole("num_cayley_neumann_terms", 1, 5)?);
        let series = keys.get("use_cayley_neumann").is_none() || keys.flag("use_cayley_neumann")?;
        let (shared, bounded) = (keys.flag("block_share")?, keys.flag("coft")?);
        let (bound, series) = (bounded.then_some(eps), series.then_some(terms));
        Ok(Self { blocks, block_size, shared, bound, eps, series, terms, targets: Vec::new() })
    }

    fn begin(settings: &Settings, model: &dyn Model) -> Result<(Self, Vec<Param>)> {
        let (method, layers): (Self, Vec<Param>) = begin_with(&[], settings, model)?;
        let mut inputs = layers.iter().map(|p| model.params()[p.0 as usize].shape[1]);
        match inputs.find(|input| method.size(*input) < 2) {
            Some(input) => {
                let expected = format!("an `oft_block_size` that divides the {input} inputs of every layer");
                Err(Error::config("options", expected, method.block_size))
            }
            None => Ok((method, layers)),
        }
    }

    fn shapes(&self, _module: &str, [_, input]: [usize; 2]) -> Vec<Vec<usize>> {
        let size = self.size(input);
        let count = if self.shared { 1 } else { input / size.max(1) };
        vec![vec![count, size * size.saturating_sub(1) / 2]]
    }

    fn start(&self, spec: &TensorSpec, _part: usize, _module: usize, _seed: u64) -> Vec<f32> {
        vec![0.0; spec.values()]
    }

    fn plan(&self, module: &str, weight: &dyn LayerWeight, _factor: f32) -> Result<Plan> {
        let [_, input] = weight.shape();
        let size = self.size(input);
        check_divides(module, input, if size > 1 { size } else { 0 }, "oft_block_size")?;
        let stored = if self.shared { 1 } else { input / size };
        let bound = self.bound.map(|eps| eps / (stored as f64).sqrt());
        let r = Of::Made(vec![stored, size, size]);
        let map = Rotations { size, series: self.series, bound };
        Ok(Plan::made(vec![Piece::Rotate { r, count: input / size, size }], map))
    }

    fn settings(&self, settings: Settings) -> Settings {
        let options = options_of(&settings.options, &self.write());
        Settings { targets: self.targets.clone(), options, ..settings }
    }

    targets_in!(targets);

    fn write(&self) -> Value {
        json!({
             "block_share": self.shared, "coft": self.bound.is_some(), "eps": self.eps,

              "num_cayley_neumann_terms": self.terms,
            "oft_block_size": self.block_size, "r": self.blocks,
            "use_cayley_neumann": self.series.is_some(),
        })
    }

    fn describe(&self) -> (String, Value) {
        let keys = json!({"r": self.blocks, "oft_block_size": self.block_size});
        let of = if self.block_size > 0 {
            format!("blocks of {}", self.block_size)
        } else {
            format!("{} blocks", self.blocks)
        };
        (format!("{} with {of}", Self::NAME), keys)
    }
}
