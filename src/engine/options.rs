//! How an engine is opened.

use crate::error::{Error, ErrorCode, Result};
use crate::exec::infer::Numbers;
use crate::tokenizer::SpecialText;
use pocketlora_kernels::{Arithmetic, CacheType, WorkType};
use std::path::PathBuf;

/// Arithmetic of inference.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum Precision {
    /// f32 everywhere, cache and adapters included.
    Exact,
    /// Cache and adapters in f16, products in bf16 where the CPU has fast ones.
    Bf16,
    /// Cache and adapters in f16, products with the base in 8 bits.
    #[default]
    Fast,
}

impl Precision {
    /// Of adapters in use.
    pub(super) fn adapters(self) -> WorkType {
        match self {
            Self::Exact => WorkType::F32,
            Self::Bf16 | Self::Fast => WorkType::F16,
        }
    }
}

/// What computes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum Device {
    /// The processor's cores.
    #[default]
    Cpu,
    /// A GPU. Not for models yet: opening one is refused.
    Vulkan,
}

impl Device {
    /// Refuses a device that models do not run on.
    pub(super) fn check(self) -> Result<()> {
        match self {
            Self::Cpu => Ok(()),
            Self::Vulkan => {
                let message = "`vulkan` runs single operations only, in tests; choose `cpu`";
                Err(Error::new(ErrorCode::Unsupported, "setting `device`", message))
            }
        }
    }
}

/// How to open an engine: the defaults, changed by the methods of the same names.
#[derive(Clone, Debug, Default)]
#[non_exhaustive]
pub struct Options {
    /// What computes.
    pub device: Device,
    /// Threads; 0 finds by measuring, at first use, how many serve best.
    pub threads: usize,
    /// Arithmetic.
    pub precision: Precision,
    /// Keys and values in 8 bits: half the memory of a long text, at a small cost in quality.
    pub int8_cache: bool,
    /// Most tokens of one text, prompt and answer together; what the model was made for if 0. Memory follows:
    /// [`Engine::context_bytes`](super::Engine::context_bytes) tells how much.
    pub context: usize,
    /// Most anonymous bytes that the model with one full chat may take, by [`Estimate`](super::Estimate): a model that takes
    /// more is refused before its weights are touched. None allows all.
    pub memory_budget: Option<u64>,
    /// A folder for copies that make things faster and can be made again at any time; none are kept without it.
    pub cache_dir: Option<PathBuf>,
    /// What others find the base by, as adapters name it: a repository on the hub, or a path. The folder, if not given.
    pub base_name: Option<String>,
    /// Leaves the tokenizer alone, which is tens of megabytes: for work on token ids, or for training, which opens it
    /// only while data is read. Answers end at the ids that `generation_config.json` and `config.json` name as ends.
    pub ids_only: bool,
    /// What becomes of special tokens that are written out in a text.
    pub special_text: SpecialText,
    /// Refuses adapters, attached or learned on from, whose files tell that they were trained on another base: by the hash
    /// of its content that Pocketlora's have, or by its name. Without it they are warned of.
    pub strict: bool,
}

impl Options {
    /// The defaults.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Sets [`Options::device`].
    #[must_use]
    pub fn device(self, device: Device) -> Self {
        Self { device, ..self }
    }

    /// Sets [`Options::threads`].
    #[must_use]
    pub fn threads(self, threads: usize) -> Self {
        Self { threads, ..self }
    }

    /// Sets [`Options::precision`].
    #[must_use]
    pub fn precision(self, precision: Precision) -> Self {
        Self { precision, ..self }
    }

    /// Sets [`Options::int8_cache`].
    #[must_use]
    pub fn int8_cache(self, int8_cache: bool) -> Self {
        Self { int8_cache, ..self }
    }

    /// Sets [`Options::context`].
    #[must_use]
    pub fn context(self, context: usize) -> Self {
        Self { context, ..self }
    }

    /// Sets [`Options::memory_budget`].
    #[must_use]
    pub fn memory_budget(self, bytes: u64) -> Self {
        Self { memory_budget: Some(bytes), ..self }
    }

    /// Sets [`Options::cache_dir`].
    #[must_use]
    pub fn cache_dir(self, dir: impl Into<PathBuf>) -> Self {
        Self { cache_dir: Some(dir.into()), ..self }
    }

    /// Sets [`Options::base_name`].
    #[must_use]
    pub fn base_name(self, name: impl Into<String>) -> Self {
        Self { base_name: Some(name.into()), ..self }
    }

    /// Sets [`Options::ids_only`].
    #[must_use]
    pub fn ids_only(self, ids_only: bool) -> Self {
        Self { ids_only, ..self }
    }

    /// Sets [`Options::special_text`].
    #[must_use]
    pub fn special_text(self, special_text: SpecialText) -> Self {
        Self { special_text, ..self }
    }

    /// Sets [`Options::strict`].
    #[must_use]
    pub fn strict(self, strict: bool) -> Self {
        Self { strict, ..self }
    }

    /// Refuses, before any file is opened, what no model can be opened with.
    pub(super) fn check(&self) -> Result<()> {
        self.device.check()?;
        check_threads(self.threads)
    }

    /// How numbers are kept and multiplied.
    pub(super) fn numbers(&self) -> Numbers {
        let (cache, arithmetic) = match self.precision {
            Precision::Exact => (CacheType::F32, Arithmetic::Exact),
            Precision::Bf16 => (CacheType::F16, Arithmetic::Bf16),
            Precision::Fast => (CacheType::F16, Arithmetic::Int8),
        };
        Numbers { cache: if self.int8_cache { CacheType::I8 } else { cache }, arithmetic }
    }
}

/// Refuses a number of threads that can only be a slip: more of them than cores only take turns.
///
/// # Errors
/// It is far above what the machine has.
pub fn check_threads(threads: usize) -> Result<()> {
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let most = (4 * cores).max(64);
    if threads > most {
        let expected =
            format!("at most {most} on this machine with its {cores} cores, or 0 to measure how many serve best");
        return Err(Error::config("threads", expected, threads));
    }
    Ok(())
}
