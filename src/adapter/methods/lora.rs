//! LoRA (Hu et al. 2021): `y = x Wᵀ + s (x Aᵀ) Bᵀ` with `A` `[r, in]`, `B` `[out, r]`, `s = alpha / r`, or
//! `alpha / sqrt(r)` for rsLoRA (Kalajdzievski 2023).

use crate::adapter::experts::is_fused;
use crate::adapter::fold::{Fold, LowRankFold};
use crate::adapter::forms::LayerForm;
use crate::adapter::forms::activated::Activated;
use crate::adapter::forms::low_rank::{LowRankLookup, LowRankTerm};
use crate::adapter::held::Loader;
use crate::adapter::init::{FIRST, Init};
use crate::adapter::method::{
    AUTO, AdapterMethod, EMBEDDING, Group, HEAD, Settings, last_parts, targets_in, with_embedding,
};
use crate::adapter::peft::{CONFIG, Found, KeyUse, Keys, MERGE, Patterns, RETRAIN, Use, number};
use crate::adapter::tensor::{Stored, TensorSpec, Tensors};
use crate::error::{Error, Result};
use crate::rng::{Rng, mix};
use Use::{Default as OnlyDefault, Honoured, NoEffect};
use pocketlora_kernels::Backend;
use pocketlora_models::{Model, Param, Role};
use serde_json::{Map, Value, json};
use std::collections::BTreeMap;
use std::fmt::Write;
use std::path::Path;
use std::sync::Arc;

/// Bound on ranks: far beyond any use, and small enough that hostile files cannot ask for absurd work.
const MAX_RANK: usize = 1 << 16;
/// Stream of random numbers for fresh matrices.
const INIT: u64 = 1;
/// Initializations that leave the base as it is: what they began with is in the file.
const PLAIN_INIT: &[&str] = &["gaussian", "eva", "orthogonal", "mica", "true", "false"];

/// Parts of a module in training whose beginning is taken away.
const BEGUN: &[&str] = &["lora_A.weight", "lora_B.weight", FIRST[0], FIRST[1]];

/// Every key of PEFT's LoRA configs (0.21) and of programs that write such files: what is done with it, and what to do
/// instead where that is not enough.
pub(crate) const KEYS: &[KeyUse] = &[
    ("alora_invocation_tokens", Honoured, ""),
    ("alpha_pattern", Honoured, ""),
    ("arrow_config", OnlyDefault, "use the adapters that it routes between one at a time"),
    ("bias", Honoured, ""),
    ("corda_config", NoEffect, ""), // how it began: `init_lora_weights` tells whether that changed the base
    ("enable_lora", OnlyDefault, MERGE),
    ("ensure_weight_tying", Honoured, ""),
    ("eva_config", NoEffect, ""),
    ("exclude_modules", Honoured, ""),
    ("fan_in_fan_out", NoEffect, ""), // how the base stores a weight, which PEFT sees for itself
    ("init_lora_weights", Honoured, ""),
    ("kasa_config", OnlyDefault, "it changed the base as well: merge it with PEFT's `merge_and_unload`"),
    ("layer_replication", OnlyDefault, RETRAIN),
    ("layers_pattern", Honoured, ""),
    ("layers_to_transform", Honoured, ""),
    ("loftq_config", NoEffect, ""),
    ("lora_alpha", Honoured, ""),
    ("lora_bias", Honoured, ""),
    ("lora_dropout", Honoured, ""),
    ("lora_dtype", NoEffect, ""),
    ("lora_ga_config", NoEffect, ""),
    ("lorap_emb_lr", NoEffect, ""),
    ("lorap_lr_ratio", NoEffect, ""),
    ("megatron_config", OnlyDefault, "export the adapter from Megatron as a plain one"),
    ("megatron_core", NoEffect, ""),
    ("merge_weights", NoEffect, ""),
    ("monteclora_config", NoEffect, ""), // how it was trained
    ("qalora_group_size", NoEffect, ""), // of `use_qalora`
    ("r", Honoured, ""),
    ("rank_pattern", Honoured, ""),
    ("target_modules", Honoured, ""),
    ("target_parameters", Honoured, ""),
    ("trainable_token_indices", Honoured, ""),
    ("use_bdlora", Honoured, ""),
    ("use_dora", Honoured, ""),
    ("use_merged_linear", OnlyDefault, MERGE),
    ("use_qa_lora", OnlyDefault, MERGE),
    ("use_qalora", OnlyDefault, MERGE),
    ("use_rslora", Honoured, ""),
    ("velora_config", NoEffect, ""),
];

