//! The facade that every front end uses: open a model, attach adapters, generate, train, evaluate.

use crate::adapter::{AdapterFile, Adapters};
use crate::base::{Base, architecture};
use crate::chat::{ChatTemplate, Message};
use crate::error::{Error, Result};
use crate::exec::infer::Numbers;
use crate::format::foreign::no_tokenizer;
use crate::format::{Checkpoint, int8_head};
use crate::generate::{Context, Generated, Sampling};
use crate::memory::{Peak, anonymous_bytes};
use crate::text::{Own, Text, carry, open_with};
use crate::tokenizer::{SpecialText, Tokenizer};
use crate::train::{Dataset, SampleLimits, TrainConfig, Trainer, general_text, hold_out};
use pocketlora_kernels::cpu::Table;
use pocketlora_kernels::{Arithmetic, Backend, CacheType, Cpu, WorkType};
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Once};

/// Arithmetic of inference.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
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
    fn numbers(self) -> Numbers {
        match self {
            Self::Exact => Numbers { cache: CacheType::F32, arithmetic: Arithmetic::Exact },
            Self::Bf16 => Numbers { cache: CacheType::F16, arithmetic: Arithmetic::Bf16 },
            Self::Fast => Numbers { cache: CacheType::F16, arithmetic: Arithmetic::Int8 },
        }
    }
}

/// How to open a model.
#[derive(Clone, Debug, Default)]
pub struct Options {
    /// Threads; 0 finds by measuring, at first use, how many serve best.
    pub threads: usize,
    /// Arithmetic.
    pub precision: Precision,
    /// Keys and values in 8 bits: half the memory of a long text, at a small cost in quality.
    pub int8_cache: bool,
    /// A folder for copies that make things faster and can be made again at any time; none are kept without it.
    pub cache_dir: Option<PathBuf>,
    /// What others find the base by, as adapters name it: a repository on the hub, or a path. The folder, if not given.
    pub base_name: Option<String>,
    /// Leaves the tokenizer alone, which is tens of megabytes: for work on token ids, or until
    /// [`Session::load_text`].
    pub ids_only: bool,
    /// What becomes of special tokens that are written out in a text.
    pub special_text: SpecialText,
}

/// An open model with its adapters and one running text.
pub struct Session {
    base: Arc<Base<Cpu>>,
    dir: PathBuf,
    base_name: String,
    fingerprint: u64,
    mapped_bytes: u64,
    tokenizer: Option<Text>,
    /// What attached adapters, or the one that a run starts from, bring in their place.
    own: Option<(Own, Text)>,
    /// Tokens of the adapter that a run starts from, if they are others than the base's.
    start_vocabulary: Option<usize>,
    special_text: SpecialText,
    /// Anonymous bytes that it took when it was last loaded.
    text_bytes: u64,
    adapters: Adapters<Cpu>,
    attached: Vec<(PathBuf, f32)>,
    /// Of each of them.
    warnings: Vec<String>,
    context: Context<Cpu>,
    precision: Precision,
    numbers: Numbers,
    /// Threads are to be chosen by measurement, once.
    calibration: Option<Once>,
    peak: Peak,
}

impl Session {
    /// Maps the Hugging Face directory `dir`, which may be given by one of its files. A model without a tokenizer opens too, for work on token ids.
    ///
    /// # Errors
    /// A file is missing, broken or of an unsupported kind.
    pub fn open(dir: &Path, options: &Options) -> Result<Self> {
        check_threads(options.threads)?;
        let checkpoint = Checkpoint::open(dir)?;
        let dir = checkpoint.dir().to_owned();
        // Nothing is read in, and no copy is made, of a model that then turns out not to run.
        architecture(&checkpoint)?;
        let (tokenizer, text_bytes) =
            if options.ids_only { (None, 0) } else { measured(|| open_text(&dir, options.special_text))? };
        checkpoint.bring_in();
        let mut base = Base::load(Cpu::with_table(options.threads, Table::from_env()?), &checkpoint)?;
        let mut numbers = options.precision.numbers();
        if options.int8_cache {
            numbers.cache = CacheType::I8;
        }
        let mut mapped_bytes = checkpoint.mapped_bytes() as u64;
        if let (Arithmetic::Int8, Some(cache)) = (numbers.arithmetic, &options.cache_dir) {
            let name = &base.model.params()[base.model.head_param().0 as usize].name;
            if let Some((source, bytes)) = int8_head(&checkpoint, name, cache)? {
                base.set_int8_head(source)?;
                mapped_bytes += bytes;
            }
        }
        let base = Arc::new(base);
        Ok(Self {
            adapters: Adapters::none(&base),
            context: Context::new(&base, numbers)?,
            base,
            base_name: options.base_name.clone().unwrap_or_else(|| dir.to_string_lossy().into_owned()),
            dir,
            fingerprint: checkpoint.fingerprint(),
            mapped_bytes,
            tokenizer,
            own: None,
            start_vocabulary: None,
            special_text: options.special_text,
            text_bytes,
            attached: Vec::new(),
            warnings: Vec::new(),
            precision: options.precision,
            numbers,
            calibration: (options.threads == 0).then(Once::new),
            peak: Peak::default(),
        })
    }

