//! Tokens one at a time.

use super::adapters::AdapterSet;
use super::{Cancel, Engine, Transcript, lock};
use crate::error::{Error, ErrorCode, Result};
use crate::generate::{Finish, Generated, Guard, LogitFilter, Sampler, Sampling, check_finite};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// An answer that is being given: reads the prompt, then gives a token each time it is asked for one.
///
/// ```no_run
/// # fn main() -> pocketlora::Result<()> {
/// use pocketlora::generate::TokenBias;
///
/// let engine = pocketlora::Engine::open("smollm2-nf4".as_ref(), &pocketlora::Options::new())?;
/// let mut chat = engine.chat()?;
/// let prompt = chat.prompt_of(&[pocketlora::chat::Message::new("user", "Which dog is the smallest?")])?;
/// let mut without = TokenBias::new([(17, f32::NEG_INFINITY)]);
/// let mut decoder = chat.decoder(prompt)?.filter(&mut without);
/// while let Some(id) = decoder.next_token()? {
///     println!("{id}");
/// }
/// # Ok(())
/// # }
/// ```
pub struct Decoder<'c> {
    engine: Engine,
    set: Arc<AdapterSet>,
    transcript: &'c mut Transcript,
    cancel: Cancel,
    prompt: Vec<u32>,
    sampler: Sampler,
    guard: Option<Guard>,
    filters: Vec<&'c mut dyn LogitFilter>,
    stop: Vec<u32>,
    max_tokens: usize,
    /// Tokens of the longest text, prompt and answer together.
    limit: usize,
    ids: Vec<u32>,
    finish: Option<Finish>,
    /// After the last token that was run.
    logits: Vec<f32>,
    /// The last token given, until it is run.
    given: Option<u32>,
    prompt_read: bool,
    prefilled: usize,
    start: Instant,
    /// From the start to the first choice, and when that was.
    prefill: Option<(Duration, Instant)>,
}

impl<'c> Decoder<'c> {
    pub(super) fn new(
        engine: &Engine,
        set: Arc<AdapterSet>,
        transcript: &'c mut Transcript,
        cancel: Cancel,
        prompt: Vec<u32>,
        sampling: &Sampling,
        max_tokens: usize,
        filters: &'c mut [Box<dyn LogitFilter>],
    ) -> Result<Self> {
        sampling.validate()?;
        let limit = engine.own_tokens(&set.adapters);
        if prompt.is_empty() {
            return Err(Error::new(ErrorCode::Data, "prompt", "expected at least one token, got none"));
        }
        if prompt.len() >= limit {
            return Err(engine.context_full("prompt", prompt.len() + 1, limit, "shorten it"));
        }
        set.adapters.replaced().check_ids(engine.base(), &prompt)?;
        let text = set.text.clone();
        let guard = Guard::new(sampling.dry, &prompt, move |ids| match &text {
            Some(text) => text.tokenizer.decode(ids).unwrap_or_default(),
            None => "word ".repeat(ids.len()),
        });
        let stop = set.text.as_ref().map_or(&engine.0.ends, |text| &text.tokenizer.stop).clone();
        let mut decoder = Self {
            engine: engine.clone(),
            stop,
            set,
            transcript,
            cancel,
            prompt,
            sampler: Sampler::new(sampling.clone()),
            guard,
            filters: Vec::new(),
            max_tokens,
            limit,
            ids: Vec::new(),
            finish: None,
            logits: Vec::new(),
            given: None,
            prompt_read: false,
            prefilled: 0,
            start: Instant::now(),
            prefill: None,
        };
        for filter in filters {
            decoder = decoder.filter(filter.as_mut());
        }
        Ok(decoder)
    }

    /// Has `filter` take part in every choice, after those before it: first those of [`Chat::filters`](super::Chat::filters).
    #[must_use]
    pub fn filter(mut self, filter: &'c mut dyn LogitFilter) -> Self {
        filter.begin(&self.prompt);
        self.filters.push(filter);
        self
    }

