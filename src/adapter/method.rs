//! What an adapter method is to the rest of the program: one trait, which a method's file implements. Files, training,
//! checkpoints and the memory plan know a method by this trait alone.

use super::fold::Fold;
use super::forms::{LayerForm, Prefix};
use super::held::Loader;
use super::peft::{Found, KeyUse, Keys, Use};
use super::pieces::{NoWeight, Plan, fold, forms};
use super::tensor::{Stored, TensorSpec, Tensors};
use super::weight::LayerWeight;
use crate::error::{Error, ErrorCode, Result};
use pocketlora_kernels::Backend;
use pocketlora_models::{Layout, Model, Param, ParamSpec, Role};
use serde_json::{Map, Value};
use std::collections::BTreeMap;
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
    /// Ranks of single layers, by the ends of their paths; 0 leaves a layer out.
    pub rank_pattern: BTreeMap<String, usize>,
    /// LoRA's alpha of single layers.
    pub alpha_pattern: BTreeMap<String, f64>,
    /// Scale by `alpha / sqrt(rank)`.
    pub rslora: bool,
    /// Dropout of the adapters' input in training.
    pub dropout: f64,
    /// Ends of the paths of layers; `all` for every linear layer of the decoder, `auto` for those that PEFT takes by
    /// default.
    pub targets: Vec<String>,
    /// Those of them of which IA3 scales the input; none for PEFT's choice.
    pub feedforward_modules: Vec<String>,
    /// Virtual tokens of a prefix or a prompt.
    pub num_virtual_tokens: usize,
    /// Of a cartridge's virtual tokens, how many of the first are not moved.
    pub num_frozen_tokens: usize,
    /// Width of the network that makes the virtual tokens of P-tuning.
    pub encoder_hidden_size: usize,
    /// The text as whose embeddings a prompt begins.
    pub prompt_init_text: Option<String>,
    /// Tokens whose rows of the embedding are trained.
    pub trainable_token_indices: Vec<u32>,
    /// LoRA works from the last occurrence of these tokens on alone; everywhere where there are none.
    pub alora_invocation_tokens: Vec<u32>,
    /// How LoRA begins, as PEFT calls it.
    pub init_lora_weights: String,
    /// Which biases of the base are trained: `none`, `all`, or `lora_only` for those of adapted layers.
    pub bias: String,
    /// The learning rate of B over that of A (LoRA+).
    pub lora_plus_ratio: f32,
    /// Keys of PEFT's config of the method, beside those above.
    pub options: Map<String, Value>,
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
            "num-frozen-tokens" => self.num_frozen_tokens.to_string(),
            "encoder-hidden-size" => self.encoder_hidden_size.to_string(),
            "prompt-init-text" => self.prompt_init_text.clone().unwrap_or_default(),
            "trainable-token-indices" => {
                self.trainable_token_indices.iter().map(u32::to_string).collect::<Vec<_>>().join(",")
            }
            "alora-invocation-tokens" => {
                self.alora_invocation_tokens.iter().map(u32::to_string).collect::<Vec<_>>().join(",")
            }
            "init-lora-weights" => self.init_lora_weights.clone(),
            "bias" => self.bias.clone(),
            "lora-plus-ratio" => self.lora_plus_ratio.to_string(),
            "options" => {
                let sorted: BTreeMap<_, _> = self.options.iter().collect();
                sorted.iter().map(|(key, value)| format!("{key}={value}")).collect::<Vec<_>>().join(",")
            }
            _ => unreachable!("`{key}` is no setting of an adapter"),
        }
    }
}

