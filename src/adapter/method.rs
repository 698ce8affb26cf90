//! What an adapter method is to the rest of the program: one trait, which a method's file implements. Files, training,
//! checkpoints and the memory plan know a method by this trait alone.

use super::fold::Fold;
use super::form::{LayerForm, Prefix};
use super::held::Loader;
use super::peft::{Found, KeyUse, Keys};
use super::tensor::{Stored, TensorSpec, Tensors};
use crate::error::{Error, Result};
use pocketlora_kernels::Backend;
use pocketlora_models::{Layout, Model, Param, ParamSpec, Role};
use serde_json::{Map, Value};
use std::path::Path;

/// As a target: the layers that PEFT adapts by default with the method, in the model's family.
pub(crate) const AUTO: &str = "auto";

/// What somebody asks of a fresh adapter, whatever its method; each method reads some of it.
#[derive(Clone, Debug, PartialEq)]
pub struct Settings {
    /// Rank.
    pub rank: usize,
    /// LoRA's alpha.
    pub alpha: f64,
    /// Scale by `alpha / sqrt(rank)`.
    pub rslora: bool,
    /// Dropout of the adapters' input in training.
    pub dropout: f64,
    /// Ends of the paths of layers; `all` for every linear layer of the decoder, `auto` for those that PEFT takes by
    /// default.
    pub targets: Vec<String>,
    /// Those of them of which IA3 scales the input; none for PEFT's choice.
    pub feedforward_modules: Vec<String>,
    /// Virtual tokens of a prefix.
    pub num_virtual_tokens: usize,
    /// The learning rate of B over that of A (LoRA+).
    pub lora_plus_ratio: f32,
}

impl Settings {
    /// The value of the setting `key` of a run, as somebody would type it.
    #[must_use]
    pub fn shown(&self, key: &str) -> String {
        match key {
            "rank" => self.rank.to_string(),
            "alpha" => self.alpha.to_string(),
            "rslora" => self.rslora.to_string(),
            "dropout" => self.dropout.to_string(),
            "targets" => self.targets.join(","),
            "feedforward-modules" => self.feedforward_modules.join(","),
            "num-virtual-tokens" => self.num_virtual_tokens.to_string(),
            "lora-plus-ratio" => self.lora_plus_ratio.to_string(),
            _ => unreachable!("`{key}` is no setting of an adapter"),
        }
    }
}

/// How a tensor is moved in training.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Group {
    /// Its learning rate over the run's.
    pub rate: f32,
    /// Whether weight decay takes part.
    pub decays: bool,
}

/// One adapter method. The methods' order here is that of an adapter's life: its config and tensors are read, or both are
/// begun; it is put on a base; it is trained; its config is written.
pub(super) trait AdapterMethod: Sized + Clone + std::fmt::Debug + PartialEq {
    /// `peft_type` in PEFT's configs.
    const PEFT_TYPE: &'static str;
    /// For people.
    const NAME: &'static str;
    /// What is done with each key that its configs have beside the common ones, sorted.
    const KEYS: &'static [KeyUse];
    /// Ends of its tensors' names behind a module's path.
    const PARTS: &'static [&'static str];
    /// Which of them may be a module's first one; every module has exactly one of these.
    const FIRSTS: &'static [usize] = &[0];
    /// Names of tensors that belong to no module.
    const SHARED: &'static [&'static str] = &[];
    /// In what type its tensors are saved.
    const STORED: Stored;
    /// Whether its effect can be multiplied.
    const HAS_STRENGTH: bool = false;
    /// Whether several of it can work together.
    const ADDS_UP: bool = true;
    /// Keys of a run's settings that shape it, in the order in which they are compared with an adapter to start from.
    const SETTINGS: &'static [&'static str];
    /// Keys of a run's settings that it reads while it trains, which no adapter decides.
    const IN_TRAINING: &'static [&'static str] = &[];

    /// Reads its keys of a config.
    ///
    /// # Errors
    /// A value is out of range, or asks for what is not done here.
    fn read(keys: &Keys<'_>) -> Result<Self>;

    /// Checks the tensors that lie in the file at `path`, and takes from them what the config does not say. Returns what
    /// of the config has no effect.
    ///
    /// # Errors
    /// The tensors contradict the config.
    fn check(&mut self, path: &Path, found: &[Found]) -> Result<Vec<String>>;

    /// A fresh adapter for `model`, with the layers that it is for.
    ///
    /// # Errors
    /// A setting does not fit the model.
    fn begin(settings: &Settings, model: &dyn Model) -> Result<(Self, Vec<Param>)>;

    /// Those of [`AdapterMethod::PARTS`] that the module at the path `module` has, in the order in which they are made.
    fn parts(&self, _module: &str) -> &'static [&'static str] {
        Self::PARTS
    }

    /// Shapes of the parts of the layer `[out, in]`, or embedding `[V, C]`, at the path `module`, in their order.
    fn shapes(&self, module: &str, layer: [usize; 2]) -> Vec<Vec<usize>>;

    /// Its tensors that belong to no module, on `model`.
    ///
    /// # Errors
    /// It does not fit the model.
    fn shared(&self, _model: &dyn Model) -> Result<Vec<TensorSpec>> {
        Ok(Vec::new())
    }

    /// First values of part number `part` of the module number `module` of a fresh adapter, or of a shared tensor.
    fn start(&self, spec: &TensorSpec, part: usize, module: usize, seed: u64) -> Vec<f32>;

    /// What it does at the layer at the path `module`, whose tensors `load` puts on the device; `factor` multiplies its
    /// effect.
    ///
    /// # Errors
    /// Out of memory.
    fn on_layer<B: Backend>(&self, module: &str, load: &mut Loader<'_, B>, factor: f32) -> Result<LayerForm<B>>;

    /// What it does in the attention of all layers, with tensors of its own that belong to no module.
    ///
    /// # Errors
    /// Out of memory.
    fn in_attention<B: Backend>(&self, _load: &mut Loader<'_, B>) -> Result<Option<Prefix>> {
        Ok(None)
    }

    /// What merging it makes of the layer at the path `module`; none where no other weight of the layer does the same.
    fn fold(&self, _module: &str, _tensors: &Tensors, _factor: f32) -> Option<Box<dyn Fold>> {
        None
    }

    /// Why an adapter of it cannot be trained further, if it cannot.
    fn is_final(&self) -> Option<&'static str> {
        None
    }

    /// How the tensor `name` is moved in training.
    fn group(&self, _name: &str, _settings: &Settings) -> Group {
        Group { rate: 1.0, decays: true }
    }

    /// `settings` with what the adapter has decided.
    fn settings(&self, settings: Settings) -> Settings;

    /// Takes from the settings of a run what belongs to training.
    fn set_in_training(&mut self, _settings: &Settings) {}

    /// Ends of the paths of the layers that it adapts.
    fn targets(&self) -> &[String];

    /// Names the layers that it adapts, where the config named them by an expression.
    fn set_targets(&mut self, targets: Vec<String>);

    /// Its keys of the config of a file that adapts the modules `adapted`.
    fn write(&self, adapted: &[String]) -> Map<String, Value>;

    /// What it is, in a few words, and the same by keys.
    fn describe(&self) -> (String, Map<String, Value>);
}

