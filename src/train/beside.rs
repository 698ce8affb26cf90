//! Adapters of other methods that are trained together with the run's own, each with settings of its method.

use super::TrainConfig;
use super::auto::usual_rate;
use crate::adapter::{
    AUTO, AdapterFile, Adapters, Kind, Learned, Method, Replacements, Settings, TensorSpec, begin, fresh,
};
use crate::base::Base;
use crate::error::{Error, ErrorCode, Result};
use pocketlora_kernels::Backend;
use pocketlora_models::Param;
use std::path::PathBuf;

/// One of them, before it has values.
pub(super) struct Companion {
    pub method: Method,
    pub settings: Settings,
    pub specs: Vec<TensorSpec>,
    /// Tensors that stand in for parts of the base, in training.
    pub learned: Vec<Learned>,
    kept: Replacements,
    /// Paths of the modules that it adapts.
    adapted: Vec<String>,
    /// Its learning rate over the run's.
    pub rate: f32,
}

impl TrainConfig {
    /// Refuses methods that cannot be trained together, and what only one method alone can be trained with.
    ///
    /// # Errors
    /// The first of them.
    pub(super) fn check_beside(&self) -> Result<()> {
        let mut there = vec![self.method];
        for kind in &self.beside {
            if !Kind::TOGETHER.contains(kind) {
                let known: Vec<String> = Kind::TOGETHER.iter().map(|kind| kind.key()).collect();
                return Err(Error::config("beside", format!("some of `{}`", known.join("`, `")), kind.key()));
            }
            if let Some((other, why)) = there.iter().find_map(|other| Some((other, kind.clash(*other)?))) {
                let message = format!(
                    "expected methods that can be trained together, got `{}` and `{}`: {why}; leave one of the two out",
                    other.key(),
                    kind.key()
                );
                return Err(Error::new(ErrorCode::Config, "setting `beside`", message));
            }
            there.push(*kind);
        }
        let alone = [("relora", self.relora.is_some()), ("layers-at-once", self.layers_at_once.is_some())];
        match alone.iter().find(|(_, on)| *on && !self.beside.is_empty()) {
            Some((name, _)) => Err(Error::config(name, "one method alone, without `beside`", self.beside[0].key())),
            None => Ok(()),
        }
    }

    /// All methods of the run, its own first.
    pub(crate) fn kinds(&self) -> impl Iterator<Item = Kind> {
        std::iter::once(self.method).chain(self.beside.iter().copied())
    }

    /// Settings for an adapter of `kind` in this run: of several, each takes the options that it knows. Those beside the first
    /// are on the layers that are usual for them, but that a LoRA beside a method without targets takes the run's.
    pub(super) fn adapter_of(&self, kind: Kind) -> Result<Settings> {
        let mut settings = self.adapter();
        if self.beside.is_empty() {
            return Ok(settings);
        }
        if let Some(key) = settings.options.keys().find(|key| !self.kinds().any(|kind| kind.knows(key))) {
            return Err(Error::config("options", "a key that one of the run's methods has", key));
        }
        settings.options.retain(|key, _| kind.knows(key));
        if kind != self.method {
            if kind != Kind::Lora {
                settings.targets = vec![AUTO.to_owned()];
            } else if self.method.reads("targets") {
                settings.targets = vec!["all".to_owned()];
            }
            settings.rank_pattern.clear();
            settings.alpha_pattern.clear();
        }
        Ok(settings)
    }
}

impl Companion {
    /// Those of a fresh run, beside its `first` adapter.
    ///
    /// # Errors
    /// A method does not fit the model or the first one.
    pub fn all<B: Backend>(config: &TrainConfig, base: &Base<B>, first: &Method) -> Result<Vec<Self>> {
        if !config.beside.is_empty() {
            check_saved_as_trained(first)?;
        }
        config.beside.iter().map(|kind| Self::begin(*kind, config, base)).collect()
    }

