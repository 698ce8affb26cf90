//! What an adapter method is to the rest of the program: one trait, which a method's file implements, and the enum of
//! all methods. Files, training, checkpoints and the memory plan know a method by this trait alone.

use super::form::{LayerForm, Prefix};
use super::held::Loader;
use super::peft::{Found, KeyUse, Keys};
use super::tensor::{Stored, TensorSpec};
use crate::error::{Error, Result};
use pocketlora_kernels::Backend;
use pocketlora_models::{Model, Param, ParamSpec, Role};
use serde_json::{Map, Value};
use std::path::Path;

/// As a target: the layers that PEFT adapts by default with the method, in the model's family.
pub(crate) const AUTO: &str = "auto";

/// What somebody asks of a fresh adapter, whatever its method; each method reads some of it ([`Method::settings`]).
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
    /// Ends of its tensors' names behind a module's path, in the order in which they are made.
    const PARTS: &'static [&'static str];
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

    /// Shapes of its parts for the layer `[out, in]` at the path `module`, in the order of [`AdapterMethod::PARTS`].
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

/// Makes of a list of methods the enum of them, with the trait's methods.
macro_rules! methods {
    ($($(#[$doc:meta])* $name:ident),+ $(,)?) => {
        /// An adapter's method with its settings.
        #[derive(Clone, Debug, PartialEq)]
        #[non_exhaustive]
        pub enum Method {
            $($(#[$doc])* $name($name)),+
        }

        /// The name of a method, as a run's settings have it.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
        #[serde(rename_all = "kebab-case")]
        #[non_exhaustive]
        pub enum Kind {
            $($(#[$doc])* $name),+
        }

        impl Kind {
            /// All methods.
            pub const ALL: &'static [Self] = &[$(Self::$name),+];

            /// The method that PEFT calls `peft_type`.
            pub(super) fn of_peft(peft_type: &str) -> Option<Self> {
                Self::ALL.iter().copied().find(|kind| kind.peft_type() == peft_type)
            }

            /// `peft_type` in PEFT's configs.
            #[must_use]
            pub fn peft_type(self) -> &'static str {
                match self { $(Self::$name => $name::PEFT_TYPE),+ }
            }

            /// For people.
            #[must_use]
            pub fn name(self) -> &'static str {
                match self { $(Self::$name => $name::NAME),+ }
            }

            /// See [`AdapterMethod::KEYS`].
            pub(super) fn keys(self) -> &'static [KeyUse] {
                match self { $(Self::$name => $name::KEYS),+ }
            }

            /// See [`AdapterMethod::PARTS`].
            pub(super) fn parts(self) -> &'static [&'static str] {
                match self { $(Self::$name => $name::PARTS),+ }
            }

            /// See [`AdapterMethod::SHARED`].
            pub(super) fn shared(self) -> &'static [&'static str] {
                match self { $(Self::$name => $name::SHARED),+ }
            }

            /// See [`AdapterMethod::HAS_STRENGTH`].
            pub(super) fn has_strength(self) -> bool {
                match self { $(Self::$name => $name::HAS_STRENGTH),+ }
            }

            /// See [`AdapterMethod::ADDS_UP`].
            pub(super) fn adds_up(self) -> bool {
                match self { $(Self::$name => $name::ADDS_UP),+ }
            }

            /// In what type its tensors are saved.
            #[must_use]
            pub fn stored(self) -> Stored {
                match self { $(Self::$name => $name::STORED),+ }
            }

            /// Keys of a run's settings that an adapter of it decides.
            #[must_use]
            pub fn decides(self) -> &'static [&'static str] {
                match self { $(Self::$name => $name::SETTINGS),+ }
            }

            /// Whether a run with it reads the setting `key` of adapters.
            #[must_use]
            pub fn reads(self, key: &str) -> bool {
                let in_training = match self { $(Self::$name => $name::IN_TRAINING),+ };
                self.decides().contains(&key) || in_training.contains(&key)
            }

            /// Reads the method's part of a config.
            pub(super) fn read(self, keys: &Keys<'_>) -> Result<Method> {
                match self { $(Self::$name => $name::read(keys).map(Method::$name)),+ }
            }

            /// A fresh adapter for `model`, with the layers that it is for.
            ///
            /// # Errors
            /// A setting does not fit the model.
            pub(crate) fn begin(self, settings: &Settings, model: &dyn Model) -> Result<(Method, Vec<Param>)> {
                match self { $(Self::$name => $name::begin(settings, model).map(|(m, at)| (Method::$name(m), at))),+ }
            }
        }

        impl Method {
            /// Its name.
            #[must_use]
            pub fn kind(&self) -> Kind {
                match self { $(Self::$name(_) => Kind::$name),+ }
            }

            pub(super) fn check(&mut self, path: &Path, found: &[Found]) -> Result<Vec<String>> {
                match self { $(Self::$name(m) => m.check(path, found)),+ }
            }

            pub(super) fn shapes(&self, module: &str, layer: [usize; 2]) -> Vec<Vec<usize>> {
                match self { $(Self::$name(m) => m.shapes(module, layer)),+ }
            }

            pub(super) fn shared(&self, model: &dyn Model) -> Result<Vec<TensorSpec>> {
                match self { $(Self::$name(m) => m.shared(model)),+ }
            }

            pub(super) fn start(&self, spec: &TensorSpec, part: usize, module: usize, seed: u64) -> Vec<f32> {
                match self { $(Self::$name(m) => m.start(spec, part, module, seed)),+ }
            }

            pub(super) fn on_layer<B: Backend>(
                &self,
                module: &str,
                load: &mut Loader<'_, B>,
                factor: f32,
            ) -> Result<LayerForm<B>> {
                match self { $(Self::$name(m) => m.on_layer(module, load, factor)),+ }
            }

            pub(super) fn in_attention<B: Backend>(&self, load: &mut Loader<'_, B>) -> Result<Option<Prefix>> {
                match self { $(Self::$name(m) => m.in_attention(load)),+ }
            }

            /// Why an adapter of it cannot be trained further, if it cannot.
            pub(crate) fn is_final(&self) -> Option<&'static str> {
                match self { $(Self::$name(m) => m.is_final()),+ }
            }

            /// How the tensor `name` is moved in training.
            #[must_use]
            pub fn group(&self, name: &str, settings: &Settings) -> Group {
                match self { $(Self::$name(m) => m.group(name, settings)),+ }
            }

            /// `settings` with what the adapter has decided.
            #[must_use]
            pub fn settings(&self, settings: Settings) -> Settings {
                match self { $(Self::$name(m) => m.settings(settings)),+ }
            }

            /// Takes from the settings of a run what belongs to training.
            pub fn set_in_training(&mut self, settings: &Settings) {
                match self { $(Self::$name(m) => m.set_in_training(settings)),+ }
            }

            /// Ends of the paths of the layers that it adapts.
            #[must_use]
            pub fn targets(&self) -> &[String] {
                match self { $(Self::$name(m) => m.targets()),+ }
            }

            pub(super) fn set_targets(&mut self, targets: Vec<String>) {
                match self { $(Self::$name(m) => m.set_targets(targets)),+ }
            }

            pub(super) fn write(&self, adapted: &[String]) -> Map<String, Value> {
                match self { $(Self::$name(m) => m.write(adapted)),+ }
            }

            /// What it is, in a few words, and the same by keys.
            #[must_use]
            pub fn describe(&self) -> (String, Map<String, Value>) {
                match self { $(Self::$name(m) => m.describe()),+ }
            }
        }

        #[cfg(test)]
        mod tests {
            use super::*;

            #[test]
            fn tables_of_keys_are_sorted_and_have_each_key_once() {
                for kind in Kind::ALL {
                    assert!(kind.keys().windows(2).all(|w| w[0].0 < w[1].0), "{}", kind.name());
                }
            }
        }
    };
}

