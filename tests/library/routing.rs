//! Mixes of adapters that are on the device, and adapters that a request picks.

use crate::common::{check_all, golden, logits, open_exact, quiet, tiny_chat_model};
use pocketlora::adapter::{AdapterFile, CENTROID, Centroid};
use pocketlora::train::Sample;
use pocketlora::{Dataset, Engine, Message};
use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

const IDS: [u32; 9] = [3, 14, 15, 92, 65, 35, 89, 79, 32];

/// A folder with the adapters `names` of the oracles `from`, each taught about the tokens beside it.
fn folder(engine: &Engine, dir: &Path, from: &str, names: &[(&str, &[u32])]) -> PathBuf {
    let out = dir.join("adapters");
    for (name, ids) in names {
        let to = out.join(name);
        fs::create_dir_all(&to).unwrap();
        for file in ["adapter_config.json", "adapter_model.safetensors"] {
            fs::copy(golden(from).join(name).join(file), to.join(file)).unwrap();
        }
        let data = Dataset::new("made", vec![Sample::of_text(ids.to_vec())]);
        engine.centroid(&data).unwrap().unwrap().write(&to).unwrap();
    }
    out
}

/// The base of the oracles of compositions.
fn base() -> Engine {
    open_exact(&golden("peft/base"), 1)
}

#[test]
fn a_mix_of_attached_adapters_is_the_one_that_was_attached_so() {
    let names =
        ["lora", "lora_bias", "lora_bdlora", "adalora", "shira", "vera", "lokr", "loha", "miss", "gralora", "delora"];
    check_all(names, |name| {
        let dir = golden("methods").join(name);
        let (at_once, later) = (base(), base());
        at_once.attach(&dir, 0.4).map_err(|e| e.to_string())?;
        let id = later.attach(&dir, 1.0).map_err(|e| e.to_string())?;
        let whole = logits(&later, &IDS);
        later.set_scales(&[(id, 0.4)]).map_err(|e| e.to_string())?;
        if logits(&later, &IDS) != logits(&at_once, &IDS) || logits(&later, &IDS) == whole {
            return Err(format!("{name}: another mix"));
        }
        later.set_scales(&[(id, 1.0)]).map_err(|e| e.to_string())?;
        if logits(&later, &IDS) == whole { Ok(()) } else { Err(format!("{name}: not as before")) }
    });
    // Several, then without one of them.
    let (mixed, apart) = (base(), base());
    let [a, b] = ["a", "b"].map(|name| mixed.attach(&golden("composition").join(name), 1.0).unwrap());
    mixed.set_scales(&[(b, -0.3), (a, 0.7)]).unwrap();
    apart.attach(&golden("composition/a"), 0.7).unwrap();
    let other = apart.attach(&golden("composition/b"), -0.3).unwrap();
    assert_eq!(logits(&mixed, &IDS), logits(&apart, &IDS));
    mixed.detach(a).unwrap();
    apart.detach_all();
    assert!(apart.set_scales(&[(other, 1.0)]).is_err());
    apart.attach(&golden("composition/b"), -0.3).unwrap();
    assert_eq!(logits(&mixed, &IDS), logits(&apart, &IDS));
    let scales: Vec<f32> = mixed.attached().iter().map(|adapter| adapter.scale).collect();
    assert_eq!(scales, [-0.3]);
}

#[test]
fn a_mix_is_swapped_in_under_a_millisecond() {
    let engine = base();
    let ids = ["a", "b", "c"].map(|name| engine.attach(&golden("composition").join(name), 1.0).unwrap());
    let swap = |i: u32| {
        let start = Instant::now();
        engine.set_scales(&ids.map(|id| (id, 0.1 * i as f32))).unwrap();
        start.elapsed()
    };
    let mut times: Vec<Duration> = (0..51).map(swap).collect();
    times.sort();
    // Others may use the processor meanwhile.
    assert!(times[10] < Duration::from_millis(1), "{times:?}");
}

#[test]
fn what_has_no_strength_and_what_is_no_number_changes_nothing() {
    let engine = base();
    let lora = engine.attach(&golden("methods/lora"), 0.5).unwrap();
    let ia3 = engine.attach(&golden("methods/ia3"), 1.0).unwrap();
    let before = logits(&engine, &IDS);
    for (scales, says) in [
        (&[(lora, 2.0), (ia3, 0.5)][..], "has no strength"),
        (&[(lora, f32::NAN)], "a number from"),
        (&[(lora, 2e4)], "a number from"),
    ] {
        let error = engine.set_scales(scales).unwrap_err().to_string();
        assert!(error.contains(says), "{error}");
        assert_eq!(logits(&engine, &IDS), before);
    }
    engine.set_scales(&[(lora, 2.0), (ia3, 1.0)]).unwrap();
    assert_ne!(logits(&engine, &IDS), before);
}

#[test]
fn requests_are_answered_with_the_adapters_that_lie_nearest() {
    let temp = tempfile::tempdir().unwrap();
    let topics: [(&str, &[u32]); 3] = [("a", &[10, 11, 12, 13]), ("b", &[40, 41, 42, 43]), ("c", &[70, 71, 72, 73])];
    let (routed, plain) = (base(), base());
    let dir = folder(&routed, temp.path(), "composition", &topics);
    routed.route(&dir, 1).unwrap();
    assert!(routed.attached().is_empty());
    for (name, ids) in topics {
        let id = plain.attach(&dir.join(name), 1.0).unwrap();
        // In another order, and with a token of another topic.
        let asked: Vec<u32> = ids.iter().rev().copied().chain([topics[0].1[0]]).collect();
        assert_eq!(logits(&routed, &asked), logits(&plain, &asked), "{name}");
        plain.detach(id).unwrap();
    }
    assert_eq!(routed.routed().iter().map(|one| (one.texts, one.nearest)).collect::<Vec<_>>(), [(1, 1); 3]);

    // Halfway between two, both are mixed.
    routed.detach_all();
    assert!(routed.routed().is_empty());
    assert_eq!(logits(&routed, &IDS), logits(&base(), &IDS));
    routed.route(&dir, 2).unwrap();
    let between = [10, 11, 12, 13, 40, 41, 42, 43];
    let found = logits(&routed, &between);
    let mixes = [(0.4, 0.6), (0.5, 0.5), (0.6, 0.4), (0.3, 0.7), (0.7, 0.3)];
    let is = |(a, b): &(f32, f32)| {
        plain.detach_all();
        plain.attach(&dir.join("a"), *a).unwrap();
        plain.attach(&dir.join("b"), *b).unwrap();
        logits(&plain, &between) == found
    };
    assert!(mixes.iter().any(is));
}

