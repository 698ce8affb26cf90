//! Conversations.

use super::adapters::ids;
use super::engine::EngineBox;
use super::handle::only;
use super::work::CancelBox;
use super::{Buffer, Failure, Held, Out, Str, guarded, handle, held, list, sized};
use crate::chat::Message;
use crate::engine::{Answer, Chat, Listener};
use crate::error::{Error, ErrorCode, Result};
use crate::generate::Finish;
use serde_json::Value;
use std::ffi::c_void;
use std::ops::ControlFlow;
use std::sync::Mutex;

/// A conversation on a model.
pub struct ChatBox {
    chat: Mutex<Chat>,
}
held!(ChatBox, "chat");

/// How answers are made.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct ChatOptions {
    /// `sizeof(pl_chat_options)`.
    pub size: u32,
    /// Whether a model that can think before it answers is to: 0 its template decides, 1 yes, 2 no.
    pub thinking: u32,
    /// Most tokens of an answer.
    pub max_tokens: u64,
    /// Seed of the random choices; it grows by one with each answer.
    pub seed: u64,
    /// Keeps the likeliest tokens; 0 keeps all.
    pub top_k: u64,
    /// Divides the logits; 0 takes the likeliest token.
    pub temperature: f32,
    /// Keeps the likeliest tokens that together reach this probability; 1 keeps all.
    pub top_p: f32,
    /// Keeps tokens at least this fraction as likely as the likeliest; 0 keeps all.
    pub min_p: f32,
    /// Makes what was said before less likely; 1 does nothing.
    pub repetition_penalty: f32,
    /// Strength of the guard against loops (DRY); 0 is off.
    pub dry_multiplier: f32,
    /// What each further token of a repetition multiplies the guard's effect by.
    pub dry_base: f32,
    /// Tokens of a repetition that are let pass.
    pub dry_allowed_length: u32,
    /// Tokens of an answer after which the guard begins.
    pub dry_after: u32,
}
// SAFETY: plain numbers behind a size.
unsafe impl sized::Sized for ChatOptions {}

/// Who hears of an answer as it comes. Each function may be null.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct ChatListener {
    /// `sizeof(pl_chat_listener)`.
    pub size: u32,
    /// Leave it at 0.
    pub reserved: u32,
    /// Given to each function.
    pub user: *mut c_void,
    /// A piece of the answer, of whole characters, or (`thought` 1) of what the model thinks before. 0 goes on, anything
    /// else ends the answer there.
    pub on_text: Option<extern "C" fn(user: *mut c_void, piece: Str, thought: u32) -> u32>,
    /// So many tokens of the prompt are read.
    pub on_prompt: Option<extern "C" fn(user: *mut c_void, done: u64, tokens: u64)>,
}
// SAFETY: addresses and functions, of which any that C hands in are values, behind a size.
unsafe impl sized::Sized for ChatListener {}

const NO_LISTENER: ChatListener = ChatListener {
    size: size_of::<ChatListener>() as u32,
    reserved: 0,
    user: std::ptr::null_mut(),
    on_text: None,
    on_prompt: None,
};

impl Listener for ChatListener {
    fn on_text(&mut self, piece: &str) -> ControlFlow<()> {
        self.hear(piece, 0)
    }

    fn on_thought(&mut self, piece: &str) -> ControlFlow<()> {
        self.hear(piece, 1)
    }

    fn on_prompt(&mut self, done: usize, tokens: usize) {
        if let Some(hear) = self.on_prompt {
            hear(self.user, done as u64, tokens as u64);
        }
    }
}

impl ChatListener {
    fn hear(&self, piece: &str, thought: u32) -> ControlFlow<()> {
        match self.on_text.map_or(0, |hear| hear(self.user, Str::of(piece), thought)) {
            0 => ControlFlow::Continue(()),
            _ => ControlFlow::Break(()),
        }
    }
}