/// Settings of plain LoRA and rsLoRA.
#[derive(Clone, Debug, PartialEq)]
pub struct Lora {
    /// Rank (`r`).
    pub rank: usize,
    /// `lora_alpha`.
    pub alpha: f64,
    /// The scale is `alpha / sqrt(r)` instead of `alpha / r`.
    pub rslora: bool,
    /// Dropout of the input in training.
    pub dropout: f64,
    /// Exceptions to the rank: regular expressions for the end of a module's path, as PEFT has them.
    pub rank_pattern: Vec<(String, f64)>,
    /// Exceptions to alpha.
    pub alpha_pattern: Vec<(String, f64)>,
    /// Suffixes of the adapted modules.
    pub targets: Vec<String>,
    /// B has a bias (`lora_bias`).
    pub bias: bool,
    /// It works from the last occurrence of these tokens on alone (`alora_invocation_tokens`).
    pub invocation: Option<Vec<u32>>,
    /// How it begins, where it is fresh.
    pub init: Init,
    /// What the patterns say of modules for which it is not the usual: rank and factor on `B A`.
    pub(in crate::adapter) exceptions: BTreeMap<String, (usize, f32)>,
}

impl Lora {
    /// A plain LoRA of one rank and alpha, without dropout, exceptions or names.
    #[must_use]
    pub fn new(rank: usize, alpha: f64) -> Self {
        Self {
            rank,
            alpha,
            rslora: false,
            dropout: 0.0,
            rank_pattern: Vec::new(),
            alpha_pattern: Vec::new(),
            targets: Vec::new(),
            bias: false,
            invocation: None,
            init: Init::Plain,
            exceptions: BTreeMap::new(),
        }
    }

    /// A plain LoRA whose modules, by their paths, have the given ranks and alphas: the most frequent ones are the usual
    /// ones, and others are exceptions.
    #[must_use]
    pub(crate) fn of_modules(modules: &[(String, usize, f64)]) -> Self {
        let count = |same: &dyn Fn(usize, f64) -> bool| modules.iter().filter(|(_, r, a)| same(*r, *a)).count();
        let usual = modules.iter().rev().max_by_key(|(_, rank, alpha)| count(&|r, a| (r, a) == (*rank, *alpha)));
        let mut lora = usual.map_or_else(|| Self::new(1, 1.0), |(_, rank, alpha)| Self::new(*rank, *alpha));
        for (module, rank, alpha) in modules {
            if *rank != lora.rank {
                lora.rank_pattern.push((module.clone(), *rank as f64));
            }
            if *alpha != lora.alpha {
                lora.alpha_pattern.push((module.clone(), *alpha));
            }
            lora.set_module(module.clone(), *rank, lora.factor(*rank, *alpha));
        }
        let mut targets: Vec<String> =
            modules.iter().filter_map(|(module, ..)| module.rsplit('.').next().map(str::to_owned)).collect();
        targets.sort_unstable();
        targets.dedup();
        Self { targets, ..lora }
    }

    /// The same with other ranks and alphas of its modules, by their paths.
    #[must_use]
    pub(crate) fn of_ranks(&self, modules: &[(String, usize, f64)]) -> Self {
        let Self { rank, alpha, rank_pattern, alpha_pattern, .. } = Self::of_modules(modules);
        let exceptions = BTreeMap::new();
        let mut ranked = Self { rank, alpha, rank_pattern, alpha_pattern, exceptions, ..self.clone() };
        for (module, rank, alpha) in modules {
            let factor = ranked.factor(*rank, *alpha);
            ranked.set_module(module.clone(), *rank, factor);
        }
        ranked
    }

