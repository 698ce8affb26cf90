//! What a run starts from: its adapter, fresh or another run's, and the tensors that it moves.

use super::allocate::Allocator;
use super::beside::{self, Companion};
use super::best::Candidates;
use super::budget::choose;
use super::checkpoint::RunFacts;
use super::control::TrainHandle;
use super::first;
use super::hold_out::Overlap;
use super::keep::{AT_ONCE, Held, Lessons};
use super::layers::StepLayers;
use super::lock::{Earlier, FolderLock};
use super::plan::Work;
use super::relora::{self, Cycles};
use super::saving::sweep_folder;
use super::trained::trained_tensors;
use super::{
    Batches, Dataset, Keep, Material, MemoryPlan, MicroBatch, Quiz, Sample, TrainConfig, Trainer, largest_micro_batch,
};
use crate::adapter::{
    AdapterFile, Adapters, Learned, Method, Replaced, Settings, TensorSpec, begin, fresh, layer_at, mark,
};
use crate::base::{Base, Pool};
use crate::error::{Error, ErrorCode, Result};
use crate::exec::infer::state_bytes;
use crate::memory::{Peak, anonymous_bytes};
use crate::rng::mix;
use crate::turn::Turn;
use pocketlora_kernels::cpu::Table;
use pocketlora_kernels::{Backend, CacheType};
use pocketlora_models::{Model, Param};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

/// Whether `name` is that of a copy in the model cache, which earlier versions gave to adapters as their base.
fn is_copy(name: &str) -> bool {
    let key = name.rsplit_once("-nf4-").map_or("", |(_, key)| key);
    name.is_empty() || key.len() == 16 && key.bytes().all(|b| b.is_ascii_hexdigit())
}

/// Refuses data that nothing can be learned from, or that is of another model's tokenizer.
fn check_data<B: Backend>(base: &Base<B>, replaced: &Replaced<B>, data: &Dataset) -> Result<()> {
    let place = |what: &dyn std::fmt::Display| format!("`{}`: {what}", data.path.display());
    for (i, sample) in data.samples.iter().enumerate() {
        replaced.check_ids(base, &sample.ids).map_err(|e| e.at(place(&format_args!("sample {}", i + 1))))?;
    }
    if data.samples.iter().map(Sample::trained_tokens).sum::<usize>() == 0 {
        let message = format!(
            "expected at least one token to learn, got none in {} samples; give them answers",
            data.samples.len()
        );
        return Err(Error::new(ErrorCode::Data, place(&"samples"), message));
    }
    Ok(())
}

/// Refuses a model's folder as the place for an adapter.
///
/// # Errors
/// It holds a `config.json`.
pub(crate) fn refuse_model(out: &Path) -> Result<()> {
    if out.join("config.json").exists() {
        let message = "holds a model, which an adapter in it would turn into something else; name another folder";
        return Err(Error::new(ErrorCode::Config, format!("`{}`", out.display()), message));
    }
    Ok(())
}

/// Says that the dropout of attention that a base asks for in training is left out, as it is of all whose config has none.
fn left_out_dropout(share: f32) -> Option<Error> {
    let message = format!(
        "the base's own attention dropout of {share} is left out in training; `--dropout` drops inputs of the adapter"
    );
    let place = "key `attention_dropout` (GPT-2: `attn_pdrop`) of the model's config.json";
    (share > 0.0).then(|| Error::new(ErrorCode::Unsupported, place, message))
}

/// Refuses `virtual_tokens` that leave too few of the model's positions for the samples.
fn check_places<B: Backend>(base: &Base<B>, virtual_tokens: usize, data: &Dataset) -> Result<()> {
    let (places, longest) = (base.model.config().max_positions, data.longest());
    if virtual_tokens > 0 && virtual_tokens + longest > places {
        let left = places.saturating_sub(longest);
        let message = format!(
            "expected at most {left} virtual tokens, which samples of up to {longest} tokens leave of the model's {places} \
             positions, got `{virtual_tokens}`; use fewer, or shorter samples"
        );
        return Err(Error::new(ErrorCode::Config, "setting `num-virtual-tokens`", message));
    }
    Ok(())
}