/// How many singular values AdaLoRA keeps, see [`crate::train`].
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Budget {
    /// Kept in the end, of each module on average (`target_r`).
    pub target: usize,
    /// Steps before the first is given up (`tinit`).
    pub tinit: u64,
    /// Steps after the last choice (`tfinal`).
    pub tfinal: u64,
    /// Steps between two choices (`deltaT`).
    pub every: u64,
    /// Smoothing of importances (`beta1`).
    pub beta1: f32,
    /// Smoothing of how much they vary (`beta2`).
    pub beta2: f32,
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
    /// How many dimensions those have; none where they differ, and [`AdapterMethod::shared`] tells.
    const SHARED_DIMENSIONS: Option<usize> = Some(2);
    /// In what type its tensors are saved.
    const STORED: Stored;
    /// How many dimensions each of [`AdapterMethod::PARTS`] has, for a method that reads shapes in [`AdapterMethod::check`].
    const DIMENSIONS: &'static [usize] = &[];
    /// A key of PEFT's configs that asks for it, where several methods have one `peft_type`.
    const ASKED_BY: Option<&'static str> = None;
    /// Those of [`AdapterMethod::PARTS`] and [`AdapterMethod::SHARED`] that are never trained.
    const FROZEN: &'static [&'static str] = &[];
    /// Its part that holds places in a weight as whole numbers: rows, then columns, or with `true` numbers of the weight's
    /// values in their order.
    const PLACES: Option<(&'static str, bool)> = None;
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
    fn check(&mut self, _path: &Path, _found: &[Found]) -> Result<Vec<String>> {
        Ok(Vec::new())
    }

    /// Notes which of [`AdapterMethod::PARTS`] a file has for a module, where its config does not say.
    fn note_parts(&mut self, _module: &str, _there: &[&'static str]) {}

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

    /// Whether its file leaves out [`AdapterMethod::SHARED`], which its config says how to draw.
    fn draws(&self) -> bool {
        false
    }

    /// What its file leaves out, on `model`.
    ///
    /// # Errors
    /// It does not fit the model.
    fn drawn(&self, _model: &dyn Model) -> Result<Tensors> {
        Ok(Tensors::new())
    }

    /// First values of part number `part` of the module number `module` of a fresh adapter, or of a shared tensor.
    fn start(&self, spec: &TensorSpec, part: usize, module: usize, seed: u64) -> Vec<f32>;

    /// What it does at the layer at the path `module`, whose tensors `load` puts on the device; `factor` multiplies its
    /// effect.
    ///
    /// # Errors
    /// Out of memory.
    fn on_layer<B: Backend>(&self, module: &str, load: &mut Loader<'_, B>, factor: f32) -> Result<Vec<LayerForm<B>>> {
        let (_, weight) = load.weight();
        let plan = self.plan(module, &weight, factor)?;
        forms(self.parts(module), Self::FROZEN, plan, load)
    }

    /// The same as pieces, which is all that a method needs that has no form of its own.
    ///
    /// # Errors
    /// Out of memory; it merges only.
    fn plan(&self, _module: &str, _weight: &dyn LayerWeight, _factor: f32) -> Result<Plan> {
        Ok(Plan::plain(Vec::new()))
    }

    /// First values of a fresh adapter's part that depend on the layer's `weight`; none where [`AdapterMethod::start`] has
    /// them.
    ///
    /// # Errors
    /// Out of memory.
    fn start_from(&self, _part: &str, _weight: &dyn LayerWeight) -> Result<Option<Vec<f32>>> {
        Ok(None)
    }

    /// What it does in the attention of all layers, with tensors of its own that belong to no module.
    ///
    /// # Errors
    /// Out of memory.
    fn in_attention<B: Backend>(&self, _load: &mut Loader<'_, B>) -> Result<Option<Prefix>> {
        Ok(None)
    }

    /// What merging it makes of the layer `[out, in]` at the path `module`; none where no other weight of the layer does the same.
    fn fold(&self, module: &str, layer: [usize; 2], tensors: &Tensors, factor: f32) -> Option<Box<dyn Fold>> {
        let plan = self.plan(module, &NoWeight(layer), factor).ok()?;
        fold(self.parts(module), &plan, module, tensors, layer)
    }

    /// How many of the first rows of its shared tensors training leaves as they are.
    fn fixed_rows(&self) -> usize {
        0
    }

    /// Why an adapter of it cannot be trained further, if it cannot.
    fn is_final(&self) -> Option<&'static str> {
        None
    }

    /// The budget of ranks to which training brings it, if there is one.
    fn budget(&self) -> Option<Budget> {
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
    fn targets(&self) -> &[String] {
        &[]
    }

    /// Names the layers that it adapts, where the config named them by an expression.
    fn set_targets(&mut self, _targets: Vec<String>) {}

    /// Its keys of a config, those left out that [`super::peft`] fills in for all methods: an object.
    fn write(&self) -> Value;

    /// What it is, in a few words, and the same by keys: an object.
    fn describe(&self) -> (String, Value);
}

/// The layers that a method adapts, where a field of it names them.
macro_rules! targets_in {
    ($($field:tt)+) => {
        fn targets(&self) -> &[String] {
            &self.$($field)+
        }

        fn set_targets(&mut self, targets: Vec<String>) {
            self.$($field)+ = targets;
        }
    };
}
pub(super) use targets_in;

/// The path of the head.
pub(super) const HEAD: &str = "lm_head";
/// The path of the embedding.
pub(super) const EMBEDDING: &str = "model.embed_tokens";

/// The number of the model's layer that the path of a module or tensor is in, if it is in one.
pub(crate) fn layer_of(path: &str) -> Option<usize> {
    path.split('.').find_map(|part| part.parse().ok())
}

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

/// The modules that `targets` name of the parameter `spec`: a tied head is the embedding's parameter, but not its module.
pub(super) fn paths_of<'m>(model: &dyn Model, spec: &'m ParamSpec, targets: &[String]) -> Vec<&'m str> {
    if spec.role != Role::Embedding {
        return vec![spec.module()];
    }
    let named = |path: &str| targets.iter().any(|t| path == t || path.ends_with(&format!(".{t}")));
    let mut paths = if named(EMBEDDING) { vec![EMBEDDING] } else { Vec::new() };
    if model.config().tied_head && (named(HEAD) || paths.is_empty()) {
        paths.push(HEAD);
    }
    paths
}