    /// Says what rank and factor on `B A` the module at the path `module` has.
    pub(crate) fn set_module(&mut self, module: String, rank: usize, factor: f32) {
        if (rank, factor) != self.of_module(&module) {
            self.exceptions.insert(module, (rank, factor));
        }
    }

    /// Factor on `B A`, for a layer whose rank and alpha are given.
    fn factor(&self, rank: usize, alpha: f64) -> f32 {
        let divisor = if self.rslora { (rank as f64).sqrt() } else { rank as f64 };
        (alpha / divisor) as f32
    }

    /// Rank and factor on `B A` of the module at the path `module`.
    #[must_use]
    pub fn of_module(&self, module: &str) -> (usize, f32) {
        let usual = || (self.rank, self.factor(self.rank, self.alpha));
        self.exceptions.get(module).copied().unwrap_or_else(usual)
    }
}

impl AdapterMethod for Lora {
    const PEFT_TYPE: &'static str = "LORA";
    const NAME: &'static str = "LoRA";
    const KEYS: &'static [KeyUse] = KEYS;
    const PARTS: &'static [&'static str] =
        &["lora_A.weight", "lora_B.weight", "lora_B.bias", "lora_embedding_A", "lora_embedding_B"];
    const FIRSTS: &'static [usize] = &[0, 3];
    const DIMENSIONS: &'static [usize] = &[2, 2, 1, 2, 2];
    const FROZEN: &'static [&'static str] = &FIRST;
    const STORED: Stored = Stored::F16;
    const HAS_STRENGTH: bool = true;
    const SETTINGS: &'static [&'static str] =
        &["rank", "alpha", "rslora", "targets", "alora-invocation-tokens", "init-lora-weights"];
    const IN_TRAINING: &'static [&'static str] = &["dropout", "lora-plus-ratio", "bias", "trainable-token-indices"];

    fn read(keys: &Keys<'_>) -> Result<Self> {
        let rank = keys.get("r").and_then(Value::as_u64).and_then(|r| usize::try_from(r).ok());
        let rank =
            rank.filter(|r| (1..=MAX_RANK).contains(r)).ok_or_else(|| keys.wrong("r", "a rank from 1 to 65536"))?;
        let rank_pattern = keys.patterns("rank_pattern")?;
        if rank_pattern.iter().any(|(_, r)| r.fract() != 0.0 || *r > MAX_RANK as f64) {
            return Err(keys.wrong("rank_pattern", "an object of ranks from 1 to 65536"));
        }
        let dropout = keys.number("lora_dropout", Some(0.0))?;
        if !(0.0..1.0).contains(&dropout) {
            return Err(keys.wrong("lora_dropout", "a share from 0 to below 1"));
        }
        check_init(keys)?;
        Ok(Self {
            rank,
            alpha: keys.number("lora_alpha", None)?,
            rslora: keys.flag("use_rslora")?,
            dropout,
            rank_pattern,
            alpha_pattern: keys.patterns("alpha_pattern")?,
            targets: Vec::new(),
            bias: keys.flag("lora_bias")?,
            invocation: Some(keys.ids("alora_invocation_tokens")?).filter(|ids| !ids.is_empty()),
            init: Init::Plain,
            exceptions: BTreeMap::new(),
        })
    }

    fn check(&mut self, path: &Path, found: &[Found]) -> Result<Vec<String>> {
        let (ranks, alphas) = (Patterns::new(path, &self.rank_pattern)?, Patterns::new(path, &self.alpha_pattern)?);
        let names: Vec<[&str; 2]> = found.iter().map(Found::names).collect();
        let mut warnings = Vec::new();
        for (key, patterns) in [("rank_pattern", &ranks), ("alpha_pattern", &alphas)] {
            let idle = patterns.idle(&names)?;
            warnings.extend(idle.iter().map(|pattern| format!("`{pattern}` in `{key}` matches no adapted layer")));
        }
        let mut exceptions = BTreeMap::new();
        for module in found {
            if self.invocation.is_some() && [EMBEDDING, HEAD].contains(&module.path.as_str()) {
                let what = format!("an invocation (`alora_invocation_tokens`) beside terms on `{}`", module.path);
                return Err(Error::unsupported(path, what, "use it with PEFT"));
            }
            let rank = ranks.value_for(module.names())?.map_or(self.rank, |r| r as usize);
            let factor = self.factor(rank, alphas.value_for(module.names())?.unwrap_or(self.alpha));
            let [a, b, ..] = &module.shapes[..] else { unreachable!("a shape for each of its parts") };
            // A weight of all experts has as many terms as there are experts.
            let experts = if is_fused(&module.path) { (a[0] / rank).max(1) } else { 1 };
            if a[0] != rank * experts || b[1] != a[0] {
                let item = format!("module `{}`", module.path);
                let got = format!("A `{a:?}` and B `{b:?}`");
                return Err(Error::format(path, item, format!("rank {rank} from {CONFIG}"), got));
            }
            if (rank, factor) != self.of_module(&module.path) {
                exceptions.insert(module.path.clone(), (rank, factor));
            }
        }
        self.exceptions = exceptions;
        Ok(warnings)
    }

    fn begin(settings: &Settings, model: &dyn Model) -> Result<(Self, Vec<Param>)> {
        let layers = with_embedding(model, &settings.targets)?;
        let outside = |target: &&String| [EMBEDDING, HEAD].iter().any(|path| path.ends_with(target.as_str()));
        let linear = |p: &&Param| model.params()[p.0 as usize].role == Role::Linear;
        let mut targets = last_parts(model, &layers.iter().filter(linear).copied().collect::<Vec<_>>());
        targets.extend(settings.targets.iter().filter(outside).cloned());
        let (rslora, dropout) = (settings.rslora, settings.dropout);
        let invocation = Some(settings.alora_invocation_tokens.clone()).filter(|ids| !ids.is_empty());
        let vocabulary = model.config().vocab_size;
        if let Some(id) = settings.alora_invocation_tokens.iter().find(|id| **id as usize >= vocabulary) {
            let expected = format!("ids of tokens below the vocabulary's {vocabulary}");
            return Err(Error::config("alora-invocation-tokens", expected, id));
        }
        if let Some(outside) = targets.iter().find(|t| invocation.is_some() && outside(t)) {
            let expected = "layers of the decoder alone, for an adapter with an invocation";
            return Err(Error::config("targets", expected, outside));
        }
        let init = Init::named(&settings.init_lora_weights)?;
        let lora = Self { rslora, dropout, targets, invocation, init, ..Self::new(settings.rank, settings.alpha) };
        lora.check_init(model, &layers)?;
        Ok((lora, layers))
    }

    fn parts(&self, module: &str) -> &'static [&'static str] {
        match (module, self.bias) {
            (EMBEDDING, _) => &Self::PARTS[3..],
            _ if self.init.is_taken_away() => BEGUN,
            (_, true) => &Self::PARTS[..3],
            (_, false) => &Self::PARTS[..2],
        }
    }

    fn shapes(&self, module: &str, [out, input]: [usize; 2]) -> Vec<Vec<usize>> {
        let (rank, _) = self.of_module(module);
        match (module, self.bias) {
            // Of an embedding, `out` is the vocabulary and `input` the width.
            (EMBEDDING, _) => vec![vec![rank, out], vec![input, rank]],
            _ if self.init.is_taken_away() => {
                [[rank, input], [out, rank]].repeat(2).into_iter().map(Vec::from).collect()
            }
            (_, true) => vec![vec![rank, input], vec![out, rank], vec![out]],
            (_, false) => vec![vec![rank, input], vec![out, rank]],
        }
    }

    /// A uniform in `±1/sqrt(in)` (PEFT's Kaiming-uniform with a = sqrt 5), B zero. On an embedding A zero, B normal.
    fn start(&self, spec: &TensorSpec, part: usize, module: usize, seed: u64) -> Vec<f32> {
        let mut rng = Rng::new(mix(mix(seed, INIT), module as u64));
        if spec.name.ends_with(Self::PARTS[4]) {
            return (0..spec.values()).map(|_| rng.normal()).collect();
        }
        if part > 0 || spec.name.ends_with(Self::PARTS[3]) {
            return vec![0.0; spec.values()];
        }
        if self.init == Init::Gaussian {
            return (0..spec.values()).map(|_| rng.normal() / spec.shape[0] as f32).collect();
        }
        let bound = (spec.shape[1] as f32).sqrt().recip();
        rng.uniforms(bound, spec.values())
    }

    fn on_layer<B: Backend>(&self, module: &str, load: &mut Loader<'_, B>, factor: f32) -> Result<Vec<LayerForm<B>>> {
        let factor = self.of_module(module).1 * factor;
        if module == EMBEDDING {
            let (a, b) = (load.buffer("lora_embedding_A")?, load.matrix("lora_embedding_B")?);
            return Ok(vec![LayerForm::Lookup(Arc::new(LowRankLookup { a, b, factor }))]);
        }
        let (a, b) = (load.matrix("lora_A.weight")?, load.matrix("lora_B.weight")?);
        let bias = if self.bias { Some(load.buffer("lora_B.bias")?) } else { None };
        let term = LowRankTerm { a, b, bias, factor };
        if self.init.is_taken_away() {
            let (a, b) = (load.fixed(FIRST[0], true)?, load.fixed(FIRST[1], true)?);
            let first = LowRankTerm { a, b, bias: None, factor: -factor };
            return Ok(vec![LayerForm::Term(Arc::new(term)), LayerForm::Term(Arc::new(first))]);
        }
        let activated = self.invocation.is_some();
        Ok(vec![LayerForm::Term(if activated { Arc::new(Activated { term }) } else { Arc::new(term) })])
    }

    fn fold(&self, module: &str, _layer: [usize; 2], tensors: &Tensors, factor: f32) -> Option<Box<dyn Fold>> {
        if self.invocation.is_some() {
            return None;
        }
        let part = |part: &str| tensors[&format!("{module}.{part}")].data.clone();
        let (rank, own) = self.of_module(module);
        let factor = own * factor;
        if module == EMBEDDING {
            // Rows of the embedding are what is looked up: their term is Aᵀ Bᵀ.
            let transposed = |part: Vec<f32>, cols: usize| -> Vec<f32> {
                (0..cols).flat_map(|col| part.iter().skip(col).step_by(cols).copied().collect::<Vec<_>>()).collect()
            };
            let (a, b) = (part("lora_embedding_A"), part("lora_embedding_B"));
            let vocabulary = a.len() / rank;
            let (a, b) = (transposed(b, rank), transposed(a, vocabulary));
            return Some(Box::new(LowRankFold { a, b, rank, bias: None, factor }));
        }
        let (a, b) = (part("lora_A.weight"), part("lora_B.weight"));
        let bias = self.bias.then(|| part("lora_B.bias"));
        Some(Box::new(LowRankFold { a, b, rank, bias, factor }))
    }

    fn group(&self, name: &str, settings: &Settings) -> Group {
        let is_b = name.ends_with("lora_B.weight") || name.ends_with("lora_embedding_B");
        Group { rate: if is_b { settings.lora_plus_ratio } else { 1.0 }, decays: true }
    }

    fn settings(&self, settings: Settings) -> Settings {
        let Self { rank, alpha, rslora, dropout, .. } = *self;
        let alora_invocation_tokens = self.invocation.clone().unwrap_or_default();
        let (targets, init_lora_weights) = (self.targets.clone(), self.init.name());
        Settings { rank, alpha, rslora, dropout, targets, alora_invocation_tokens, init_lora_weights, ..settings }
    }

    fn set_in_training(&mut self, settings: &Settings) {
        self.dropout = settings.dropout;
    }

    targets_in!(targets);

    fn write(&self) -> Value {
        let object = |patterns: &[(String, f64)]| -> Value {
            patterns.iter().map(|(key, v)| (key.clone(), number(*v))).collect::<Map<_, _>>().into()
        };
        let mut config = json!({
            "alpha_pattern": object(&self.alpha_pattern),


            "init_lora_weights": true,


            "lora_alpha": self.alpha,
            "lora_dropout": self.dropout,
            "r": self.rank,
            "rank_pattern": object(&self.rank_pattern),

            "use_dora": false,
            "use_rslora": self.rslora,
        });
        // Older versions of PEFT do not know these.
        if self.bias {
            config["lora_bias"] = true.into();
        }
        if let Some(invocation) = &self.invocation {
            config["alora_invocation_tokens"] = json!(invocation);
        }
        config
    }

    fn describe(&self) -> (String, Value) {
        let name = match self.invocation {
            Some(_) => "activated LoRA",
            None if self.rslora => "rsLoRA",
            None => Self::NAME,
        };
        let mut text = format!("{name} of rank {}, alpha {}", self.rank, self.alpha);
        let mut keys = json!({"rank": self.rank, "alpha": self.alpha, "rslora": self.rslora});
        let others: Vec<usize> = self.exceptions.values().map(|(rank, _)| *rank).filter(|r| *r != self.rank).collect();
        if let (Some(least), Some(most)) = (others.iter().min(), others.iter().max()) {
            let ranks = if least == most { format!("rank {least}") } else { format!("ranks {least} to {most}") };
            let modules = if others.len() == 1 { "module has" } else { "modules have" };
            let _ = write!(text, " ({} {modules} {ranks})", others.len());
            keys["other_ranks"] = json!([least, most]);
        }
        if let Some(invocation) = &self.invocation {
            let _ = write!(text, ", from the last of the tokens {invocation:?} on");
            keys["alora_invocation_tokens"] = json!(invocation);
        }
        (text, keys)
    }
}

