//! A conversation on an engine.

mod routed;
mod state;

use super::adapters::{AdapterId, AdapterSet};
use super::pieces::{Stops, Thoughts, shown};
use super::router::Choice;
use super::{Cancel, Decoder, Engine, Transcript};
use crate::chat::{CUT, Message};
use crate::error::{Error, Result};
use crate::generate::{Finish, Generated, LogitFilter, Sampling};
use crate::mmap::ReleasesFreed;
use serde_json::Value;
use std::ops::ControlFlow;
use std::sync::Arc;

/// Hears of an answer as it comes. Closures that take pieces of text are listeners, too.
pub trait Listener {
    /// A piece of the answer, of whole characters; `Break` ends the answer there.
    fn on_text(&mut self, piece: &str) -> ControlFlow<()>;

    /// A piece of what the model thinks before it answers a conversation, without what stands around thoughts; to those who
    /// do not tell the two apart it is a piece of the answer.
    fn on_thought(&mut self, piece: &str) -> ControlFlow<()> {
        self.on_text(piece)
    }

    /// So many of the prompt's `tokens` are read; those known from earlier turns are at once.
    fn on_prompt(&mut self, done: usize, tokens: usize) {
        let _ = (done, tokens);
    }
}

impl<F: FnMut(&str) -> ControlFlow<()>> Listener for F {
    fn on_text(&mut self, piece: &str) -> ControlFlow<()> {
        self(piece)
    }
}

/// An answer, and what it took.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Answer {
    /// What was said.
    pub text: String,
    /// What was thought before, in an answer to a conversation; empty where the model does not think.
    pub thoughts: String,
    /// Tokens, times, and why it ended.
    pub generated: Generated,
}

/// A conversation: what was said, what the model remembers of it, and how its answers are sampled. Any number of chats
/// work on one engine, each from a thread of its own if wanted.
pub struct Chat {
    engine: Engine,
    /// All that are attached if none are chosen.
    chosen: Option<Vec<AdapterId>>,
    /// What was picked last, where adapters are picked by request.
    routed: Option<Choice>,
    /// What the transcript was read with.
    set: Arc<AdapterSet>,
    transcript: Transcript,
    messages: Vec<Message>,
    cancel: Cancel,
    /// How tokens are chosen. [`Chat::ask`] adds one to the seed after each answer that it keeps.
    pub sampling: Sampling,
    /// Most tokens of an answer.
    pub max_tokens: usize,
    /// Texts at which an answer stops; they are no part of it.
    pub stop: Vec<String>,
    /// Whether a model that can think before it answers is to; its template decides where nobody says.
    pub thinking: Option<bool>,
    /// Tools that the model may call, a list of JSON schemas as its template takes them.
    pub tools: Option<Value>,
    /// What has a say in every choice, in this order, whichever way an answer is asked for.
    pub filters: Vec<Box<dyn LogitFilter>>,
    _release: ReleasesFreed,
}

impl Chat {
    pub(super) fn new(engine: &Engine) -> Result<Self> {
        Ok(Self {
            engine: engine.clone(),
            chosen: None,
            routed: None,
            set: engine.all(),
            transcript: Transcript::new(engine.base(), engine.numbers())?,
            messages: Vec::new(),
            cancel: Cancel::new(),
            sampling: Sampling::default(),
            max_tokens: 512,
            stop: Vec::new(),
            thinking: None,
            tools: None,
            filters: Vec::new(),
            _release: ReleasesFreed,
        })
    }

    /// The engine it works on.
    #[must_use]
    pub fn engine(&self) -> &Engine {
        &self.engine
    }

    /// What stops its answers, also while they read a prompt.
    #[must_use]
    pub fn cancel_token(&self) -> Cancel {
        self.cancel.clone()
    }

    /// Has `cancel` stop its answers: one token may stop several chats.
    pub fn set_cancel_token(&mut self, cancel: Cancel) {
        self.cancel = cancel;
    }

