//! Adapters that requests pick, as commands.

use crate::common::golden;
use crate::fixture::{Fixture, fixture};
use std::fs;
use std::path::Path;

/// Questions on one topic, whose letters are its own.
fn topic(path: &str, letters: &str) {
    let line = |i: usize| {
        let question: String = letters.chars().cycle().skip(i).take(8).collect();
        format!("{{\"prompt\": \"{question}\", \"completion\": \"{i}\"}}\n")
    };
    fs::write(path, (0..8).map(line).collect::<String>()).unwrap();
}

/// A folder with two adapters, `low` and `high`, each trained on a topic of its own.
fn folder(f: &Fixture) -> String {
    for (name, letters) in [("low", "abcdefgh"), ("high", "qrstuvwx")] {
        let (data, out) = (f.path(&format!("{name}.jsonl")), f.path(&format!("adapters/{name}")));
        topic(&data, letters);
        let model = f.model.to_str().unwrap();
        f.ok(&["train", "--auto", "off", "-m", model, "-d", &data, "-o", &out, "--steps", "2", "--batch", "2"]);
        assert!(Path::new(&out).join("centroid.safetensors").exists());
    }
    f.path("adapters")
}

#[test]
fn requests_pick_among_the_adapters_of_a_folder() {
    let f = fixture();
    let (dir, model) = (folder(&f), f.model.to_str().unwrap());
    let listed = f.ok(&["info", &dir]);
    assert!(listed.contains("low: ") && listed.contains("centroid of 8 texts"), "{listed}");
    let listed = f.json(&["info", &dir, "--json"]);
    assert_eq!(listed["adapters"][0]["texts"], 8, "{listed}");

    let generate = |prompt| ["generate", "-m", model, "--adapters", &dir, "-p", prompt, "-n", "2", "--route"];
    for (prompt, name) in [("hgfedcba", "low"), ("xwvutsrq", "high")] {
        let report = f.json(&[&generate(prompt)[..], &["1", "--json"]].concat());
        assert_eq!((&report["adapters"][0]["name"], &report["adapters"][0]["weight"]), (&name.into(), &1.0.into()));
        let said = f.said(&generate(prompt));
        assert!(
            said.contains("picks among 2 adapters: high, low") && said.contains(&format!("(adapters: {name} 1)")),
            "{said}"
        );
    }
    let data = f.path("low.jsonl");
    let eval = ["eval", "-m", model, "--adapters", &dir, "--route", "-d", &data, "--metrics", "perplexity,exact"];
    let report = f.json(&[&eval[..], &["--json"]].concat());
    assert_eq!((&report["nearest"]["low"], &report["nearest"]["high"]), (&16.into(), &0.into()), "{report}");
    assert!(f.ok(&eval).contains("high 0, low 16"));

    // One that has no centroid gets it.
    let low = f.path("adapters/low");
    let write = ["centroid", &low, "-m", model, "-d", &data];
    assert!(f.said(&write).contains("--overwrite"));
    let path = Path::new(&low).join("centroid.safetensors");
    let old = fs::read(&path).unwrap();
    fs::remove_file(&path).unwrap();
    assert!(f.said(&generate("abc")).contains("pocketlora centroid"));
    assert!(f.ok(&write).contains("of 8 texts"));
    assert_eq!(fs::read(&path).unwrap(), old);
    assert_eq!(f.json(&[&write[..], &["--overwrite", "--json"]].concat())["texts"], 8);
    let foreign = golden("tiny-qwen2");
    let said = f.said(&["centroid", &low, "-m", foreign.to_str().unwrap(), "-d", &data, "--overwrite"]);
    assert!(said.contains("error:"), "{said}");

    for (more, code, says) in [
        (&["--adapters", &dir, "--route", "-a", &low][..], 2, "cannot be used with"),
        (&["--adapters", &dir], 2, "--route"),
        (&["--route", "2"], 2, "--adapters"),
        (&["--adapters", &dir, "--route", "0"], 1, "`route`"),
        (&["--adapters", &dir, "--route", "many"], 2, "many"),
        (&["--adapters", &low, "--route"], 1, "got an adapter"),
        (&["--adapters", model, "--route"], 1, "got none in it"),
    ] {
        let out = f.run(&[&["generate", "-m", model, "-p", "abc", "-n", "1"][..], more].concat());
        let said = String::from_utf8_lossy(&out.stderr);
        assert!(out.status.code() == Some(code) && said.contains(says), "{more:?}: {said}");
    }
}

#[test]
fn a_chat_says_what_it_picked() {
    use std::io::Write as _;
    use std::process::Stdio;
    let f = fixture();
    let (dir, model) = (folder(&f), f.model.to_str().unwrap());
    let mut chat = f.command(&["chat", "-m", model, "--adapters", &dir, "--route", "1", "-n", "2", "--seed", "1"]);
    let mut chat = chat.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    chat.stdin.take().unwrap().write_all(b"/route\nabcdef\nfedc\n/route\nqrstuvwxqrstuvwx\n/adapter\n").unwrap();
    let out = chat.wait_with_output().unwrap();
    let [said, heard] = [&out.stderr, &out.stdout].map(|bytes| String::from_utf8_lossy(bytes).into_owned());
    assert!(said.contains("(nothing is asked yet)"), "{said}");
    // Told where it changes.
    let told: Vec<&str> = said.lines().filter(|line| line.starts_with("(adapters:")).collect();
    assert_eq!(told, ["(adapters: low 1)", "(adapters: high 1)"], "{said}");
    assert!(heard.contains("low: similarity ") && heard.contains("weight 1"), "{heard}");
}
