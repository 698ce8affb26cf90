//! Data for training and evaluation, read with a model's text.

use super::adapters::Entry;
use super::{Engine, lock};
use crate::adapter::AdapterFile;
use crate::data::record::Record;
use crate::error::Result;
use crate::format::foreign::no_tokenizer;
use crate::text::{Own, Text, open_text};
use crate::train::auto::{Size, Survey, watched};
use crate::train::{Dataset, Material, SampleLimits, Shipped, TrainConfig, encode};
use std::path::Path;
use std::sync::Arc;

/// Reads data with a tokenizer and a template: the model's, or those that an adapter was taught with.
///
/// Of an engine for ids only, it holds the only text, and dropping it gives that memory back to the system.
pub struct Reader {
    text: Option<Arc<Text>>,
    /// The engine holds it, too.
    held: bool,
    limits: SampleLimits,
    size: Size,
}

impl Reader {
    fn held(text: Arc<Text>, limits: SampleLimits, size: Size) -> Self {
        Self { text: Some(text), held: true, limits, size }
    }

    /// Size of the model that is read for.
    pub(super) fn size(&self) -> Size {
        self.size
    }

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

    /// Prepares what was read for a run, which needs no reader itself: holds some of the data out if `config` says so. With
    /// data to evaluate on, a bound on forgetting or general questions, the loss on a general text is watched as well. The
    /// prompts on which the model is held, and the questions, are there if `config` asks for them; a model without a chat
    /// template is not asked questions. Where `config` asks for other wordings, the file is read once more.
    ///
    /// # Errors
    /// The data cannot be split; general questions are to bound what is forgotten, and the model cannot be asked.
    pub fn material(&self, config: &TrainConfig, data: Dataset, eval_data: Option<Dataset>) -> Result<Material> {
        let Text { tokenizer, template } = self.text();
        let (data, eval_data) = match eval_data {
            None if config.eval_reworded => {
                let survey = Survey::read(&data.path, config.seed)?;
                let limits = self.limits(config.seq);
                watched(data, &survey, &|records| encode(records, tokenizer, template, limits))?
            }
            given => (data, given),
        };
        let SampleLimits { tokens: positions, vocab } = self.limits;
        let held = self.text.clone().filter(|_| self.held);
        let shipped = Shipped { text: self.text(), held, positions, vocab };
        let mut material = Material::new(config, data, eval_data, Ok(&shipped))?;
        let text = config.prompt_init_text.as_ref();
        material.prompt_ids = text.map(|text| tokenizer.encode(text, false)).transpose()?;
        Ok(material)
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
        let size = Size::of(self.base().model.as_ref());
        let own = match init {
            None if self.0.text.is_some() => return Ok(Reader::held(self.text()?, limits, size)),
            None => self.attached_own()?,
            Some(file) => match (self.own(file)?, &self.0.text) {
                (None, Some(text)) => return Ok(Reader::held(Arc::clone(text), limits, size)),
                (None, None) => self.attached_own()?,
                (own, _) => own,
            },
        };
        let (dir, special) = (&self.0.dir, self.0.special_text);
        let text = self.open_measured(|| match &own {
            Some(own) => own.open(dir, special).map(Some),
            None => open_text(dir, special),
        })?;
        let text = text.ok_or_else(|| no_tokenizer(dir))?;
        Ok(Reader { text: Some(text), held: false, limits, size })
    }

    /// What is needed to make this engine's own `text` of what is shipped.
    pub(super) fn shipped<'t>(&self, text: &'t Arc<Text>) -> Shipped<'t> {
        let positions = self.base().model.config().max_positions;
        Shipped { text, held: Some(Arc::clone(text)), positions, vocab: self.vocabulary() }
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

    /// What an attached adapter brings of text.
    fn attached_own(&self) -> Result<Option<Own>> {
        let folders = lock(&self.0.adapters).entries.iter().filter_map(Entry::folder).collect::<Vec<_>>();
        for folder in folders {
            let new_rows = self.all().adapters.replaced().has_table();
            if let Some(own) = Own::find(&folder, &self.0.dir, new_rows)? {
                return Ok(Some(own));
            }
        }
        Ok(None)
    }

    /// What the adapter `file` brings of text.
    pub(super) fn own(&self, file: &AdapterFile) -> Result<Option<Own>> {
        let find = |dir| Own::find(dir, &self.0.dir, file.vocabulary().is_some());
        file.folder().map_or(Ok(None), find)
    }
}