    /// Loads the tokenizer and the chat template of a session that was opened without.
    ///
    /// # Errors
    /// One of them is broken.
    pub fn load_text(&mut self) -> Result<()> {
        if self.tokenizer.is_none() {
            (self.tokenizer, self.text_bytes) = measured(|| open_text(&self.dir, self.special_text))?;
            for (dir, _) in self.attached.clone() {
                let own = self.own_text(&dir, self.adapters.replaced().has_table())?;
                self.own = own.or(self.own.take());
            }
        }
        Ok(())
    }

    /// Reads data from now on as the adapter `file` was taught, with the tokenizer and the template of its folder and the
    /// tokens that it knows: for a run that starts from it. [`Session::detach_all`] and [`Session::forget_text`] end that.
    ///
    /// # Errors
    /// One of its files is broken, or of another base.
    pub fn read_as(&mut self, file: &AdapterFile) -> Result<()> {
        self.own = self.own_text(&file.dir, file.vocabulary().is_some())?;
        self.start_vocabulary = file.vocabulary();
        Ok(())
    }

    /// The text that is used once the adapter in `dir` is attached, if it is not the model's.
    fn own_text(&self, dir: &Path, new_rows: bool) -> Result<Option<(Own, Text)>> {
        if self.tokenizer.is_none() {
            return Ok(None);
        }
        let Some(own) = Own::find(dir, &self.dir, new_rows)? else { return Ok(None) };
        self.own.as_ref().map_or(Ok(()), |(there, _)| own.agree(there))?;
        let text = own.open(&self.dir, self.special_text)?;
        Ok(Some((own, text)))
    }

    /// Frees them, and gives their memory back to the system.
    pub fn forget_text(&mut self) {
        (self.tokenizer, self.own, self.start_vocabulary) = (None, None, None);
        crate::mmap::release_freed();
    }

    /// Adds the PEFT adapter in `dir`, its effect multiplied by `scale`; several add up. Weights that it brings in place
    /// of the base's, such as an embedding of more rows, are used as long as it is attached.
    ///
    /// # Errors
    /// The adapter is broken, of an unsupported method, or for another base; it brings weights, and so does another, or
    /// the scale is not 1. The session is unchanged then.
    pub fn attach(&mut self, dir: &Path, scale: f32) -> Result<()> {
        self.attach_file(&AdapterFile::open(dir)?, scale)
    }

    /// Adds an adapter that is in memory already, such as the snapshot of a run, as [`Session::attach`] does.
    ///
    /// # Errors
    /// As there.
    pub fn attach_file(&mut self, file: &AdapterFile, scale: f32) -> Result<()> {
        if !scale.is_finite() {
            return Err(Error::config("scale", "a finite number", scale));
        }
        let dtype = match self.precision {
            Precision::Exact => WorkType::F32,
            Precision::Bf16 | Precision::Fast => WorkType::F16,
        };
        let mut warnings = self.doubts(file)?;
        let own = self.own_text(&file.dir, file.vocabulary().is_some())?;
        self.adapters.attach(&self.base, file, scale, dtype)?;
        if let Some((brought, _)) = &own
            && self.own.is_none()
            && !self.attached.is_empty()
        {
            let (dir, names) = (file.dir.display(), brought.names());
            warnings
                .push(format!("`{dir}`: its {names} is used, and the other attached adapters were taught without it"));
        }
        self.own = own.or(self.own.take());
        self.warnings.extend(warnings);
        self.attached.push((file.dir.clone(), scale));
        self.context.clear(&self.base);
        Ok(())
    }

