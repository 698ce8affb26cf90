//! One engine, many chats and trainers: cancelling, filters, threads, and bounds.

use crate::common::{golden, logits, quiet, tiny_chat_model, tiny_training};
use pocketlora::train::Directive;
use pocketlora::{
    Answer, Cancel, Chat, Device, Engine, ErrorCode, Finish, Listener, LogitFilter, Message, Observer, Options,
    Precision, Result, Sampling, StepReport, TokenBias, TrainConfig, Trainer,
};
use std::ops::ControlFlow;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

fn open(dir: &Path, options: &Options) -> Engine {
    Engine::open(dir, options).unwrap()
}

/// Two threads, so that a team is shared.
fn two() -> Options {
    Options::new().threads(2)
}

/// A chat of answers of `max_tokens` tokens that are drawn, not greedy.
fn chat(engine: &Engine, max_tokens: usize, seed: u64) -> Chat {
    let mut chat = engine.chat().unwrap();
    chat.max_tokens = max_tokens;
    chat.sampling = Sampling { temperature: 1.0, seed, ..Sampling::default() };
    chat
}

/// Cancels at a point of the prompt, or after some pieces of text; notes what it heard.
struct Canceller {
    cancel: Cancel,
    at: usize,
    prompt: Vec<(usize, usize)>,
}

impl Listener for Canceller {
    fn on_prompt(&mut self, done: usize, tokens: usize) {
        self.prompt.push((done, tokens));
        if done >= self.at {
            self.cancel.cancel();
        }
    }

    fn on_text(&mut self, _: &str) -> ControlFlow<()> {
        panic!("the prompt was cancelled")
    }
}

/// A tiny model that takes long texts.
fn long_model(dir: &Path) -> std::path::PathBuf {
    let model = tiny_chat_model(dir);
    let path = model.join("config.json");
    let mut config: serde_json::Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
    config["max_position_embeddings"] = 4096.into();
    std::fs::write(path, config.to_string()).unwrap();
    model
}

#[test]
fn a_prompt_can_be_cancelled_and_asked_again() {
    let dir = tempfile::tempdir().unwrap();
    let engine = open(&long_model(dir.path()), &two());
    let (ids, mut told) = (vec![70; 1000], Vec::new());
    for at in [0, 1, 300] {
        let mut chat = chat(&engine, 4, 1);
        let cancel = chat.cancel_token();
        let mut listener = Canceller { cancel: cancel.clone(), at, prompt: Vec::new() };
        let stopped = chat.generate(ids.clone(), &mut listener).unwrap();
        assert_eq!((stopped.generated.finish, stopped.text.as_str()), (Finish::Cancelled, ""));
        let &(read, tokens) = listener.prompt.last().unwrap();
        assert!(tokens == 1000 && read < 1000, "cancelled at {at}, read {read}");
        // It stays cancelled until somebody says otherwise, and what was read by then is not read again.
        let still = chat.generate(ids.clone(), &mut quiet).unwrap();
        assert_eq!((still.generated.finish, still.generated.ids.len()), (Finish::Cancelled, 0));
        cancel.reset();
        let mut decoder = chat.decoder(ids.clone()).unwrap();
        assert!(decoder.read_prompt(&mut |done, _| told.push(done)).unwrap());
        drop(decoder);
        assert_eq!(told[0], read, "cancelled at {at}");
        told.clear();
        let again = chat.generate(ids.clone(), &mut quiet).unwrap();
        assert_eq!(again.generated.prefilled, 1);
        let fresh = self::chat(&engine, 4, 1).generate(ids.clone(), &mut quiet).unwrap();
        assert_eq!(again.generated.ids, fresh.generated.ids, "cancelled at {at}");
    }
}