#[test]
fn a_chat_keeps_what_it_read_while_the_picks_stay() {
    let temp = tempfile::tempdir().unwrap();
    let engine = open_exact(&tiny_chat_model(temp.path()), 1);
    let letters = |from: u8| (0..8).map(|i| u32::from(from + i) + 3).collect::<Vec<u32>>();
    let (low, high) = (letters(b'a'), letters(b'q'));
    let dir = folder(&engine, temp.path(), "adapters", &[("lora", &low), ("rslora", &high)]);
    engine.route(&dir, 1).unwrap();
    let mut chat = engine.chat().unwrap();
    chat.max_tokens = 3;
    let mut ask = |question: &str| {
        let done = chat.ask(question, &mut quiet).unwrap().generated;
        let names: Vec<String> = chat.picked().iter().map(|pick| format!("{} {}", pick.name, pick.weight)).collect();
        (names.join(","), done.prefilled < done.prompt_tokens)
    };
    assert_eq!(ask("abcdef"), ("lora 1".to_owned(), false));
    assert_eq!(ask("fedcba"), ("lora 1".to_owned(), true));
    assert_eq!(ask("qrstuv"), ("rslora 1".to_owned(), false));
    // What was said before counts less, and still counts.
    assert_eq!(ask("vutsrq"), ("rslora 1".to_owned(), true));

    // Kept, and gone on with.
    let state = temp.path().join("kept");
    chat.save_state(&state).unwrap();
    let mut again = engine.chat().unwrap();
    again.load_state(&state).unwrap();
    assert_eq!(again.picked()[0].name, "rslora");
    let [one, two] = [&mut chat, &mut again].map(|chat| chat.ask("qqqq", &mut quiet).unwrap());
    assert_eq!((one.text, one.generated.prefilled), (two.text, two.generated.prefilled));
    engine.detach_all();
    let mut other = engine.chat().unwrap();
    assert!(other.load_state(&state).unwrap_err().to_string().contains("expected the adapters"));
    assert!(!other.pick(&[Message::new("user", "abc")]).unwrap());
}

#[test]
fn folders_that_cannot_be_picked_from_are_refused() {
    let temp = tempfile::tempdir().unwrap();
    let engine = base();
    let dir = folder(&engine, temp.path(), "composition", &[("a", &[1, 2]), ("b", &[3, 4])]);
    let empty = temp.path().join("empty");
    fs::create_dir(&empty).unwrap();
    let one = dir.join("a");
    let case = |dir: &Path, most: usize, says: &str| {
        let error = engine.route(dir, most).unwrap_err().to_string();
        assert!(error.contains(says), "{says}: {error}");
        assert!(engine.routed().is_empty());
    };
    case(&dir, 0, "`route`");
    case(&empty, 1, "got none in it");
    case(&temp.path().join("none"), 1, "none");
    case(&one, 1, "got an adapter");
    let path = one.join(CENTROID);
    let good = fs::read(&path).unwrap();
    fs::remove_file(&path).unwrap();
    case(&dir, 1, "expected a `centroid.safetensors`");
    Centroid { values: vec![1.0; 3], texts: 1 }.write(&one).unwrap();
    case(&dir, 1, "expected a centroid of the width");
    fs::write(&path, &good).unwrap();
    for (name, says) in
        [("prefix_tuning", "can be mixed"), ("ia3", "IA3"), ("lora_modules_to_save", "weights in place")]
    {
        let to = dir.join("c");
        fs::create_dir_all(&to).unwrap();
        for file in ["adapter_config.json", "adapter_model.safetensors"] {
            fs::copy(golden("methods").join(name).join(file), to.join(file)).unwrap();
        }
        fs::write(to.join(CENTROID), &good).unwrap();
        case(&dir, 1, says);
        fs::remove_dir_all(&to).unwrap();
    }
    // One of another base.
    let mut foreign = AdapterFile::open(&dir.join("b")).unwrap();
    let tensors = std::mem::take(&mut foreign.tensors);
    foreign.tensors = tensors.into_iter().map(|(name, t)| (name.replace("layers.0.", "layers.99."), t)).collect();
    foreign.save().unwrap();
    case(&dir, 1, "layers.99");
    fs::remove_dir_all(dir.join("b")).unwrap();
    // Of one there is nothing to choose, and it works; beside it nothing is attached.
    let id = engine.attach(&one, 1.0).unwrap();
    case(&dir, 1, "without attached adapters");
    engine.detach(id).unwrap();
    engine.route(&dir, 3).unwrap();
    assert!(engine.attach(&one, 1.0).unwrap_err().to_string().contains("picked by request"));
    assert!(engine.route(&dir, 3).is_err());
    let (routed, expected) = (logits(&engine, &IDS), base());
    expected.attach(&one, 1.0).unwrap();
    assert_eq!(routed, logits(&expected, &IDS));
}