/// The path of the head.
pub(super) const HEAD: &str = "lm_head";
/// The path of the embedding.
pub(super) const EMBEDDING: &str = "model.embed_tokens";

/// The linear layer or the embedding that an adapter's module path names; a tied head is the embedding's parameter.
pub(crate) fn layer_at(model: &dyn Model, path: &str) -> Option<Param> {
    let is_it = |spec: &ParamSpec| match spec.role {
        Role::Linear | Role::Head => spec.module() == path,
        // Adapters of older versions of PEFT, which did not refuse it.
        Role::Fixed => spec.layout == Layout::Whole && spec.module() == path,
        Role::Embedding => spec.module() == path || path == HEAD && model.config().tied_head,
        Role::Vector | Role::Router => false,
    };
    model.params().iter().position(is_it).map(|i| Param(i as u32))
}

/// The module that an adapter names; a tied head is the embedding's parameter, but not its module.
pub(super) fn path_of(spec: &ParamSpec) -> &str {
    if spec.role == Role::Embedding { HEAD } else { spec.module() }
}

/// Linear layers that `targets` name.
///
/// # Errors
/// A target that names none; those that would are listed.
pub(crate) fn target_layers(params: &[ParamSpec], targets: &[String]) -> Result<Vec<Param>> {
    let linears = || params.iter().filter(|p| p.role == Role::Linear);
    let named = |p: &ParamSpec, target: &str| {
        target == "all" || p.module() == target || p.module().ends_with(&format!(".{target}"))
    };
    for target in targets {
        if !linears().any(|p| named(p, target)) {
            let mut known: Vec<&str> = linears().filter_map(|p| p.module().rsplit('.').next()).collect();
            known.sort_unstable();
            known.dedup();
            return Err(Error::config("targets", format!("`all` or some of `{}`", known.join("`, `")), target));
        }
    }
    let chosen = |p: &ParamSpec| p.role == Role::Linear && targets.iter().any(|t| named(p, t));
    Ok(params.iter().zip(0..).filter(|(p, _)| chosen(p)).map(|(_, i)| Param(i)).collect())
}

/// The last parts of the paths of `layers`, each once.
pub(super) fn last_parts(model: &dyn Model, layers: &[Param]) -> Vec<String> {
    let last = |p: &Param| model.params()[p.0 as usize].module().rsplit('.').next().map(str::to_owned);
    let mut parts: Vec<String> = layers.iter().filter_map(last).collect();
    parts.sort_unstable();
    parts.dedup();
    parts
}

/// `targets` and those of the modules `adapted` that they do not name: PEFT takes no other module from a file.
pub(super) fn with_unnamed<'a>(targets: &'a [String], adapted: &'a [String]) -> Vec<&'a String> {
    let named = |module: &&String| {
        targets
            .iter()
            .any(|end| module.strip_suffix(end.as_str()).is_some_and(|rest| rest.is_empty() || rest.ends_with('.')))
    };
    targets.iter().chain(adapted.iter().filter(|m| !named(m))).collect()
}