/// What a run on `data` that is evaluated on `eval_data` and `held` takes memory for: an adapter of `method` with tensors
/// `specs`.
fn work<B: Backend>(
    base: &Base<B>,
    method: &Method,
    (specs, learned): (Vec<TensorSpec>, Vec<Learned>),
    beside: &[Companion],
    aside: Option<(Method, Vec<TensorSpec>)>,
    config: &TrainConfig,
    data: &Dataset,
    eval_data: Option<&Dataset>,
    held: Option<&Held>,
) -> Work {
    let mut lengths: Vec<usize> = data.samples.iter().map(|s| s.ids.len()).collect();
    lengths.sort_unstable_by(|a, b| b.cmp(a));
    // What is free but not given back would be counted as held, and then be taken once more.
    crate::mmap::release_freed();
    Work {
        model: Arc::clone(&base.model),
        table: base.backend.table(),
        threads: base.backend.threads(),
        method: method.clone(),
        specs,
        beside: beside.iter().map(|other| (other.method.clone(), other.specs.clone())).collect(),
        learned: learned.into_iter().chain(beside.iter().flat_map(|other| other.learned.clone())).collect(),
        aside,
        lengths,
        largest: largest_micro_batch(data, config),
        evaluated: eval_data.map_or(0, Dataset::longest),
        held: held.map_or(Vec::new(), Held::longest),
        references: held.map_or(0, Held::most_bytes),
        before: anonymous_bytes().unwrap_or(0),
        data: (data.bytes() + eval_data.map_or(0, Dataset::bytes)) as u64,
        looked_at: 0,
    }
}

/// Virtual tokens that an adapter puts before each text.
fn virtual_tokens(method: &Method, settings: &Settings) -> usize {
    if method.kind().reads("num-virtual-tokens") { method.settings(settings.clone()).num_virtual_tokens } else { 0 }
}

/// How many prompts are answered at once: as many as what passes take has room for. Adds to `plan` what they take.
fn asking<B: Backend>(base: &Base<B>, plan: &mut MemoryPlan, held: Option<&Held>, quiz: Option<&Quiz>) -> usize {
    let Some(longest) = held.map(Held::longest_text).max(quiz.map(Quiz::longest_text)) else { return 1 };
    let config = base.model.config();
    // Logits are there on the device and on the host.
    let text = state_bytes(base.model.states(), CacheType::F16, longest) + 8 * config.vocab_size as u64;
    // A prompt's activations: the widest of a layer, a few of the others, and what products round.
    let prompt = 4 * (longest * 16 * config.hidden_size) as u64;
    // Not what threads take: answers, and so adapters, would depend on their number.
    let passing = plan.layer_inputs + plan.layer_workspace;
    let room = passing.saturating_sub(prompt) / text;
    let at_once = (room as usize).clamp(1, AT_ONCE);
    plan.asking = prompt + at_once as u64 * text;
    at_once
}