/// Some initializations took away from the base what they put into the adapter.
fn check_init(keys: &Keys<'_>) -> Result<()> {
    match keys.get("init_lora_weights") {
        None | Some(Value::Bool(_)) => Ok(()),
        Some(Value::String(init)) if PLAIN_INIT.contains(&init.to_lowercase().as_str()) => Ok(()),
        Some(Value::String(init)) => {
            let what = format!("`init_lora_weights: {init}`, which may have changed the base weights,");
            Err(Error::unsupported(keys.path, what, "save it with PEFT's conversion to plain LoRA"))
        }
        Some(_) => Err(keys.wrong("init_lora_weights", "true, false or a name")),
    }
}

/// `settings` for a method that is for all layers where nobody named any.
pub(crate) fn all_for_auto(settings: &Settings) -> Settings {
    let targets = if settings.targets == [AUTO] { vec!["all".to_owned()] } else { settings.targets.clone() };
    Settings { targets, ..settings.clone() }
}

/// A fresh LoRA for the method `name`, which works like one on linear layers and on the head, but not on the embedding.
///
/// # Errors
/// As [`Lora::begin`]; a target is the embedding.
pub(crate) fn begin_on_layers(settings: &Settings, model: &dyn Model, name: &str) -> Result<(Lora, Vec<Param>)> {
    if let Some(target) = settings.targets.iter().find(|target| EMBEDDING.ends_with(target.as_str())) {
        return Err(Error::config("targets", format!("linear layers, or the head, for {name}"), target));
    }
    Lora::begin(&all_for_auto(settings), model)
}
