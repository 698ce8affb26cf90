//! BD-LoRA (block-diagonal LoRA): a LoRA of which one factor has `nblocks` blocks on its diagonal and zeros elsewhere: `A` on
//! layers that `target_modules_bd_a` names, `B` on those of `target_modules_bd_b`. The file has the blocks one above the other,
//! `A` `[r, in / nblocks]` or `B` `[out, r / nblocks]`. It runs as the low-rank term with the zeros.

use super::lora::{self, Lora, all_for_auto};
use crate::adapter::made::Map;
use crate::adapter::method::{AdapterMethod, Settings, check_divides, last_parts, target_layers, targets_in};
use crate::adapter::peft::{Found, KeyUse, Keys};
use crate::adapter::pieces::{Of, Piece, Plan};
use crate::adapter::tensor::{Stored, TensorSpec};
use crate::adapter::weight::LayerWeight;
use crate::error::{Error, Result};
use pocketlora_models::{Model, Param};
use serde_json::{Value, json};
use std::path::Path;

const PARTS: &[&str] = &["lora_A.weight", "lora_B.weight"];

/// A LoRA with blocks.
#[derive(Clone, Debug, PartialEq)]
pub struct Bdlora {
    /// Rank, alpha and so on.
    pub lora: Lora,
    /// Blocks (`nblocks`).
    pub blocks: usize,
    /// Ends of the paths of layers with blocks in A, and of those with blocks in B.
    pub of: [Vec<String>; 2],
}

impl Bdlora {
    /// Which factor of the module has blocks: 0 for A, 1 for B.
    fn blocked(&self, module: &str) -> Option<usize> {
        let named = |ends: &Vec<String>| ends.iter().any(|end| module == end || module.ends_with(&format!(".{end}")));
        self.of.iter().position(named)
    }
}

/// A factor with its zeros, of `[rows, cols]` blocks one above the other.
struct Diagonal {
    part: usize,
    blocks: usize,
    rows: usize,
    cols: usize,
}

impl Diagonal {
    /// Where value number `at` of the blocks stands.
    fn place(&self, at: usize) -> usize {
        let (row, col) = (at / self.cols, at % self.cols);
        (row * self.blocks + row / (self.rows / self.blocks).max(1)) * self.cols + col
    }
}

impl Map for Diagonal {
    fn forward(&self, own: &[&[f32]], _weight: &dyn LayerWeight) -> Result<Vec<Vec<f32>>> {
        let mut made = vec![0.0; self.rows * self.cols * self.blocks];
        own[self.part].iter().enumerate().for_each(|(at, value)| made[self.place(at)] = *value);
        Ok(vec![made])
    }

    fn backward(&self, own: &[&[f32]], grads: &[&[f32]]) -> Vec<Vec<f32>> {
        let mut all = vec![Vec::new(); own.len()];
        all[self.part] = (0..own[self.part].len()).map(|at| grads[0][self.place(at)]).collect();
        all
    }
}

