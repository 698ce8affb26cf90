//! The way in for every front end: an engine holds a model, and any number of chats and trainers work on it.

mod adapters;
mod auto;
mod cancel;
mod chat;
mod decoder;
mod embed;
mod estimate;
mod given;
mod lesson;
mod options;
mod pieces;
mod prune;
mod ranks;
mod reader;
mod router;
#[cfg(feature = "seal")]
mod sealed;
mod trainer;
mod transcript;

pub(crate) use adapters::AdapterSet;
#[cfg(feature = "cli")]
pub(crate) use adapters::of_another_base;
pub use adapters::{AdapterId, Attached};
pub use cancel::Cancel;
pub use chat::{Answer, Chat, Listener};
pub use decoder::Decoder;
pub use embed::Pooling;
pub use estimate::Estimate;
pub use given::GivenFile;
pub use lesson::{Begun, DATA, Lesson, LessonData, Start};
pub use options::{Device, Options, Precision, check_threads};
pub use prune::Pruned;
#[cfg(feature = "cli")]
pub(crate) use prune::looks;
pub use reader::Reader;
pub use router::{Pick, Routed};
#[cfg(feature = "cli")]
pub(crate) use router::{adapters_in, name_of};
pub use trainer::Trainer;
#[cfg(feature = "bench")]
pub(crate) use transcript::On;
pub(crate) use transcript::Transcript;

use crate::adapter::Adapters;
use crate::base::{Base, architecture};
use crate::error::{Error, ErrorCode, Result};
use crate::exec::infer::{Numbers, state_bytes};
use crate::format::foreign::no_tokenizer;
use crate::format::{Checkpoint, int8_head};
use crate::generate::{GENERATION_CONFIG, Recommended};
use crate::memory::{Peak, anonymous_bytes};
use crate::mmap::ReleasesFreed;
use crate::text::{Text, open_text};
use crate::tokenizer::{SpecialText, end_ids};
use crate::turn::Turn;
use adapters::Registry;
use pocketlora_kernels::cpu::Table;
use pocketlora_kernels::{Arithmetic, Cpu};
use pocketlora_models::Model;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, Once, PoisonError};
use std::time::Duration;
use tempfile::TempDir;

/// An open model. Clones are of the same one, and may be used from any thread.
///
/// Chats ([`Engine::chat`]) and trainers ([`Engine::trainer`]) on it take turns with the device: a chat for each token and
/// each chunk of a prompt, a trainer for each layer. So a chat answers, more slowly, while a trainer works.
#[derive(Clone)]
pub struct Engine(Arc<Shared>);

struct Shared {
    base: Arc<Base<Cpu>>,
    turn: Turn,
    dir: PathBuf,
    base_name: String,
    fingerprint: u64,
    mapped_bytes: u64,
    /// The model's own; none for work on ids only, or where there is no tokenizer.
    text: Option<Arc<Text>>,
    /// Asked for by [`Options::ids_only`].
    ids_only: bool,
    /// Asked for by [`Options::strict`].
    strict: bool,
    /// What ends an answer where there is no text, by the model's configuration.
    ends: Vec<u32>,
    /// Anonymous bytes that a text took when it was last loaded.
    text_bytes: AtomicU64,
    special_text: SpecialText,
    precision: Precision,
    numbers: Numbers,
    context: usize,
    /// Threads are to be chosen by measurement, once.
    calibration: Option<Once>,
    adapters: Mutex<Registry>,
    peak: Mutex<Peak>,
    /// Holds the small files of a model that was given by open files.
    _scratch: Option<TempDir>,
    _release: ReleasesFreed,
}

impl Engine {
    /// Maps the Hugging Face directory `dir`, which may be given by one of its files. A model without a tokenizer opens
    /// too, for work on token ids.
    ///
    /// # Errors
    /// A file is missing, broken or of an unsupported kind; the device is not supported; a setting is out of range.
    pub fn open(dir: &Path, options: &Options) -> Result<Self> {
        options.check()?;
        Self::of(Checkpoint::open(dir)?, options, None)
    }