/// Linear layers that `targets` name, and the embedding and the head if they do so, which they do not mean by `all`.
///
/// # Errors
/// A target that names none; those that would are listed.
pub(crate) fn with_embedding(model: &dyn Model, targets: &[String]) -> Result<Vec<Param>> {
    let names = |target: &String, path: &str| path == target || path.ends_with(&format!(".{target}"));
    let outside = |target: &&String| [EMBEDDING, HEAD].iter().any(|path| names(target, path));
    let (ends, inner): (Vec<&String>, Vec<&String>) = targets.iter().partition(outside);
    let inner: Vec<String> = inner.into_iter().cloned().collect();
    let beside: Vec<&str> = [EMBEDDING, HEAD].into_iter().filter(|path| layer_at(model, path).is_some()).collect();
    let mut layers = if inner.is_empty() { Vec::new() } else { layers_named(model.params(), &inner, &beside)? };
    for end in ends {
        let path = if names(end, HEAD) { HEAD } else { EMBEDDING };
        let Some(at) = layer_at(model, path) else {
            let got = format!("`{end}`, which this `{}` calls otherwise", model.config().model_type);
            return Err(Error::config("targets", "layers of the model", got));
        };
        if !layers.contains(&at) {
            layers.push(at);
        }
    }
    Ok(layers)
}

/// Linear layers that `targets` name.
///
/// # Errors
/// A target that names none; those that would are listed.
pub(crate) fn target_layers(params: &[ParamSpec], targets: &[String]) -> Result<Vec<Param>> {
    layers_named(params, targets, &[])
}

