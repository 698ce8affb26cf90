//! A gated repository of a hub on this machine, with a token from where people keep theirs.

#[path = "../library/pull/server.rs"]
mod server;

use crate::fixture::{Fixture, fixture};
use server::{COMMIT, Served, small, start};
use std::fs;
use std::process::Output;

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// The files of the model.
fn files(f: &Fixture) -> Vec<Served> {
    let entries = fs::read_dir(&f.model).unwrap().map(|entry| entry.unwrap().path());
    let serve = |path: std::path::PathBuf| {
        let (name, bytes) = (path.file_name().unwrap().to_str().unwrap().to_owned(), fs::read(&path).unwrap());
        match String::from_utf8(bytes) {
            Ok(text) => small(&name, &text),
            Err(e) => server::large(&name, e.into_bytes()),
        }
    };
    entries.map(serve).collect()
}

#[test]
fn the_token_comes_from_the_variable_or_the_file_and_offline_answers_at_once() {
    let f = fixture();
    let server = start(files(&f));
    server.state.lock().unwrap().gate = Some(("secret".to_owned(), 401));
    let hub_home = f.path("hub home");
    let pull = |home: &str, env: &[(&str, &str)]| -> Output {
        let mut command = f.command(&["pull", "maker/model"]);
        for name in ["HF_TOKEN", "HF_HUB_CACHE", "HF_HUB_OFFLINE"] {
            command.env_remove(name);
        }
        command.env("HF_ENDPOINT", &server.endpoint).env("HF_HOME", &hub_home);
        command.env("POCKETLORA_HOME", f.path(home)).envs(env.iter().copied()).output().unwrap()
    };
    let said = |out: &Output| String::from_utf8_lossy(&out.stderr).into_owned();
    let refused = pull("a", &[]);
    assert!(refused.status.code() == Some(1) && said(&refused).contains("set `HF_TOKEN`"), "{}", said(&refused));
    let wrong = pull("a", &[("HF_TOKEN", "guess")]);
    assert!(wrong.status.code() == Some(1) && !said(&wrong).contains("guess"), "{}", said(&wrong));
    let done = pull("a", &[("HF_TOKEN", "secret")]);
    assert!(done.status.success(), "{}", said(&done));
    fs::remove_dir_all(std::path::Path::new(&hub_home).join("hub")).unwrap();
    fs::write(std::path::Path::new(&hub_home).join("token"), "secret\n").unwrap();
    let done = pull("b", &[]);
    assert!(done.status.success(), "{}", said(&done));
    // Offline, the hub's cache answers for itself, and nobody is asked.
    let asked = server.state.lock().unwrap().log.len();
    fs::remove_dir_all(std::path::Path::new(&hub_home).join("hub")).unwrap();
    let offline = pull("c", &[("HF_HUB_OFFLINE", "1")]);
    assert!(offline.status.code() == Some(1) && said(&offline).contains("HF_HUB_OFFLINE"), "{}", said(&offline));
    assert_eq!(server.state.lock().unwrap().log.len(), asked);
}

/// A model that was pulled by file, branch or commit is a model like others: used, listed and removed by that name.
#[test]
fn a_model_is_used_and_removed_by_the_name_that_it_was_pulled_by() {
    let f = fixture();
    let server = start(files(&f));
    let hub_home = f.path("hub home");
    let run = |args: &[&str]| -> Output {
        let mut command = f.command(args);
        for name in ["HF_TOKEN", "HF_HUB_CACHE", "HF_HUB_OFFLINE"] {
            command.env_remove(name);
        }
        command.env("HF_ENDPOINT", &server.endpoint).env("HF_HOME", &hub_home).output().unwrap()
    };
    let [branch, commit] = ["maker/model@v1/x".to_owned(), format!("maker/model@{COMMIT}")];
    for name in [&branch, &commit] {
        let asked = run(&["generate", "-m", name, "--no-quantize", "-p", "a", "-n", "1"]);
        let said = String::from_utf8_lossy(&asked.stderr).into_owned();
        assert!(!asked.status.success() && said.contains(&format!("`pocketlora pull {name}` fetches it")), "{said}");
        assert!(run(&["pull", name]).status.success());
        assert!(run(&["generate", "-m", name, "--no-quantize", "-p", "a", "-n", "1"]).status.success());
    }
    let listed = |what: &str| String::from_utf8(run(&["list"]).stdout).unwrap().contains(what);
    assert!(listed(&branch) && listed(&commit));
    // An adapter names the repository as its base, and is exported without more.
    let (out, gguf) = (f.path("adapter"), f.path("adapter.gguf"));
    let data = f.data.to_str().unwrap();
    let train = [
        "train",
        "--auto",
        "off",
        "--keep",
        "off",
        "--skip-check",
        "-m",
        &branch,
        "--no-quantize",
        "-d",
        data,
        "-o",
        &out,
    ];
    assert!(run(&[&train[..], &["--steps", "1"]].concat()).status.success());
    let config = fs::read_to_string(std::path::Path::new(&out).join("adapter_config.json")).unwrap();
    assert!(config.contains("\"base_model_name_or_path\": \"maker/model\""), "{config}");
    let done = run(&["export", &out, "--to", "gguf", "-o", &gguf]);
    assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
    let done = run(&["remove", &branch]);
    assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
    assert!(!listed(&branch) && listed(&commit));
}