/// What an answer took.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct AnswerOut {
    /// `sizeof(pl_answer)`, set by the caller.
    pub size: u32,
    /// Why it ended: 0 it was done, 1 the most tokens were said, 2 the context is full, 3 it was stopped.
    pub finish: u32,
    /// Tokens of the prompt.
    pub prompt_tokens: u64,
    /// Of these, how many were not known from earlier turns.
    pub read_tokens: u64,
    /// Tokens of the answer.
    pub tokens: u64,
    /// Seconds until the first token.
    pub prompt_seconds: f64,
    /// Seconds for the others.
    pub answer_seconds: f64,
}
// SAFETY: plain numbers behind a size.
unsafe impl sized::Sized for AnswerOut {}

impl AnswerOut {
    fn of(answer: &Answer) -> Self {
        let made = &answer.generated;
        let finish = match made.finish {
            Finish::Stop => 0,
            Finish::Length => 1,
            Finish::Context => 2,
            Finish::Cancelled => 3,
        };
        Self {
            size: 0,
            finish,
            prompt_tokens: made.prompt_tokens as u64,
            read_tokens: made.prefilled as u64,
            tokens: made.ids.len() as u64,
            prompt_seconds: made.prefill.as_secs_f64(),
            answer_seconds: made.decode.as_secs_f64(),
        }
    }
}

/// Begins a conversation, with the sampling that the model's makers recommend and all attached adapters.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn pl_chat_new(
    engine: *const EngineBox,
    chat: *mut *mut ChatBox,
    error: *mut *mut Failure,
) -> u32 {
    guarded(error, || {
        let (engine, place) = (EngineBox::of(engine)?, Out::new(chat, "chat")?);
        let mut chat = engine.0.chat()?;
        chat.sampling = engine.0.recommended()?.sampling;
        // SAFETY: the header's rule for places of results.
        unsafe { place.set(ChatBox { chat: Mutex::new(chat) }.hold()) }
        Ok(())
    })
}

/// Ends a conversation; an answer that is being given goes on to its end.
#[unsafe(no_mangle)]
pub extern "C" fn pl_chat_free(chat: *mut ChatBox) {
    handle::free(chat);
}

/// Runs `work` on a chat that no other call works on.
fn with_chat(chat: *const ChatBox, error: *mut *mut Failure, work: impl FnOnce(&mut Chat) -> Result<()>) -> u32 {
    guarded(error, || {
        let chat = ChatBox::of(chat)?;
        let mut chat = only(&chat.chat, ChatBox::NAME)?;
        work(&mut chat)
    })
}

/// Tells how a chat's answers are made now: what an app changes and hands to `pl_chat_set_options`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn pl_chat_options_of(
    chat: *const ChatBox,
    options: *mut ChatOptions,
    error: *mut *mut Failure,
) -> u32 {
    with_chat(chat, error, |chat| {
        // SAFETY: the header's rule for places of results.
        unsafe { sized::write(options, &options_of(chat), "pl_chat_options") }
    })
}

fn options_of(chat: &Chat) -> ChatOptions {
    let own = &chat.sampling;
    ChatOptions {
        size: size_of::<ChatOptions>() as u32,
        thinking: chat.thinking.map_or(0, |on| if on { 1 } else { 2 }),
        max_tokens: chat.max_tokens as u64,
        seed: own.seed,
        top_k: own.top_k as u64,
        temperature: own.temperature,
        top_p: own.top_p,
        min_p: own.min_p,
        repetition_penalty: own.repetition_penalty,
        dry_multiplier: own.dry.multiplier,
        dry_base: own.dry.base,
        dry_allowed_length: own.dry.allowed_length as u32,
        dry_after: own.dry.after as u32,
    }
}