impl AdapterMethod for Bdlora {
    const PEFT_TYPE: &'static str = "LORA";
    const NAME: &'static str = "BD-LoRA";
    const KEYS: &'static [KeyUse] = lora::KEYS;
    const PARTS: &'static [&'static str] = PARTS;
    const DIMENSIONS: &'static [usize] = &[2, 2];
    const STORED: Stored = Stored::F16;
    const HAS_STRENGTH: bool = true;
    const ASKED_BY: Option<&'static str> = Some("use_bdlora");
    const SETTINGS: &'static [&'static str] = &["rank", "alpha", "rslora", "targets", "options"];
    const IN_TRAINING: &'static [&'static str] = &["dropout"];

    fn read(keys: &Keys<'_>) -> Result<Self> {
        let lora = Lora::read(keys)?;
        let wrong =
            || keys.wrong("use_bdlora", "an object of `nblocks` and names in `target_modules_bd_a` and `.._bd_b`");
        let of = keys.get("use_bdlora").and_then(Value::as_object).ok_or_else(wrong)?;
        let blocks = of.get("nblocks").and_then(Value::as_u64).and_then(|n| usize::try_from(n).ok());
        let blocks = blocks.filter(|n| *n > 0 && lora.rank.is_multiple_of(*n)).ok_or_else(wrong)?;
        let names = |key: &str| -> Result<Vec<String>> {
            match of.get(key) {
                None | Some(Value::Null) => Ok(Vec::new()),
                Some(Value::Array(list)) => {
                    list.iter().map(|name| name.as_str().map(str::to_owned)).collect::<Option<_>>().ok_or_else(wrong)
                }
                Some(_) => Err(wrong()),
            }
        };
        if lora.bias || !lora.rank_pattern.is_empty() || !lora.alpha_pattern.is_empty() {
            return Err(keys.wrong("use_bdlora", "none beside `lora_bias`, `rank_pattern` or `alpha_pattern`"));
        }
        Ok(Self { blocks, of: [names("target_modules_bd_a")?, names("target_modules_bd_b")?], lora })
    }

    fn check(&mut self, path: &Path, found: &[Found]) -> Result<Vec<String>> {
        let Some(other) = found.iter().find(|module| self.blocked(&module.path).is_none()) else {
            return Ok(Vec::new());
        };
        let (item, expected) = (format!("module `{}`", other.path), "its name in `use_bdlora` of the config");
        Err(Error::format(path, item, expected, "none"))
    }

    fn begin(settings: &Settings, model: &dyn Model) -> Result<(Self, Vec<Param>)> {
        let settings = all_for_auto(settings);
        let config = json!({"r": settings.rank, "lora_alpha": settings.alpha, "use_rslora": settings.rslora,
            "lora_dropout": settings.dropout, "use_bdlora": settings.options.get("use_bdlora")});
        let config = config.as_object().cloned().unwrap_or_default();
        let mut method = Self::read(&Keys::of_settings(&config, Self::KEYS))?;
        let layers = target_layers(model.params(), &settings.targets)?;
        for spec in layers.iter().map(|p| &model.params()[p.0 as usize]) {
            let side = method.blocked(spec.module()).map(|part| spec.shape[1 - part]);
            if side.is_none_or(|side| !side.is_multiple_of(method.blocks)) {
                let expected = format!("`use_bdlora` to name `{}`, and `nblocks` to divide its side", spec.module());
                return Err(Error::config("options", expected, method.blocks));
            }
        }
        method.lora.targets = last_parts(model, &layers);
        Ok((method, layers))
    }

    fn shapes(&self, module: &str, [out, input]: [usize; 2]) -> Vec<Vec<usize>> {
        let (rank, blocks) = (self.lora.rank, self.blocks);
        let cut = |side: usize| if side.is_multiple_of(blocks) { side / blocks } else { 0 };
        match self.blocked(module) {
            Some(0) => vec![vec![rank, cut(input)], vec![out, rank]],
            _ => vec![vec![rank, input], vec![if cut(out) > 0 { out } else { 0 }, rank / blocks]],
        }
    }

    fn start(&self, spec: &TensorSpec, part: usize, module: usize, seed: u64) -> Vec<f32> {
        self.lora.start(spec, part, module, seed)
    }

    fn plan(&self, module: &str, weight: &dyn LayerWeight, factor: f32) -> Result<Plan> {
        let ([out, input], (rank, own), blocks) = (weight.shape(), self.lora.of_module(module), self.blocks);
        let factor = own * factor;
        let side = if self.blocked(module) == Some(0) { input } else { out };
        check_divides(module, side, blocks, "nblocks")?;
        let (a, b, map) = match self.blocked(module) {
            Some(0) => {
                let map = Diagonal { part: 0, blocks, rows: rank, cols: input / blocks };
                (Of::Made(vec![rank, input]), Of::Part(PARTS[1]), map)
            }
            _ => {
                let map = Diagonal { part: 1, blocks, rows: out, cols: rank / blocks };
                (Of::Part(PARTS[0]), Of::Made(vec![out, rank]), map)
            }
        };
        Ok(Plan::made(vec![Piece::LowRank { a, b, factor }], map))
    }

    fn settings(&self, settings: Settings) -> Settings {
        let options = crate::adapter::method::options_of(&settings.options, &self.write());
        Settings { options, ..self.lora.settings(settings) }
    }

    fn set_in_training(&mut self, settings: &Settings) {
        self.lora.set_in_training(settings);
    }

    targets_in!(lora.targets);

    fn write(&self) -> Value {
        let mut config = self.lora.write();
        let [a, b] = &self.of;
        let own =
            json!({"match_strict": true, "nblocks": self.blocks, "target_modules_bd_a": a, "target_modules_bd_b": b});
        config["use_bdlora"] = own;
        config
    }

    fn describe(&self) -> (String, Value) {
        let (text, keys) = self.lora.describe();
        (format!("{} in {} blocks", text.replacen("LoRA", Self::NAME, 1), self.blocks), keys)
    }
}
