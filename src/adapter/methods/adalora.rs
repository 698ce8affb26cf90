//! AdaLoRA (Zhang et al. 2023): `y = x Wᵀ + s ((x Aᵀ) E) Bᵀ` with `E` `[r, 1]` in place of singular values, and `s = alpha /
//! (init_r + 1e-5)`, however many ranks a file has left. Served, `E` is folded into A. Training adds `orth_reg_weight` times the
//! mean over all A and B of `|P Pᵀ - 1|` to the loss, so that the ranks stay apart. Which ranks a file of PEFT kept is in
//! `rank_pattern`. A run that begins one here gives ranks up as `target_r` asks for (`src/train/allocate.rs`): their singular values
//! are zero in its file.

use crate::adapter::method::{AdapterMethod, Budget, Settings, begin_with, options_of, targets_in};
use crate::adapter::peft::{Found, KeyUse, Keys, MERGE, RETRAIN, Use};
use crate::adapter::pieces::{Of, Piece, Plan};
use crate::adapter::singular::Singular;
use crate::adapter::tensor::{Stored, TensorSpec};
use crate::adapter::weight::LayerWeight;
use crate::error::{Error, Result};
use crate::rng::normals;
use Use::{Default as OnlyDefault, Honoured, NoEffect};
use pocketlora_models::{Model, Param};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::path::Path;

/// Stream of random numbers for fresh matrices.
const INIT: u64 = 0x6164_616c;
const PARTS: &[&str] = &["lora_A", "lora_B", "lora_E"];

/// The keys of PEFT's AdaLoRA configs (0.21), which have LoRA's beside their own.
const KEYS: &[KeyUse] = &[
    ("alora_invocation_tokens", OnlyDefault, RETRAIN),
    ("alpha_pattern", OnlyDefault, MERGE),
    ("arrow_config", OnlyDefault, MERGE),
    ("beta1", Honoured, ""),
    ("beta2", Honoured, ""),
    ("bias", Honoured, ""),
    ("corda_config", NoEffect, ""),
    ("deltaT", Honoured, ""),
    ("ensure_weight_tying", Honoured, ""),
    ("eva_config", NoEffect, ""),
    ("exclude_modules", Honoured, ""),
    ("fan_in_fan_out", NoEffect, ""),
    ("init_lora_weights", NoEffect, ""),
    ("init_r", Honoured, ""),
    ("kasa_config", OnlyDefault, MERGE),
    ("layer_replication", OnlyDefault, RETRAIN),
    ("layers_pattern", Honoured, ""),
    ("layers_to_transform", Honoured, ""),
    ("loftq_config", NoEffect, ""),
    ("lora_alpha", Honoured, ""),
    ("lora_bias", OnlyDefault, MERGE),
    ("lora_dropout", NoEffect, ""),
    ("lora_ga_config", NoEffect, ""),
    ("megatron_config", OnlyDefault, MERGE),
    ("megatron_core", NoEffect, ""),
    ("monteclora_config", NoEffect, ""),
    ("orth_reg_weight", Honoured, ""),
    ("qalora_group_size", NoEffect, ""),
    ("r", NoEffect, ""), // LoRA's, which AdaLoRA does not read
    ("rank_pattern", Honoured, ""),
    ("target_modules", Honoured, ""),
    ("target_parameters", OnlyDefault, MERGE),
    ("target_r", Honoured, ""),
    ("tfinal", Honoured, ""),
    ("tinit", Honoured, ""),
    ("total_step", Honoured, ""),
    ("trainable_token_indices", Honoured, ""),
    ("use_bdlora", OnlyDefault, MERGE),
    ("use_dora", OnlyDefault, MERGE),
    ("use_qalora", OnlyDefault, MERGE),
    ("use_rslora", OnlyDefault, MERGE),
    ("velora_config", NoEffect, ""),
];

/// Settings of AdaLoRA.
#[derive(Clone, Debug, PartialEq)]
pub struct Adalora {
    /// Ranks at the start (`init_r`).
    pub rank: usize,
    /// `lora_alpha`.
    pub alpha: f64,
    /// `orth_reg_weight`.
    pub orth_reg_weight: f64,
    /// How many singular values training keeps.
    pub budget: Budget,
    /// It began here, and its ranks are given up by the budget; those of a file stay as they are.
    fresh: bool,
    /// What the file says of the run that made it (`total_step`).
    total_step: Option<u64>,
    /// Suffixes of the adapted modules.
    pub targets: Vec<String>,
    /// `rank_pattern` as the file has it.
    pattern: Option<Value>,
    /// Ranks of modules that have others than `rank`.
    ranks: BTreeMap<String, usize>,
}

impl Adalora {
    fn of_module(&self, module: &str) -> usize {
        self.ranks.get(module).copied().unwrap_or(self.rank)
    }
}