/// Another thread's wish ends a prompt within the time of a layer of a chunk, not of all chunks.
#[test]
fn cancelling_from_another_thread_takes_effect_within_a_chunk() {
    let dir = tempfile::tempdir().unwrap();
    let engine = open(&long_model(dir.path()), &two());
    let ids: Vec<u32> = (0..4000).map(|i| 3 + i % 250).collect();
    let start = Instant::now();
    chat(&engine, 1, 1).generate(ids.clone(), &mut quiet).unwrap();
    let whole = start.elapsed();
    let mut chat = chat(&engine, 1, 1);
    let cancel = chat.cancel_token();
    let (begun, stopped_at) = (AtomicBool::new(false), std::sync::Mutex::new(None));
    let returned = thread::scope(|s| {
        s.spawn(|| {
            while !begun.load(Ordering::SeqCst) {
                thread::yield_now();
            }
            thread::sleep(whole / 10);
            *stopped_at.lock().unwrap() = Some(Instant::now());
            cancel.cancel();
        });
        let mut decoder = chat.decoder(ids).unwrap();
        assert!(!decoder.read_prompt(&mut |_, _| begun.store(true, Ordering::SeqCst)).unwrap());
        assert_eq!(decoder.finished(), Some(Finish::Cancelled));
        Instant::now()
    });
    let late = returned.saturating_duration_since(stopped_at.into_inner().unwrap().unwrap());
    assert!(late < whole / 4, "{late:?} after the wish, of {whole:?}");
}

/// A token without a whole character is a token.
#[test]
fn cancelling_is_heard_at_every_token() {
    /// Lets only the first byte of two-byte characters pass, and cancels after some of them.
    struct Halves(Cancel, usize);

    impl LogitFilter for Halves {
        fn apply(&mut self, logits: &mut [f32], _: &[u32]) -> Result<()> {
            logits.iter_mut().enumerate().filter(|(id, _)| *id != 3 + 0xc3).for_each(|(_, l)| *l = f32::NEG_INFINITY);
            Ok(())
        }

        fn accept(&mut self, _: u32) {
            self.1 -= 1;
            if self.1 == 0 {
                self.0.cancel();
            }
        }
    }

    let dir = tempfile::tempdir().unwrap();
    let engine = open(&tiny_chat_model(dir.path()), &two());
    let mut chat = chat(&engine, 50, 1);
    let mut filter = Halves(chat.cancel_token(), 3);
    let mut decoder = chat.decoder(vec![70, 71]).unwrap().filter(&mut filter);
    let mut ids = Vec::new();
    while let Some(id) = decoder.next_token().unwrap() {
        ids.push(id);
    }
    assert_eq!((ids, decoder.finished()), (vec![3 + 0xc3; 3], Some(Finish::Cancelled)));
    assert_eq!(decoder.into_generated().ids.len(), 3);
}

#[test]
fn filters_decide_what_may_come_and_an_answer_without_any_token_is_an_error() {
    let dir = tempfile::tempdir().unwrap();
    let engine = open(&tiny_chat_model(dir.path()), &two());
    let mut chat = chat(&engine, 20, 3);
    let mut digits =
        TokenBias::new((0..512).filter(|id| !(3 + 48..3 + 58).contains(id)).map(|id| (id, f32::NEG_INFINITY)));
    let mut none = TokenBias::new((0..512).map(|id| (id, f32::NEG_INFINITY)));
    let ids = |filter: &mut TokenBias, chat: &mut Chat| {
        let mut decoder = chat.decoder(vec![70, 71]).unwrap().filter(filter);
        let mut ids = Vec::new();
        while let Some(id) = decoder.next_token()? {
            ids.push(id);
        }
        Ok::<_, pocketlora::Error>(ids)
    };
    let said = ids(&mut digits, &mut chat).unwrap();
    let (first, other) = (said[0], said.iter().any(|id| *id != said[0]));
    assert!(said.len() == 20 && other && said.iter().all(|id| (3 + 48..3 + 58).contains(id)), "{first}: {said:?}");
    assert_eq!(ids(&mut none, &mut chat).unwrap_err().code(), ErrorCode::Config);
    assert_eq!(ids(&mut digits, &mut chat).unwrap(), said, "the chat goes on");
}

/// What `conversations` of three questions answer, each chat on its thread or all after each other.
fn talk(engine: &Engine, conversations: u64, threads: bool) -> Vec<Vec<String>> {
    let one = |seed: u64| {
        let mut chat = chat(engine, 12, seed);
        let mut ask = |i: usize| chat.ask(&format!("question {i} of {seed}"), &mut quiet).unwrap().text;
        (0..3).map(&mut ask).collect::<Vec<String>>()
    };
    if !threads {
        return (0..conversations).map(one).collect();
    }
    thread::scope(|s| {
        let chats: Vec<_> = (0..conversations).map(|seed| s.spawn(move || one(seed))).collect();
        chats.into_iter().map(|chat| chat.join().unwrap()).collect()
    })
}

