//! All adapter methods: a new one is its own file, and one line in the list below.

use super::encoder::Encoder;
use super::fold::Fold;
use super::forms::{LayerForm, Prefix};
use super::held::Loader;
use super::init::Init;
#[cfg(feature = "cli")]
use super::learned::norms_named;
#[cfg(feature = "cli")]
use super::method::with_embedding;
use super::method::{AdapterMethod, Budget, Group, Settings, layer_at, paths_of};
use super::methods::adalora::Adalora;
use super::methods::bd_lora::Bdlora;
use super::methods::beft::Beft;
use super::methods::boft::Boft;
use super::methods::bottleneck::Bottleneck;
use super::methods::c3a::C3a;
use super::methods::cartridge::Cartridge;
use super::methods::deft::Deft;
use super::methods::delora::Delora;
use super::methods::delta_lora::DeltaLora;
use super::methods::dora::Dora;
use super::methods::dylora::Dylora;
use super::methods::fourierft::Fourierft;
use super::methods::glora::Glora;
use super::methods::gralora::Gralora;
use super::methods::hira::Hira;
use super::methods::hra::Hra;
use super::methods::hydra::Hydra;
use super::methods::ia3::Ia3;
use super::methods::ln_tuning::LnTuning;
use super::methods::loha::Loha;
use super::methods::lokr::Lokr;
use super::methods::lora::Lora;
use super::methods::lora_fa::LoraFa;
use super::methods::lora_xs::LoraXs;
use super::methods::melora::Melora;
use super::methods::miss::Miss;
use super::methods::multitask_prompt_tuning::MultitaskPromptTuning;
use super::methods::oft::Oft;
use super::methods::p_tuning::PTuning;
use super::methods::prefix_tuning::PrefixTuning;
use super::methods::prompt_tuning::PromptTuning;
use super::methods::pvera::Pvera;
use super::methods::road::Road;
use super::methods::shira::Shira;
use super::methods::sora::Sora;
use super::methods::supertuning::Supertuning;
use super::methods::trainable_tokens::TrainableTokens;
use super::methods::vera::Vera;
use super::peft::{Found, KeyUse, Keys};
#[cfg(test)]
use super::pieces::Plan;
use super::replaced::Replaced;
use super::tensor::{HostTensor, Stored, TensorSpec, Tensors};
use super::weight::{LayerWeight, Weight};
use crate::base::Base;
use crate::error::Result;
use pocketlora_kernels::Backend;
use pocketlora_models::{Model, Param};
use serde_json::Value;
use std::path::Path;

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
            pub(super) fn of_peft(peft_type: &str, asks: &dyn Fn(&str) -> bool) -> Option<Self> {
                let named = || Self::ALL.iter().copied().filter(|kind| kind.peft_type() == peft_type);
                let asked = named().find(|kind| kind.asked_by().is_some_and(asks));
                asked.or_else(|| named().find(|kind| kind.asked_by().is_none()))
            }

            fn asked_by(self) -> Option<&'static str> {
                match self { $(Self::$name => $name::ASKED_BY),+ }
            }

            /// See [`AdapterMethod::DIMENSIONS`].
            pub(super) fn dimensions(self) -> &'static [usize] {
                match self { $(Self::$name => $name::DIMENSIONS),+ }
            }

            /// See [`AdapterMethod::SHARED_DIMENSIONS`].
            pub(super) fn shared_dimensions(self) -> Option<usize> {
                match self { $(Self::$name => $name::SHARED_DIMENSIONS),+ }
            }

            /// See [`AdapterMethod::PLACES`].
            pub(super) fn places(self) -> Option<(&'static str, bool)> {
                match self { $(Self::$name => $name::PLACES),+ }
            }

            /// See [`AdapterMethod::FROZEN`].
            pub(super) fn frozen(self) -> &'static [&'static str] {
                match self { $(Self::$name => $name::FROZEN),+ }
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
            pub(crate) fn parts(self) -> &'static [&'static str] {
                match self { $(Self::$name => $name::PARTS),+ }
            }

            fn firsts(self) -> &'static [usize] {
                match self { $(Self::$name => $name::FIRSTS),+ }
            }

            /// See [`AdapterMethod::SHARED`].
            pub(crate) fn shared(self) -> &'static [&'static str] {
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

            /// See [`AdapterMethod::note_parts`].
            pub(super) fn note_parts(&mut self, module: &str, there: &[&'static str]) {
                match self { $(Self::$name(m) => m.note_parts(module, there)),+ }
            }

            /// See [`AdapterMethod::parts`].
            pub(super) fn parts(&self, module: &str) -> &'static [&'static str] {
                match self { $(Self::$name(m) => m.parts(module)),+ }
            }

            pub(super) fn shapes(&self, module: &str, layer: [usize; 2]) -> Vec<Vec<usize>> {
                match self { $(Self::$name(m) => m.shapes(module, layer)),+ }
            }

            pub(super) fn shared(&self, model: &dyn Model) -> Result<Vec<TensorSpec>> {
                match self { $(Self::$name(m) => m.shared(model)),+ }
            }

            /// See [`AdapterMethod::draws`].
            pub(super) fn draws(&self) -> bool {
                match self { $(Self::$name(m) => m.draws()),+ }
            }

            /// See [`AdapterMethod::drawn`].
            pub(super) fn drawn(&self, model: &dyn Model) -> Result<Tensors> {
                match self { $(Self::$name(m) => m.drawn(model)),+ }
            }

            pub(super) fn start(&self, spec: &TensorSpec, part: usize, module: usize, seed: u64) -> Vec<f32> {
                match self { $(Self::$name(m) => m.start(spec, part, module, seed)),+ }
            }

            pub(super) fn on_layer<B: Backend>(
                &self,
                module: &str,
                load: &mut Loader<'_, B>,
                factor: f32,
            ) -> Result<Vec<LayerForm<B>>> {
                match self { $(Self::$name(m) => m.on_layer(module, load, factor)),+ }
            }

            pub(super) fn in_attention<B: Backend>(&self, load: &mut Loader<'_, B>) -> Result<Option<Prefix>> {
                match self { $(Self::$name(m) => m.in_attention(load)),+ }
            }

            pub(super) fn fold(
                &self,
                module: &str,
                layer: [usize; 2],
                tensors: &Tensors,
                factor: f32,
            ) -> Option<Box<dyn Fold>> {
                match self { $(Self::$name(m) => m.fold(module, layer, tensors, factor)),+ }
            }

            #[cfg(test)]
            pub(super) fn plan(&self, module: &str, weight: &dyn LayerWeight, factor: f32) -> Result<Plan> {
                match self { $(Self::$name(m) => m.plan(module, weight, factor)),+ }
            }

            fn start_from(&self, part: &str, weight: &dyn LayerWeight) -> Result<Option<Vec<f32>>> {
                match self { $(Self::$name(m) => m.start_from(part, weight)),+ }
            }

            /// How many of the first rows of its shared tensors training leaves as they are.
            #[must_use]
            pub fn fixed_rows(&self) -> usize {
                match self { $(Self::$name(m) => m.fixed_rows()),+ }
            }

            /// Why an adapter of it cannot be trained further, if it cannot.
            pub(crate) fn is_final(&self) -> Option<&'static str> {
                match self { $(Self::$name(m) => m.is_final()),+ }
            }

            /// The budget of ranks to which training brings it, if there is one.
            #[must_use]
            pub fn budget(&self) -> Option<Budget> {
                match self { $(Self::$name(m) => m.budget()),+ }
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

            pub(super) fn write(&self) -> Value {
                match self { $(Self::$name(m) => m.write()),+ }
            }

            /// What it is, in a few words, and the same by keys.
            #[must_use]
            pub fn describe(&self) -> (String, Value) {
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

methods! {
    /// Low-rank terms on linear layers.
    Lora,
    /// Scaled activations.
    Ia3,
    /// Keys and values before those of each text.
    PrefixTuning,
    /// The same, begun as a text's.
    Cartridge,
    /// Norms.
    LnTuning,
    /// Rows of single tokens.
    TrainableTokens,
    /// Embeddings before those of each text.
    PromptTuning,
    /// The same, made by a network.
    PTuning,
    /// Low-rank terms beside lengths of rows.
    Dora,
    /// Trained scales of fixed low-rank terms.
    Vera,
    /// Rows that inputs share.
    Miss,
    /// Low-rank terms with singular values.
    Adalora,
    /// Low-rank terms of a given strength.
    Delora,
    /// Products of low-rank terms, element by element.
    Loha,
    /// Outputs turned in pairs.
    Road,
    /// Biases.
    Beft,
    /// Low-rank terms of blocks.
    Gralora,
    /// Reflected inputs.
    Hra,
    /// Turned inputs.
    Oft,
    /// Kronecker terms.
    Lokr,
    /// Sparse terms.
    Shira,
    /// Sparse terms, with low-rank ones beside them.
    Supertuning,
    /// Low-rank terms of which one half is trained.
    LoraFa,
    /// Low-rank terms with blocks.
    Bdlora,
    /// Mixed singular vectors of the weights.
    LoraXs,
    /// Low-rank terms of all ranks up to one.
    Dylora,
    /// Low-rank terms whose ranks close.
    Sora,
    /// Small low-rank terms beside each other.
    Melora,
    /// Low-rank terms beside a layer and behind it.
    Hydra,
    /// Narrow networks behind layers or beside them.
    Bottleneck,
    /// Low-rank terms with which the weight moves.
    DeltaLora,
    /// Circulant terms.
    C3a,
    /// Terms with the weight itself in them.
    Hira,
    /// Inputs turned in blocks of columns near and far.
    Boft,
    /// Terms of a few waves.
    Fourierft,
    /// Embeddings before those of each text, by the task.
    MultitaskPromptTuning,
    /// The means of scales that were drawn.
    Pvera,
    /// Terms with the weight in them beside others.
    Glora,
    /// Parts of the weight's outputs put in place of others.
    Deft,
}

impl Kind {
    /// The path of the module that the tensor `name` adapts, if `name` is its first one.
    pub(crate) fn module_of(self, name: &str) -> Option<&str> {
        let ends = |first: &usize| name.strip_suffix(self.parts().get(*first)?)?.strip_suffix('.');
        self.firsts().iter().find_map(ends)
    }
}

impl Kind {
    /// Refuses names of layers, or of norms, that `model` does not have.
    ///
    /// # Errors
    /// The first of them, with those that it has.
    #[cfg(feature = "cli")]
    pub(crate) fn check_targets(self, model: &dyn Model, targets: &[String]) -> Result<()> {
        match self {
            Self::LnTuning => norms_named(model, targets).map(|_| ()),
            _ => with_embedding(model, targets).map(|_| ()),
        }
    }
}

impl Default for Kind {
    /// What a run trains unless it is told otherwise.
    fn default() -> Self {
        Self::Lora
    }
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
            let [out, input] = [spec.shape[0], spec.shape[1]];
            for path in paths_of(model, spec, self.targets()) {
                for (part, shape) in self.parts(path).iter().zip(self.shapes(path, [out, input])) {
                    specs.push(TensorSpec { name: format!("{path}.{part}"), shape });
                }
            }
        }
        specs.extend(self.shared(model)?);
        Ok(specs)
    }

    /// The network that makes its virtual tokens, while it is in training.
    pub(super) fn encoder<B: Backend>(&self, load: &mut Loader<'_, B>) -> Result<Option<Encoder>> {
        match self {
            Self::PTuning(own) if own.encodes => Encoder::load(load).map(Some),
            _ => Ok(None),
        }
    }

    /// Whether what is trained is not what a file has, see [`Method::finish`].
    pub(crate) fn converts(&self) -> bool {
        match self {
            Self::PTuning(own) => own.encodes,
            Self::Lora(own) => own.init.is_taken_away(),
            Self::LoraXs(_)
            | Self::Dylora(_)
            | Self::Sora(_)
            | Self::Melora(_)
            | Self::Hydra(_)
            | Self::DeltaLora(_) => true,
            _ => false,
        }
    }

    /// Whether it wants to know what A and B are after so many steps; after none, that it forgets it.
    pub(crate) fn holds_at(&self, step: u64) -> bool {
        matches!(self, Self::DeltaLora(own) if step == 0 || step == own.start)
    }

    /// How it begins, where that is more than random numbers.
    pub(crate) fn begins_with(&self) -> Option<Init> {
        match self {
            Self::Lora(own) => Some(own.init).filter(|init| !matches!(init, Init::Plain | Init::Gaussian)),
            // It takes what that does.
            Self::LoraXs(_) => Some(Init::named("pissa").ok()?),
            _ => None,
        }
    }

    /// Makes of the tensors of training those that a file has.
    ///
    /// # Errors
    /// Out of memory.
    pub(crate) fn finish<B: Backend>(&mut self, tensors: &mut Tensors, base: &Base<B>) -> Result<()> {
        match self {
            Self::PTuning(own) => own.finish(tensors),
            Self::Lora(own) => own.finish(tensors),
            Self::LoraXs(own) => *self = Self::Lora(own.finish(tensors)),
            Self::Dylora(own) => *self = Self::Lora(own.lora.clone()),
            Self::Sora(own) => *self = Self::Lora(own.finish(tensors)),
            Self::Melora(own) => *self = Self::Lora(own.finish(tensors)),
            Self::Hydra(own) => *self = Self::Lora(own.finish(tensors, base)?),
            Self::DeltaLora(own) => *self = Self::Lora(own.finish(tensors)),
            _ => {}
        }
        Ok(())
    }

    /// The tokens from whose last occurrence in a text on it works, if it does so there only.
    pub(crate) fn invocation(&self) -> Option<&[u32]> {
        match self {
            Self::Lora(lora) => lora.invocation.as_deref(),
            _ => None,
        }
    }

    /// Whether the tensor `name` is never trained.
    #[must_use]
    pub fn is_frozen(&self, name: &str) -> bool {
        let is_it = |part: &&str| name == *part || name.strip_suffix(*part).is_some_and(|rest| rest.ends_with('.'));
        self.kind().frozen().iter().any(is_it)
    }

    /// First values of a fresh adapter's tensors `specs`, as [`Method::tensors`] lists them, on `base`.
    ///
    /// # Errors
    /// Out of memory.
    pub(crate) fn fresh<B: Backend>(&self, specs: &[TensorSpec], base: &Base<B>, seed: u64) -> Result<Tensors> {
        let replaced = Replaced::default();
        let (mut modules, mut part, mut layer) = (0, 0, None);
        let one = |spec: &TensorSpec| {
            // What belongs to no module counts as one.
            let module = self.kind().module_of(&spec.name);
            let first = self.kind().parts().is_empty() || module.is_some();
            (modules, part) = if first { (modules + 1, 0) } else { (modules, part + 1) };
            layer = module.map_or(layer, |path| layer_at(base.model.as_ref(), path));
            let known = match layer.filter(|_| !self.kind().shared().contains(&spec.name.as_str())) {
                Some(layer) => {
                    let weight = Weight { base, replaced: &replaced, layer, counts: false };
                    let names = self.kind().parts().iter().filter(|name| spec.name.ends_with(*name));
                    // The longest: one part's name may be the end of another's.
                    let name = names.max_by_key(|name| name.len()).copied().unwrap_or_default();
                    self.start_from(name, &weight)?
                }
                None => None,
            };
            let data = known.unwrap_or_else(|| self.start(spec, part, modules.max(1) - 1, seed));
            Ok((spec.name.clone(), HostTensor { shape: spec.shape.clone(), data }))
        };
        specs.iter().map(one).collect()
    }
}