    /// Tokens of the longest text, prompt and answer together, with its adapters: a prefix takes places, too.
    ///
    /// # Errors
    /// A chosen adapter was detached.
    pub fn context_tokens(&mut self) -> Result<usize> {
        let set = self.current()?;
        Ok(self.engine.own_tokens(&set.adapters))
    }

    /// Uses the adapters `ids` in their order, none if empty, instead of all that are attached.
    ///
    /// # Errors
    /// One is not attached, or they do not go together. Nothing changes then.
    pub fn use_adapters(&mut self, ids: &[AdapterId]) -> Result<()> {
        self.engine.set_of(Some(ids))?;
        self.chosen = Some(ids.to_vec());
        Ok(())
    }

    /// Uses all adapters that are attached, as a new chat does.
    pub fn use_all_adapters(&mut self) {
        self.chosen = None;
    }

    /// What was said so far.
    #[must_use]
    pub fn messages(&self) -> &[Message] {
        &self.messages
    }

    /// Puts another conversation in its place: a system prompt, or one from a file. What both have in common is not read
    /// again.
    pub fn set_messages(&mut self, messages: Vec<Message>) {
        self.messages = messages;
    }

    /// Says `question` and returns the answer; both are kept, thoughts as the answer's `reasoning_content`, which templates
    /// leave out of later turns or not. An answer that was cut before its end has the key `cut`. A question without an answer,
    /// because of an error or because it was stopped before the first word, is forgotten.
    ///
    /// # Errors
    /// As [`Chat::reply`].
    pub fn ask(&mut self, question: &str, listener: &mut dyn Listener) -> Result<Answer> {
        self.say(Message::new("user", question), listener)
    }

    /// As [`Chat::ask`], for a turn that is made already, such as what a tool gave.
    ///
    /// # Errors
    /// As there.
    pub fn say(&mut self, message: Message, listener: &mut dyn Listener) -> Result<Answer> {
        // A copy, so that a listener's panic leaves the conversation as it was.
        let mut messages = self.messages.clone();
        messages.push(message);
        let answer = self.reply(&messages, listener)?;
        if !answer.text.is_empty() {
            let mut turn = Message::new("assistant", &answer.text);
            if !answer.thoughts.is_empty() {
                turn.extra.insert("reasoning_content".to_owned(), answer.thoughts.trim_end().into());
            }
            if answer.generated.finish != Finish::Stop {
                turn.extra.insert(CUT.to_owned(), true.into());
            }
            messages.push(turn);
            self.messages = messages;
            self.sampling.seed = self.sampling.seed.wrapping_add(1);
        }
        Ok(answer)
    }

    /// Answers `messages` in the place of the chat's own, which stay as they are.
    ///
    /// # Errors
    /// As [`Chat::prompt_of`] and [`Decoder::next_token`]; the prompt fills the context.
    pub fn reply(&mut self, messages: &[Message], listener: &mut dyn Listener) -> Result<Answer> {
        self.pick(messages)?;
        let (ids, thoughts) = self.prompt(messages)?;
        self.go_on(ids, thoughts, listener)
    }

    /// Continues a text, taken as it is.
    ///
    /// # Errors
    /// The model has no tokenizer; the text fills the context; as [`Decoder::next_token`].
    pub fn complete(&mut self, text: &str, listener: &mut dyn Listener) -> Result<Answer> {
        let said = self.engine.text()?.tokenizer.encode(text, false)?;
        self.pick_for(&[said])?;
        let set = self.current()?;
        let ids = self.engine.text_of(&set)?.tokenizer.encode(text, true)?;
        self.go_on(self.checked(&set, ids)?, Thoughts::none(), listener)
    }

    /// Continues token ids. Where adapters are picked by request, they are it.
    ///
    /// # Errors
    /// As [`Chat::decoder`] and [`Decoder::next_token`]; the model has no tokenizer.
    pub fn generate(&mut self, ids: Vec<u32>, listener: &mut dyn Listener) -> Result<Answer> {
        self.pick_for(std::slice::from_ref(&ids))?;
        self.go_on(ids, Thoughts::none(), listener)
    }