/// Sets how a chat's answers are made, from `pl_chat_options_of` with some changed.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn pl_chat_set_options(
    chat: *const ChatBox,
    options: *const ChatOptions,
    error: *mut *mut Failure,
) -> u32 {
    with_chat(chat, error, |chat| {
        // SAFETY: the header's rule for structs.
        let given = unsafe { sized::read(options, options_of(chat), "pl_chat_options") }?;
        let thinking = match given.thinking {
            0 => None,
            1 => Some(true),
            2 => Some(false),
            other => return Err(Error::config("thinking", "0 (as the template says), 1 (yes) or 2 (no)", other)),
        };
        let mut own = chat.sampling.clone();
        (own.seed, own.top_k, own.temperature) = (given.seed, given.top_k as usize, given.temperature);
        (own.top_p, own.min_p, own.repetition_penalty) = (given.top_p, given.min_p, given.repetition_penalty);
        (own.dry.multiplier, own.dry.base) = (given.dry_multiplier, given.dry_base);
        (own.dry.allowed_length, own.dry.after) = (given.dry_allowed_length as usize, given.dry_after as usize);
        own.validate()?;
        (chat.sampling, chat.thinking, chat.max_tokens) = (own, thinking, given.max_tokens as usize);
        Ok(())
    })
}

/// Sets the texts at which answers stop.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn pl_chat_set_stops(
    chat: *const ChatBox,
    texts: *const Str,
    count: usize,
    error: *mut *mut Failure,
) -> u32 {
    with_chat(chat, error, |chat| {
        // SAFETY: the header's rules for lists and texts.
        let texts: Result<Vec<String>> = unsafe {
            list(texts, count, "texts")?.iter().map(|text| text.text("a stop text").map(str::to_owned)).collect()
        };
        let texts = texts?;
        if texts.iter().any(String::is_empty) {
            return Err(Error::config("texts", "texts of at least one character", "an empty one"));
        }
        chat.stop = texts;
        Ok(())
    })
}

/// Sets the tools that the model may call: a list in JSON, as its template takes them; empty for none.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn pl_chat_set_tools(chat: *const ChatBox, json: Str, error: *mut *mut Failure) -> u32 {
    with_chat(chat, error, |chat| {
        // SAFETY: the header's rule for texts.
        let text = unsafe { json.text("json") }?;
        chat.tools = if text.is_empty() { None } else { Some(parse::<Vec<Value>>(text, "tools")?.into()) };
        Ok(())
    })
}

fn parse<T: serde::de::DeserializeOwned>(text: &str, name: &str) -> Result<T> {
    serde_json::from_str(text)
        .map_err(|e| Error::new(ErrorCode::Data, name, format!("expected JSON of the form in the header, got {e}")))
}

/// Chooses the adapters of a chat, in their order, of those that are attached: none with a `count` of 0, and all that are
/// attached, now and later, where `numbers` is null.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn pl_chat_use_adapters(
    chat: *const ChatBox,
    numbers: *const u64,
    count: usize,
    error: *mut *mut Failure,
) -> u32 {
    with_chat(chat, error, |chat| {
        if numbers.is_null() {
            chat.use_all_adapters();
            return Ok(());
        }
        // SAFETY: the header's rule for lists.
        let numbers = unsafe { list(numbers, count, "numbers") }?;
        let ids = ids(&EngineBox(chat.engine().clone()), numbers)?;
        chat.use_adapters(&ids)
    })
}

/// Tells what was said: a list in JSON of objects with `role` and `content`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn pl_chat_messages(
    chat: *const ChatBox,
    json: *mut *mut Buffer,
    error: *mut *mut Failure,
) -> u32 {
    with_chat(chat, error, |chat| {
        let place = Out::new(json, "json")?;
        let text = serde_json::to_vec(chat.messages()).unwrap_or_default();
        // SAFETY: the header's rule for places of results.
        unsafe { place.set(Buffer(text).hold()) }
        Ok(())
    })
}

/// Puts another conversation in the place of a chat's: a system prompt, or one from an earlier day. What both have in common
/// is not read again.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn pl_chat_set_messages(chat: *const ChatBox, json: Str, error: *mut *mut Failure) -> u32 {
    with_chat(chat, error, |chat| {
        // SAFETY: the header's rule for texts.
        let text = unsafe { json.text("json") }?;
        chat.set_messages(parse(text, "messages")?);
        Ok(())
    })
}