    /// Removes all adapters.
    pub fn detach_all(&mut self) {
        self.adapters = Adapters::none(&self.base);
        self.attached.clear();
        (self.own, self.start_vocabulary) = (None, None);
        self.warnings.clear();
        self.context.clear(&self.base);
    }

    /// Folders and scales of the attached adapters.
    #[must_use]
    pub fn attached(&self) -> &[(PathBuf, f32)] {
        &self.attached
    }

    /// What is odd about the attached adapters, though nothing that stops them from working.
    #[must_use]
    pub fn warnings(&self) -> &[String] {
        &self.warnings
    }

    /// What is odd about `file` on this base.
    fn doubts(&self, file: &AdapterFile) -> Result<Vec<String>> {
        let mut doubts = file.doubts(self.base.model.as_ref())?;
        if let Some(named) = file.base.as_deref().filter(|named| is_another(named, &self.base_name)) {
            doubts.push(format!("it names `{named}` as its base, and this is `{}`", self.base_name));
        }
        doubts.iter_mut().for_each(|doubt| *doubt = format!("`{}`: {doubt}", file.dir.display()));
        Ok(doubts)
    }

    /// How many tokens there are with what attached adapters bring: rows of the embedding and of the head.
    #[must_use]
    pub fn vocabulary(&self) -> usize {
        self.adapters.replaced().vocabulary(&self.base)
    }

    /// The model's folder.
    #[must_use]
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// The frozen base, for code that drives executors itself.
    #[must_use]
    pub fn base(&self) -> &Arc<Base<Cpu>> {
        &self.base
    }

    /// The attached adapters, for code that drives executors itself.
    #[must_use]
    pub fn adapters(&self) -> &Adapters<Cpu> {
        &self.adapters
    }

    /// How this session keeps and multiplies numbers, as chosen at opening.
    #[must_use]
    pub fn numbers(&self) -> Numbers {
        self.numbers
    }

    /// At the first work, unless a number was given: measures how many threads serve best.
    fn choose_threads(&self) {
        if let Some(once) = &self.calibration {
            once.call_once(|| self.base.choose_threads());
        }
    }

    /// Bytes of weights mapped from files: clean pages that the system may drop.
    #[must_use]
    pub fn mapped_bytes(&self) -> u64 {
        self.mapped_bytes + self.adapters.replaced().mapped_bytes()
    }

    /// Highest anonymous memory seen at the ends of this session's generations, in bytes.
    #[must_use]
    pub fn peak_anonymous_bytes(&self) -> Option<u64> {
        self.peak.bytes()
    }

    /// The model's tokenizer, or the one that an attached adapter brings.
    ///
    /// # Errors
    /// The model has none.
    pub fn tokenizer(&self) -> Result<&Tokenizer> {
        Ok(&self.text()?.0)
    }

    /// The model's chat template, or the one that an attached adapter brings.
    ///
    /// # Errors
    /// The model has no tokenizer.
    pub fn template(&self) -> Result<&ChatTemplate> {
        Ok(&self.text()?.1)
    }

    fn text(&self) -> Result<&Text> {
        self.own.as_ref().map(|(_, text)| text).or(self.tokenizer.as_ref()).ok_or_else(|| no_tokenizer(&self.dir))
    }

    /// `ids`, if this model has an embedding for each; tokenizers of other models have others.
    fn checked(&self, ids: Vec<u32>) -> Result<Vec<u32>> {
        let place = self.dir.join("tokenizer.json");
        self.adapters.replaced().check_ids(&self.base, &ids).map_err(|e| e.at(format!("`{}`", place.display())))?;
        Ok(ids)
    }

    /// Continues `prompt` (text, taken as it is) by up to `max_tokens` tokens; `on_text` sees the answer piece by piece
    /// and may stop it.
    ///
    /// # Errors
    /// As [`Context::generate`]; no tokenizer.
    pub fn complete(
        &mut self,
        prompt: &str,
        max_tokens: usize,
        sampling: &Sampling,
        on_text: &mut (dyn FnMut(&str) -> ControlFlow<()> + Send),
    ) -> Result<(String, Generated)> {
        let ids = self.checked(self.tokenizer()?.encode(prompt, true)?)?;
        self.generate(&ids, max_tokens, sampling, on_text)
    }

