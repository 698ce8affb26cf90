//! What a model will take of memory, before it is opened.

use super::{Options, parameters};
use crate::base::architecture;
use crate::error::{Error, ErrorCode, Result};
use crate::exec::infer::state_bytes;
use crate::format::Checkpoint;
use crate::train::{TrainConfig, plan_for};
use pocketlora_kernels::Arithmetic;
use pocketlora_models::{Model, Role};
use std::path::Path;
use std::sync::Arc;

/// Tokens that [`Estimate::per_1000_tokens`] is for.
const TOKENS: usize = 1000;
/// Anonymous bytes that a tokenizer takes for each byte of its `tokenizer.json`: 19 on SmolLM2, 18.5 on Gemma 3.
const TEXT_FACTOR: u64 = 20;
/// What an engine takes beside tables and text: its threads, its lists.
const ENGINE: u64 = 2_000_000;

/// Bytes of memory. Mapped ones are clean pages of files, which the system may drop; anonymous ones are what counts against
/// an app.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Estimate {
    /// Parameters of the model.
    pub parameters: u64,
    /// Tokens of the longest text.
    pub context_tokens: u64,
    /// Mapped: the weights, and a copy of the head in 8 bits where there will be one.
    pub mapped: u64,
    /// Anonymous, of the open model with its tokenizer.
    pub opened: u64,
    /// Anonymous, of each 1,000 tokens of each chat.
    pub per_1000_tokens: u64,
    /// Anonymous, of one chat that fills the context.
    pub full_chat: u64,
    /// Anonymous, of a run's steps with samples of the settings' longest length, beside the open model; 0 where no settings
    /// were given. What holds the model to its answers is not in it; [`Trainer::plan`](crate::Trainer::plan) has it.
    pub training: u64,
}

impl Estimate {
    /// Of the model in the folder `dir`, opened with `options`, and of a run with `config`. Weights are not read.
    ///
    /// # Errors
    /// The model cannot run; a setting is out of range; training needs more than its `memory-budget`.
    pub fn of(dir: &Path, options: &Options, config: Option<&TrainConfig>) -> Result<Self> {
        Self::of_checkpoint(&Checkpoint::open(dir)?, options, config)
    }

    /// As [`Estimate::of`], of a model whose files are mapped already.
    ///
    /// # Errors
    /// As there.
    pub(super) fn of_checkpoint(
        checkpoint: &Checkpoint,
        options: &Options,
        config: Option<&TrainConfig>,
    ) -> Result<Self> {
        let model: Arc<dyn Model> = architecture(checkpoint)?.into();
        let numbers = options.numbers();
        let made_for = model.config().max_positions;
        let context = if options.context == 0 { made_for } else { options.context.min(made_for) };
        let head = &model.params()[model.head_param().0 as usize].shape;
        let int8 = numbers.arithmetic == Arithmetic::Int8 && options.cache_dir.is_some();
        let head = if int8 { head.iter().product::<usize>() as u64 } else { 0 };
        let vectors = model.params().iter().filter(|spec| spec.role == Role::Vector);
        let vectors: usize = vectors.map(|spec| 4 * spec.shape.iter().product::<usize>()).sum();
        let text = checkpoint.dir().join("tokenizer.json").metadata().map_or(0, |meta| meta.len());
        let text = if options.ids_only { 0 } else { TEXT_FACTOR * text };
        let states = |tokens| state_bytes(model.states(), numbers.cache, tokens);
        let training = config.map(|config| plan_for(Arc::clone(&model), options.threads, config)).transpose()?;
        Ok(Self {
            parameters: parameters(model.as_ref()),
            context_tokens: context as u64,
            mapped: checkpoint.mapped_bytes() as u64 + head,
            opened: ENGINE + vectors as u64 + text,
            per_1000_tokens: states(TOKENS),
            full_chat: states(context),
            training: training.map_or(0, |plan| plan.anonymous()),
        })
    }

    /// Refuses a model that with one chat of a full context takes more anonymous memory than `budget` bytes.
    ///
    /// # Errors
    /// It does.
    pub(super) fn check(&self, budget: u64, dir: &Path) -> Result<()> {
        let needed = self.opened + self.full_chat;
        if needed <= budget {
            return Ok(());
        }
        let megabytes = |bytes: u64| bytes.div_ceil(1_000_000);
        let message = format!(
            "expected at most {} MB of memory, got a need of {} MB, {} of them for a chat of {} tokens; allow more, or open \
             the model with a smaller context",
            megabytes(budget),
            megabytes(needed),
            megabytes(self.full_chat),
            self.context_tokens
        );
        Err(Error::new(ErrorCode::OutOfMemory, format!("`{}`", dir.display()), message))
    }
}