    fn go_on(&mut self, ids: Vec<u32>, mut parts: Thoughts, listener: &mut dyn Listener) -> Result<Answer> {
        let set = self.current()?;
        let text = self.engine.text_of(&set)?;
        let (stop, shown) = (self.stop.clone(), shown(&text.tokenizer));
        let (mut stops, mut stream) = (Stops::new(&stop), text.tokenizer.stream());
        let mut decoder = self.decoder(ids)?;
        let hear = |[thought, said]: [String; 2], listener: &mut dyn Listener| {
            let thought = thought.is_empty() || listener.on_thought(&thought).is_continue();
            let said = said.is_empty() || listener.on_text(&said).is_continue();
            thought && said
        };
        decoder.read_prompt(&mut |done, tokens| listener.on_prompt(done, tokens))?;
        let mut stopped = false;
        while let Some(id) = decoder.next_token()? {
            let mut piece = stream.push(id)?;
            piece.extend(shown.iter().find(|(special, _)| *special == id).map(|(_, name)| *name));
            let (piece, end) = stops.push(&piece);
            stopped = end;
            if !piece.is_empty() && !hear(parts.push(&piece), listener) {
                decoder.end(Finish::Cancelled);
            } else if stopped {
                decoder.end(Finish::Stop);
            }
        }
        if !stopped {
            let (rest, end) = stops.push(&stream.finish()?);
            // What comes last is heard, whether it is wanted or not.
            hear(parts.push(&rest), listener);
            match end {
                true => decoder.end(Finish::Stop),
                false => drop(hear(parts.push(&stops.finish()), listener)),
            }
        }
        hear(parts.finish(), listener);
        Ok(Answer { text: parts.said, thoughts: parts.thoughts, generated: decoder.into_generated() })
    }

    /// The token ids that ask for an answer to `messages`.
    ///
    /// # Errors
    /// The model has no tokenizer; the chat template refuses the messages; a chosen adapter was detached.
    pub fn prompt_of(&mut self, messages: &[Message]) -> Result<Vec<u32>> {
        self.prompt(messages).map(|(ids, _)| ids)
    }

    /// The same, and what tells thoughts in an answer to it.
    fn prompt(&mut self, messages: &[Message]) -> Result<(Vec<u32>, Thoughts)> {
        let set = self.current()?;
        let text = self.engine.text_of(&set)?;
        let prompt = text.template.render_thinking(messages, self.tools.as_ref(), true, self.thinking)?;
        let ids = self.checked(&set, text.tokenizer.encode_chat(&prompt.text, &prompt.plain)?)?;
        Ok((ids, Thoughts::after(&prompt.text)))
    }

    /// Continues token ids one token at a time, with more filters than [`Chat::filters`] if wanted. Where adapters are picked by
    /// request, those go on that were picked last, see [`Chat::pick`].
    ///
    /// # Errors
    /// No ids, one outside the vocabulary, more than the context takes; a setting of the sampling is out of range; a chosen
    /// adapter was detached.
    pub fn decoder(&mut self, ids: Vec<u32>) -> Result<Decoder<'_>> {
        let set = self.current()?;
        if !Arc::ptr_eq(&set, &self.set) {
            // What is remembered was made with other adapters.
            self.transcript.keep(self.engine.base(), &[]);
            self.set = Arc::clone(&set);
        }
        let Self { engine, transcript, cancel, sampling, max_tokens, filters, .. } = self;
        Decoder::new(engine, set, transcript, cancel.clone(), ids, sampling, *max_tokens, filters)
    }

    /// The adapters that its next answer uses.
    fn current(&self) -> Result<Arc<AdapterSet>> {
        self.routed_set().map_or_else(|| self.engine.set_of(self.chosen.as_deref()), Ok)
    }

    /// `ids`, if this model has an embedding for each; tokenizers of other models have others.
    fn checked(&self, set: &AdapterSet, ids: Vec<u32>) -> Result<Vec<u32>> {
        let place = self.engine.dir().join("tokenizer.json");
        let known = set.adapters.replaced().check_ids(self.engine.base(), &ids);
        known.map_err(|e: Error| e.at(format!("`{}`", place.display())))?;
        Ok(ids)
    }
}