    /// Opens `checkpoint`, whose small files lie in `scratch` where that is given.
    fn of(checkpoint: Checkpoint, options: &Options, scratch: Option<TempDir>) -> Result<Self> {
        let dir = checkpoint.dir().to_owned();
        // Nothing is read in, and no copy is made, of a model that then turns out not to run.
        architecture(&checkpoint)?;
        if let Some(budget) = options.memory_budget {
            Estimate::of_checkpoint(&checkpoint, options, None)?.check(budget, &dir)?;
        }
        let (text, text_bytes) =
            if options.ids_only { (None, 0) } else { measured(|| open_text(&dir, options.special_text))? };
        let ends = if text.is_none() { end_ids(&dir)? } else { Vec::new() };
        checkpoint.bring_in();
        let mut base = Base::load(Cpu::with_table(options.threads, Table::from_env()?), &checkpoint)?;
        let numbers = options.numbers();
        let mut mapped_bytes = checkpoint.mapped_bytes() as u64;
        if let (Arithmetic::Int8, Some(cache)) = (numbers.arithmetic, &options.cache_dir) {
            let name = &base.model.params()[base.model.head_param().0 as usize].name;
            if let Some((source, bytes)) = int8_head(&checkpoint, name, cache)? {
                base.set_int8_head(source)?;
                mapped_bytes += bytes;
            }
        }
        let made_for = base.model.config().max_positions;
        let text = text.map(Arc::new);
        let registry = Registry::new(&base, text.clone());
        Ok(Self(Arc::new(Shared {
            base: Arc::new(base),
            turn: Turn::default(),
            base_name: options.base_name.clone().unwrap_or_else(|| match &scratch {
                // The folder goes, and its name would tell nobody anything.
                Some(_) => String::new(),
                None => dir.to_string_lossy().into_owned(),
            }),
            dir,
            fingerprint: checkpoint.fingerprint(),
            mapped_bytes,
            text,
            ids_only: options.ids_only,
            strict: options.strict,
            ends,
            text_bytes: AtomicU64::new(text_bytes),
            special_text: options.special_text,
            precision: options.precision,
            numbers,
            context: if options.context == 0 { made_for } else { options.context.min(made_for) },
            calibration: (options.threads == 0).then(Once::new),
            adapters: Mutex::new(registry),
            peak: Mutex::default(),
            _scratch: scratch,
            _release: ReleasesFreed,
        })))
    }

    /// A conversation of its own, with all attached adapters until it chooses others.
    ///
    /// # Errors
    /// Out of memory.
    pub fn chat(&self) -> Result<Chat> {
        Chat::new(self)
    }

    /// How the model's answers are sampled where nobody says otherwise: as its `generation_config.json` recommends, or by
    /// its size, with a guard against loops. The command line's `chat` does; a new [`Chat`] takes the likeliest tokens,
    /// unguarded, until its [`Chat::sampling`] is set to this.
    ///
    /// # Errors
    /// The file is broken, or a setting in it is out of range.
    pub fn recommended(&self) -> Result<Recommended> {
        let path = self.0.dir.join(GENERATION_CONFIG);
        let bytes = match std::fs::read(&path) {
            Ok(bytes) => Some(bytes),
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => None,
            Err(e) => return Err(Error::io("read", &path, e)),
        };
        Recommended::read(bytes.as_deref(), &path, parameters(self.base().model.as_ref()))
    }

    /// The model's folder.
    #[must_use]
    pub fn dir(&self) -> &Path {
        &self.0.dir
    }

    /// Tokens of the longest text, prompt and answer together.
    #[must_use]
    pub fn context_tokens(&self) -> usize {
        self.0.context
    }

    /// Tokens of the longest text with `adapters`: those of a prefix take places, too.
    pub(crate) fn own_tokens(&self, adapters: &Adapters<Cpu>) -> usize {
        self.context_tokens().saturating_sub(adapters.virtual_tokens())
    }

    /// Whether [`Engine::context_tokens`] is less than the model was made for, by [`Options::context`].
    #[must_use]
    pub fn is_context_bound(&self) -> bool {
        self.0.context < self.0.base.model.config().max_positions
    }

    /// Bytes that a text of `tokens` tokens holds: of each layer the keys and values of all tokens, or of those in its window,
    /// or a state of fixed size. Memory grows in steps of half of it, and a long prompt takes some more while it is read.
    #[must_use]
    pub fn context_bytes(&self, tokens: usize) -> u64 {
        state_bytes(self.0.base.model.states(), self.0.numbers.cache, tokens)
    }

