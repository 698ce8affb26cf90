//! What a run learns from and is watched on.

use super::{Dataset, TrainConfig, general_text, hold_out};
use crate::error::Result;
use crate::format::foreign::no_tokenizer;
use crate::tokenizer::Tokenizer;
use std::path::Path;

/// Data of a run, prepared.
#[derive(Clone, Debug)]
pub struct Material {
    /// To be learned.
    pub data: Dataset,
    /// To be evaluated on.
    pub eval_data: Option<Dataset>,
    /// A general text, on which forgetting shows.
    pub general: Option<Dataset>,
}

impl Material {
    /// Holds some of the data out if `config` says so. With data to evaluate on, or a bound on forgetting, the loss on a
    /// general text is watched as well. For want of a tokenizer, its model's folder. Nothing after it needs a tokenizer.
    ///
    /// # Errors
    /// The data cannot be split, or forgetting is to be bound and there is no tokenizer.
    pub fn new(
        config: &TrainConfig,
        data: Dataset,
        eval_data: Option<Dataset>,
        tokenizer: Result<&Tokenizer, &Path>,
    ) -> Result<Self> {
        let (data, eval_data) = hold_out(config, data, eval_data)?;
        // Who looks at what was learned looks at what was forgotten, too; without a tokenizer only who asks for it.
        let watched = config.max_forgetting.is_some() || eval_data.is_some() && tokenizer.is_ok();
        let general = watched.then(|| general_text(tokenizer.map_err(no_tokenizer)?, &data)).transpose()?;
        Ok(Self { data, eval_data, general })
    }
}
