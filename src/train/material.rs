//! What a run learns from and is watched on.

use super::quiz::reading;
use super::{Dataset, Forgetting, Keep, Prompts, Quiz, TrainConfig, general_text, hold_out};
use crate::error::{Error, ErrorCode, Result};
use crate::format::foreign::no_tokenizer;
use crate::text::Text;
use std::path::Path;
use std::sync::Arc;

/// Data of a run, prepared.
#[derive(Clone, Debug)]
pub struct Material {
    /// To be learned.
    pub data: Dataset,
    /// To be evaluated on.
    pub eval_data: Option<Dataset>,
    /// A general text, on which forgetting shows.
    pub general: Option<Dataset>,
    /// Prompts on which the model is held to what it says without the adapter.
    pub prompts: Option<Prompts>,
    /// General questions, asked before the run and after it.
    pub quiz: Option<Quiz>,
    /// The text as whose embeddings a prompt begins, in tokens.
    pub prompt_ids: Option<Vec<u32>>,
}

/// What is needed to make a model's text of the project's own: prompts, questions, a general text.
pub(crate) struct Shipped<'t> {
    pub text: &'t Text,
    /// The same, if it is held while the run lasts.
    pub held: Option<Arc<Text>>,
    /// Longest text of the model, in tokens.
    pub positions: usize,
    /// Ids below this one have an embedding.
    pub vocab: usize,
}

impl Material {
    /// Data alone: nothing is held out, watched, held or asked.
    #[must_use]
    pub fn of(data: Dataset) -> Self {
        Self { data, eval_data: None, general: None, prompts: None, quiz: None, prompt_ids: None }
    }

    /// Holds some of the data out if `config` says so. With data to evaluate on, a bound on forgetting or general questions,
    /// the loss on a general text is watched as well. For want of a text, its model's folder. Nothing after it needs one.
    ///
    /// # Errors
    /// The data cannot be split, or forgetting is to be bound, or the model to be held, and there is no tokenizer; or general
    /// questions are to bound it and the model cannot be asked.
    pub(crate) fn new(
        config: &TrainConfig,
        data: Dataset,
        eval_data: Option<Dataset>,
        shipped: Result<&Shipped<'_>, &Path>,
    ) -> Result<Self> {
        let (data, eval_data) = hold_out(config, data, eval_data)?;
        // Who looks at what was learned looks at what was forgotten, too; without a tokenizer only who asks for it.
        let watched = config.max_forgetting.is_some() || (eval_data.is_some() || config.check) && shipped.is_ok();
        let (wanted, bound) = (config.keep != Keep::Off, matches!(config.max_forgetting, Some(Forgetting::Percent(_))));
        if !(watched || wanted) {
            return Ok(Self { eval_data, ..Self::of(data) });
        }
        let Shipped { text, held, positions, vocab } = shipped.map_err(no_tokenizer)?;
        let general = watched.then(|| general_text(&text.tokenizer, data.longest())).transpose()?;
        let limit = config.seq.min(*positions);
        let prompts = wanted.then(|| Prompts::shipped(text, limit, *vocab)).transpose()?;
        let ask = || Quiz::shipped(text, *positions, reading(text, held.clone(), *vocab)?);
        let quiz = if (config.check || bound) && text.template.is_own() { ask()? } else { None };
        if bound && quiz.is_none() {
            let message = "expected a model with a chat template and room for general questions, got one that cannot be asked; \
                           give nats of the loss on a general text instead, such as `0.1`";
            return Err(Error::new(ErrorCode::Config, "setting `max-forgetting`", message));
        }
        Ok(Self { data, eval_data, general, prompts, quiz, prompt_ids: None })
    }

    /// Tokens that one check reads, and that it answers at most.
    #[must_use]
    pub(crate) fn check_tokens(&self) -> [usize; 2] {
        let questions = self.quiz.iter().flat_map(|quiz| &quiz.ids).map(Vec::len).sum::<usize>();
        let general = self.general.as_ref().map_or(0, Dataset::tokens);
        [questions + general, self.quiz.as_ref().map_or(0, Quiz::len) * super::quiz::ANSWER]
    }

    /// Tokens that the model reads, and that it answers at most, before it is held to its answers.
    #[must_use]
    pub(crate) fn keep_tokens(&self) -> [usize; 2] {
        let prompts = self.prompts.as_ref().map_or(&[][..], |prompts| &prompts.ids);
        [prompts.iter().map(Vec::len).sum(), prompts.len() * super::keep::ANSWER]
    }

    /// Leaves out the questions and the prompts that a run with `config` has no use for any more.
    pub(crate) fn heed(&mut self, config: &TrainConfig) {
        if !config.check && !matches!(config.max_forgetting, Some(Forgetting::Percent(_))) {
            self.quiz = None;
        }
        if !config.check && config.max_forgetting.is_none() && self.eval_data.is_none() {
            self.general = None;
        }
        if config.keep == Keep::Off {
            self.prompts = None;
        }
    }
}