impl AdapterMethod for Adalora {
    const PEFT_TYPE: &'static str = "ADALORA";
    const NAME: &'static str = "AdaLoRA";
    const KEYS: &'static [KeyUse] = KEYS;
    const PARTS: &'static [&'static str] = PARTS;
    const DIMENSIONS: &'static [usize] = &[2, 2, 2];
    const STORED: Stored = Stored::F32;
    const HAS_STRENGTH: bool = true;
    const SETTINGS: &'static [&'static str] = &["rank", "alpha", "targets", "options"];

    fn read(keys: &Keys<'_>) -> Result<Self> {
        let pattern = keys.get("rank_pattern").filter(|pattern| pattern.as_object().is_none_or(|p| !p.is_empty()));
        if pattern.is_some_and(|pattern| !pattern.is_object()) {
            return Err(keys.wrong("rank_pattern", "an object of lists of booleans"));
        }
        let rank = keys.whole("init_r", 1, 12)?;
        let steps = |key: &str, default: usize| keys.whole(key, 0, default).map(|steps| steps as u64);
        let beta = |key: &str| keys.number(key, Some(0.85)).map(|beta| beta as f32);
        let budget = Budget {
            target: keys.whole("target_r", 1, rank)?.min(rank),
            tinit: steps("tinit", 0)?,
            tfinal: steps("tfinal", 0)?,
            every: steps("deltaT", 1)?,
            beta1: beta("beta1")?,
            beta2: beta("beta2")?,
        };
        Ok(Self {
            rank,
            budget,
            fresh: false,
            total_step: keys.get("total_step").and_then(Value::as_u64),
            alpha: keys.number("lora_alpha", Some(8.0))?,
            orth_reg_weight: keys.number("orth_reg_weight", Some(0.5))?,
            targets: Vec::new(),
            pattern: pattern.cloned(),
            ranks: BTreeMap::new(),
        })
    }

    fn check(&mut self, path: &Path, found: &[Found]) -> Result<Vec<String>> {
        for module in found {
            let rank = module.shapes[0][0];
            // How many the pattern keeps, which must be what the file has.
            let kept = self.pattern.iter().flat_map(|p| p.as_object()).flatten().find_map(|(key, mask)| {
                let of = key.strip_suffix(".lora_E")?;
                let named = module.names().iter().any(|name| name == &of || name.ends_with(&format!(".{of}")));
                named
                    .then(|| mask.as_array().map_or(0, |m| m.iter().filter(|kept| **kept == Value::Bool(true)).count()))
            });
            if rank != kept.unwrap_or(self.rank) {
                let expected = format!("rank {}", kept.unwrap_or(self.rank));
                return Err(Error::format(path, format!("module `{}`", module.path), expected, rank));
            }
            if rank != self.rank {
                self.ranks.insert(module.path.clone(), rank);
            }
        }
        Ok(Vec::new())
    }

    fn begin(settings: &Settings, model: &dyn Model) -> Result<(Self, Vec<Param>)> {
        let config = [("init_r", settings.rank.into()), ("lora_alpha", crate::adapter::peft::number(settings.alpha))];
        let (method, layers): (Self, Vec<Param>) = begin_with(&config, settings, model)?;
        Ok((Self { fresh: true, ..method }, layers))
    }

    fn shapes(&self, module: &str, [out, input]: [usize; 2]) -> Vec<Vec<usize>> {
        let rank = self.of_module(module);
        vec![vec![rank, input], vec![out, rank], vec![rank, 1]]
    }

    /// A and B normal with a deviation of 0.02, E zero, as PEFT begins.
    fn start(&self, spec: &TensorSpec, part: usize, module: usize, seed: u64) -> Vec<f32> {
        if part == 2 {
            vec![0.0; spec.values()]
        } else {
            normals(&[seed, INIT, module as u64, part as u64], 0.02, spec.values())
        }
    }

    fn plan(&self, module: &str, weight: &dyn LayerWeight, factor: f32) -> Result<Plan> {
        let ([_, input], rank) = (weight.shape(), self.of_module(module));
        if rank == 0 {
            // Nothing of it was kept.
            return Ok(Plan::plain(Vec::new()));
        }
        let factor = factor * (self.alpha / (self.rank as f64 + 1e-5)) as f32;
        let pieces = vec![Piece::LowRank { a: Of::Made(vec![rank, input]), b: Of::Part(PARTS[1]), factor }];
        Ok(Plan::made(pieces, Singular { rank, orth_reg_weight: self.orth_reg_weight }))
    }

    fn is_final(&self) -> Option<&'static str> {
        self.pattern.is_some().then_some("some of its ranks were taken away (`rank_pattern`)")
    }

    fn budget(&self) -> Option<Budget> {
        (self.fresh && self.budget.target < self.rank).then_some(self.budget)
    }

    fn settings(&self, settings: Settings) -> Settings {
        let options = options_of(&settings.options, &self.write());
        Settings { rank: self.rank, alpha: self.alpha, targets: self.targets.clone(), options, ..settings }
    }

    targets_in!(targets);

    fn write(&self) -> Value {
        let Budget { target, tinit, tfinal, .. } = self.budget;
        // PEFT reads no schedule without a step for the budget.
        let total = self.total_step.unwrap_or_default().max(tinit + tfinal + 1);
        // The number that somebody typed, without the digits of its f64.
        let beta = |beta: f32| beta.to_string().parse::<f64>().unwrap_or(f64::from(beta));
        json!({
            "beta1": beta(self.budget.beta1), "beta2": beta(self.budget.beta2),
            "deltaT": self.budget.every,
            "init_lora_weights": true, "init_r": self.rank,
            "lora_alpha": crate::adapter::peft::number(self.alpha), "lora_dropout": 0.0, "orth_reg_weight": self.orth_reg_weight,
            "r": 8, "rank_pattern": self.pattern,
            "target_r": target, "tfinal": tfinal, "tinit": tinit, "total_step": total, "use_dora": false, "use_rslora": false,
        })
    }

    fn describe(&self) -> (String, Value) {
        let keys = json!({"rank": self.rank, "alpha": self.alpha});
        (format!("{} of rank {}, alpha {}", Self::NAME, self.rank, self.alpha), keys)
    }
}