#[test]
fn chats_on_threads_of_their_own_say_what_each_says_alone() {
    let dir = tempfile::tempdir().unwrap();
    let engine = open(&long_model(dir.path()), &two());
    assert_eq!(talk(&engine, 4, true), talk(&engine, 4, false));
}

/// Counts steps; never stops.
struct Counter<'a>(&'a AtomicUsize);

impl Observer for Counter<'_> {
    fn on_step(&mut self, _: &StepReport) -> ControlFlow<()> {
        self.0.fetch_add(1, Ordering::SeqCst);
        ControlFlow::Continue(())
    }
}

/// A field of an app's struct, without a type parameter.
struct App {
    trainer: Trainer,
}

#[test]
fn a_chat_answers_while_a_trainer_works_and_neither_changes_the_other() {
    let dir = tempfile::tempdir().unwrap();
    let (model, data) = tiny_training(dir.path(), 8);
    let engine = open(&model, &two());
    let config =
        TrainConfig { steps: Some(1_000_000), batch: 2, save_every: 0, save_seconds: 0, ..TrainConfig::default() };
    let alone = talk(&engine, 1, false);
    let data = engine.dataset(&data, 1024).unwrap();
    let mut app = App { trainer: engine.trainer(config, data, None, None, &dir.path().join("out")).unwrap() };
    let (handle, steps) = (app.trainer.handle(), AtomicUsize::new(0));
    thread::scope(|s| {
        let run = s.spawn(|| app.trainer.run(&mut Counter(&steps)).unwrap());
        let wait = |more: usize| {
            let (start, from) = (Instant::now(), steps.load(Ordering::SeqCst));
            while steps.load(Ordering::SeqCst) < from + more {
                assert!(start.elapsed() < Duration::from_secs(60), "training does not go on");
                thread::sleep(Duration::from_millis(1));
            }
        };
        wait(2);
        assert_eq!(talk(&engine, 1, false), alone, "beside a run that works");
        wait(2);
        handle.pause();
        assert!(handle.wait_paused(Duration::from_secs(60)));
        assert_eq!(talk(&engine, 1, false), alone, "beside a run that is paused");
        // The last whole step's adapter joins a chat, and leaves it.
        let id = engine.attach_file(handle.snapshot().unwrap(), 1.0).unwrap();
        assert_ne!(talk(&engine, 1, false), alone);
        engine.detach(id).unwrap();
        handle.resume();
        wait(1);
        handle.cancel();
        assert!(!run.join().unwrap().done);
    });
}

/// Calls a handle's snapshot on the run's own thread.
struct AsksForSnapshots(pocketlora::TrainHandle, Vec<ErrorCode>);

impl Observer for AsksForSnapshots {
    fn on_step(&mut self, _: &StepReport) -> ControlFlow<()> {
        self.1.extend(self.0.snapshot().err().map(|e| e.code()));
        ControlFlow::Continue(())
    }
}

/// It would wait for itself.
#[test]
fn a_snapshot_that_a_callback_asks_for_is_refused_and_a_run_ends_with_its_last_step() {
    let dir = tempfile::tempdir().unwrap();
    let (model, data) = tiny_training(dir.path(), 4);
    let engine = open(&model, &two());
    let train = |out: &Path| {
        let config = TrainConfig { steps: Some(2), ..TrainConfig::default() };
        engine.trainer(config, engine.dataset(&data, 1024).unwrap(), None, None, out)
    };
    let mut trainer = train(&dir.path().join("out")).unwrap();
    let mut observer = AsksForSnapshots(trainer.handle(), Vec::new());
    assert!(trainer.run(&mut observer).unwrap().done);
    assert_eq!(observer.1, [ErrorCode::Config; 2]);

    let error = trainer.step(&mut observer).unwrap_err();
    assert!(error.code() == ErrorCode::Config && error.to_string().contains("`2` steps are done"), "{error}");
    assert!(trainer.run(&mut observer).unwrap().done, "there is nothing left to do");

    let error = train(&model).map(|_| ()).unwrap_err();
    assert!(error.to_string().contains("holds a model"), "{error}");
}