use super::ia3::Ia3;
use super::lora::Lora;
use super::prefix_tuning::PrefixTuning;

methods! {
    /// Low-rank terms on linear layers.
    Lora,
    /// Scaled activations.
    Ia3,
    /// Keys and values before those of each text.
    PrefixTuning,
}

impl Kind {
    /// The path of the module that the tensor `name` adapts, if `name` is its first one.
    pub(super) fn module_of(self, name: &str) -> Option<&str> {
        name.strip_suffix(self.parts().first()?)?.strip_suffix('.')
    }
}

impl Default for Kind {
    /// What a run trains unless it is told otherwise.
    fn default() -> Self {
        Self::Lora
    }
}

/// The linear layer that an adapter's module path names; a tied head is the embedding's parameter.
pub(crate) fn layer_at(model: &dyn Model, path: &str) -> Option<Param> {
    let is_it = |spec: &ParamSpec| match spec.role {
        Role::Linear | Role::Head => spec.module() == path,
        Role::Embedding => path == "lm_head" && model.config().tied_head,
        Role::Vector | Role::Router => false,
    };
    model.params().iter().position(is_it).map(|i| Param(i as u32))
}

/// The module that an adapter names; a tied head is the embedding's parameter, but not its module.
pub(super) fn path_of(spec: &ParamSpec) -> &str {
    if spec.role == Role::Embedding { "lm_head" } else { spec.module() }
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

impl Method {
    /// Names and shapes of its tensors on `model`, layer by layer in the order of the model's parameters: those of the
    /// layers for which `adapts` holds.
    ///
    /// # Errors
    /// It does not fit the model.
    pub(crate) fn tensors(&self, model: &dyn Model, adapts: impl Fn(Param) -> bool) -> Result<Vec<TensorSpec>> {
        let mut specs = Vec::new();
        for (spec, _) in model.params().iter().zip(0..).filter(|(_, i)| adapts(Param(*i))) {
            let ([out, input], path) = ([spec.shape[0], spec.shape[1]], path_of(spec));
            for (part, shape) in self.kind().parts().iter().zip(self.shapes(path, [out, input])) {
                specs.push(TensorSpec { name: format!("{path}.{part}"), shape });
            }
        }
        specs.extend(self.shared(model)?);
        Ok(specs)
    }

    /// First values of a fresh adapter's tensors `specs`, as [`Method::tensors`] lists them.
    pub(crate) fn fresh(&self, specs: &[TensorSpec], seed: u64) -> super::Tensors {
        let parts = self.kind().parts().len().max(1);
        let one = |(i, spec): (usize, &TensorSpec)| {
            let data = self.start(spec, i % parts, i / parts, seed);
            (spec.name.clone(), super::HostTensor { shape: spec.shape.clone(), data })
        };
        specs.iter().enumerate().map(one).collect()
    }
}
