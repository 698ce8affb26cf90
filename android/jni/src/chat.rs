//! Conversations.

use crate::engine::parse;
use crate::failure::Failure;
use crate::handles::{ChatHeld, Held, adapter, cancel, chat, engine, hold, only};
use crate::{native, text, texts};
use jni::objects::{JByteArray, JLongArray, JObject, JObjectArray, JString, JValue};
use jni::{Env, jni_sig, jni_str};
use pocketlora::{Answer, Dry, Finish, Listener, Message, Sampling};
use serde::Deserialize;
use serde_json::Value;
use std::ops::ControlFlow;
use std::sync::{Arc, Mutex};

/// What Kotlin's `ChatOptions` become.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Given {
    temperature: f32,
    top_k: usize,
    top_p: f32,
    min_p: f32,
    repetition_penalty: f32,
    dry: [f64; 4],
    seed: u64,
    max_tokens: usize,
    stop: Vec<String>,
    thinking: Option<bool>,
    tools: Option<Value>,
}

native!(Java_io_pocketlora_Native_chatNew(_env, handle: i64) -> i64 {
    Ok(hold(Held::Chat(Arc::new(ChatHeld { chat: Mutex::new(engine(handle)?.chat()?) }))))
});

native!(Java_io_pocketlora_Native_chatConfigure(env, handle: i64, json: JString<'local>) -> () {
    let (held, json) = (chat(handle)?, text(env, &json)?);
    let given: Given = parse("chat options", &json)?;
    let [multiplier, base, allowed_length, after] = given.dry;
    let dry = Dry {
        multiplier: multiplier as f32,
        base: base as f32,
        allowed_length: allowed_length as usize,
        after: after as usize,
    };
    let Given { temperature, top_k, top_p, min_p, repetition_penalty, seed, .. } = given;
    let sampling = Sampling { temperature, top_k, top_p, min_p, repetition_penalty, dry, seed };
    sampling.validate()?;
    let mut chat = only(&held.chat, "chat")?;
    (chat.sampling, chat.max_tokens, chat.stop) = (sampling, given.max_tokens, given.stop);
    (chat.thinking, chat.tools) = (given.thinking, given.tools);
    Ok(())
});

native!(Java_io_pocketlora_Native_chatUse(env, handle: i64, adapters: JLongArray<'local>) -> () {
    let held = chat(handle)?;
    let mut chat = only(&held.chat, "chat")?;
    if adapters.is_null() {
        chat.use_all_adapters();
        return Ok(());
    }
    let mut numbers = vec![0; adapters.len(env)?];
    adapters.get_region(env, 0, &mut numbers)?;
    let ids = numbers.into_iter().map(|number| Ok(adapter(number)?.id)).collect::<pocketlora::Result<Vec<_>>>()?;
    Ok(chat.use_adapters(&ids)?)
});

native!(Java_io_pocketlora_Native_chatMessages(env, handle: i64) -> JObjectArray<'local, JString<'local>> {
    let held = chat(handle)?;
    let chat = only(&held.chat, "chat")?;
    let pair = |message: &Message| [message.role.clone(), message.content.clone().unwrap_or_default()];
    let all: Vec<String> = chat.messages().iter().flat_map(pair).collect();
    texts(env, all.into_iter())
});

native!(Java_io_pocketlora_Native_chatSetMessages(env, handle: i64, json: JString<'local>) -> () {
    let (held, json) = (chat(handle)?, text(env, &json)?);
    only(&held.chat, "chat")?.set_messages(parse("messages", &json)?);
    Ok(())
});

native!(Java_io_pocketlora_Native_chatState(env, handle: i64) -> JByteArray<'local> {
    let state = only(&chat(handle)?.chat, "chat")?.state()?;
    Ok(env.byte_array_from_slice(&state)?)
});

native!(Java_io_pocketlora_Native_chatRestore(env, handle: i64, state: JByteArray<'local>) -> () {
    let (held, state) = (chat(handle)?, crate::bytes(env, &state)?);
    Ok(only(&held.chat, "chat")?.restore(&state)?)
});

native!(Java_io_pocketlora_Native_chatSay(
    env, handle: i64, json: JString<'local>, token: i64, listener: JObject<'local>,
) -> () {
    let (held, json, token) = (chat(handle)?, text(env, &json)?, cancel(token)?);
    let message: Message = parse("message", &json)?;
    let mut chat = only(&held.chat, "chat")?;
    chat.set_cancel_token(token);
    let mut heard = Heard { env, listener: &listener, failed: None };
    let answer = chat.say(message, &mut heard);
    drop(chat);
    match heard.failed {
        Some(failure) => Err(failure),
        None => tell_end(env, &listener, &answer?),
    }
});

/// Hands an answer's pieces to Kotlin.
struct Heard<'a, 'local> {
    env: &'a mut Env<'local>,
    listener: &'a JObject<'local>,
    failed: Option<Failure>,
}

impl Heard<'_, '_> {
    fn piece(&mut self, thought: bool, piece: &str) -> ControlFlow<()> {
        if self.failed.is_some() {
            return ControlFlow::Break(());
        }
        let listener = self.listener;
        let wanted = self.env.with_local_frame(4, |env| -> Result<bool, Failure> {
            let piece = JString::new(env, piece)?;
            let (name, sig) = (jni_str!("onPiece"), jni_sig!("(Ljava/lang/String;Z)Z"));
            Ok(env.call_method(listener, name, sig, &[(&piece).into(), JValue::Bool(thought)])?.z()?)
        });
        match wanted {
            Ok(true) => ControlFlow::Continue(()),
            Ok(false) => ControlFlow::Break(()),
            Err(failure) => {
                self.failed = Some(failure);
                ControlFlow::Break(())
            }
        }
    }
}

impl Listener for Heard<'_, '_> {
    fn on_text(&mut self, piece: &str) -> ControlFlow<()> {
        self.piece(false, piece)
    }

    fn on_thought(&mut self, piece: &str) -> ControlFlow<()> {
        self.piece(true, piece)
    }

    fn on_prompt(&mut self, done: usize, tokens: usize) {
        if self.failed.is_none() {
            let args = [JValue::Int(done as i32), JValue::Int(tokens as i32)];
            let told = self.env.call_method(self.listener, jni_str!("onPrompt"), jni_sig!("(II)V"), &args);
            self.failed = told.err().map(Into::into);
        }
    }
}

fn tell_end(env: &mut Env<'_>, listener: &JObject<'_>, answer: &Answer) -> Result<(), Failure> {
    let made = &answer.generated;
    let finish = match made.finish {
        Finish::Stop => 0,
        Finish::Length => 1,
        Finish::Context => 2,
        Finish::Cancelled => 3,
        _ => 4,
    };
    let (said, thoughts) = (JString::new(env, &answer.text)?, JString::new(env, &answer.thoughts)?);
    let args = [
        (&said).into(),
        (&thoughts).into(),
        JValue::Int(finish),
        JValue::Int(made.prompt_tokens as i32),
        JValue::Int(made.ids.len() as i32),
        JValue::Double(made.prefill.as_secs_f64()),
        JValue::Double(made.decode.as_secs_f64()),
    ];
    env.call_method(listener, jni_str!("onEnd"), jni_sig!("(Ljava/lang/String;Ljava/lang/String;IIIDD)V"), &args)?;
    Ok(())
}