/// What somebody trained is not lost to a folder that was named twice.
#[test]
fn a_run_replaces_what_an_earlier_one_left_only_if_it_is_told_to() {
    let dir = tempfile::tempdir().unwrap();
    let (model, data) = tiny_training(dir.path(), 4);
    let engine = open(&model, &two());
    let out = dir.path().join("out");
    let trainer = |steps| {
        let config = TrainConfig { steps: Some(steps), ..TrainConfig::default() };
        engine.trainer(config, engine.dataset(&data, 1024).unwrap(), None, None, &out).unwrap()
    };
    let bytes = |name: &str| std::fs::read(out.join(name)).unwrap();
    let quiet = &mut Counter(&AtomicUsize::new(0));
    let refused = |trainer: &mut Trainer, what: &str| {
        let quiet = &mut Counter(&AtomicUsize::new(0));
        let tries = [
            trainer.run(quiet).map(|_| ()),
            trainer.step(quiet).map(|_| ()),
            trainer.save_checkpoint(),
            trainer.save_adapter(),
        ];
        for error in tries.map(Result::unwrap_err) {
            assert!(error.code() == ErrorCode::Config && error.to_string().contains(what), "{error}");
        }
    };
    trainer(2).run(quiet).unwrap();
    let first = bytes("adapter_model.safetensors");
    let mut second = trainer(3);
    refused(&mut second, "holds an adapter");
    assert_eq!(bytes("adapter_model.safetensors"), first);
    second.replace_earlier();
    second.step(quiet).unwrap();
    second.save_checkpoint().unwrap();
    drop(second);

    let checkpoint = bytes("checkpoint.safetensors");
    let mut third = trainer(3);
    refused(&mut third, "unfinished run");
    assert_eq!(bytes("checkpoint.safetensors"), checkpoint);
    third.resume().unwrap();
    assert!(third.run(quiet).unwrap().done);
    assert_ne!(bytes("adapter_model.safetensors"), first);
}

#[test]
fn a_listener_that_panics_leaves_the_conversation_as_it_was() {
    let dir = tempfile::tempdir().unwrap();
    let engine = open(&tiny_chat_model(dir.path()), &two());
    let mut chat = chat(&engine, 8, 1);
    chat.set_messages(vec![Message::new("system", "be kind")]);
    chat.ask("one?", &mut quiet).unwrap();
    let before = chat.messages().to_vec();
    let mut asked = || chat.ask("two?", &mut |_: &str| panic!("in a listener"));
    assert!(std::panic::catch_unwind(std::panic::AssertUnwindSafe(&mut asked)).is_err());
    assert_eq!(chat.messages(), before);
}

/// Code of the host's that runs in the middle of a step may use the engine.
#[test]
fn a_policy_may_ask_the_model() {
    let dir = tempfile::tempdir().unwrap();
    let (model, data) = tiny_training(dir.path(), 4);
    let engine = open(&model, &two());
    let config = TrainConfig { steps: Some(1), ..TrainConfig::default() };
    let data = engine.dataset(&data, 1024).unwrap();
    let mut trainer = engine.trainer(config, data, None, None, &dir.path().join("out")).unwrap();
    let mut chat = chat(&engine, 3, 1);
    trainer.set_policy(Box::new(move || {
        chat.ask("may it go on?", &mut quiet).unwrap();
        Directive::Run
    }));
    assert!(trainer.run(&mut Counter(&AtomicUsize::new(0))).unwrap().done);
}