/// The same where the modules `beside`, which are no such layers, could have been named as well.
fn layers_named(params: &[ParamSpec], targets: &[String], beside: &[&str]) -> Result<Vec<Param>> {
    let linears = || params.iter().filter(|p| p.role == Role::Linear);
    let named = |p: &ParamSpec, target: &str| {
        target == "all" || p.module() == target || p.module().ends_with(&format!(".{target}"))
    };
    for target in targets {
        if !linears().any(|p| named(p, target)) {
            let mut known: Vec<&str> = linears().filter_map(|p| p.module().rsplit('.').next()).collect();
            known.sort_unstable();
            known.dedup();
            let beside: Vec<&str> = beside.iter().filter_map(|path| path.rsplit('.').next()).collect();
            let beside = match beside[..] {
                [] => String::new(),
                _ => format!(", or `{}` beside them, which `all` leaves out", beside.join("` and `")),
            };
            let expected = format!("`all` or some of `{}`{beside}", known.join("`, `"));
            return Err(Error::config("targets", expected, target));
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

/// A fresh adapter of a method whose config is `config`, of settings that have names of their own, and the options among
/// `settings`, which are keys of PEFT's; with the layers that it is for, all where nobody named any.
///
/// # Errors
/// A target names no layer, or the method does not take an option.
pub(super) fn begin_with<M: AdapterMethod>(
    config: &[(&str, Value)],
    settings: &Settings,
    model: &dyn Model,
) -> Result<(M, Vec<Param>)> {
    let auto = settings.targets == [AUTO];
    let all = ["all".to_owned()];
    let layers = target_layers(model.params(), if auto { &all } else { &settings.targets })?;
    let own: Map<String, Value> = config.iter().map(|(key, value)| ((*key).to_owned(), value.clone())).collect();
    for key in settings.options.keys() {
        let known = M::KEYS.iter().any(|(k, used, _)| k == key && *used == Use::Honoured);
        if !known || own.contains_key(key) || COMMONLY_READ.contains(&key.as_str()) {
            let can = M::KEYS.iter().filter(|(k, used, _)| *used == Use::Honoured && !own.contains_key(*k));
            let can: Vec<&str> = can.map(|(k, ..)| *k).filter(|k| !COMMONLY_READ.contains(k)).collect();
            let can = if can.is_empty() { "no option".to_owned() } else { format!("some of `{}`", can.join("`, `")) };
            return Err(Error::config("options", format!("{can} with the method {}", M::NAME), key));
        }
    }
    let config: Map<String, Value> = own.into_iter().chain(settings.options.clone()).collect();
    let mut method = M::read(&Keys::of_settings(&config, M::KEYS))?;
    method.set_targets(last_parts(model, &layers));
    Ok((method, layers))
}

/// Keys that choose layers or tell of them, which is no matter of settings, or which these have under names of their own.
const COMMONLY_READ: [&str; 10] = [
    "bias",
    "ensure_weight_tying",
    "exclude_modules",
    "layers_pattern",
    "layers_to_transform",
    "rank_pattern",
    "target_modules",
    "target_parameters",
    "total_step",
    "trainable_token_indices",
];

/// Those of `options` with the values that `config` has.
pub(super) fn options_of(options: &Map<String, Value>, config: &Value) -> Map<String, Value> {
    options.keys().filter_map(|key| Some((key.clone(), config.get(key)?.clone()))).collect()
}

/// Refuses a layer of `side` inputs or outputs which `parts`, a number of blocks or of columns in one, does not divide.
///
/// # Errors
/// It does not.
pub(super) fn check_divides(module: &str, side: usize, parts: usize, what: &str) -> Result<()> {
    if parts > 0 && side > 0 && side.is_multiple_of(parts) {
        return Ok(());
    }
    let message = format!(
        "expected a layer whose sides `{what}`, `{parts}`, divides, got one of {side}; use the base that the adapter was \
         trained on"
    );
    Err(Error::new(ErrorCode::AdapterMismatch, format!("module `{module}`"), message))
}