impl<B: Backend> Trainer<B> {
    /// Prepares a run whose adapter will be written to the folder `out`, from scratch or from the adapter `init`.
    ///
    /// # Errors
    /// A setting is out of range, another trainer works in `out`, `init` belongs to another base, there is nothing to
    /// learn, out of memory.
    pub fn new(
        base: Arc<Base<B>>,
        base_fingerprint: u64,
        base_name: Option<String>,
        config: TrainConfig,
        material: Material,
        init: Option<&AdapterFile>,
        out: &Path,
    ) -> Result<Self> {
        let Material { data, eval_data, general, prompts, quiz, prompt_ids } = material;
        config.validate()?;
        config.check_evaluated(eval_data.is_some())?;
        config.check_layers_of(base.model.config().layers)?;
        if let Some(budget) = config.rank_budget().filter(|_| config.wants_ranks()) {
            let message =
                format!("expected ranks that were chosen within `{budget}` values, got none; choose them first");
            return Err(Error::new(ErrorCode::Config, "setting `rank-pattern`", message));
        }
        let init = init.map(|file| file.fitted(base.model.as_ref())).transpose()?;
        let init = init.as_deref();
        init.map_or(Ok(()), |file| beside::check_init(&config, file))?;
        init.map_or(Ok(()), |file| mark::check(&base, file))?;
        let replaced = init.map(|file| Replaced::default().with(&base, file)).transpose()?.unwrap_or_default();
        check_data(&base, &replaced, &data)?;
        eval_data.iter().try_for_each(|data| check_data(&base, &replaced, data))?;
        let mut batches = Batches::new(&data, &config)?;
        let total_steps = batches.total_steps();
        let (config, too_warm) = config.fitted_to(total_steps);
        let model = base.model.as_ref();
        let config = init.map_or(Ok(config.clone()), |file| config.of_adapter(model, file))?;
        let settings = config.adapter_of(config.method)?;
        let (method, layers) = match init {
            Some(file) => {
                let mut method = file.method.clone();
                method.set_in_training(&settings);
                let at = |path: &str| layer_at(model, path);
                (method, file.modules().filter_map(at).collect())
            }
            None => {
                let (method, layers) = config.method.begin(&settings, model)?;
                method.with_ranks(&settings, model, layers)?
            }
        };
        let place = |file: &AdapterFile| format!("`{}`", file.dir.display());
        if let (Some(file), Some(why)) = (init, method.is_final()) {
            let message = format!("it cannot be trained on, for {why}; begin a new one without `--init`");
            return Err(Error::new(ErrorCode::Unsupported, place(file), message));
        }
        let specs = method.tensors(model, |p: Param| layers.contains(&p));
        let specs = specs.map_err(|e| match init {
            Some(file) => e.at(place(file)),
            None => e,
        })?;
        if let Some(name) =
            ["bias", "trainable-token-indices"].into_iter().find(|name| init.is_some() && config.begins(name))
        {
            let message = "the adapter that the run starts from decides it; leave it out, or begin without `--init`";
            return Err(Error::new(ErrorCode::Config, format!("setting `{name}`"), message));
        }
        let kept = match init {
            Some(file) => file.replaced.clone(),
            None => fresh(&base, &method, &settings)?,
        };
        let beside = Companion::all(&config, &base, &method)?;
        let kind = method.kind();
        let adapted: Vec<String> = specs.iter().filter_map(|s| kind.module_of(&s.name)).map(str::to_owned).collect();
        let learned = kept.learned(kind, model, &adapted).map_err(|e| match init {
            Some(file) => e.at(place(file)),
            None => e,
        })?;
        let frozen = kept.without_learned(kind);
        let eval_overlap = eval_data.as_ref().map(|held| Overlap::of(&data, held));
        let learned_too = eval_overlap.and_then(|overlap| overlap.warning(&eval_data.as_ref()?.path));
        let places = base.model.config().max_positions.saturating_sub(
            beside.iter().map(|other| virtual_tokens(&other.method, &other.settings)).sum::<usize>()
                + virtual_tokens(&method, &settings),
        );
        let step_tokens = data.tokens() as f64 / batches.report().steps as f64;
        // Ids of an embedding that the adapter brings along mean nothing to the base.
        let prompts = prompts.filter(|_| frozen.is_empty());
        let taught = match init {
            Some(file) if config.keep != Keep::Off => Lessons::of_adapter(file)?,
            _ => Lessons::default(),
        };
        let vocab = base.model.config().vocab_size;
        let known = taught.questions.iter().filter(|ids| ids.iter().all(|id| (*id as usize) < vocab));
        let known = Lessons { questions: known.cloned().collect() };
        let held = prompts.and_then(|prompts| Held::new(prompts, known, &config, total_steps, step_tokens, places));
        let fresh_one = init.is_none();
        let beginning = fresh_one.then(|| first::looked_at(&method, &mut batches, &data, &config)).flatten();
        let aside = relora::aside(&config, &method, &specs, total_steps)?;
        let tensors = (specs.clone(), learned.clone());
        let work = Work {
            looked_at: beginning.iter().flatten().map(MicroBatch::tokens).sum(),
            ..work(&base, &method, tensors, &beside, aside, &config, &data, eval_data.as_ref(), held.as_ref())
        };
        let (mut plan, config) = choose(&work, &config)?;
        plan.data += general.as_ref().map_or(0, Dataset::bytes) as u64;
        let at_once = asking(&base, &mut plan, held.as_ref(), quiz.as_ref());
        let mut doubts = init.map_or(Ok(Vec::new()), |file| file.doubts(base.model.as_ref()))?;
        doubts.extend(init.map_or(Ok(None), |file| mark::doubt(&base, file))?);
        let doubt = |message| {
            let place = init.map_or_else(String::new, |file| format!("`{}`", file.dir.display()));
            Error::new(ErrorCode::AdapterMismatch, place, message)
        };
        let undropped = left_out_dropout(base.model.config().attention_dropout);
        let doubts = doubts.into_iter().map(doubt);
        let warnings = too_warm.into_iter().chain(undropped).chain(learned_too).chain(doubts).collect();
        let named = init.and_then(|file| file.base.clone()).filter(|name| !is_copy(name)).or(base_name);
        let texts = || data.samples.iter().map(|sample| &sample.ids[..]);
        let tensors = match init {
            Some(file) => file.tensors.clone(),
            None => {
                let mut tensors = method.fresh(&specs, &base, config.seed)?;
                begin(&base, &method, &mut tensors, prompt_ids.as_deref(), texts(), config.seed)?;
                first::check(&base, &method, &tensors, &config)?;
                tensors
            }
        };
        let facts = RunFacts {
            step: 0,
            total_steps,
            config: serde_json::to_value(&config).expect("plain data serializes"),
            data: data.fingerprint(),
            base: base_fingerprint,
            init: init.map_or(0, fingerprint),
            held: held.as_ref().map_or(0, Held::fingerprint),
            candidates: Candidates::default(),
            start: None,
            layer_steps: Vec::new(),
            drop_rates: Vec::new(),
            grown: Vec::new(),
        };
        let mut file = AdapterFile::new(out.to_owned(), method, tensors).with(frozen);
        (file.base, file.base_mark) = (named, Some(mark::of(&base)?));
        let others = beside.iter().map(|other| other.file(&base, &file, prompt_ids.as_deref(), texts(), config.seed));
        file.beside = others.collect::<Result<_>>()?;
        let mut adapters = Adapters::none(&base);
        adapters.attach_to_train(&base, &file)?;
        adapters.attach_learned(&base, &learned, Some((&kept, kind, &adapted)))?;
        file.replaced = kept;
        for (other, own) in beside.iter().zip(&mut file.beside) {
            other.attach_learned(&base, &mut adapters, own)?;
        }
        adapters.renew(&base, 0)?;
        check_places(&base, adapters.virtual_tokens(), &data)?;
        // What follows may take their place. Where they are few and large, an allocator would keep what it does not reuse.
        // Those that stay as they are go into the file as they were.
        let frozen = file.method.clone();
        file.tensors.retain(|name, _| frozen.is_frozen(name));
        crate::mmap::release_freed();
        let (tensors, grads) = trained_tensors(&base, &adapters, &file.method, &settings, &beside, &config)?;
        let cycles = Cycles::new(&base, &mut adapters, &file.method, &tensors, &config, total_steps)?;
        let lens = tensors.iter().map(|t| t.spec.values());
        let allocator = file.method.budget().map(|budget| Allocator::new(budget, config.grow_ranks, total_steps, lens));
        if config.grow_ranks && allocator.is_none() {
            let expected = "a new adapter whose `--option target_r=R`, to which ranks grow, is below `rank`";
            return Err(Error::config("grow-ranks", expected, format!("a rank of {}", config.rank)));
        }
        allocator.as_ref().map_or(Ok(()), Allocator::check)?;
        refuse_model(out)?;
        crate::format::create_folder(out)?;
        let lock = FolderLock::take(out)?;
        sweep_folder(out);
        Ok(Self {
            base,
            config,
            warnings,
            eval_overlap,
            data,
            batches,
            eval_data,
            general,
            quiz,
            held,
            taught,
            at_once,
            out: out.to_owned(),
            file,
            adapters,
            tensors,
            beginning,
            allocator,
            cycles,
            layers: StepLayers::default(),
            grads,
            pool: Pool::default(),
            ready: false,
            plan,
            facts,
            peak: Peak::default(),
            turn: Turn::default(),
            handle: TrainHandle::new(),
            policy: None,
            paused: Duration::ZERO,
            end_by: None,
            out_of_time: false,
            saved: false,
            room: None,
            earlier: Earlier::find(out),
            _lock: lock,
        })
    }
}

