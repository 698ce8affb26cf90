//! What apps hold answers by: filters of a chat, its seed, work on ids only, a guard against loops.

use crate::common::{quiet, tiny_chat_model, tiny_training};
use pocketlora::{
    Answer, Chat, Dry, Engine, ErrorCode, Finish, LogitFilter, Message, Options, Result, Sampling, SamplingSource,
    TokenBias, TrainConfig,
};
use serde_json::{Value, json};
use std::fs;
use std::ops::ControlFlow;
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;

/// Id of a byte in the tiny model.
const fn id(byte: u8) -> u32 {
    byte as u32 + 3
}

fn open(dir: &Path, options: Options) -> Engine {
    Engine::open(dir, &options.threads(1)).unwrap()
}

fn chat(engine: &Engine, max_tokens: usize) -> Chat {
    let mut chat = engine.chat().unwrap();
    chat.max_tokens = max_tokens;
    chat.sampling = Sampling { temperature: 1.0, seed: 7, ..Sampling::default() };
    chat
}

/// Forbids all but some letters; notes how often an answer began, and what it accepted.
struct Letters {
    begun: Arc<AtomicUsize>,
    accepted: Arc<Mutex<Vec<u32>>>,
}

impl LogitFilter for Letters {
    fn begin(&mut self, prompt: &[u32]) {
        assert!(!prompt.is_empty());
        self.begun.fetch_add(1, Ordering::SeqCst);
        self.accepted.lock().unwrap().clear();
    }

    fn apply(&mut self, logits: &mut [f32], _: &[u32]) -> Result<()> {
        let allowed = |at: usize| (id(b'a') as usize..=id(b'f') as usize).contains(&at);
        logits.iter_mut().enumerate().filter(|(at, _)| !allowed(*at)).for_each(|(_, l)| *l = f32::NEG_INFINITY);
        Ok(())
    }

    fn accept(&mut self, id: u32) {
        self.accepted.lock().unwrap().push(id);
    }
}

#[test]
fn a_chats_filters_take_part_in_all_of_its_answers_on_any_thread() {
    let dir = tempfile::tempdir().unwrap();
    let engine = open(&tiny_chat_model(dir.path()), Options::new());
    let (begun, accepted) = (Arc::new(AtomicUsize::new(0)), Arc::default());
    let mut chat = chat(&engine, 12);
    chat.filters.push(Box::new(Letters { begun: Arc::clone(&begun), accepted: Arc::clone(&accepted) }));
    chat.filters.push(Box::new(TokenBias::new([(id(b'a'), f32::NEG_INFINITY)])));
    let said = thread::spawn(move || {
        let asked = chat.ask("letters?", &mut quiet).unwrap();
        assert_eq!(asked.generated.ids, *accepted.lock().unwrap());
        let replied = chat.reply(&[Message::new("user", "letters?")], &mut quiet).unwrap();
        let completed = chat.complete("letters", &mut quiet).unwrap();
        assert_eq!(completed.generated.ids, *accepted.lock().unwrap());
        // One more for a single answer joins them.
        let mut without = TokenBias::new([(id(b'b'), f32::NEG_INFINITY)]);
        let mut decoder = chat.decoder(vec![70, 71]).unwrap().filter(&mut without);
        while decoder.next_token().unwrap().is_some() {}
        let decoded = decoder.into_generated();
        assert!(!decoded.ids.contains(&id(b'b')));
        [asked.generated.ids, replied.generated.ids, completed.generated.ids, decoded.ids]
    });
    for ids in said.join().unwrap() {
        assert!(ids.len() == 12 && ids.iter().all(|at| (id(b'b')..=id(b'f')).contains(at)), "{ids:?}");
    }
    assert_eq!(begun.load(Ordering::SeqCst), 4);
}

#[test]
fn a_question_that_is_forgotten_leaves_the_next_answer_as_it_would_have_been() {
    let dir = tempfile::tempdir().unwrap();
    let engine = open(&tiny_chat_model(dir.path()), Options::new());
    let want = chat(&engine, 16).ask("one?", &mut quiet).unwrap().text;
    let second = {
        let mut chat = chat(&engine, 16);
        chat.ask("one?", &mut quiet).unwrap();
        chat.ask("two?", &mut quiet).unwrap().text
    };
    let mut chat = chat(&engine, 16);
    // Stopped before the first word.
    chat.cancel_token().cancel();
    let stopped = chat.ask("zero?", &mut quiet).unwrap();
    assert_eq!((stopped.generated.finish, stopped.text.as_str()), (Finish::Cancelled, ""));
    chat.cancel_token().reset();
    // Ended before it.
    let ends = (0..512).filter(|at| *at != 2).map(|at| (at, f32::NEG_INFINITY));
    chat.filters.push(Box::new(TokenBias::new(ends)));
    let empty = chat.ask("nothing?", &mut quiet).unwrap();
    assert_eq!((empty.generated.finish, empty.text.as_str()), (Finish::Stop, ""));
    chat.filters.clear();
    assert!(chat.messages().is_empty());
    assert_eq!(chat.ask("one?", &mut quiet).unwrap().text, want);
    assert_eq!(chat.ask("two?", &mut quiet).unwrap().text, second);
}