#[test]
fn each_chat_has_the_adapters_that_it_chose() {
    let dir = tempfile::tempdir().unwrap();
    let (model, data) = tiny_training(dir.path(), 4);
    // A prompt that is known already is read in other pieces, which tells in 8 bits.
    let exact = two().precision(Precision::Exact);
    let engine = open(&model, &exact);
    let train = |name: &str, seed: u64| {
        let config = TrainConfig { steps: Some(3), lr: 5e-2, seed, ..TrainConfig::default() };
        let (data, out) = (engine.dataset(&data, 1024).unwrap(), dir.path().join(name));
        engine.trainer(config, data, None, None, &out).unwrap().run(&mut Counter(&AtomicUsize::new(0))).unwrap();
        out
    };
    let folders = [train("a", 1), train("b", 2)];
    let ask =
        |chat: &mut Chat| chat.reply(&[Message::new("user", "number 2?")], &mut quiet).map(|a: Answer| a.generated.ids);
    let with = |attached: &[&Path]| {
        let engine = open(&model, &exact);
        attached.iter().for_each(|dir| {
            engine.attach(dir, 1.0).unwrap();
        });
        ask(&mut chat(&engine, 12, 5)).unwrap()
    };
    let [a, b] = [&folders[0], &folders[1]].map(|dir| dir.as_path());
    let alone = [with(&[]), with(&[a]), with(&[b]), with(&[a, b])];
    assert!((1..4).all(|i| alone[..i].iter().all(|other| *other != alone[i])), "{alone:?}");

    let [ida, idb] = [a, b].map(|dir| engine.attach(dir, 1.0).unwrap());
    let mut chats: Vec<Chat> = (0..4).map(|_| chat(&engine, 12, 5)).collect();
    for (chat, chosen) in chats.iter_mut().zip([&[][..], &[ida], &[idb]]) {
        chat.use_adapters(chosen).unwrap();
    }
    thread::scope(|s| {
        for (chat, alone) in chats.iter_mut().zip(&alone) {
            s.spawn(move || (0..2).for_each(|_| assert_eq!(ask(chat).unwrap(), *alone)));
        }
    });
    engine.detach(ida).unwrap();
    assert_eq!(engine.detach(ida).unwrap_err().code(), ErrorCode::Config);
    assert_eq!(ask(&mut chats[1]).unwrap_err().code(), ErrorCode::Config, "it chose what is no more");
    assert_eq!((ask(&mut chats[2]).unwrap(), ask(&mut chats[3]).unwrap()), (alone[2].clone(), alone[2].clone()));
    chats[1].use_all_adapters();
    assert_eq!(ask(&mut chats[1]).unwrap(), alone[2]);
    assert_eq!(chats[1].use_adapters(&[ida]).unwrap_err().code(), ErrorCode::Config);
}

#[test]
fn a_bound_on_the_context_is_kept_and_told() {
    let dir = tempfile::tempdir().unwrap();
    let engine = open(&long_model(dir.path()), &two().context(40));
    assert!(engine.context_tokens() == 40 && engine.is_context_bound());
    let mut chat = chat(&engine, 100, 1);
    let error = chat.generate(vec![70; 40], &mut quiet).unwrap_err();
    assert_eq!((error.code(), error.item()), (ErrorCode::ContextFull, "prompt"));
    assert!(error.next().is_some_and(|next| next.contains("larger `Options::context`")), "{error}");
    // No end of an answer is among these.
    let mut go_on = TokenBias::new([(1, f32::NEG_INFINITY), (2, f32::NEG_INFINITY)]);
    let mut decoder = chat.decoder(vec![70; 30]).unwrap().filter(&mut go_on);
    while decoder.next_token().unwrap().is_some() {}
    assert_eq!((decoder.finished(), decoder.into_generated().ids.len()), (Some(Finish::Context), 10));
    let free = open(&long_model(dir.path()), &two().context(1 << 30));
    assert!(free.context_tokens() == 4096 && !free.is_context_bound());
    // Layers, keys and values, heads, width, bytes of f16.
    let config = pocketlora::internals::base(&free).model.config();
    let token = (config.layers * 2 * config.kv_heads * config.head_dim * 2) as u64;
    assert_eq!(free.context_bytes(1000), 1000 * token);
    let small = open(&long_model(dir.path()), &two().int8_cache(true));
    assert!(small.context_bytes(1000) < free.context_bytes(1000));
}