    /// Answers a conversation, as [`Session::complete`] continues a text. Turns already in the cache are not run again.
    ///
    /// # Errors
    /// As [`Session::complete`]; the chat template refuses the messages.
    pub fn chat(
        &mut self,
        messages: &[Message],
        max_tokens: usize,
        sampling: &Sampling,
        on_text: &mut (dyn FnMut(&str) -> ControlFlow<()> + Send),
    ) -> Result<(String, Generated)> {
        let ids = self.prompt(messages)?;
        self.generate(&ids, max_tokens, sampling, on_text)
    }

    /// The token ids that [`Session::chat`] continues.
    ///
    /// # Errors
    /// No tokenizer; the chat template refuses the messages.
    pub fn prompt(&self, messages: &[Message]) -> Result<Vec<u32>> {
        let prompt = self.template()?.render(messages, None, true)?;
        self.checked(self.tokenizer()?.encode_chat(&prompt.text, &prompt.plain)?)
    }

    /// Tokens that the model can hold, prompt and answer together.
    #[must_use]
    pub fn context_tokens(&self) -> usize {
        self.base.model.config().max_positions
    }

    /// Continues token ids.
    ///
    /// # Errors
    /// As [`Context::generate`]; no tokenizer.
    pub fn generate(
        &mut self,
        ids: &[u32],
        max_tokens: usize,
        sampling: &Sampling,
        on_text: &mut (dyn FnMut(&str) -> ControlFlow<()> + Send),
    ) -> Result<(String, Generated)> {
        sampling.validate()?;
        self.choose_threads();
        let own = self.own.as_ref().map(|(_, text)| text);
        let (tokenizer, _) = own.or(self.tokenizer.as_ref()).ok_or_else(|| no_tokenizer(&self.dir))?;
        let (base, adapters, context) = (&self.base, &self.adapters, &mut self.context);
        let (text, generated) = base.backend.scope(|| {
            let (mut stream, mut text) = (tokenizer.stream(), String::new());
            let mut on_token = |id| {
                let piece = stream.push(id)?;
                text.push_str(&piece);
                Ok(if piece.is_empty() { ControlFlow::Continue(()) } else { on_text(&piece) })
            };
            let generated =
                context.generate(base, adapters, ids, max_tokens, sampling, &tokenizer.stop, &mut on_token)?;
            let rest = stream.finish()?;
            if !rest.is_empty() {
                text.push_str(&rest);
                let _ = on_text(&rest);
            }
            Ok::<_, Error>((text, generated))
        })?;
        self.peak.sample();
        Ok((text, generated))
    }

    /// Reads data with this model's tokenizer and template; samples have at most `max_tokens` tokens, and no more than
    /// the model was made for.
    ///
    /// # Errors
    /// As [`Dataset::open`].
    pub fn dataset(&self, path: &Path, max_tokens: usize) -> Result<Dataset> {
        let (tokenizer, template) = self.text()?;
        Dataset::open(path, tokenizer, template, self.limits(max_tokens))
    }

    /// The same for data that is measured, see [`Dataset::open_held_out`].
    ///
    /// # Errors
    /// As [`Dataset::open`].
    pub fn held_out_dataset(&self, path: &Path, max_tokens: usize) -> Result<Dataset> {
        let (tokenizer, template) = self.text()?;
        Dataset::open_held_out(path, tokenizer, template, self.limits(max_tokens))
    }

    fn limits(&self, max_tokens: usize) -> SampleLimits {
        SampleLimits {
            tokens: max_tokens.min(self.base.model.config().max_positions),
            vocab: self.start_vocabulary.unwrap_or_else(|| self.vocabulary()),
        }
    }

    /// What a run learns from and is watched on: some of the data is held out if `config` says so. With data to evaluate
    /// on, or a bound on forgetting, the loss on a general text is watched as well. Nothing after it needs a tokenizer.
    ///
    /// # Errors
    /// The data cannot be split, or forgetting is to be bound and there is no tokenizer.
    pub fn material(&self, config: &TrainConfig, data: Dataset, eval_data: Option<Dataset>) -> Result<Material> {
        let (data, eval_data) = hold_out(config, data, eval_data)?;
        // Who looks at what was learned looks at what was forgotten, too; without a tokenizer only who asks for it.
        let watched = config.max_forgetting.is_some() || eval_data.is_some() && self.tokenizer.is_some();
        let general = watched.then(|| general_text(self.tokenizer()?, &data)).transpose()?;
        Ok(Material { data, eval_data, general })
    }

