//! Training data: tokens and which of them are learned.

mod asked;
mod checks;
mod encode;
mod mask;
mod split;

pub use asked::Asked;
pub use checks::Checks;
pub use mask::Mask;
pub use split::{SplitRecord, Splits};

use crate::chat::ChatTemplate;
use crate::data::{self, Entry, Purpose, Unused, data_error, record, record::Record};
use crate::error::{Error, ErrorCode, Result};
use crate::tokenizer::Tokenizer;
use encode::Encoder;
use std::ops::Range;
use std::path::{Path, PathBuf};

/// A piece of data that is learned as one text.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Sample {
    /// Tokens.
    pub ids: Vec<u32>,
    /// Which tokens the model learns to write. The first never is: nothing comes before it.
    pub trained: Mask,
    /// What is asked, without the marks of the chat template around it; none where that is not told apart.
    pub asked: Asked,
}

impl Sample {
    /// A text of which the tokens of `trained` are learned, and in which no question is told apart.
    #[must_use]
    pub fn new(ids: Vec<u32>, trained: Mask) -> Self {
        Self { ids, trained, asked: Asked::default() }
    }

    /// A text that is learned whole, but for its first token.
    #[must_use]
    pub fn of_text(ids: Vec<u32>) -> Self {
        let trained = (0..ids.len()).map(|i| i > 0).collect();
        Self::new(ids, trained)
    }

    /// The sample without those words of what is asked of which `left_out` says so.
    #[must_use]
    pub fn thinned(&self, mut left_out: impl FnMut() -> bool) -> Self {
        let mut word_is_out = false;
        let out = (0..self.ids.len()).map(|i| {
            let asked = self.asked.tokens.contains(i);
            if asked && !self.asked.within_words.contains(i) {
                word_is_out = left_out();
            }
            asked && word_is_out
        });
        let out: Mask = out.collect();
        let kept = || (0..self.ids.len()).filter(|&i| !out.contains(i));
        let of_kept = |mask: &Mask| kept().map(|i| mask.contains(i)).collect();
        Self {
            ids: kept().map(|i| self.ids[i]).collect(),
            trained: of_kept(&self.trained),
            asked: Asked { tokens: of_kept(&self.asked.tokens), within_words: of_kept(&self.asked.within_words) },
        }
    }

    /// Tokens to learn.
    #[must_use]
    pub fn trained_tokens(&self) -> usize {
        self.trained.count()
    }

    /// What it asks, or else what comes before the first token that is learned; of a text all.
    #[must_use]
    pub fn question(&self) -> Vec<u32> {
        let asked: Vec<u32> = self.asked.tokens.iter().map(|at| self.ids[at]).collect();
        if !asked.is_empty() {
            return asked;
        }
        let first = self.trained.iter().next().filter(|first| *first > 1).unwrap_or(self.ids.len());
        self.ids[..first].to_vec()
    }
}

/// Samples of `records`.
///
/// # Errors
/// As [`Dataset::open`].
pub(crate) fn encode(
    records: Vec<Record>,
    tokenizer: &Tokenizer,
    template: &ChatTemplate,
    limits: SampleLimits,
) -> Result<Vec<Sample>> {
    let (mut encoder, mut samples) = (Encoder::new(tokenizer, template, limits)?, Vec::new());
    records.into_iter().try_for_each(|record| encoder.encode(record, &mut samples))?;
    Ok(samples)
}

/// What a model can take.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SampleLimits {
    /// Longest sample, in tokens.
    pub tokens: usize,
    /// Ids below this one have an embedding.
    pub vocab: usize,
}

/// Samples of records as they come.
struct Gathering<'a> {
    encoder: Encoder<'a>,
    samples: Vec<Sample>,
    splits: Splits,
    split_records: Vec<SplitRecord>,
    records: usize,
}

impl<'a> Gathering<'a> {
    fn new(encoder: Encoder<'a>) -> Self {
        Self { encoder, samples: Vec::new(), splits: Splits::default(), split_records: Vec::new(), records: 0 }
    }

    fn add(&mut self, record: Record) -> Result<()> {
        let first = self.samples.len();
        self.encoder.encode(record, &mut self.samples)?;
        let splits = std::mem::take(&mut self.encoder.splits);
        let record = SplitRecord { samples: first..self.samples.len(), splits };
        self.splits += record.splits;
        if record.samples.len() != 1 || record.splits != Splits::default() {
            self.split_records.push(record);
        }
        self.records += 1;
        Ok(())
    }

