//! Data for training and evaluation, read with a model's text.

use super::Engine;
use crate::adapter::AdapterFile;
use crate::data::record::Record;
use crate::error::Result;
use crate::format::foreign::no_tokenizer;
use crate::text::{Own, Text, open_text};
use crate::train::{Dataset, Material, SampleLimits, TrainConfig};
use std::path::Path;
use std::sync::Arc;

/// Reads data with a tokenizer and a template: the model's, or those that an adapter was taught with.
///
/// Of an engine for ids only, it holds the only text, and dropping it gives that memory back to the system.
pub struct Reader {
    text: Option<Arc<Text>>,
    limits: SampleLimits,
}

impl Reader {
    /// The tokenizer and the template.
    #[must_use]
    pub fn text(&self) -> &Text {
        self.text.as_ref().expect("it is there until it is dropped")
    }

    /// Reads data to learn from; samples have at most `max_tokens` tokens, and no more than the model was made for.
    ///
    /// # Errors
    /// As [`Dataset::open`].
    pub fn dataset(&self, path: &Path, max_tokens: usize) -> Result<Dataset> {
        let Text { tokenizer, template } = self.text();
        Dataset::open(path, tokenizer, template, self.limits(max_tokens))
    }

    /// The same for data that is measured, see [`Dataset::open_held_out`].
    ///
    /// # Errors
    /// As [`Dataset::open`].
    pub fn held_out_dataset(&self, path: &Path, max_tokens: usize) -> Result<Dataset> {
        let Text { tokenizer, template } = self.text();
        Dataset::open_held_out(path, tokenizer, template, self.limits(max_tokens))
    }

    /// The same for records that were made elsewhere; `path` names them in messages.
    ///
    /// # Errors
    /// As [`Dataset::open`].
    pub(crate) fn dataset_of(&self, path: &Path, records: Vec<Record>, max_tokens: usize) -> Result<Dataset> {
        let Text { tokenizer, template } = self.text();
        Dataset::of_records(path, records, tokenizer, template, self.limits(max_tokens))
    }

    fn limits(&self, max_tokens: usize) -> SampleLimits {
        SampleLimits { tokens: self.limits.tokens.min(max_tokens), ..self.limits }
    }

    /// Prepares what was read for a run, see [`Material::new`]. The run itself needs no reader.
    ///
    /// # Errors
    /// As there.
    pub fn material(&self, config: &TrainConfig, data: Dataset, eval_data: Option<Dataset>) -> Result<Material> {
        Material::new(config, data, eval_data, Ok(&self.text().tokenizer))
    }
}

impl Drop for Reader {
    fn drop(&mut self) {
        if self.text.take().is_some_and(|text| Arc::strong_count(&text) == 1) {
            crate::mmap::release_freed();
        }
    }
}

impl Engine {
    /// A reader as the attached adapters ask for or, with the adapter that a run starts from, as that one was taught.
    ///
    /// # Errors
    /// The model has no tokenizer; a file is broken, or of another base.
    pub fn reader(&self, init: Option<&AdapterFile>) -> Result<Reader> {
        let vocab = init.and_then(AdapterFile::vocabulary).unwrap_or_else(|| self.vocabulary());
        let limits = SampleLimits { tokens: self.base().model.config().max_positions, vocab };
        let text = match init {
            None if self.0.text.is_some() => Some(self.text()?),
            None => self.read_text()?,
            Some(file) => match self.own(file)? {
                Some(own) => self.open_measured(|| own.open(&self.0.dir, self.0.special_text).map(Some))?,
                None if self.0.text.is_some() => self.0.text.clone(),
                None => self.read_text()?,
            },
        };
        let text = text.ok_or_else(|| no_tokenizer(&self.0.dir))?;
        Ok(Reader { text: Some(text), limits })
    }

    /// Reads data as [`Reader::dataset`] does.
    ///
    /// # Errors
    /// As there; the model has no tokenizer.
    pub fn dataset(&self, path: &Path, max_tokens: usize) -> Result<Dataset> {
        self.reader(None)?.dataset(path, max_tokens)
    }

    /// Reads data as [`Reader::held_out_dataset`] does.
    ///
    /// # Errors
    /// As there; the model has no tokenizer.
    pub fn held_out_dataset(&self, path: &Path, max_tokens: usize) -> Result<Dataset> {
        self.reader(None)?.held_out_dataset(path, max_tokens)
    }

    /// The text of an engine that has none loaded.
    fn read_text(&self) -> Result<Option<Arc<Text>>> {
        let (dir, special) = (&self.0.dir, self.0.special_text);
        for attached in self.attached() {
            if let Some(own) = Own::find(&attached.dir, dir, self.all().adapters.replaced().has_table())? {
                return self.open_measured(|| own.open(dir, special).map(Some));
            }
        }
        self.open_measured(|| open_text(dir, special))
    }

    /// What the adapter `file` brings of text.
    pub(super) fn own(&self, file: &AdapterFile) -> Result<Option<Own>> {
        Own::find(&file.dir, &self.0.dir, file.vocabulary().is_some())
    }
}