/// Says `question` and gives the answer, both kept: piece by piece to `listener`, and whole to `text`, a new buffer. Any of
/// `listener`, `cancel`, `answer` and `text` may be null. A cancelled answer is no error: its `finish` is 3, and
/// what was said until then is kept; of one that was stopped before its first word nothing is, the question neither.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn pl_chat_send(
    chat: *const ChatBox,
    question: Str,
    listener: *const ChatListener,
    cancel: *const CancelBox,
    answer: *mut AnswerOut,
    text: *mut *mut Buffer,
    error: *mut *mut Failure,
) -> u32 {
    // SAFETY: as this function's own.
    unsafe {
        answered(chat, listener, cancel, answer, text, error, |chat, listener| {
            chat.ask(question.text("question")?, listener)
        })
    }
}

/// As `pl_chat_send`, for a turn that is made already: one message in JSON, such as what a tool gave.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn pl_chat_say(
    chat: *const ChatBox,
    message: Str,
    listener: *const ChatListener,
    cancel: *const CancelBox,
    answer: *mut AnswerOut,
    text: *mut *mut Buffer,
    error: *mut *mut Failure,
) -> u32 {
    // SAFETY: as this function's own.
    unsafe {
        answered(chat, listener, cancel, answer, text, error, |chat, listener| {
            let message: Message = parse(message.text("message")?, "message")?;
            chat.say(message, listener)
        })
    }
}

/// As `pl_chat_send`, for a text that is continued as it is and kept in no conversation.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn pl_chat_complete(
    chat: *const ChatBox,
    beginning: Str,
    listener: *const ChatListener,
    cancel: *const CancelBox,
    answer: *mut AnswerOut,
    text: *mut *mut Buffer,
    error: *mut *mut Failure,
) -> u32 {
    // SAFETY: as this function's own.
    unsafe {
        answered(chat, listener, cancel, answer, text, error, |chat, listener| {
            chat.complete(beginning.text("beginning")?, listener)
        })
    }
}

/// Has `ask` answer, and hands out what comes of it.
///
/// # Safety
/// The header's rules for structs and places of results.
unsafe fn answered(
    chat: *const ChatBox,
    listener: *const ChatListener,
    cancel: *const CancelBox,
    answer: *mut AnswerOut,
    text: *mut *mut Buffer,
    error: *mut *mut Failure,
    ask: impl FnOnce(&mut Chat, &mut dyn Listener) -> Result<Answer>,
) -> u32 {
    with_chat(chat, error, |chat| {
        // SAFETY: as this function's own.
        let mut listener = unsafe { sized::read(listener, NO_LISTENER, "pl_chat_listener") }?;
        if !answer.is_null() {
            // SAFETY: as this function's own.
            unsafe { sized::check_place(answer, "pl_answer") }?;
        }
        chat.set_cancel_token(CancelBox::wish(cancel)?);
        let made = ask(chat, &mut listener)?;
        // SAFETY: as this function's own.
        unsafe {
            if !answer.is_null() {
                sized::write(answer, &AnswerOut::of(&made), "pl_answer")?;
            }
            if !text.is_null() {
                Out::new(text, "text")?.set(Buffer(made.text.into_bytes()).hold());
            }
        }
        Ok(())
    })
}

/// Keeps a conversation, and what the model remembers of it, as bytes: an app may be ended, and the chat goes on as if it
/// had not been.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn pl_chat_save(chat: *const ChatBox, state: *mut *mut Buffer, error: *mut *mut Failure) -> u32 {
    with_chat(chat, error, |chat| {
        let place = Out::new(state, "state")?;
        let bytes = chat.state()?;
        // SAFETY: the header's rule for places of results.
        unsafe { place.set(Buffer(bytes).hold()) }
        Ok(())
    })
}

/// Goes on with a conversation that was kept with this model and the adapters that are in use. Nothing changes on failure.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn pl_chat_restore(chat: *const ChatBox, state: Str, error: *mut *mut Failure) -> u32 {
    with_chat(chat, error, |chat| {
        // SAFETY: the header's rule for texts.
        chat.restore(unsafe { state.bytes("state") }?)
    })
}