    fn finish(mut self, path: &Path, unused: Unused) -> Result<Dataset> {
        if self.records == 0 {
            let message = match unused.records {
                0 => "expected at least one line with `messages`, `prompt` and `completion`, `instruction` and `output`, or \
                      `text`, got none"
                    .to_owned(),
                n => format!("expected at least one record to learn, got {n} whose weight, or that of all their answers, is 0"),
            };
            return Err(Error::new(ErrorCode::Data, format!("`{}`", path.display()), message));
        }
        self.samples.shrink_to_fit();
        let Self { encoder, samples, splits, split_records, records } = self;
        Ok(Dataset { path: path.to_owned(), samples, records, splits, split_records, checks: encoder.checks, unused })
    }
}

/// Data in memory.
#[derive(Clone, Debug)]
pub struct Dataset {
    /// Where it came from.
    pub path: PathBuf,
    /// Its samples, in the order of the files.
    pub samples: Vec<Sample>,
    /// Lines, rows and files that were read.
    pub records: usize,
    /// What was too long for one sample.
    pub splits: Splits,
    /// Records that became another number of samples than one, or lost something, in their order.
    pub split_records: Vec<SplitRecord>,
    /// How they begin and end.
    pub checks: Checks,
    /// What is in the data and not used.
    pub unused: Unused,
}

impl Dataset {
    /// Samples made elsewhere; `path` names them in messages.
    #[must_use]
    pub fn new(path: impl Into<PathBuf>, samples: Vec<Sample>) -> Self {
        let (records, splits) = (samples.len(), Splits::default());
        let (checks, unused) = (Checks::default(), Unused::default());
        Self { path: path.into(), samples, records, splits, split_records: Vec::new(), checks, unused }
    }

    /// Reads a file or a folder of data. Files are
    /// - JSON: an object a line (JSONL), objects one after the other, a list of objects, or such a list under `data`,
    ///   `train`, `rows` and the like;
    /// - tables with a first row of names, separated by commas, tabs, semicolons or `|` (`.csv`, `.tsv`);
    /// - notes, each one text (`.txt`, `.md`, `.rst`, `.org`);
    ///
    /// in UTF-8 or UTF-16, packed with gzip, zstd or not. An object or row holds
    /// - `messages` or, as ShareGPT has it, `conversations` with `from` and `value`: what the assistant says is learned;
    /// - `prompt` and `completion`, both texts or both lists of messages: the completion is learned;
    /// - `instruction` (`question`, `query`, ..) and `output` (`response`, `answer`, ..), perhaps with `input`: a question
    ///   and an answer in the model's chat template, or, for a model without one, in the layout of the Alpaca data;
    /// - `text`, as a note is one: everything is learned.
    ///
    /// Beside them `system`, `history` and `tools` become turns, and what has the `weight` 0 is read and not learned. A key
    /// that would change what is learned and cannot be honoured is refused; all others are in [`Dataset::unused`].
    ///
    /// Of a folder the data files are read, those for training if names tell them from those for evaluation; a folder
    /// without data files is one of notes. What is left out is in [`Dataset::unused`].
    ///
    /// Texts end with the model's end-of-text token. Empty lines are skipped. What is longer than `limits` says is split
    /// into several samples: a conversation between its turns, a text between its paragraphs and sentences.
    ///
    /// # Errors
    /// A file is missing, empty, of a form that is not read or broken, or a record has none of the forms or nothing to
    /// learn, is refused by the chat template, or has tokens that the model does not know.
    pub fn open(path: &Path, tokenizer: &Tokenizer, template: &ChatTemplate, limits: SampleLimits) -> Result<Self> {
        Self::read(path, Purpose::Learn, tokenizer, template, limits)
    }

    /// The same for data that is measured: of a folder whose names tell them apart, the files for validation are read or,
    /// without any, those for tests.
    ///
    /// # Errors
    /// As [`Dataset::open`].
    pub fn open_held_out(
        path: &Path,
        tokenizer: &Tokenizer,
        template: &ChatTemplate,
        limits: SampleLimits,
    ) -> Result<Self> {
        Self::read(path, Purpose::Evaluate, tokenizer, template, limits)
    }