    /// Prepares a training run on this session's base; attached adapters take no part in it. See
    /// [`Session::material`] for what becomes of the data.
    ///
    /// # Errors
    /// As [`Trainer::new`] and [`Session::material`].
    pub fn trainer(
        &self,
        config: TrainConfig,
        data: Dataset,
        eval_data: Option<Dataset>,
        init: Option<&AdapterFile>,
        out: &Path,
    ) -> Result<Trainer<Cpu>> {
        let material = self.material(&config, data, eval_data)?;
        self.trainer_of(config, material, init, out)
    }

    /// As [`Session::trainer`], when the material is there already.
    ///
    /// # Errors
    /// As [`Trainer::new`].
    pub fn trainer_of(
        &self,
        config: TrainConfig,
        material: Material,
        init: Option<&AdapterFile>,
        out: &Path,
    ) -> Result<Trainer<Cpu>> {
        self.choose_threads();
        let name = Some(self.base_name.clone());
        let (base, Material { data, eval_data, general }) = (Arc::clone(&self.base), material);
        let mut trainer = Trainer::new(base, self.fingerprint, name, config, data, eval_data, init, out)?;
        let own = init.map(|file| Own::find(&file.dir, &self.dir, file.vocabulary().is_some())).transpose()?.flatten();
        carry(own.as_ref(), &self.dir, out)?;
        general.into_iter().for_each(|text| trainer.watch(text));
        trainer.beside_tokenizer(self.tokenizer.as_ref().map_or(0, |_| self.text_bytes), self.text_bytes);
        Ok(trainer)
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

/// See [`Session::material`].
#[derive(Clone, Debug)]
pub struct Material {
    /// To be learned.
    pub data: Dataset,
    /// To be evaluated on.
    pub eval_data: Option<Dataset>,
    /// A general text, on which forgetting shows.
    pub general: Option<Dataset>,
}

/// Whether two names of the model hub are of different models, whatever form the weights are in. Paths tell nothing.
fn is_another(a: &str, b: &str) -> bool {
    let model = |name: &str| {
        let (owner, repository) = name.split_once('/')?;
        let path =
            owner.is_empty() || owner.starts_with(['.', '~']) || repository.contains('/') || Path::new(name).exists();
        let mut model = repository.to_ascii_lowercase();
        const FORMS: [&str; 6] = ["-bnb-4bit", "-unsloth", "-4bit", "-nf4", "-gguf", "-hf"];
        while let Some(rest) = FORMS.iter().find_map(|form| model.strip_suffix(form)) {
            model = rest.to_owned();
        }
        (!path && !model.is_empty()).then_some(model)
    };
    matches!((model(a), model(b)), (Some(a), Some(b)) if a != b)
}

/// What `open` gives, and the anonymous bytes that the process holds more after it; 0 where the system does not tell.
fn measured<T>(open: impl FnOnce() -> Result<T>) -> Result<(T, u64)> {
    let before = anonymous_bytes();
    let opened = open()?;
    let more = anonymous_bytes().zip(before).map_or(0, |(after, before)| after.saturating_sub(before));
    Ok((opened, more))
}

/// The tokenizer and chat template in `dir`, if there are any.
pub(crate) fn open_text(dir: &Path, special_text: SpecialText) -> Result<Option<Text>> {
    if !dir.join("tokenizer.json").exists() {
        return Ok(None);
    }
    open_with(dir, None, special_text).map(Some)
}

#[cfg(test)]
mod tests {
    use super::is_another;

    #[test]
    fn another_base_is_told_by_names_of_the_hub_alone() {
        for (a, b, another) in [
            ("meta/Tiny-1B", "unsloth/tiny-1b-unsloth-bnb-4bit", false),
            ("meta/Tiny-1B", "other/Tiny-1B-GGUF", false),
            ("meta/Tiny-1B", "meta/Tiny-3B", true),
            ("meta/Tiny-1B", "/models/other", false),
            ("./models/a", "meta/b", false),
            ("a", "meta/b", false),
        ] {
            assert_eq!(is_another(a, b), another, "{a} {b}");
        }
    }
}
