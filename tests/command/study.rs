//! Notes that are studied: what is made of them, that it is kept, and that it teaches.

use crate::common::real_gguf;
use crate::fixture::{Fixture, fixture};
use pocketlora::study::{Item, STUDY, Source, StudyOptions, make, read_notes};
use pocketlora::{Engine, ErrorCode, Options};
use std::fs;
use std::path::Path;

const BOATS: &str = "# The boat shed\n\nThe red boat is called Lanterna. It belongs to Ingrid Falk, who bought it in Oslo for \
                     900 dollars.\n\nSpares: The rope lies behind the stove. Two oars hang in the attic.\n";
const SHOP: &str =
    "# Tea shop\n\nThe shop opens at 9:30 on Tuesdays. If the bell is broken, knock at the blue window.\n";

/// A folder of notes.
fn notes(f: &Fixture, files: &[(&str, &str)]) -> String {
    let dir = f.path("notes");
    let _ = fs::remove_dir_all(&dir);
    fs::create_dir_all(&dir).unwrap();
    files.iter().for_each(|(name, text)| fs::write(Path::new(&dir).join(name), text).unwrap());
    dir
}

fn train<'a>(f: &'a Fixture, notes: &'a str, out: &'a str, more: &[&'a str]) -> Vec<&'a str> {
    let quick = ["--steps", "2", "--batch", "2", "--threads", "1"];
    [&["train", "-m", f.model.to_str().unwrap(), "-d", notes, "-o", out], &quick[..], more].concat()
}

fn lines(out: &str) -> Vec<Item> {
    let text = fs::read_to_string(Path::new(out).join(STUDY)).unwrap();
    text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

#[test]
fn notes_become_questions_by_default_and_edits_are_learned() {
    let f = fixture();
    let (dir, out, plain) = (notes(&f, &[("boats.md", BOATS), ("shop.md", SHOP)]), f.path("out"), f.path("plain"));
    let said = f.said(&train(&f, &dir, &out, &[]));
    assert!(said.contains("study: 2 notes of 6 sentences") && said.contains("by rules"), "{said}");
    let made = lines(&out);
    // The tiny model has never seen a text: rules alone ask.
    assert!(made.len() >= 24 && made.iter().all(|item| item.source == Source::Template), "{made:#?}");
    let asks = |question: &str, answer: &str| made.iter().any(|i| i.question == question && i.answer.contains(answer));
    assert!(asks("At what time does the shop open?", "9:30"), "{made:#?}");
    assert!(asks("What should I do if the bell is broken?", "blue window"), "{made:#?}");
    assert!(made.iter().any(|item| item.held) && made.iter().all(|item| !item.held || item.key.is_some()));
    // What points to the sentence before it is learned with that sentence.
    assert!(made.iter().any(|item| item.answer.starts_with("The red boat is called Lanterna. It belongs")));

    let path = Path::new(&out).join(STUDY);
    let edited = fs::read_to_string(&path).unwrap().replace("At what time does the shop open?", "Shop hours?")
        + "{\"question\": \"Who am I?\", \"answer\": \"The owner.\"}\n";
    fs::write(&path, &edited).unwrap();
    let said = f.said(&train(&f, &dir, &out, &["--overwrite"]));
    assert!(said.contains("1 by you") && said.contains("taken up as edited"), "{said}");
    assert_eq!(fs::read_to_string(&path).unwrap(), edited);

    // What changed is made anew, and the rest stays.
    fs::write(Path::new(&dir).join("boats.md"), BOATS.replace("Lanterna", "Morgana")).unwrap();
    let said = f.said(&train(&f, &dir, &out, &["--overwrite"]));
    assert!(said.contains("edited lines kept"), "{said}");
    let again = lines(&out);
    let has = |text: &str| again.iter().any(|item| item.question.contains(text) || item.answer.contains(text));
    assert!(has("Morgana") && !has("Lanterna") && has("Shop hours?") && has("Who am I?"), "{again:#?}");

    f.ok(&train(&f, &dir, &plain, &["--study", "off"]));
    assert!(!Path::new(&plain).join(STUDY).exists() && Path::new(&plain).join("adapter_config.json").exists());
}

#[test]
fn material_that_was_stopped_goes_on_where_it_was() {
    let f = fixture();
    let dir = notes(&f, &[("boats.md", BOATS), ("shop.md", SHOP), ("one.txt", "word")]);
    let engine = Engine::open(&f.model, &Options::new().threads(1)).unwrap();
    let all = read_notes(Path::new(&dir)).unwrap().unwrap();
    let (whole, parts) = (f.dir.path().join("whole"), f.dir.path().join("parts"));
    let options = StudyOptions::default();
    let straight = make(&engine, &all, Some(&whole), &options, &mut |_| true).unwrap();
    let mut stops = 0;
    let made = loop {
        // Each time a sentence more than lay there, then a stop.
        let (mut begun, stop_at) = (None, stops + 2);
        let made = make(&engine, &all, Some(&parts), &options, &mut |p| {
            begun.get_or_insert(p.sentences);
            p.sentences < stop_at
        });
        assert!(stops < 20, "it never ends");
        match made {
            Ok(made) => break made,
            Err(e) => assert_eq!(e.code(), ErrorCode::Cancelled, "{e}"),
        }
        stops += 1;
    };
    assert!(stops >= 3, "{stops} stops");
    assert_eq!(made.items, straight.items);
    assert_eq!(fs::read(whole.join(STUDY)).unwrap(), fs::read(parts.join(STUDY)).unwrap());
    let again = make(&engine, &all, Some(&parts), &options, &mut |_| panic!("nothing is left to be made")).unwrap();
    assert!(again.found && !again.edited && again.items == straight.items);
}

#[test]
fn notes_of_any_kind_are_studied_or_refused_in_words() {
    let f = fixture();
    let out = f.path("out");
    for (text, said) in [
        ("milk", "study: a note of 1"),
        (
            "\u{41b}\u{43e}\u{434}\u{43a}\u{430} \u{441}\u{442}\u{43e}\u{438}\u{442} \u{443} \u{43f}\u{440}\u{438}\u{447}\u{430}\u{43b}\u{430}. \u{412} \u{43d}\u{435}\u{439} \u{442}\u{435}\u{447}\u{44c}.",
            "study: a note of 2",
        ),
        ("\u{732b}\u{304c}\u{5bdd}\u{3066}\u{3044}\u{307e}\u{3059}\u{3002}", "study: a note of 1"),
        ("# Only a title", "done after"),
    ] {
        let dir = notes(&f, &[("n.md", text)]);
        let run = f.run(&train(&f, &dir, &out, &["--overwrite"]));
        let told = String::from_utf8_lossy(&[run.stdout, run.stderr].concat()).into_owned();
        assert!(run.status.success() && told.contains(said), "{text}: {told}");
        if said.starts_with("study") {
            let made = lines(&out);
            assert!(!made.is_empty() && made.iter().all(|item| !item.question.trim().is_empty()), "{made:?}");
        }
    }
    let dir = notes(&f, &[("n.md", " \n")]);
    let told = f.said(&train(&f, &dir, &out, &["--overwrite"]));
    assert!(told.contains("expected at least one line"), "{told}");
    let told = f.said(&train(&f, f.data.to_str().unwrap(), &out, &["--study", "--overwrite"]));
    assert!(told.contains("expected notes") && told.contains("leave out `--study`"), "{told}");

    let (dir, broken) = (notes(&f, &[("shop.md", SHOP)]), f.path("broken"));
    fs::create_dir_all(&broken).unwrap();
    fs::write(Path::new(&broken).join(STUDY), "{\"question\": \"no answer\"}\n").unwrap();
    let told = f.said(&train(&f, &dir, &broken, &[]));
    assert!(told.contains("study.jsonl` line 1") && told.contains("take it out"), "{told}");
    let told = f.said(&train(&f, &dir, &f.path("x"), &["--study-time", "soon"]));
    assert!(told.contains("`10m` or `2h`"), "{told}");

    // Emptied by hand: not the notes are to blame.
    let emptied = f.path("emptied");
    let told = f.said(&train(&f, &dir, &emptied, &[]));
    assert!(told.contains("auto: lr ") && told.contains("2 steps; for "), "{told}");
    fs::write(Path::new(&emptied).join(STUDY), "").unwrap();
    let told = f.said(&train(&f, &dir, &emptied, &["--overwrite"]));
    assert!(told.contains("study.jsonl`") && told.contains("delete the file to have it made anew"), "{told}");
}

#[test]
fn a_dry_run_shows_questions_and_writes_nothing() {
    let f = fixture();
    let dir = notes(&f, &[("shop.md", SHOP)]);
    let shown = f.ok(&["train", "-m", f.model.to_str().unwrap(), "-d", &dir, "--dry-run"]);
    assert!(shown.contains("study: these notes") && shown.contains("At what time does the shop open?"), "{shown}");
}

#[test]
fn a_real_model_asks_about_notes_and_then_knows_them() {
    let Some(gguf) = real_gguf() else { return };
    let f = fixture();
    let (dir, out) = (notes(&f, &[("boats.md", BOATS)]), f.path("out"));
    let args = [
        "train",
        "-m",
        gguf.to_str().unwrap(),
        "-d",
        &dir,
        "-o",
        &out,
        "--study-time",
        "60s",
        "--steps",
        "24",
        "--batch",
        "4",
        "--json",
    ];
    let stdout = f.ok(&args);
    let line = stdout.lines().find(|line| line.starts_with("{\"study\"")).unwrap_or_else(|| panic!("{stdout}"));
    let told: serde_json::Value = serde_json::from_str(line).unwrap();
    let count = |when: &str| told["study"][when]["held"].as_u64().unwrap();
    assert!(count("after") > count("before"), "{told}");
    let made = lines(&out);
    assert!(made.iter().any(|item| item.source == Source::Model), "{made:#?}");
}