    fn read(
        path: &Path,
        purpose: Purpose,
        tokenizer: &Tokenizer,
        template: &ChatTemplate,
        limits: SampleLimits,
    ) -> Result<Self> {
        let mut gathering = Gathering::new(Encoder::new(tokenizer, template, limits)?);
        let mut unused = Unused::default();
        data::read(path, purpose, &mut unused, &mut |entry, _, unused| match entry {
            Entry::Note(_, text) => gathering.add(Record::Text { text, start: 0 }),
            Entry::Keys(fields) => Record::new(fields, unused)?.map_or(Ok(()), |record| gathering.add(record)),
        })?;
        gathering.finish(path, unused)
    }

    /// Records that were made elsewhere, as if they had been read from a file at `path`.
    ///
    /// # Errors
    /// As [`Dataset::open`].
    pub(crate) fn of_records(
        path: &Path,
        records: Vec<Record>,
        tokenizer: &Tokenizer,
        template: &ChatTemplate,
        limits: SampleLimits,
    ) -> Result<Self> {
        let mut gathering = Gathering::new(Encoder::new(tokenizer, template, limits)?);
        for (i, record) in records.into_iter().enumerate() {
            gathering.add(record).map_err(|e| e.at(format!("`{}` record {}", path.display(), i + 1)))?;
        }
        gathering.finish(path, Unused::default())
    }

    /// The records by their samples, as far as there are samples: a host may have taken some away.
    pub(super) fn by_record(&self) -> Vec<SplitRecord> {
        let (mut out, mut next) = (Vec::with_capacity(self.records), 0);
        let whole = |i| SplitRecord { samples: i..i + 1, splits: Splits::default() };
        for record in &self.split_records {
            out.extend((next..record.samples.start.min(self.samples.len())).map(whole));
            let Range { start, end } = record.samples.clone();
            let samples = start.min(self.samples.len())..end.min(self.samples.len());
            next = samples.end;
            out.push(SplitRecord { samples, splits: record.splits });
        }
        out.extend((next..self.samples.len()).map(whole));
        out
    }

    /// Two data sets of the records for which `second` is false and true; it is given a record's place in
    /// [`Dataset::by_record`].
    pub(super) fn partition(self, second: impl Fn(usize) -> bool) -> (Self, Self) {
        let (path, records, checks) = (self.path.clone(), self.by_record(), self.checks.clone());
        // They stay those of the whole.
        let empty = || Self { checks: checks.clone(), ..Self::new(path.clone(), Vec::new()) };
        let (mut sides, mut samples) = ([empty(), empty()], self.samples.into_iter());
        for (i, SplitRecord { samples: range, splits }) in records.into_iter().enumerate() {
            let side = &mut sides[usize::from(second(i))];
            let (first, n) = (side.samples.len(), range.len());
            side.samples.extend(samples.by_ref().take(n));
            side.records += 1;
            side.splits += splits;
            if n != 1 || splits != Splits::default() {
                side.split_records.push(SplitRecord { samples: first..first + n, splits });
            }
        }
        sides.iter_mut().for_each(|side| side.samples.shrink_to_fit());
        let [mut first, second] = sides;
        first.unused = self.unused;
        (first, second)
    }

    /// Tokens of the longest sample; 0 without any.
    #[must_use]
    pub fn longest(&self) -> usize {
        self.samples.iter().map(|s| s.ids.len()).max().unwrap_or(0)
    }

    /// Tokens in all.
    #[must_use]
    pub fn tokens(&self) -> usize {
        self.samples.iter().map(|s| s.ids.len()).sum()
    }

    /// Tokens to learn.
    #[must_use]
    pub fn trained_tokens(&self) -> usize {
        self.samples.iter().map(Sample::trained_tokens).sum()
    }

    /// Memory it takes, in bytes: four a token, and some dozen a sample.
    #[must_use]
    pub fn bytes(&self) -> usize {
        let inner = |s: &Sample| s.ids.capacity() * size_of::<u32>() + s.trained.heap_bytes() + s.asked.heap_bytes();
        self.samples.capacity() * size_of::<Sample>()
            + self.split_records.capacity() * size_of::<SplitRecord>()
            + self.samples.iter().map(inner).sum::<usize>()
    }

    /// A number that changes when any token or mask does.
    #[must_use]
    pub fn fingerprint(&self) -> u64 {
        self.samples.iter().fold(self.samples.len() as u64, |hash, s| {
            let words = s.ids.iter().zip(0..).map(|(&id, i)| u64::from(id) << 1 | u64::from(s.trained.contains(i)));
            words.fold(crate::rng::mix(hash, s.ids.len() as u64), crate::rng::mix)
        })
    }
}
