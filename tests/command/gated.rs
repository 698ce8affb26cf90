//! A gated repository of a hub on this machine, with a token from where people keep theirs.

#[path = "../library/pull/server.rs"]
mod server;

use crate::fixture::{Fixture, fixture};
use server::{Served, small, start};
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