/// Two layers with a window of 8 tokens and one without: once two blocks of 64 tokens are full, one layer grows.
#[test]
fn layers_with_a_window_are_counted_with_no_more_than_it() {
    let engine = open(&golden("families/gemma3_text"), &two().context(200));
    let [first, ahead, full] = [0, 199, 399].map(|n| engine.context_bytes(n + 1) - engine.context_bytes(n));
    let config = pocketlora::internals::base(&engine).model.config();
    let row = (2 * config.kv_heads * config.head_dim * 2) as u64;
    assert_eq!([first, ahead, full], [3 * row, row, row]);
    assert_eq!(engine.context_bytes(200), (200 + 2 * 128) * row);
}

#[test]
fn a_device_that_is_not_there_is_refused_by_name() {
    let dir = tempfile::tempdir().unwrap();
    let refused = Engine::open(&tiny_chat_model(dir.path()), &two().device(Device::Vulkan)).map(|_| ()).unwrap_err();
    assert_eq!((refused.code(), refused.item()), (ErrorCode::Unsupported, "setting `device`"));
}

#[test]
fn what_apps_hold_may_move_between_threads() {
    fn sends<T: Send>() {}
    fn shares<T: Send + Sync + Clone>() {}
    shares::<Engine>();
    shares::<Cancel>();
    sends::<Chat>();
    sends::<pocketlora::Decoder<'_>>();
    sends::<Trainer>();
}

#[path = "../../examples/app.rs"]
mod app;

#[test]
fn the_example_runs() {
    let dir = tempfile::tempdir().unwrap();
    let (model, data) = tiny_training(dir.path(), 4);
    let [before, _, after] = app::run(&model, &data, &dir.path().join("out"), "what is number 3?").unwrap();
    assert_ne!(before, after);
}

/// A package of an app: the model's files one after the other, none at the start of a page.
#[test]
fn a_model_opens_from_places_in_a_package() {
    use pocketlora::GivenFile;
    use std::io::Write as _;
    let dir = tempfile::tempdir().unwrap();
    let (model, package) = (tiny_chat_model(dir.path()), dir.path().join("package"));
    let (mut out, mut places, mut at) = (std::fs::File::create(&package).unwrap(), Vec::new(), 0);
    for name in ["config.json", "tokenizer.json", "model.safetensors", "tokenizer_config.json"] {
        let bytes = std::fs::read(model.join(name)).unwrap();
        out.write_all(b"between").unwrap();
        out.write_all(&bytes).unwrap();
        places.push((name, at + 7, bytes.len() as u64));
        at += 7 + bytes.len() as u64;
    }
    let files = |places: &[(&str, u64, u64)]| -> Vec<GivenFile> {
        let one = |&(name, offset, len): &(&str, u64, u64)| GivenFile {
            name: name.to_owned(),
            file: std::fs::File::open(&package).unwrap(),
            offset,
            len,
        };
        places.iter().map(one).collect()
    };
    let (scratch, options) = (dir.path().join("scratch"), Options::new().threads(1));
    let engine = Engine::open_given(files(&places), &scratch, &options).unwrap();
    let folder = Engine::open(&model, &options).unwrap();
    let ids: Vec<u32> = (3..40).collect();
    assert_eq!(logits(&engine, &ids), logits(&folder, &ids));
    assert_eq!(engine.mapped_bytes(), folder.mapped_bytes());
    drop(engine);
    assert_eq!(std::fs::read_dir(&scratch).unwrap().count(), 0, "the copies stay");

    let mut cases = vec![("beyond the package", ErrorCode::Format, places.clone())];
    cases[0].2[2].2 += 1000;
    cases.push(("a part of a file", ErrorCode::Format, places.clone()));
    cases[1].2[2].2 -= 1;
    cases.push(("no weights", ErrorCode::Format, places[..2].to_vec()));
    cases.push(("a name twice", ErrorCode::Config, [&places[..], &places[..1]].concat()));
    cases.push(("no config", ErrorCode::Config, places[1..].to_vec()));
    for (what, code, places) in cases {
        let refused = Engine::open_given(files(&places), &scratch, &options).map(drop).unwrap_err();
        assert!(
            refused.code() == code || code == ErrorCode::Format && refused.code() == ErrorCode::Io,
            "{what}: {refused}"
        );
        assert_eq!(std::fs::read_dir(&scratch).unwrap().count(), 0, "{what}: the copies stay");
    }
}