/// The plan of a run of `config` on `model` whose samples all have the longest length that it allows, before there is data
/// or a model that is open. What holds a model to its answers is not in it.
///
/// # Errors
/// A setting is out of range; its `memory-budget` is too small.
pub(crate) fn plan_for(model: Arc<dyn Model>, threads: usize, config: &TrainConfig) -> Result<MemoryPlan> {
    config.validate()?;
    let settings = config.adapter_of(config.method)?;
    let (method, layers) = config.method.begin(&settings, model.as_ref())?;
    let (method, layers) = method.with_ranks(&settings, model.as_ref(), layers)?;
    let specs = method.tensors(model.as_ref(), |p: Param| layers.contains(&p))?;
    let longest = config.seq.min(model.config().max_positions);
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let work = Work {
        model,
        table: Table::from_env()?,
        threads: if threads == 0 { cores } else { threads },
        method,
        specs,
        beside: Vec::new(),
        learned: Vec::new(),
        aside: None,
        lengths: vec![longest; config.batch],
        largest: longest * config.batch,
        evaluated: longest,
        held: Vec::new(),
        references: 0,
        before: 0,
        data: 0,
        looked_at: 0,
    };
    choose(&work, config).map(|(plan, _)| plan)
}

/// A number that changes when any value does.
pub(crate) fn fingerprint(file: &AdapterFile) -> u64 {
    let values = file.tensors.values().flat_map(|t| &t.data);
    let hash = values.fold(1, |hash, v| mix(hash, u64::from(v.to_bits())));
    // Of a whole embedding, the start and the length tell enough.
    let kept = file.replaced.whole.iter().flat_map(|w| {
        let bytes = &w.tensor.bytes;
        let most = if w.tensor.shape.len() == 1 { usize::MAX } else { 64 };
        bytes.iter().take(most).map(|&b| u64::from(b)).chain([bytes.len() as u64])
    });
    let rows = file.replaced.rows.iter().flat_map(|rows| {
        let values = rows.values.data.iter().map(|v| u64::from(v.to_bits()));
        rows.ids.iter().map(|id| u64::from(*id)).chain(values)
    });
    let beside = file.beside.iter().map(fingerprint);
    kept.chain(rows).chain(beside).fold(hash, mix)
}