    /// How many tokens there are with what attached adapters bring: rows of the embedding and of the head.
    #[must_use]
    pub fn vocabulary(&self) -> usize {
        self.all().adapters.replaced().vocabulary(self.base())
    }

    /// Bytes of weights mapped from files: clean pages that the system may drop.
    #[must_use]
    pub fn mapped_bytes(&self) -> u64 {
        self.0.mapped_bytes + self.all().adapters.replaced().mapped_bytes()
    }

    /// Highest anonymous memory seen at the ends of answers, in bytes.
    #[must_use]
    pub fn peak_anonymous_bytes(&self) -> Option<u64> {
        lock(&self.0.peak).bytes()
    }

    /// The model's tokenizer and chat template, or those that an attached adapter brings.
    ///
    /// # Errors
    /// The model has none, or it was opened for work on ids only.
    pub fn text(&self) -> Result<Arc<Text>> {
        self.text_of(&self.all())
    }

    fn text_of(&self, set: &AdapterSet) -> Result<Arc<Text>> {
        set.text.clone().ok_or_else(|| {
            if !self.0.ids_only {
                return no_tokenizer(&self.0.dir);
            }
            let message = "expected an engine with a tokenizer, got one that was opened for token ids only; open it without \
                           `Options::ids_only`, or give it ids";
            Error::new(ErrorCode::Config, "text", message)
        })
    }

    /// The error of a text at `place` that needs so many tokens of the context, where there are fewer.
    pub(crate) fn context_full(&self, place: &str, needed: usize, available: usize, next: &str) -> Error {
        let more = if self.is_context_bound() { ", or open the model with a larger `Options::context`" } else { "" };
        let message = format!("expected at most the context's {available} tokens, got `{needed}`; {next}{more}");
        Error::new(ErrorCode::ContextFull, place, message)
    }

    /// The frozen base, for code that drives executors itself.
    pub(crate) fn base(&self) -> &Arc<Base<Cpu>> {
        &self.0.base
    }

    /// The device's queue.
    pub(crate) fn turn(&self) -> &Turn {
        &self.0.turn
    }

    /// How numbers are kept and multiplied.
    pub(crate) fn numbers(&self) -> Numbers {
        self.0.numbers
    }

    /// At the first work, unless a number was given: measures how many threads serve best.
    fn choose_threads(&self) {
        if let Some(once) = &self.0.calibration {
            once.call_once(|| {
                let _turn = self.0.turn.take();
                self.0.base.choose_threads(1);
            });
        }
    }

    /// As [`Engine::choose_threads`], for work of minutes: fewer threads than there are may have been chosen because
    /// something else ran at that moment, so further moments are measured, and the highest number stays.
    fn choose_threads_for_long(&self) {
        const MOMENTS: usize = 3;
        const APART: Duration = Duration::from_millis(100);
        self.choose_threads();
        let backend = &self.0.base.backend;
        for _ in 0..MOMENTS {
            if self.0.calibration.is_none() || backend.threads() == backend.most_threads() {
                return;
            }
            std::thread::sleep(APART);
            let _turn = self.0.turn.take();
            self.0.base.choose_threads(backend.threads());
        }
    }

    /// Opens a text and notes what memory it took.
    fn open_measured(&self, open: impl FnOnce() -> Result<Option<Text>>) -> Result<Option<Arc<Text>>> {
        let (text, bytes) = measured(open)?;
        if text.is_some() {
            self.0.text_bytes.store(bytes, Ordering::Relaxed);
        }
        Ok(text.map(Arc::new))
    }
}

/// How many numbers a model's weights are.
pub(crate) fn parameters(model: &dyn Model) -> u64 {
    model.params().iter().map(|spec| spec.shape.iter().product::<usize>() as u64).sum()
}

/// What `open` gives, and the anonymous bytes that the process holds more after it; 0 where the system does not tell.
fn measured<T>(open: impl FnOnce() -> Result<T>) -> Result<(T, u64)> {
    let before = anonymous_bytes();
    let opened = open()?;
    let more = anonymous_bytes().zip(before).map_or(0, |(after, before)| after.saturating_sub(before));
    Ok((opened, more))
}

/// What is kept here is sound after a panic elsewhere.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