    /// Reads the prompt, which [`Decoder::next_token`] does otherwise; `progress` hears after each chunk how many of its
    /// tokens are read, and how many there are. Returns `false` if it was cancelled: what was read is kept, and asking
    /// again with a new decoder goes on from there.
    ///
    /// # Errors
    /// Out of memory.
    pub fn read_prompt(&mut self, progress: &mut dyn FnMut(usize, usize)) -> Result<bool> {
        if self.prompt_read || self.finish.is_some() {
            return Ok(self.prompt_read);
        }
        let Self { engine, set, transcript, cancel, prompt, logits, .. } = self;
        // The last token is always run again: its logits choose the first new one.
        let kept = transcript.keep(engine.base(), &prompt[..prompt.len() - 1]);
        progress(kept, prompt.len());
        let mut prefilled = 0;
        let result = transcript.advance(
            engine.on(&set.adapters),
            &prompt[kept..],
            logits,
            &mut || !cancel.is_cancelled(),
            &mut |done| {
                prefilled = done;
                progress(kept + done, prompt.len());
                Ok(())
            },
        );
        self.prefilled = prefilled;
        self.prompt_read = self.ran(result)?;
        if self.prompt_read && self.max_tokens == 0 {
            self.finish = Some(Finish::Length);
        }
        Ok(self.prompt_read)
    }

    /// The next token; `None` when the answer is over, see [`Decoder::finished`].
    ///
    /// # Errors
    /// Logits that are not numbers, filters that leave no token or fail, out of memory.
    pub fn next_token(&mut self) -> Result<Option<u32>> {
        self.read_prompt(&mut |_, _| ())?;
        if self.finish.is_none() && self.cancel.is_cancelled() {
            self.finish = Some(Finish::Cancelled);
        }
        if self.finish.is_some() {
            return Ok(None);
        }
        if let Some(id) = self.given.take() {
            let Self { engine, set, transcript, cancel, logits, .. } = self;
            let keep_going = &mut || !cancel.is_cancelled();
            let result = transcript.advance(engine.on(&set.adapters), &[id], logits, keep_going, &mut |_| Ok(()));
            if !self.ran(result)? {
                return Ok(None);
            }
        }
        self.guard.iter().for_each(|guard| guard.apply(&mut self.logits));
        let chosen = self.sampler.sample_filtered(&mut self.logits, self.transcript.ids(), &mut self.filters);
        // A filter that failed may have changed the logits: they are no place to go on from.
        let id = chosen.inspect_err(|_| self.finish = Some(Finish::Cancelled))?;
        self.prefill.get_or_insert_with(|| (self.start.elapsed(), Instant::now()));
        if self.stop.contains(&id) {
            self.finish = Some(Finish::Stop);
            return Ok(None);
        }
        self.ids.push(id);
        self.given = Some(id);
        self.guard.iter_mut().for_each(|guard| guard.accept(id));
        self.filters.iter_mut().for_each(|filter| filter.accept(id));
        if self.transcript.ids().len() + 1 >= self.limit {
            self.finish = Some(Finish::Context);
        } else if self.ids.len() >= self.max_tokens {
            self.finish = Some(Finish::Length);
        }
        Ok(Some(id))
    }

    /// Checks the logits of what ran, or notes that it was cancelled; returns whether it ran.
    fn ran(&mut self, result: Result<()>) -> Result<bool> {
        match result {
            Err(e) if e.code() == ErrorCode::Cancelled => self.finish = Some(Finish::Cancelled),
            other => {
                other?;
                check_finite(&self.logits)?;
            }
        }
        Ok(self.finish.is_none())
    }

    /// Why the answer is over, once it is.
    #[must_use]
    pub fn finished(&self) -> Option<Finish> {
        self.finish
    }

    /// What was done. An answer that was not over counts as cancelled.
    #[must_use]
    pub fn into_generated(self) -> Generated {
        lock(&self.engine.0.peak).sample();
        Generated {
            ids: self.ids,
            prompt_tokens: self.prompt.len(),
            prefilled: self.prefilled,
            prefill: self.prefill.map_or_else(|| self.start.elapsed(), |(time, _)| time),
            decode: self.prefill.map_or(Duration::ZERO, |(_, first)| first.elapsed()),
            finish: self.finish.unwrap_or(Finish::Cancelled),
        }
    }

    /// Ends the answer here, for that reason.
    pub(super) fn end(&mut self, why: Finish) {
        self.finish = Some(why);
    }
}