    fn begin<B: Backend>(kind: Kind, config: &TrainConfig, base: &Base<B>) -> Result<Self> {
        let (model, settings) = (base.model.as_ref(), config.adapter_of(kind)?);
        let (method, layers) = kind.begin(&settings, model)?;
        check_saved_as_trained(&method)?;
        if let Some(init) = method.begins_with() {
            let expected = "`true` or `gaussian` for a LoRA beside another method";
            return Err(Error::config("init-lora-weights", expected, init.name()));
        }
        let specs = method.tensors(model, |p: Param| layers.contains(&p))?;
        // Biases and rows of tokens are the first one's.
        let own = Settings { bias: "none".to_owned(), trainable_token_indices: Vec::new(), ..settings.clone() };
        let kept = fresh(base, &method, &own)?;
        let adapted: Vec<String> = specs.iter().filter_map(|s| kind.module_of(&s.name)).map(str::to_owned).collect();
        let learned = kept.learned(kind, model, &adapted)?;
        let hidden = model.config().hidden_size;
        let rate = usual_rate(kind, hidden) / usual_rate(config.method, hidden);
        Ok(Self { method, settings, specs, learned, kept, adapted, rate })
    }

    /// Whether the tensor `name` is its own.
    pub fn owns(&self, name: &str) -> bool {
        self.specs.iter().chain(self.learned.iter().map(|learned| &learned.spec)).any(|spec| spec.name == name)
    }

    /// It with its first values, as the file of `first` has them beside itself.
    ///
    /// # Errors
    /// A text that it begins as has no tokens; out of memory.
    pub fn file<'i, B: Backend>(
        &self,
        base: &Base<B>,
        first: &AdapterFile,
        prompt_ids: Option<&[u32]>,
        texts: impl Iterator<Item = &'i [u32]>,
        seed: u64,
    ) -> Result<AdapterFile> {
        let mut tensors = self.method.fresh(&self.specs, base, seed)?;
        begin(base, &self.method, &mut tensors, prompt_ids, texts, seed)?;
        let mut file = AdapterFile::new(PathBuf::new(), self.method.clone(), tensors);
        (file.base, file.base_mark) = (first.base.clone(), first.base_mark.clone());
        Ok(file)
    }

    /// Attaches what stands in for parts of the base, and says so in `file`.
    ///
    /// # Errors
    /// Out of memory.
    pub fn attach_learned<B: Backend>(
        &self,
        base: &Base<B>,
        adapters: &mut Adapters<B>,
        file: &mut AdapterFile,
    ) -> Result<()> {
        adapters.attach_learned(base, &self.learned, Some((&self.kept, self.method.kind(), &self.adapted)))?;
        file.replaced = self.kept.clone();
        // As of the first one: what is trained is on the device.
        let method = &self.method;
        file.tensors.retain(|name, _| method.is_frozen(name));
        Ok(())
    }
}

/// Refuses `method` where training makes something else of its tensors than what is saved.
///
/// # Errors
/// It does.
fn check_saved_as_trained(method: &Method) -> Result<()> {
    if !method.is_trained_alone() {
        return Ok(());
    }
    if let (Kind::Lora, Some(init)) = (method.kind(), method.begins_with()) {
        let expected = "a beginning that takes nothing from the weights, where methods are trained `beside` each other";
        return Err(Error::config("init-lora-weights", expected, init.name()));
    }
    let expected = "a method whose tensors are saved as they are trained, where others are trained `beside` it";
    Err(Error::config("method", expected, method.kind().key()))
}

/// Refuses to go on from `file` where it has others beside it.
///
/// # Errors
/// It has, or others are asked for.
pub(super) fn check_init(config: &TrainConfig, file: &AdapterFile) -> Result<()> {
    file.check_alone("a run goes on from one adapter")?;
    match config.beside.first() {
        Some(kind) => {
            let message =
                format!("expected none for a run from an adapter, got `{}`; begin without `--init`", kind.key());
            Err(Error::new(ErrorCode::Config, "setting `beside`", message))
        }
        None => Ok(()),
    }
}