#[test]
fn an_engine_for_ids_only_says_so_and_ends_answers_where_the_model_ends_them() {
    let dir = tempfile::tempdir().unwrap();
    let model = tiny_chat_model(dir.path());
    let end = id(b'x');
    fs::write(model.join("generation_config.json"), json!({"eos_token_id": [2, end]}).to_string()).unwrap();
    let engine = open(&model, Options::new().ids_only(true));
    let error = engine.text().map(|_| ()).unwrap_err();
    assert!(error.code() == ErrorCode::Config && error.to_string().contains("`Options::ids_only`"), "{error}");
    let mut chat = chat(&engine, 100);
    assert_eq!(chat.ask("text?", &mut quiet).unwrap_err().code(), ErrorCode::Config);

    let finish = |chat: &mut Chat| {
        let mut decoder = chat.decoder(vec![70, 71, 72]).unwrap();
        while decoder.next_token().unwrap().is_some() {}
        decoder.into_generated()
    };
    chat.filters.push(Box::new(TokenBias::new([(end, 100.0)])));
    let ended = finish(&mut chat);
    assert_eq!((ended.finish, ended.ids.len()), (Finish::Stop, 0));
    // A model without a tokenizer ends its answers, too.
    fs::remove_file(model.join("tokenizer.json")).unwrap();
    let engine = open(&model, Options::new());
    assert_eq!(engine.text().map(|_| ()).unwrap_err().code(), ErrorCode::Io);
    let mut chat = self::chat(&engine, 100);
    chat.filters.push(Box::new(TokenBias::new([(end, 100.0)])));
    assert_eq!(finish(&mut chat).finish, Finish::Stop);
}

#[test]
fn a_text_that_is_too_long_is_told_by_a_code_of_its_own_with_both_numbers() {
    let dir = tempfile::tempdir().unwrap();
    let model = tiny_chat_model(dir.path());
    for (context, advises) in [(40, true), (0, false)] {
        let engine = open(&model, Options::new().context(context));
        let limit = engine.context_tokens();
        let long = vec![70; limit + 3];
        let asked = chat(&engine, 4).generate(long.clone(), &mut quiet).map(|_: Answer| ()).unwrap_err();
        let scored = pocketlora::eval::logits_of(&engine, &long, &mut |_| true, &mut |_, _| Ok(())).unwrap_err();
        // An answer takes a token, a score none.
        for (error, needed) in [(asked, limit + 4), (scored, limit + 3)] {
            assert_eq!(error.code(), ErrorCode::ContextFull);
            let said = error.to_string();
            assert!(said.contains(&format!("{limit} tokens, got `{needed}`")), "{said}");
            assert!(said.contains("`Options::context`") == advises && !said.contains("--"), "{said}");
        }
    }
}

#[test]
fn a_scale_that_leaves_nothing_of_the_model_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let (model, data) = tiny_training(dir.path(), 4);
    let engine = open(&model, Options::new());
    let config = TrainConfig { steps: Some(1), ..TrainConfig::default() };
    let out = dir.path().join("out");
    let mut trainer = engine.trainer(config, engine.dataset(&data, 1024).unwrap(), None, None, &out).unwrap();
    struct Quiet;
    impl pocketlora::Observer for Quiet {
        fn on_step(&mut self, _: &pocketlora::StepReport) -> ControlFlow<()> {
            ControlFlow::Continue(())
        }
    }
    trainer.run(&mut Quiet).unwrap();
    for scale in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY, 1e38, -1.1e4] {
        let error = engine.attach(&out, scale).unwrap_err();
        assert_eq!((error.code(), error.item()), (ErrorCode::Config, "setting `scale`"), "{scale}");
        assert!(engine.attached().is_empty());
    }
    for scale in [1e4, -2.0, 0.0] {
        engine.detach(engine.attach(&out, scale).unwrap()).unwrap();
    }
}

/// The tiny model's weights are random: left to itself it repeats a few bytes for ever.
#[test]
fn a_guarded_answer_leaves_its_loop_and_is_the_same_until_then() {
    let dir = tempfile::tempdir().unwrap();
    let engine = open(&tiny_chat_model(dir.path()), Options::new());
    let letters = (0..512).filter(|at| !(id(b'a')..=id(b'z')).contains(at)).map(|at| (at, f32::NEG_INFINITY));
    // The same letter again and again is the likeliest.
    let loves_e = TokenBias::new(letters.chain([(id(b'e'), 5.0)]));
    let answer = |dry: Dry| {
        let mut chat = engine.chat().unwrap();
        (chat.max_tokens, chat.sampling) = (60, Sampling { dry, ..Sampling::default() });
        chat.filters.push(Box::new(loves_e.clone()));
        chat.generate(vec![70, 71], &mut quiet).unwrap().generated.ids
    };
    let (free, guarded) = (answer(Dry::OFF), answer(Dry::GUARD));
    assert_eq!(free, vec![id(b'e'); 60]);
    let left = guarded.iter().position(|at| *at != id(b'e')).unwrap();
    assert!((16..24).contains(&left), "{guarded:?}");
    let longest = guarded[left..].chunk_by(|a, b| a == b).map(<[u32]>::len).max();
    assert!(longest < Some(10), "{guarded:?}");
}

#[test]
fn what_a_model_recommends_is_read_where_it_is_opened_and_broken_files_are_named() {
    let dir = tempfile::tempdir().unwrap();
    let model = tiny_chat_model(dir.path());
    let engine = open(&model, Options::new());
    let by_size = engine.recommended().unwrap();
    assert!(by_size.source == SamplingSource::Size && by_size.sampling.dry == Dry::GUARD, "{by_size:?}");
    let write = |json: Value| fs::write(model.join("generation_config.json"), json.to_string()).unwrap();
    write(json!({"do_sample": true, "temperature": 0.6, "top_k": 20, "eos_token_id": 2}));
    let own = engine.recommended().unwrap();
    let want = Sampling { temperature: 0.6, top_k: 20, dry: Dry::GUARD, ..Sampling::default() };
    assert_eq!((own.source, own.sampling), (SamplingSource::Model, want));
    write(json!({"temperature": "warm"}));
    let error = engine.recommended().unwrap_err();
    assert!(error.code() == ErrorCode::Format && error.to_string().contains("generation_config.json"), "{error}");
}
